//! The one integration binary: stories over real sockets, in reading order.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests document themselves and may panic")]
#![allow(
    clippy::too_many_lines,
    clippy::print_stdout,
    reason = "stories and tables are read top to bottom, and may report"
)]

mod binary;
mod harness;
mod issuer;
mod observe;
mod proxy;
mod redis_cluster;
mod redis_node;
mod redis_pair;
mod redis_server;
mod sentinels;
mod tls_redis;

mod admission;
mod api;
mod api_keys;
mod auth;
mod broadcast;
mod bundle;
mod cluster;
mod coalesce;
mod config;
mod continuity_instances;
mod continuity_judge;
mod continuity_model;
mod continuity_stories;
mod continuity_world;
mod deploy;
mod drain;
mod eviction_model;
mod eviction_world;
mod failover;
mod fault_stories;
mod fault_world;
mod faults;
mod floods;
mod history;
mod history_model;
mod history_pages;
mod history_room;
mod history_script;
mod history_storm;
mod hub_model;
mod inbox;
mod leases;
mod limits;
mod machine;
mod metrics;
mod origin;
mod outbox_model;
mod parked;
mod presence;
mod presence_model;
mod protocol;
mod proxies;
mod rates;
mod recovery;
mod redis;
mod registry;
mod servers;
mod shards;
mod slow;
mod slow_policies;
mod tidy;
mod tls;
mod together;
mod websocket;

mod fuzz;
mod hostile;
