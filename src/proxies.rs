//! Whose word counts for a client's address: the proxies of `HUBCAST_TRUSTED_PROXIES`, and what they forward. Pure.
//!
//! Anybody can write `X-Forwarded-For`. So it is believed only if the peer is listed, and only from the right,
//! where each proxy adds whom it saw: the first address that is no listed proxy is the client.

use std::net::{IpAddr, SocketAddr};

use hyper::header::{HeaderMap, HeaderName};
use ipnet::IpNet;

pub(crate) const PROXIES_ALLOWED: &str = "a comma list of addresses or networks such as 10.0.0.0/8 or 2001:db8::1";
pub(crate) const HEADER_ALLOWED: &str = "x-forwarded-for or forwarded";

/// Who may say for whom it speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxies {
    networks: Vec<IpNet>,
    header: ForwardingHeader,
}

/// The header that the proxies write; the other one may be the client's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForwardingHeader {
    /// `X-Forwarded-For`
    XForwardedFor,
    /// `Forwarded` (RFC 7239)
    Forwarded,
}

impl ForwardingHeader {
    /// Reads its name.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::XForwardedFor, Self::Forwarded].into_iter().find(|header| header.as_str() == text)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::XForwardedFor => "x-forwarded-for",
            Self::Forwarded => "forwarded",
        }
    }
}

impl Proxies {
    /// Those of a list as `parse_networks` gives it.
    pub fn new(networks: Vec<IpNet>, header: ForwardingHeader) -> Self {
        Self { networks, header }
    }

    /// Whether nobody is listed.
    pub fn is_empty(&self) -> bool {
        self.networks.is_empty()
    }

    /// The networks, as they are written.
    pub fn networks(&self) -> &[IpNet] {
        &self.networks
    }

    /// The header that they write.
    pub fn header(&self) -> ForwardingHeader {
        self.header
    }

    /// Whether an address is a listed proxy's.
    pub fn trust(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// Whose request came from `peer` with these headers. The port is 0 where the proxy does not tell it.
    pub fn client(&self, peer: SocketAddr, headers: &HeaderMap) -> SocketAddr {
        let mut client = peer;
        let lines: Vec<_> = headers.get_all(HeaderName::from_static(self.header.as_str())).iter().collect();
        let mut hops = lines.iter().rev().flat_map(|line| hops(self.header, line.as_bytes()));
        // What a proxy cannot tell ("unknown"), or wrote in a way of its own, ends what we know.
        while self.trust(client.ip())
            && let Some(Some(hop)) = hops.next()
        {
            client = hop;
        }
        client
    }
}

/// Reads the list; single addresses are networks of one.
pub(crate) fn parse_networks(text: &str) -> Option<Vec<IpNet>> {
    let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let network = |entry: &str| entry.parse().or_else(|_| entry.parse::<IpAddr>().map(IpNet::from)).ok();
    // The bits behind the prefix say nothing: 10.1.2.3/8 is shown as what it is.
    entries.map(|entry| network(entry).map(|network| network.trunc())).collect()
}

/// The hops of one header line from the right; `None` for one that is no address.
fn hops(header: ForwardingHeader, line: &[u8]) -> Vec<Option<SocketAddr>> {
    // What a client wrote itself may be no text; what a proxy has put behind it counts all the same.
    let line = String::from_utf8_lossy(line);
    let elements = line.rsplit(',').map(str::trim).filter(|element| !element.is_empty());
    match header {
        ForwardingHeader::XForwardedFor => elements.map(address).collect(),
        ForwardingHeader::Forwarded => elements.map(|element| forwarded_for(element).and_then(address)).collect(),
    }
}

/// The node of `for=` in an element such as `proto=https;for="[2001:db8::1]:1234"`.
fn forwarded_for(element: &str) -> Option<&str> {
    element.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        let unquoted = value.trim().strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        name.trim().eq_ignore_ascii_case("for").then(|| unquoted.unwrap_or(value.trim()))
    })
}

/// An address as proxies write it: with or without a port, IPv6 with or without brackets.
fn address(text: &str) -> Option<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let ip = || bare.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, 0));
    let address = text.parse().ok().or_else(ip)?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}
