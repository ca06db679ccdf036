//! What one run found: the summary on the terminal, `--json` and `--html` all print this.

use std::fmt;

use serde::Serialize;

/// One run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// The subcommand.
    pub command: &'static str,
    /// The question it answers, as one line.
    pub title: String,
    /// What was asked for: name and value.
    pub settings: Vec<(String, String)>,
    /// What was found.
    pub figures: Vec<Figure>,
    /// Latency distributions.
    pub latency: Vec<Curve>,
    /// One entry a second, oldest first.
    pub timeline: Vec<Second>,
    /// The steps of `capacity`, in the order they were tried; empty for the rest.
    pub capacity: Vec<Step>,
    /// What `verify` holds against the deployment, the first of each kind; empty for the rest.
    pub violations: Vec<Violation>,
    /// What the reader must know before believing the figures: the generator was the bottleneck, …
    pub notes: Vec<String>,
}

/// One number.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub name: String,
    pub value: f64,
    /// Empty, or the unit.
    pub unit: &'static str,
}

/// One latency distribution.
#[derive(Debug, Serialize)]
pub(crate) struct Curve {
    pub name: String,
    /// Deliveries counted.
    pub count: u64,
    /// Quantile (0 to 1, growing, up to 1 = the maximum) and latency in milliseconds.
    pub points: Vec<(f64, f64)>,
}

/// One second of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Second {
    pub at_s: f64,
    pub publications: u64,
    pub deliveries: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// Of one core, in percent; absent without `--server-pid`.
    pub server_cpu_percent: Option<f64>,
    pub own_cpu_percent: f64,
}

/// One rate that `capacity` tried.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    /// Publications a second that were offered.
    pub offered: f64,
    pub deliveries_per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub lost: u64,
    pub server_cpu_percent: Option<f64>,
    pub own_cpu_percent: f64,
    /// Whether latency, loss and rate stayed within bounds.
    pub held: bool,
}

/// A promise that was not kept.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Violation {
    pub kind: &'static str,
    /// Absent where it is not one channel's.
    pub channel: Option<String>,
    /// The number of the client that saw it.
    pub client: Option<usize>,
    /// Publisher and sequence number.
    pub message: Option<String>,
    /// What was seen around it.
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(channel) = &self.channel {
            write!(f, ", channel {channel}")?;
        }
        if let Some(client) = self.client {
            write!(f, ", client {client}")?;
        }
        if let Some(message) = &self.message {
            write!(f, ", message {message}")?;
        }
        write!(f, ": {}", self.text)
    }
}
