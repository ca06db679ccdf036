//! Hubcast: a high-throughput WebSocket broadcast gateway.
//!
//! # One message, from a publish to the sockets
//! 1. `session` (a socket), `api` (HTTP) or `multiplexer` (Redis) has the payload, and gives it to `broker`;
//! 2. `channel`, found by `hub`, puts it in its order; a socket's waits there for others (`bundle`) until the lane's turn;
//! 3. `channel` walks its subscribers under its order lock, `publication` encodes once per wire format;
//! 4. `outbox` queues the frame and says who must be flushed;
//! 5. `lanes` write each scheduled outbox at once (`writer`) to its `socket`.
//!
//! Where somebody has no room, what Redis brings for his channels waits in `parked`, and the link goes on.
//! Where a socket refuses and its queue (`backlog`) is full, `eviction` decides what goes if the channels' rules
//! (`slow_policy`) let something go, and `telling` knows how far the client was told. With a history it is `behind` then,
//! and `channel_past` brings it up again.
//!
//! # One command, from a socket to its reply
//! `accepting` (a thread) → `listen` (`admission`, `proxy_protocol`, `tls`, `handshake`, `origin`, `proxies`) → `session` (read, `websocket` frames) → `protocol` (typed command) →
//! `dispatch` (carried out, answered) → `hub` (join, or leave) → with Redis, `multiplexer` confirms the channel and lets the
//! subscriber in.
//!
//! # Who it is, and what it may do
//! `listen` (a token in the handshake) or `pass` (by a command) → `authenticator` (`jwt` by keys of `auth_config`, `jwks`; not those of
//! `revocation`) → `identity` (user, capabilities: `pattern`s) → `access`, which decides from it and the channel's rule, for each command.
//!
//! # How much of it
//! `admission` (before the upgrade: `guests`, by address and user) → `allowance` (what one connection may do, in `meter`s; on a `tab`,
//! what those of its user, address and instance may together) → `ledger` (what waits in all) → `memory` (nobody new, then who is slow goes).
//!
//! # One request, from the API to all instances
//! `api` (HTTP; `api_keys` say who may, answers in `answer`) → `actions` → `admin` (what this instance does) and `cluster` (envelopes through Redis to
//! those that `registry` knows) → their `admin`.
//!
//! # One join, from a subscription to the others in the channel
//! `channel` (the subscriber is in) → `presence` (noted) → `presence_writer` (what is the case, in batches) →
//! `presence_store` in memory, or `presence_redis` (scripts, which publish) → `multiplexer` → `channel`, in its order.
//! Whoever asks who is here is answered by `presence_reader`.
//!
//! # Continuity of a channel with history
//! Without Redis: `history_memory` keeps the chains of `history_store`, and `channel_past` lets in who joins.
//! With it: `publisher` → `history_redis` (scripts, which publish) → `multiplexer` → `following`, which guards `continuity`
//! (with `losses`, its other half, and `hold` and `joining`, where messages and subscribers wait for a read) and carries
//! out what that asks for: it tells `channel`, lets in who waited, and has `repair` read at Redis.
//! `history_view` says what is told of a read; `replay` encodes it once.
//!
//! # Where a channel is at Redis
//! `topology` says which server and by which name; `servers` has the way to each. `redis_tasks` starts a `multiplexer` and a
//! `publisher` for each; where the servers change, `redis_sentinel` or `redis_cluster` looks for them and `redis_link` follows.
//!
//! # Invariants
//! 1. Hub, channel, outbox, protocol, event and websocket do no I/O; hub and protocol never await.
//! 2. After the upgrade a socket is written only by whoever holds its outbox's write right
//!    (TLS records that it holds back are `socket`'s); only
//!    `multiplexer`, `listening`, `publisher`, `inbox`, `registry`, `registry_writer`, `commands`, `presence_redis` (through it `presence_writer`),
//!    `revocation`, `history_redis` (through it `repair` and `history_reader`), `replication` and the `redis_*` modules know Redis; only `config` reads the environment.
//! 3. Every queue has a bound and a named policy when full.
//! 4. A publication is encoded once per wire format, however many subscribers it has.
//! 5. One order per channel: a publication's walk, joins and leaves run whole under the channel's lock.
//!    Lock order: a channel's past (in memory) or following (at Redis), shard, channel, outbox.
//! 6. Each count that goes up is a guard that brings it down. Losing a connection is O(its subscriptions).
//! 7. No lock is held across an await, and nothing on the way from a publish to the sockets awaits Redis
//!    except the publish itself.
//! 8. A subscriber is told `subscribed` only when the channel is live.

pub mod accepting;
pub mod auth_config;
pub mod config;
pub mod edge_config;
pub mod gateway;
pub mod limits_config;
pub mod listen;
pub mod variables;

pub mod admission;
pub mod allowance;
pub mod guests;
pub mod ledger;
pub mod memory;
pub mod meter;
pub mod tab;
pub mod turned_away;
pub mod waiting;

pub mod access;
pub mod authenticator;
pub mod identity;
pub mod jwks;
pub mod jwt;
pub mod pass;
pub mod pattern;
pub mod revocation;
pub mod token;

pub mod dispatch;
pub mod ending;
pub mod handshake;
pub mod origin;
pub mod proxies;
pub mod proxy_protocol;
pub mod session;
pub mod tls;
pub mod websocket;

pub mod event;
pub mod protocol;
pub mod rules;

pub mod actions;
pub mod admin;
pub mod answer;
pub mod api;
pub mod api_keys;
pub mod asker;
pub mod broker;
pub mod bundle;
pub mod health;
pub mod publication;

pub mod channel;
pub mod channel_past;
pub mod fanout;
pub mod hub;
pub mod members;
pub mod pending;
pub mod ticket;

pub mod backlog;
pub mod behind;
pub mod caller;
pub mod close;
pub mod connection;
pub mod eviction;
pub mod frame;
pub mod lanes;
pub mod outbox;
pub mod outbox_state;
pub mod shared;
pub mod slow_policy;
pub mod socket;
pub mod telling;
pub mod writer;

pub mod cluster;
pub mod commands;
pub mod control;
pub mod fence;
pub mod inbox;
pub(crate) mod listening;
pub mod multiplexer;
pub mod parked;
pub mod publisher;
pub mod redis_cluster;
pub mod redis_config;
pub mod redis_link;
pub mod redis_sentinel;
pub mod redis_tasks;
pub mod registry;
pub mod registry_writer;
pub mod servers;
pub mod topology;
pub mod upstream;

pub mod continuity;
pub mod cursor;
pub mod following;
pub mod history_memory;
pub mod history_reader;
pub mod history_redis;
pub mod history_store;
pub mod history_view;
pub(crate) mod hold;
pub(crate) mod joining;
pub(crate) mod losses;
pub mod repair;
pub mod replay;
pub mod replication;

pub mod presence;
pub mod presence_reader;
pub mod presence_redis;
pub mod presence_store;
pub mod presence_writer;

pub mod clock;
pub mod labels;
pub mod metrics;
pub mod reload;
pub mod sharded;
