//! Requests to other instances: envelopes on Redis control channels, with a deadline.
//!
//! Whoever asks knows from the registry who should answer, so that it can name who did not. An
//! envelope is JSON with a version; what a newer build asks and this one does not know is answered by nothing,
//! which the asker sees at its deadline.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use crate::admin::{self, Ask};
use crate::broker::Broker;

/// How long a question may take in all: Redis, and the others.
const DEADLINE: Duration = Duration::from_secs(2);

/// Version of the envelopes.
const ENVELOPE_VERSION: u32 = 1;

/// Questions of other instances that can wait; the rest is not answered, which the asker sees.
const QUESTIONS_MAX: usize = 256;

#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    v: u32,
    id: u64,
    from: String,
    #[serde(flatten)]
    content: Content,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    Ask(Ask),
    Answer(Value),
}

/// A question of another instance.
#[derive(Debug)]
pub struct Question {
    id: u64,
    from: String,
    ask: Ask,
}

/// This instance's place among the others.
#[derive(Debug)]
pub struct Cluster {
    channel_prefix: Box<str>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, Asked>>,
    /// The questions that arrived last: in a Redis Cluster each comes through every node.
    seen: Mutex<VecDeque<(String, u64)>>,
    questions: mpsc::Sender<Question>,
}

/// A question of this instance: where its answers go, and who has answered. In a Redis Cluster each answer comes
/// through every node.
#[derive(Debug)]
struct Asked {
    answers: mpsc::Sender<(String, Value)>,
    answered: BTreeSet<String>,
}

/// A question that is being answered; whoever asked may be gone before that.
struct Waiting<'a> {
    cluster: &'a Cluster,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.cluster.waiting.lock().remove(&self.id);
    }
}

/// What others answered, and who did not.
#[derive(Debug, Default)]
pub struct Answers {
    /// An answer of each.
    pub answers: Vec<Value>,
    /// Instances that did not answer in time; `redis` if even their names are not known.
    pub unreachable: BTreeSet<String>,
}

impl Cluster {
    /// The place, and the queue that [`run`] serves.
    pub fn new(channel_prefix: &str) -> (Self, mpsc::Receiver<Question>) {
        let (questions, queue) = mpsc::channel(QUESTIONS_MAX);
        let (waiting, seen) = (Mutex::default(), Mutex::default());
        (Self { channel_prefix: channel_prefix.into(), next: AtomicU64::new(0), waiting, seen, questions }, queue)
    }

    /// The control channel of all instances, and that of one.
    pub fn control_channels(channel_prefix: &str, instance_id: &str) -> [String; 2] {
        [format!("{channel_prefix}__control"), format!("{channel_prefix}__control:{instance_id}")]
    }

    /// Asks the other instances, or only one of them, and waits for their answers.
    pub async fn ask(&self, broker: &Broker, ask: Ask, only: Option<&str>) -> Answers {
        let deadline = Instant::now() + DEADLINE;
        let mut result = Answers::default();
        let Some(registry) = &broker.shared.registry else { return result };
        let Ok(Ok(instances)) = timeout_at(deadline, registry.instances()).await else {
            result.unreachable.insert("redis".to_owned());
            return result;
        };
        let is_asked = |id: &String| **id != *broker.shared.instance_id && only.is_none_or(|only| only == id);
        let mut missing: BTreeSet<_> = instances.into_iter().map(|(id, _)| id).filter(is_asked).collect();
        if missing.is_empty() {
            return result;
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, mut answers) = mpsc::channel(missing.len());
        self.waiting.lock().insert(id, Asked { answers: sender, answered: BTreeSet::new() });
        let _waiting = Waiting { cluster: self, id };
        let [all, one] = Self::control_channels(&self.channel_prefix, only.unwrap_or_default());
        let channel = if only.is_some() { one } else { all };
        if let Ok(true) = timeout_at(deadline, self.send(broker, &channel, id, Content::Ask(ask))).await {
            while !missing.is_empty()
                && let Ok(Some((from, answer))) = timeout_at(deadline, answers.recv()).await
            {
                if missing.remove(&from) {
                    result.answers.push(answer);
                }
            }
        }
        result.unreachable = missing;
        result
    }

    /// Takes an envelope from a control channel. Never waits.
    pub fn arrived(&self, payload: &[u8], own_id: &str) {
        let envelope = match serde_json::from_slice::<Envelope>(payload) {
            Ok(envelope) if envelope.v == ENVELOPE_VERSION => envelope,
            Ok(Envelope { v, from, .. }) => return warn!(version = v, from, "an envelope of another version"),
            Err(error) => return warn!(%error, "an envelope that cannot be read"),
        };
        let Envelope { id, from, content, .. } = envelope;
        match content {
            // A question to all comes back to whoever asked.
            Content::Ask(_) if from == own_id => {}
            Content::Ask(_) if self.was_seen(&from, id) => {}
            Content::Ask(ask) => {
                if self.questions.try_send(Question { id, from, ask }).is_err() {
                    warn!("too many questions of other instances, one is not answered");
                }
            }
            Content::Answer(answer) => {
                // Who answers twice, or late, is of no interest.
                if let Some(asked) = self.waiting.lock().get_mut(&id)
                    && asked.answered.insert(from.clone())
                {
                    let _ = asked.answers.try_send((from, answer));
                }
            }
        }
    }

    /// Whether a question arrived before; from now on it has.
    fn was_seen(&self, from: &str, id: u64) -> bool {
        let mut seen = self.seen.lock();
        let was_seen = seen.iter().any(|(other, number)| *number == id && other == from);
        if !was_seen {
            seen.push_back((from.to_owned(), id));
            if seen.len() > QUESTIONS_MAX {
                seen.pop_front();
            }
        }
        was_seen
    }

    async fn send(&self, broker: &Broker, channel: &str, id: u64, content: Content) -> bool {
        let envelope = Envelope { v: ENVELOPE_VERSION, id, from: broker.shared.instance_id.to_string(), content };
        match (&broker.shared.registry, serde_json::to_string(&envelope)) {
            (Some(registry), Ok(text)) => registry.publish(channel, &text).await.is_ok(),
            _ => false,
        }
    }
}

/// Answers the questions of other instances until the runtime ends.
pub async fn run(broker: Arc<Broker>, mut questions: mpsc::Receiver<Question>) {
    while let Some(Question { id, from, ask }) = questions.recv().await {
        let answer = admin::carry_out(&ask, &broker);
        let [_, channel] = Cluster::control_channels(&broker.cluster.channel_prefix, &from);
        broker.cluster.send(&broker, &channel, id, Content::Answer(answer)).await;
    }
}
