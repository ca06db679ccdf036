//! What the registry costs for 100,000 connections that stay: CPU of this process and of Redis, as shares of a
//! core. Not criterion's kind of number: it runs for a while against a real `redis-server`. `benches/README.md`.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a report, and a bench may panic")]

use std::sync::Arc;
use std::time::Duration;

use hubcast::commands::Place;
use hubcast::redis_link::{Access, Endpoint};
use hubcast::registry::{Registry, Roll, Settings};
use hubcast::registry_writer;
use serde_json::{Value, json};
use server::Server;

mod server;

/// Connections that nobody made.
struct Synthetic(u64);

impl Roll for Synthetic {
    fn instance_id(&self) -> &'static str {
        "0123456789abcdef"
    }

    fn instance(&self) -> Value {
        json!({"connections": self.0, "started_at_ms": 1_700_000_000_000_u64, "version": "0.1.0"})
    }

    fn connection(&self, number: u64) -> Option<Value> {
        Some(json!({
            "instance": self.instance_id(),
            "user": format!("user{number}"),
            "connected_at_ms": 1_700_000_000_000 + number,
            "remote": "192.0.2.1:50000",
        }))
    }

    fn connections(&self, is_wanted: impl Fn(u64) -> bool) -> Vec<u64> {
        (0..self.0).filter(|number| is_wanted(*number)).collect()
    }

    fn note_link(&self, _is_up: bool, _was_up: bool) {}
}

/// CPU time of a process so far, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanos = tasks.map(|task| {
        let schedstat = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap_or_default();
        schedstat.split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok()).unwrap_or(0.0)
    });
    nanos.sum::<f64>() / 1e9
}

fn main() {
    // Under `cargo test` only that it runs counts.
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let (connections, seconds) = if is_bench { (100_000, 30) } else { (1_000, 1) };
    let server = Server::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let client = server.client();
        let access = Access::new(client.get_connection_info().clone(), &"bench".into());
        let place = Place::Server(Endpoint::fixed(access));
        let settings = Settings { key_prefix: "ws:".into(), lease: Duration::from_secs(30) };
        let registry = Arc::new(Registry::new(settings));
        let keeping = tokio::spawn(registry_writer::run(place, registry, Arc::new(Synthetic(connections))));
        let mut asking = loop {
            match client.get_multiplexed_async_connection().await {
                Ok(asking) => break asking,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let started = std::time::Instant::now();
        while redis::cmd("DBSIZE").query_async::<u64>(&mut asking).await.unwrap() < connections {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        println!("{connections} connections are registered after {:.2} s", started.elapsed().as_secs_f64());
        let before = (cpu_seconds(std::process::id()), cpu_seconds(server.process.id()));
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let share = |pid, before| (cpu_seconds(pid) - before) / seconds as f64 * 100.0;
        let own = share(std::process::id(), before.0);
        println!("while they stay: {own:.2} % of a core here, {:.2} % in Redis", share(server.process.id(), before.1));
        keeping.abort();
    });
}
