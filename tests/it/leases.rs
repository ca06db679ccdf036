//! Leases that end: those of instances that are dead, and of those that only seem to be.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use hubcast::commands::Place;
use hubcast::gateway::Gateway;
use hubcast::redis_link::{Access, Endpoint};
use hubcast::registry::{Registry, Roll, Settings};
use hubcast::registry_writer;
use redis::IntoConnectionInfo;
use serde_json::{Value, json};

use crate::harness::{Client, Redis, await_metric, eventually, gateway_with, http, ready};
use crate::proxy::Proxy;

const RULES: (&str, &str) = ("HUBCAST_CHANNEL_RULES", r#"[{"match":"p","presence":true}]"#);

async fn instance(redis_url: &str, lease: Duration) -> Gateway {
    let gateway = gateway_with(&[("HUBCAST_REDIS_URL", redis_url), RULES], |config| {
        config.registry_lease = lease;
        config.presence_debounce = Duration::from_millis(200);
    });
    ready(&gateway).await;
    gateway
}

fn id(gateway: &Gateway) -> String {
    gateway.broker().shared.instance_id.to_string()
}

async fn enter(gateway: &Gateway, user: &str) -> Client {
    let mut client = Client::open(gateway, &format!("/ws?user={user}"), None).await;
    assert_eq!(client.json().await["type"], "welcome");
    client.send(&json!({"type": "subscribe", "channel": "p"})).await;
    client.expect(&json!({"type": "subscribed", "channel": "p"})).await;
    client
}

fn told(kind: &str, user: &str) -> Value {
    json!({"type": kind, "channel": "p", "user": user})
}

/// Everything that a client is told before this.
async fn heard_before(client: &mut Client, last: &Value) -> Vec<Value> {
    let mut heard = Vec::new();
    loop {
        match client.json().await {
            frame if frame == *last => return heard,
            frame => heard.push(frame),
        }
    }
}

async fn set(redis: &Redis, key: &str) -> BTreeSet<String> {
    redis.query(&["SMEMBERS", key]).await.expect("redis is there")
}

async fn keys(redis: &Redis, pattern: &str) -> BTreeSet<String> {
    redis.query(&["KEYS", pattern]).await.expect("redis is there")
}

/// Users and connections in the channel, as an instance says.
async fn counts(gateway: &Gateway) -> Option<(u64, u64)> {
    let answer = http(gateway, "GET /api/presence/p?limit=0", "", b"").await;
    let number = |name: &str| answer.json()[name].as_u64().expect("a number");
    (answer.status == 200).then(|| (number("users"), number("connections")))
}

/// All leases end inside a Redis that nobody reaches. Whoever is back first must not take the others for dead.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_longer_than_the_lease_lets_nobody_leave() {
    // A third of it, after which the first may sweep, is longer than the longest pause between two connects.
    const LEASE: Duration = Duration::from_secs(3);
    const INSTANCES: usize = 10;
    let redis = Redis::start().await;
    let mut proxy = Proxy::start(redis.addr()).await;
    let url = format!("redis://{}/", proxy.addr());
    let gateways = join_all((0..INSTANCES).map(|_| instance(&url, LEASE))).await;
    let mut clients = Vec::new();
    for (at, gateway) in gateways.iter().enumerate() {
        let mut client = enter(gateway, &format!("user{at}")).await;
        heard_before(&mut client, &told("join", &format!("user{at}"))).await;
        clients.push(client);
    }
    for (at, client) in clients.iter_mut().enumerate().take(INSTANCES - 1) {
        let later = (at + 1..INSTANCES).map(|later| told("join", &format!("user{later}")));
        for joined in later {
            client.expect(&joined).await;
        }
    }
    eventually("all connections", async || (keys(&redis, "ws:conn:*").await.len() == INSTANCES).then_some(())).await;
    // One more really is dead when Redis can be reached: that it is gone shows that somebody has swept.
    redis.command(&["SET", "ws:instance:dead", "{}", "PX", "3000"]).await;
    redis.command(&["SADD", "ws:instances", "dead"]).await;
    proxy.cut().await;
    eventually("the end of all leases", async || keys(&redis, "ws:instance:*").await.is_empty().then_some(())).await;
    proxy.heal().await;
    for gateway in &gateways {
        await_metric(gateway, r#"hubcast_redis_link_up{link="registry"}"#, 1.0).await;
    }
    eventually("a sweep", async || (!set(&redis, "ws:instances").await.contains("dead")).then_some(())).await;
    eventually("all to listen", async || (redis.numsub("hub:p").await == INSTANCES as i64).then_some(())).await;
    assert_eq!(set(&redis, "ws:instances").await, gateways.iter().map(id).collect());
    eventually("everybody to be there", async || {
        (counts(&gateways[0]).await? == (INSTANCES as u64, INSTANCES as u64)).then_some(())
    })
    .await;
    // What was due is told before this.
    let mut passer_by = enter(&gateways[0], "passer-by").await;
    passer_by.expect(&told("join", "passer-by")).await;
    drop(passer_by);
    let gap = json!({"type": "gap", "channel": "p", "reason": "upstream"});
    for client in &mut clients {
        let heard = heard_before(client, &told("leave", "passer-by")).await;
        assert_eq!(heard, [gap.clone(), told("join", "passer-by")]);
    }
    assert_eq!(keys(&redis, "ws:presence_swept:*").await, BTreeSet::new(), "nobody was swept up");
    assert_eq!(keys(&redis, "ws:conn:*").await.len(), INSTANCES);
}

/// Nothing helps here but that leases end, that of the sweeper's turn too.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_sweeper_leaves_when_it_dies_is_gone_with_its_lease_and_a_sixth_of_it() {
    const LEASE: Duration = Duration::from_secs(3);
    let redis = Redis::start().await;
    let url = redis.url();
    let mut gateways = join_all((0..3).map(|_| instance(&url, LEASE))).await;
    let sweeper = eventually("one to sweep", async || {
        let holder: Option<String> = redis.query(&["GET", "ws:sweeper"]).await.ok()?;
        gateways.iter().position(|gateway| Some(id(gateway)) == holder)
    })
    .await;
    let dies = gateways.remove(sweeper);
    let (dead, mut observer) = (id(&dies), enter(&gateways[0], "observer").await);
    observer.expect(&told("join", "observer")).await;
    let _clients = join_all((0..20).map(|at| enter(&dies, if at % 2 == 0 { "alice" } else { "bob" }))).await;
    let mut come = [observer.json().await, observer.json().await];
    come.sort_by_key(Value::to_string);
    assert_eq!(come, [told("join", "alice"), told("join", "bob")]);
    eventually("all connections", async || {
        let connections = keys(&redis, &format!("ws:conn:{dead}-*")).await.len();
        (connections == 20 && counts(&gateways[0]).await? == (3, 21)).then_some(())
    })
    .await;
    assert_eq!(redis.query::<String>(&["GET", "ws:sweeper"]).await.ok(), Some(dead.clone()), "it holds it still");
    drop(dies);
    let died = Instant::now();
    let mut gone = [observer.json().await, observer.json().await];
    gone.sort_by_key(Value::to_string);
    assert_eq!(gone, [told("leave", "alice"), told("leave", "bob")]);
    eventually("nothing of it to be left", async || {
        let left = keys(&redis, &format!("ws:*{dead}*")).await;
        // That it was swept up is kept for itself, should it only have been cut off.
        let left = left.iter().filter(|key| !key.contains("presence_swept")).count();
        (left == 0 && set(&redis, "ws:instances").await.len() == 2 && counts(&gateways[0]).await? == (1, 1))
            .then_some(())
    })
    .await;
    let took = died.elapsed();
    assert!(took < LEASE + LEASE / 6 + LEASE / 3, "{took:?}, on a machine that may be busy");
    crate::observe::fault(
        "instance killed",
        None,
        took,
        "the sweeper itself, lease 3 s: registry and presence are clean within lease, a sixth of it, and a margin",
    );
}

