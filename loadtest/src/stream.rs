//! A connection of the generator: TCP, or TLS over it.
//!
//! A generator measures and trusts: it takes any certificate.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};

use anyhow::Context as _;
use mio::net::TcpStream;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme};

/// A socket that does not block.
#[derive(Debug)]
pub(crate) struct Stream {
    pub tcp: TcpStream,
    tls: Option<Box<ClientConnection>>,
}

/// One for all, so that sessions are resumed as a browser's are.
static CONFIG: LazyLock<Result<Arc<ClientConfig>, Error>> = LazyLock::new(|| {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)));
    Ok(Arc::new(builder.with_no_client_auth()))
});

impl Stream {
    /// Over a socket that is connecting, or connected.
    pub(crate) fn new(tcp: TcpStream, peer: SocketAddr, is_tls: bool) -> anyhow::Result<Self> {
        let tls = is_tls.then(|| session(peer)).transpose()?;
        Ok(Self { tcp, tls: tls.map(Box::new) })
    }

    /// Connects, sends `request`, and goes on without blocking.
    pub(crate) fn open(addr: SocketAddr, request: &[u8], is_tls: bool) -> anyhow::Result<Self> {
        let mut socket = std::net::TcpStream::connect(addr).with_context(|| format!("cannot connect to {addr}"))?;
        socket.set_nodelay(true)?;
        let tls = match is_tls {
            false => {
                socket.write_all(request)?;
                None
            }
            true => {
                let mut session = session(addr)?;
                session.writer().write_all(request)?;
                while session.is_handshaking() || session.wants_write() {
                    session.complete_io(&mut socket).context("the TLS handshake")?;
                }
                Some(Box::new(session))
            }
        };
        socket.set_nonblocking(true)?;
        Ok(Self { tcp: TcpStream::from_std(socket), tls })
    }
}

fn session(peer: SocketAddr) -> anyhow::Result<ClientConnection> {
    let config = CONFIG.clone().context("TLS cannot be set up")?;
    Ok(ClientConnection::new(config, ServerName::from(peer.ip()))?)
}

/// Sends records as far as the socket takes them.
fn send(session: &mut ClientConnection, tcp: &mut TcpStream) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(tcp)?;
    }
    Ok(())
}

fn is_refused(sent: &io::Result<()>) -> bool {
    sent.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

impl Read for Stream {
    /// Fills the buffer, or asks the socket until it has no more.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &mut self.tls else { return self.tcp.read(buffer) };
        let sent = send(session, &mut self.tcp);
        if !is_refused(&sent) {
            sent?;
        }
        let mut filled = 0;
        while filled < buffer.len() {
            let outcome = match session.reader().read(&mut buffer[filled..]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => match session.read_tls(&mut self.tcp) {
                    Ok(_) => session.process_new_packets().map(|_| None).map_err(io::Error::other),
                    Err(error) => Err(error),
                },
                outcome => outcome.map(Some),
            };
            match outcome {
                Ok(Some(0)) => break,
                Ok(Some(len)) => filled += len,
                Ok(None) => drop(send(session, &mut self.tcp)),
                Err(_) if filled > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

impl Write for Stream {
    /// Takes nothing while the socket refuses what was taken before.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(session) = &mut self.tls else { return self.tcp.write(bytes) };
        send(session, &mut self.tcp)?;
        let taken = session.writer().write(bytes)?;
        let sent = send(session, &mut self.tcp);
        if is_refused(&sent) { Ok(taken) } else { sent.map(|()| taken) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
