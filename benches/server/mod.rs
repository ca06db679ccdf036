//! A `redis-server` of its own for a bench, on a free port of loopback, that keeps nothing on disk.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

/// Ends when it is dropped.
pub(crate) struct Server {
    pub(crate) process: Child,
    port: u16,
}

impl Server {
    /// It may take a moment until it answers.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let process = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        Self { process, port }
    }

    pub(crate) fn client(&self) -> redis::Client {
        redis::Client::open(format!("redis://127.0.0.1:{}/", self.port)).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
