//! All metrics, one field each, in the Prometheus text format of `prometheus-client`.
//!
//! Counters and histograms on the message path are `sharded`, so cores do not contend;
//! gauges that would cost something there are computed when they are scraped. No label carries
//! anything from outside: the number of series is fixed.

use hyper::StatusCode;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::clock;
use crate::close::CloseReason;
use crate::fanout::Fanout;
use crate::identity::Action;
use crate::jwt::Fault;
use crate::sharded::{Count, Histogram};
use crate::writer::Writer;

pub use crate::labels::{ApiRefused, Drop, Insecure, Limit, Limited, Link, Refused, Reloaded, Scope, Source, Together};

/// The statuses that API answers are counted under; any other one is `other`.
const STATUSES: [&str; 13] =
    ["200", "400", "401", "403", "404", "405", "408", "413", "429", "431", "503", "504", "other"];

type Labelled<const N: usize> = [Count; N];
type Labels = [(&'static str, &'static str); 1];

/// The gateway's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Open WebSocket connections.
    pub connections: Gauge,
    /// WebSocket connections ever opened.
    pub connections_total: Count,
    closed: Labelled<{ CloseReason::LABELS.len() }>,
    refused: Labelled<{ Refused::LABELS.len() }>,
    api_refused: Labelled<3>,
    limited: Labelled<{ Limited::LABELS.len() }>,
    shared_limited: [Labelled<{ Together::LABELS.len() }>; Scope::LABELS.len()],
    ledger: [Gauge; 2],
    authentications: Labelled<{ Fault::LABELS.len() + 1 }>,
    forbidden: Labelled<{ Action::ALL.len() }>,
    insecure: [Gauge; Insecure::LABELS.len()],
    /// Users and tokens that are revoked and could still be shown.
    pub revocations: Gauge,
    reloads: Labelled<{ Reloaded::LABELS.len() }>,
    reload_failed: [Gauge; Reloaded::LABELS.len()],
    api_answers: Labelled<{ STATUSES.len() }>,
    /// Connections that ended with 1011 because their task panicked.
    pub panics: Count,
    /// Failed `accept` calls.
    pub accept_errors: Count,
    /// Subscriptions, pending ones included.
    pub subscriptions: Gauge,
    /// Channels with a subscription.
    pub channels: Gauge,
    publications: Labelled<3>,
    /// Publications put into outboxes.
    pub deliveries: Count,
    /// Frames written to sockets.
    pub frames_sent: Count,
    /// Writes that sockets took.
    pub writes: Count,
    /// Bytes written to WebSocket connections.
    pub bytes_sent: Count,
    /// Bytes read from WebSocket connections.
    pub bytes_received: Count,
    dropped: Labelled<7>,
    /// Frames that wait in outboxes.
    pub outbox_frames: Gauge,
    /// Bytes that wait in outboxes; a frame counts in each.
    pub outbox_bytes: Gauge,
    /// Seconds of a walk: until the last outbox has a publication, or those that were gathered.
    pub fanout: Histogram,
    /// Seconds from encoding a frame until the sockets of a flush slice had it; one sample a slice.
    pub publish_to_socket: Histogram,
    /// Redis servers that there are to be connections to.
    pub redis_servers: Gauge,
    links: [Gauge; 3],
    reconnects: Labelled<3>,
    /// Channels subscribed again after a reconnect.
    pub resubscribes: Count,
    /// Channels whose subscribers were told a gap.
    pub gaps: Count,
    recoveries: Labelled<2>,
    /// Events that slow consumers missed and were told later, from the history.
    pub backfilled: Count,
    /// Reads of streams and positions that continuity asked of Redis.
    pub history_reads: Count,
    /// Break markers written: losses inside Redis that this instance noticed first.
    pub history_breaks: Count,
    /// Bytes of the histories in memory.
    pub history_memory: Gauge,
    /// Entries of histories in memory that went before their rule says, for want of room.
    pub history_forgotten: Count,
    /// Joins and leaves that channels were told.
    pub presence_events: Count,
    /// Microseconds the last probe took through Redis and back.
    pub probe_lag_us: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("hubcast");
        let r = &mut registry;
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "The running build", build);
        Self {
            connections: register(r, "connections", "Open WebSocket connections"),
            connections_total: register(r, "connections_opened", "WebSocket connections opened"),
            closed: closed(r),
            refused: refused(r),
            api_refused: api_refused(r),
            limited: limited(r),
            shared_limited: shared_limited(r),
            ledger: ledger(r),
            authentications: authentications(r),
            forbidden: forbidden(r),
            insecure: insecure(r),
            revocations: register(r, "revocations", "Users and tokens that are revoked"),
            reloads: reloads(r),
            reload_failed: reload_failed(r),
            api_answers: api_answers(r),
            panics: register(r, "panics", "Connections whose task panicked"),
            accept_errors: register(r, "accept_errors", "Failed accept calls"),
            subscriptions: register(r, "subscriptions", "Subscriptions, pending ones included"),
            channels: register(r, "channels", "Channels with a subscription"),
            publications: publications(r),
            deliveries: register(r, "deliveries", "Publications put into outboxes"),
            frames_sent: register(r, "frames_sent", "Frames written to sockets"),
            writes: register(r, "writes", "System calls that wrote them"),
            bytes_sent: register(r, "bytes_sent", "Bytes written to WebSocket connections"),
            bytes_received: register(r, "bytes_received", "Bytes read from WebSocket connections"),
            dropped: dropped(r),
            outbox_frames: register(r, "outbox_frames", "Frames that wait in outboxes"),
            outbox_bytes: register(r, "outbox_bytes", "Bytes that wait in outboxes"),
            fanout: register(
                r,
                "fanout_duration_seconds",
                "Time to push a publication, or several in a row, into all outboxes of the channel",
            ),
            publish_to_socket: register(
                r,
                "publish_to_socket_seconds",
                "Time from encoding a frame until a slice of sockets had it, one sample a slice",
            ),
            redis_servers: register(r, "redis_servers", "Redis servers that there are to be connections to"),
            links: links(r),
            reconnects: reconnects(r),
            resubscribes: register(r, "redis_resubscribes", "Channels subscribed again after a reconnect"),
            gaps: register(r, "gaps", "Channels whose subscribers were told a gap"),
            recoveries: recoveries(r),
            backfilled: register(r, "backfilled", "Events that slow consumers missed, and were told from the history"),
            history_reads: register(r, "history_reads", "Reads of a channel's stream or position for its continuity"),
            history_breaks: register(r, "history_breaks", "Losses inside Redis that this instance marked in a stream"),
            history_memory: register(r, "history_memory_bytes", "Bytes of the histories in memory"),
            history_forgotten: register(
                r,
                "history_forgotten",
                "Entries of histories in memory that went before their time, for want of room",
            ),
            presence_events: register(r, "presence_events", "Joins and leaves that channels were told"),
            probe_lag_us: register(r, "redis_probe_lag_microseconds", "How long the last probe took through Redis"),
            registry,
        }
    }
}

