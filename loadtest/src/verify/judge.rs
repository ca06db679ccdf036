//! The judge: holds what clients saw against what publishers were answered, channel by channel. Pure.
//!
//! - What was answered 200 came once, or the client was told that something is missing just there: by a `gap`, or by
//!   a `subscribed` that does not continue. Demanded is what was begun to be published after the first `subscribed`. Whoever
//!   resumed after the message was lost, at an instance that never had it, may be told a moment later: once one that had
//!   it has marked the loss.
//! - Nothing comes twice, nothing that was refused, nothing that nobody published, nothing without a subscription.
//! - The messages of one publisher come in its order, and there is one order that all clients saw.
//! - Cursors are the ones that the publisher was answered, and continue where they say.

use std::collections::BTreeMap;

use super::evidence::{Entry, Log, Mark, MessageId, Outcome, Publication, Told, What};
use super::order;
use super::place::{NOWHERE, Places, Witness};
use crate::report::Violation;

/// Violations of one kind that are told in full; all are counted.
const TOLD_MAX: usize = 100;

/// How long after a resume a client may be told of what was lost before it.
const LATE_US: u64 = 5_000_000;

/// What is known of one channel.
pub(crate) struct Channel<'a> {
    pub name: &'a str,
    /// What each publisher published, by sequence number.
    pub publications: Vec<&'a [Publication]>,
    /// The numbers of clients, and what they saw.
    pub logs: Vec<(usize, &'a Log)>,
}

/// What one or more channels add up to.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub acked: u64,
    pub refused: u64,
    pub unknown: u64,
    pub deliveries: u64,
    /// Times that an acknowledged message was demanded of a client.
    pub demanded: u64,
    /// Those that did not come, at places where the client was told that something is missing.
    pub told_missing: u64,
    /// Those of which it was told a moment after it had resumed.
    pub told_late: u64,
    pub gaps: u64,
    pub resumed: u64,
    pub not_resumed: u64,
    /// All violations, by kind.
    pub counts: BTreeMap<&'static str, u64>,
    /// The first of each kind.
    pub violations: Vec<Violation>,
}

impl Verdict {
    /// Adds a violation; its words are made only if they are shown.
    pub(crate) fn violation(&mut self, kind: &'static str, words: impl FnOnce() -> Violation) {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        if *count <= TOLD_MAX as u64 {
            self.violations.push(Violation { kind, ..words() });
        }
    }

    /// How many there are in all.
    pub(crate) fn violation_count(&self) -> u64 {
        self.counts.values().sum()
    }
}

/// A channel under judgement.
struct Case<'a> {
    channel: &'a Channel<'a>,
    /// All publications, those of publisher 0 first.
    publications: Vec<Publication>,
    /// Where those of each publisher begin.
    begins: Vec<usize>,
    /// The cursor with which each message came first.
    cursors: Vec<Mark>,
    witnesses: Vec<Option<Witness>>,
    /// The messages that each client got, without repetitions.
    sequences: Vec<Vec<u32>>,
}

/// One client's log while it is read.
struct Reading {
    log_index: usize,
    is_live: bool,
    /// The last cursor, and the one that a gap has announced.
    cursor: Mark,
    announced: Mark,
    /// The last acknowledged message of each publisher.
    last: Vec<Option<u32>>,
    /// Where each message came first.
    positions: Vec<u32>,
}

/// Judges one channel.
pub(crate) fn judge(channel: &Channel<'_>, verdict: &mut Verdict) {
    let mut case = Case::new(channel);
    for publication in &case.publications {
        *match publication.outcome {
            Outcome::Acked => &mut verdict.acked,
            Outcome::Refused => &mut verdict.refused,
            Outcome::Unknown => &mut verdict.unknown,
        } += 1;
    }
    for log_index in 0..channel.logs.len() {
        case.read(log_index, verdict);
    }
    case.compare_orders(verdict);
    for log_index in 0..channel.logs.len() {
        case.find_losses(log_index, verdict);
    }
}

impl<'a> Case<'a> {
    fn new(channel: &'a Channel<'a>) -> Self {
        let mut begins = Vec::new();
        let mut publications = Vec::new();
        for published in &channel.publications {
            begins.push(publications.len());
            publications.extend_from_slice(published);
        }
        let count = publications.len();
        let (cursors, witnesses) = (vec![Mark::NONE; count], vec![None; count]);
        Self { channel, publications, begins, cursors, witnesses, sequences: Vec::new() }
    }

    fn number(&self, message: MessageId) -> Option<usize> {
        let published = self.channel.publications.get(usize::from(message.publisher))?;
        let begin = self.begins[usize::from(message.publisher)];
        published.get(message.sequence as usize).map(|_| begin + message.sequence as usize)
    }

    fn message(&self, number: usize) -> MessageId {
        let publisher = self.begins.partition_point(|begin| *begin <= number) - 1;
        MessageId { publisher: publisher as u16, sequence: (number - self.begins[publisher]) as u32 }
    }

