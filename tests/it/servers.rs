//! Several independent Redis servers that share the channels, and many channels over many instances.

use std::time::Duration;

use futures_util::future::join_all;
use hubcast::gateway::Gateway;
use hubcast::topology::Topology;
use serde_json::json;

use crate::harness::{Client, Redis, await_metric, eventually, gateway, gateway_with, http, publish, ready};

/// Channels enough that every server has some.
const CHANNELS: usize = 30;

fn name(channel: usize) -> String {
    format!("c:{channel}")
}

/// The rules that README gives to backends, computed by its Python lines.
#[test]
fn a_channel_has_the_place_that_a_backend_computes() {
    for (channel, of_two, of_three, of_five, partition) in [
        ("news", 1, 2, 3, 41),
        ("chat:1", 0, 0, 0, 11),
        ("chat:2", 1, 1, 3, 40),
        ("user:42", 1, 1, 1, 8),
        ("a", 1, 2, 2, 7),
        ("metrics/cpu", 1, 1, 3, 28),
    ] {
        for (servers, expected) in [(1, 0), (2, of_two), (3, of_three), (5, of_five)] {
            assert_eq!(Topology::servers_of(servers, "hub:").server_of(channel), expected, "{channel} of {servers}");
        }
        let cluster = Topology::partitions_of(64, "hub:");
        let redis_channel = cluster.redis_channel(channel);
        assert_eq!(redis_channel, format!("hub:{{{partition}}}:{channel}"));
        assert_eq!(cluster.channel_name(redis_channel.as_bytes()), Some(channel));
    }
}

#[test]
fn one_server_more_moves_few_channels_and_all_of_them_to_it() {
    let (three, four) = (Topology::servers_of(3, ""), Topology::servers_of(4, ""));
    let places: Vec<_> = (0..9000).map(|n| (three.server_of(&name(n)), four.server_of(&name(n)))).collect();
    let moved: Vec<_> = places.iter().filter(|(before, after)| before != after).collect();
    assert!(moved.iter().all(|(_, after)| *after == 3));
    assert!((2000..2500).contains(&moved.len()), "a quarter, not {}", moved.len());
    for server in 0..3 {
        let count = places.iter().filter(|(before, _)| *before == server).count();
        assert!((2700..3300).contains(&count), "a third, not {count}");
    }
}

/// A client of each gateway in every channel.
async fn readers(gateways: &[Gateway]) -> Vec<Client> {
    let names: Vec<_> = (0..CHANNELS).map(name).collect();
    let subscribe = async |gateway: &Gateway| {
        let mut client = Client::connect(gateway).await;
        client.send(&json!({"type": "subscribe", "channels": names})).await;
        for _ in 0..CHANNELS {
            assert_eq!(client.json().await["type"], "subscribed");
        }
        client
    };
    let mut readers = Vec::new();
    for gateway in gateways {
        readers.push(subscribe(gateway).await);
    }
    readers
}

