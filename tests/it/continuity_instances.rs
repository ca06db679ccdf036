//! The instances of the continuity world: what drives [`hubcast::continuity::Follow`], as the multiplexer will.

use hubcast::continuity::{Follow, Output};
use hubcast::cursor::Cursor;
use hubcast::history_store::Window;
use hubcast::history_view::Told;

use crate::continuity_model::Via;
use crate::continuity_world::{Answer, Connection, Happening, Instance, Item, Link, Request, Slot, Ticket, World};

/// How long a subscription outlives its last subscriber.
const LINGER_MS: u64 = 60;

impl World {
    /// Does something with a slot, and what follows from it.
    pub fn with(&mut self, instance: usize, channel: usize, act: impl FnOnce(&mut Slot, &mut Vec<Output<usize>>)) {
        let mut out = Vec::new();
        if let Some(slot) = self.instances[instance].slots.get_mut(&channel) {
            act(slot, &mut out);
        }
        self.obey(instance, channel, out, |_| Via::Live);
    }

    fn obey(&mut self, instance: usize, channel: usize, out: Vec<Output<usize>>, via: impl Fn(Option<Cursor>) -> Via) {
        let item = |told: &Told| match told {
            Told::Event { cursor, .. } => Item::Event(*cursor, via(Some(*cursor))),
            Told::Gap(gap) => Item::Gap(*gap),
        };
        for output in out {
            let slot = self.instances[instance].slots.get_mut(&channel).unwrap();
            match output {
                Output::Tell(told) => {
                    told.cursor().into_iter().for_each(|event| slot.see(event));
                    for client in &slot.clients {
                        self.connections[*client].inbox.push((channel, item(&told)));
                    }
                }
                Output::Admit(admitted) => {
                    slot.joining.retain(|joining| *joining != admitted.joiner);
                    slot.clients.push(admitted.joiner);
                    let connection = &self.connections[admitted.joiner];
                    let after =
                        admitted.start.recovered.then_some(admitted.start.cursor).or(connection.afters[&channel]);
                    let is_visible = self.is_visible(channel, after);
                    let (cursor, recovered) = (admitted.start.cursor, admitted.start.recovered);
                    let inbox = &mut self.connections[admitted.joiner].inbox;
                    inbox.push((channel, Item::Subscribed { cursor, recovered, via: via(None), is_visible }));
                    inbox.extend(admitted.start.missed.iter().map(|told| match told {
                        Told::Event { cursor, .. } => (channel, Item::Event(*cursor, via(None))),
                        Told::Gap(gap) => (channel, Item::Gap(*gap)),
                    }));
                }
                Output::Read { unless } => {
                    slot.reads += 1;
                    self.call(instance, channel, Request::Read { channel, unless });
                }
                Output::Fence => {
                    // Later than what was sent before it, but for what is lost or out of order.
                    let (ticket, wait) = (self.ticket(instance, channel), self.knobs.slow + self.delay());
                    self.later(wait, Happening::Fenced { ticket });
                }
                Output::Mark(loss) => self.call(instance, channel, Request::Mark { channel, loss }),
                Output::Pause => {
                    let ticket = self.ticket(instance, channel);
                    let wait = 20 + self.below(101);
                    self.later(wait, Happening::Resume { ticket });
                }
            }
        }
    }

    fn ticket(&self, instance: usize, channel: usize) -> Ticket {
        let Instance { slots, links, boots } = &self.instances[instance];
        let slot = slots.get(&channel).map_or(0, |slot| slot.id);
        Ticket { instance, boot: *boots, connection: links[Link::Commands as usize].1, channel, slot }
    }

    /// A request on the command link: lost before, executed and the answer lost, or answered.
    fn call(&mut self, instance: usize, channel: usize, request: Request) {
        let (ticket, wait) = (self.ticket(instance, channel), self.delay());
        let is_read = matches!(request, Request::Read { .. });
        match self.instances[instance].links[Link::Commands as usize].0 {
            Some(node) => self.later(wait, Happening::Execute { ticket, node, request }),
            None => self.later(wait, Happening::Answered { ticket, answer: Answer::Failed, is_read }),
        }
    }