/// A sweep that could not finish leaves the id among the instances.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_notices_that_it_was_swept_up_in_part() {
    let redis = Redis::start().await;
    redis.command(&["SET", "ws:sweeper", "somebody else"]).await;
    let gateway = instance(&redis.url(), Duration::from_millis(600)).await;
    eventually("the instance", async || set(&redis, "ws:instances").await.contains(&id(&gateway)).then_some(())).await;
    let mut client = Client::open(&gateway, "/ws", None).await;
    let record = format!("ws:conn:{}", client.json().await["connection_id"].as_str().unwrap());
    let (lease, index) = (format!("ws:instance:{}", id(&gateway)), format!("ws:connections:{}", id(&gateway)));
    let is_known = async |key: &str| redis.query::<bool>(&["EXISTS", key]).await.expect("redis is there");
    eventually("the index", async || is_known(&index).await.then_some(())).await;
    redis.command(&["DEL", &lease, &index, &record]).await;
    assert!(set(&redis, "ws:instances").await.contains(&id(&gateway)));
    eventually("all of it again", async || {
        (is_known(&index).await && is_known(&record).await && is_known(&lease).await).then_some(())
    })
    .await;
}

/// Connections that take long to write: nobody is behind them.
struct Crowd {
    connections: u64,
}

impl Roll for Crowd {
    fn instance_id(&self) -> &str {
        "crowd"
    }

    fn instance(&self) -> Value {
        json!({})
    }

    fn connection(&self, number: u64) -> Option<Value> {
        (number < self.connections).then(|| json!({}))
    }

    fn note_link(&self, _is_up: bool, _was_up: bool) {}

    fn connections(&self, is_wanted: impl Fn(u64) -> bool) -> Vec<u64> {
        (0..self.connections).filter(|number| is_wanted(*number)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_is_renewed_while_much_is_written() {
    const CONNECTIONS: u64 = 10_000;
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.addr()).await;
    proxy.delay(Duration::from_millis(50));
    let info = format!("redis://{}/", proxy.addr()).into_connection_info().unwrap();
    let endpoint = Endpoint::fixed(Access::new(info, &"crowd".into()));
    let registry = Arc::new(Registry::new(Settings { key_prefix: "ws:".into(), lease: Duration::from_millis(900) }));
    let roll = Arc::new(Crowd { connections: CONNECTIONS });
    let task = tokio::spawn(registry_writer::run(Place::Server(endpoint), registry, roll));
    let holds = async || redis.query::<bool>(&["EXISTS", "ws:instance:crowd"]).await.ok();
    eventually("the lease", async || holds().await?.then_some(())).await;
    let began = Instant::now();
    eventually("everybody to be written", async || {
        assert_eq!(holds().await, Some(true), "after {:?}", began.elapsed());
        (redis.query::<u64>(&["SCARD", "ws:connections:crowd"]).await.ok()? == CONNECTIONS).then_some(())
    })
    .await;
    assert!(began.elapsed() > Duration::from_millis(900), "it took longer than the lease");
    task.abort();
}
