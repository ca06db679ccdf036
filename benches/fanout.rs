//! What the gateway itself does for a publication and for a subscription, without sockets.
//!
//! Left out everywhere: system calls, task switches, metrics, and everything behind `send`.
//! `benches/README.md` has the table.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hubcast::channel::Wish;
use hubcast::event;
use hubcast::fanout::{Fanout, Subscriber};
use hubcast::frame::Frame;
use hubcast::hub::{Hub, Subscriptions};
use hubcast::publication::Payload;
use hubcast::writer::Writer;
use world::{Bare, CHANNEL, World, data, deliver};

mod world;

/// `fanout/push`: channel lookup, encoding once, the walk under the order lock, one push into each of N idle
/// outboxes, and the list of whom to flush. `fanout/push_and_drain` adds what a lane does until each frame is
/// handed to `send`. Leaves out who flushes where: lanes, splitting, wake-ups.
fn fanout(criterion: &mut Criterion) {
    let data = data(128);
    let mut group = criterion.benchmark_group("fanout");
    for subscribers in [10, 1_000, 10_000, 100_000] {
        let world = World::new(subscribers);
        let mut writer = Writer::default();
        let publish = || {
            let mut fanout = Fanout::default();
            world.hub.gather(CHANNEL, Payload::Json(&data).into(), &mut fanout);
            deliver(&mut fanout);
            fanout
        };
        group.throughput(Throughput::Elements(subscribers as u64));
        group.bench_function(BenchmarkId::new("push", subscribers), |bencher| {
            bencher.iter_batched(|| world.drain(&mut writer), |()| publish(), BatchSize::PerIteration);
        });
        world.drain(&mut writer);
        group.bench_function(BenchmarkId::new("push_and_drain", subscribers), |bencher| {
            bencher.iter(|| drain(publish(), &mut writer));
        });
    }
    group.finish();
}

/// `outbox/push`: 1, 16 or 64 frames into each of 1,000 idle outboxes. `outbox/drain`: taking them out and
/// handing them to `send`, joined in one buffer that all share, as subscribers of a channel do; and giving the
/// write right back. One thread, so no lock is ever waited for.
fn outbox(criterion: &mut Criterion) {
    const OUTBOXES: usize = 1_000;
    let world = World::new(OUTBOXES);
    let mut group = criterion.benchmark_group("outbox");
    for depth in [1, 16, 64] {
        let frames: Vec<_> = (0..depth).map(|_| Frame::text(&data(128))).collect();
        let push = || {
            for outbox in &world.outboxes {
                for frame in &frames {
                    let _ = outbox.push(frame);
                }
            }
        };
        let mut writer = Writer::default();
        group.throughput(Throughput::Elements((OUTBOXES * depth) as u64));
        group.bench_function(BenchmarkId::new("push", depth), |bencher| {
            bencher.iter_batched(|| world.drain(&mut writer), |()| push(), BatchSize::PerIteration);
        });
        world.drain(&mut writer);
        group.bench_function(BenchmarkId::new("drain", depth), |bencher| {
            bencher.iter_batched(push, |()| world.drain(&mut writer), BatchSize::PerIteration);
        });
    }
    group.finish();
}

/// `churn/same_channel`: subscribe and unsubscribe, both replies pushed and drained, while 1, 2 or 4 threads
/// do the same on one channel with 1,000 other subscribers. `churn/own_channels`: each thread on a channel of
/// its own, which is created and dropped every time: only the map is shared. The time is that of one round of
/// one thread. Leaves out the command and its parsing. More threads than cores also count their turns.
fn churn(criterion: &mut Criterion) {
    let world = World::new(1_000);
    let mut group = criterion.benchmark_group("churn");
    for threads in [1, 2, 4] {
        let same = vec![CHANNEL.to_owned(); threads];
        let own = (0..threads).map(|thread| format!("own:{thread}")).collect();
        for (name, channels) in [("same_channel", same), ("own_channels", own)] {
            group.throughput(Throughput::Elements(threads as u64));
            group.bench_function(BenchmarkId::new(name, threads), |bencher| {
                bencher.iter_custom(|rounds| churn_in_threads(&world.hub, &channels, rounds));
            });
        }
    }
    group.finish();
}

/// One thread per channel, each so many rounds, all at once; the longest time of one.
fn churn_in_threads(hub: &Arc<Hub<Bare>>, channels: &[String], rounds: u64) -> Duration {
    let barrier = Barrier::new(channels.len());
    let rounds_on = |channel: &str| {
        let unsubscribed = event::unsubscribed(None, channel);
        let mut subscriptions = Subscriptions::new(Arc::clone(hub), Bare::default());
        let mut writer = Writer::default();
        barrier.wait();
        let started = Instant::now();
        for _ in 0..rounds {
            let mut fanout = Fanout::default();
            subscriptions.subscribe(channel, Some(Wish::default()), &mut fanout);
            subscriptions.unsubscribe(channel, &unsubscribed, &mut fanout);
            drain(fanout, &mut writer);
        }
        started.elapsed()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = channels.iter().map(|channel| scope.spawn(|| rounds_on(channel))).collect();
        let times = threads.into_iter().map(|thread| thread.join().expect("no round panics"));
        times.max().unwrap_or_default()
    })
}

fn drain(fanout: Fanout<Bare>, writer: &mut Writer) {
    fanout.jobs.into_iter().flatten().for_each(|outbox| outbox.drain(writer));
}

criterion_group!(group, fanout, outbox, churn);
criterion_main!(group);
