//! The header that a TCP proxy puts before a connection: PROXY protocol, version 1 and 2, of HAProxy's
//! `proxy-protocol.txt`. It is read to its last byte and not further, and parsed by the `ppp` crate.

use std::io;
use std::net::SocketAddr;

use ppp::{HeaderResult, v1, v2};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

/// What both versions have at least, and the second begins with: its signature (section 2.2).
const SIGNATURE_BYTES: usize = 12;
const SIGNATURE: &[u8; SIGNATURE_BYTES] = b"\r\n\r\n\0\r\nQUIT\n";

/// Longest header of version 1 (section 2.1).
const V1_BYTES_MAX: usize = 107;

/// Most that version 2 may have behind its first 16 bytes: addresses, and what clouds add about endpoints and TLS.
const V2_BYTES_MAX: usize = 2048;

/// Reads the header; gives the client's address, or none if the proxy speaks for itself (its health checks).
///
/// # Errors
/// A connection that fails, or begins in another way ([`io::ErrorKind::InvalidData`]).
pub async fn read(socket: &mut TcpStream) -> io::Result<Option<SocketAddr>> {
    let mut header = vec![0; SIGNATURE_BYTES];
    socket.read_exact(&mut header).await?;
    if header == SIGNATURE {
        let (start, len) = (socket.read_u16().await?, socket.read_u16().await?);
        if usize::from(len) > V2_BYTES_MAX {
            return Err(bad("its header is too long"));
        }
        header.extend(start.to_be_bytes().into_iter().chain(len.to_be_bytes()));
        let addresses = header.len();
        header.resize(addresses + usize::from(len), 0);
        socket.read_exact(&mut header[addresses..]).await?;
    } else if header.starts_with(b"PROXY ") {
        read_line(socket, &mut header).await?;
    } else {
        return Err(bad("it does not begin with a header"));
    }
    match HeaderResult::parse(&header) {
        HeaderResult::V1(Ok(header)) => Ok(match header.addresses {
            v1::Addresses::Tcp4(both) => Some((both.source_address, both.source_port).into()),
            v1::Addresses::Tcp6(both) => Some((both.source_address, both.source_port).into()),
            v1::Addresses::Unknown => None,
        }),
        HeaderResult::V2(Ok(header)) => Ok(match (header.command, header.addresses) {
            (v2::Command::Proxy, v2::Addresses::IPv4(both)) => Some((both.source_address, both.source_port).into()),
            (v2::Command::Proxy, v2::Addresses::IPv6(both)) => Some((both.source_address, both.source_port).into()),
            _ => None,
        }),
        _ => Err(bad("its header is malformed")),
    }
}

/// Reads the rest of a line. What is there is looked at first, so that nothing behind the line is taken.
async fn read_line(socket: &mut TcpStream, header: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let mut ahead = [0; V1_BYTES_MAX];
        let room = V1_BYTES_MAX.saturating_sub(header.len());
        let seen = socket.peek(&mut ahead[..room]).await?;
        if seen == 0 {
            return Err(bad("its header has no end"));
        }
        let end = ahead[..seen].iter().position(|byte| *byte == b'\n');
        let len = end.map_or(seen, |end| end + 1);
        socket.read_exact(&mut ahead[..len]).await?;
        header.extend_from_slice(&ahead[..len]);
        if end.is_some() {
            return Ok(());
        }
    }
}

fn bad(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
