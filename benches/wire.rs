//! What a byte costs on its way in and out, without sockets: frames parsed and unmasked, commands
//! parsed, events encoded. `event/*` includes the allocation of the shared frame; `event/redis` also
//! the check whether the payload is JSON.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hubcast::protocol;
use hubcast::publication::{Format, Payload, Publication};
use hubcast::websocket::Parser;

const MASK: [u8; 4] = [0x12, 0x34, 0x56, 0x78];

fn masked(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x81, 0x80 | 127];
    match payload.len() {
        len @ 0..=125 => frame[1] = 0x80 | len as u8,
        len @ 126..=0xFFFF => {
            frame[1] = 0x80 | 126;
            frame.extend((len as u16).to_be_bytes());
        }
        len => frame.extend((len as u64).to_be_bytes()),
    }
    frame.extend(MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

fn benches(criterion: &mut Criterion) {
    let sizes = [128, 1 << 10, 16 << 10];
    let mut group = criterion.benchmark_group("parse");
    for size in sizes {
        let frame = masked("x".repeat(size).as_bytes());
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("frame", size), |bencher| {
            let mut parser = Parser::new(1 << 20);
            let one = |mut frame: Vec<u8>| {
                let mut input = frame.as_mut_slice();
                black_box(parser.next(&mut input, 1)).is_ok()
            };
            bencher.iter_batched(|| frame.clone(), one, BatchSize::SmallInput);
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("command");
    for (name, command) in [
        ("ping", r#"{"type":"ping"}"#.to_owned()),
        ("subscribe", r#"{"type":"subscribe","id":7,"channel":"news:sport"}"#.to_owned()),
        ("publish", format!(r#"{{"type":"publish","channel":"c","data":{{"payload":"{}"}}}}"#, "x".repeat(114))),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| protocol::parse(black_box(&command), |request| drop(black_box(request))));
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("event");
    for size in sizes {
        let data = format!(r#"{{"payload":"{}"}}"#, "x".repeat(size - 14));
        group.throughput(Throughput::Bytes(size as u64));
        for (name, payload) in [("socket", Payload::Json(&data)), ("redis", Payload::Unchecked(data.as_bytes()))] {
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter(|| Publication::new("c", black_box(payload)).frame(Format::Json).len());
            });
        }
    }
    group.finish();
}

criterion_group!(group, benches);
criterion_main!(group);
