//! What a byte costs on its way in and out, without sockets: frames parsed and unmasked, commands
//! parsed, events encoded. `benches/README.md` has the table.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hubcast::protocol;
use hubcast::publication::{Format, Payload, Publication};
use hubcast::websocket::Parser;

const SIZES: [usize; 3] = [128, 1 << 10, 16 << 10];

const MASK: [u8; 4] = [0x12, 0x34, 0x56, 0x78];

/// JSON of so many bytes.
fn data(len: usize) -> String {
    format!(r#"{{"payload":"{}"}}"#, "x".repeat(len - 14))
}

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

/// `parse/frame`: one masked text frame that lies whole in the buffer it was read into: its header checked,
/// unmasked in place, its UTF-8 checked. Leaves out the read and the copy of frames that come in pieces.
fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse");
    for size in SIZES {
        let frame = masked("x".repeat(size).as_bytes());
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("frame", size), |bencher| {
            let mut parser = Parser::new(1 << 20);
            let one = |frame: &mut Vec<u8>| {
                let mut input = frame.as_mut_slice();
                assert!(matches!(black_box(parser.next(&mut input, 1)), Ok(Some(_))));
            };
            bencher.iter_batched_ref(|| frame.clone(), one, BatchSize::SmallInput);
        });
    }
    group.finish();
}

/// `command/*`: one command from JSON text to its typed form. Leaves out carrying it out.
fn command(criterion: &mut Criterion) {
    let publish = format!(r#"{{"type":"publish","channel":"c","data":{}}}"#, data(128));
    let mut group = criterion.benchmark_group("command");
    for (name, command) in [
        ("ping", r#"{"type":"ping"}"#),
        ("subscribe", r#"{"type":"subscribe","id":7,"channel":"news:sport"}"#),
        ("publish", &publish),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                protocol::parse(black_box(command), |request| assert!(black_box(request).command.is_ok()));
            });
        });
    }
    group.finish();
}

/// `event/socket`: a publication whose JSON a parser has seen already, encoded as a shared frame, its two
/// allocations included. `event/redis`: of bytes that nobody has looked at, so checked to be JSON first.
fn event(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("event");
    for size in SIZES {
        let data = data(size);
        group.throughput(Throughput::Bytes(size as u64));
        for (name, payload) in [("socket", Payload::Json(&data)), ("redis", Payload::Unchecked(data.as_bytes()))] {
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter(|| Publication::new("c", &[black_box(payload).into()]).frame(Format::Json).len());
            });
        }
    }
    group.finish();
}

criterion_group!(group, parse, command, event);
criterion_main!(group);
