//! What the machine does to the gateway: no more files, no processor for a while, another time.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::json;
use tokio::net::TcpStream;

use crate::binary::Binary;
use crate::harness::{Client, Raw, await_metric, eventually, gateway, http, metric, publish, soon};
use crate::hostile::target::{Target, received};
use crate::issuer::{SECRET, now_s, token};
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

const LOST: &str = r#"hubcast_connections_closed_total{reason="lost"}"#;

/// The kernel has no buffers for one connection: that one is closed and counted, and nobody else notices.
#[tokio::test(flavor = "multi_thread")]
async fn without_buffers_only_that_connection_ends() {
    let mut target = Target::start(&[]).await;
    let mut victim = Raw::upgrade(&target, "/ws?channels=c", b"").await;
    let mut fellow = Client::subscribed(&target, "c").await;
    for _ in 0..2 {
        victim.frame().await.expect("the welcome and the confirmation");
    }
    let Some(strace) = Strace::fail_writes_to(&target, &victim) else {
        let why = "NOT DONE: strace is not here, or may not attach to a process (apt-get install strace)";
        println!("{why}");
        return observe::fault("ENOBUFS on send", None, Duration::ZERO, why);
    };
    let (began, ticks) = (Instant::now(), target.cpu_ticks());
    // A traced thread's calls fail from its next stop on: some may still succeed.
    let mut published = 0;
    while metric(&target, LOST).await == 0.0 {
        published += 1;
        publish(&target, "c", published.to_string().as_bytes()).await;
        fellow.expect(&json!({"type": "event", "channel": "c", "data": published})).await;
        assert!(published < 1000, "its writes go on");
    }
    let over = began.elapsed();
    let mut heard = 0;
    while victim.frame().await.is_some() {
        heard += 1;
    }
    assert!(heard < published, "the last was not to be written");
    assert_eq!(metric(&target, LOST).await, 1.0);
    assert!(metric(&target, r#"hubcast_dropped_total{reason="connection_lost"}"#).await >= 1.0);
    target.assert_neighbour_receives().await;
    assert!(target.cpu_ticks() - ticks < 100, "it spins");
    drop((strace, victim, fellow));
    observe::fault("ENOBUFS on send", None, over, "each write to it fails: closed as lost, what it missed is counted");
    target.assert_unharmed().await;
}

/// A tracer that has system calls on one socket fail.
struct Strace(Child);

impl Strace {
    /// Has every write to a client's socket fail with ENOBUFS from now on; `None` where that cannot be done.
    fn fail_writes_to(target: &Target, client: &Raw) -> Option<Self> {
        // Both ports: at the same time a client of another story may have the same one, and so may one that just left.
        let port = |address: SocketAddr| format!(":{:04X}", address.port());
        let (ours, theirs) = (port(target.binary.public), port(client.socket.local_addr().unwrap()));
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        // Local and remote address, state, queues, timers, retransmits, user, timeout, inode: proc_net_tcp(5).
        let inode = table.lines().find_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            (fields[1].ends_with(&ours) && fields[2].ends_with(&theirs)).then(|| fields[9].to_owned())
        });
        let socket = format!("socket:[{}]", inode.expect("the gateway's end of it"));
        let pid = target.binary.process.0.id().to_string();
        let calls = "write,writev,sendto,sendmsg";
        let mut child = Command::new("strace")
            .args(["-f", "-qq", "-P", &socket, "-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:error=ENOBUFS"), "-o", "/dev/null", "-p", &pid])
            .spawn()
            .ok()?;
        let is_traced = || {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let mut statuses =
                tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default());
            statuses.all(|status| !status.contains("TracerPid:\t0\n"))
        };
        while !is_traced() {
            if child.try_wait().unwrap().is_some() {
                return None;
            }
            std::thread::yield_now();
        }
        Some(Self(child))
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // Asked, not killed: it lets the process go.
        rustix::process::kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        self.0.wait().unwrap();
    }
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

