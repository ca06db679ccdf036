//! Nothing allocates per delivery: a real gateway, real sockets, and an allocator that counts.
//!
//! A global allocator is its binary's, and what is counted is the whole process's, so this is the one
//! story outside `tests/it`. It has a process to itself: the gateway on one worker thread, and one
//! thread that publishes and reads without allocating.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests document themselves and may panic")]
#![allow(clippy::print_stdout, reason = "the figures are worth reading")]

use std::alloc::System;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use hubcast::gateway::Gateway;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::runtime::Runtime;

use harness::{PATIENCE, Raw, gateway, masked};

#[path = "it/harness.rs"]
#[allow(dead_code, unused_imports, reason = "this story needs little of it")]
mod harness;
#[path = "it/observe.rs"]
mod observe;
#[path = "it/redis_server.rs"]
#[allow(dead_code, unused_imports, reason = "this story needs none of it")]
mod redis_server;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const ROUNDS: usize = 50;

/// The least of so many tries counts: a machine that halts the reader lets the sweep trim queues in between.
const TRIES: usize = 3;

/// Publications that arrive in one read. The last two wait more than 32 deep in each outbox; none is so
/// large that the publisher has to pause.
const BURSTS: [usize; 4] = [1, 16, 64, 128];

/// How many allocations a round may have more with 200 subscribers than with 50: the list of whom to flush
/// doubles twice more, and the sweep looks by now and then. One per subscriber would be 150.
const GROWTH_MAX: f64 = 8.0;

/// Bytes of a queue that waits with nothing in it (32 slots).
const IDLE_QUEUE_BYTES: isize = 256;

/// What the worker's buffers may keep of the largest burst, for all connections together.
const WORKER_BYTES: isize = 32 << 10;

struct World {
    _gateway: Gateway,
    _runtime: Runtime,
    publisher: TcpStream,
    subscribers: Vec<TcpStream>,
}

impl World {
    fn new(subscribers: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (gateway, publisher, subscribers) = runtime.block_on(async {
            let gateway = gateway(&[("HUBCAST_WORKER_THREADS", "1")]);
            let mut sockets = Vec::new();
            for _ in 0..subscribers {
                let mut raw = Raw::upgrade(&gateway, "/ws?channels=c", b"").await;
                let (_welcome, _subscribed) = (raw.frame().await.unwrap(), raw.frame().await.unwrap());
                sockets.push(blocking(raw));
            }
            let mut publisher = Raw::upgrade(&gateway, "/ws", b"").await;
            publisher.frame().await.unwrap();
            (gateway, blocking(publisher), sockets)
        });
        Self { _gateway: gateway, _runtime: runtime, publisher, subscribers }
    }

    /// Allocations of [`ROUNDS`] rounds in each of which a burst reaches every subscriber.
    fn allocations(&mut self, burst: usize) -> usize {
        let commands = masked(0x81, br#"{"type":"publish","channel":"c","data":{"n":1}}"#).repeat(burst);
        let payload = br#"{"type":"event","channel":"c","data":{"n":1}}"#;
        let expected = [&[0x81, payload.len() as u8], payload.as_slice()].concat().repeat(burst);
        let mut received = vec![0; expected.len()];
        let mut round = || {
            self.publisher.write_all(&commands).unwrap();
            for subscriber in &mut self.subscribers {
                subscriber.read_exact(&mut received).unwrap();
                assert_eq!(received, expected);
            }
        };
        (0..5).for_each(|_| round());
        let tries = (0..TRIES).map(|_| {
            let region = Region::new(ALLOCATOR);
            (0..ROUNDS).for_each(|_| round());
            let counted = region.change();
            counted.allocations + counted.reallocations
        });
        tries.min().unwrap()
    }
}

/// What is allocated since `region` once the sweep has given back what bursts needed, or what is left in the end.
fn kept(region: &Region<'_, System>, bound: isize) -> isize {
    let started = Instant::now();
    loop {
        let live = region.change();
        let kept = live.bytes_allocated as isize - live.bytes_deallocated as isize;
        if kept <= bound || started.elapsed() > PATIENCE {
            return kept;
        }
        std::thread::yield_now();
    }
}

fn blocking(raw: Raw) -> TcpStream {
    let socket = raw.socket.into_std().unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Counts the allocations of the same rounds with 50 and with 200 subscribers. What a round costs is a
/// matter of its publications, not of who has them; and what a burst needed is given back at rest.
#[test]
fn nothing_allocates_per_delivery() {
    let few: Vec<_> = {
        let mut world = World::new(50);
        BURSTS.map(|burst| world.allocations(burst)).into()
    };
    let mut world = World::new(200);
    world.allocations(1);
    let region = Region::new(ALLOCATOR);
    let many: Vec<_> = BURSTS.map(|burst| world.allocations(burst)).into();
    let bound = 200 * IDLE_QUEUE_BYTES + WORKER_BYTES;
    let kept = kept(&region, bound);

    let per_round = |total: usize| total as f64 / ROUNDS as f64;
    println!("allocations a round: burst, 50 subscribers, 200 subscribers");
    for ((burst, few), many) in BURSTS.iter().zip(&few).zip(&many) {
        println!("{burst}, {}, {}", per_round(*few), per_round(*many));
    }
    let per_publication = per_round(many[3] - many[0]) / (BURSTS[3] - BURSTS[0]) as f64;
    println!("allocations a publication: {per_publication:.2}");
    for ((burst, few), many) in BURSTS.iter().zip(&few).zip(&many) {
        let growth = per_round(*many) - per_round(*few);
        assert!(growth.abs() <= GROWTH_MAX, "{growth} more a round of {burst}");
    }
    // A frame is one buffer and its count.
    assert!(per_publication < 2.1, "{per_publication} a publication");

    println!("bytes kept after the bursts: {kept}");
    assert!(kept <= bound, "{kept} bytes are kept");
}
