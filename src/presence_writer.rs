//! The task that writes presence: what is noted, what is due, and all of it again when Redis may have lost it.
//!
//! With Redis, an instance's index is written before its joins and cleaned after its leaves are settled, so that
//! whoever sweeps up after it finds everything. What cannot be written is noted again: there is no other retry.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use redis::RedisResult;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::broker::Broker;
use crate::clock;
use crate::commands::Commands;
use crate::event;
use crate::fanout::Fanout;
use crate::presence::{Presence, RENEW_PARTS, Store, Work};
use crate::presence_redis::{RedisStore, SCRIPT_ENTRIES_MAX};
use crate::presence_store::{Change, Event, Member};
use crate::redis_link::is_about_slots;
use crate::servers::CommandLinks;

/// Changes are gathered for this long, so that a storm of joins is a few calls.
const BATCH_TIME: Duration = Duration::from_millis(20);

/// What Redis did not take is tried again after this.
const RETRY_TIME: Duration = Duration::from_millis(200);

/// Keeps presence until the runtime ends.
pub async fn run(broker: Arc<Broker>) {
    let mut writer = Writer::new(broker);
    let mut has_failed = false;
    loop {
        writer.wait().await;
        let result = writer.turn().await;
        writer.presence().end_turn();
        if let Err(error) = result {
            // A lost link is told by whoever keeps it, a slot that moves is on its way.
            if !error.is_io_error() && !is_about_slots(&error) && !std::mem::replace(&mut has_failed, true) {
                warn!(%error, "presence cannot be written to redis, retrying");
            }
            tokio::time::sleep(RETRY_TIME).await;
        } else if std::mem::take(&mut has_failed) {
            info!("presence is written to redis again");
        }
    }
}

struct Writer {
    broker: Arc<Broker>,
    /// Leaves to be settled, the earliest first.
    due: BinaryHeap<Reverse<(Instant, Arc<str>, Member)>>,
    /// The state of the links when everything was last written.
    known: CommandLinks,
    renew: Interval,
    part: u32,
}

/// One call for one channel.
#[derive(Debug)]
struct Call {
    channel: Arc<str>,
    step: Step,
    changes: Vec<Change>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Join,
    Leave,
    Settle,
}

impl Writer {
    fn new(broker: Arc<Broker>) -> Self {
        let mut renew = interval(broker.shared.presence.settings.lease * 3 / 2 / RENEW_PARTS);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { broker, due: BinaryHeap::new(), known: CommandLinks::default(), renew, part: 0 }
    }

    fn presence(&self) -> &Presence {
        &self.broker.shared.presence
    }

    /// Waits until there is something to do, and Redis to do it with.
    async fn wait(&mut self) {
        let presence = &self.broker.shared.presence;
        let next_due = self.due.peek().map(|Reverse((at, ..))| *at);
        let due = async {
            match next_due {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        match &presence.store {
            Store::Memory(_) => tokio::select! {
                () = presence.changed() => tokio::time::sleep(BATCH_TIME).await,
                () = due => {}
            },
            Store::Redis(store) if store.servers().command_links().up == 0 => {
                store.servers().command_links_changed(store.servers().command_links()).await;
            }
            Store::Redis(store) => tokio::select! {
                () = presence.changed() => tokio::time::sleep(BATCH_TIME).await,
                () = due => {}
                () = store.servers().command_links_changed(self.known) => {}
                _ = self.renew.tick() => {
                    self.part = (self.part + 1) % RENEW_PARTS;
                    presence.note_part(self.part);
                }
            },
        }
    }

    /// What fails does not hold up the rest: it may be at another server.
    async fn turn(&mut self) -> RedisResult<()> {
        let rewritten = self.rewrite_if_needed().await;
        let written = self.write().await;
        // Until that has succeeded, a Redis that came back empty knows of no leave.
        rewritten?;
        self.settle().await.and(written)
    }

    /// After a loss of Redis everything is written again, and what only its index knows is taken back.
    async fn rewrite_if_needed(&mut self) -> RedisResult<()> {
        let Store::Redis(store) = &self.presence().store else { return Ok(()) };
        let store = store.clone();
        let state = store.servers().command_links();
        let must_rewrite = self.presence().take_rewrite();
        if !must_rewrite && state == self.known {
            return Ok(());
        }
        let result = match self.index_link() {
            Ok(link) => self.compare_index(&store, link).await,
            // On other servers leaves go on. When the registry's link is back, everything is written again.
            Err(_) => {
                self.presence().note_all(false);
                Ok(())
            }
        };
        match result {
            Ok(()) => self.known = state,
            Err(_) => self.presence().rewrite(),
        }
        result
    }

    async fn compare_index(&self, store: &RedisStore, mut link: Commands) -> RedisResult<()> {
        let (presence, own) = (self.presence(), &*self.broker.shared.instance_id);
        let was_swept = store.was_swept(&mut link, own).await?;
        let mut cursor = 0;
        loop {
            let (next, entries) = store.indexed(&mut link, own, cursor).await?;
            for (channel, member) in entries.into_iter().filter(|(channel, member)| !presence.knows(channel, member)) {
                presence.note_again(&channel.into(), [member]);
            }
            cursor = next;
            if cursor == 0 {
                break;
            }
        }
        presence.note_all(was_swept);
        if was_swept { store.forget_swept(&mut link, own).await } else { Ok(()) }
    }

    /// The link to the Redis that has the registry.
    fn index_link(&self) -> RedisResult<Commands> {
        let link = self.broker.shared.registry.as_ref().and_then(|registry| registry.link());
        link.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected).into())
    }

