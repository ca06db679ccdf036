//! Many at once on channels with history: clients that come back to one channel, and channels after a restart of Redis.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hubcast::history_redis::{Place, publish_script};
use hubcast::history_store::Retention;
use hubcast::topology::Topology;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::binary::Binary;
use crate::harness::{
    Client, HANDSHAKE, PATIENCE, Redis, await_metric, eventually, gateway, http, masked, metric, ready, soon,
};
use crate::proxy::Proxy;

const RULES: (&str, &str) = (
    "HUBCAST_CHANNEL_RULES",
    r#"[{"match":"h:*","history":{"size":20,"ttl":"10m"}},{"match":"*","client_publish":true}]"#,
);

/// Publishes a number to each channel by the script, as a backend does; the last cursor.
async fn publish_to_each(redis: &Redis, channels: &[String], number: u32) -> String {
    let client = redis::Client::open(redis.url()).unwrap();
    let mut link = client.get_multiplexed_async_connection().await.unwrap();
    redis.command(&["SCRIPT", "LOAD", &publish_script()]).await;
    let retention = Retention::new(20, Duration::from_secs(600));
    let mut last = Vec::new();
    for channels in channels.chunks(1000) {
        let mut pipeline = redis::pipe();
        for channel in channels {
            let place = Place::new("ws:", channel, &Topology::servers_of(1, "hub:"));
            pipeline.invoke_script(&place.publish(number.to_string().as_bytes(), &retention, rand::random(), None));
        }
        last = soon("redis to publish", pipeline.query_async::<Vec<String>>(&mut link)).await.unwrap();
    }
    last.pop().expect("a cursor")
}

/// A client that takes little of this process.
struct Light(BufReader<TcpStream>);

impl Light {
    /// Connects and takes the welcome.
    async fn connect(gateway: SocketAddr) -> Self {
        let socket = TcpStream::connect(gateway).await.expect("the listener is there");
        let mut light = Self(BufReader::with_capacity(1024, socket));
        light.0.write_all(format!("GET /ws HTTP/1.1\r\n{HANDSHAKE}").as_bytes()).await.expect("it is open");
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            light.0.read_line(&mut line).await.expect("a response head");
        }
        assert!(light.text().await.contains("welcome"));
        light
    }

    async fn send(&mut self, text: &str) {
        self.0.write_all(&masked(0x81, text.as_bytes())).await.expect("it is open");
    }

    async fn text(&mut self) -> String {
        let read = async {
            assert_eq!(self.0.read_u8().await?, 0x81, "a text");
            let len = match self.0.read_u8().await? {
                126 => self.0.read_u16().await?.into(),
                short => usize::from(short),
            };
            let mut text = vec![0; len];
            self.0.read_exact(&mut text).await?;
            std::io::Result::Ok(text)
        };
        String::from_utf8(soon("a text", read).await.expect("it is open")).expect("UTF-8")
    }
}

/// Light clients, in parts that are read side by side.
type Crowd = Vec<Vec<Light>>;

/// Sends a text from each.
async fn all_send(crowd: Crowd, text: &str) -> Crowd {
    let mut sending = JoinSet::new();
    for mut clients in crowd {
        let text = text.to_owned();
        sending.spawn(async move {
            for client in &mut clients {
                client.send(&text).await;
            }
            clients
        });
    }
    sending.join_all().await
}

