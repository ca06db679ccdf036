//! Who is in a channel: questions of sockets and the API, answered by one task.
//!
//! It takes all questions that wait, asks once for those that are the same, and asks side by side: the link carries
//! them as one. An answer can be older than a join that its reader has seen, never older than a leave: that is told
//! after the debounce only, which is longer than Redis may take to answer.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::warn;

use crate::asker::{self, Answer, Asker};
use crate::broker::Broker;
use crate::event;
use crate::presence::Store;
use crate::presence_store::{Member, Page};
use crate::protocol::{ErrorCode, Refusal};

/// Questions that can wait; whoever asks beyond it is told to come again.
const QUESTIONS_MAX: usize = 1024;

/// Questions that are asked at once.
const BATCH_QUESTIONS: usize = 64;

/// The receiving side, to be run by [`run`].
pub type Questions = mpsc::Receiver<Question>;

/// A question, and who asks.
#[derive(Debug)]
pub struct Question {
    subject: Subject,
    asker: Asker,
}

/// What is asked: the same for many.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Subject {
    channel: Box<str>,
    after: Option<Member>,
    limit: usize,
}

impl Question {
    /// A question for a page of a channel.
    ///
    /// # Errors
    /// `bad_request` if `page` is not a token that an answer had.
    pub fn new(channel: &str, limit: usize, page: Option<&str>, asker: Asker) -> Result<Self, Refusal> {
        let after = page.map(|token| parse_token(token).ok_or_else(|| bad_request("page is not a page token")));
        let subject = Subject { channel: channel.into(), after: after.transpose()?, limit };
        Ok(Self { subject, asker })
    }

    /// The queue of questions.
    pub(crate) fn queue() -> (mpsc::Sender<Self>, Questions) {
        mpsc::channel(QUESTIONS_MAX)
    }
}

fn bad_request(message: &'static str) -> Refusal {
    Refusal::new(ErrorCode::BadRequest, message)
}

/// Presence cannot be read now.
pub fn unavailable() -> Refusal {
    let message = "who is here cannot be read now";
    Refusal { retry_after_ms: Some(1000), ..Refusal::new(ErrorCode::Unavailable, message) }
}

fn token(member: &Member) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(member.as_str())
}

fn parse_token(token: &str) -> Option<Member> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).ok()?;
    Member::parse(str::from_utf8(&bytes).ok()?)
}

/// Answers questions until the runtime ends.
pub async fn run(broker: Arc<Broker>, mut questions: Questions) {
    let mut batch = Vec::new();
    while questions.recv_many(&mut batch, BATCH_QUESTIONS).await > 0 {
        let mut askers = HashMap::<_, Vec<_>>::new();
        for Question { subject, asker } in batch.drain(..) {
            askers.entry(subject).or_default().push(asker);
        }
        let mut running = JoinSet::new();
        for (subject, askers) in askers {
            let broker = Arc::clone(&broker);
            running.spawn(async move { (askers, look(&broker, &subject).await) });
        }
        while let Some(done) = running.join_next().await {
            if let Ok((askers, answer)) = done {
                asker::reply(&broker, askers, &answer, event::presence);
            }
        }
    }
}

async fn look(broker: &Broker, subject: &Subject) -> Answer {
    let Subject { channel, after, limit } = subject;
    // One more says whether there is another page.
    let fetched = if *limit == 0 { 0 } else { limit + 1 };
    let mut page = match &broker.shared.presence.store {
        Store::Memory(store) => store.page(channel, after.as_ref(), fetched),
        Store::Redis(store) => store.page(channel, after.as_ref(), fetched).await.map_err(|error| {
            warn!(%error, "presence cannot be read");
            unavailable()
        })?,
    };
    let is_more = page.members.len() > *limit;
    page.members.truncate(*limit);
    let next = page.members.last().filter(|_| is_more).map(token);
    Ok(body(channel, &page, next.as_deref()).into())
}

/// `"channel":…,"users":…,"connections":…,"members":[…],"page":…`
fn body(channel: &str, page: &Page, next: Option<&str>) -> String {
    #[derive(Serialize)]
    struct Listed<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        user: Option<&'a str>,
        connection_id: &'a str,
    }
    let listed =
        |member: &Member| json!(Listed { user: member.user(), connection_id: member.connection_id() }).to_string();
    let members: Vec<_> = page.members.iter().map(listed).collect();
    format!(
        r#""channel":"{channel}","users":{},"connections":{},"members":[{}],"page":{}"#,
        page.users,
        page.connections,
        members.join(","),
        json!(next)
    )
}
