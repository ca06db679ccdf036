//! `verify` as a user runs it: against a server that is honest, and against servers that cheat.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests document themselves and may panic")]

use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::HeaderValue;

/// What a server does to every 20th publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cheat {
    Nothing,
    /// Does not deliver it to some.
    Drop,
    /// The same, and tells.
    DropAndTell,
    Repeat,
    /// Delivers it to some after the one that follows.
    Swap,
    /// Says that nothing was sent, and delivers it.
    Refuse,
    /// Says 504, and delivers it or not.
    Doubt,
    Alter,
    /// Delivers some that nobody published.
    Invent,
    /// None, and it has history.
    History,
    /// It leaves one out when it says that it resumes.
    Hole,
}

impl Cheat {
    fn has_history(self) -> bool {
        matches!(self, Self::History | Self::Hole)
    }
}

const EVERY: usize = 20;

/// The number of the publication, which is its cursor; channel and data.
type Publication = (usize, String, String);

#[derive(Deserialize)]
struct Batch<'a> {
    #[serde(borrow)]
    messages: Vec<Sent<'a>>,
}

#[derive(Deserialize)]
struct Sent<'a> {
    channel: String,
    #[serde(borrow)]
    data: &'a RawValue,
}

/// Serves clients and publishers; returns where.
async fn serve(cheat: Cheat) -> (String, String) {
    let (public, internal) =
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let urls = (format!("ws://{}", public.local_addr().unwrap()), format!("http://{}", internal.local_addr().unwrap()));
    let (deliver, _) = broadcast::channel(10_000);
    let past = Arc::new(Mutex::new(Vec::new()));
    let (publish, mut published) = mpsc::channel(100);
    tokio::spawn(accept_publishers(internal, publish));
    let (sender, history) = (deliver.clone(), Arc::clone(&past));
    // One task gives publications their order.
    tokio::spawn(async move {
        let mut count = 0;
        while let Some((channel, data, answer)) = published.recv().await {
            count += 1;
            let is_due = count % EVERY == 0;
            let status = match cheat {
                Cheat::Refuse if is_due => "503 Service Unavailable",
                Cheat::Doubt if is_due => "504 Gateway Timeout",
                _ => "200 OK",
            };
            if !(cheat == Cheat::Doubt && is_due && count % (2 * EVERY) == 0) {
                history.lock().unwrap().push((count, channel.clone(), data.clone()));
                // There may be nobody to hear it.
                let _ = sender.send((count, channel, data));
            }
            let body = match status {
                "200 OK" if cheat.has_history() => json!({ "results": [{ "cursor": count.to_string() }] }),
                "200 OK" => json!({ "results": [{}] }),
                _ => json!({ "error": {} }),
            };
            let _: Result<(), Reply> = answer.send((status, body.to_string()));
        }
    });
    tokio::spawn(async move {
        let mut number = 0;
        while let Ok((socket, _)) = public.accept().await {
            tokio::spawn(client(socket, deliver.subscribe(), Arc::clone(&past), cheat, number % 2 == 0));
            number += 1;
        }
    });
    urls
}

/// Status and body.
type Reply = (&'static str, String);

type Publish = mpsc::Sender<(String, String, oneshot::Sender<Reply>)>;

async fn accept_publishers(listener: TcpListener, publish: Publish) {
    while let Ok((socket, _)) = listener.accept().await {
        tokio::spawn(publisher(socket, publish.clone()));
    }
}

async fn publisher(socket: TcpStream, publish: Publish) {
    let mut socket = BufReader::new(socket);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if socket.read_line(&mut line).await.unwrap_or(0) == 0 {
                return;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        socket.read_exact(&mut body).await.unwrap();
        let (status, body) = match length {
            0 => ("200 OK", "hubcast_connections 0\nhubcast_channels 3\n".to_owned()),
            _ => hand_over(&body, &publish).await,
        };
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        socket.write_all(answer.as_bytes()).await.unwrap();
    }
}

async fn hand_over(body: &[u8], publish: &Publish) -> Reply {
    let batch: Batch<'_> = serde_json::from_slice(body).unwrap();
    let [sent] = &batch.messages[..] else { panic!("one message is published at a time") };
    let (answer, status) = oneshot::channel();
    publish.send((sent.channel.clone(), sent.data.get().to_owned(), answer)).await.unwrap();
    status.await.unwrap()
}

#[expect(clippy::result_large_err, reason = "the library asks for it")]
fn with_protocol(_: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    response.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("hubcast.v1"));
    Ok(response)
}

