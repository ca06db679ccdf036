//! Everything that fails, mixed from a seed, under load: `hubcast-loadtest verify` proves that nothing is lost in silence.
//!
//! `FAULTS_SECONDS` and `FAULTS_SEED` make it longer, or repeat what failed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::binary::{Binary, exchange};
use crate::harness::{Port, Process, Redis, eventually};
use crate::proxy::Proxy;

/// What `verify` publishes to.
const CHANNELS: usize = 4;

const RULES: &str = r#"[{"match":"verify:*","history":{"size":1000,"ttl":"5m"}}]"#;

/// Two instances, one of them behind a proxy, and a Redis that can come back as it was, or older.
struct World {
    redis: Redis,
    _dir: TempDir,
    proxy: Proxy,
    instances: Vec<Instance>,
    random: StdRng,
    /// The faults that come before the first one comes again.
    deck: Vec<u32>,
}

/// How many there are.
const FAULTS: u32 = 10;

struct Instance {
    public: Port,
    internal: Port,
    redis_url: String,
    binary: Option<Binary>,
}

impl Instance {
    fn new(redis_url: String) -> Self {
        let mut instance = Self { public: Port::claim(), internal: Port::claim(), redis_url, binary: None };
        instance.start();
        instance
    }

    fn start(&mut self) {
        let (public, internal) = (self.public.addr().to_string(), self.internal.addr().to_string());
        self.binary = Some(Binary::start(
            2000,
            &[
                ("HUBCAST_LISTEN", &public),
                ("HUBCAST_INTERNAL_LISTEN", &internal),
                ("HUBCAST_REDIS_URL", &self.redis_url),
                ("HUBCAST_CHANNEL_RULES", RULES),
                ("HUBCAST_DRAIN_TIME", "500ms"),
                ("HUBCAST_LOG", "off"),
            ],
        ));
    }

    async fn end(&mut self, signal: Signal) {
        if let Some(binary) = self.binary.take() {
            binary.process.signal(signal);
            binary.end().await;
        }
    }

    async fn ready(&self) {
        eventually("the instance to be ready", async || {
            let answer = exchange(self.internal.addr(), "GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n").await?;
            answer.starts_with("HTTP/1.1 200").then_some(())
        })
        .await;
    }
}

