//! What a publish to a channel with history costs Redis, against the cheapest script that appends and publishes. Not
//! criterion's kind of number: the CPU of a real `redis-server`, as ratios of interleaved rounds. `benches/README.md`.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a report, and a bench may panic")]

use std::time::Duration;

use hubcast::history_redis::Place;
use hubcast::history_store::Retention;
use hubcast::topology::Topology;
use redis::{Connection, Pipeline, Script};
use server::Server;

mod server;

/// No predecessor, no position, no age, no id that never comes again.
const CHEAPEST: &str = r"
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'e', ARGV[3])
redis.call('PUBLISH', ARGV[2], ARGV[3])
return id
";

const SIZE: usize = 100;
const PIPELINE: usize = 100;

/// How much is measured.
struct Extent {
    rounds: usize,
    pipelines: usize,
    payloads: &'static [usize],
    channels: &'static [usize],
}

const FULL: Extent = Extent { rounds: 25, pipelines: 100, payloads: &[128, 1024], channels: &[1, 20, 1000] };
const BRIEF: Extent = Extent { rounds: 3, pipelines: 5, payloads: &[128], channels: &[1] };

fn start() -> (Server, Connection) {
    let server = Server::start();
    let client = server.client();
    for _ in 0..200 {
        match client.get_connection() {
            Ok(connection) => return (server, connection),
            Err(_) => std::thread::park_timeout(Duration::from_millis(50)),
        }
    }
    panic!("redis-server does not answer");
}

/// CPU of Redis so far: that of its main thread, and that of its scripts alone, in us.
fn cpu(connection: &mut Connection) -> [f64; 2] {
    let info: String = redis::cmd("INFO").arg(&["cpu", "commandstats"]).query(connection).unwrap();
    let value = |line: &str| line.split_once([':', '=']).and_then(|(_, rest)| rest.parse::<f64>().ok());
    let thread = info.lines().filter(|line| line.starts_with("used_cpu_") && line.contains("main_thread"));
    let script = info.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:"));
    let script = script.and_then(|stats| stats.split(',').find(|stat| stat.starts_with("usec=")).and_then(value));
    [thread.filter_map(value).sum::<f64>() * 1e6, script.unwrap_or(0.0)]
}

/// The pipelines of one script, over and over: `call` adds the publish of a number to one.
fn pipelines(call: impl Fn(&mut Pipeline, usize), count: usize) -> Vec<Pipeline> {
    let pipeline = |first: usize| {
        let mut pipeline = redis::pipe();
        (first..first + PIPELINE).for_each(|number| call(&mut pipeline, number));
        pipeline
    };
    (0..count).map(|at| pipeline(at * PIPELINE)).collect()
}

fn measure(connection: &mut Connection, payload_bytes: usize, channels: usize, extent: &Extent) {
    let cheapest = Script::new(CHEAPEST);
    let retention = Retention::new(SIZE, Duration::from_secs(600));
    let topology = Topology::servers_of(1, "hub:");
    let payload = format!("\"{}\"", "x".repeat(payload_bytes - 2));
    let ours = |pipeline: &mut Pipeline, number: usize| {
        let place = Place::new("ws:", &format!("news:{}", number % channels), &topology);
        pipeline.invoke_script(&place.publish(payload.as_bytes(), &retention, rand::random(), None));
    };
    let theirs = |pipeline: &mut Pipeline, number: usize| {
        let channel = format!("plain:{}", number % channels);
        let mut call = cheapest.key(format!("ws:history:{channel}"));
        pipeline.invoke_script(call.arg(SIZE).arg(format!("hub:{channel}")).arg(&payload));
    };
    cheapest.load(connection).unwrap();
    redis::cmd("SCRIPT").arg("LOAD").arg(hubcast::history_redis::publish_script()).exec(connection).unwrap();
    let sides = [pipelines(theirs, extent.pipelines), pipelines(ours, extent.pipelines)];
    let mut run = |side: usize| {
        let before = cpu(connection);
        sides[side].iter().for_each(|pipeline| pipeline.exec(connection).unwrap());
        let calls = (extent.pipelines * PIPELINE) as f64;
        let after = cpu(connection);
        [0, 1].map(|kind| (after[kind] - before[kind]) / calls)
    };
    // Streams that are full, so that each publish drops about as much as it adds.
    let warm = (SIZE * channels / (extent.pipelines * PIPELINE) + 1).min(20);
    for side in (0..2 * warm).map(|at| at % 2) {
        run(side);
    }
    let rounds: Vec<_> = (0..extent.rounds)
        .map(|round| {
            // Each goes first in turn.
            let first = run(round % 2);
            let second = run(1 - round % 2);
            if round % 2 == 0 { [first, second] } else { [second, first] }
        })
        .collect();
    println!("{payload_bytes} B, {channels} channels:");
    for (kind, what) in ["main thread", "evalsha"].into_iter().enumerate() {
        let sorted = |number: &dyn Fn(&[[f64; 2]; 2]) -> f64| {
            let mut numbers: Vec<_> = rounds.iter().map(number).collect();
            numbers.sort_by(f64::total_cmp);
            numbers
        };
        let middle = |numbers: &[f64]| numbers[numbers.len() / 2];
        let (theirs, ours) = (sorted(&|round| round[0][kind]), sorted(&|round| round[1][kind]));
        let ratios = sorted(&|round| round[1][kind] / round[0][kind]);
        println!(
            "  {what}: {:.1} us to {:.1} us, ratio {:.2} ({:.2} to {:.2})",
            middle(&ours),
            middle(&theirs),
            middle(&ratios),
            ratios[ratios.len() / 10],
            ratios[ratios.len() - 1 - ratios.len() / 10]
        );
    }
}

fn main() {
    // Under `cargo test` only that it runs counts.
    let extent = if std::env::args().any(|argument| argument == "--bench") { FULL } else { BRIEF };
    let (_redis, mut connection) = start();
    for payload_bytes in extent.payloads {
        for channels in extent.channels {
            measure(&mut connection, *payload_bytes, *channels, &extent);
            redis::cmd("FLUSHALL").exec(&mut connection).unwrap();
        }
    }
}