    pub fn answered(&mut self, ticket: Ticket, answer: Answer, is_read: bool) {
        let Ticket { instance, channel, .. } = ticket;
        let is_cut = self.instances[instance].links[Link::Commands as usize].1 != ticket.connection;
        let answer = if is_cut { Answer::Failed } else { answer };
        if let Answer::Published(number) = answer {
            self.publishes[number].1 |= self.instances[instance].boots == ticket.boot;
        }
        if !self.is_ours(ticket) {
            return;
        }
        let mut out = Vec::new();
        match answer {
            Answer::Read { given, all, at } => {
                self.answers += 1;
                self.notice(instance, channel, &all);
                let slot = self.instances[instance].slots.get_mut(&channel).unwrap();
                slot.follow.read_answered(Some(&given), &mut out);
                let read = Via::Read(self.answers, at, all.top);
                let is_live = |cursor: Option<Cursor>| cursor.is_some_and(|cursor| given.find(cursor).is_none());
                self.obey(instance, channel, out, |cursor| if is_live(cursor) { Via::Live } else { read });
            }
            Answer::Marked(marked) => self.with(instance, channel, |slot, out| slot.follow.marked(Some(marked), out)),
            Answer::Failed if is_read => self.with(instance, channel, |slot, out| slot.follow.read_answered(None, out)),
            Answer::Failed => self.with(instance, channel, |slot, out| slot.follow.marked(None, out)),
            Answer::Published(_) => {}
        }
    }

    /// Truth, not protocol: this instance, which had taken an event in, has asked for the stream after that and just read
    /// one without it, early enough. What it took in while the read was under way may have been appended since.
    fn notice(&mut self, instance: usize, channel: usize, all: &Window) {
        let mut due = Vec::new();
        let chain = self.chain(channel, all.top);
        let slot = &self.instances[instance].slots[&channel];
        for (id, reads) in &slot.saw {
            if *reads == slot.reads || chain.contains(id) || self.due.contains(&(channel, *id)) {
                continue;
            }
            let horizon = all.entries.first().filter(|first| *id > first.id).map(|first| first.previous);
            let at = self.fork(channel, *id, all.top);
            due.extend(at.filter(|at| *at == all.top || all.find(*at).is_some() || horizon == Some(*at)).map(|_| *id));
        }
        self.due.extend(due.into_iter().map(|id| (channel, id)));
    }

    pub fn publish(&mut self, channel: usize) {
        let instance = self.below(self.instances.len() as u64) as usize;
        let number = self.publishes.len();
        self.publishes.push((channel, false));
        if self.instances[instance].links[Link::Commands as usize].0.is_some() {
            // Not a slot's: it is answered without one.
            let mut ticket = self.ticket(instance, channel);
            ticket.slot = u64::MAX;
            let (node, wait) = (self.instances[instance].links[Link::Commands as usize].0.unwrap(), self.delay());
            self.later(wait, Happening::Execute { ticket, node, request: Request::Publish { channel, number } });
        }
    }

    /// A client connects, and subscribes to a channel.
    pub fn join(&mut self, connection: usize, channel: usize, after: Option<Cursor>) {
        let instance = self.connections[connection].instance;
        self.connections[connection].afters.insert(channel, after);
        if !self.instances[instance].slots.contains_key(&channel) {
            self.slots += 1;
            let slot = Slot {
                id: self.slots,
                follow: Follow::new(self.retention().size, self.knobs.is_cached),
                clients: Vec::new(),
                joining: Vec::new(),
                is_confirmed: false,
                is_changing: false,
                idle_since: None,
                reads: 0,
                saw: Default::default(),
            };
            self.instances[instance].slots.insert(channel, slot);
        }
        self.with(instance, channel, |slot, out| {
            slot.joining.push(connection);
            slot.follow.join(connection, after, out);
        });
        self.reconcile(instance, channel);
    }

    pub fn close(&mut self, connection: usize) {
        let Connection { instance, is_open, .. } = &mut self.connections[connection];
        *is_open = false;
        for slot in self.instances[*instance].slots.values_mut() {
            slot.clients.retain(|client| *client != connection);
            slot.joining.retain(|joining| *joining != connection);
            slot.follow.leave(&connection);
        }
    }

    pub fn is_wanted(&self, slot: &Slot) -> bool {
        let lingers = slot.idle_since.is_some_and(|since| self.now < since + LINGER_MS);
        !slot.clients.is_empty() || !slot.joining.is_empty() || lingers
    }

