//! What a deployment still holds after all clients have left: nothing, within a bound.

use std::time::Duration;

use hyper::{Method, StatusCode};
use tokio::time::{Instant, sleep};

use super::link::{Link, Reply};

/// The gauges that go back to zero.
const GAUGES: [&str; 2] = ["hubcast_connections", "hubcast_channels"];

/// How often they are looked at.
const INTERVAL: Duration = Duration::from_millis(200);

/// Waits until an instance holds nothing any more; says what it still holds at the end of the bound, if anything.
pub(crate) async fn await_none(link: &mut Link, bound: Duration) -> Option<String> {
    let deadline = Instant::now() + bound;
    loop {
        let held = match link.request(Method::GET, "/metrics", &[], "").await {
            Reply::Answered(StatusCode::OK, body) => held(&String::from_utf8_lossy(&body)),
            Reply::Answered(status, _) => Some(format!("/metrics answers {status}")),
            Reply::Unsent(why) | Reply::Unknown(why) => Some(format!("/metrics does not answer: {why}")),
        };
        if held.is_none() || Instant::now() >= deadline {
            return held;
        }
        sleep(INTERVAL).await;
    }
}

/// The gauges that are not zero, in words; none if all are.
fn held(metrics: &str) -> Option<String> {
    let value = |gauge: &str| metrics.lines().find_map(|line| line.strip_prefix(gauge)?.strip_prefix(' '));
    let held = GAUGES.iter().filter_map(|gauge| match value(gauge) {
        Some("0") => None,
        Some(value) => Some(format!("{gauge} {value}")),
        None => Some(format!("no {gauge}")),
    });
    let held = held.collect::<Vec<_>>().join(", ");
    (!held.is_empty()).then_some(held)
}
