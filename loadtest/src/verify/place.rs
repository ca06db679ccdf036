//! Where in a client's log a message belongs that is not there: between which two of its lines. Pure.
//!
//! What is known: a publish that was answered before another began comes before it; what was told before a publish
//! began comes before its message; and another client that has the message shows what surrounds it.

use std::collections::HashMap;

use super::evidence::{Log, Outcome, Publication};

/// A message is nowhere in a log.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// A message in another client's log: the log, and the place in its list of messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Witness {
    pub log: u32,
    pub at: u32,
}

/// What precedes and follows each line of a witness' list in the client's own log.
type Surroundings = Vec<(Option<u32>, Option<u32>)>;

/// Finds places in one client's log.
pub(crate) struct Places<'a> {
    /// The place of each message, or [`NOWHERE`].
    positions: &'a [u32],
    /// When publishes of messages that this client has were answered, growing, and the last place up to there.
    answered: Vec<(u64, u32)>,
    /// When they were begun, growing, and the first place from there on.
    begun: Vec<(u64, u32)>,
    /// When something was told, and where that stands.
    told: Vec<(u64, u32)>,
    /// The messages of all logs, in order.
    sequences: &'a [Vec<u32>],
    surroundings: HashMap<u32, Surroundings>,
}

impl<'a> Places<'a> {
    pub(crate) fn new(
        log: &Log,
        positions: &'a [u32],
        publications: &[Publication],
        sequences: &'a [Vec<u32>],
    ) -> Self {
        let here = || positions.iter().zip(publications).filter(|(at, _)| **at != NOWHERE);
        let acked = here().filter(|(_, publication)| publication.outcome == Outcome::Acked);
        let mut answered: Vec<_> = acked.map(|(at, publication)| (publication.ended_us, *at)).collect();
        answered.sort_unstable();
        let mut last = 0;
        for (_, at) in &mut answered {
            last = last.max(*at);
            *at = last;
        }
        let mut begun: Vec<_> = here().map(|(at, publication)| (publication.started_us, *at)).collect();
        begun.sort_unstable();
        let mut first = NOWHERE;
        for (_, at) in begun.iter_mut().rev() {
            first = first.min(*at);
            *at = first;
        }
        let told = |(at, entry): (usize, &_)| match entry {
            super::evidence::Entry::Told(told) => Some((log.told[*told as usize].at_us, at as u32)),
            super::evidence::Entry::Event { .. } => None,
        };
        let told = log.entries.iter().enumerate().filter_map(told).collect();
        Self { positions, answered, begun, told, sequences, surroundings: HashMap::new() }
    }

    /// The line after which an acknowledged message belongs, and the one before which it does; none: the log's ends.
    pub(crate) fn of(&mut self, publication: &Publication, witness: Option<Witness>) -> (Option<u32>, Option<u32>) {
        let before = |list: &[(u64, u32)]| {
            list[..list.partition_point(|(at_us, _)| *at_us < publication.started_us)].last().map(|(_, at)| *at)
        };
        let following = self.begun.partition_point(|(at_us, _)| *at_us <= publication.ended_us);
        let (mut after, mut until) =
            (before(&self.answered).max(before(&self.told)), self.begun.get(following).map(|(_, at)| *at));
        if let Some(Witness { log, at }) = witness {
            let (sequences, positions) = (self.sequences, self.positions);
            let around =
                self.surroundings.entry(log).or_insert_with(|| surroundings(&sequences[log as usize], positions));
            let (previous, next) = around[at as usize];
            after = after.max(previous);
            until = until.into_iter().chain(next).min();
        }
        match (after, until) {
            // Only where orders contradict each other, which is told apart.
            (Some(a), Some(b)) if a >= b => (Some(b), Some(a)),
            place => place,
        }
    }
}

fn surroundings(sequence: &[u32], positions: &[u32]) -> Surroundings {
    let here = |message: &u32| Some(positions[*message as usize]).filter(|at| *at != NOWHERE);
    let mut around = vec![(None, None); sequence.len()];
    let mut last = None;
    for (message, around) in sequence.iter().zip(&mut around) {
        around.0 = last;
        last = here(message).or(last);
    }
    let mut next = None;
    for (message, around) in sequence.iter().zip(&mut around).rev() {
        around.1 = next;
        next = here(message).or(next);
    }
    around
}
