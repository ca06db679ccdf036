//! Presence: who is in a channel whose rule says so. The local side: what is the case on this instance.
//!
//! Level-triggered: whoever enters or leaves a channel notes it here, under the channel's lock and without I/O, and
//! one task (`presence_writer.rs`) writes into the store what is the case when it looks. An entry stays until its leave
//! is settled, so that everything can be written again after Redis was away. Nothing on the message path waits for it.
//!
//! What is kept, and what joining and leaving mean, is in `presence_store.rs`; questions are answered by
//! `presence_reader.rs`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tracing::warn;

use crate::commands::Commands;
use crate::presence_reader::{Question, Questions};
use crate::presence_redis::RedisStore;
use crate::presence_store::{Change, Member, Memory};

/// Notes that can wait; beyond it only their channels are kept, and written whole.
const NOTES_MAX: usize = 1 << 16;

/// Entries that are written in one turn: the lock is held, and Redis kept busy, for a few milliseconds.
const TURN_ENTRIES: usize = 2000;

/// Channels are renewed in so many parts, one each time.
pub const RENEW_PARTS: u32 = 45;

/// What presence needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Who comes back within this time was never away.
    pub debounce: Duration,
    /// Everything is written again within one and a half of these.
    pub lease: Duration,
}

/// Where presence is kept.
#[derive(Debug)]
pub enum Store {
    /// Here: the instance is alone.
    Memory(Memory),
    /// At Redis, shared by all instances.
    Redis(RedisStore),
}

/// The presence of this instance's connections.
#[derive(Debug)]
pub struct Presence {
    /// What holds for all channels.
    pub settings: Settings,
    /// Where it is kept.
    pub store: Store,
    here: Mutex<Here>,
    has_changed: Notify,
    must_rewrite: AtomicBool,
    has_written: Notify,
    questions: mpsc::Sender<Question>,
}

#[derive(Debug, Default)]
struct Here {
    channels: HashMap<Arc<str>, Local>,
    /// Entries to be written.
    notes: Vec<(Arc<str>, Member)>,
    /// Channels of which every entry is to be written.
    whole: BTreeSet<Arc<str>>,
    /// The next channel is of this part.
    next_part: u32,
    /// Entries were taken, and are not written yet.
    is_in_hand: bool,
}

/// A channel's entries.
#[derive(Debug)]
struct Local {
    part: u32,
    entries: HashMap<Member, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    is_here: bool,
    /// The store may know it.
    is_tried: bool,
    /// The store does, and so do the others in the channel.
    is_announced: bool,
    /// It has left the store, and waits for its leave to be settled.
    is_settling: bool,
}

/// What is to be written of one channel.
#[derive(Debug, Default)]
pub struct Work {
    /// Connections that are here.
    pub here: Vec<Change>,
    /// Connections that are gone.
    pub gone: Vec<Change>,
}

impl Presence {
    /// Nobody is here yet. The questions are for [`crate::presence_reader::run`].
    pub fn new(settings: Settings, store: Store) -> (Self, Questions) {
        let (questions, queue) = Question::queue();
        let presence = Self {
            settings,
            store,
            here: Mutex::default(),
            has_changed: Notify::new(),
            must_rewrite: AtomicBool::new(false),
            has_written: Notify::new(),
            questions,
        };
        (presence, queue)
    }

    /// Notes that a connection is in a channel.
    pub fn enter(&self, channel: &Arc<str>, member: Member) {
        let mut here = self.here.lock();
        let part = here.next_part;
        let local = here.channels.entry(Arc::clone(channel)).or_insert_with(|| Local::new(part));
        let entry = local.entries.entry(member.clone()).or_default();
        // If it left, that may be announced already: the store knows whether it has to be told again.
        *entry = Entry { is_here: true, is_tried: entry.is_tried, ..Entry::default() };
        here.next_part = (part + 1) % RENEW_PARTS;
        here.note(channel, member);
        drop(here);
        self.has_changed.notify_one();
    }

    /// Notes that it is not any more.
    pub fn leave(&self, channel: &Arc<str>, member: Member) {
        let mut here = self.here.lock();
        let Some(entry) = here.entry(channel, &member) else { return };
        entry.is_here = false;
        if entry.is_tried {
            here.note(channel, member);
            drop(here);
            self.has_changed.notify_one();
        } else {
            // Nobody else knows of it. While Redis is away, many may come and go.
            here.remove(channel, &member);
        }
    }

    /// Asks who is in a channel; the question comes back if too many wait.
    ///
    /// # Errors
    /// The question.
    pub fn ask(&self, question: Question) -> Result<(), Question> {
        self.questions.try_send(question).map_err(mpsc::error::TrySendError::into_inner)
    }

    /// Has everything written anew: Redis may not know it any more.
    pub fn rewrite(&self) {
        self.must_rewrite.store(true, Ordering::Release);
        self.has_changed.notify_one();
    }

    /// Waits until everything that is noted now is written.
    pub async fn written(&self) {
        loop {
            let written = self.has_written.notified();
            if self.here.lock().is_written() {
                return;
            }
            written.await;
        }
    }
}

/// For the registry.
impl Presence {
    /// Takes the connections of a dead instance out of the lists. False: something has to stay for the next sweep.
    pub(crate) async fn sweep_up(&self, link: &mut Commands, id: &str, instance_key: &str) -> bool {
        let Store::Redis(store) = &self.store else { return true };
        store.sweep_up(link, id, instance_key).await.unwrap_or_else(|error| {
            warn!(%error, instance = id, "its presence is still to be removed");
            false
        })
    }
}

