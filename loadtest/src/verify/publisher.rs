//! A publisher: numbers its messages, publishes them one request after the other, and writes down what it was answered.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};

use super::evidence::{Mark, MessageId, Outcome, Publication};
use super::link::{Link, Reply};
use super::message;
use super::stage::{Phase, Stage};

/// After a refusal, and before an unknown outcome is asked for again.
const REST: Duration = Duration::from_millis(100);

/// With an idempotency key: how often one request is sent.
const ATTEMPTS: usize = 20;

/// A publisher that is later than this does not make up for it.
const LATE_MAX: Duration = Duration::from_secs(1);

/// The codes that say that nothing was sent, whatever came of the rest of the request.
const REFUSALS: [&str; 6] = ["bad_request", "forbidden", "too_large", "limit_exceeded", "rate_limited", "unavailable"];

pub(crate) struct Publisher {
    stage: Arc<Stage>,
    number: u16,
    /// One to each instance; the first that answers is stayed with.
    links: Vec<Link>,
    link: usize,
    /// Messages of one request.
    batch: usize,
    /// Between two requests.
    interval: Duration,
    /// Messages so far.
    count: usize,
    /// By channel, then by sequence number.
    published: Vec<Vec<Publication>>,
    /// The last refusal or failure.
    complaint: Option<String>,
}

/// What a publisher wrote down.
pub(crate) struct Published {
    pub publisher: u16,
    /// By channel, then by sequence number.
    pub by_channel: Vec<Vec<Publication>>,
    /// The last refusal or failure.
    pub complaint: Option<String>,
}

#[derive(Deserialize)]
struct Results<'a> {
    #[serde(borrow)]
    results: Vec<OneResult<'a>>,
}

#[derive(Deserialize)]
struct OneResult<'a> {
    cursor: Option<&'a str>,
    error: Option<ResultError>,
}

#[derive(Deserialize)]
struct ResultError {
    code: String,
    /// `unknown`, where it is.
    outcome: Option<String>,
}

/// What is known of each message of a request.
type Outcomes = Vec<(Outcome, Mark)>;

impl Publisher {
    pub(crate) fn new(stage: Arc<Stage>, number: u16, links: Vec<Link>, batch: usize, interval: Duration) -> Self {
        let published = vec![Vec::new(); stage.channels.len()];
        let link = usize::from(number) % links.len();
        Self { stage, number, links, link, batch, interval, count: 0, published, complaint: None }
    }

    /// Publishes on its schedule until the run settles.
    pub(crate) async fn run(mut self) -> Published {
        let mut due = Instant::now() + self.interval.mul_f64(f64::from(self.number % 16) / 16.0);
        let mut phase = self.stage.watch();
        loop {
            tokio::select! {
                _ = phase.wait_for(|phase| *phase > Phase::Publish) => break,
                () = sleep_until(due) => {}
            }
            self.publish().await;
            due = (due + self.interval).max(Instant::now().checked_sub(LATE_MAX).unwrap_or(due));
        }
        Published { publisher: self.number, by_channel: self.published, complaint: self.complaint }
    }

    /// Publishes the next messages; channels take turns.
    async fn publish(&mut self) {
        let mut ids = Vec::with_capacity(self.batch);
        let mut body = r#"{"messages":["#.to_owned();
        let started_us = self.stage.now_us();
        for at in 0..self.batch {
            let channel = (usize::from(self.number) + self.count) % self.stage.channels.len();
            self.count += 1;
            let published = &mut self.published[channel];
            let id = MessageId { publisher: self.number, sequence: published.len() as u32 };
            let (outcome, cursor) = (Outcome::Unknown, Mark::NONE);
            published.push(Publication { started_us, ended_us: u64::MAX, outcome, cursor });
            ids.push((channel, id));
            let data = message::data(self.stage.run, channel, id, self.stage.size);
            let comma = if at > 0 { "," } else { "" };
            // Writing to a string does not fail.
            let _ = write!(body, r#"{comma}{{"channel":"{}","data":{data}}}"#, self.stage.channels[channel]);
        }
        body.push_str("]}");
        let outcomes = self.send(&body).await;
        let ended_us = self.stage.now_us();
        for ((channel, id), (outcome, cursor)) in ids.into_iter().zip(outcomes) {
            let publication = &mut self.published[channel][id.sequence as usize];
            (publication.ended_us, publication.outcome, publication.cursor) = (ended_us, outcome, cursor);
            self.stage.tally.acked.fetch_add(u64::from(outcome == Outcome::Acked), Ordering::Relaxed);
        }
    }

    /// Sends a request; with an idempotency key again and again, until its outcome is known.
    async fn send(&mut self, body: &str) -> Outcomes {
        let key = format!("{:016x}-{}-{}", self.stage.run, self.number, self.count);
        let header = [("idempotency-key", key.as_str())];
        let headers = if self.stage.idempotent { &header[..] } else { &[] };
        let mut known: Outcomes = vec![(Outcome::Refused, Mark::NONE); self.batch];
        for _ in 0..ATTEMPTS {
            let reply = self.links[self.link].request(Method::POST, "/api/publish", headers, body).await;
            let news = self.outcomes(&reply);
            for (known, news) in known.iter_mut().zip(news) {
                *known = match (known.0, news.0) {
                    (Outcome::Acked, _) => *known,
                    (_, Outcome::Acked) => news,
                    // Whatever came of a later attempt, an earlier one may have been sent.
                    (Outcome::Unknown, _) => *known,
                    (Outcome::Refused, _) => news,
                };
            }
            if known.iter().all(|(outcome, _)| *outcome == Outcome::Acked) {
                break;
            }
            if !matches!(reply, Reply::Answered(..)) {
                self.link = (self.link + 1) % self.links.len();
            }
            self.stage.pause(REST, Phase::Over).await;
            let is_unknown = known.iter().any(|(outcome, _)| *outcome == Outcome::Unknown);
            if !self.stage.idempotent || !is_unknown || self.stage.phase() == Phase::Over {
                break;
            }
        }
        known
    }

    /// What an answer says of each message.
    fn outcomes(&mut self, reply: &Reply) -> Outcomes {
        let all = |outcome| vec![(outcome, Mark::NONE); self.batch];
        let (status, body) = match reply {
            Reply::Answered(status, body) => (*status, body),
            Reply::Unsent(why) => {
                self.complaint = Some(why.clone());
                return all(Outcome::Refused);
            }
            Reply::Unknown(why) => {
                self.complaint = Some(why.clone());
                return all(Outcome::Unknown);
            }
        };
        if status != StatusCode::OK {
            self.complaint = Some(format!("{status} {}", String::from_utf8_lossy(body).trim()));
        }
        match serde_json::from_slice::<Results<'_>>(body) {
            Ok(Results { results }) if results.len() == self.batch => results.iter().map(outcome).collect(),
            _ if status.is_client_error() || status == StatusCode::SERVICE_UNAVAILABLE => all(Outcome::Refused),
            _ => all(Outcome::Unknown),
        }
    }
}

fn outcome(result: &OneResult<'_>) -> (Outcome, Mark) {
    let outcome = match &result.error {
        None => Outcome::Acked,
        Some(error) if error.outcome.is_none() && REFUSALS.contains(&error.code.as_str()) => Outcome::Refused,
        Some(_) => Outcome::Unknown,
    };
    (outcome, Mark::of(result.cursor))
}