#[tokio::test(flavor = "multi_thread")]
async fn independent_servers_share_the_channels_and_one_that_dies_takes_only_its_own() {
    let mut servers = [Redis::start().await, Redis::start().await];
    let urls = servers.each_ref().map(Redis::url).join(",");
    let gateways = [(); 2].map(|()| gateway(&[("HUBCAST_REDIS_URL", &urls)]));
    for gateway in &gateways {
        await_metric(gateway, r#"hubcast_redis_link_up{link="subscribe"}"#, 2.0).await;
        await_metric(gateway, r#"hubcast_redis_link_up{link="publish"}"#, 2.0).await;
    }
    let topology = Topology::servers_of(2, "hub:");
    let mut readers = readers(&gateways).await;
    for channel in 0..CHANNELS {
        let at = topology.server_of(&name(channel));
        let redis_channel = topology.redis_channel(&name(channel));
        assert_eq!(servers[at].numsub(&redis_channel).await, 2);
        assert_eq!(servers[1 - at].numsub(&redis_channel).await, 0);
        publish(&gateways[channel % 2], &name(channel), channel.to_string().as_bytes()).await;
        for reader in &mut readers {
            reader.expect(&json!({"type": "event", "channel": name(channel), "data": channel})).await;
        }
    }
    servers[1].kill();
    await_metric(&gateways[0], r#"hubcast_redis_link_up{link="publish"}"#, 1.0).await;
    assert_eq!(http(&gateways[0], "GET /readyz", "", b"").await.status, 200, "the other one is of use");
    for channel in 0..CHANNELS {
        let status = http(&gateways[0], &format!("POST /api/publish/{}", name(channel)), "", b"1").await.status;
        assert_eq!(status, if topology.server_of(&name(channel)) == 0 { 200 } else { 503 });
    }
    servers[1].restart().await;
    let of_first = (0..CHANNELS).filter(|channel| topology.server_of(&name(*channel)) == 0).count();
    for reader in &mut readers {
        let mut gaps = 0;
        for _ in 0..CHANNELS {
            let frame = reader.json().await;
            let server = topology.server_of(frame["channel"].as_str().unwrap());
            assert_eq!(frame["type"], if server == 0 { "event" } else { "gap" }, "{frame}");
            gaps += server;
        }
        assert_eq!(gaps, CHANNELS - of_first);
    }
}

/// What README promises of partitions, where nodes share the slots evenly.
#[test]
fn partitions_are_spread_over_the_nodes() {
    for (partitions, nodes, least, most) in [(64, 3, 21, 22), (64, 4, 16, 16), (1024, 18, 52, 65), (1024, 20, 44, 55)] {
        let topology = Topology::partitions_of(partitions, "hub:");
        let owner = |slot: u16| usize::from(slot) * nodes / 16_384;
        assert!(topology.place(|slot| Some(owner(slot))));
        let mut shares = vec![0; nodes];
        topology.slots().for_each(|slot| shares[owner(slot)] += 1);
        let (min, max) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        assert_eq!((*min, *max), (least, most), "{partitions} over {nodes}: {shares:?}");
        // Channels are spread over the partitions as evenly.
        let mut channels = vec![0; nodes];
        (0..100_000).for_each(|channel| channels[topology.server_of(&name(channel))] += 1);
        for (channels, share) in channels.iter().zip(&shares) {
            let expected = 100_000 * share / partitions;
            assert!(channels * 10 > expected * 9 && channels * 10 < expected * 11, "{channels}, not {expected}");
        }
    }
}

/// The registry is on the first.
#[tokio::test(flavor = "multi_thread")]
async fn presence_goes_on_where_the_first_server_is_not_needed() {
    let mut servers = [Redis::start().await, Redis::start().await];
    let urls = servers.each_ref().map(Redis::url).join(",");
    let rules = ("HUBCAST_CHANNEL_RULES", r#"[{"match":"*","presence":true}]"#);
    let gateways = [(); 2].map(|()| {
        gateway_with(&[("HUBCAST_REDIS_URL", &urls), rules], |config| {
            config.presence_debounce = Duration::from_millis(200);
        })
    });
    for gateway in &gateways {
        await_metric(gateway, r#"hubcast_redis_link_up{link="subscribe"}"#, 2.0).await;
        await_metric(gateway, r#"hubcast_redis_link_up{link="publish"}"#, 2.0).await;
        await_metric(gateway, r#"hubcast_redis_link_up{link="registry"}"#, 1.0).await;
    }
    let topology = Topology::servers_of(2, "hub:");
    let channel = (0..CHANNELS).map(name).find(|channel| topology.server_of(channel) == 1).unwrap();
    let told = |kind: &str, user: &str| json!({"type": kind, "channel": channel, "user": user});
    let enter = async |gateway: &Gateway, user: &str| {
        let mut client = Client::open(gateway, &format!("/ws?user={user}"), None).await;
        assert_eq!(client.json().await["type"], "welcome");
        client.send(&json!({"type": "subscribe", "channel": channel})).await;
        client.expect(&json!({"type": "subscribed", "channel": channel})).await;
        client
    };
    let mut observer = enter(&gateways[0], "observer").await;
    observer.expect(&told("join", "observer")).await;
    let alice = enter(&gateways[1], "alice").await;
    observer.expect(&told("join", "alice")).await;
    servers[0].kill();
    for gateway in &gateways {
        await_metric(gateway, r#"hubcast_redis_link_up{link="registry"}"#, 0.0).await;
    }
    drop(alice);
    observer.expect(&told("leave", "alice")).await;
    // Who comes is let in, and told once the index of its instance can be written.
    let _bob = enter(&gateways[1], "bob").await;
    drop(enter(&gateways[1], "carol").await);
    await_metric(&gateways[1], "hubcast_connections", 1.0).await;
    servers[0].restart().await;
    observer.expect(&told("join", "bob")).await;
    let answer = http(&gateways[0], &format!("GET /api/presence/{channel}?limit=0"), "", b"").await;
    assert_eq!((&answer.json()["users"], &answer.json()["connections"]), (&json!(2), &json!(2)));
    eventually("nothing of the others to be left in the index", async || {
        let index = format!("ws:presence_of:{}", gateways[1].broker().shared.instance_id);
        (servers[0].query::<usize>(&["SCARD", &index]).await.ok()? == 1).then_some(())
    })
    .await;
}

async fn text(redis: &Redis, arguments: &[&str]) -> String {
    redis::from_redis_value(redis.command(arguments).await).expect("it answers with text")
}

/// How often Redis was given a command.
async fn calls(redis: &Redis, command: &str) -> usize {
    let stats = text(redis, &["INFO", "commandstats"]).await;
    let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
    line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
}

async fn channels(redis: &Redis) -> usize {
    match redis.command(&["PUBSUB", "CHANNELS", "hub:c:*"]).await {
        redis::Value::Array(list) => list.len(),
        other => panic!("{other:?}"),
    }
}

/// Whether of every channel there is one, no more and no less.
async fn has_one_subscriber_each(redis: &Redis, channels: usize) -> bool {
    let names: Vec<_> = (0..channels).map(|channel| format!("hub:{}", name(channel))).collect();
    let mut counted = 0;
    for names in names.chunks(5_000) {
        let command: Vec<_> = ["PUBSUB", "NUMSUB"].into_iter().chain(names.iter().map(String::as_str)).collect();
        let counts: Vec<(String, usize)> = redis.query(&command).await.expect("redis is there");
        counted += counts.iter().filter(|(_, count)| *count == 1).count();
    }
    counted == channels
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_thousand_channels_over_ten_instances_cost_redis_three_connections_each() {
    const INSTANCES: usize = 10;
    const CLIENTS: usize = 50;
    const EACH: usize = 100;
    const CHANNELS: usize = INSTANCES * CLIENTS * EACH;
    let redis = Redis::start().await;
    let gateways = [(); INSTANCES].map(|()| gateway(&[("HUBCAST_REDIS_URL", &redis.url())]));
    join_all(gateways.iter().map(ready)).await;
    let client = async |gateway: &Gateway, first: usize| {
        let mut client = Client::connect(gateway).await;
        let names: Vec<_> = (first..first + EACH).map(name).collect();
        client.send(&json!({"type": "subscribe", "channels": names})).await;
        for _ in 0..EACH {
            assert_eq!(client.json().await["type"], "subscribed");
        }
        client
    };
    let mut clients = Vec::new();
    for (at, gateway) in gateways.iter().enumerate() {
        let firsts = (0..CLIENTS).map(|n| (at * CLIENTS + n) * EACH);
        clients.extend(join_all(firsts.map(|first| client(gateway, first))).await);
    }
    assert_eq!(channels(&redis).await, CHANNELS);
    assert!(has_one_subscriber_each(&redis, CHANNELS).await);
    let ours = text(&redis, &["CLIENT", "LIST"]).await.matches("name=hubcast-").count();
    assert_eq!(ours, 3 * INSTANCES, "connections of all instances");
    // One command a client's hundred names; a busy machine may cut these into a few pieces.
    let subscribes = calls(&redis, "subscribe").await;
    assert!(subscribes <= CHANNELS / 20, "batched, not {subscribes} commands");
    // Every tenth is heard, wherever it is published.
    for (at, client) in clients.iter_mut().enumerate().step_by(10) {
        let channel = name(at * EACH + at % EACH);
        publish(&gateways[(at + 3) % INSTANCES], &channel, at.to_string().as_bytes()).await;
        client.expect(&json!({"type": "event", "channel": channel, "data": at})).await;
    }
    drop(clients);
    eventually("every subscription to be gone", async || (channels(&redis).await == 0).then_some(())).await;
    let unsubscribes = calls(&redis, "unsubscribe").await;
    assert!(unsubscribes <= CHANNELS / 20, "batched, not {unsubscribes} commands");
    for gateway in &gateways {
        await_metric(gateway, "hubcast_channels", 0.0).await;
    }
}