    /// Subscribes or unsubscribes: one operation at a time.
    pub fn reconcile(&mut self, instance: usize, channel: usize) {
        let (Some(node), connection) = self.instances[instance].links[Link::Subscriptions as usize] else { return };
        let Some(slot) = self.instances[instance].slots.get(&channel).filter(|slot| !slot.is_changing) else { return };
        let happening = match (self.is_wanted(slot), slot.is_confirmed) {
            (true, false) => Happening::Subscribe { instance, channel, node, connection },
            (false, true) => Happening::Unsubscribe { instance, channel, node, connection },
            (true, true) | (false, false) => return,
        };
        self.with(instance, channel, |slot, _| {
            (slot.is_changing, slot.is_confirmed) = (true, false);
            slot.follow.unconfirmed();
        });
        let wait = self.delay();
        self.later(wait, happening);
    }

    /// The link is cut; it comes back to whatever node is then the primary.
    pub fn drop_link(&mut self, instance: usize, link: Link) {
        let (node, connection) = &mut self.instances[instance].links[link as usize];
        *connection += 1;
        let node = node.take();
        if link == Link::Subscriptions {
            if let Some(node) = node {
                self.nodes[node].subscribed.retain(|(_, subscriber), _| *subscriber != instance);
            }
            for slot in self.instances[instance].slots.values_mut() {
                (slot.is_changing, slot.is_confirmed) = (false, false);
                slot.follow.unconfirmed();
            }
        }
        let wait = 5 + self.below(146);
        self.later(wait, Happening::Connect { instance, link });
    }

    pub fn connect(&mut self, instance: usize, link: Link) {
        if self.instances[instance].links[link as usize].0.is_some() {
            return;
        }
        if !self.nodes[self.primary].alive {
            return self.later(20, Happening::Connect { instance, link });
        }
        self.instances[instance].links[link as usize].0 = Some(self.primary);
        let channels: Vec<_> = self.instances[instance].slots.keys().copied().collect();
        for channel in channels {
            self.reconcile(instance, channel);
            // Also the positions that are only retained.
            if link == Link::Commands || !self.is_wanted(&self.instances[instance].slots[&channel]) {
                self.with(instance, channel, |slot, out| slot.follow.doubt(out));
            }
        }
    }

    pub fn crash(&mut self, instance: usize) {
        self.instances[instance].boots += 1;
        for connection in 0..self.connections.len() {
            if self.connections[connection].instance == instance {
                self.close(connection);
            }
        }
        self.instances[instance].slots.clear();
        self.drop_link(instance, Link::Subscriptions);
        self.drop_link(instance, Link::Commands);
    }

    /// Idle checks, linger, forgetting after the TTL, and the least recently used.
    pub fn tick(&mut self, instance: usize) {
        let channels: Vec<_> = self.instances[instance].slots.keys().copied().collect();
        for channel in channels {
            let now = self.now;
            self.with(instance, channel, |slot, _| {
                let is_used = !slot.clients.is_empty() || !slot.joining.is_empty();
                slot.idle_since = if is_used { None } else { slot.idle_since.or(Some(now)) };
            });
            self.reconcile(instance, channel);
            let is_idle = |slot: &&Slot| {
                !self.is_wanted(slot) && !slot.is_confirmed && !slot.is_changing && slot.follow.is_at_rest()
            };
            let idle: Vec<_> = self.instances[instance].slots.values().filter(is_idle).collect();
            let slot = &self.instances[instance].slots[&channel];
            let since = slot.idle_since.unwrap_or(now);
            let is_oldest = idle.iter().all(|other| other.idle_since.unwrap_or(0) >= since);
            let is_old = now > since + self.retention().ttl.as_millis() as u64;
            if is_idle(&slot) && (is_old || (idle.len() > self.knobs.retained && is_oldest)) {
                self.instances[instance].slots.remove(&channel);
            } else if slot.is_confirmed {
                self.with(instance, channel, |slot, out| slot.follow.check(out));
            }
        }
        if self.now < self.ticks_until {
            let wait = 90 + self.below(41);
            self.later(wait, Happening::Tick { instance });
        }
    }
}