/// For the task that writes.
impl Presence {
    /// Waits until something is noted.
    pub(crate) async fn changed(&self) {
        self.has_changed.notified().await;
    }

    pub(crate) fn take_rewrite(&self) -> bool {
        self.must_rewrite.swap(false, Ordering::AcqRel)
    }

    /// Notes every entry. If they were taken out of the store by others, they were announced as left.
    pub(crate) fn note_all(&self, was_swept: bool) {
        let mut here = self.here.lock();
        let here = &mut *here;
        here.whole.extend(here.channels.keys().cloned());
        for entry in here.channels.values_mut().flat_map(|local| local.entries.values_mut()) {
            entry.is_announced &= !was_swept;
            entry.is_settling = false;
        }
        self.has_changed.notify_one();
    }

    /// Notes the channels of a part.
    pub(crate) fn note_part(&self, part: u32) {
        let mut here = self.here.lock();
        let here = &mut *here;
        let channels = here.channels.iter().filter(|(_, local)| local.part == part);
        here.whole.extend(channels.map(|(channel, _)| Arc::clone(channel)));
        if !here.whole.is_empty() {
            self.has_changed.notify_one();
        }
    }

    /// Notes entries again that could not be written, or that the store should not have.
    pub(crate) fn note_again(&self, channel: &Arc<str>, members: impl IntoIterator<Item = Member>) {
        let mut here = self.here.lock();
        for member in members {
            let part = here.next_part;
            let local = here.channels.entry(Arc::clone(channel)).or_insert_with(|| Local::new(part));
            local.entries.entry(member.clone()).or_default().is_tried = true;
            here.note(channel, member);
        }
        self.has_changed.notify_one();
    }

    /// Takes what is noted, or a part of it, with what is the case now. What is on a server that `is_away` is left
    /// out: when that is back, everything is written again.
    pub(crate) fn take(&self, is_away: impl Fn(&str) -> bool) -> BTreeMap<Arc<str>, Work> {
        let mut here = self.here.lock();
        let here = &mut *here;
        let mut noted = here.notes.split_off(here.notes.len().saturating_sub(TURN_ENTRIES));
        while noted.len() < TURN_ENTRIES
            && let Some(channel) = here.whole.pop_first()
        {
            let entries = here.channels.get(&channel).into_iter().flat_map(|local| &local.entries);
            let to_write = entries.filter(|(_, entry)| !entry.is_settling);
            noted.extend(to_write.map(|(member, _)| (Arc::clone(&channel), member.clone())));
        }
        noted.sort_unstable();
        noted.dedup();
        let mut work = BTreeMap::<_, Work>::new();
        for (channel, member) in noted {
            let Some(entry) = here.entry(&channel, &member) else { continue };
            if !entry.is_here && !entry.is_tried {
                here.remove(&channel, &member);
                continue;
            }
            if is_away(&channel) {
                continue;
            }
            entry.is_tried = true;
            let (is_here, is_announced) = (entry.is_here, entry.is_announced);
            let work = work.entry(channel).or_default();
            if is_here { &mut work.here } else { &mut work.gone }.push(Change { member, is_announced });
        }
        here.is_in_hand = true;
        if !here.notes.is_empty() || !here.whole.is_empty() {
            self.has_changed.notify_one();
        }
        work
    }

    /// What was taken is written, or noted again.
    pub(crate) fn end_turn(&self) {
        self.here.lock().is_in_hand = false;
        self.has_written.notify_waiters();
    }

    /// Whether channels are still to be written whole.
    pub(crate) fn is_rewriting(&self) -> bool {
        !self.here.lock().whole.is_empty()
    }

    /// Joins are in the store.
    pub(crate) fn announced(&self, channel: &str, changes: &[Change]) {
        let mut here = self.here.lock();
        for Change { member, .. } in changes {
            if let Some(entry) = here.entry(channel, member) {
                entry.is_announced = true;
            }
        }
    }

    /// A leave is in the store, and has to be settled.
    pub(crate) fn settling(&self, channel: &str, member: &Member) {
        if let Some(entry) = self.here.lock().entry(channel, member) {
            entry.is_settling = !entry.is_here;
        }
    }

    /// Whether a connection has come back.
    pub(crate) fn is_here(&self, channel: &str, member: &Member) -> bool {
        self.here.lock().entry(channel, member).is_some_and(|entry| entry.is_here)
    }

    /// Whether there is an entry.
    pub(crate) fn knows(&self, channel: &str, member: &Member) -> bool {
        self.here.lock().entry(channel, member).is_some()
    }

    /// Nothing of an entry is in the store any more, unless it came back.
    pub(crate) fn forget(&self, channel: &str, member: &Member) {
        let mut here = self.here.lock();
        if here.entry(channel, member).is_some_and(|entry| !entry.is_here) {
            here.remove(channel, member);
        }
    }
}

impl Here {
    fn is_written(&self) -> bool {
        self.notes.is_empty() && self.whole.is_empty() && !self.is_in_hand
    }

    fn entry(&mut self, channel: &str, member: &Member) -> Option<&mut Entry> {
        self.channels.get_mut(channel)?.entries.get_mut(member)
    }

    fn note(&mut self, channel: &Arc<str>, member: Member) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push((Arc::clone(channel), member));
        } else {
            self.whole.insert(Arc::clone(channel));
        }
    }

    fn remove(&mut self, channel: &str, member: &Member) {
        let Some(local) = self.channels.get_mut(channel) else { return };
        local.entries.remove(member);
        if local.entries.is_empty() {
            self.channels.remove(channel);
        }
    }
}

impl Local {
    fn new(part: u32) -> Self {
        Self { part, entries: HashMap::new() }
    }
}