/// Each is told that it is recovered, and then the numbers up to this.
async fn all_recover(crowd: Crowd, last: u32) -> Crowd {
    let mut reading = JoinSet::new();
    for mut clients in crowd {
        reading.spawn(async move {
            for client in &mut clients {
                let subscribed = client.text().await;
                assert!(subscribed.contains(r#""recovered":true"#), "{subscribed}");
                for number in 1..=last {
                    let event = client.text().await;
                    assert!(event.ends_with(&format!(r#""data":{number}}}"#)), "{event}");
                }
            }
            clients
        });
    }
    reading.join_all().await
}

/// As many as a process may have open files for, gateway and clients in one each.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_that_come_back_at_once_cost_two_reads() {
    const CLIENTS: usize = 10_000;
    const PARTS: usize = 50;
    const MISSED: u32 = 10;
    let redis = Redis::start().await;
    let url = redis.url();
    let env = [RULES, ("HUBCAST_REDIS_URL", url.as_str()), ("HUBCAST_HANDSHAKES_PER_SECOND", "0")];
    let gateway = Binary::start(CLIENTS as u32 + 1000, &[&env[..], &[("HUBCAST_LOG", "info")]].concat());
    ready(&gateway).await;
    let channel = ["h:1".to_owned()];
    let first = publish_to_each(&redis, &channel, 0).await;
    for number in 1..=MISSED {
        publish_to_each(&redis, &channel, number).await;
    }
    let mut connecting = JoinSet::new();
    for _ in 0..PARTS {
        let gateway = gateway.public;
        connecting.spawn(async move {
            let mut clients = Vec::new();
            for _ in 0..CLIENTS / PARTS {
                clients.push(Light::connect(gateway).await);
            }
            clients
        });
    }
    let crowd = connecting.join_all().await;
    let before = metric(&gateway, "hubcast_history_reads_total").await;
    // They have all asked before the channel is confirmed: one read serves them, one more is what was asked for meanwhile.
    redis.freeze();
    let subscribe = json!({"type": "subscribe", "channel": "h:1", "after": first}).to_string();
    let crowd = all_send(crowd, &subscribe).await;
    await_metric(&gateway, "hubcast_subscriptions", CLIENTS as f64).await;
    redis.thaw();
    let thawed = Instant::now();
    let crowd = all_recover(crowd, MISSED).await;
    let took = thawed.elapsed();
    let reads = metric(&gateway, "hubcast_history_reads_total").await - before;
    assert_eq!(metric(&gateway, r#"hubcast_recoveries_total{recovered="true"}"#).await, CLIENTS as f64);
    println!("{CLIENTS} clients had {MISSED} events each {took:?} after Redis was back, by {reads} reads");
    assert!(reads <= 2.0, "{reads} reads for {CLIENTS} clients");

    // Once more while Redis answers at once: a read serves all who asked while the one before was under way.
    let crowd = all_send(crowd, r#"{"type":"unsubscribe","channel":"h:1"}"#).await;
    let mut leaving = JoinSet::new();
    for mut clients in crowd {
        leaving.spawn(async move {
            for client in &mut clients {
                assert!(client.text().await.contains("unsubscribed"));
            }
            clients
        });
    }
    let crowd = leaving.join_all().await;
    let before = metric(&gateway, "hubcast_history_reads_total").await;
    let began = Instant::now();
    let crowd = all_send(crowd, &subscribe).await;
    let _crowd = all_recover(crowd, MISSED).await;
    let took = began.elapsed();
    let reads = metric(&gateway, "hubcast_history_reads_total").await - before;
    println!("{CLIENTS} clients came back within {took:?} while Redis was there, by {reads} reads");
    assert!(reads < CLIENTS as f64 / 10.0, "{reads} reads for {CLIENTS} clients");
}

/// How the channels of an instance were repaired after Redis was restarted.
struct Repaired {
    /// From when the way to Redis was open again.
    took: Duration,
    /// Reads that came to Redis.
    reads: u64,
    /// The slowest publication to another channel meanwhile.
    slowest: Duration,
}

/// How many scripts Redis has run since its start.
async fn scripts_run(redis: &Redis) -> u64 {
    let info: String = redis.query(&["INFO", "commandstats"]).await.unwrap();
    let stats = info.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
    stats.and_then(|stats| stats.split(',').next()?.parse().ok()).unwrap_or(0)
}

/// Channels with history, of which each misses an event while Redis is restarted; it is `delay` away, each way.
async fn restart(channels: usize, delay: Duration) -> Repaired {
    // What comes while nobody reads has room in an outbox.
    const CHANNELS_EACH: usize = 1000;
    let dir = tempfile::tempdir().unwrap();
    let durable = ["--dir", dir.path().to_str().unwrap(), "--appendonly", "yes"];
    let mut redis = Redis::reserve_with("", &durable);
    redis.restart().await;
    let mut proxy = Proxy::start(redis.addr()).await;
    let url = format!("redis://{}/", proxy.addr());
    let gateway = gateway(&[
        RULES,
        ("HUBCAST_REDIS_URL", &url),
        ("HUBCAST_SUBSCRIPTIONS_MAX", "1000000"),
        ("HUBCAST_COMMANDS_PER_SECOND", "0"),
        ("HUBCAST_CHANNELS_MAX", "0"),
    ]);
    ready(&gateway).await;
    let channels: Vec<_> = (0..channels).map(|number| format!("h:{number}")).collect();
    let mut readers = Vec::new();
    for part in channels.chunks(CHANNELS_EACH) {
        let mut client = Client::connect(&gateway).await;
        for names in part.chunks(500) {
            client.send(&json!({"type": "subscribe", "channels": names})).await;
            for _ in names {
                assert_eq!(client.json().await["type"], "subscribed");
            }
        }
        readers.push((client, part.len()));
    }
    let mut neighbour = Client::subscribed(&gateway, "neighbour").await;
    publish_to_each(&redis, &channels, 0).await;
    for (client, count) in &mut readers {
        for _ in 0..*count {
            assert_eq!(client.json().await["data"], 0);
        }
    }
    proxy.cut().await;
    redis.kill();
    redis.restart().await;
    publish_to_each(&redis, &channels, 1).await;
    let before = scripts_run(&redis).await;
    proxy.delay(delay);
    proxy.heal().await;
    let healed = Instant::now();
    let mut reading = JoinSet::new();
    for (mut client, count) in readers {
        reading.spawn(async move {
            for _ in 0..count {
                let event = client.json().await;
                assert_eq!(event["data"], 1, "{event}");
            }
            client
        });
    }
    // Another channel, without history: what it is told, from the first publication on that is heard again.
    let mut number = 0;
    let mut tell = async |patience: Duration| {
        number += 1;
        let sent = Instant::now();
        let path = "POST /api/publish/neighbour";
        if http(&gateway, path, "", number.to_string().as_bytes()).await.status != 200 {
            return None;
        }
        let heard = async { while neighbour.json().await["data"] != number {} };
        tokio::time::timeout(patience, heard).await.ok().map(|()| sent.elapsed())
    };
    eventually("the other channel to be heard again", async || tell(Duration::from_millis(100)).await).await;
    let (mut slowest, mut took) = (Duration::ZERO, None);
    while took.is_none() {
        slowest = slowest.max(tell(PATIENCE).await.expect("each is heard now"));
        took = reading.is_empty().then(|| healed.elapsed());
        while reading.try_join_next().transpose().expect("it has read all").is_some() {}
    }
    let reads = scripts_run(&redis).await - before;
    let took = took.expect("it was measured");
    println!(
        "{} channels were repaired {took:?} after Redis, {delay:?} away, was back, by {reads} reads; the slowest publication to another channel took {slowest:?}",
        channels.len()
    );
    Repaired { took, reads, slowest }
}

/// All channels want a read at once. Redis is 10 ms away and back, and never has more than 64 to answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_redis_is_no_storm_of_reads() {
    const CHANNELS: usize = 5000;
    let Repaired { took, reads, slowest } = restart(CHANNELS, Duration::from_millis(5)).await;
    assert!((CHANNELS as u64..=3 * CHANNELS as u64).contains(&reads), "{reads} reads of {CHANNELS} channels");
    let rounds = took.as_millis() as u64 / 10 + 1;
    assert!(reads <= 64 * rounds, "{reads} reads in {took:?}: more than 64 at once");
    assert!(slowest < Duration::from_secs(2), "another channel waited for {slowest:?}");
}

/// As many as the issue names, with Redis next door: `cargo test --release --test it -- --ignored fifty --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long; by hand, for the numbers in benches/README.md"]
async fn fifty_thousand_channels_and_a_restart_of_redis() {
    restart(50_000, Duration::ZERO).await;
}
