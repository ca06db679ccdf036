//! Everything that fails, mixed from a seed, under load: `hubcast-loadtest verify` proves that nothing is lost in silence.
//!
//! `FAULTS_SECONDS` and `FAULTS_SEED` make it longer, or repeat what failed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use crate::fault_world::{CHANNELS, Fault, Instance, LINKS, World};
use crate::harness::{Process, Redis, eventually, http};

/// The kinds of keys, each without what it is of.
const KINDS: [&str; 10] = [
    "ws:conn",
    "ws:connections",
    "ws:history",
    "ws:history_answer",
    "ws:history_top",
    "ws:instance",
    "ws:instances",
    "ws:presence",
    "ws:presence_of",
    "ws:presence_users",
];

/// Those that live on purpose without an end.
const FOR_EVER: [&str; 0] = [];

/// The checker, built with the workspace.
fn verify(world: &World, seed: u64, seconds: u64, arguments: &[&str]) -> Process {
    let path = Path::new(env!("CARGO_BIN_EXE_hubcast")).with_file_name("hubcast-loadtest");
    assert!(path.exists(), "cargo build --workspace builds {}", path.display());
    let list = |url: fn(&_) -> String| world.instances.iter().map(url).collect::<Vec<_>>().join(",");
    let child = Command::new(path)
        .args(["verify", "--quiet", "--url", &list(Instance::url)])
        .args(["--api", &list(Instance::api)])
        .args(["--seconds", &seconds.to_string(), "--seed", &seed.to_string()])
        .args(["--rate", "200", "--settle", "8", "--leftovers", "10", "--channels", &CHANNELS.to_string()])
        .args(["--silence", "3"])
        .args(arguments)
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

/// All that is at Redis, with the milliseconds that it has left.
async fn keys(redis: &Redis) -> BTreeMap<String, i64> {
    let mut keys = BTreeMap::new();
    let mut cursor = "0".to_owned();
    loop {
        let (next, some): (String, Vec<String>) =
            redis.query(&["SCAN", &cursor, "COUNT", "1000"]).await.expect("redis is there");
        for key in some {
            let left_ms = redis.query(&["PTTL", &key]).await.expect("redis is there");
            keys.insert(key, left_ms);
        }
        if next == "0" {
            // Gone between the two questions.
            keys.retain(|_, left_ms| *left_ms != -2);
            return keys;
        }
        cursor = next;
    }
}

fn kind(key: &str) -> &str {
    let colon = key.match_indices(':').nth(1);
    colon.map_or(key, |(at, _)| &key[..at])
}

fn assert_each_ends(keys: &BTreeMap<String, i64>) {
    let stays = |(key, left_ms): &(&String, &i64)| **left_ms < 0 && !FOR_EVER.contains(&kind(key));
    let staying: Vec<_> = keys.iter().filter(stays).collect();
    assert!(staying.is_empty(), "no end is set for {staying:?}");
}

/// Whatever befell them, instances leave nothing at Redis that stays there.
async fn assert_nothing_stays(world: &mut World) {
    // Of links that are half open nobody has told Redis: they end before the instances do.
    world.instances.iter().for_each(Instance::bury);
    let redis = world.pair.redis();
    eventually("no connections but those that are used", async || {
        let clients: String = redis.query(&["CLIENT", "LIST"]).await.expect("redis is there");
        (clients.matches("name=hubcast-").count() == LINKS * world.instances.len()).then_some(())
    })
    .await;
    let client = world.instances[0].client("verify:0,here").await;
    let answer = http(&world.instances[0], "POST /api/publish/verify:0", "Idempotency-Key: k\r\n", b"1").await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let redis = world.pair.redis();
    let keys_now = eventually("keys of every kind", async || {
        let keys = keys(redis).await;
        let kinds: BTreeSet<_> = keys.keys().map(|key| kind(key)).collect();
        KINDS.iter().all(|kind| kinds.contains(kind)).then_some(keys)
    })
    .await;
    assert_each_ends(&keys_now);
    drop(client);
    for instance in &mut world.instances {
        instance.end(Signal::TERM).await;
    }
    let redis = world.pair.redis();
    let clients: String = redis.query(&["CLIENT", "LIST"]).await.expect("redis is there");
    assert!(!clients.contains("name=hubcast-"), "{clients}");
    let channels: Vec<String> = redis.query(&["PUBSUB", "CHANNELS"]).await.expect("redis is there");
    assert_eq!(channels, Vec::<String>::new());
    assert_each_ends(&keys(redis).await);
}

/// Has these faults happen while the checker runs with these arguments.
async fn nothing_is_lost(seed: u64, kinds: Vec<Fault>, arguments: &[&str]) -> usize {
    let seconds = setting("FAULTS_SECONDS").unwrap_or(40);
    let mut world = World::new(seed, kinds).await;
    let began = Instant::now();
    let mut verify = verify(&world, seed, seconds, arguments);
    let mut faults = Vec::new();
    while began.elapsed() < Duration::from_secs(seconds) {
        // Calm enough that the next fault meets a world that works; nothing waits for this.
        sleep(world.millis(300..1500)).await;
        let at_ms = began.elapsed().as_millis();
        faults.push((at_ms, world.fault().await));
    }
    let status = tokio::task::spawn_blocking(move || {
        let status = verify.0.wait().expect("it ends");
        let report = verify.0.stdout.take().map(std::io::read_to_string);
        (status, report.expect("it is piped").expect("UTF-8"))
    });
    let (status, report) = status.await.expect("it does not panic");
    assert!(status.success(), "seed {seed}, faults {faults:?}\n{report}");
    println!("seed {seed}, faults {faults:?}\n{report}");
    assert_nothing_stays(&mut world).await;
    faults.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_nothing_is_lost_in_silence() {
    let seed = setting("FAULTS_SEED").unwrap_or(7);
    let began = Instant::now();
    let faults = nothing_is_lost(seed, Fault::ALL.to_vec(), &[]).await;
    let what = format!("{faults} faults from seed {seed}: verify found nothing lost in silence, each key has an end");
    crate::observe::fault("all faults mixed under load", None, began.elapsed(), &what);
}

/// Where Redis keeps what it acknowledged, a publish that is repeated until it is known to be there comes just once.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_a_repeated_publish_comes_once() {
    let seed = setting("FAULTS_SEED").unwrap_or(7);
    let began = Instant::now();
    let kinds = Fault::ALL.into_iter().filter(|fault| !fault.is_loss()).collect();
    let faults = nothing_is_lost(seed, kinds, &["--idempotent"]).await;
    let what = format!("{faults} faults from seed {seed} that lose nothing: repeated publishes came once");
    crate::observe::fault("all faults mixed under load", None, began.elapsed(), &what);
}
