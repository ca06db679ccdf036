//! The store in memory and the scripts at Redis do the same: random publishes, marks and reads against both. What they
//! say of ids differs, so both are told in numbers: the first id met is 0, the next one 1.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use hubcast::cursor::Cursor;
use hubcast::history_memory::{Memory, Published};
use hubcast::history_redis::{Place, is_envelope, parse_envelope, parse_published};
use hubcast::history_store::{Content, Entry, Loss, Marked, Moment, Retention, Window};
use hubcast::history_view::{Gap, GapReason, Page, Range, Told};
use hubcast::presence_store;
use hubcast::topology::Topology;
use proptest::prelude::*;
use redis::aio::{MultiplexedConnection, PubSub};

use crate::harness::{Redis, eventually, soon};

#[derive(Clone, Debug)]
enum Op {
    /// A payload, and an idempotency key.
    Publish(usize, Option<usize>),
    /// By ids met before: shared, own, passed.
    Mark(Option<usize>, usize, Vec<usize>),
    Read(Option<usize>),
    /// After or before an id met before, or the newest; so many events.
    Page(Option<(bool, usize)>, usize),
    /// Everything is older than the TTL.
    Age,
    /// The position expires.
    Forget,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let id = || 0..40_usize;
    let op = prop_oneof![
        8 => (0..PAYLOADS.len(), proptest::option::weighted(0.3, 0..4_usize)).prop_map(|(at, key)| Op::Publish(at, key)),
        4 => (proptest::option::of(id()), id(), proptest::collection::vec(id(), 0..3))
            .prop_map(|(shared, own, passed)| Op::Mark(shared, own, passed)),
        4 => proptest::option::of(id()).prop_map(Op::Read),
        4 => (proptest::option::of((any::<bool>(), id())), 1..5_usize).prop_map(|(at, limit)| Op::Page(at, limit)),
        1 => Just(Op::Age),
        1 => Just(Op::Forget),
    ];
    proptest::collection::vec(op, 1..50)
}

const PAYLOADS: [&[u8]; 6] =
    [b"{\"a\":1}", b"", b"a b \xFF\x01e 1-1 2-2 ", b"\0\r\n", "\u{1F600}".as_bytes(), presence_store::MAGIC];

/// Ids in the order in which they were met.
#[derive(Default)]
struct Names(BTreeMap<Cursor, usize>, Vec<Cursor>);

impl Names {
    fn of(&mut self, id: Cursor) -> usize {
        *self.0.entry(id).or_insert_with(|| {
            self.1.push(id);
            self.1.len() - 1
        })
    }

    /// An id that was met, or one that never was.
    fn id(&self, at: usize) -> Cursor {
        match self.1.len() {
            0 => Cursor { ms: 1, sequence: 1 },
            met => self.1[at % met],
        }
    }

    fn entry(&mut self, entry: &Entry) -> String {
        let (id, previous) = (self.of(entry.id), self.of(entry.previous));
        match &entry.content {
            Content::Event(payload) => format!("{id} after {previous}: {payload:?}"),
            Content::Marker(shared) => format!("{id} after {previous}: marks {:?}", shared.map(|id| self.of(id))),
        }
    }

    fn window(&mut self, window: &Window) -> Vec<String> {
        let top = format!("top {}", self.of(window.top));
        window.entries.iter().map(|entry| self.entry(entry)).chain([top]).collect()
    }

    fn page(&mut self, page: &Page) -> Vec<String> {
        let mut name = |id: Option<Cursor>| id.map(|id| self.of(id));
        let told = page.told.iter().map(|told| match told {
            Told::Event { cursor, payload } => format!("{:?}: {payload:?}", name(Some(*cursor))),
            Told::Gap(gap) => format!("after {:?} next {:?}: {:?}", name(gap.after), name(gap.next), gap.reason),
        });
        let told = told.collect::<Vec<_>>();
        told.into_iter().chain([format!("more {}", page.has_more)]).collect()
    }

