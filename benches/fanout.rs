//! What the gateway itself does for a publication, without sockets.
//!
//! `fanout`: channel lookup, encoding once, the walk and the pushes into N outboxes that then wait.
//! `drain`: taking what N outboxes hold, as flushers do, into a transport that accepts everything.
//! `churn`: one subscribe and unsubscribe while a second thread does the same on the same channel.
//! Left out everywhere: system calls, task switches and everything behind `send`.

use std::hint::black_box;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hubcast::channel::{Fanout, Subscriber};
use hubcast::event;
use hubcast::frame::Frame;
use hubcast::hub::{Hub, Subscriptions};
use hubcast::outbox::{Limits, Outbox, Push};
use hubcast::publication::{Format, Payload, Publication};
use hubcast::rules::ChannelRules;
use hubcast::writer::{Transport, Writer};

const LIMITS: Limits = Limits { messages: 1024, bytes: 1 << 20 };

/// An outbox without a connection around it.
#[derive(Clone, Default)]
struct Bare(Arc<Outbox>);

impl Subscriber for Bare {
    fn format(&self) -> Format {
        Format::Json
    }

    fn push(&self, frame: &Arc<Frame>) -> Push {
        self.0.push(frame, &LIMITS)
    }
}

struct Sink;

impl Transport for Sink {
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(slices.iter().map(|slice| black_box(slice).len()).sum())
    }
}

/// A hub with one channel of `number` subscribers.
fn world(number: usize) -> (Arc<Hub<Bare>>, Vec<Bare>, Vec<Subscriptions<Bare>>) {
    let hub = Hub::local(ChannelRules::default());
    let outboxes: Vec<_> = (0..number).map(|_| Bare::default()).collect();
    let subscriptions = outboxes.iter().map(|outbox| {
        let mut subscriptions = Subscriptions::new(Arc::clone(&hub), outbox.clone());
        subscriptions.subscribe("c", None, &mut Fanout::default());
        subscriptions
    });
    let subscriptions = subscriptions.collect();
    (hub, outboxes, subscriptions)
}

fn drain(fanout: Fanout<Bare>, writer: &mut Writer) {
    for outbox in fanout.jobs.into_iter().flatten() {
        let _ = outbox.0.flush(&Sink, writer, &LIMITS, 1);
    }
}

fn benches(criterion: &mut Criterion) {
    let data = format!(r#"{{"payload":"{}"}}"#, "x".repeat(114));
    let mut writer = Writer::default();
    let mut group = criterion.benchmark_group("fanout");
    for number in [10, 1_000, 10_000, 100_000] {
        let (hub, _outboxes, _subscriptions) = world(number);
        let publish = |fanout: &mut Fanout<Bare>| hub.publish(&Publication::new("c", Payload::Json(&data)), fanout);
        group.throughput(Throughput::Elements(number as u64));
        group.bench_function(BenchmarkId::new("push", number), |bencher| {
            bencher.iter_batched(
                Fanout::default,
                |mut fanout| {
                    publish(&mut fanout);
                    fanout
                },
                BatchSize::PerIteration,
            );
            // Leaves the outboxes idle for the next benchmark.
            let mut rest = Fanout::default();
            publish(&mut rest);
        });
        for outbox in &_outboxes {
            let _ = outbox.0.flush(&Sink, &mut writer, &LIMITS, 1);
        }
        group.bench_function(BenchmarkId::new("push_and_drain", number), |bencher| {
            bencher.iter(|| {
                let mut fanout = Fanout::default();
                publish(&mut fanout);
                drain(fanout, &mut writer);
            });
        });
    }
    group.finish();
    churn(criterion);
}

fn churn(criterion: &mut Criterion) {
    let (hub, _outboxes, _subscriptions) = world(1_000);
    let reply = event::subscribed(None, "c");
    let round = |subscriptions: &mut Subscriptions<Bare>, outbox: &Bare, writer: &mut Writer| {
        let mut fanout = Fanout::default();
        subscriptions.subscribe("c", Some(&reply), &mut fanout);
        subscriptions.unsubscribe("c", &reply, &mut fanout);
        drain(fanout, writer);
        black_box(outbox);
    };
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let outbox = Bare::default();
            let mut subscriptions = Subscriptions::new(Arc::clone(&hub), outbox.clone());
            while !is_over.load(Ordering::Relaxed) {
                round(&mut subscriptions, &outbox, &mut Writer::default());
            }
        });
        let outbox = Bare::default();
        let mut subscriptions = Subscriptions::new(Arc::clone(&hub), outbox.clone());
        let mut writer = Writer::default();
        criterion.bench_function("churn/contended", |bencher| {
            bencher.iter(|| round(&mut subscriptions, &outbox, &mut writer));
        });
        is_over.store(true, Ordering::Relaxed);
    });
}

criterion_group!(group, benches);
criterion_main!(group);
