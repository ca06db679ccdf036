//! The store in memory and the scripts at Redis do the same: random joins, leaves and settles against both.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use hubcast::clock;
use hubcast::presence_redis::{RedisStore, Settings};
use hubcast::presence_store::{Change, Event, Member, Memory};
use proptest::prelude::*;

use crate::harness::{Redis, gateway, ready, soon};

/// A leave that is never due here.
const LONG_MS: u64 = 3_600_000;

#[derive(Clone, Debug)]
enum Op {
    /// Connections, each of a user or nobody's, and whether they were announced.
    Join(Vec<(usize, usize, bool)>),
    /// The same, and whether the debounce is long.
    Leave(Vec<(usize, usize, bool)>, bool),
    Settle(Vec<usize>),
    Page(usize, Option<(usize, usize)>),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let entries = || proptest::collection::vec((0..5_usize, 0..4_usize, proptest::bool::weighted(0.3)), 1..5);
    let op = prop_oneof![
        4 => entries().prop_map(Op::Join),
        4 => (entries(), any::<bool>()).prop_map(|(entries, is_long)| Op::Leave(entries, is_long)),
        4 => proptest::collection::vec(0..5_usize, 1..5).prop_map(Op::Settle),
        2 => (0..12_usize, proptest::option::of((0..5_usize, 0..4_usize))).prop_map(|(n, after)| Op::Page(n, after)),
    ];
    proptest::collection::vec(op, 1..60)
}

/// Names that are hard to escape, prefixes of each other, and one without a user.
fn member(user: usize, connection: usize) -> Member {
    let user = [Some("a"), Some("a b"), Some("a\"\\/ü\u{1F600}"), Some("-0"), None][user];
    Member::new(user, &format!("00ff-{connection}"))
}

fn changes(entries: &[(usize, usize, bool)]) -> Vec<Change> {
    let change = |(user, connection, is_announced): &(_, _, _)| Change {
        member: member(*user, *connection),
        is_announced: *is_announced,
    };
    entries.iter().map(change).collect()
}

/// 0: nothing is left to do; 1: it is due; 2: it is not.
fn classes(left_ms: &[u64]) -> Vec<u8> {
    left_ms.iter().map(|left_ms| u8::from(*left_ms > 0) + u8::from(*left_ms > LONG_MS / 2)).collect()
}

struct Both {
    memory: Memory,
    redis: RedisStore,
    link: redis::aio::MultiplexedConnection,
    heard: redis::aio::PubSub,
}

impl Both {
    /// What Redis was told to publish since the last time.
    async fn events(&mut self, channel: &str) -> Vec<Event> {
        let channel = format!("hub:{channel}");
        redis::cmd("PUBLISH").arg(&channel).arg("end").exec_async(&mut self.link).await.unwrap();
        let (mut events, mut messages) = (Vec::new(), self.heard.on_message());
        loop {
            let message = soon("an event", messages.next()).await.unwrap();
            match message.get_payload_bytes() {
                b"end" => return events,
                _ if message.get_channel_name() != channel => {}
                payload => events.push(Event::parse(payload).expect("a readable event")),
            }
        }
    }

    async fn check(&mut self, ops: &[Op]) {
        static CASE: AtomicU64 = AtomicU64::new(0);
        let channel = format!("case{}", CASE.fetch_add(1, Ordering::Relaxed));
        for op in ops {
            let now_ms = clock::now_us() / 1000;
            let told = match op {
                Op::Join(entries) => {
                    self.redis.join(&channel, &changes(entries)).await.unwrap();
                    self.memory.join(&channel, &changes(entries))
                }
                Op::Leave(entries, is_long) => {
                    let debounce_ms = if *is_long { LONG_MS } else { 0 };
                    let at_redis = self.redis.leave(&channel, &changes(entries), debounce_ms).await.unwrap();
                    let here = self.memory.leave(&channel, &changes(entries), debounce_ms, now_ms);
                    assert_eq!(classes(&at_redis), classes(&here), "{op:?}");
                    Vec::new()
                }
                Op::Settle(users) => {
                    let members: Vec<_> = users.iter().map(|user| member(*user, 0)).collect();
                    let identities: Vec<_> = members.iter().map(Member::identity).collect();
                    let at_redis = self.redis.settle(&channel, &identities).await.unwrap();
                    let (here, events) = self.memory.settle(&channel, &identities, now_ms);
                    assert_eq!(classes(&at_redis), classes(&here), "{op:?}");
                    events
                }
                Op::Page(limit, after) => {
                    let after = after.map(|(user, connection)| member(user, connection));
                    let at_redis = self.redis.page(&channel, after.as_ref(), *limit).await.unwrap();
                    assert_eq!(at_redis, self.memory.page(&channel, after.as_ref(), *limit), "{op:?}");
                    Vec::new()
                }
            };
            assert_eq!(self.events(&channel).await, told, "{op:?}");
            let all = self.memory.page(&channel, None, 100);
            assert_eq!(self.redis.page(&channel, None, 100).await.unwrap(), all, "after {op:?}");
        }
    }
}

async fn both(redis: &Redis, gateway: &hubcast::gateway::Gateway) -> Both {
    ready(gateway).await;
    let settings = Settings { key_prefix: "t:".into(), ttl: Duration::from_secs(600) };
    let client = redis::Client::open(redis.url()).unwrap();
    let mut heard = client.get_async_pubsub().await.unwrap();
    heard.psubscribe("hub:*").await.unwrap();
    Both {
        memory: Memory::default(),
        redis: RedisStore::new(settings, gateway.broker().servers.clone().unwrap()),
        link: client.get_multiplexed_async_connection().await.unwrap(),
        heard,
    }
}

#[test]
fn memory_and_redis_do_the_same() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let redis = runtime.block_on(Redis::start());
    let gateway = runtime.block_on(async { gateway(&[("HUBCAST_REDIS_URL", &redis.url())]) });
    let both = tokio::sync::Mutex::new(runtime.block_on(both(&redis, &gateway)));
    let config = ProptestConfig {
        cases: 150,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(42),
        ..ProptestConfig::default()
    };
    let run = |ops: Vec<Op>| {
        runtime.block_on(async { both.lock().await.check(&ops).await });
        Ok(())
    };
    proptest::test_runner::TestRunner::new(config).run(&ops(), run).unwrap();
    let _in_runtime = runtime.enter();
    drop(gateway);
}
