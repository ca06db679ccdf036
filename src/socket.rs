//! A connection's way to its peer: the TCP socket, and the TLS session over it where the listener speaks TLS.
//!
//! Readiness always comes from the TCP socket, and "would block" always means that it refused bytes. TLS holds back
//! at most one write's worth of records (64 KiB): nothing more is taken while the socket refuses them.

use std::io::{self, IoSlice, Read as _, Write};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use rustls::ServerConnection;
use tokio::net::TcpStream;

use crate::writer::Transport;

/// Reads of the TCP socket for one of the session (4 KiB each, as rustls has it): a record may hold a single byte, or
/// nothing but work, and while one is read nobody writes to the connection.
const TLS_READS_MAX: usize = 16;

/// The transport of one connection.
#[derive(Debug)]
pub struct Socket {
    tcp: TcpStream,
    /// Absent where nothing is encrypted: that costs a pointer.
    tls: Option<Box<Mutex<ServerConnection>>>,
}

/// The TCP socket as rustls sees it.
struct Records<'a>(&'a TcpStream);

impl io::Read for Records<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Records<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Socket {
    /// A socket without TLS.
    pub fn plain(tcp: TcpStream) -> Self {
        Self { tcp, tls: None }
    }

    /// A socket whose TLS handshake is done. Also returns what the session has decrypted, after `behind`, which was
    /// read before: no readiness will tell of it.
    ///
    /// # Errors
    /// A session that has failed.
    pub fn tls(tcp: TcpStream, mut session: ServerConnection, behind: Bytes) -> io::Result<(Self, Bytes)> {
        let mut decrypted = BytesMut::from(behind);
        let mut buffer = [0; 4096];
        loop {
            match session.reader().read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => decrypted.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok((Self { tcp, tls: Some(Box::new(Mutex::new(session))) }, decrypted.freeze()))
    }

    /// The TCP socket, for readiness and options.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Reads what has arrived.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] once the TCP socket has no more, which clears its readiness;
    /// [`io::ErrorKind::Interrupted`] where much arrived and nothing came of it: others have their turn first; anything
    /// else ends the connection.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return self.tcp.try_read(buffer) };
        let mut session = tls.lock();
        let mut filled = 0;
        let mut reads = 0;
        // The socket is asked only when nothing decrypted is left: so its readiness speaks for that too.
        while filled < buffer.len() {
            match session.reader().read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return read_before(filled, error),
                Err(_) if reads == TLS_READS_MAX => return read_before(filled, io::ErrorKind::Interrupted.into()),
                Err(_) => match session.read_tls(&mut Records(&self.tcp)) {
                    Err(error) => return read_before(filled, error),
                    Ok(_) => {
                        reads += 1;
                        if let Err(error) = session.process_new_packets() {
                            // The peer is told why, if its socket takes it.
                            let _ = send(&mut session, &self.tcp, &mut false);
                            return read_before(filled, io::Error::new(io::ErrorKind::InvalidData, error));
                        }
                    }
                },
            }
        }
        Ok(filled)
    }

    /// Ends our side: with TLS by its `close_notify` (RFC 8446 §6.1), without which the end may be an attacker's.
    pub async fn end_writing(&self) {
        if let Some(tls) = &self.tls {
            tls.lock().send_close_notify();
            while let Err(error) = self.flush(&mut false) {
                if error.kind() != io::ErrorKind::WouldBlock || self.tcp.writable().await.is_err() {
                    break;
                }
            }
        }
        let _ = socket2::SockRef::from(&self.tcp).shutdown(std::net::Shutdown::Write);
    }
}

impl Transport for Socket {
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return match slices {
                [one] => self.tcp.try_write(one),
                many => self.tcp.try_write_vectored(many),
            };
        };
        let mut session = tls.lock();
        send(&mut session, &self.tcp, &mut false)?;
        let taken = session.writer().write_vectored(slices)?;
        match send(&mut session, &self.tcp, &mut false) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            // What is refused now is asked for again by `flush`, and by the next write.
            _ => Ok(taken),
        }
    }

    fn flush(&self, has_progress: &mut bool) -> io::Result<()> {
        let Some(tls) = &self.tls else { return Ok(()) };
        send(&mut tls.lock(), &self.tcp, has_progress)
    }
}

/// Sends records until there are none, or the socket refuses.
fn send(session: &mut ServerConnection, tcp: &TcpStream, has_progress: &mut bool) -> io::Result<()> {
    while session.wants_write() {
        match session.write_tls(&mut Records(tcp)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => *has_progress = true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What was read first counts; the error comes again at the next read.
fn read_before(filled: usize, error: io::Error) -> io::Result<usize> {
    if filled > 0 { Ok(filled) } else { Err(error) }
}