    /// Writes what is noted.
    async fn write(&mut self) -> RedisResult<()> {
        let work = self.presence().take(|channel| self.is_away(channel));
        let indexed = self.index(&work).await;
        let mut calls = Vec::new();
        for (channel, Work { here, gone }) in work {
            calls.extend(in_calls(&channel, Step::Leave, &gone));
            match &indexed {
                Ok(()) => calls.extend(in_calls(&channel, Step::Join, &here)),
                Err(_) if self.index_link().is_ok() => self.presence().note_again(&channel, members(here)),
                Err(_) => {}
            }
        }
        self.carry_out(calls).await.and(indexed)
    }

    async fn index(&self, work: &BTreeMap<Arc<str>, Work>) -> RedisResult<()> {
        let Store::Redis(store) = &self.presence().store else { return Ok(()) };
        let mut entries = Vec::new();
        for (channel, Work { here, .. }) in work {
            entries.extend(here.iter().map(|change| (&**channel, &change.member)));
        }
        match entries.is_empty() {
            true => Ok(()),
            false => store.index(&mut self.index_link()?, &self.broker.shared.instance_id, &entries).await,
        }
    }

    /// Announces the leaves that are due.
    async fn settle(&mut self) -> RedisResult<()> {
        if self.presence().is_rewriting() {
            // A Redis that came back empty knows of no leave before it is written again.
            return Ok(());
        }
        let now = Instant::now();
        let mut due = BTreeMap::<_, Vec<_>>::new();
        while self.due.peek().is_some_and(|Reverse((at, ..))| *at <= now)
            && let Some(Reverse((_, channel, member))) = self.due.pop()
        {
            // Who came back is joined again, which forgets the leave.
            if !self.presence().is_here(&channel, &member) {
                due.entry(channel).or_default().push(Change { member, is_announced: true });
            }
        }
        let calls = due.iter().flat_map(|(channel, changes)| in_calls(channel, Step::Settle, changes)).collect();
        self.carry_out(calls).await
    }

    /// Makes the calls side by side, and acts on their answers. What failed is done again later.
    async fn carry_out(&mut self, calls: Vec<Call>) -> RedisResult<()> {
        let mut running = JoinSet::new();
        for call in calls {
            running.spawn(make(Arc::clone(&self.broker), call));
        }
        let (mut result, mut gone) = (Ok(()), Vec::new());
        while let Some(done) = running.join_next().await {
            // A call that panicked is logged as such, and its entries are renewed in time.
            let Ok((Call { channel, step, changes }, outcome)) = done else { continue };
            match outcome {
                // When its server is back, everything is written again; until then it must not hold up the others.
                Err(_) if self.is_away(&channel) => {}
                Err(error) => {
                    result = Err(error);
                    self.again(&channel, step, changes);
                }
                Ok(_) if step == Step::Join => self.presence().announced(&channel, &changes),
                Ok(left_ms) => {
                    for (Change { member, .. }, left_ms) in changes.into_iter().zip(left_ms) {
                        match left_ms {
                            0 => gone.push((Arc::clone(&channel), member)),
                            left_ms => {
                                self.presence().settling(&channel, &member);
                                self.settle_after(Duration::from_millis(left_ms), &channel, member);
                            }
                        }
                    }
                }
            }
        }
        self.forget(gone).await.and(result)
    }