type Past = Arc<Mutex<Vec<Publication>>>;

async fn client(
    socket: TcpStream,
    mut events: broadcast::Receiver<Publication>,
    past: Past,
    cheat: Cheat,
    is_cheated: bool,
) {
    let mut socket = accept_hdr_async(socket, with_protocol).await.unwrap();
    socket.send(Message::text(r#"{"type":"welcome"}"#)).await.unwrap();
    let mut subscribed: Vec<Value> = Vec::new();
    let (mut held, mut top) = (None, 0);
    loop {
        let frames = tokio::select! {
            publication = events.recv() => {
                let publication = publication.unwrap();
                if publication.0 <= top || !subscribed.contains(&json!(publication.1)) {
                    continue;
                }
                let is_due = is_cheated && publication.0 % EVERY == 0;
                let mut frames = cheated(&publication, if is_due { cheat } else { Cheat::Nothing }, cheat, &mut held);
                frames.extend(held.take_if(|_| !is_due));
                frames
            }
            command = socket.next() => {
                let Some(Ok(command)) = command else { return };
                let Ok(command) = serde_json::from_slice::<Value>(&command.into_data()) else { return };
                let mut frames = Vec::new();
                for asked in command["channels"].as_array().into_iter().flatten() {
                    let past = past.lock().unwrap();
                    top = past.last().map_or(0, |last| last.0);
                    let channel = asked.get("channel").unwrap_or(asked);
                    subscribed.push(channel.clone());
                    let after = asked["after"].as_str().map(|after| after.parse().unwrap());
                    let mut told = json!({ "type": "subscribed", "channel": channel });
                    if cheat.has_history() {
                        told["cursor"] = after.unwrap_or(top).to_string().into();
                        told["recovered"] = after.is_some().into();
                    }
                    frames.push(told.to_string());
                    let missed = past.iter().filter(|publication| after.is_some_and(|after| publication.0 > after));
                    frames.extend(missed.skip(usize::from(cheat == Cheat::Hole)).map(|missed| event(missed, cheat)));
                }
                frames
            }
        };
        for frame in frames {
            if socket.send(Message::text(frame)).await.is_err() {
                return;
            }
        }
    }
}

fn event((number, channel, data): &Publication, cheat: Cheat) -> String {
    let cursor = if cheat.has_history() { format!(r#""cursor":"{number}","#) } else { String::new() };
    format!(r#"{{"type":"event","channel":"{channel}",{cursor}"data":{data}}}"#)
}

/// What is sent for a publication.
fn cheated(publication: &Publication, now: Cheat, cheat: Cheat, held: &mut Option<String>) -> Vec<String> {
    let event = event(publication, cheat);
    match now {
        Cheat::Drop => vec![],
        Cheat::DropAndTell => vec![json!({ "type": "gap", "channel": publication.1, "reason": "slow" }).to_string()],
        Cheat::Repeat => vec![event.clone(), event],
        Cheat::Alter => vec![event.replace("xx", "xy")],
        Cheat::Invent => vec![event.clone(), event.replace(r#""publisher":0"#, r#""publisher":7"#)],
        Cheat::Swap => {
            *held = Some(event);
            vec![]
        }
        _ => vec![event],
    }
}

fn verify((url, api): &(String, String), more: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hubcast-loadtest"));
    let shape = "verify --channels 1 --clients 4 --publishers 1 --rate 200 --settle 1 --quiet --json - --leavers";
    command.args(shape.split(' ')).args(more.split(' ')).args(["--url", url, "--api", api]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no report: {output:?}"))
}

fn figure(report: &Value, name: &str) -> f64 {
    let figures = report["figures"].as_array().unwrap();
    figures.iter().find(|figure| figure["name"] == name).unwrap_or_else(|| panic!("no {name}"))["value"]
        .as_f64()
        .unwrap()
}

/// Runs it for a second; returns what was found, and the kinds of violations.
async fn found(cheat: Cheat, more: &str) -> (Value, Vec<String>) {
    let urls = serve(cheat).await;
    let output = verify(&urls, more).output().await.unwrap();
    let report = report(&output);
    let mut kinds: Vec<_> =
        report["violations"].as_array().unwrap().iter().map(|it| it["kind"].as_str().unwrap()).collect();
    kinds.dedup();
    assert_eq!(output.status.code(), Some(i32::from(!kinds.is_empty())), "{kinds:?}");
    let kinds = kinds.into_iter().map(str::to_owned).collect();
    (report, kinds)
}

#[tokio::test]
async fn an_honest_server_is_proven() {
    let (report, kinds) = found(Cheat::Nothing, "2 --stay 0.3 --seconds 1.5").await;
    assert_eq!(kinds, [""; 0]);
    assert!(figure(&report, "deliveries") > 500.0);
    assert!(figure(&report, "connections left on purpose") > 1.0);
}

#[tokio::test]
async fn what_is_told_is_no_loss_and_what_is_unknown_may_come() {
    let (report, kinds) = found(Cheat::DropAndTell, "0 --seconds 1").await;
    assert_eq!(kinds, [""; 0]);
    assert!(figure(&report, "of these missing, and told so") > 5.0);
    let (report, kinds) = found(Cheat::Doubt, "0 --seconds 1").await;
    assert_eq!(kinds, [""; 0]);
    assert!(figure(&report, "publishes of unknown outcome") > 2.0);
}

#[tokio::test]
async fn every_cheat_is_found() {
    for (cheat, kind) in [
        (Cheat::Drop, "lost"),
        (Cheat::Repeat, "repeated"),
        (Cheat::Refuse, "refused"),
        (Cheat::Alter, "unpublished"),
        (Cheat::Invent, "unpublished"),
    ] {
        let (report, kinds) = found(cheat, "0 --seconds 0.6").await;
        assert!(kinds.contains(&kind.to_owned()), "{cheat:?}: {kinds:?}");
        assert_eq!(report["violations"][0]["channel"], "verify:0", "{cheat:?}");
    }
    let (_, kinds) = found(Cheat::Swap, "0 --seconds 0.6").await;
    assert_eq!(kinds, ["out of order", "no common order"]);
}

#[tokio::test]
async fn whoever_comes_back_resumes_and_a_hole_in_that_is_found() {
    let (report, kinds) = found(Cheat::History, "4 --stay 0.3 --seconds 2").await;
    assert_eq!(kinds, [""; 0]);
    assert!(figure(&report, "channels resumed in full") > 2.0);
    assert_eq!(figure(&report, "of these missing, and told so"), 0.0);
    let (report, kinds) = found(Cheat::Hole, "4 --stay 0.3 --seconds 2").await;
    assert_eq!(kinds, ["lost"]);
    assert!(report["violations"][0]["text"].as_str().unwrap().contains("subscribed recovered:true"), "{report}");
}

#[tokio::test]
async fn a_leftover_is_found() {
    let (report, kinds) = found(Cheat::Nothing, "0 --seconds 0.3 --leftovers 0.1").await;
    assert_eq!(kinds, ["leftover"]);
    assert!(report["violations"][0]["text"].as_str().unwrap().ends_with("still holds hubcast_channels 3"));
}

#[tokio::test]
async fn who_is_told_to_stop_judges_what_there_is() {
    let urls = serve(Cheat::Nothing).await;
    let mut child = verify(&urls, "0 --seconds 600").spawn().unwrap();
    let mut line = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    stderr.read_line(&mut line).await.unwrap();
    assert_eq!(line, "all 4 subscriptions are live\n");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    let report = report(&output);
    assert!(report["notes"][0].as_str().unwrap().contains("told to"), "{report}");
    assert!(figure(&report, "deliveries") > 0.0);
}

#[tokio::test]
async fn where_nothing_can_be_proven_it_says_so() {
    let (url, api) = serve(Cheat::Nothing).await;
    let nobody = "http://127.0.0.1:1".to_owned();
    let output = verify(&(url, nobody), "0 --seconds 0.3").output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no publish was acknowledged"), "{output:?}");
    let output = verify(&("http://127.0.0.1:1".to_owned(), api), "0 --seconds 0.3").output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
}
