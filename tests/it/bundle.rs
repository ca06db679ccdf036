//! Publications of one channel that wait at the same time are pushed together; nobody but the processor notices.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hubcast::close::CloseReason;
use hubcast::fanout::{Fanout, Subscriber};
use hubcast::frame::Frame;
use hubcast::hub::{Hub, Subscriptions};
use hubcast::outbox::{Flushed, Limits, Outbox, Phase, Push};
use hubcast::publication::{Format, Payload, Publication};
use hubcast::rules::ChannelRules;
use hubcast::writer::{Transport, Writer};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{Client, await_metric, gateway, metric};
use crate::slow::Scripted;

fn publish(channel: &str, data: &Value, id: Option<i32>) -> String {
    let mut command = json!({"type": "publish", "channel": channel, "data": data});
    if let Some(id) = id {
        command["id"] = id.into();
    }
    command.to_string()
}

fn event(channel: &str, data: &Value) -> Value {
    json!({"type": "event", "channel": channel, "data": data})
}

/// Everything leaves the publisher in one segment: runs of every length, two channels, large and small payloads.
#[tokio::test(flavor = "multi_thread")]
async fn publications_in_a_row_arrive_one_by_one_in_order_and_are_answered() {
    let gateway = gateway(&[]);
    let mut on_c = Client::subscribed(&gateway, "c").await;
    let mut raw = Client::open(&gateway, "/ws?channel=c", Some("hubcast.raw.v1")).await;
    let mut on_d = Client::subscribed(&gateway, "d").await;
    let mut publisher = Client::subscribed(&gateway, "c").await;
    let long = "x".repeat(5_000);
    let mut expected = (Vec::new(), Vec::new());
    for n in 0..300_i32 {
        let data = if n % 50 == 7 { json!([n, long]) } else { json!([n]) };
        let (channel, list) = if n % 90 < 75 { ("c", &mut expected.0) } else { ("d", &mut expected.1) };
        publisher.feed_text(&publish(channel, &data, (n % 3 == 0).then_some(n))).await;
        list.push(data);
    }
    publisher.send(&json!({"type": "ping"})).await;
    for data in &expected.0 {
        on_c.expect(&event("c", data)).await;
        assert_eq!(raw.message().await, Message::text(data.to_string()));
    }
    for data in &expected.1 {
        on_d.expect(&event("d", data)).await;
    }
    // The publisher has its own events in order, each that it asked for before the answer.
    let (mut events, mut answers, mut pongs) = (expected.0.iter(), (0..300_i32).step_by(3), 0);
    let mut last = json!([-1]);
    while events.len() + answers.len() > 0 || pongs == 0 {
        let frame = publisher.json().await;
        match frame["type"].as_str() {
            Some("event") => {
                last = events.next().unwrap().clone();
                assert_eq!(frame["data"], last);
            }
            Some("published") => {
                let n = answers.next().unwrap();
                assert_eq!(frame["id"], n);
                assert!(
                    n % 90 >= 75 || last[0].as_i64().unwrap() >= i64::from(n),
                    "{n} was answered before it arrived"
                );
            }
            Some("pong") => pongs += 1,
            _ => panic!("{frame}"),
        }
    }
    assert_eq!(metric(&gateway, r#"hubcast_publications_total{source="socket"}"#).await, 300.0);
    let deliveries = (expected.0.len() * 3 + expected.1.len()) as f64;
    assert_eq!(metric(&gateway, "hubcast_deliveries_total").await, deliveries);
    // 3 welcomes, 3 times `subscribed`, 100 answers, a pong.
    await_metric(&gateway, "hubcast_frames_sent_total", deliveries + 107.0).await;
}

/// What follows a publish to the same channel finds it done.
#[tokio::test(flavor = "multi_thread")]
async fn other_commands_come_after_the_publishes_before_them() {
    let gateway = gateway(&[]);
    let mut client = Client::connect(&gateway).await;
    client.feed_text(&publish("c", &json!("early"), None)).await;
    client.feed_text(&json!({"type": "subscribe", "channel": "c"}).to_string()).await;
    client.feed_text(&publish("c", &json!("heard"), None)).await;
    client.feed_text(&json!({"type": "unsubscribe", "channel": "c"}).to_string()).await;
    client.feed_text(&publish("c", &json!("late"), Some(1))).await;
    client.send(&json!({"type": "ping"})).await;
    client.expect(&json!({"type": "subscribed", "channel": "c"})).await;
    client.expect(&event("c", &json!("heard"))).await;
    client.expect(&json!({"type": "unsubscribed", "channel": "c"})).await;
    client.expect(&json!({"type": "published", "id": 1})).await;
    client.expect(&json!({"type": "pong"})).await;
}

/// Closes its outbox, without the queue, when the script refuses.
struct ClosesMeanwhile<'a>(&'a Outbox, &'a Scripted);

impl Transport for ClosesMeanwhile<'_> {
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let result = self.1.try_write(slices);
        if result.is_err() {
            assert_eq!(self.0.close(Frame::close(&CloseReason::SlowConsumer), false), 0, "nothing is in the queue");
        }
        result
    }
}

