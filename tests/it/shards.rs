//! Channels in a Redis Cluster: spread over the nodes, and what happens when nodes fail and slots move.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use hubcast::gateway::Gateway;
use hubcast::topology::Topology;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::binary::Binary;
use crate::harness::{Client, Redis, eventually, gateway, gateway_with, http, publish, ready};
use crate::redis_cluster::RedisCluster;

/// Channels enough that every node has some.
const CHANNELS: usize = 40;

fn name(channel: usize) -> String {
    format!("c:{channel}")
}

fn redis_channel(channel: usize) -> String {
    Topology::partitions_of(64, "hub:").redis_channel(&name(channel))
}

async fn instance(cluster: &RedisCluster, rules: &str) -> Gateway {
    let urls = cluster.urls();
    let env = [("HUBCAST_REDIS_URL", &*urls), ("HUBCAST_REDIS_MODE", "cluster"), ("HUBCAST_CHANNEL_RULES", rules)];
    let gateway = gateway(&env);
    ready(&gateway).await;
    gateway
}

const HISTORY: &str = r#"[{"match":"*","history":{"size":1000,"ttl":"10m"}}]"#;

async fn reader(gateway: &Gateway) -> Client {
    let mut client = Client::connect(gateway).await;
    let names: Vec<_> = (0..CHANNELS).map(name).collect();
    client.send(&json!({"type": "subscribe", "channels": names})).await;
    for _ in 0..CHANNELS {
        assert_eq!(client.json().await["type"], "subscribed");
    }
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_are_spread_over_the_nodes_and_backends_publish_by_the_partition_rule() {
    let cluster = RedisCluster::start().await;
    let gateways = [instance(&cluster, "").await, instance(&cluster, "").await];
    let mut readers = [reader(&gateways[0]).await, reader(&gateways[1]).await];
    let mut nodes = BTreeSet::new();
    for channel in 0..CHANNELS {
        let redis_channel = redis_channel(channel);
        nodes.insert(cluster.primary_of(cluster.slot_of(&redis_channel).await).await);
        assert_eq!(cluster.numsub(&redis_channel).await, 2, "{redis_channel}");
        publish(&gateways[channel % 2], &name(channel), b"1").await;
        assert_eq!(cluster.spublish(&redis_channel, "2").await, 2);
        for reader in &mut readers {
            for data in [1, 2] {
                reader.expect(&json!({"type": "event", "channel": name(channel), "data": data})).await;
            }
        }
    }
    assert_eq!(nodes.len(), 3);
    eventually("each to have named three links to each primary, and the one that looks for them", async || {
        let (mut links, mut at_primaries) = (0, 0);
        for node in cluster.nodes() {
            let list: String = node.redis.query(&["CLIENT", "LIST"]).await.ok()?;
            let of_node = list.matches("name=hubcast-").count();
            links += of_node;
            at_primaries += if node.is_primary().await { of_node } else { 0 };
        }
        // Whom to ask for the owners may be a replica.
        (at_primaries >= gateways.len() * 3 * 3 && links >= gateways.len() * (3 * 3 + 1)).then_some(())
    })
    .await;
    // Instances find each other, and ask each other once.
    let (mut bob, body) = (Client::open(&gateways[1], "/ws?user=bob", None).await, json!({"user": "bob"}).to_string());
    assert_eq!(bob.json().await["type"], "welcome");
    eventually("all instances to be known", async || {
        let answer = http(&gateways[0], "GET /api/instances", "", b"").await;
        (answer.status == 200 && answer.json()["instances"].as_array()?.len() == 2).then_some(())
    })
    .await;
    let answer = http(&gateways[0], "POST /api/disconnect", "", body.as_bytes()).await;
    assert_eq!(answer.json(), json!({"disconnected": 1}));
    assert_eq!(bob.close_frame().await.0, 3003);
    drop(readers);
    for channel in 0..CHANNELS {
        eventually("nobody to be subscribed", async || {
            (cluster.numsub(&redis_channel(channel)).await == 0).then_some(())
        })
        .await;
    }
}

/// Publishes to all channels in turn until it is told to stop; gives, per channel, what was acknowledged.
async fn load(gateway: &Gateway, first_round: oneshot::Sender<()>, is_over: &AtomicBool) -> Vec<Vec<u64>> {
    let mut first_round = Some(first_round);
    let mut acknowledged = vec![Vec::new(); CHANNELS];
    let mut number = 0;
    while !is_over.load(Ordering::Relaxed) {
        for (channel, acknowledged) in acknowledged.iter_mut().enumerate() {
            number += 1;
            let path = format!("POST /api/publish/{}", name(channel));
            let answer = http(gateway, &path, "", number.to_string().as_bytes()).await;
            match answer.status {
                200 => acknowledged.push(number),
                503 | 504 => {}
                status => panic!("{status}: {answer:?}"),
            }
        }
        first_round.take().map(|first_round| first_round.send(()));
    }
    acknowledged
}

/// Reads until the last marker of every channel: what came, per channel, and where there were gaps.
async fn read_all(reader: &mut Client) -> Vec<Vec<Value>> {
    let mut seen = vec![Vec::new(); CHANNELS];
    let mut ended = 0;
    while ended < CHANNELS {
        let frame = reader.json().await;
        let channel: usize = frame["channel"].as_str().unwrap()[2..].parse().unwrap();
        match frame["type"].as_str().unwrap() {
            "gap" => seen[channel].push(Value::Null),
            "event" if frame["data"] == "end" => ended += 1,
            "event" => seen[channel].push(frame["data"].clone()),
            other => panic!("{other}: {frame}"),
        }
    }
    seen
}

/// In order, none twice, and everything acknowledged is there unless a gap was told.
fn check(acknowledged: &[Vec<u64>], seen: &[Vec<Value>]) -> usize {
    let mut channels_with_gaps = 0;
    for (acknowledged, seen) in acknowledged.iter().zip(seen) {
        let events: Vec<u64> = seen.iter().filter_map(Value::as_u64).collect();
        assert!(events.is_sorted_by(|a, b| a < b), "one order, none twice: {events:?}");
        let has_gap = seen.contains(&Value::Null);
        channels_with_gaps += usize::from(has_gap);
        let missing: Vec<_> = acknowledged.iter().filter(|number| !events.contains(number)).collect();
        assert!(missing.is_empty() || has_gap, "lost in silence: {missing:?}");
    }
    channels_with_gaps
}

/// A gateway under load while `fault` happens to the cluster: how many channels were told a gap.
async fn under_load(cluster: &mut RedisCluster, rules: &str, fault: impl AsyncFnOnce(&mut RedisCluster)) -> usize {
    let gateways = [instance(cluster, rules).await, instance(cluster, rules).await];
    let mut readers = [reader(&gateways[0]).await, reader(&gateways[1]).await];
    let is_over = AtomicBool::new(false);
    let (first_round, is_loaded) = oneshot::channel();
    let stop = async {
        is_loaded.await.expect("the load goes on");
        fault(cluster).await;
        is_over.store(true, Ordering::Relaxed);
    };
    let (acknowledged, ()) = tokio::join!(load(&gateways[0], first_round, &is_over), stop);
    for channel in 0..CHANNELS {
        eventually("every channel to be live on both", async || {
            (cluster.numsub(&redis_channel(channel)).await == 2).then_some(())
        })
        .await;
        eventually("the end to be published", async || {
            let path = format!("POST /api/publish/{}", name(channel));
            (http(&gateways[1], &path, "", b"\"end\"").await.status == 200).then_some(())
        })
        .await;
    }
    assert!(acknowledged.iter().all(|numbers| !numbers.is_empty()));
    let mut gaps = 0;
    for reader in &mut readers {
        gaps = check(&acknowledged, &read_all(reader).await);
    }
    gaps
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_under_load_costs_a_gap_on_its_channels_only() {
    let mut cluster = RedisCluster::start().await;
    let slot = cluster.slot_of(&redis_channel(0)).await;
    let began = std::time::Instant::now();
    let gaps = under_load(&mut cluster, "", async |cluster| {
        let old = cluster.kill_primary_of(slot).await;
        cluster.await_new_primary_of(slot, old).await;
    })
    .await;
    assert!((1..CHANNELS).contains(&gaps), "{gaps} of {CHANNELS} channels were told a gap");
    crate::observe::fault(
        "cluster node killed",
        None,
        began.elapsed(),
        "under load, the cluster's own election included: gaps on some channels only",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_move_under_load_lose_nothing_in_silence() {
    let mut cluster = RedisCluster::start().await;
    let gaps = under_load(&mut cluster, "", move_slots).await;
    assert!((1..CHANNELS / 2).contains(&gaps), "{gaps} of {CHANNELS} channels were told a gap");
}

/// The streams move with their slots, so what was missed in between is repaired.
#[tokio::test(flavor = "multi_thread")]
async fn slots_that_move_under_load_cost_no_gap_where_history_is_on() {
    let mut cluster = RedisCluster::start().await;
    assert_eq!(under_load(&mut cluster, HISTORY, move_slots).await, 0);
}

/// Its replica may lack what it acknowledged last: a gap there, and nowhere else.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_under_load_loses_nothing_in_silence_where_history_is_on() {
    let mut cluster = RedisCluster::start().await;
    let slot = cluster.slot_of(&redis_channel(0)).await;
    let gaps = under_load(&mut cluster, HISTORY, async |cluster| {
        let old = cluster.kill_primary_of(slot).await;
        cluster.await_new_primary_of(slot, old).await;
    })
    .await;
    assert!(gaps < CHANNELS / 2, "{gaps} of {CHANNELS} channels were told a gap");
}

async fn move_slots(cluster: &mut RedisCluster) {
    let moved: BTreeSet<_> = [0, 1, 2, 3].map(redis_channel).into_iter().collect();
    for redis_channel in &moved {
        let slot = cluster.slot_of(redis_channel).await;
        let from = cluster.primary_of(slot).await;
        let mut others = BTreeSet::new();
        for channel in 0..CHANNELS {
            let slot = cluster.slot_of(&self::redis_channel(channel)).await;
            others.insert(cluster.primary_of(slot).await);
        }
        let to = others.into_iter().find(|node| *node != from).expect("three nodes have channels");
        cluster.migrate_slot(slot, to).await;
    }
}

async fn node_of<'a>(cluster: &'a mut RedisCluster, key: &str) -> &'a mut Redis {
    let slot = cluster.slot_of(key).await;
    let primary = cluster.primary_of(slot).await;
    cluster.node(primary)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_lives_in_a_cluster_too() {
    let mut cluster = RedisCluster::start().await;
    let env = [("HUBCAST_REDIS_URL", cluster.urls()), ("HUBCAST_REDIS_MODE", "cluster".to_owned())];
    let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let survivor = gateway_with(&env, |config| config.registry_lease = std::time::Duration::from_millis(600));
    ready(&survivor).await;
    let killed = Binary::start(1000, &env);
    let known = async || {
        let answer = http(&survivor, "GET /api/instances", "", b"").await;
        if answer.status == 200 { answer.json()["instances"].as_array().cloned() } else { None }
    };
    eventually("both instances", async || (known().await?.len() == 2).then_some(())).await;
    killed.process.signal(rustix::process::Signal::KILL);
    let id = known().await.unwrap().into_iter().map(|instance| instance["instance_id"].as_str().unwrap().to_owned());
    let id = id.into_iter().find(|id| **id != *survivor.broker().shared.instance_id).expect("the other one");
    // The rest of its lease is over at once.
    let lease = format!("ws:instance:{id}");
    node_of(&mut cluster, &lease).await.command(&["DEL", &lease]).await;
    eventually("it to be swept up", async || (known().await?.len() == 1).then_some(())).await;
    let node = node_of(&mut cluster, "ws:instances").await;
    eventually("it to be listed no more", async || {
        (node.command(&["SISMEMBER", "ws:instances", &id]).await == redis::Value::Int(0)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn presence_survives_the_loss_of_a_node() {
    let mut cluster = RedisCluster::start().await;
    let env = [
        ("HUBCAST_REDIS_URL", cluster.urls()),
        ("HUBCAST_REDIS_MODE", "cluster".to_owned()),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"c:*","presence":true}]"#.to_owned()),
    ];
    let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let gateways =
        [(); 2].map(|()| gateway_with(&env, |config| config.presence_debounce = std::time::Duration::from_millis(300)));
    let mut clients = Vec::new();
    for (gateway, user) in gateways.iter().zip(["alice", "bob"]) {
        ready(gateway).await;
        let mut client = Client::open(gateway, &format!("/ws?user={user}&channels=c:1,c:2,c:3"), None).await;
        assert_eq!(client.json().await["type"], "welcome");
        clients.push(client);
    }
    let await_users = async |gateway: &Gateway, users: &[&str]| {
        for channel in ["c:1", "c:2", "c:3"] {
            eventually("the users", async || {
                let answer = http(gateway, &format!("GET /api/presence/{channel}"), "", b"").await;
                let members = answer.json()["members"].as_array()?.clone();
                let found: Vec<_> = members.iter().filter_map(|member| member["user"].as_str()).collect();
                (answer.status == 200 && found == users).then_some(())
            })
            .await;
        }
    };
    for gateway in &gateways {
        await_users(gateway, &["alice", "bob"]).await;
    }
    let slot = cluster.slot_of(&redis_channel(1)).await;
    let old = cluster.kill_primary_of(slot).await;
    // He leaves while nobody can write it down.
    clients.truncate(1);
    cluster.await_new_primary_of(slot, old).await;
    for gateway in &gateways {
        await_users(gateway, &["alice"]).await;
    }
    let mut left = BTreeSet::new();
    while left.len() < 3 {
        let frame = clients[0].json().await;
        if frame["type"] == "leave" {
            assert_eq!(frame["user"], "bob");
            left.insert(frame["channel"].to_string());
        }
    }
}
