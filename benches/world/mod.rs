//! A little world for the benches: outboxes without connections, and a socket that takes everything.

use std::hint::black_box;
use std::io::{self, IoSlice};
use std::sync::Arc;

use hubcast::fanout::{Fanout, Subscriber};
use hubcast::frame::Frame;
use hubcast::hub::{Hub, Subscriptions};
use hubcast::outbox::{Limits, Outbox, Push};
use hubcast::publication::Format;
use hubcast::rules::ChannelRules;
use hubcast::writer::{Transport, Writer};

const LIMITS: Limits = Limits { messages: 1024, bytes: 1 << 20 };

/// The channel that everybody is in.
pub(crate) const CHANNEL: &str = "c";

/// An outbox without a connection around it.
#[derive(Clone, Default)]
pub(crate) struct Bare(Arc<Outbox>);

impl Subscriber for Bare {
    fn format(&self) -> Format {
        Format::Json
    }

    fn push(&self, frame: &Arc<Frame>) -> Push {
        self.0.push(frame, &LIMITS)
    }

    fn replay(&self, frames: &[Arc<Frame>]) -> Push {
        self.0.replay(frames)
    }

    fn has_room(&self) -> bool {
        self.0.has_room(&LIMITS)
    }

    fn has_all(&self) -> bool {
        self.0.has_all()
    }
}

impl Bare {
    /// Empties the outbox as a lane does; it is idle afterwards.
    pub(crate) fn drain(&self, writer: &mut Writer) {
        let _ = self.0.flush(&Sink, writer, &LIMITS, 1);
    }
}

/// A socket that takes everything at once.
struct Sink;

impl Transport for Sink {
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(slices.iter().map(|slice| black_box(slice).len()).sum())
    }
}

/// Delivers what was gathered, as a lane does.
pub(crate) fn deliver(fanout: &mut Fanout<Bare>) {
    for channel in std::mem::take(&mut fanout.gathered) {
        channel.deliver(fanout);
    }
}

/// A hub with one channel and its subscribers.
pub(crate) struct World {
    pub(crate) hub: Arc<Hub<Bare>>,
    pub(crate) outboxes: Vec<Bare>,
    /// Leave the channel when they are dropped.
    _subscriptions: Vec<Subscriptions<Bare>>,
}

impl World {
    pub(crate) fn new(subscribers: usize) -> Self {
        let hub = Hub::local(ChannelRules::default(), LIMITS);
        let outboxes: Vec<_> = (0..subscribers).map(|_| Bare::default()).collect();
        let join = |outbox: &Bare| {
            let mut subscriptions = Subscriptions::new(Arc::clone(&hub), outbox.clone());
            subscriptions.subscribe(CHANNEL, None, &mut Fanout::default());
            subscriptions
        };
        let subscriptions = outboxes.iter().map(join).collect();
        Self { hub, outboxes, _subscriptions: subscriptions }
    }

    /// Empties every outbox.
    pub(crate) fn drain(&self, writer: &mut Writer) {
        self.outboxes.iter().for_each(|outbox| outbox.drain(writer));
    }
}

/// JSON of so many bytes.
pub(crate) fn data(len: usize) -> String {
    let data = format!(r#"{{"payload":"{}"}}"#, "x".repeat(len - 14));
    assert_eq!(data.len(), len);
    data
}
