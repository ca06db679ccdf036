//! The one integration binary: stories over real sockets, in reading order.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests document themselves and may panic")]

mod harness;

mod broadcast;
mod protocol;
