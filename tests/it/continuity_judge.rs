//! The promise of `continuity`, judged by the truth that the world kept.
//!
//! A lineage is a client's log of a channel from one `recovered: false` to the next. In each:
//! 1. no event twice, and never back to an ancestor of one that was delivered;
//! 2. between two events with no gap told between, and from the last one to the end, nothing of the chain is missing;
//! 3. of an acknowledged event that Redis lost after an instance had taken it in, and that the instance asked for after
//!    that and saw missing while the place of the break was in the window: a gap or `recovered: false` after the last
//!    delivered ancestor and before anything newer, except live events that were appended before the marker, and what an
//!    old primary showed that never had the marker;
//! 4. the last publish arrives, and every acknowledged one was appended;
//! 5. without loss at Redis: no marker, no gap with nothing missing, and every cursor recovers that the stream can serve;
//! 6. a marker only if its id is really lost, and one per shared id;
//! 7. what a gap names is so: `next` is what comes next, `after` is an id that was, and where nothing is lost at Redis what
//!    the client was told last; where nothing fails at all there is no gap.

use std::collections::{BTreeSet, HashSet};

use hubcast::cursor::Cursor;
use hubcast::history_view::{Gap, GapReason};

use crate::continuity_model::{Client, Counts, Kind, Log, Via};
use crate::continuity_world::World;

impl World {
    /// Redis loses nothing.
    fn is_calm(&self) -> bool {
        matches!(self.knobs.kind, Kind::Calm | Kind::Busy)
    }

    /// Whether `id` is `tip` or one of its ancestors: ids grow along a chain.
    pub fn is_on(&self, channel: usize, id: Cursor, tip: Cursor) -> bool {
        let mut at = Some(tip);
        while let Some(here) = at.filter(|here| *here > id) {
            at = self.parent(channel, here);
        }
        at == Some(id)
    }

    fn parent(&self, channel: usize, id: Cursor) -> Option<Cursor> {
        self.truth[channel].get(&id).and_then(|truth| truth.parent)
    }

    /// An id and all its ancestors.
    pub fn chain(&self, channel: usize, id: Cursor) -> HashSet<Cursor> {
        std::iter::successors(Some(id), |id| self.parent(channel, *id)).collect()
    }

    /// The newest ancestor of an id on the chain that leads to `tip`.
    pub fn fork(&self, channel: usize, id: Cursor, tip: Cursor) -> Option<Cursor> {
        let (mut id, mut tip) = (id, tip);
        while id != tip {
            let newer = if id > tip { &mut id } else { &mut tip };
            *newer = self.parent(channel, *newer)?;
        }
        Some(id)
    }

    fn is_event(&self, channel: usize, id: Cursor) -> bool {
        self.truth[channel].get(&id).is_some_and(|truth| truth.number.is_some())
    }

    /// Events on the chain to `tip` that are not on the one to `from`.
    fn events_between(&self, channel: usize, from: Cursor, tip: Cursor) -> Vec<Cursor> {
        let (mut events, mut at) = (Vec::new(), Some(tip));
        let fork = self.fork(channel, from, tip);
        while let Some(here) = at.filter(|_| at != fork) {
            events.extend(self.is_event(channel, here).then_some(here));
            at = self.parent(channel, here);
        }
        events
    }
}

/// One client's one channel.
struct Case<'a> {
    world: &'a World,
    channel: usize,
    who: String,
    top: Cursor,
    /// Acknowledged events that are not on the chain any more.
    lost: &'a [Cursor],
    /// Events that an instance has taken in, and still knows.
    kept: &'a BTreeSet<Cursor>,
    /// The last publish.
    last: usize,
}

pub fn judge(world: &mut World, clients: &[Client], counts: &mut Counts) -> Result<(), String> {
    let (retention, at) = (world.retention(), world.moment(world.primary));
    let primary = world.primary;
    let chains = &mut world.nodes[primary].chains;
    let tops: Vec<_> = chains.iter_mut().map(|chain| chain.read(None, &retention, at).top).collect();
    let world = &*world;
    check_markers(world)?;
    counts.markers += world.marks.len();
    let appended: BTreeSet<_> =
        world.truth.iter().flat_map(|truth| truth.values().filter_map(|entry| entry.number)).collect();
    if let Some(number) = (0..world.publishes.len()).find(|at| world.publishes[*at].1 && !appended.contains(at)) {
        return Err(format!("4: publish {number} was acknowledged and never appended"));
    }
    for (channel, top) in tops.into_iter().enumerate() {
        let is_lost = |id: &Cursor| {
            let number = world.truth[channel][id].number;
            number.is_some_and(|number| world.publishes[number].1) && !world.is_on(channel, *id, top)
        };
        let lost: Vec<_> = world.truth[channel].keys().copied().filter(is_lost).collect();
        counts.losses_seen += lost.iter().filter(|id| world.due.contains(&(channel, **id))).count();
        let slots = world.instances.iter().filter_map(|instance| instance.slots.get(&channel));
        let kept = slots.flat_map(|slot| slot.saw.keys().copied()).collect();
        let last = world.publishes.iter().rposition(|(at, _)| *at == channel).unwrap_or(0);
        for (number, client) in clients.iter().enumerate().filter(|(_, client)| client.channels.contains(&channel)) {
            let who = format!("client {number} on {channel}");
            let case = Case { world, channel, who, top, lost: &lost, kept: &kept, last };
            case.check(client, counts)?;
        }
    }
    Ok(())
}

