//! loom explores every interleaving of the two small state machines: the outbox and the channel's upstream.

use std::io::{self, IoSlice};

use hubcast::close::CloseReason;
use hubcast::frame::Frame;
use hubcast::outbox::{Flushed, Limits, Lock, Outbox, Phase, Push};
use hubcast::outbox_state::State;
use hubcast::upstream::{Step, Upstream};
use hubcast::writer::{Transport, Writer};
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;

struct LoomLock(Mutex<State>);

impl Lock<State> for LoomLock {
    fn with<R>(&self, section: impl FnOnce(&mut State) -> R) -> R {
        section(&mut self.0.lock().unwrap())
    }
}

/// A socket that takes a few bytes, refuses once, and then takes everything.
struct Socket {
    written: Mutex<Vec<u8>>,
    calls: AtomicUsize,
    is_busy: AtomicBool,
}

impl Transport for Socket {
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        assert!(!self.is_busy.swap(true, Ordering::SeqCst), "two writers at once");
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let result = match self.calls.fetch_add(1, Ordering::SeqCst) {
            0 => Ok(all.len().min(3)),
            1 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(all.len()),
        };
        if let Ok(len) = result {
            self.written.lock().unwrap().extend(&all[..len]);
        }
        self.is_busy.store(false, Ordering::SeqCst);
        result
    }
}

struct World {
    outbox: Outbox<LoomLock>,
    socket: Socket,
    /// Wakes the connection's own task.
    wake: Notify,
}

const LIMITS: Limits = Limits { messages: 100, bytes: 10_000 };

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            outbox: Outbox::new(LoomLock(Mutex::new(State::default()))),
            socket: Socket {
                written: Mutex::new(Vec::new()),
                calls: AtomicUsize::new(0),
                is_busy: AtomicBool::new(false),
            },
            wake: Notify::new(),
        })
    }

    /// What a publisher does: push, and flush if that gave it the write right.
    fn publish(&self, text: &str) {
        if self.outbox.push(&Frame::text(text), &LIMITS) == Push::Schedule {
            self.flush();
        }
    }

    fn flush(&self) {
        if self.outbox.flush(&self.socket, &mut Writer::default(), &LIMITS, 1) != Flushed::Idle {
            self.wake.notify();
        }
    }

    /// What the connection's own task does when it is woken, until the close frame is out.
    fn own_task(&self) {
        while self.outbox.phase() != Phase::Finished {
            if self.outbox.phase() == Phase::Blocked {
                self.flush();
            } else {
                self.wake.wait();
            }
        }
    }

    fn close(&self) {
        self.outbox.close(Frame::close(&CloseReason::Drain), true);
        self.wake.notify();
    }

    /// The frames as the peer sees them.
    fn received(&self) -> Vec<String> {
        let bytes = self.socket.written.lock().unwrap();
        let mut rest = bytes.as_slice();
        let mut frames = Vec::new();
        while let [first, len, payload @ ..] = rest {
            let (payload, after) = payload.split_at(usize::from(*len));
            frames.push(if *first == 0x81 {
                String::from_utf8_lossy(payload).into_owned()
            } else {
                format!("{first:x}")
            });
            rest = after;
        }
        frames
    }
}

/// Two publishers, a refusing socket, the connection's task and a close that keeps the queue:
/// one writer at a time, frames whole and in order, nothing stranded, the close frame last.
#[test]
fn no_frame_is_stranded_and_there_is_one_writer() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let world = World::new();
        let publisher = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                world.publish("a1");
                world.publish("a2");
            }
        });
        let own_task = thread::spawn({
            let world = Arc::clone(&world);
            move || world.own_task()
        });
        world.publish("b1");
        publisher.join().unwrap();
        world.close();
        own_task.join().unwrap();
        let received = world.received();
        assert_eq!(received.len(), 4, "{received:?}");
        assert_eq!(received[3], "88", "the close frame is last");
        let a: Vec<_> = received.iter().filter(|frame| frame.starts_with('a')).collect();
        assert_eq!(a, ["a1", "a2"], "in order");
        assert!(received.contains(&"b1".to_owned()));
    });
}

