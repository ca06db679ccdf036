//! The thread that accepts public connections.
//!
//! It is no worker's: while those are busy with a storm, the kernel's queue would fill, and whoever finds that full tries
//! again only after a second, or three. What is accepted joins the runtime's queue from outside, of which workers take
//! when their own tasks have had their turn, so that a crowd at the door holds up those who are connected little.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use socket2::SockRef;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::sharded::Count;

/// Longest pause after a failed accept, so that a full file table is no busy loop.
pub(crate) const PAUSE_MAX: Duration = Duration::from_millis(100);

const PAUSE_MIN: Duration = Duration::from_millis(1);

/// The pause after all that had come were accepted: a switch of threads costs as much as accepting one, so of those that
/// come one upon the other many are accepted in a row.
const REST: Duration = Duration::from_millis(1);

/// A listener whose connections are accepted until this is dropped.
#[derive(Debug)]
pub struct Accepting {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    listener: TcpListener,
    /// Failed accept calls.
    errors: Count,
    is_over: AtomicBool,
}

impl Accepting {
    /// Hands what comes to `take`, which is called within this tokio runtime. The task ends with the thread.
    ///
    /// # Errors
    /// The runtime does not give the listener back.
    pub fn start(
        listener: tokio::net::TcpListener,
        errors: Count,
        take: impl Fn(TcpStream, SocketAddr) + Send + 'static,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let state = Arc::new(State { listener: listener.into_std()?, errors, is_over: AtomicBool::new(false) });
        let accepting = Self { state: Arc::clone(&state) };
        Ok((accepting, tokio::task::spawn_blocking(move || state.accept_all(take))))
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::Release);
        // Wakes the thread.
        let _ = SockRef::from(&self.state.listener).shutdown(std::net::Shutdown::Both);
    }
}

impl State {
    fn accept_all(&self, take: impl Fn(TcpStream, SocketAddr)) {
        let mut pause = PAUSE_MIN;
        while !self.is_over.load(Ordering::Acquire) {
            match self.accept() {
                Ok((socket, remote)) => {
                    pause = PAUSE_MIN;
                    take(socket, remote);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::park_timeout(REST);
                    // Its errors are the next accept's.
                    let _ = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], None);
                }
                Err(error) => {
                    if !self.is_over.load(Ordering::Acquire) {
                        self.errors.inc();
                        warn!(%error, "cannot accept a connection");
                    }
                    std::thread::park_timeout(pause);
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (socket, remote) = self.listener.accept()?;
        socket.set_nonblocking(true)?;
        // Without Nagle's algorithm a write leaves at once; if that cannot be set the peer is gone.
        let _ = socket.set_nodelay(true);
        Ok((socket, remote))
    }
}
