//! Whether there is one order that all clients of a channel saw. Pure.
//!
//! The logs are merged: a message is taken when it is next in every log that has it. If none is, the logs contradict
//! each other, and whoever waits for whom is the proof. This finds contradictions of any number of clients.

use std::collections::HashMap;

/// After so many contradictions in one channel nobody needs another.
const CONFLICTS_MAX: usize = 10;

/// A circle of clients: each saw its own message before that of its predecessor in the list, whose is the last for the
/// first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    /// Client (by its place among the logs) and message.
    pub circle: Vec<(usize, u32)>,
}

struct Merge<'a> {
    logs: &'a [Vec<u32>],
    /// How much of each log is merged.
    merged: Vec<usize>,
    /// For each message: in how many logs it is still to come.
    to_come: Vec<u32>,
    /// For each message that is next somewhere: where.
    next: HashMap<u32, Vec<usize>>,
    /// Those that are next wherever they are.
    ready: Vec<u32>,
}

/// Compares logs in which no message comes twice; messages are numbered below `messages`.
pub(crate) fn conflicts(logs: &[Vec<u32>], messages: usize) -> Vec<Conflict> {
    let mut to_come = vec![0; messages];
    logs.iter().flatten().for_each(|message| to_come[*message as usize] += 1);
    let mut merge = Merge { logs, merged: vec![0; logs.len()], to_come, next: HashMap::new(), ready: Vec::new() };
    (0..logs.len()).for_each(|log| merge.look_at(log));
    let mut conflicts = Vec::new();
    while conflicts.len() < CONFLICTS_MAX {
        while let Some(message) = merge.ready.pop() {
            for log in merge.next.remove(&message).unwrap_or_default() {
                merge.merged[log] += 1;
                merge.look_at(log);
            }
        }
        let Some(circle) = merge.circle() else { break };
        merge.pass_over(circle[0].0);
        conflicts.push(Conflict { circle });
    }
    conflicts
}

impl Merge<'_> {
    fn look_at(&mut self, log: usize) {
        if let Some(&message) = self.logs[log].get(self.merged[log]) {
            self.next.entry(message).or_default().push(log);
            self.check(message);
        }
    }

    fn check(&mut self, message: u32) {
        let waiting = self.next.get(&message).map_or(0, Vec::len);
        if waiting > 0 && waiting == self.to_come[message as usize] as usize {
            self.ready.push(message);
        }
    }

    /// Leaves out what is next in a log, so that the merge can go on.
    fn pass_over(&mut self, log: usize) {
        let message = self.logs[log][self.merged[log]];
        if let Some(logs) = self.next.get_mut(&message) {
            logs.retain(|at| *at != log);
        }
        self.to_come[message as usize] -= 1;
        self.check(message);
        self.merged[log] += 1;
        self.look_at(log);
    }

    /// Nothing is ready: follows who waits for whom until it closes. None: all is merged.
    fn circle(&self) -> Option<Vec<(usize, u32)>> {
        let head = |log: usize| self.logs[log].get(self.merged[log]).copied();
        let mut log = (0..self.logs.len()).find(|log| head(*log).is_some())?;
        let mut path: Vec<(usize, u32)> = Vec::new();
        loop {
            if let Some(begin) = path.iter().position(|(seen, _)| *seen == log) {
                return Some(path.split_off(begin));
            }
            let message = head(log)?;
            path.push((log, message));
            // Who has it still to come, after something else?
            log = (0..self.logs.len()).find(|other| {
                let rest = &self.logs[*other][self.merged[*other]..];
                rest.first() != Some(&message) && rest.contains(&message)
            })?;
        }
    }
}
