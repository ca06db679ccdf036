//! A bug in one connection's task (threat row 67).
//!
//! There is no way to have the gateway panic, so one is made: its log line about a new connection ends in a subscriber
//! that panics. The runtime has one thread, and the subscriber is that thread's.

use serde_json::json;
use tracing_subscriber::layer::{Context, SubscriberExt as _};

use crate::harness::{Client, Raw, await_metric, gateway, publish};
use crate::observe;

/// Panics in whatever task logs this message.
pub struct Trap(pub &'static str);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Trap {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut is_it = false;
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            is_it |= field.name() == "message" && format!("{value:?}") == self.0;
        });
        assert!(!is_it, "the trap: a panic at {}", self.0);
    }
}

#[tokio::test]
async fn a_panic_ends_one_connection_with_1011() {
    let gateway = gateway(&[]);
    let mut neighbour = Client::subscribed(&gateway, "c").await;
    {
        let _trap = tracing::subscriber::set_default(tracing_subscriber::registry().with(Trap("connected")));
        let mut unlucky = Raw::upgrade(&gateway, "/ws?channels=c", b"").await;
        assert_eq!(unlucky.close_frame().await, (1011, "internal error".to_owned()));
        assert_eq!(unlucky.frame().await, None);
    }
    for (series, value) in [
        ("hubcast_panics_total", 1.0),
        (r#"hubcast_connections_closed_total{reason="internal"}"#, 1.0),
        ("hubcast_connections", 1.0),
        ("hubcast_subscriptions", 1.0),
    ] {
        await_metric(&gateway, series, value).await;
    }
    publish(&gateway, "c", b"1").await;
    neighbour.expect(&json!({"type": "event", "channel": "c", "data": 1})).await;
    observe::threat(67, "1011, counted; a neighbour receives what is published afterwards");
}
