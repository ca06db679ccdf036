//! What the machine does to the gateway: no more files, no processor for a while.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::json;
use tokio::net::TcpStream;

use crate::binary::Binary;
use crate::harness::{Client, await_metric, eventually, gateway, http, metric, publish, soon};
use crate::hostile::target::Target;
use crate::observe;

/// There is no file left for another connection: accepting pauses, who is connected notices nothing, and it goes on by
/// itself.
#[tokio::test(flavor = "multi_thread")]
async fn without_files_nobody_who_is_connected_notices() {
    let mut target = Target::start(&[]).await;
    let (mut publisher, mut subscriber) = (Client::connect(&target).await, Client::subscribed(&target, "c").await);
    let pid = Pid::from_child(&target.binary.process.0);
    let before = prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(1), maximum: Some(2000) }).unwrap();
    let began = Instant::now();
    // The kernel takes them, the gateway cannot.
    let waiting = join_all((0..20).map(|_| TcpStream::connect(target.binary.public))).await;
    tokio::time::timeout(Duration::from_millis(500), http(&target, "GET /livez", "", b"")).await.unwrap_err();
    publisher.send(&json!({"type": "publish", "channel": "c", "data": "no file needed"})).await;
    assert_eq!(subscriber.json().await["data"], "no file needed");
    prlimit(Some(pid), Resource::Nofile, before).unwrap();
    target.assert_neighbour_receives().await;
    let over = began.elapsed();
    assert!(metric(&target, "hubcast_accept_errors_total").await > 0.0);
    assert!(waiting.iter().all(Result::is_ok));
    observe::fault(
        "EMFILE",
        None,
        over,
        "accepting pauses and is counted, and goes on by itself; who is connected stays",
    );
    drop((waiting, publisher, subscriber));
    target.assert_unharmed().await;
}

/// Stopped for longer than anybody may be silent, and again and again for most of the time: what clients sent
/// meanwhile counts, and nobody is closed for our own slowness.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_processor_nobody_is_taken_for_dead() {
    const CLIENTS: usize = 50;
    let env =
        [("HUBCAST_PING_INTERVAL", "300ms"), ("HUBCAST_PONG_TIMEOUT", "300ms"), ("HUBCAST_WRITE_TIMEOUT", "400ms")];
    let binary = Binary::start(1000, &env);
    let clients = join_all((0..CLIENTS).map(|_| Client::subscribed(&binary, "c"))).await;
    let reading = clients.into_iter().map(|mut client| {
        tokio::spawn(async move {
            // Pings are answered while it waits.
            soon("what is published at the end", client.expect(&json!({"type": "event", "channel": "c", "data": 1})))
                .await;
            client
        })
    });
    let reading: Vec<_> = reading.collect();
    let began = Instant::now();
    for (stopped_ms, running_ms, times) in [(1_500, 300, 2), (80, 20, 30)] {
        for _ in 0..times {
            binary.process.signal(Signal::STOP);
            tokio::time::sleep(Duration::from_millis(stopped_ms)).await;
            binary.process.signal(Signal::CONT);
            tokio::time::sleep(Duration::from_millis(running_ms)).await;
        }
    }
    publish(&binary, "c", b"1").await;
    for client in join_all(reading).await {
        drop(client.unwrap());
    }
    for reason in ["timeout", "slow_consumer"] {
        let series = format!(r#"hubcast_connections_closed_total{{reason="{reason}"}}"#);
        assert_eq!(metric(&binary, &series).await, 0.0, "{reason}");
    }
    let what = "stopped for 1.5 s with a pong timeout of 300 ms, then for 80 % of the time: nobody closed, all receive";
    observe::fault("CPU starvation", None, began.elapsed(), what);
    eventually("them to be gone", async || (metric(&binary, "hubcast_connections").await == 0.0).then_some(())).await;
}

/// A part of the gateway that nothing replaces: the process ends, so that whoever looks after it starts it anew.
#[tokio::test]
async fn a_panic_of_the_gateways_own_tasks_ends_it() {
    use tracing_subscriber::layer::SubscriberExt as _;
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("keys");
    std::fs::write(&path, "one").unwrap();
    let mut gateway = gateway(&[("HUBCAST_API_KEYS", path.to_str().unwrap())]);
    let trap = crate::hostile::panic::Trap("read anew");
    let _trap = tracing::subscriber::set_default(tracing_subscriber::registry().with(trap));
    std::fs::write(&path, "two").unwrap();
    soon("the gateway to notice", gateway.failed()).await;
    await_metric(&gateway, "hubcast_panics_total", 0.0).await;
}