/// The library that has a process see another time (Debian's `faketime`; `.ci/run` installs it).
fn faketime() -> PathBuf {
    let places = std::fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path().join("faketime"));
    let library = places.map(|place| place.join("libfaketimeMT.so.1")).find(|library| library.exists());
    library.expect("faketime is installed: apt-get install faketime")
}

/// An hour forward, and two back: nobody is closed but those whose tokens are over then, events keep their order, and
/// no cursor comes twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_jumps_closes_nobody() {
    let dir = tempfile::TempDir::new().unwrap();
    let (library, time) = (faketime(), dir.path().join("time"));
    let jump = |offset: &str| {
        // Replaced, so that nobody reads half of it.
        std::fs::write(dir.path().join("next"), offset).unwrap();
        std::fs::rename(dir.path().join("next"), &time).unwrap();
    };
    jump("+0");
    let binary = Binary::start(
        1000,
        &[
            ("LD_PRELOAD", library.to_str().unwrap()),
            ("FAKETIME_TIMESTAMP_FILE", time.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("HUBCAST_PING_INTERVAL", "500ms"),
            ("HUBCAST_PONG_TIMEOUT", "1s"),
            ("HUBCAST_WRITE_TIMEOUT", "1s"),
            ("HUBCAST_AUTH", "jwt"),
            ("HUBCAST_JWT_SECRET", SECRET),
            ("HUBCAST_CHANNEL_RULES", r#"[{"match":"c","access":"public","history":{"size":100,"ttl":"30d"}}]"#),
        ],
    );
    let subscribed = async |life_s: u64, after: Option<&str>| {
        let path = format!("/ws?token={}", token(json!({"exp": now_s() + life_s})));
        let mut client = Client::open(&binary, &path, None).await;
        assert_eq!(client.json().await["type"], "welcome");
        let mut subscribe = json!({"type": "subscribe", "channel": "c"});
        subscribe["after"] = after.into();
        client.send(&if after.is_some() { subscribe } else { json!({"type": "subscribe", "channel": "c"}) }).await;
        let answer = client.json().await;
        assert_eq!(
            (&answer["type"], &answer["recovered"]),
            (&json!("subscribed"), &json!(after.is_some())),
            "{answer}"
        );
        client
    };
    let mut stays = received(subscribed(3 * 3600, None).await);
    let mut expires = subscribed(600, None).await;
    let began = Instant::now();
    let (mut cursors, mut first) = (Vec::new(), String::new());
    for (turn, offset) in ["+0", "+3600", "-3600", "+0"].into_iter().enumerate() {
        jump(offset);
        if turn == 1 {
            assert_eq!(expires.close_frame().await.0, 3000);
        }
        for n in 0..5 {
            publish(&binary, "c", format!("{}", turn * 5 + n).as_bytes()).await;
            let event = soon("the event", stays.recv()).await.expect("it stays connected");
            assert_eq!(event["data"], turn * 5 + n, "{event}");
            cursors.push(event["cursor"].as_str().unwrap().to_owned());
        }
        if first.is_empty() {
            first = cursors[0].clone();
        }
        // Long enough for pings, answers and the deadlines of both.
        let pings = metric(&binary, "hubcast_frames_sent_total").await + 3.0;
        eventually("pings to be sent", async || {
            (metric(&binary, "hubcast_frames_sent_total").await >= pings).then_some(())
        })
        .await;
    }
    let distinct: std::collections::BTreeSet<_> = cursors.iter().collect();
    assert_eq!(distinct.len(), cursors.len());
    let mut resumed = subscribed(3600, Some(&first)).await;
    for cursor in &cursors[1..] {
        assert_eq!(resumed.json().await["cursor"], cursor.as_str());
    }
    drop(expires);
    for (reason, count) in [("token_expired", 1.0), ("timeout", 0.0), ("slow_consumer", 0.0), ("auth_timeout", 0.0)] {
        await_metric(&binary, &format!(r#"hubcast_connections_closed_total{{reason="{reason}"}}"#), count).await;
    }
    let what = "an hour forward, two back, one forward: nobody closed but by his token's end, 20 cursors in order, all recovered";
    observe::fault("wall clock jumps", None, began.elapsed(), what);
}