fn bundle_of_three() -> Arc<Frame> {
    let bundle = Publication::new("c", &["one", "two", "three"].map(|data| Payload::Json(data).into()))
        .frame(Format::Raw)
        .clone();
    assert_eq!((bundle.messages(), bundle.len()), (3, 5 + 5 + 7));
    bundle
}

const LIMITS: Limits = Limits { messages: 100, bytes: 10_000 };

/// A socket refuses in the middle of a bundle, and the connection is closed without its queue, afterwards or at
/// that moment: the message that was begun is completed, the rest of the bundle is dropped and counted.
#[test]
fn a_close_cuts_a_bundle_after_the_message_that_was_begun() {
    // What the socket takes of it, what arrives, and how many messages are dropped.
    let cases: [(usize, &[&str], usize); 5] =
        [(0, &[], 3), (1, &["one"], 2), (5, &["one"], 2), (6, &["one", "two"], 1), (16, &["one", "two", "three"], 0)];
    for ((taken, arrives, dropped), is_meanwhile) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let outbox: Outbox = Outbox::default();
        let bundle = bundle_of_three();
        let script: &[usize] = if taken == 0 { &[0] } else { &[taken, 0] };
        let socket = Scripted::new(script);
        let mut writer = Writer::default();
        assert_eq!(outbox.push(&bundle, &LIMITS), Push::Schedule);
        if is_meanwhile {
            let socket = ClosesMeanwhile(&outbox, &socket);
            assert_eq!(outbox.flush(&socket, &mut writer, &LIMITS, 1), Flushed::Blocked);
        } else {
            assert_eq!(outbox.flush(&socket, &mut writer, &LIMITS, 1), Flushed::Blocked);
            assert_eq!(outbox.depth(), (3, bundle.len() - taken));
            writer.frames_dropped += outbox.close(Frame::close(&CloseReason::SlowConsumer), false) as u64;
        }
        assert_eq!(outbox.flush(&socket, &mut writer, &LIMITS, 2), Flushed::Finished);
        let mut expected: Vec<_> = arrives.iter().map(|text| (0x81, text.as_bytes().to_vec())).collect();
        expected.push((0x88, [&4101_u16.to_be_bytes(), b"slow consumer".as_slice()].concat()));
        assert_eq!(socket.frames(), expected, "{taken} bytes taken");
        let counts = (writer.frames_sent as usize, writer.frames_dropped as usize);
        assert_eq!(counts, (arrives.len() + 1, dropped), "{taken} bytes taken");
    }
}

/// The same when the socket fails: what was not sent completely is dropped and counted.
#[test]
fn a_bundle_that_cannot_be_sent_is_counted_by_message() {
    for (taken, sent, dropped) in [(1, 0, 3), (5, 1, 2), (6, 1, 2), (16, 2, 1)] {
        let outbox: Outbox = Outbox::default();
        let socket = Scripted::new(&[taken, 0]);
        let mut writer = Writer::default();
        assert_eq!(outbox.push(&bundle_of_three(), &LIMITS), Push::Schedule);
        assert_eq!(outbox.flush(&socket, &mut writer, &LIMITS, 1), Flushed::Blocked);
        assert_eq!((writer.frames_sent, outbox.fail()), (sent, dropped), "{taken} bytes taken");
        assert_eq!((outbox.phase(), outbox.depth()), (Phase::Failed, (0, 0)));
    }
}

/// Its outbox is above its bounds as long as it says so.
#[derive(Clone)]
struct Behind(Arc<AtomicBool>);

impl Subscriber for Behind {
    fn format(&self) -> Format {
        Format::Json
    }

    fn push(&self, _frame: &Arc<Frame>) -> Push {
        if self.has_room() { Push::Queued } else { Push::Late }
    }

    fn replay(&self, _frames: &[Arc<Frame>]) -> Push {
        Push::Queued
    }

    fn has_room(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }

    fn has_all(&self) -> bool {
        self.has_room()
    }
}

/// The publisher is gone when the lane finds out that a subscriber is late: the next one waits for it.
#[test]
fn whoever_publishes_next_waits_for_a_subscriber_that_is_late() {
    let hub = Hub::local(ChannelRules::default(), LIMITS);
    let is_behind = Arc::new(AtomicBool::new(true));
    let mut subscriptions = Subscriptions::new(Arc::clone(&hub), Behind(Arc::clone(&is_behind)));
    subscriptions.subscribe("c", None, &mut Fanout::default());
    let has_to_wait = || {
        let mut fanout = Fanout::default();
        hub.gather("c", Payload::Json("1").into(), &mut fanout);
        fanout.needs_pause()
    };
    assert!(!has_to_wait(), "nobody knows yet");
    hub.channel("c").unwrap().deliver(&mut Fanout::default());
    assert!(has_to_wait());
    assert!(has_to_wait());
    is_behind.store(false, Ordering::Relaxed);
    assert!(!has_to_wait());
}