fn check_markers(world: &World) -> Result<(), String> {
    for mark in &world.marks {
        if world.is_calm() {
            return Err(format!("5: marker {:?} though nothing was lost", mark.loss));
        }
        let parent = world.truth[mark.channel][&mark.id].parent;
        if parent.is_some_and(|parent| world.is_on(mark.channel, mark.loss.own, parent)) {
            return Err(format!("6: marker for {}, which is there", mark.loss.own));
        }
        if mark.same > 0 && mark.loss.shared.is_some() {
            return Err(format!("6: {} markers beside {:?}", mark.same, mark.loss));
        }
    }
    Ok(())
}

impl Case<'_> {
    fn check(&self, client: &Client, counts: &mut Counts) -> Result<(), String> {
        let none = Vec::new();
        let log = client.logs.get(&self.channel).unwrap_or(&none);
        let mut starts = Vec::new();
        for (at, entry) in log.iter().enumerate() {
            match entry {
                Log::Subscribed { recovered, after, is_visible, .. } => {
                    counts.recovered += usize::from(*recovered);
                    counts.not_recovered += usize::from(!recovered && after.is_some());
                    if !recovered && after.is_some() && self.world.is_calm() && *is_visible {
                        return Err(format!("5: {}: {after:?} did not recover", self.who));
                    }
                    if !recovered || starts.is_empty() || client.forges {
                        starts.push(at);
                    }
                }
                Log::Event(..) => counts.events += 1,
                Log::Gap(gap) => {
                    counts.gaps += 1;
                    self.gap(gap, &log[..at], log.get(at + 1))?;
                }
            }
        }
        for (number, start) in starts.iter().enumerate() {
            let end = starts.get(number + 1).copied();
            self.lineage(&log[*start..end.unwrap_or(log.len())], end.is_none(), counts)?;
        }
        if starts.is_empty() {
            return Err(format!("4: {}: was never let in", self.who));
        }
        Ok(())
    }

    /// Rule 7.
    fn gap(&self, gap: &Gap, before: &[Log], then: Option<&Log>) -> Result<(), String> {
        let Self { world, channel, who, .. } = self;
        let is_next = |next| match then {
            Some(Log::Event(id, _)) => *id == next,
            Some(Log::Gap(_)) => false,
            Some(Log::Subscribed { .. }) | None => true,
        };
        let was = |id| world.truth[*channel].contains_key(&id);
        let is_loss_told = world.is_calm() && gap.reason != GapReason::Trimmed;
        let last = before.iter().rev().find_map(|entry| match entry {
            Log::Event(id, _) => Some(*id),
            Log::Subscribed { cursor, .. } => Some(*cursor),
            Log::Gap(_) => None,
        });
        let is_last = world.knobs.kind != Kind::Calm || gap.after == last;
        if world.knobs.kind == Kind::Busy {
            return Err(format!("7: {who}: {gap:?} though nothing failed"));
        }
        if is_loss_told || !is_last || !gap.after.is_none_or(was) || !gap.next.is_none_or(is_next) {
            return Err(format!("7: {who}: {gap:?} after {last:?}"));
        }
        Ok(())
    }

    fn lineage(&self, log: &[Log], is_last: bool, counts: &mut Counts) -> Result<(), String> {
        let Self { world, channel, who, .. } = self;
        let Log::Subscribed { cursor: start, .. } = log[0] else { unreachable!("a lineage starts so") };
        if !world.truth[*channel].contains_key(&start) {
            return Err(format!("2: {who}: began at {start}, which never was"));
        }
        let (mut last, mut is_broken) = (start, false);
        let mut delivered = BTreeSet::new();
        let mut places = vec![(0, start)];
        for (at, entry) in log.iter().enumerate() {
            let Log::Event(id, via) = *entry else {
                is_broken |= matches!(entry, Log::Gap(_));
                continue;
            };
            if !delivered.insert(id) || world.is_on(*channel, id, last) {
                return Err(format!("1: {who}: {id} after {last}"));
            }
            let mut missing = world.events_between(*channel, last, id);
            missing.retain(|missing| *missing != id);
            let continues = world.is_on(*channel, last, id);
            if !is_broken && (!missing.is_empty() || !continues) {
                return Err(format!("2: {who}: {missing:?} missing between {last} and {id}, {via:?}"));
            }
            if is_broken && missing.is_empty() && world.is_calm() && continues {
                return Err(format!("5: {who}: a gap with nothing missing between {last} and {id}"));
            }
            (last, is_broken) = (id, false);
            places.push((at, id));
        }
        if is_last {
            let missing = world.events_between(*channel, last, self.top);
            if !is_broken && (!missing.is_empty() || !world.is_on(*channel, last, self.top)) {
                return Err(format!("2: {who}: {missing:?} missing after {last}"));
            }
            let numbers: BTreeSet<_> = delivered.iter().map(|id| world.truth[*channel][id].number).collect();
            if !numbers.contains(&Some(self.last)) {
                return Err(format!("4: {who}: the last publish never came"));
            }
        }
        self.losses(log, is_last, &places, &delivered, counts)
    }

    /// Rule 3.
    fn losses(
        &self,
        log: &[Log],
        is_last: bool,
        places: &[(usize, Cursor)],
        delivered: &BTreeSet<Cursor>,
        counts: &mut Counts,
    ) -> Result<(), String> {
        let Self { world, channel, who, .. } = self;
        let Log::Subscribed { via: first, .. } = log[0] else { return Ok(()) };
        for lost in self.lost.iter().filter(|lost| !delivered.contains(lost) && places[0].1 != **lost) {
            let chain = world.chain(*channel, *lost);
            let before = places.iter().rev().find(|(_, place)| chain.contains(place));
            let Some(&(start, ancestor)) = before else { continue };
            // Lost, or on another node, before this client began.
            let appended = world.truth[*channel][lost].at;
            if start == 0 && matches!(first, Via::Read(_, at, _) if appended <= at) {
                continue;
            }
            let gap =
                (start + 1..log.len()).find(|at| matches!(log[*at], Log::Gap(_))).or((!is_last).then_some(log.len()));
            let told = self.markers_of(*lost);
            let is_known =
                self.kept.contains(lost) || told.iter().any(|marker| world.is_on(*channel, *marker, self.top));
            // Seen, but forgotten (crash, least recently used, age), and the marker lost as well.
            if !is_known || !world.due.contains(&(*channel, *lost)) {
                counts.unseen += usize::from(gap.is_none());
                continue;
            }
            let Some(gap) = gap else {
                return Err(format!("3: {who}: {lost} was lost, an instance saw it, nothing is told after {ancestor}"));
            };
            let next = (start + 1..gap).find(|at| matches!(log[*at], Log::Event(..)));
            for at in start + 1..gap {
                let Log::Event(id, via) = log[at] else { continue };
                let is_same_read = log[start..next.unwrap_or(start)].iter().any(|entry| match entry {
                    Log::Event(_, other) | Log::Subscribed { via: other, .. } => *other == via,
                    Log::Gap(_) => false,
                });
                let is_late = |marker: &Cursor| {
                    // A read at an old primary shows nothing of what was marked at the new one.
                    let was_read = matches!(via, Via::Read(_, _, top) if world.is_on(*channel, *marker, top));
                    world.is_on(*channel, *marker, id)
                        || (is_same_read && was_read && world.is_on(*channel, *marker, self.top))
                };
                if told.iter().any(is_late) {
                    return Err(format!("3: {who}: {lost} was lost, and told only after {id} ({via:?}), {told:?}"));
                }
                counts.told_late += 1;
            }
        }
        Ok(())
    }

    /// The markers that tell of a loss.
    fn markers_of(&self, lost: Cursor) -> Vec<Cursor> {
        let Self { world, channel, .. } = self;
        let tells = |mark: &&crate::continuity_world::Mark| {
            let parent = world.truth[*channel][&mark.id].parent;
            mark.channel == *channel
                && mark.loss.shared.is_some()
                && !world.is_on(*channel, mark.id, lost)
                && mark.loss.shared == parent.and_then(|parent| world.fork(*channel, lost, parent))
        };
        world.marks.iter().filter(|mark| mark.channel == *channel).filter(tells).map(|mark| mark.id).collect()
    }
}
