//! What a message costs on its way from the Redis link to the outboxes, without Redis and without sockets.
//! `benches/README.md` has the table.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hubcast::fanout::Fanout;
use hubcast::inbox::{Arrival, Inbox};
use hubcast::publication::Payload;
use hubcast::topology::Topology;
use hubcast::writer::Writer;
use redis::{PushInfo, PushKind, Value};
use world::{CHANNEL, World, data, deliver};

mod world;

/// Messages that arrive at once: the driver hands over all that one read brought.
const MESSAGES: usize = 64;

/// `redis/message`: 64 messages, as the redis crate hands them to our push closure, into the inbox; out again;
/// channel prefix off, JSON checked, event encoded, and pushed into 1, 100 or 1,000 outboxes each. Leaves out
/// the redis crate's parser (and its two allocations a message), the multiplexer's select loop, metrics,
/// lanes, and the flush.
fn message(criterion: &mut Criterion) {
    let topology = Topology::servers_of(1, "hub:");
    let redis_channel = format!("hub:{CHANNEL}").into_bytes();
    let payload = data(128).into_bytes();
    let pushed = || PushInfo {
        kind: PushKind::Message,
        data: vec![Value::BulkString(redis_channel.clone()), Value::BulkString(payload.clone())],
    };
    let inbox = Inbox::new(&[]);
    let mut group = criterion.benchmark_group("redis");
    group.throughput(Throughput::Elements(MESSAGES as u64));
    for subscribers in [1, 100, 1_000] {
        let world = World::new(subscribers);
        let mut writer = Writer::default();
        group.bench_function(BenchmarkId::new("message", subscribers), |bencher| {
            let before = || {
                world.drain(&mut writer);
                (0..MESSAGES).map(|_| pushed()).collect::<Vec<_>>()
            };
            let carry = |messages: Vec<PushInfo>| {
                messages.into_iter().for_each(|message| inbox.push(message));
                let mut fanout = Fanout::default();
                while let Some(arrival) = inbox.pop() {
                    let Arrival::Message { channel, payload, .. } = arrival else { continue };
                    let Some(name) = topology.channel_name(&channel) else { continue };
                    world.hub.gather(name, Payload::Unchecked(&payload).into(), &mut fanout);
                }
                deliver(&mut fanout);
                assert_eq!(fanout.delivered, MESSAGES * subscribers);
                fanout
            };
            bencher.iter_batched(before, carry, BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(group, message);
criterion_main!(group);