    fn words(&self, client: usize, message: Option<MessageId>, text: String) -> Violation {
        let message = message.map(|message| message.to_string());
        Violation { kind: "", channel: Some(self.channel.name.to_owned()), client: Some(client), message, text }
    }

    /// Reads a client's log from front to end: all that shows without knowing what is missing.
    fn read(&mut self, log_index: usize, verdict: &mut Verdict) {
        let (client, log) = self.channel.logs[log_index];
        let mut reading = Reading {
            log_index,
            is_live: false,
            cursor: Mark::NONE,
            announced: Mark::NONE,
            last: vec![None; self.begins.len()],
            positions: vec![NOWHERE; self.publications.len()],
        };
        self.sequences.push(Vec::new());
        for (at, entry) in log.entries.iter().enumerate() {
            match entry {
                Entry::Event { message, cursor } => {
                    verdict.deliveries += 1;
                    self.read_event(&mut reading, at, *message, *cursor, verdict);
                }
                Entry::Told(told) => self.read_told(&mut reading, at, &log.told[*told as usize].what, verdict),
            }
        }
        if !reading.is_live {
            let at = log.entries.len();
            verdict.violation("away", || {
                self.words(client, None, format!("not subscribed at the end: {}", log.around(at, at)))
            });
        }
    }

    fn read_event(
        &mut self,
        reading: &mut Reading,
        at: usize,
        message: MessageId,
        cursor: Mark,
        verdict: &mut Verdict,
    ) {
        let (client, log) = self.channel.logs[reading.log_index];
        let around = || log.around(at, at);
        if !reading.is_live {
            verdict.violation("outside", || {
                self.words(client, Some(message), format!("came without a subscription: {}", around()))
            });
        }
        if std::mem::take(&mut reading.announced).differs(cursor) {
            verdict.violation("wrong cursor", || {
                self.words(client, Some(message), format!("not what the gap announced: {}", around()))
            });
        }
        reading.cursor = cursor;
        let Some(number) = self.number(message) else {
            return verdict.violation("unpublished", || {
                self.words(client, Some(message), format!("nobody published it: {}", around()))
            });
        };
        let first = reading.positions[number];
        if first != NOWHERE {
            return verdict.violation("repeated", || {
                let (first, again) = (log.around(first as usize, first as usize), around());
                self.words(client, Some(message), format!("came first in {first} and again in {again}"))
            });
        }
        reading.positions[number] = at as u32;
        let sequence = &mut self.sequences[reading.log_index];
        let witness = Witness { log: reading.log_index as u32, at: sequence.len() as u32 };
        sequence.push(number as u32);
        self.witnesses[number].get_or_insert(witness);
        self.check_cursor(client, number, cursor, &around, verdict);
        match self.publications[number].outcome {
            Outcome::Acked => {
                let last = &mut reading.last[usize::from(message.publisher)];
                if let Some(last) = last.filter(|last| *last > message.sequence) {
                    verdict.violation("out of order", || {
                        let text = format!("came after {last} of the same publisher: {}", around());
                        self.words(client, Some(message), text)
                    });
                }
                *last = (*last).max(Some(message.sequence));
            }
            Outcome::Refused => verdict.violation("refused", || {
                self.words(client, Some(message), format!("came although its publish was refused: {}", around()))
            }),
            Outcome::Unknown => {}
        }
    }

    /// A message has one cursor, for its publisher and for all clients.
    fn check_cursor(
        &mut self,
        client: usize,
        number: usize,
        cursor: Mark,
        around: &dyn Fn() -> String,
        verdict: &mut Verdict,
    ) {
        let answered = self.publications[number].cursor;
        let first = self.cursors[number];
        if cursor.differs(first) || (answered.is_some() && cursor != answered) {
            verdict.violation("wrong cursor", || {
                let text = format!("its cursor is not what its publisher or another client was told: {}", around());
                self.words(client, Some(self.message(number)), text)
            });
        }
        if !first.is_some() {
            self.cursors[number] = cursor;
        }
    }

    fn read_told(&self, reading: &mut Reading, at: usize, what: &What, verdict: &mut Verdict) {
        let (client, log) = self.channel.logs[reading.log_index];
        let violation = |kind, text: &str, verdict: &mut Verdict| {
            verdict.violation(kind, || self.words(client, None, format!("{text}: {}", log.around(at, at))));
        };
        match what {
            What::Subscribed { after, cursor, recovered } => {
                match recovered {
                    Some(true) if !after.is_some() || after != cursor => {
                        violation("wrong resume", "recovered from elsewhere than was asked for", verdict);
                    }
                    Some(true) => verdict.resumed += 1,
                    Some(false) if after.is_some() => verdict.not_resumed += 1,
                    _ => {}
                }
                (reading.is_live, reading.cursor, reading.announced) = (true, *cursor, Mark::NONE);
            }
            What::Gap { after, next, .. } => {
                verdict.gaps += 1;
                if after.differs(reading.cursor) {
                    violation("wrong cursor", "the gap does not begin at the last cursor", verdict);
                }
                reading.announced = *next;
            }
            What::Ended(_) => (reading.is_live, reading.announced) = (false, Mark::NONE),
            What::Foreign(_) => violation("unpublished", "an event that nobody of this run published", verdict),
        }
    }

