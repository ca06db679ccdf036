//! A gateway under attack, and the neighbour who must not notice.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::binary::Binary;
use crate::harness::{Client, Instance, eventually, http, metric, soon};
use crate::issuer::token;

/// What an attack may leave in the process, in KiB: pages that the allocator keeps, and buffers of its threads. What a
/// leak would leave is more, since each attack comes many times.
const RSS_SLACK_KIB: u64 = 12 << 10;

/// Of several arenas of glibc's each grows to the most that its threads ever had at once: after 1,000 sockets that say
/// nothing memory stood at 33 MB, after 30 such waves at 58, and went on growing. Of one it stands after two waves (33, 39,
/// 41, 42, 42 and 42 MB), so that what leaks can be told from what is kept.
const ONE_ARENA: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// Files that the process may have open beyond the baseline.
const FILES_SLACK: usize = 2;

const NEIGHBOURS: &str = "neighbours";

/// A process of its own with one well-behaved client.
pub struct Target {
    pub binary: Binary,
    neighbour: mpsc::Receiver<Value>,
    /// With which the neighbour's events are published; empty if the API needs none.
    key: String,
    rss_kib: u64,
    files: usize,
    published: u64,
}

impl Instance for Target {
    fn public(&self) -> SocketAddr {
        self.binary.public
    }

    fn internal(&self) -> SocketAddr {
        self.binary.internal
    }
}

impl Target {
    pub async fn start(env: &[(&str, &str)]) -> Self {
        Self::start_with_files(2000, env).await
    }

    /// With an API that needs this key.
    pub async fn start_with_key(env: &[(&str, &str)], key: &str) -> Self {
        Self::start_with(2000, env, format!("X-API-Key: {key}\r\n")).await
    }

    /// With a limit of open files.
    pub async fn start_with_files(files_max: u32, env: &[(&str, &str)]) -> Self {
        Self::start_with(files_max, env, String::new()).await
    }

    async fn start_with(files_max: u32, env: &[(&str, &str)], key: String) -> Self {
        let binary = Binary::start(files_max, &[env, &[ONE_ARENA]].concat());
        crate::harness::ready(&binary).await;
        let path = match env.contains(&("HUBCAST_AUTH", "jwt")) {
            true => format!("/ws?token={}", token(json!({"sub": "neighbour", "subscribe": [NEIGHBOURS]}))),
            false => "/ws".to_owned(),
        };
        let mut client = Client::open(&binary, &path, None).await;
        assert_eq!(client.json().await["type"], "welcome");
        client.send(&json!({"type": "subscribe", "channel": NEIGHBOURS})).await;
        client.expect(&json!({"type": "subscribed", "channel": NEIGHBOURS})).await;
        let neighbour = received(client);
        let mut target = Self { binary, neighbour, key, rss_kib: 0, files: 0, published: 0 };
        // A few rounds of everything that is checked later, so that what is allocated once is in the baseline.
        for _ in 0..20 {
            target.assert_neighbour_receives().await;
            metric(&target, "hubcast_connections").await;
        }
        target.rss_kib = target.rss_kib_now();
        target.files = target.files_now();
        target
    }

    /// Takes what the process holds now for the baseline: after a first wave of an attack the allocator keeps pages, and
    /// the same wave again must not add to them.
    pub fn rebase(&mut self) {
        self.rss_kib = self.rss_kib.max(self.rss_kib_now());
    }

    fn proc(&self, name: &str) -> std::path::PathBuf {
        format!("/proc/{}/{name}", self.binary.process.0.id()).into()
    }

    pub fn rss_kib_now(&self) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).expect("the process lives");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    pub fn files_now(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).expect("the process lives").count()
    }

    /// CPU that it has used, in clock ticks of 10 ms.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(self.proc("stat")).expect("the process lives");
        let (_, rest) = stat.rsplit_once(')').expect("a name in parentheses");
        let fields: Vec<_> = rest.split_whitespace().collect();
        // utime and stime, fields 14 and 15 of proc_pid_stat(5).
        fields[11].parse::<u64>().expect("ticks") + fields[12].parse::<u64>().expect("ticks")
    }

    pub async fn assert_neighbour_receives(&mut self) {
        self.published += 1;
        let request = format!("POST /api/publish/{NEIGHBOURS}");
        let answer = http(&self.binary, &request, &self.key, self.published.to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let received = soon("the neighbour's event", self.neighbour.recv()).await;
        let expected = json!({"type": "event", "channel": NEIGHBOURS, "data": self.published});
        assert_eq!(received.expect("the neighbour is connected"), expected);
    }

    /// The process lives, the neighbour receives what is published now, nobody else is connected or subscribed, nothing
    /// waits, and files and memory are back where they were.
    pub async fn assert_unharmed(&mut self) {
        assert!(self.binary.process.0.try_wait().expect("it is ours").is_none(), "the process ended");
        assert_eq!(http(&self.binary, "GET /livez", "", b"").await.status, 200);
        self.assert_neighbour_receives().await;
        for (series, value) in [
            ("hubcast_connections", 1.0),
            ("hubcast_subscriptions", 1.0),
            ("hubcast_channels", 1.0),
            ("hubcast_outbox_frames", 0.0),
            ("hubcast_outbox_bytes", 0.0),
            (r#"hubcast_ledger_bytes{kind="arriving"}"#, 0.0),
        ] {
            crate::harness::await_metric(&self.binary, series, value).await;
        }
        eventually("its files to be closed", async || (self.files_now() <= self.files + FILES_SLACK).then_some(()))
            .await;
        let most = self.rss_kib + RSS_SLACK_KIB;
        eventually(&format!("its memory to be back at {} KiB", self.rss_kib), async || {
            (self.rss_kib_now() <= most).then_some(())
        })
        .await;
    }

    /// How often connections were closed for a reason of ours.
    pub async fn closed(&self, reason: &str) -> f64 {
        metric(&self.binary, &format!("hubcast_connections_closed_total{{reason=\"{reason}\"}}")).await
    }

    /// Waits until a series has grown by this much since it was `before`.
    pub async fn await_growth(&self, series: &str, before: f64, by: f64) {
        crate::harness::await_metric(&self.binary, series, before + by).await;
    }
}

/// What a client receives; it answers pings meanwhile.
pub fn received(mut client: Client) -> mpsc::Receiver<Value> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        loop {
            let frame = client.json().await;
            if sender.send(frame).await.is_err() {
                return;
            }
        }
    });
    receiver
}