    fn is_away(&self, channel: &str) -> bool {
        matches!(&self.presence().store, Store::Redis(store) if store.servers().commands(channel).is_none())
    }

    fn again(&mut self, channel: &Arc<str>, step: Step, changes: Vec<Change>) {
        match step {
            Step::Join | Step::Leave => self.presence().note_again(channel, members(changes)),
            // It may have been settled: leaving again would announce it twice.
            Step::Settle => {
                members(changes).for_each(|member| self.settle_after(RETRY_TIME, channel, member));
            }
        }
    }

    fn settle_after(&mut self, pause: Duration, channel: &Arc<str>, member: Member) {
        self.due.push(Reverse((Instant::now() + pause, Arc::clone(channel), member)));
    }

    /// Forgets entries of which nothing is left to do, in the index first.
    async fn forget(&mut self, gone: Vec<(Arc<str>, Member)>) -> RedisResult<()> {
        if let Store::Redis(store) = &self.presence().store
            && !gone.is_empty()
        {
            let entries: Vec<_> = gone.iter().map(|(channel, member)| (&**channel, member)).collect();
            let unindexed = match self.index_link() {
                Ok(mut link) => store.unindex(&mut link, &self.broker.shared.instance_id, &entries).await,
                // When it is back, what the index has and nobody here knows is taken out.
                Err(_) => Ok(()),
            };
            if let Err(error) = unindexed {
                for (channel, member) in gone {
                    self.settle_after(RETRY_TIME, &channel, member);
                }
                return Err(error);
            }
        }
        for (channel, member) in gone {
            self.presence().forget(&channel, &member);
        }
        Ok(())
    }
}

fn members(changes: impl IntoIterator<Item = Change>) -> impl Iterator<Item = Member> {
    changes.into_iter().map(|change| change.member)
}

fn in_calls(channel: &Arc<str>, step: Step, changes: &[Change]) -> impl Iterator<Item = Call> {
    changes.chunks(SCRIPT_ENTRIES_MAX).map(move |changes| Call {
        channel: Arc::clone(channel),
        step,
        changes: changes.to_vec(),
    })
}

/// Makes one call. Answers how many milliseconds are left of each leave, 0 if nothing is left to do.
async fn make(broker: Arc<Broker>, call: Call) -> (Call, RedisResult<Vec<u64>>) {
    let presence = &broker.shared.presence;
    let debounce_ms = presence.settings.debounce.as_millis() as u64;
    let (channel, changes) = (&*call.channel, &*call.changes);
    let identities = || changes.iter().map(|change| change.member.identity()).collect::<Vec<_>>();
    let outcome = match (&presence.store, call.step) {
        (Store::Redis(store), Step::Join) => store.join(channel, changes).await.map(|()| Vec::new()),
        (Store::Redis(store), Step::Leave) => store.leave(channel, changes, debounce_ms).await,
        (Store::Redis(store), Step::Settle) => store.settle(channel, &identities()).await,
        (Store::Memory(store), Step::Join) => {
            tell(&broker, channel, store.join(channel, changes)).await;
            Ok(Vec::new())
        }
        (Store::Memory(store), Step::Leave) => Ok(store.leave(channel, changes, debounce_ms, now_ms())),
        (Store::Memory(store), Step::Settle) => {
            let (left_ms, events) = store.settle(channel, &identities(), now_ms());
            tell(&broker, channel, events).await;
            Ok(left_ms)
        }
    };
    (call, outcome)
}

fn now_ms() -> u64 {
    clock::now_us() / 1000
}

/// Without Redis, the way of an event is short.
async fn tell(broker: &Broker, name: &str, events: Vec<Event>) {
    let Some(channel) = broker.hub.channel(name) else { return };
    let mut fanout = Fanout::default();
    for event in events {
        channel.tell(&event::presence_event(name, &event), &mut fanout);
        broker.shared.metrics.presence_events.inc();
        if fanout.needs_pause() {
            broker.settle(&mut fanout).await;
        }
    }
    broker.settle(&mut fanout).await;
}