    fn compare_orders(&self, verdict: &mut Verdict) {
        for conflict in order::conflicts(&self.sequences, self.publications.len()) {
            let mut before = conflict.circle.last().map_or(0, |(_, message)| *message);
            let saw = conflict.circle.iter().map(|(log, message)| {
                let client = self.channel.logs[*log].0;
                let (first, second) = (self.message(*message as usize), self.message(before as usize));
                before = *message;
                format!("client {client} saw {first} before {second}")
            });
            let text = saw.collect::<Vec<_>>().join(", ");
            let (log, message) = conflict.circle[0];
            verdict.violation("no common order", || {
                self.words(self.channel.logs[log].0, Some(self.message(message as usize)), text)
            });
        }
    }

    /// What was demanded and did not come must belong to a place where the client was told so.
    fn find_losses(&self, log_index: usize, verdict: &mut Verdict) {
        let (client, log) = self.channel.logs[log_index];
        let mut positions = vec![NOWHERE; self.publications.len()];
        for (at, entry) in log.entries.iter().enumerate().rev() {
            if let Entry::Event { message, .. } = entry
                && let Some(number) = self.number(*message)
            {
                positions[number] = at as u32;
            }
        }
        let Some(from_us) = first_subscribed(log) else { return };
        let breaks = breaks(log);
        let mut places = None;
        for (number, publication) in self.publications.iter().enumerate() {
            if publication.outcome != Outcome::Acked || publication.started_us <= from_us {
                continue;
            }
            verdict.demanded += 1;
            if positions[number] != NOWHERE {
                continue;
            }
            let places =
                places.get_or_insert_with(|| Places::new(log, &positions, &self.publications, &self.sequences));
            let (after, until) = places.of(publication, self.witnesses[number]);
            let next = breaks.partition_point(|at| after.is_some_and(|after| *at <= after));
            if breaks.get(next).is_some_and(|at| until.is_none_or(|until| *at < until)) {
                verdict.told_missing += 1;
                continue;
            }
            if is_told_late(log, until, publication) {
                verdict.told_late += 1;
                continue;
            }
            verdict.violation("lost", || {
                let (started, ended) = (publication.started_us as f64 / 1e6, publication.ended_us as f64 / 1e6);
                let (first, last) = (after.unwrap_or(0) as usize, until.map_or(log.entries.len(), |at| at as usize));
                let seen = log.around(first, last);
                let text = format!("published from {started:.3} s to {ended:.3} s, and never told missing in {seen}");
                self.words(client, Some(self.message(number)), text)
            });
        }
    }
}

/// Whether a client that resumed after the publish, before the place where it belongs ends, was told of a gap soon after.
fn is_told_late(log: &Log, until: Option<u32>, publication: &Publication) -> bool {
    let told = |entry: &Entry| match entry {
        Entry::Told(told) => Some(&log.told[*told as usize]),
        Entry::Event { .. } => None,
    };
    let (before, after) = log.entries.split_at(until.map_or(log.entries.len(), |at| at as usize));
    let is_subscribed = |told: &&Told| matches!(told.what, What::Subscribed { .. });
    let Some(start) = before.iter().rev().filter_map(told).find(is_subscribed) else { return false };
    let is_resumed = matches!(start.what, What::Subscribed { recovered: Some(true), .. });
    let is_mark = |told: &Told| {
        matches!(&told.what, What::Gap { reason, .. } if reason == "upstream") && told.at_us <= start.at_us + LATE_US
    };
    is_resumed && start.at_us > publication.ended_us && after.iter().filter_map(told).any(is_mark)
}

/// When the client was subscribed for the first time.
fn first_subscribed(log: &Log) -> Option<u64> {
    let subscribed = |told: &&Told| matches!(told.what, What::Subscribed { .. });
    log.told.iter().find(subscribed).map(|told| told.at_us)
}

/// Where the client knows that something may be missing, growing; the end of the log if it never came back.
fn breaks(log: &Log) -> Vec<u32> {
    let mut breaks = Vec::new();
    let mut is_live = false;
    for (at, entry) in log.entries.iter().enumerate() {
        let Entry::Told(told) = entry else { continue };
        match log.told[*told as usize].what {
            What::Subscribed { recovered, .. } => {
                if recovered != Some(true) {
                    breaks.push(at as u32);
                }
                is_live = true;
            }
            What::Gap { .. } => breaks.push(at as u32),
            What::Ended(_) => is_live = false,
            What::Foreign(_) => {}
        }
    }
    if !is_live {
        breaks.push(log.entries.len() as u32);
    }
    breaks
}
