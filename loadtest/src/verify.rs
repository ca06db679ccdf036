//! `verify`: proves for a running deployment that nothing is lost in silence.
//!
//! Publishers number their messages and write down what they were answered ([`publisher`]); clients come and go and
//! write down all that they are told ([`client`]); the [`judge`] holds the two against each other. Exit code 0: proven;
//! 1: there are violations; 2: it could not be run.

mod client;
mod comeback;
mod evidence;
mod findings;
mod judge;
mod leftovers;
mod link;
mod message;
mod order;
mod place;
mod publisher;
mod stage;
mod told;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use hyper::Uri;
use hyper::http::uri::PathAndQuery;
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::machine::raise_file_limit;
use crate::options::{positive, rate};
use client::Client;
use findings::Evidence;
use link::Link;
use publisher::Publisher;
use stage::{Phase, Stage};

/// How long the first subscriptions may take.
const START: Duration = Duration::from_secs(30);

/// What clients write down takes 16 bytes a delivery; publishing ends early when this many have come.
const DELIVERIES_MAX: u64 = 50_000_000;

/// How often the run is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Exit codes.
const VIOLATED: u8 = 1;
const NOT_RUN: u8 = 2;

#[derive(Args)]
pub(crate) struct Options {
    /// Public listeners; each time a client connects it is to one at random
    #[arg(long = "url", value_delimiter = ',', default_value = "ws://127.0.0.1:8080", value_parser = public)]
    urls: Vec<String>,
    /// Internal listeners; a publisher stays with one while it answers
    #[arg(long = "api", value_delimiter = ',', default_value = "http://127.0.0.1:8081")]
    apis: Vec<String>,
    /// One of HUBCAST_API_KEYS, where they are set
    #[arg(long)]
    api_key: Option<String>,
    /// Channels are called this and a number: choose one that a rule of HUBCAST_CHANNEL_RULES matches
    #[arg(long, default_value = "verify:")]
    prefix: String,
    /// Channels
    #[arg(long, default_value_t = 4, value_parser = positive)]
    channels: usize,
    /// Channels of each client; all if not given
    #[arg(long, value_parser = positive)]
    subscriptions: Option<usize>,
    /// Clients
    #[arg(long, default_value_t = 20, value_parser = positive)]
    clients: usize,
    /// Clients among these that leave and come back on purpose, half of them without a close
    #[arg(long, default_value_t = 5)]
    leavers: usize,
    /// How long a leaver stays on average, in seconds
    #[arg(long, default_value_t = 3.0, value_parser = rate)]
    stay: f64,
    /// A connection on which nothing came for so long is given up, in seconds; a ping is sent five times as often
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    silence: f64,
    /// Publishers; each has one request under way at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    publishers: u16,
    /// Messages a second, of all publishers together
    #[arg(long, default_value_t = 500.0, value_parser = rate)]
    rate: f64,
    /// Messages of one request
    #[arg(long, default_value_t = 1, value_parser = positive)]
    batch: usize,
    /// Send Idempotency-Key, and repeat a request until its outcome is known
    #[arg(long)]
    idempotent: bool,
    /// How long to publish, in seconds; SIGINT or SIGTERM ends it sooner
    #[arg(long, default_value_t = 20.0, value_parser = rate)]
    seconds: f64,
    /// How long what is under way may take at the end, in seconds
    #[arg(long, default_value_t = 5.0, value_parser = rate)]
    settle: f64,
    /// Bytes of JSON in each message
    #[arg(long, default_value_t = 128, value_parser = size)]
    size: usize,
    /// Who leaves when, and who connects where, follows from this; drawn if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Check that connections and channels are back to 0 at every --api within so many seconds; for deployments without other clients
    #[arg(long, value_parser = rate)]
    leftovers: Option<f64>,
    /// Write the report as JSON to a file, or to standard output with -
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the report as one self-contained page
    #[arg(long)]
    html: Option<PathBuf>,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
}

