//! Who is here: joins and leaves once per user, lists and counts, with and without Redis, and after each kind of loss.
//!
//! That nothing is said is seen by what comes next: another user comes and goes, and everything that was due before its
//! leave would have been told before it.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::{join, join_all};
use hubcast::gateway::Gateway;
use serde_json::{Value, json};

use crate::binary::Binary;
use crate::harness::{Client, Redis, await_metric, eventually, gateway_with, http, metric, ready};

const RULES: (&str, &str) = ("HUBCAST_CHANNEL_RULES", r#"[{"match":"p:*","presence":true},{"match":"*"}]"#);

const CHANNEL: &str = "p:1";

/// Instances with a short lease; one without Redis, several with it.
async fn world(redis: Option<&Redis>, debounce_ms: u64) -> Vec<Gateway> {
    let url = redis.map(Redis::url);
    let mut env = vec![RULES];
    env.extend(url.as_deref().map(|url| ("HUBCAST_REDIS_URL", url)));
    let mut gateways = Vec::new();
    for _ in 0..if redis.is_some() { 2 } else { 1 } {
        let gateway = gateway_with(&env, |config| {
            config.registry_lease = Duration::from_millis(600);
            config.presence_debounce = Duration::from_millis(debounce_ms);
            config.drain_time = Duration::from_millis(50);
        });
        ready(&gateway).await;
        gateways.push(gateway);
    }
    gateways
}

/// Both kinds of world, one after another.
async fn in_each(debounce_ms: u64, story: impl AsyncFn(Vec<Gateway>)) {
    story(world(None, debounce_ms).await).await;
    let redis = Redis::start().await;
    story(world(Some(&redis), debounce_ms).await).await;
}

async fn enter(gateway: &Gateway, user: &str) -> Client {
    let mut client = Client::open(gateway, &format!("/ws?user={user}"), None).await;
    assert_eq!(client.json().await["type"], "welcome");
    client.send(&json!({"type": "subscribe", "channel": CHANNEL})).await;
    client.expect(&json!({"type": "subscribed", "channel": CHANNEL})).await;
    client
}

/// Somebody who is in the channel, and has seen itself come.
async fn observer(gateway: &Gateway) -> Client {
    let mut observer = enter(gateway, "observer").await;
    observer.expect(&told("join", "observer")).await;
    observer
}

fn told(kind: &str, user: &str) -> Value {
    json!({"type": kind, "channel": CHANNEL, "user": user})
}

/// What was due until now is told: these frames.
async fn heard(observer: &mut Client, gateway: &Gateway) -> Vec<Value> {
    let mut passer_by = Some(enter(gateway, "passer-by").await);
    let mut heard = Vec::new();
    loop {
        match observer.json().await {
            frame if frame == told("join", "passer-by") => passer_by = None,
            frame if frame == told("leave", "passer-by") => break,
            frame => heard.push(frame),
        }
    }
    assert!(passer_by.is_none());
    heard
}

async fn expect_nothing(observer: &mut Client, gateway: &Gateway) {
    assert_eq!(heard(observer, gateway).await, [Value::Null; 0]);
}

async fn presence(gateway: &Gateway) -> Value {
    let answer = http(gateway, &format!("GET /api/presence/{CHANNEL}?limit=1000"), "", b"").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn users(presence: &Value) -> Vec<&str> {
    presence["members"].as_array().unwrap().iter().map(|member| member["user"].as_str().unwrap_or("")).collect()
}

async fn await_users(gateway: &Gateway, expected: &[&str]) {
    let mut last = Value::Null;
    eventually(&format!("{expected:?} to be here"), async || {
        last = presence(gateway).await;
        (users(&last) == expected).then_some(())
    })
    .await;
    let distinct: BTreeSet<_> = expected.iter().collect();
    assert_eq!((&last["users"], &last["connections"]), (&json!(distinct.len()), &json!(expected.len())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_joins_with_the_first_connection_and_leaves_with_the_last() {
    in_each(200, async |gateways| {
        let (one, other) = (&gateways[0], gateways.last().unwrap());
        let mut observer = observer(one).await;
        let mut first = enter(one, "alice").await;
        first.expect(&told("join", "alice")).await;
        observer.expect(&told("join", "alice")).await;
        let second = enter(other, "alice").await;
        await_users(one, &["alice", "alice", "observer"]).await;
        await_users(other, &["alice", "alice", "observer"]).await;
        expect_nothing(&mut observer, other).await;
        // An unsubscribe is as good as a lost connection.
        first.send(&json!({"type": "unsubscribe", "channel": CHANNEL})).await;
        await_users(one, &["alice", "observer"]).await;
        expect_nothing(&mut observer, other).await;
        drop(second);
        observer.expect(&told("leave", "alice")).await;
        await_users(other, &["observer"]).await;
        assert!(metric(one, "hubcast_presence_events_total").await >= 4.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_within_the_debounce_was_never_away() {
    in_each(1500, async |gateways| {
        let (one, other) = (&gateways[0], gateways.last().unwrap());
        let mut observer = observer(one).await;
        let alice = enter(one, "alice").await;
        observer.expect(&told("join", "alice")).await;
        drop(alice);
        await_users(one, &["observer"]).await;
        let _back = enter(other, "alice").await;
        await_users(one, &["alice", "observer"]).await;
        expect_nothing(&mut observer, one).await;
        await_users(other, &["alice", "observer"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tabs_that_come_and_go_at_once_end_with_the_truth() {
    in_each(5, async |gateways| {
        let (one, other) = (&gateways[0], gateways.last().unwrap());
        let mut observer = observer(one).await;
        let mut tab = enter(one, "alice").await;
        let mut told_of = Vec::new();
        for round in 0..64 {
            let (here, there) = if round % 2 == 0 { (other, one) } else { (one, other) };
            let go = async || drop(tab);
            let (next, ()) = join(enter(here, "alice"), go()).await;
            if round % 3 == 0 {
                drop(enter(there, "alice").await);
            }
            tab = next;
            if round % 4 == 0 {
                await_users(other, &["alice", "observer"]).await;
                told_of.extend(heard(&mut observer, there).await);
                assert_eq!(told_of.last(), Some(&told("join", "alice")), "round {round}");
                await_users(one, &["alice", "observer"]).await;
            }
        }
        drop(tab);
        await_users(one, &["observer"]).await;
        told_of.extend(heard(&mut observer, other).await);
        let alternate: Vec<_> = (0..told_of.len()).map(|at| told(["join", "leave"][at % 2], "alice")).collect();
        assert_eq!(told_of, alternate);
        assert!(told_of.len() >= 2 && told_of.len() % 2 == 0, "the last is a leave");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_big_channel_is_counted_at_once_and_listed_in_exact_pages() {
    in_each(200, async |gateways| {
        let mut clients = Vec::new();
        let mut expected = BTreeSet::new();
        for number in 0..400 {
            let user = format!("user{}", number % 100);
            let gateway = &gateways[number % 7 % gateways.len()];
            let mut client = Client::open(gateway, &format!("/ws?user={user}&channels={CHANNEL}"), None).await;
            let id = client.json().await["connection_id"].as_str().unwrap().to_owned();
            expected.insert((user, id));
            clients.push(client);
        }
        let asked = &gateways[0];
        eventually("all of them", async || (presence(asked).await["connections"] == 400).then_some(())).await;
        let counts = http(asked, &format!("GET /api/presence/{CHANNEL}?limit=0"), "", b"").await.json();
        let all = json!({"channel": CHANNEL, "users": 100, "connections": 400, "members": [], "page": null});
        assert_eq!(counts, all);
        let mut reader = Client::connect(asked).await;
        for limit in [400, 37, 40, 1000, 1] {
            let (mut seen, mut page) = (Vec::new(), Value::Null);
            loop {
                let mut ask = json!({"type": "presence", "channel": CHANNEL, "limit": limit, "id": 7});
                if page != Value::Null {
                    ask["page"] = page;
                }
                reader.send(&ask).await;
                let answer = reader.json().await;
                assert_eq!(
                    (&answer["type"], &answer["id"], &answer["users"]),
                    (&json!("presence"), &json!(7), &json!(100))
                );
                let members = answer["members"].as_array().unwrap();
                assert!(members.len() <= limit);
                let text = |member: &Value, name: &str| member[name].as_str().unwrap().to_owned();
                seen.extend(members.iter().map(|member| (text(member, "user"), text(member, "connection_id"))));
                page = answer["page"].clone();
                if page == Value::Null {
                    break;
                }
                assert_eq!(members.len(), limit, "only the last page is short");
            }
            assert!(seen.is_sorted(), "in order");
            assert_eq!((seen.len(), seen.into_iter().collect::<BTreeSet<_>>()), (400, expected.clone()), "each once");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_for_everybody() {
    in_each(200, async |gateways| {
        let (one, other) = (&gateways[0], gateways.last().unwrap());
        let mut observer = observer(one).await;
        // A raw connection counts, and hears payloads only.
        let mut raw = Client::open(other, &format!("/ws?channel={CHANNEL}&user=raw"), Some("hubcast.raw.v1")).await;
        observer.expect(&told("join", "raw")).await;
        // Without a user, it is the connection that comes and goes.
        let mut nobody = Client::open(other, &format!("/ws?channels={CHANNEL}"), None).await;
        let id = nobody.json().await["connection_id"].as_str().unwrap().to_owned();
        nobody.expect(&json!({"type": "subscribed", "channel": CHANNEL})).await;
        let joined = json!({"type": "join", "channel": CHANNEL, "connection_id": id});
        nobody.expect(&joined).await;
        observer.expect(&joined).await;
        let list = presence(other).await;
        assert_eq!((&list["users"], &list["members"][0]), (&json!(3), &json!({"connection_id": id})));
        crate::harness::publish(one, CHANNEL, b"1").await;
        assert_eq!(raw.text().await, "1", "nothing was before it");
        let refused = http(one, &format!("POST /api/publish/{CHANNEL}"), "", b"\xFFhubcast/1 {\"join\":\"x\"}").await;
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("bad_request")));
        observer.expect(&json!({"type": "event", "channel": CHANNEL, "data": 1})).await;
        drop(nobody);
        observer.expect(&json!({"type": "leave", "channel": CHANNEL, "connection_id": id})).await;

        for (ask, code) in [
            (json!({"channel": "other"}), "forbidden"),
            (json!({}), "bad_request"),
            (json!({"channel": "a b"}), "bad_request"),
            (json!({"channel": CHANNEL, "limit": 1001}), "bad_request"),
            (json!({"channel": CHANNEL, "limit": "1"}), "bad_request"),
            (json!({"channel": CHANNEL, "page": "nonsense!"}), "bad_request"),
            (json!({"channel": CHANNEL, "page": 1}), "bad_request"),
        ] {
            let mut ask = ask;
            ask["type"] = json!("presence");
            observer.send(&ask).await;
            let error = observer.json().await;
            assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)), "{ask}");
        }
        for (path, status) in
            [("other", 404), ("a%20b", 400), ("p:1?limit=1001", 400), ("p:1?page=x", 400), ("p:2", 200)]
        {
            assert_eq!(http(one, &format!("GET /api/presence/{path}"), "", b"").await.status, status, "{path}");
        }
        // Channels without the rule keep nothing.
        let mut other_channel = Client::subscribed(one, "other").await;
        crate::harness::publish(one, "other", b"2").await;
        other_channel.expect(&json!({"type": "event", "channel": "other", "data": 2})).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_instance_leaves_nobody_behind() {
    let redis = Redis::start().await;
    let gateways = world(Some(&redis), 200).await;
    let mut observer = observer(&gateways[0]).await;
    let killed = Binary::start(1000, &[("HUBCAST_REDIS_URL", &redis.url()), RULES]);
    let open = async |number: usize| {
        let url = format!("ws://{}/ws?channels={CHANNEL}&user=user{:02}", killed.public, number % 20);
        tokio_tungstenite::connect_async(url).await.unwrap()
    };
    let _clients = join_all((0..60).map(open)).await;
    let mut come = BTreeSet::new();
    while come.len() < 20 {
        let frame = observer.json().await;
        assert_eq!(frame["type"], "join");
        assert!(come.insert(frame["user"].as_str().unwrap().to_owned()), "each once");
    }
    eventually("all connections", async || (presence(&gateways[1]).await["connections"] == 61).then_some(())).await;
    // One of them is elsewhere, too.
    let _elsewhere = enter(&gateways[1], "user07").await;
    await_connections(&gateways[0], 62).await;
    let instances = http(&gateways[0], "GET /api/instances", "", b"").await.json();
    let own = gateways.iter().map(|gateway| gateway.broker().shared.instance_id.to_string()).collect::<Vec<_>>();
    let ids = instances["instances"].as_array().unwrap().iter().map(|i| i["instance_id"].as_str().unwrap().to_owned());
    let id = ids.into_iter().find(|id| !own.contains(id)).unwrap();
    killed.process.signal(rustix::process::Signal::KILL);
    // The rest of its lease is over at once.
    redis.command(&["DEL", &format!("ws:instance:{id}")]).await;
    let mut gone = BTreeSet::new();
    while gone.len() < 19 {
        let frame = observer.json().await;
        assert_eq!(frame["type"], "leave", "{frame}");
        assert!(gone.insert(frame["user"].as_str().unwrap().to_owned()), "each once");
    }
    come.remove("user07");
    assert_eq!(gone, come);
    await_users(&gateways[1], &["observer", "user07"]).await;
    expect_nothing(&mut observer, &gateways[1]).await;
    assert!(!exists(&redis, &format!("ws:presence_of:{id}")).await);
}

async fn exists(redis: &Redis, key: &str) -> bool {
    redis::from_redis_value(redis.command(&["EXISTS", key]).await).unwrap()
}

async fn await_connections(gateway: &Gateway, count: usize) {
    eventually(&format!("{count} connections"), async || {
        (presence(gateway).await["connections"] == count).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_comes_back_empty_is_told_everything_and_the_channel_only_what_changed() {
    let mut redis = Redis::start().await;
    let gateways = world(Some(&redis), 2000).await;
    let mut observer = observer(&gateways[0]).await;
    let _alice = [enter(&gateways[0], "alice").await, enter(&gateways[1], "alice").await];
    observer.expect(&told("join", "alice")).await;
    let bob = enter(&gateways[1], "bob").await;
    observer.expect(&told("join", "bob")).await;
    let carol = enter(&gateways[0], "carol").await;
    observer.expect(&told("join", "carol")).await;
    redis.kill();
    for gateway in &gateways {
        await_metric(gateway, r#"hubcast_redis_link_up{link="publish"}"#, 0.0).await;
        await_metric(gateway, r#"hubcast_redis_link_up{link="subscribe"}"#, 0.0).await;
    }
    observer.send(&json!({"type": "presence", "channel": CHANNEL, "id": 1})).await;
    let refused = observer.json().await;
    assert_eq!((&refused["code"], &refused["retry_after_ms"]), (&json!("unavailable"), &json!(1000)));
    assert_eq!(http(&gateways[0], &format!("GET /api/presence/{CHANNEL}"), "", b"").await.status, 503);
    drop(bob);
    drop(carol);
    redis.restart().await;
    observer.expect(&json!({"type": "gap", "channel": CHANNEL, "reason": "upstream"})).await;
    let mut gone = [observer.json().await, observer.json().await];
    gone.sort_by_key(|frame| frame["user"].as_str().unwrap().to_owned());
    assert_eq!(gone, [told("leave", "bob"), told("leave", "carol")]);
    for gateway in &gateways {
        await_users(gateway, &["alice", "alice", "observer"]).await;
    }
    expect_nothing(&mut observer, &gateways[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_drained_instance_have_time_to_come_back() {
    let redis = Redis::start().await;
    let mut gateways = world(Some(&redis), 1500).await;
    let mut observer = observer(&gateways[0]).await;
    let alice = enter(&gateways[1], "alice").await;
    observer.expect(&told("join", "alice")).await;
    let bob = enter(&gateways[1], "bob").await;
    observer.expect(&told("join", "bob")).await;
    let drained = gateways.remove(1);
    let id = drained.broker().shared.instance_id.to_string();
    let end = async |mut client: Client| {
        assert_eq!(client.close_frame().await.0, 1012);
    };
    let clients = join(end(alice), end(bob));
    join(drained.drain(), clients).await;
    // Its index stays: whoever sweeps up has yet to settle what is not due.
    assert!(exists(&redis, &format!("ws:presence_of:{id}")).await);
    let _back = enter(&gateways[0], "alice").await;
    observer.expect(&told("leave", "bob")).await;
    expect_nothing(&mut observer, &gateways[0]).await;
    await_users(&gateways[0], &["alice", "observer"]).await;
    eventually("nothing to be left", async || {
        let known = redis.command(&["SISMEMBER", "ws:instances", &id]).await == redis::Value::Int(1);
        (!known && !exists(&redis, &format!("ws:presence_of:{id}")).await).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_was_taken_for_dead_announces_its_users_anew() {
    let redis = Redis::start().await;
    let gateways = world(Some(&redis), 200).await;
    let mut observer = observer(&gateways[0]).await;
    let _alice = enter(&gateways[1], "alice").await;
    observer.expect(&told("join", "alice")).await;
    let key = format!("ws:instance:{}", gateways[1].broker().shared.instance_id);
    // Nobody sweeps up after itself.
    redis.command(&["SET", "ws:sweeper", &gateways[0].broker().shared.instance_id]).await;
    // As if it had not renewed its lease, until somebody sweeps.
    let expire = async {
        loop {
            redis.command(&["DEL", &key]).await;
        }
    };
    let left = tokio::select! {
        left = observer.json() => left,
        () = expire => unreachable!("it does not end"),
    };
    assert_eq!(left, told("leave", "alice"));
    observer.expect(&told("join", "alice")).await;
    await_users(&gateways[0], &["alice", "observer"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_read_is_dropped_and_counted() {
    let redis = Redis::start().await;
    let gateways = world(Some(&redis), 200).await;
    let mut observer = observer(&gateways[0]).await;
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    for payload in [&b"\xFFhubcast/1 nonsense"[..], b"\xFFhubcast/1 {\"join\":\"eve\"}"] {
        redis::cmd("PUBLISH").arg("hub:p:1").arg(payload).exec_async(&mut connection).await.unwrap();
    }
    observer.expect(&told("join", "eve")).await;
    await_metric(&gateways[0], r#"hubcast_dropped_total{reason="redis_unreadable"}"#, 1.0).await;
}