impl Metrics {
    /// Counts the end of a connection.
    pub fn closed(&self, reason: &CloseReason) {
        self.closed[reason.index()].inc();
    }

    /// Counts a refusal before the upgrade.
    pub fn refused(&self, why: Refused) {
        self.refused[why as usize].inc();
    }

    /// Notes the bytes of frames that somebody holds, and those that are arriving.
    pub fn ledger(&self, frames: usize, arriving: usize) {
        self.ledger[0].set(frames as i64);
        self.ledger[1].set(arriving as i64);
    }

    /// Counts what a limit refused, closed or made to wait.
    pub fn limited(&self, limit: impl Into<Limit>) {
        match limit.into() {
            Limit::Own(limit) => self.limited[limit as usize].inc(),
            Limit::Shared(scope, what) => self.shared_limited[scope as usize][what as usize].inc(),
        };
    }

    /// Counts an API request that was refused.
    pub fn api_refused(&self, why: ApiRefused) {
        self.api_refused[why as usize].inc();
    }

    /// Counts a token that was taken, or why not.
    pub fn authenticated(&self, fault: Option<&Fault>) {
        self.authentications[fault.map_or(0, |fault| fault.index() + 1)].inc();
    }

    /// Counts what somebody may not do.
    pub fn forbidden(&self, action: Action) {
        self.forbidden[action as usize].inc();
    }

