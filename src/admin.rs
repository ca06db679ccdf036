//! Looking at connections and acting on them: what one instance does of it.
//!
//! `api.rs` reads the requests and puts the answers of all instances together, `cluster.rs` carries them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;

use crate::authenticator::{Authenticator, unix_s};
use crate::broker::Broker;
use crate::close::CloseReason;
use crate::connection::Connection;
use crate::fanout::Fanout;
use crate::revocation::Revoked;

/// What instances are asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ask {
    /// A page of connections.
    Connections {
        /// Only this user's.
        user: Option<String>,
        /// Only the channel's subscribers.
        channel: Option<String>,
        /// Only those after this connection, in the order of [`Connection::parse_id`].
        after: Option<String>,
        /// Most of them.
        limit: usize,
    },
    /// Close connections.
    Disconnect {
        /// Which.
        target: Target,
        /// With this close code.
        code: u16,
        /// And this reason.
        reason: Box<str>,
    },
    /// End subscriptions.
    Unsubscribe {
        /// Whose.
        target: Target,
        /// To which channel.
        channel: String,
    },
    /// Take tokens no more, and close the connections that have shown them.
    Revoke {
        /// Which.
        revoked: Revoked,
        /// Those issued up to this second since 1970.
        at_s: u64,
    },
}

/// Whom an action is about.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The connection of this id.
    Connection(String),
    /// All connections of a user.
    User(String),
    /// All subscribers of a channel.
    Channel(String),
}

/// Carries out what concerns this instance: `{"connections":[…]}`, or `{"count":N}`.
pub fn carry_out(ask: &Ask, broker: &Broker) -> Value {
    match ask {
        Ask::Connections { user, channel, after, limit } => {
            json!({ "connections": connections(broker, user.as_deref(), channel.as_deref(), after.as_deref(), *limit) })
        }
        Ask::Disconnect { target, code, reason } => json!({ "count": disconnect(broker, target, *code, reason) }),
        Ask::Unsubscribe { target, channel } => json!({ "count": unsubscribe(broker, target, channel) }),
        Ask::Revoke { revoked, at_s } => json!({ "count": revoke(broker, revoked, *at_s) }),
    }
}

fn connections(
    broker: &Broker,
    user: Option<&str>,
    channel: Option<&str>,
    after: Option<&str>,
    limit: usize,
) -> Vec<Value> {
    let own = &*broker.shared.instance_id;
    let after = match after.and_then(Connection::parse_id) {
        Some((instance_id, _)) if instance_id > own => return Vec::new(),
        Some((instance_id, number)) if instance_id == own => number,
        _ => 0,
    };
    let mut found = match channel {
        Some(name) => broker.hub.channel(name).map_or_else(Vec::new, |channel| channel.subscribers()),
        None => all(broker),
    };
    found.retain(|connection| connection.number() > after && user.is_none_or(|user| connection.user() == Some(user)));
    found.sort_unstable_by_key(|connection| connection.number());
    found.truncate(limit);
    found.iter().map(|connection| connection_json(connection)).collect()
}

fn all(broker: &Broker) -> Vec<Arc<Connection>> {
    broker.shared.connections.iter().map(|connection| Arc::clone(&connection)).collect()
}

fn find(broker: &Broker, target: &Target) -> Vec<Arc<Connection>> {
    match target {
        Target::Connection(id) => {
            let own = Connection::parse_id(id).filter(|(instance_id, _)| **instance_id == *broker.shared.instance_id);
            let found = own.and_then(|(_, number)| broker.shared.connections.get(&number));
            found.map(|found| Arc::clone(&found)).into_iter().collect()
        }
        Target::User(user) => {
            let mut found = all(broker);
            found.retain(|connection| connection.user() == Some(user));
            found
        }
        Target::Channel(name) => broker.hub.channel(name).map_or_else(Vec::new, |channel| channel.subscribers()),
    }
}

fn disconnect(broker: &Broker, target: &Target, code: u16, reason: &str) -> usize {
    // What was accepted before goes before the close frame.
    let mut fanout = Fanout::default();
    broker.hub.deliver_held(&mut fanout);
    broker.shared.submit(&mut fanout);
    let found = find(broker, target);
    for connection in &found {
        connection.close(CloseReason::Disconnected { code, reason: reason.into() });
    }
    found.len()
}

fn unsubscribe(broker: &Broker, target: &Target, channel: &str) -> usize {
    let subscribers = broker.hub.channel(channel).map_or_else(Vec::new, |channel| channel.subscribers());
    let is_meant = |connection: &&Arc<Connection>| match target {
        Target::Connection(id) => connection.id() == *id,
        Target::User(user) => connection.user() == Some(user),
        Target::Channel(name) => name == channel,
    };
    let found: Vec<_> = subscribers.iter().filter(is_meant).collect();
    for connection in &found {
        connection.ask_to_leave(channel);
    }
    found.len()
}

fn revoke(broker: &Broker, revoked: &Revoked, at_s: u64) -> usize {
    let Some(authenticator) = &broker.authenticator else { return 0 };
    // First it counts, then it is looked for: nobody slips in between.
    let added = authenticator.revocations.add(revoked, at_s, unix_s());
    if added.is_err() {
        warn!("too many revocations, one is not remembered here");
    }
    cut_revoked(broker, authenticator)
}

/// Closes the connections whose tokens are revoked, and has the others look at theirs for single channels.
pub fn cut_revoked(broker: &Broker, authenticator: &Authenticator) -> usize {
    let mut count = 0;
    for connection in all(broker) {
        match connection.holder().identity() {
            _ if connection.close_reason().is_some() => {}
            Some(identity) if authenticator.revocations.concern(&identity) => {
                connection.close(CloseReason::Revoked);
                count += 1;
            }
            Some(_) => connection.recheck_grants(),
            None => {}
        }
    }
    count
}

fn connection_json(connection: &Connection) -> Value {
    let (frames, bytes) = connection.depth();
    json!({
        "connection_id": connection.id(),
        "instance_id": connection.shared().instance_id,
        "user": connection.user(),
        "remote_address": connection.remote(),
        "connected_ms": connection.age_ms(),
        "subscriptions": connection.subscriptions.load(Ordering::Relaxed),
        "outbox": { "frames": frames, "bytes": bytes },
    })
}
