//! What was published to a channel: questions of sockets and the API, answered by one task.
//!
//! As with presence: it takes all questions that wait, reads once for all that ask the same, and reads side by side: the
//! link carries them as one. What is read is the page, not the history that it is of.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::warn;

use crate::asker::{self, Answer, Asker};
use crate::broker::Broker;
use crate::event;
use crate::history_redis::Place;
use crate::history_store::{Moment, Window};
use crate::history_view::{REPLY_BYTES_MAX, Range, Told};
use crate::hub::Histories;
use crate::protocol::{ErrorCode, Refusal};
use crate::publication::{self, Message, Payload};

/// Questions that can wait; whoever asks beyond it is told to come again.
const QUESTIONS_MAX: usize = 1024;

/// Questions that are taken at once.
const BATCH_QUESTIONS: usize = 64;

/// The receiving side, to be run by [`run`].
pub type Questions = mpsc::Receiver<Question>;

/// A question, and who asks.
#[derive(Debug)]
pub struct Question {
    /// The channel's name.
    pub channel: Box<str>,
    /// Which part of its history.
    pub range: Range,
    /// Most events of the answer.
    pub limit: usize,
    /// Who asks.
    pub asker: Asker,
}

impl Question {
    /// The queue of questions.
    pub(crate) fn queue() -> (mpsc::Sender<Self>, Questions) {
        mpsc::channel(QUESTIONS_MAX)
    }
}

/// History cannot be read now.
pub fn unavailable() -> Refusal {
    let message = "history cannot be read now";
    Refusal { retry_after_ms: Some(1000), ..Refusal::new(ErrorCode::Unavailable, message) }
}

/// Answers questions until the runtime ends. `key_prefix` is `HUBCAST_REDIS_KEY_PREFIX`.
pub async fn run(broker: Arc<Broker>, key_prefix: Box<str>, mut questions: Questions) {
    let key_prefix: Arc<str> = key_prefix.into();
    let mut batch = Vec::new();
    while questions.recv_many(&mut batch, BATCH_QUESTIONS).await > 0 {
        let mut pages = HashMap::<_, Vec<_>>::new();
        for Question { channel, range, limit, asker } in batch.drain(..) {
            pages.entry((channel, range, limit)).or_default().push(asker);
        }
        let mut reads = JoinSet::new();
        for ((channel, range, limit), askers) in pages {
            let (broker, key_prefix) = (Arc::clone(&broker), Arc::clone(&key_prefix));
            reads.spawn(async move {
                let window = read(&broker, &key_prefix, &channel, (range, limit)).await;
                (askers, window.map(|window| page(&channel, &window, range, limit).into()))
            });
        }
        while let Some(read) = reads.join_next().await {
            let Ok((askers, page)) = read else { continue };
            answer(&broker, &page, askers);
        }
    }
}

async fn read(
    broker: &Broker,
    key_prefix: &str,
    channel: &str,
    (range, limit): (Range, usize),
) -> Result<Window, Refusal> {
    let retention = broker.hub.rules().history(channel).ok_or_else(no_history)?;
    let at = Moment::now();
    match (broker.hub.histories(), &broker.servers) {
        (Histories::Memory(memory), _) => Ok(memory.read_page(channel, range, limit, &retention, at)),
        (Histories::Redis(_), None) => Err(unavailable()),
        (Histories::Redis(_), Some(servers)) => {
            let mut link = servers.commands(channel).ok_or_else(unavailable)?;
            let place = Place::new(key_prefix, channel, &servers.topology);
            place.read_page(&mut link, (range, limit), &retention, at.random).await.map_err(|error| {
                warn!(%error, channel, "history cannot be read");
                unavailable()
            })
        }
    }
}

/// The rule of the channel has no history.
pub fn no_history() -> Refusal {
    Refusal::new(ErrorCode::Forbidden, "the rule of this channel has no history")
}

fn answer(broker: &Broker, page: &Answer, askers: Vec<Asker>) {
    let has_unread = |asker: &Asker| match asker {
        Asker::Socket(connection, _) => connection.replay_bytes() > REPLY_BYTES_MAX,
        Asker::Http(_) => false,
    };
    for asker in askers {
        let answer = match page {
            Ok(_) if has_unread(&asker) => {
                Err(Refusal::new(ErrorCode::LimitExceeded, "read what you asked for before you ask for more"))
            }
            page => page.clone(),
        };
        asker::reply(broker, vec![asker], &answer, event::history);
    }
}

/// `"channel":…,"events":[…],"has_more":…,"cursor":…`
fn page(channel: &str, window: &Window, range: Range, limit: usize) -> String {
    let page = window.page(range, limit);
    let told = page.told.iter().map(|told| match told {
        Told::Gap(gap) => event::gap_json(channel, gap),
        Told::Event { cursor, payload } => {
            let message = Message { payload: Payload::Unchecked(payload), cursor: Some(*cursor) };
            publication::event_json(channel, &message)
        }
    });
    let events = told.collect::<Vec<_>>().join(",");
    let (more, top) = (page.has_more, window.top);
    format!(r#""channel":"{channel}","events":[{events}],"has_more":{more},"cursor":"{top}""#)
}