    /// Notes what an operator has said may be open to anybody.
    pub fn insecure(&self, what: Insecure) {
        self.insecure[what as usize].set(1);
    }

    /// Counts files that were read anew, or notes that they cannot be used.
    pub fn reloaded(&self, what: Reloaded, is_good: bool) {
        if is_good {
            self.reloads[what as usize].inc();
        }
        self.reload_failed[what as usize].set(i64::from(!is_good));
    }

    /// Counts an answer on the internal listener.
    pub fn answered(&self, status: StatusCode) {
        let known = STATUSES.iter().position(|known| *known == status.as_str());
        self.api_answers[known.unwrap_or(STATUSES.len() - 1)].inc();
    }

    /// Counts a publication that came in.
    pub fn publication(&self, source: Source) {
        self.publications[source as usize].inc();
    }

    /// Counts what a fan-out did and resets it.
    pub fn fanned_out<S>(&self, fanout: &mut Fanout<S>) {
        self.deliveries.inc_by(std::mem::take(&mut fanout.delivered) as u64);
        self.gaps.inc_by(std::mem::take(&mut fanout.gaps) as u64);
        for (counter, number) in self.recoveries.iter().zip(&mut fanout.recoveries) {
            counter.inc_by(std::mem::take(number) as u64);
        }
        fanout.walks_us.drain(..).for_each(|walk_us| self.fanout.observe_us(walk_us));
    }

    /// Counts drops.
    pub fn dropped(&self, why: Drop, number: usize) {
        self.dropped[why as usize].inc_by(number as u64);
    }

    /// Counts what a writer sent and resets it. The latency of its last batch is one sample.
    pub fn flushed(&self, writer: &mut Writer) {
        if writer.frames_sent > 0 {
            self.writes.inc_by(std::mem::take(&mut writer.writes));
            self.frames_sent.inc_by(std::mem::take(&mut writer.frames_sent));
            self.bytes_sent.inc_by(std::mem::take(&mut writer.bytes_sent));
            let latency_us = clock::now_us().saturating_sub(writer.oldest_us);
            self.publish_to_socket.observe_us(latency_us);
        }
        if writer.frames_dropped > 0 {
            self.dropped(Drop::ConnectionLost, std::mem::take(&mut writer.frames_dropped) as usize);
        }
    }

    /// Notes to how many Redis servers a link is up.
    pub fn links_up(&self, link: Link, count: usize) {
        self.links[link as usize].set(count as i64);
    }

    /// Counts a connection made anew.
    pub fn reconnected(&self, link: Link) {
        self.reconnects[link as usize].inc();
    }

    /// The text that Prometheus scrapes.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(error) => format!("# {error}\n"),
        }
    }
}

fn register<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: prometheus_client::registry::Metric + Clone + Default,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

fn labelled<const N: usize>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: [&'static str; N],
) -> Labelled<N> {
    let family = Family::<Labels, Count>::default();
    registry.register(name, help, family.clone());
    values.map(|value| family.get_or_create_owned(&[(label, value)]))
}

fn closed(registry: &mut Registry) -> Labelled<{ CloseReason::LABELS.len() }> {
    let help = "WebSocket connections closed, by reason";
    labelled(registry, "connections_closed", help, "reason", CloseReason::LABELS)
}

fn reconnects(registry: &mut Registry) -> Labelled<3> {
    let help = "Redis connections made anew after a loss";
    labelled(registry, "redis_reconnects", help, "link", ["subscribe", "publish", "registry"])
}

fn api_refused(registry: &mut Registry) -> Labelled<3> {
    let reasons = ["no_key", "wrong_key", "no_right"];
    labelled(registry, "api_refused", "API requests refused for their key, by reason", "reason", reasons)
}