/// A close races a publisher: whatever was taken before it is sent, and the close frame ends it.
#[test]
fn a_close_that_races_a_publish_is_always_sent_last() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let world = World::new();
        let publisher = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                let frame = Frame::text("a1");
                let push = world.outbox.push(&frame, &LIMITS);
                if push == Push::Schedule {
                    world.flush();
                }
                push != Push::Closed
            }
        });
        let own_task = thread::spawn({
            let world = Arc::clone(&world);
            move || world.own_task()
        });
        world.close();
        let was_taken = publisher.join().unwrap();
        own_task.join().unwrap();
        let expected: &[&str] = if was_taken { &["a1", "88"] } else { &["88"] };
        assert_eq!(world.received(), expected);
    });
}

/// A close that drops the queue: the frame that was begun is finished, and the close frame follows in any case.
#[test]
fn a_close_that_discards_still_sends_its_close_frame() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let world = World::new();
        let publisher = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                world.publish("a1");
                world.publish("a2");
            }
        });
        let own_task = thread::spawn({
            let world = Arc::clone(&world);
            move || world.own_task()
        });
        world.outbox.close(Frame::close(&CloseReason::SlowConsumer), false);
        world.wake.notify();
        publisher.join().unwrap();
        own_task.join().unwrap();
        let received = world.received();
        assert_eq!(received.last().map(String::as_str), Some("88"), "{received:?}");
        assert!(
            ["a1", "a2"].starts_with(&received.iter().map(String::as_str).take(received.len() - 1).collect::<Vec<_>>())
        );
    });
}

/// A ping and a frame at once: both are sent, neither inside the other.
#[test]
fn control_frames_are_neither_lost_nor_starved() {
    loom::model(|| {
        let world = World::new();
        let sweep = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                if world.outbox.ping(Frame::new(hubcast::frame::Opcode::Ping, &[])) {
                    world.flush();
                }
            }
        });
        world.publish("a1");
        sweep.join().unwrap();
        while world.outbox.phase() == Phase::Blocked {
            world.flush();
        }
        world.close();
        world.own_task();
        let mut received = world.received();
        assert_eq!(received.pop().as_deref(), Some("88"));
        received.sort();
        assert_eq!(received, ["89", "a1"]);
    });
}

/// One channel: its upstream state, its subscribers, and what Redis really has.
#[derive(Default)]
struct Channel {
    upstream: Option<Upstream>,
    subscribers: usize,
    is_listed: bool,
}

/// The first subscriber leaves while a second one joins and the multiplexer reconciles: whoever is
/// told to be live is, and the one who stays is live in the end.
#[test]
fn a_join_that_races_the_last_leave_ends_live() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let channel = Channel { upstream: Some(Upstream::Live), subscribers: 1, is_listed: false };
        let channel = Arc::new(Mutex::new(channel));
        let at_redis = Arc::new(AtomicBool::new(true));
        let leaving = thread::spawn({
            let channel = Arc::clone(&channel);
            move || {
                let mut channel = channel.lock().unwrap();
                channel.subscribers -= 1;
                channel.is_listed = true;
            }
        });
        let joining = thread::spawn({
            let (channel, at_redis) = (Arc::clone(&channel), Arc::clone(&at_redis));
            move || {
                let mut channel = channel.lock().unwrap();
                channel.subscribers += 1;
                channel.is_listed = true;
                if channel.upstream == Some(Upstream::Live) {
                    assert!(at_redis.load(Ordering::SeqCst), "told to be live, and Redis does not have it");
                }
            }
        });
        let turn = |channel: &Mutex<Channel>| {
            let step = {
                let mut channel = channel.lock().unwrap();
                channel.is_listed = false;
                let idle_since = (channel.subscribers == 0).then_some(0);
                channel.upstream.as_mut().map(|upstream| upstream.reconcile(idle_since, u64::MAX))
            };
            // The command is on its way, and the confirmation comes back: the lock is not held.
            match step {
                Some(Step::Unsubscribe) => {
                    at_redis.store(false, Ordering::SeqCst);
                    let mut channel = channel.lock().unwrap();
                    channel.upstream.as_mut().unwrap().confirm_unsubscribe();
                    channel.is_listed = true;
                }
                Some(Step::Subscribe) => {
                    at_redis.store(true, Ordering::SeqCst);
                    assert!(channel.lock().unwrap().upstream.as_mut().unwrap().confirm_subscribe());
                }
                _ => {}
            }
        };
        turn(&channel);
        turn(&channel);
        leaving.join().unwrap();
        joining.join().unwrap();
        while channel.lock().unwrap().is_listed {
            turn(&channel);
        }
        assert_eq!(channel.lock().unwrap().upstream, Some(Upstream::Live));
        assert!(at_redis.load(Ordering::SeqCst));
    });
}