    fn range(&self, at: Option<(bool, usize)>) -> Range {
        match at {
            Some((true, at)) => Range::After(self.id(at)),
            Some((false, at)) => Range::Before(self.id(at)),
            None => Range::Newest,
        }
    }

    fn marked(&mut self, marked: Marked) -> String {
        match marked {
            Marked::Exists => "exists".to_owned(),
            Marked::Already(id) => format!("already {}", self.of(id)),
            Marked::Written(id) => format!("written {}", self.of(id)),
        }
    }

    fn loss(&self, shared: Option<usize>, own: usize, passed: &[usize]) -> Loss {
        let passed = passed.iter().map(|at| self.id(*at)).collect();
        Loss { shared: shared.map(|at| self.id(at)), own: self.id(own), passed }
    }
}

struct Both {
    memory: Memory,
    link: MultiplexedConnection,
    heard: PubSub,
    is_cluster: bool,
}

async fn both(redis: &Redis, is_cluster: bool) -> Both {
    let client = redis::Client::open(redis.url()).unwrap();
    let mut heard = client.get_async_pubsub().await.unwrap();
    heard.psubscribe("hub:*").await.unwrap();
    let link = client.get_multiplexed_async_connection().await.unwrap();
    Both { memory: Memory::default(), link, heard, is_cluster }
}

impl Both {
    /// What Redis was told to publish, up to the end of what was asked until now.
    async fn published(&mut self, place: &Place) -> Vec<Entry> {
        redis::cmd("PUBLISH").arg(&place.redis_channel).arg("end").exec_async(&mut self.link).await.unwrap();
        let (mut entries, mut messages) = (Vec::new(), self.heard.on_message());
        loop {
            let message = soon("a message", messages.next()).await.unwrap();
            match message.get_payload_bytes() {
                b"end" => return entries,
                payload => {
                    assert!(is_envelope(payload) && !payload.starts_with(presence_store::MAGIC));
                    entries.push(parse_envelope(&Bytes::copy_from_slice(payload)).expect("a readable envelope"));
                }
            }
        }
    }