fn api_answers(registry: &mut Registry) -> Labelled<{ STATUSES.len() }> {
    let help = "Requests answered on the internal listener, by status";
    labelled(registry, "api_answers", help, "status", STATUSES)
}

fn dropped(registry: &mut Registry) -> Labelled<7> {
    let reasons = [
        "slow_consumer",
        "connection_lost",
        "redis_queue_full",
        "redis_too_large",
        "redis_unreadable",
        "drop_oldest",
        "conflated",
    ];
    labelled(registry, "dropped", "Frames and messages dropped, by reason", "reason", reasons)
}

fn recoveries(registry: &mut Registry) -> Labelled<2> {
    let help = "Subscriptions with a cursor to go on from, by whether nothing was missing";
    labelled(registry, "recoveries", help, "recovered", ["false", "true"])
}

fn reloads(registry: &mut Registry) -> Labelled<{ Reloaded::LABELS.len() }> {
    labelled(registry, "reloads", "Files and keys read anew", "file", Reloaded::LABELS)
}

fn publications(registry: &mut Registry) -> Labelled<3> {
    let sources = ["socket", "http", "redis"];
    labelled(registry, "publications", "Publications taken in, by source", "source", sources)
}

fn authentications(registry: &mut Registry) -> Labelled<{ Fault::LABELS.len() + 1 }> {
    let mut results = ["accepted"; Fault::LABELS.len() + 1];
    results[1..].copy_from_slice(&Fault::LABELS);
    labelled(registry, "authentications", "Tokens that were shown, by what came of it", "result", results)
}

fn forbidden(registry: &mut Registry) -> Labelled<{ Action::ALL.len() }> {
    let help = "What somebody asked for without the right to it";
    labelled(registry, "forbidden", help, "action", Action::ALL.map(Action::as_str))
}

fn insecure(registry: &mut Registry) -> [Gauge; Insecure::LABELS.len()] {
    let family = Family::<Labels, Gauge>::default();
    registry.register("insecure", "1 where the configuration lets anybody in, on purpose", family.clone());
    Insecure::LABELS.map(|what| family.get_or_create_owned(&[("what", what)]))
}

fn reload_failed(registry: &mut Registry) -> [Gauge; Reloaded::LABELS.len()] {
    let family = Family::<Labels, Gauge>::default();
    let help = "1 while the newest state of a file cannot be used, and the one before is in effect";
    registry.register("reload_failed", help, family.clone());
    Reloaded::LABELS.map(|file| family.get_or_create_owned(&[("file", file)]))
}

fn links(registry: &mut Registry) -> [Gauge; 3] {
    let family = Family::<Labels, Gauge>::default();
    registry.register("redis_link_up", "Redis servers to which the connection is up", family.clone());
    ["subscribe", "publish", "registry"].map(|link| family.get_or_create_owned(&[("link", link)]))
}

fn refused(registry: &mut Registry) -> Labelled<{ Refused::LABELS.len() }> {
    let help = "Connections refused before the upgrade, by reason";
    labelled(registry, "connections_refused", help, "reason", Refused::LABELS)
}

fn limited(registry: &mut Registry) -> Labelled<{ Limited::LABELS.len() }> {
    labelled(registry, "limited", "What was refused, closed or made to wait by a limit", "limit", Limited::LABELS)
}

fn shared_limited(registry: &mut Registry) -> [Labelled<{ Together::LABELS.len() }>; Scope::LABELS.len()] {
    let family = Family::<[(&'static str, &'static str); 2], Count>::default();
    let help = "What was refused, closed or made to wait by a limit that connections share";
    registry.register("shared_limited", help, family.clone());
    let counter = |scope, limit| family.get_or_create_owned(&[("scope", scope), ("limit", limit)]);
    Scope::LABELS.map(|scope| Together::LABELS.map(|limit| counter(scope, limit)))
}

fn ledger(registry: &mut Registry) -> [Gauge; 2] {
    let family = Family::<Labels, Gauge>::default();
    registry.register("ledger_bytes", "Bytes of frames that wait, and of what is arriving", family.clone());
    ["frames", "arriving"].map(|kind| family.get_or_create_owned(&[("kind", kind)]))
}