/// The address of a public listener; its path is `/ws` if none is given.
fn public(text: &str) -> Result<String, String> {
    let uri: Uri = text.parse().map_err(|error| format!("{error}"))?;
    match (uri.scheme_str(), uri.path_and_query().map(PathAndQuery::as_str)) {
        (Some("ws" | "wss"), None | Some("/")) => Ok(format!("{}/ws", text.trim_end_matches('/'))),
        (Some("ws" | "wss"), Some(_)) => Ok(text.to_owned()),
        _ => Err("it begins with ws:// or wss://".to_owned()),
    }
}

fn size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(bytes) if bytes >= message::BYTES_MIN => Ok(bytes),
        _ => Err(format!("at least {} bytes, for the numbers in it", message::BYTES_MIN)),
    }
}

/// Runs it to its exit code.
pub(crate) fn run(options: &Options) -> ExitCode {
    match proves(options) {
        Ok(true) => {
            eprintln!("Proven for this run: what was acknowledged came once and in order, or its loss was told.");
            ExitCode::SUCCESS
        }
        Ok(false) => {
            eprintln!("Error: promises were not kept: see the violations");
            ExitCode::from(VIOLATED)
        }
        Err(error) => {
            eprintln!("Error: it could not be run: {error:#}");
            ExitCode::from(NOT_RUN)
        }
    }
}

fn proves(options: &Options) -> anyhow::Result<bool> {
    let evidence = tokio::runtime::Runtime::new()?.block_on(observe(options))?;
    let report = evidence.report(options);
    report.write(options.json.as_deref(), options.html.as_deref())?;
    Ok(report.violations.is_empty())
}

/// The whole run: all come, publish, wait, leave.
async fn observe(options: &Options) -> anyhow::Result<Evidence> {
    raise_file_limit();
    let seed = options.seed.unwrap_or_else(rand::random);
    let channels: Vec<_> = (0..options.channels).map(|channel| format!("{}{channel}", options.prefix)).collect();
    let stage = Arc::new(Stage::new(rand::random(), channels, options.size, options.urls.clone(), options.idempotent));
    let mut stop = Stop::new()?;
    let publishers = publishers(options, &stage)?;
    let mut clients = clients(options, &stage, seed);
    let subscriptions = options.clients * options.subscriptions();
    let mut is_stopped = await_start(&stage, &mut stop, subscriptions).await?;
    stage.enter(Phase::Publish);
    let mut publishing = JoinSet::new();
    for publisher in publishers {
        publishing.spawn(publisher.run());
    }
    let started = Instant::now();
    let bar = bar(options);
    let end = started + Duration::from_secs_f64(options.seconds);
    while !is_stopped && Instant::now() < end && stage.failure().is_none() {
        let deliveries = stage.tally.deliveries.load(Ordering::Relaxed);
        let acked = stage.tally.acked.load(Ordering::Relaxed);
        bar.set_position(started.elapsed().as_millis() as u64);
        bar.set_message(format!("{acked} acknowledged, {deliveries} delivered"));
        is_stopped = deliveries > DELIVERIES_MAX || stop.within(LOOK).await;
    }
    bar.finish_and_clear();
    stage.enter(Phase::Settle);
    let published_s = started.elapsed().as_secs_f64();
    let mut published = publishing.join_all().await;
    published.sort_unstable_by_key(|published| published.publisher);
    // A second signal is one to leave at once.
    if stop.within(Duration::from_secs_f64(options.settle)).await {
        eprintln!("stopped before what was under way could arrive");
    }
    stage.enter(Phase::Over);
    let mut logs = Vec::new();
    while let Some(log) = clients.join_next().await {
        logs.push(log?);
    }
    if let Some(why) = stage.failure() {
        bail!("{why}");
    }
    logs.sort_unstable_by_key(|(client, _)| *client);
    let leftovers = leftovers(options).await?;
    let is_cut_short = is_stopped && published_s < options.seconds;
    let evidence = Evidence { stage, seed, published, logs, leftovers, published_s, is_cut_short };
    if let Some(complaint) = evidence.nothing_acked() {
        bail!("no publish was acknowledged: {complaint}");
    }
    Ok(evidence)
}