    async fn check(&mut self, case: usize, size: usize, ops: &[Op]) {
        let channel = format!("case{case}");
        let topology =
            if self.is_cluster { Topology::partitions_of(7, "hub:") } else { Topology::servers_of(1, "hub:") };
        let place = Place { publish: "PUBLISH", ..Place::new("t:", &channel, &topology) };
        let retention = Retention { size, ttl: Duration::from_secs(3600), position_ttl: Duration::from_secs(86400) };
        let (mut here, mut there) = (Names::default(), Names::default());
        // The clock in memory follows what is said to happen; that of Redis cannot be moved, so its keys are.
        let mut now_ms = 1_000_000_000;
        for op in ops {
            now_ms += u64::from(rand::random_bool(0.5));
            let at = Moment { now_ms, random: rand::random() };
            let mut told = None;
            match op {
                Op::Publish(payload, key) => {
                    let (payload, key) = (PAYLOADS[*payload], key.map(|key| format!("key {key}")));
                    let call = place.publish(payload, &retention, at.random, key.as_deref());
                    let answer = call.invoke_async(&mut self.link).await.unwrap();
                    let (id, is_repeated) = parse_published(&answer).expect("a readable answer");
                    let published =
                        self.memory.publish(&channel, payload.into(), &retention, key.as_deref(), at, |_| ());
                    assert_eq!(is_repeated, matches!(published, Published::Repeated(_)), "{op:?}");
                    if let Published::Appended(entry) = &published {
                        here.of(entry.previous);
                        told = Some(entry.clone());
                        let read = place.read(&mut self.link, None, &retention, at.random).await.unwrap();
                        there.of(read.entries.last().unwrap().previous);
                    }
                    assert_eq!(there.of(id), here.of(published.cursor()), "{op:?}");
                }
                Op::Mark(shared, own, passed) => {
                    let loss = there.loss(*shared, *own, passed);
                    let at_redis = place.mark(&mut self.link, &loss, &retention, at.random).await.unwrap();
                    let loss = here.loss(*shared, *own, passed);
                    let (marked, entry) = self.memory.mark(&channel, &loss, &retention, at);
                    if let Some(entry) = &entry {
                        here.of(entry.previous);
                        let read = place.read(&mut self.link, None, &retention, at.random).await.unwrap();
                        there.of(read.entries.last().unwrap().previous);
                    }
                    assert_eq!(there.marked(at_redis), here.marked(marked), "{op:?}");
                    told = entry;
                }
                Op::Read(unless) => {
                    let (at_redis, in_memory) = (unless.map(|at| there.id(at)), unless.map(|at| here.id(at)));
                    let at_redis = place.read(&mut self.link, at_redis, &retention, at.random).await.unwrap();
                    let in_memory = self.memory.read(&channel, in_memory, &retention, at);
                    assert_eq!(there.window(&at_redis), here.window(&in_memory), "{op:?}");
                }
                Op::Page(range, limit) => {
                    let (at_redis, in_memory) = (there.range(*range), here.range(*range));
                    let read = place.read_page(&mut self.link, (at_redis, *limit), &retention, at.random).await;
                    let page = read.unwrap().page(at_redis, *limit);
                    let whole = place.read(&mut self.link, None, &retention, at.random).await.unwrap();
                    assert_eq!(page, whole.page(at_redis, *limit), "{op:?}");
                    let read = self.memory.read_page(&channel, in_memory, *limit, &retention, at);
                    assert_eq!(there.page(&page), here.page(&read.page(in_memory, *limit)), "{op:?}");
                }
                Op::Age => {
                    now_ms += 3_600_000;
                    redis::cmd("XTRIM")
                        .arg(&place.stream)
                        .arg(&["MAXLEN", "0"])
                        .exec_async(&mut self.link)
                        .await
                        .unwrap();
                    // Answers to idempotency keys are older than theirs, too.
                    for key in 0..4 {
                        let key = format!("{}key {key}", place.answers);
                        redis::cmd("DEL").arg(key).exec_async(&mut self.link).await.unwrap();
                    }
                }
                Op::Forget => {
                    now_ms += 86_400_000;
                    self.next_ms().await;
                    let all = redis::cmd("DEL").arg(&place.top).exec_async(&mut self.link).await;
                    all.unwrap();
                    for key in 0..4 {
                        let key = format!("{}key {key}", place.answers);
                        redis::cmd("DEL").arg(key).exec_async(&mut self.link).await.unwrap();
                    }
                }
            }
            let published = self.published(&place).await;
            assert_eq!(published.len(), usize::from(told.is_some()), "{op:?}");
            for (at_redis, in_memory) in published.iter().zip(&told) {
                assert_eq!(there.entry(at_redis), here.entry(in_memory), "{op:?}");
            }
        }
        self.check_keys(&place, &retention).await;
    }

    /// Until an id that is given now is newer than those before, as it is in memory.
    async fn next_ms(&mut self) {
        let mut ms = async || {
            let time = redis::cmd("TIME").query_async::<(u64, u64)>(&mut self.link).await.unwrap();
            time.0 * 1000 + time.1 / 1000
        };
        let before = ms().await;
        while ms().await == before {}
    }

    /// All keys expire, the stream with its newest entry.
    async fn check_keys(&mut self, place: &Place, retention: &Retention) {
        for (key, most) in [(&place.stream, 2 * retention.ttl), (&place.top, retention.position_ttl + retention.ttl)] {
            let left: i64 = redis::cmd("PTTL").arg(key).query_async(&mut self.link).await.unwrap();
            assert!(left == -2 || (0..=most.as_millis() as i64).contains(&left), "{key} lives for {left}");
        }
    }
}

