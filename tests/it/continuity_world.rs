//! A world for `continuity`: instances, clients, Redis nodes and what happens to them, on one clock that is made up.
//!
//! Every request has a time when it is sent, executed and answered, and anything may happen in between. What is true of
//! the chains is kept here, apart from what instances are told; `continuity_model.rs` judges one by the other.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

use hubcast::continuity::Follow;
use hubcast::cursor::Cursor;
use hubcast::history_store::{Chain, Content, Entry, Loss, Marked, Moment, Retention, Window};
use hubcast::history_view::Gap;

use crate::continuity_model::{Knobs, Via};

/// Clocks of servers go back from here, and stay positive.
const EPOCH_MS: u64 = 10_000_000;

/// An entry or a genesis, as it truly is.
pub struct Truth {
    pub parent: Option<Cursor>,
    /// The number of the publish, for events.
    pub number: Option<usize>,
    pub at: u64,
}

/// A break marker that was written.
pub struct Mark {
    pub channel: usize,
    pub id: Cursor,
    pub loss: Loss,
    /// Others in the stream that said the same.
    pub same: usize,
}

pub struct Node {
    pub chains: Vec<Chain>,
    offset: i64,
    pub alive: bool,
    /// Who is subscribed, by which connection.
    pub subscribed: BTreeMap<(usize, usize), u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Subscriptions,
    Commands,
}

/// One channel on one instance: what the multiplexer will be.
pub struct Slot {
    pub id: u64,
    pub follow: Follow<usize>,
    pub clients: Vec<usize>,
    pub joining: Vec<usize>,
    pub is_confirmed: bool,
    pub is_changing: bool,
    pub idle_since: Option<u64>,
    pub reads: usize,
    /// Events that the instance took in, and how many reads it had sent before.
    pub saw: BTreeMap<Cursor, usize>,
}

impl Slot {
    pub fn see(&mut self, event: Cursor) {
        self.saw.entry(event).or_insert(self.reads);
    }
}

#[derive(Default)]
pub struct Instance {
    pub slots: BTreeMap<usize, Slot>,
    /// The node that each link is up to, and the number of the connection.
    pub links: [(Option<usize>, u64); 2],
    pub boots: u64,
}

pub struct Connection {
    pub instance: usize,
    pub is_open: bool,
    pub inbox: Vec<(usize, Item)>,
    /// The cursors that it gave.
    pub afters: BTreeMap<usize, Option<Cursor>>,
}

/// What a connection is sent.
pub enum Item {
    Subscribed { cursor: Cursor, recovered: bool, via: Via, is_visible: bool },
    Event(Cursor, Via),
    Gap(Gap),
}

pub enum Request {
    Publish { channel: usize, number: usize },
    Read { channel: usize, unless: Option<Cursor> },
    Mark { channel: usize, loss: Loss },
}

pub enum Answer {
    Published(usize),
    Read { given: Window, all: Window, at: u64 },
    Marked(Marked),
    Failed,
}

/// Which request of which slot.
#[derive(Clone, Copy)]
pub struct Ticket {
    pub instance: usize,
    pub boot: u64,
    pub connection: u64,
    pub channel: usize,
    pub slot: u64,
}

pub enum Happening {
    Subscribe { instance: usize, channel: usize, node: usize, connection: u64 },
    Subscribed { instance: usize, channel: usize, connection: u64 },
    Unsubscribe { instance: usize, channel: usize, node: usize, connection: u64 },
    Unsubscribed { instance: usize, channel: usize, connection: u64 },
    Arrive { instance: usize, channel: usize, connection: u64, entry: Entry },
    Execute { ticket: Ticket, node: usize, request: Request },
    Answered { ticket: Ticket, answer: Answer, is_read: bool },
    Connect { instance: usize, link: Link },
    Cut { instance: usize, link: Link, node: usize },
    End { node: usize },
    Resume { ticket: Ticket },
    Fenced { ticket: Ticket },
    Publish { channel: usize },
    Tick { instance: usize },
}

pub struct World {
    pub knobs: Knobs,
    random: u64,
    pub now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    happenings: HashMap<u64, Happening>,
    pub is_healed: bool,
    pub ticks_until: u64,
    pub nodes: Vec<Node>,
    pub primary: usize,
    old: Option<usize>,
    pub copies: Vec<Vec<Chain>>,
    last_arrival: HashMap<(usize, usize), u64>,
    pub instances: Vec<Instance>,
    pub connections: Vec<Connection>,
    pub truth: Vec<BTreeMap<Cursor, Truth>>,
    pub marks: Vec<Mark>,
    /// Publishes in order: channel, and whether it was acknowledged.
    pub publishes: Vec<(usize, bool)>,
    /// Losses that an instance has read of early enough to tell of them.
    pub due: BTreeSet<(usize, Cursor)>,
    pub slots: u64,
    pub answers: usize,
}

