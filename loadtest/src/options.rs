//! The options that the commands share.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Args;

use crate::publisher::{Destination, Via};
use crate::wire;

/// What is measured, from where, and where the report goes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Target {
    /// The gateway's public listener
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub addr: SocketAddr,
    /// Speak TLS to it, and take any certificate
    #[arg(long)]
    pub tls: bool,
    /// The token that every connection shows, where HUBCAST_AUTH is jwt: `hubcast token` mints one. Its user has a
    /// user's limits, for all of them together
    #[arg(long)]
    pub token: Option<String>,
    /// How publications reach the gateway
    #[arg(long, value_enum, default_value = "socket")]
    via: Via,
    /// The gateway's internal listener, for --via http
    #[arg(long, default_value = "127.0.0.1:8081")]
    api: SocketAddr,
    /// One of HUBCAST_API_KEYS, where they are set
    #[arg(long)]
    api_key: Option<String>,
    /// Redis, for --via redis
    #[arg(long, default_value = "127.0.0.1:6379")]
    redis: SocketAddr,
    /// HUBCAST_REDIS_CHANNEL_PREFIX
    #[arg(long, default_value = "hub:")]
    redis_prefix: String,
    /// Publishing connections, in turn; with more than one the order is not known beforehand, and what is
    /// checked is that all subscribers saw the same
    #[arg(long, default_value_t = 1, value_parser = positive)]
    pub publishers: usize,
    /// The server's process on this machine, to report its CPU time and memory
    #[arg(long)]
    pub server_pid: Option<u32>,
    /// Local addresses to connect from, in turn: each has its own 28,000 ports (127.0.0.2,127.0.0.3 on loopback)
    #[arg(long, value_delimiter = ',')]
    pub sources: Vec<IpAddr>,
    /// Processes that share the subscribers: past one core and one file limit
    #[arg(long, default_value_t = 1, value_parser = positive)]
    pub processes: usize,
    /// Connects under way at once, in each process
    #[arg(long, default_value_t = 128, value_parser = positive)]
    pub connecting: usize,
    /// Write the report as JSON to a file, or to standard output with -
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Write the report as one self-contained page
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// No progress bar
    #[arg(long)]
    pub quiet: bool,
}

/// Who subscribes to what, and how large publications are.
#[derive(Args, Clone, Debug)]
pub(crate) struct Crowd {
    /// Connections
    #[arg(long, default_value_t = 1000, value_parser = positive)]
    pub subscribers: usize,
    /// Channels; publications go to them in turn
    #[arg(long, default_value_t = 1, value_parser = positive)]
    pub channels: usize,
    /// Subscriptions of each connection
    #[arg(long, default_value_t = 1, value_parser = positive)]
    pub subscriptions: usize,
    /// Bytes of JSON in each publication
    #[arg(long, default_value_t = 128, value_parser = payload)]
    pub payload: usize,
}

impl Target {
    /// Where publications go.
    pub(crate) fn destination(&self) -> Destination {
        let addr = match self.via {
            Via::Socket => self.addr,
            Via::Http => self.api,
            Via::Redis => self.redis,
        };
        let is_tls = self.tls && self.via == Via::Socket;
        Destination {
            via: self.via,
            addr,
            is_tls,
            redis_prefix: self.redis_prefix.clone(),
            api_key: self.api_key.clone(),
            token: self.token.clone(),
        }
    }

    /// The options as the report shows them.
    pub(crate) fn settings(&self, crowd: &Crowd) -> Vec<(String, String)> {
        let via = match self.via {
            Via::Socket => "WebSocket",
            Via::Http => "HTTP",
            Via::Redis => "Redis",
        };
        vec![
            ("server".into(), format!("{}{}", self.addr, if self.tls { ", TLS" } else { "" })),
            ("subscribers".into(), crowd.subscribers.to_string()),
            ("channels".into(), crowd.channels.to_string()),
            ("subscriptions of each".into(), crowd.subscriptions.to_string()),
            ("payload".into(), format!("{} bytes", crowd.payload)),
            ("publishing".into(), format!("{via}, {} connection(s)", self.publishers)),
            ("generator processes".into(), self.processes.to_string()),
        ]
    }
}

/// A number above zero.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && rate < 1e7 => Ok(rate),
        _ => Err("a number above 0".into()),
    }
}

/// A number of at least one.
pub(crate) fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("a number of at least 1".into()),
    }
}

fn payload(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(bytes) if bytes >= wire::PAYLOAD_BYTES_MIN => Ok(bytes),
        _ => Err(format!("at least {} bytes, for the numbers in it", wire::PAYLOAD_BYTES_MIN)),
    }
}