fn memory_and_redis_do_the_same(is_cluster: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let redis = runtime.block_on(Redis::start());
    let both = tokio::sync::Mutex::new((0, runtime.block_on(both(&redis, is_cluster))));
    let config = ProptestConfig {
        cases: 150,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(42),
        ..ProptestConfig::default()
    };
    let run = |(size, ops): (usize, Vec<Op>)| {
        runtime.block_on(async {
            let (case, both) = &mut *both.lock().await;
            *case += 1;
            both.check(*case, size, &ops).await;
        });
        Ok(())
    };
    proptest::test_runner::TestRunner::new(config).run(&(1..6_usize, ops()), run).unwrap();
}

#[test]
fn scripts_and_memory_do_the_same() {
    memory_and_redis_do_the_same(false);
}

#[test]
fn with_keys_of_a_cluster_too() {
    memory_and_redis_do_the_same(true);
}

#[tokio::test]
async fn bad_arguments_change_nothing() {
    let redis = Redis::start().await;
    let script = hubcast::history_redis::publish_script();
    for arguments in [
        "x 1000 1000 5 PUBLISH c x",
        "10 1000 1000 5 GET c x",
        "10 0 1000 5 PUBLISH c x",
        "10 1000 x 5 PUBLISH c x",
        "10 x 1000 5 PUBLISH c x",
        "10 1000 1000",
        "10 1000 1000 x PUBLISH c x",
        "10 1000 -5000 5 PUBLISH c x",
        "10 1000 1e300 5 PUBLISH c x",
        "10 1e300 1000 5 PUBLISH c x",
        "10 nan 1000 5 PUBLISH c x",
        "10 1000 nan 5 PUBLISH c x",
        "10 1000 1000 5.5 PUBLISH c x",
        "10 1000 1000 -5 PUBLISH c x",
        "10 1000 1000 281474976710656 PUBLISH c x",
        "10 1000 1000 nan PUBLISH c x",
    ] {
        let mut words = vec!["EVAL", &script, "2", "s", "t"];
        words.extend(arguments.split(' '));
        redis.query::<redis::Value>(&words).await.expect_err(arguments);
    }
    for remembered_for in ["x", "0", "", "1.5", "-1", "1e300", "nan"] {
        let words =
            ["EVAL", &script, "3", "s", "t", "a", "10", "1000", "1000", "5", "PUBLISH", "c", "x", remembered_for];
        redis.query::<redis::Value>(&words).await.expect_err(remembered_for);
    }
    assert_eq!(redis.query::<u64>(&["DBSIZE"]).await.unwrap(), 0);
    // However a number is written, what is stored can be read.
    let words = ["EVAL", &script, "3", "s", "t", "a", "10", "1e3", "1000.0", "007.0", "PUBLISH", "c", "x", "3e5"];
    let id: String = redis.query(&words).await.unwrap();
    let entries: Vec<(String, Vec<String>)> = redis.query(&["XRANGE", "s", "-", "+"]).await.unwrap();
    assert!(Cursor::parse(&id).is_some() && Cursor::parse(&entries[0].1[1]).is_some(), "{entries:?}");
    assert!((1..=300_000).contains(&redis.query::<i64>(&["PTTL", "a"]).await.unwrap()));
}