impl World {
    pub fn new(knobs: Knobs) -> Self {
        let mut world = Self {
            random: knobs.seed,
            knobs,
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            happenings: HashMap::new(),
            is_healed: false,
            ticks_until: u64::MAX,
            nodes: Vec::new(),
            primary: 0,
            old: None,
            copies: Vec::new(),
            last_arrival: HashMap::new(),
            instances: (0..knobs.instances).map(|_| Instance::default()).collect(),
            connections: Vec::new(),
            truth: (0..knobs.channels).map(|_| BTreeMap::new()).collect(),
            marks: Vec::new(),
            publishes: Vec::new(),
            due: BTreeSet::new(),
            slots: 0,
            answers: 0,
        };
        let offset = world.below(500) as i64;
        world.add_node(vec![Chain::default(); knobs.channels], offset);
        for instance in 0..knobs.instances {
            world.instances[instance].links = [(Some(0), 0), (Some(0), 0)];
            let wait = world.below(130);
            world.later(wait, Happening::Tick { instance });
        }
        world
    }

    /// splitmix64
    pub fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.random() % bound
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn later(&mut self, wait: u64, happening: Happening) {
        self.order += 1;
        self.queue.push(Reverse((self.now + wait, self.order)));
        self.happenings.insert(self.order, happening);
    }

    pub fn delay(&mut self) -> u64 {
        let slow = if self.is_healed { 2 } else { self.knobs.slow };
        self.below(slow + 1)
    }

    pub fn publish_later(&mut self, wait: u64, channel: usize) {
        self.later(wait, Happening::Publish { channel });
    }

