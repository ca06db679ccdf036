//! Publications under way, and how many subscribers have each.

use std::collections::VecDeque;

/// Publications that have not reached everybody here.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    /// How often each was delivered, from `first` on.
    seen: VecDeque<u32>,
    first: u64,
}

impl Flights {
    /// None under way; `published` have been before.
    pub(crate) fn after(published: u64) -> Self {
        Self { seen: VecDeque::new(), first: published }
    }

    /// How many have reached everybody, all before them included.
    pub(crate) fn completed(&self) -> u64 {
        self.first
    }

    /// One delivery of a publication.
    pub(crate) fn saw(&mut self, publication: u64) {
        let Some(at) = publication.checked_sub(self.first) else { return };
        while self.seen.len() as u64 <= at {
            self.seen.push_back(0);
        }
        self.seen[at as usize] += 1;
    }

    /// Moves past those that reached everybody, given the receivers of each channel.
    pub(crate) fn advance(&mut self, receivers: &[u32]) {
        while let Some(seen) = self.seen.front() {
            if *seen < receivers[(self.first % receivers.len() as u64) as usize] {
                break;
            }
            self.seen.pop_front();
            self.first += 1;
        }
    }

    /// Deliveries that are missing of the first `published`.
    pub(crate) fn missing(&self, published: u64, receivers: &[u32]) -> u64 {
        let of = |number: u64| u64::from(receivers[(number % receivers.len() as u64) as usize]);
        let seen = |number: u64| self.seen.get((number - self.first) as usize).map_or(0, |seen| u64::from(*seen));
        (self.first..published).map(|number| of(number).saturating_sub(seen(number))).sum()
    }
}