impl Options {
    /// Channels of each client.
    fn subscriptions(&self) -> usize {
        self.subscriptions.unwrap_or(self.channels).min(self.channels)
    }

    fn links(&self) -> anyhow::Result<Vec<Link>> {
        self.apis.iter().map(|api| Link::new(api, self.api_key.as_deref())).collect()
    }
}

fn publishers(options: &Options, stage: &Arc<Stage>) -> anyhow::Result<Vec<Publisher>> {
    let requests_per_second = options.rate / f64::from(options.publishers) / options.batch as f64;
    let interval = Duration::from_secs_f64(1.0 / requests_per_second);
    let publisher = |number| {
        let links = options.links()?;
        Ok(Publisher::new(Arc::clone(stage), number, links, options.batch, interval))
    };
    (0..options.publishers).map(publisher).collect()
}

/// What one client saw, with its number.
type Seen = (usize, Vec<(usize, evidence::Log)>);

fn clients(options: &Options, stage: &Arc<Stage>, seed: u64) -> JoinSet<Seen> {
    let mut clients = JoinSet::new();
    let silence = Duration::from_secs_f64(options.silence);
    for number in 0..options.clients {
        let channels: Vec<_> = (0..options.subscriptions()).map(|at| (number + at) % options.channels).collect();
        let stay = (number < options.leavers).then(|| Duration::from_secs_f64(options.stay));
        let random = StdRng::seed_from_u64(seed.wrapping_add(number as u64));
        let client = Client::new(Arc::clone(stage), &channels, stay, silence, random);
        clients.spawn(async move { (number, client.run().await) });
    }
    clients
}

/// Waits until every client is subscribed to all its channels. True if it shall stop.
async fn await_start(stage: &Stage, stop: &mut Stop, subscriptions: usize) -> anyhow::Result<bool> {
    let deadline = Instant::now() + START;
    loop {
        let live = stage.tally.live.load(Ordering::Relaxed);
        if let Some(why) = stage.failure() {
            bail!("{why}");
        }
        if live >= subscriptions {
            eprintln!("all {subscriptions} subscriptions are live");
            return Ok(false);
        }
        if Instant::now() > deadline {
            let failed = stage.tally.failed.load(Ordering::Relaxed);
            bail!("only {live} of {subscriptions} subscriptions came to be, {failed} connects failed");
        }
        if stop.within(LOOK).await {
            bail!("stopped before it began");
        }
    }
}

async fn leftovers(options: &Options) -> anyhow::Result<Vec<(String, String)>> {
    let mut leftovers = Vec::new();
    let Some(bound) = options.leftovers else { return Ok(leftovers) };
    for (api, mut link) in options.apis.iter().zip(options.links()?) {
        if let Some(held) = leftovers::await_none(&mut link, Duration::from_secs_f64(bound)).await {
            leftovers.push((api.clone(), held));
        }
    }
    Ok(leftovers)
}

/// SIGINT and SIGTERM.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn new() -> anyhow::Result<Self> {
        let signal = |kind| signal(kind).context("cannot listen to signals");
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for a while; true if a signal came.
    async fn within(&mut self, pause: Duration) -> bool {
        tokio::select! {
            _ = self.interrupt.recv() => true,
            _ = self.terminate.recv() => true,
            () = sleep(pause) => false,
        }
    }
}

fn bar(options: &Options) -> ProgressBar {
    if options.quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("publishing  {wide_bar} {percent:>3} % {msg}");
    ProgressBar::new((options.seconds * 1e3) as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
