//! The commands as a user runs them: against the built-in floor, and against a server that cheats.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests document themselves and may panic")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

#[path = "../src/wire.rs"]
#[allow(dead_code, reason = "the cheating server needs little of it")]
mod wire;

const BINARY: &str = env!("CARGO_BIN_EXE_hubcast-loadtest");

/// A floor on a free port that ends with the test.
struct Floor(Child, String);

impl Floor {
    fn start() -> Self {
        let mut child =
            Command::new(BINARY).args(["floor", "--listen", "127.0.0.1:0"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let addr = line.trim().strip_prefix("floor on ").unwrap().to_owned();
        Self(child, addr)
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn loadtest(arguments: &str, addr: &str) -> Output {
    Command::new(BINARY).args(arguments.split(' ')).args(["--addr", addr, "--quiet", "--json", "-"]).output().unwrap()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("no report: {}", String::from_utf8_lossy(&output.stderr)))
}

fn figure(report: &Value, name: &str) -> f64 {
    let figures = report["figures"].as_array().unwrap();
    figures.iter().find(|figure| figure["name"] == name).unwrap_or_else(|| panic!("no {name}"))["value"]
        .as_f64()
        .unwrap()
}

#[test]
fn each_delivery_is_counted_whatever_the_shape() {
    let floor = Floor::start();
    for (arguments, receivers) in [
        ("fanout --subscribers 20 --rate 200 --seconds 0.5", 20.0),
        ("fanout --subscribers 20 --window 8 --seconds 0.3", 20.0),
        ("fanout --subscribers 20 --channels 4 --subscriptions 2 --rate 400 --seconds 0.5", 10.0),
        ("fanout --subscribers 21 --processes 3 --window 4 --seconds 0.3", 21.0),
        ("fanout --subscribers 10 --publishers 5 --rate 500 --seconds 0.5", 10.0),
        ("fanout --subscribers 10 --sources 127.0.0.2,127.0.0.3 --rate 100 --seconds 0.3", 10.0),
    ] {
        let output = loadtest(arguments, &floor.1);
        let report = report(&output);
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        let (publications, deliveries) = (figure(&report, "publications"), figure(&report, "deliveries"));
        assert!(publications > 0.0, "{arguments}");
        assert_eq!(deliveries, publications * receivers, "{arguments}");
        assert_eq!(report["latency"][0]["count"].as_f64(), Some(deliveries), "{arguments}");
    }
}

#[test]
fn a_storm_brings_everybody_back() {
    let floor = Floor::start();
    for processes in [1, 3] {
        let storm = format!("storm --subscribers 50 --processes {processes} --witnesses 2 --seconds 2");
        let report = report(&loadtest(&storm, &floor.1));
        let seconds = figure(&report, "last re-subscribe after") / 1e3;
        assert!(seconds > 0.0);
        assert_eq!((figure(&report, "re-subscribes") * seconds).round(), 50.0, "{processes} processes");
        assert_eq!(figure(&report, "lost"), 0.0);
    }
}

#[test]
fn capacity_says_when_no_rate_holds() {
    let floor = Floor::start();
    // Nothing is delivered within a microsecond.
    let broken = report(&loadtest("capacity --subscribers 5 --seconds 0.1 --p99 0.001", &floor.1));
    assert!(broken["capacity"].as_array().unwrap().iter().all(|step| step["held"] == false));
    assert_eq!(broken["notes"][0], "No rate held.");
}

/// Request heads that a server has read.
type Heads = Arc<Mutex<Vec<String>>>;

/// Serves the wire, but keeps one publication in ten to itself and sends another one twice.
fn cheat() -> (String, Heads) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let (subscribers, heads) = (Arc::new(Mutex::new(Vec::new())), Heads::default());
    let read = Arc::clone(&heads);
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let (subscribers, heads) = (Arc::clone(&subscribers), Arc::clone(&heads));
            std::thread::spawn(move || serve_cheating(socket.unwrap(), &subscribers, &heads));
        }
    });
    (addr, read)
}

fn serve_cheating(mut socket: TcpStream, subscribers: &Mutex<Vec<TcpStream>>, heads: &Heads) {
    let (mut input, mut buffer, mut is_upgraded, mut published) = (Vec::new(), [0; 4096], false, 0);
    while let Ok(len @ 1..) = socket.read(&mut buffer) {
        input.extend(&buffer[..len]);
        if !is_upgraded && let Some((_, head, rest)) = wire::split_head(&input) {
            let head = String::from_utf8_lossy(head).into_owned();
            let is_subscriber = head.contains("channels=");
            heads.lock().unwrap().push(head);
            let mut answer = b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec();
            answer.extend(wire::frame(br#"{"type":"subscribed"}"#, false));
            socket.write_all(&answer).unwrap();
            if is_subscriber {
                subscribers.lock().unwrap().push(socket.try_clone().unwrap());
            }
            (is_upgraded, input) = (true, rest.to_vec());
        }
        while let Some((_, command, rest)) = wire::split_frame(&input) {
            let event = String::from_utf8_lossy(command).replace(r#""publish""#, r#""event""#);
            let copies = [1, 1, 1, 1, 1, 0, 1, 2, 1, 1][published % 10];
            published += 1;
            let bytes = wire::frame(event.as_bytes(), false).repeat(copies);
            for subscriber in subscribers.lock().unwrap().iter_mut() {
                subscriber.write_all(&bytes).unwrap();
            }
            input = rest.to_vec();
        }
    }
}

#[test]
fn a_server_that_drops_and_repeats_is_found_out() {
    let (addr, heads) = cheat();
    let output = loadtest("fanout --subscribers 3 --rate 200 --seconds 0.5 --token a.b.c", &addr);
    let report = report(&output);
    assert!(!output.status.success());
    let publications = figure(&report, "publications");
    assert_eq!(publications, 100.0);
    assert_eq!(figure(&report, "lost"), 3.0 * publications / 10.0);
    assert_eq!(figure(&report, "repeated or out of order"), 3.0 * publications / 10.0);
    let heads = heads.lock().unwrap();
    assert_eq!(heads.len(), 4);
    assert!(heads.iter().all(|head| head.contains("\r\nAuthorization: Bearer a.b.c\r\n")), "{heads:?}");
}
