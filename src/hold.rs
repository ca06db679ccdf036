//! Messages of a channel that do not fit where it stands, and wait for its stream to be read. Pure.

use crate::history_store::Entry;
use crate::history_view::REPLY_BYTES_MAX;

/// Most messages that wait: what a channel of 100,000 a second has in 10 ms.
const MESSAGES_MAX: usize = 1024;

/// Most payload bytes of them, but for a single one: what a recovery may have, too.
const BYTES_MAX: usize = REPLY_BYTES_MAX;

/// Messages with their numbers, in the order in which they came. What comes when there is no room is dropped: the read
/// after the next one has it.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    messages: Vec<(u64, Entry)>,
    bytes: usize,
}

impl Hold {
    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// One more.
    pub(crate) fn push(&mut self, number: u64, entry: Entry) {
        let has_room = self.messages.len() < MESSAGES_MAX && self.bytes + entry.len() <= BYTES_MAX;
        if has_room || self.messages.is_empty() {
            self.bytes += entry.len();
            self.messages.push((number, entry));
        }
    }

    /// All that wait.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(u64, Entry)> {
        self.messages.iter()
    }

    /// Those for which it says so wait on; in the order of the chain.
    pub(crate) fn retain(&mut self, mut waits: impl FnMut(u64, &Entry) -> bool) {
        self.messages.sort_by_key(|(_, entry)| entry.id);
        self.messages.retain(|(number, entry)| waits(*number, entry));
        self.bytes = self.messages.iter().map(|(_, entry)| entry.len()).sum();
    }
}