    /// Lets everything happen until then.
    pub fn run_until(&mut self, until: u64) {
        for _ in 0..60_000 {
            let Some(Reverse((at, order))) = self.queue.peek().copied().filter(|Reverse((at, _))| *at <= until) else {
                self.now = until;
                return;
            };
            self.queue.pop();
            self.now = at;
            let happening = self.happenings.remove(&order).unwrap();
            self.happen(happening);
        }
        panic!("livelock: the events never end");
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Subscribe { instance, channel, node, connection } => {
                if self.nodes[node].alive && self.is_current(instance, connection) {
                    self.nodes[node].subscribed.insert((channel, instance), connection);
                    let wait = self.delay();
                    self.later(wait, Happening::Subscribed { instance, channel, connection });
                }
            }
            Happening::Subscribed { instance, channel, connection } => {
                if self.is_current(instance, connection) {
                    self.with(instance, channel, |slot, out| {
                        (slot.is_changing, slot.is_confirmed) = (false, true);
                        slot.follow.confirmed(out);
                    });
                    self.reconcile(instance, channel);
                }
            }
            Happening::Unsubscribe { instance, channel, node, connection } => {
                self.nodes[node].subscribed.remove(&(channel, instance));
                let wait = self.delay();
                self.later(wait, Happening::Unsubscribed { instance, channel, connection });
            }
            Happening::Unsubscribed { instance, channel, connection } => {
                if self.is_current(instance, connection) {
                    self.with(instance, channel, |slot, _| slot.is_changing = false);
                    self.reconcile(instance, channel);
                }
            }
            Happening::Arrive { instance, channel, connection, entry } => {
                if self.is_current(instance, connection) && self.instances[instance].slots.contains_key(&channel) {
                    let is_event = entry.marker().is_none();
                    self.with(instance, channel, |slot, out| {
                        if is_event {
                            slot.see(entry.id);
                        }
                        slot.follow.message(entry, out);
                    });
                }
            }
            Happening::Execute { ticket, node, request } => self.execute(ticket, node, request),
            Happening::Answered { ticket, answer, is_read } => self.answered(ticket, answer, is_read),
            Happening::Connect { instance, link } => self.connect(instance, link),
            Happening::Cut { instance, link, node } => {
                if self.instances[instance].links[link as usize].0 == Some(node) {
                    self.drop_link(instance, link);
                }
            }
            Happening::End { node } => {
                self.nodes[node].alive = false;
                for instance in 0..self.instances.len() {
                    for link in [Link::Subscriptions, Link::Commands] {
                        self.happen(Happening::Cut { instance, link, node });
                    }
                }
            }
            Happening::Resume { ticket } => {
                if self.is_ours(ticket) {
                    self.with(ticket.instance, ticket.channel, |slot, out| slot.follow.resume(out));
                }
            }
            Happening::Fenced { ticket } => {
                if self.is_ours(ticket) {
                    self.with(ticket.instance, ticket.channel, |slot, out| slot.follow.fenced(out));
                }
            }
            Happening::Publish { channel } => self.publish(channel),
            Happening::Tick { instance } => self.tick(instance),
        }
    }

    fn is_current(&self, instance: usize, connection: u64) -> bool {
        self.instances[instance].links[Link::Subscriptions as usize].1 == connection
    }

    pub fn is_ours(&self, ticket: Ticket) -> bool {
        let instance = &self.instances[ticket.instance];
        instance.boots == ticket.boot && instance.slots.get(&ticket.channel).is_some_and(|slot| slot.id == ticket.slot)
    }

    // ---- servers

    fn add_node(&mut self, chains: Vec<Chain>, offset: i64) {
        self.nodes.push(Node { chains, offset, alive: true, subscribed: BTreeMap::new() });
        self.primary = self.nodes.len() - 1;
    }

    /// Coarse, so that bursts share a millisecond.
    pub fn moment(&mut self, node: usize) -> Moment {
        let now_ms = (EPOCH_MS + self.now).checked_add_signed(self.nodes[node].offset).unwrap() / 8 * 8;
        Moment { now_ms, random: self.random() }
    }

    pub fn retention(&self) -> Retention {
        self.knobs.retention
    }

    /// Whether the stream has what follows a cursor.
    pub fn is_visible(&mut self, channel: usize, cursor: Option<Cursor>) -> bool {
        let (at, retention) = (self.moment(self.primary), self.retention());
        let window = self.nodes[self.primary].chains[channel].clone().read(None, &retention, at);
        cursor.is_some_and(|cursor| window.has(cursor))
    }

    fn execute(&mut self, ticket: Ticket, node: usize, request: Request) {
        let is_cut = self.instances[ticket.instance].links[Link::Commands as usize].1 != ticket.connection;
        let is_read = matches!(request, Request::Read { .. });
        if !self.nodes[node].alive || (is_cut && self.chance(50)) {
            return self.answered(ticket, Answer::Failed, is_read);
        }
        let (at, retention) = (self.moment(node), self.retention());
        let answer = match request {
            Request::Publish { channel, number } => {
                let payload = number.to_string().into_bytes().into();
                let entry = self.nodes[node].chains[channel].publish(payload, &retention, at);
                self.spread(node, channel, &entry);
                Answer::Published(number)
            }
            Request::Read { channel, unless } => {
                let chain = &mut self.nodes[node].chains[channel];
                let given = chain.read(unless, &retention, at);
                let all = chain.read(None, &retention, at);
                assert!(given == all || (given.entries.is_empty() && unless == Some(all.top)));
                self.note_genesis(channel, given.top);
                Answer::Read { given, all, at: self.now }
            }
            Request::Mark { channel, loss } => {
                let before = self.nodes[node].chains[channel].read(None, &retention, at);
                let (marked, entry) = self.nodes[node].chains[channel].mark(&loss, &retention, at);
                self.note_genesis(channel, before.top);
                if let Some(entry) = entry {
                    let same = before.entries.iter().filter(|other| other.marker() == Some(loss.shared)).count();
                    self.marks.push(Mark { channel, id: entry.id, loss, same });
                    self.spread(node, channel, &entry);
                }
                Answer::Marked(marked)
            }
        };
        let wait = self.delay();
        self.later(wait, Happening::Answered { ticket, answer, is_read });
    }

    fn note_genesis(&mut self, channel: usize, id: Cursor) {
        let genesis = Truth { parent: None, number: None, at: self.now };
        self.truth[channel].entry(id).or_insert(genesis);
    }

    /// An entry was appended: it is noted, and sent to those who are subscribed there.
    pub fn spread(&mut self, node: usize, channel: usize, entry: &Entry) {
        self.note_genesis(channel, entry.previous);
        let number = match &entry.content {
            Content::Event(payload) => Some(str::from_utf8(payload).unwrap().parse().unwrap()),
            Content::Marker(_) => None,
        };
        let truth = Truth { parent: Some(entry.previous), number, at: self.now };
        assert!(self.truth[channel].insert(entry.id, truth).is_none(), "the id {} came again", entry.id);
        assert!(entry.previous < entry.id);
        let subscribed: Vec<_> = self.nodes[node].subscribed.iter().map(|(key, value)| (*key, *value)).collect();
        for ((_, instance), connection) in subscribed.into_iter().filter(|((at, _), _)| *at == channel) {
            for _ in 0..if self.chance(self.knobs.doubled) { 2 } else { 1 } {
                if !self.is_healed && self.chance(self.knobs.lost) {
                    continue;
                }
                let mut at = self.now + self.delay();
                if self.is_healed || !self.chance(self.knobs.swapped) {
                    let last = self.last_arrival.entry((instance, channel)).or_default();
                    at = at.max(*last);
                    *last = at;
                }
                let entry = entry.clone();
                self.later(at - self.now, Happening::Arrive { instance, channel, connection, entry });
            }
        }
    }

    /// A new primary with these chains; links of the old one are cut now, or (as zombies) each at its own time.
    pub fn change_primary(&mut self, chains: Vec<Chain>, step: i64, is_zombie: bool) {
        let node = self.primary;
        let is_zombie = is_zombie && !self.old.is_some_and(|old| self.nodes[old].alive);
        self.add_node(chains, self.nodes[node].offset + step);
        self.old = Some(node);
        for instance in 0..self.instances.len() {
            for link in [Link::Subscriptions, Link::Commands] {
                if is_zombie && self.chance(60) {
                    let wait = self.below(301);
                    self.later(wait, Happening::Cut { instance, link, node });
                }
            }
        }
        let wait = if is_zombie { 50 + self.below(351) } else { 0 };
        self.later(wait, Happening::End { node });
    }

    pub fn step_clock(&mut self, step: i64) {
        self.nodes[self.primary].offset += step;
    }
}