/// Time at Redis cannot be moved, so it is short here.
#[tokio::test]
async fn entries_age_and_ids_grow_at_redis() {
    let redis = Redis::start().await;
    let client = redis::Client::open(redis.url()).unwrap();
    let mut link = client.get_multiplexed_async_connection().await.unwrap();
    let place = Place::new("t:", "c", &Topology::servers_of(1, "hub:"));
    let retention = Retention::new(10, Duration::from_millis(300));
    assert_eq!(retention.position_ttl, Duration::from_secs(24 * 3600));
    let call = place.publish(b"x", &retention, 7, None);
    let (first, _) = parse_published(&call.invoke_async(&mut link).await.unwrap()).unwrap();
    assert_eq!(first.sequence, 8, "the genesis is of the same millisecond");
    let aged = eventually("the entry to be too old", async || {
        let window = place.read(&mut link, None, &retention, 0).await.unwrap();
        window.entries.is_empty().then_some(window)
    });
    assert_eq!(aged.await.top, first, "the position stays");
    // A clock that is far ahead, and a millisecond that is full.
    let last = Cursor { ms: 9_999_999_999_999, sequence: (1 << 53) - 1 };
    for (last, random, next) in [(last, 7 << 16, last.next(0, 7 << 16)), (first, 7 << 16, first.next(0, 7 << 16))] {
        let last = last.to_string();
        redis.query::<()>(&["DEL", &place.stream]).await.unwrap();
        redis.query::<()>(&["SET", &place.top, &last]).await.unwrap();
        let call = place.publish(b"y", &retention, random, None);
        let (id, _) = parse_published(&call.invoke_async(&mut link).await.unwrap()).unwrap();
        let is_new_ms = id.ms > next.ms && id.sequence == random;
        assert!(id == next || (next.ms == first.ms && is_new_ms), "{id} after {last}, not {next}");
    }
    // The stream outlives the position only where somebody meddles; it is another chain's then.
    redis.query::<()>(&["DEL", &place.top]).await.unwrap();
    let window = place.read(&mut link, None, &retention, 9).await.unwrap();
    assert!(window.entries.is_empty() && window.top.sequence == 9, "{window:?}");
}

fn cursor(at: u64) -> Cursor {
    Cursor { ms: at, sequence: at }
}

#[test]
fn cursors_are_read_strictly() {
    for text in ["0-0", "1-2", "9007199254740991-9007199254740991"] {
        assert_eq!(Cursor::parse(text).unwrap().to_string(), text);
    }
    for text in [
        "",
        "-",
        "1",
        "1-",
        "-1",
        "1--1",
        "-1-1",
        "+1-1",
        "1-+1",
        "01-1",
        "1-00",
        " 1-1",
        "1-1 ",
        "1-1-1",
        "a-1",
        "1-a",
        "9007199254740992-0",
        "0-9007199254740992",
        "18446744073709551616-0",
        "1.0-1",
        "$",
        "*",
        "1-*",
        "\u{0661}-1",
    ] {
        assert_eq!(Cursor::parse(text), None, "{text:?}");
    }
}

#[test]
fn ids_grow_whatever_the_clock_does() {
    let last = Cursor { ms: 10, sequence: 1 << 47 };
    assert_eq!(last.next(11, u64::MAX), Cursor { ms: 11, sequence: (1 << 48) - 1 });
    assert_eq!(last.next(10, 0), Cursor { ms: 10, sequence: (1 << 47) + 1 });
    assert_eq!(last.next(3, 65_536), Cursor { ms: 10, sequence: (1 << 47) + 2 });
    let full = Cursor { ms: 10, sequence: (1 << 53) - 1 };
    assert_eq!(full.next(0, 7), Cursor { ms: 11, sequence: 7 });
}

/// Anybody can make channels and keys: of those that nobody is in, the ones published to last stay.
#[test]
fn memory_is_bounded_by_number() {
    const MAX: u64 = 1 << 16;
    let (memory, retention) = (Memory::default(), Retention::new(5, Duration::from_secs(3600)));
    let at = |number| Moment { now_ms: 1_000_000 + number, random: 0 };
    let publish =
        |number: u64| memory.publish(&number.to_string(), "x".into(), &retention, Some("key"), at(number), |_| ());
    let used = memory.past("0", &retention);
    let first = publish(0);
    for number in 1..=MAX + 9 {
        publish(number);
    }
    memory.read("position", None, &retention, at(2 * MAX));
    assert_eq!(memory.expire(2 * MAX), MAX as usize + 1, "and the one that is in use");
    let is_there = |name: &str| !memory.read(name, None, &retention, at(2 * MAX)).entries.is_empty();
    assert!(is_there("0") && !is_there("9") && is_there("10") && is_there(&MAX.to_string()));
    drop(used);
    assert!(matches!(publish(MAX), Published::Repeated(_)), "remembered");
    assert!(matches!(publish(1), Published::Appended(_)) && publish(0) != first, "forgotten");
}

