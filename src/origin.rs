//! Which web pages may open a connection: the `Origin` of RFC 6455 §4.2.2 (4) against `HUBCAST_ORIGINS`. Pure.
//!
//! A browser lets any page connect anywhere, and sends the cookies of where it connects to along: so a page of
//! somebody else could act as its visitor ("cross-site WebSocket hijacking"). With a list only what it names gets in.
//! Without one the cookies decide: a request that has none carries nothing that is not the page's own. Clients
//! that are no browser send no `Origin`, and need none unless they have cookies.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use hyper::header::{self, HeaderMap};

pub(crate) const ORIGINS_ALLOWED: &str =
    "a comma list of origins such as https://app.example.org or https://*.example.org, or * for any";

/// What `HUBCAST_ORIGINS` says; empty: cookies decide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(Vec<Rule>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    /// `*`: any, and none.
    Any,
    /// One origin.
    Exact(Origin),
    /// All subdomains, however deep, of an origin's host, and not that itself.
    Subdomains(Origin),
}

/// Scheme, host and port (RFC 6454 §4), in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    /// None: the scheme's own.
    port: Option<u16>,
}

impl Origins {
    /// Reads the list; `None` if one of its entries is neither an origin, nor one of subdomains, nor `*`.
    pub fn parse(text: &str) -> Option<Self> {
        let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        entries.map(Rule::parse).collect::<Option<_>>().map(Self)
    }

    /// Whether a handshake with these headers may go on. What looks like several origins is none of ours.
    pub fn allow(&self, headers: &HeaderMap) -> bool {
        if self.0.contains(&Rule::Any) {
            return true;
        }
        let has_cookies = headers.contains_key(header::COOKIE);
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let origin = match (origins.next(), origins.next()) {
            (None, _) => return !has_cookies,
            (Some(one), None) => one.to_str().ok().and_then(Origin::parse),
            _ => None,
        };
        if self.0.is_empty() {
            return !has_cookies || origin.is_some_and(|origin| origin.is_same_site(headers));
        }
        origin.is_some_and(|origin| self.0.iter().any(|rule| rule.matches(&origin)))
    }
}

impl Rule {
    fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        match text.split_once("://*.") {
            Some((scheme, domain)) => Origin::parse(&format!("{scheme}://{domain}")).map(Self::Subdomains),
            None => Origin::parse(text).map(Self::Exact),
        }
    }

    fn matches(&self, origin: &Origin) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact == origin,
            Self::Subdomains(parent) => {
                let below = origin.host.strip_suffix(&parent.host).and_then(|rest| rest.strip_suffix('.'));
                (&parent.scheme, parent.port) == (&origin.scheme, origin.port)
                    && below.is_some_and(|sub| !sub.is_empty())
            }
        }
    }
}

impl Origin {
    /// Takes `scheme://host` and `scheme://host:port`, and nothing else: not `null`, no path, no user.
    fn parse(text: &str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let is_scheme = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
        if !scheme.starts_with(|first: char| first.is_ascii_alphabetic()) || !scheme.bytes().all(is_scheme) {
            return None;
        }
        let (host, port) = split_port(authority)?;
        let scheme = scheme.to_ascii_lowercase();
        let port = port.filter(|port| Some(*port) != default_port(&scheme));
        Some(Self { scheme, host, port })
    }

    /// The page came from where it connects to; or both are on this machine, where a developer has several servers.
    fn is_same_site(&self, headers: &HeaderMap) -> bool {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).and_then(split_port);
        let Some((host, port)) = host else { return false };
        let port = port.filter(|port| Some(*port) != default_port(&self.scheme));
        (&host, port) == (&self.host, self.port) || is_loopback(&host) && is_loopback(&self.host)
    }
}

/// The host in lower case, and the port if there is one.
fn split_port(authority: &str) -> Option<(String, Option<u16>)> {
    let end = if authority.starts_with('[') {
        authority.find(']')? + 1
    } else {
        authority.find(':').unwrap_or(authority.len())
    };
    let (host, rest) = authority.split_at(end);
    let port = match rest.strip_prefix(':') {
        // `parse` alone would take a sign.
        Some(digits) if digits.bytes().all(|digit| digit.is_ascii_digit()) => Some(digits.parse().ok()?),
        None if rest.is_empty() => None,
        _ => return None,
    };
    let is_v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).map(|host| host.parse::<Ipv6Addr>());
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let is_host = match is_v6 {
        Some(address) => address.is_ok(),
        None => !host.is_empty() && host.bytes().all(is_name),
    };
    is_host.then(|| (host.to_ascii_lowercase(), port))
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "https" => Some(443),
        "http" => Some(80),
        _ => None,
    }
}

/// `localhost` and its subdomains (RFC 6761 §6.3), 127.0.0.0/8 and `[::1]`.
fn is_loopback(host: &str) -> bool {
    let is_v4 = || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback());
    host == "localhost" || host.ends_with(".localhost") || host == "[::1]" || is_v4()
}

impl fmt::Display for Origins {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules: Vec<_> = self.0.iter().map(Rule::to_string).collect();
        formatter.write_str(&rules.join(","))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (wild, Origin { scheme, host, port }) = match self {
            Self::Any => return formatter.write_str("*"),
            Self::Exact(origin) => ("", origin),
            Self::Subdomains(origin) => ("*.", origin),
        };
        write!(formatter, "{scheme}://{wild}{host}")?;
        port.map_or(Ok(()), |port| write!(formatter, ":{port}"))
    }
}