impl World {
    async fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut redis = Redis::reserve_with("", &["--dir", dir.path().to_str().expect("UTF-8")]);
        redis.restart().await;
        let proxy = Proxy::start(redis.addr()).await;
        let instances = vec![Instance::new(redis.url()), Instance::new(format!("redis://{}/", proxy.addr()))];
        Self { redis, _dir: dir, proxy, instances, random: StdRng::seed_from_u64(seed), deck: Vec::new() }
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.random_range(range))
    }

    /// One more, and the end of it.
    async fn fault(&mut self) -> &'static str {
        let at = self.random.random_range(0..self.instances.len());
        if self.deck.is_empty() {
            self.deck = (0..FAULTS).collect();
            self.deck.shuffle(&mut self.random);
        }
        match self.deck.pop().unwrap_or_default() {
            0 => self.replace(at, Signal::KILL, "an instance is killed").await,
            1 => self.replace(at, Signal::TERM, "an instance is drained").await,
            2 => {
                self.proxy.cut().await;
                sleep(self.millis(200..1500)).await;
                self.proxy.heal().await;
                "links are cut"
            }
            3 => {
                self.proxy.freeze();
                sleep(self.millis(500..3000)).await;
                self.proxy.heal().await;
                "links are half open, then cut"
            }
            4 => {
                self.redis.freeze();
                sleep(self.millis(300..2500)).await;
                self.redis.thaw();
                "redis is frozen"
            }
            5 => self.order(&["CLIENT", "KILL", "TYPE", "PUBSUB"], "listening links are killed").await,
            6 => self.order(&["CLIENT", "KILL", "TYPE", "NORMAL"], "publishing links are killed").await,
            7 => self.order(&["SCRIPT", "FLUSH"], "the scripts are forgotten").await,
            8 => self.come_back(true, "redis comes back as it was").await,
            _ => self.come_back(false, "redis comes back older").await,
        }
    }

    async fn replace(&mut self, at: usize, signal: Signal, what: &'static str) -> &'static str {
        self.instances[at].end(signal).await;
        self.instances[at].start();
        what
    }

    /// Its own connection may be among those that are killed.
    async fn order(&self, command: &[&str], what: &'static str) -> &'static str {
        let _ = self.redis.query::<redis::Value>(command).await;
        what
    }

    /// What was acknowledged is heard first: if nobody heard of it, nobody can tell that it is lost.
    async fn come_back(&mut self, as_it_was: bool, what: &'static str) -> &'static str {
        for channel in 0..CHANNELS {
            let redis_channel = format!("hub:verify:{channel}");
            eventually("somebody to follow the channel", async || {
                (self.redis.numsub(&redis_channel).await > 0).then_some(())
            })
            .await;
        }
        // Whoever has just come back to it reads what it missed, which takes a moment; nothing says when it is over.
        sleep(Duration::from_millis(300)).await;
        self.redis.command(&["CLIENT", "PAUSE", "10000", "WRITE"]).await;
        self.redis.command(&["PING"]).await;
        if as_it_was {
            self.redis.command(&["SAVE"]).await;
        }
        self.redis.kill();
        sleep(self.millis(0..500)).await;
        self.redis.restart().await;
        what
    }
}

/// The checker, built with the workspace.
fn verify(world: &World, seed: u64, seconds: u64) -> Process {
    let path = Path::new(env!("CARGO_BIN_EXE_hubcast")).with_file_name("hubcast-loadtest");
    assert!(path.exists(), "cargo build --workspace builds {}", path.display());
    let list = |scheme: &str, port: fn(&Instance) -> &Port| {
        let urls = world.instances.iter().map(|instance| format!("{scheme}://{}", port(instance).addr()));
        urls.collect::<Vec<_>>().join(",")
    };
    let child = Command::new(path)
        .args(["verify", "--quiet", "--url", &list("ws", |instance| &instance.public)])
        .args(["--api", &list("http", |instance| &instance.internal)])
        .args(["--seconds", &seconds.to_string(), "--seed", &seed.to_string()])
        .args(["--rate", "200", "--settle", "8", "--leftovers", "10", "--channels", &CHANNELS.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("it starts");
    Process(child)
}

#[expect(clippy::disallowed_methods, reason = "whoever runs the tests says how long")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_nothing_is_lost_in_silence() {
    let seed = setting("FAULTS_SEED").unwrap_or(7);
    let seconds = setting("FAULTS_SECONDS").unwrap_or(20);
    let mut world = World::new(seed).await;
    for instance in &world.instances {
        instance.ready().await;
    }
    let began = std::time::Instant::now();
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut verify = verify(&world, seed, seconds);
    let mut faults = Vec::new();
    while Instant::now() < until {
        // Calm enough that the next fault meets a world that works; nothing waits for this.
        sleep(world.millis(300..1500)).await;
        faults.push(world.fault().await);
        for instance in &world.instances {
            instance.ready().await;
        }
    }
    let status = tokio::task::spawn_blocking(move || {
        let status = verify.0.wait().expect("it ends");
        let report = verify.0.stdout.take().map(std::io::read_to_string);
        (status, report.expect("it is piped").expect("UTF-8"))
    });
    let (status, report) = status.await.expect("it does not panic");
    assert!(status.success(), "seed {seed}, faults {faults:#?}\n{report}");
    let keys: Vec<String> = world.redis.query(&["KEYS", "ws:history*"]).await.expect("redis is there");
    assert!(!keys.is_empty());
    for key in keys {
        assert!(world.redis.query::<i64>(&["PTTL", &key]).await.expect("redis is there") > 0, "{key} stays for ever");
    }
    println!("{faults:#?}\n{report}");
    crate::observe::fault(
        "all faults mixed under load",
        None,
        began.elapsed(),
        &format!("{} faults from seed {seed}: verify found nothing lost in silence", faults.len()),
    );
}