#[test]
fn pages_and_recoveries_are_bounded() {
    let entries = |count: u64, size: usize| Window {
        entries: (1..=count)
            .map(|at| Entry { id: cursor(at), previous: cursor(at - 1), content: Content::Event(vec![0; size].into()) })
            .collect(),
        top: cursor(count),
    };
    let ids = |told: &[Told]| told.iter().filter_map(Told::cursor).map(|id| id.ms).collect::<Vec<_>>();
    let window = entries(2000, 1);
    let page = window.page(Range::After(cursor(5)), 3);
    assert_eq!((ids(&page.told), page.has_more), (vec![6, 7, 8], true));
    let page = window.page(Range::Before(cursor(5)), 3);
    assert_eq!((ids(&page.told), page.has_more), (vec![2, 3, 4], true));
    assert_eq!(ids(&window.page(Range::Newest, 2).told), [1999, 2000]);
    assert_eq!(window.page(Range::Newest, 5000).told.len(), 1000);
    assert!(!window.page(Range::After(cursor(1998)), 100).has_more);
    assert_eq!(window.recover(cursor(1700), &[]).unwrap().len(), 300);
    assert_eq!(window.recover(cursor(1699), &[]), None);
    assert_eq!(window.recover(cursor(2000), &[]), Some(vec![]));
    assert_eq!(window.recover(cursor(2001), &[]), None);
    // A cursor that is on no chain that leads here, and one that is trimmed.
    let gap = |after, next: u64, reason| Told::Gap(Gap { after: Some(after), next: Some(cursor(next)), reason });
    let lost = Cursor { ms: 1990, sequence: 7 };
    let page = window.page(Range::After(lost), 3);
    assert_eq!((ids(&page.told), &page.told[0]), (vec![1990, 1991, 1992], &gap(lost, 1990, GapReason::Upstream)));
    let trimmed = Window { entries: window.entries[1900..].to_vec(), top: window.top };
    let page = trimmed.page(Range::After(cursor(5)), 2);
    assert_eq!((ids(&page.told), &page.told[0]), (vec![1901, 1902], &gap(cursor(5), 1901, GapReason::Trimmed)));
    let page = window.page(Range::After(cursor(2001)), 3);
    let nothing = Gap { after: Some(cursor(2001)), next: None, reason: GapReason::Upstream };
    assert_eq!(page.told, [Told::Gap(nothing)]);
    let big = entries(5, 400 << 10);
    assert_eq!(ids(&big.page(Range::After(cursor(0)), 100).told), [1, 2]);
    assert_eq!(ids(&big.page(Range::Newest, 100).told), [4, 5]);
    assert_eq!((big.recover(cursor(3), &[]).unwrap().len(), big.recover(cursor(2), &[])), (2, None));
    assert_eq!(entries(1, 2 << 20).page(Range::Newest, 100).told.len(), 1, "however big, one comes");
}

#[test]
fn what_is_no_envelope_is_not_read_as_one() {
    let good = b"\xFF\x01e 5-5 4-4 a b";
    let entry = parse_envelope(&Bytes::from_static(good)).unwrap();
    assert_eq!(entry, Entry { id: cursor(5), previous: cursor(4), content: Content::Event("a b".into()) });
    let marker = parse_envelope(&Bytes::from_static(b"\xFF\x01m 5-5 4-4 -")).unwrap();
    assert_eq!(marker.marker(), Some(None));
    for bad in [
        &b"\xFF\x02e 5-5 4-4 a"[..],
        b"\xFF\x01x 5-5 4-4 a",
        b"\xFF\x01e 5-5",
        b"\xFF\x01m 5-5 4-4 x",
        b"\xFFhubcast/1 ",
    ] {
        assert_eq!(parse_envelope(&Bytes::from_static(bad)), None, "{bad:?}");
    }
    assert!(!is_envelope(presence_store::MAGIC));
}
