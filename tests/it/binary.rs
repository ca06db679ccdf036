//! The real binary as a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Instance, Process, soon};
use crate::observe;

/// The binary on free ports, started with the given variables.
pub struct Binary {
    pub process: Process,
    pub public: SocketAddr,
    pub internal: SocketAddr,
    output: BufReader<std::process::ChildStdout>,
    log: String,
}

impl Binary {
    /// Starts it with a limit of open files.
    pub fn start(files_max: u32, env: &[(&str, &str)]) -> Self {
        let is_text = env.contains(&("HUBCAST_LOG_FORMAT", "text"));
        let kind = if is_text { ".text" } else { "" };
        let log = format!("gateway-{:016x}{kind}.log", rand::random::<u64>());
        let mut child = Command::new("sh")
            .args(["-c", &format!("ulimit -n {files_max}; exec \"$0\""), env!("CARGO_BIN_EXE_hubcast")])
            .envs([
                ("HUBCAST_LISTEN", "127.0.0.1:0"),
                ("HUBCAST_INTERNAL_LISTEN", "127.0.0.1:0"),
                ("HUBCAST_LOG", "hubcast=debug"),
                ("HUBCAST_LOG_FORMAT", "json"),
            ])
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .stderr(observe::file(&log))
            .spawn()
            .expect("the binary is built");
        let mut output = BufReader::new(child.stdout.take().expect("its output is piped"));
        let (mut public, mut internal) = (None, None);
        while public.is_none() || internal.is_none() {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "it ended before it was ready");
            let addr_after = |start: &str| line.split_once(start)?.1.split('/').next()?.parse().ok();
            public = public.or_else(|| addr_after("ws://"));
            internal = internal.or_else(|| addr_after("http://"));
        }
        Self { process: Process(child), public: public.unwrap(), internal: internal.unwrap(), output, log }
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(observe::run_directory().join(&self.log)).expect("the log is there")
    }

    /// Waits for the end; gives the exit status and the rest of the output.
    pub async fn end(mut self) -> (std::process::ExitStatus, String) {
        let ended = tokio::task::spawn_blocking(move || {
            let mut rest = String::new();
            self.output.read_to_string(&mut rest).unwrap();
            (self.process.0.wait().unwrap(), rest)
        });
        soon("the end of the process", ended).await.unwrap()
    }
}

impl Instance for Binary {
    fn public(&self) -> SocketAddr {
        self.public
    }

    fn internal(&self) -> SocketAddr {
        self.internal
    }
}

/// One request on a connection of its own; the first bytes of the answer, or `None` if there is none.
pub async fn exchange(addr: SocketAddr, request: &str) -> Option<String> {
    let mut socket = TcpStream::connect(addr).await.ok()?;
    socket.write_all(request.as_bytes()).await.ok()?;
    let mut answer = [0; 512];
    let len = socket.read(&mut answer).await.ok()?;
    Some(String::from_utf8_lossy(&answer[..len]).into_owned())
}
