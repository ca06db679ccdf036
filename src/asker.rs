//! Whoever asks what only a task can answer: a client by its socket, or an HTTP request.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::broker::Broker;
use crate::connection::Connection;
use crate::event;
use crate::fanout::Fanout;
use crate::frame::Frame;
use crate::protocol::Refusal;

/// Who asks.
#[derive(Debug)]
pub enum Asker {
    /// A client, with its command's id.
    Socket(Arc<Connection>, Option<Box<str>>),
    /// An HTTP request.
    Http(oneshot::Sender<Answer>),
}

/// The members of a JSON object, without its braces; or why there are none.
pub type Answer = Result<Arc<str>, Refusal>;

/// Sends an answer to all who asked, with one flush; `frame` puts it behind the id of a client's command.
pub fn reply(broker: &Broker, askers: Vec<Asker>, answer: &Answer, frame: impl Fn(Option<&str>, &str) -> Arc<Frame>) {
    let mut fanout = Fanout::default();
    for asker in askers {
        match asker {
            // An asker that is gone needs no answer.
            Asker::Http(sender) => drop(sender.send(answer.clone())),
            Asker::Socket(connection, id) => {
                let frame = match answer {
                    Ok(body) => frame(id.as_deref(), body),
                    Err(refusal) => event::error(id.as_deref(), refusal, None),
                };
                fanout.reply(&connection, &frame);
            }
        }
    }
    // As with publishes: late askers are not waited for, the queue bounds what they have outstanding.
    broker.shared.lanes.submit(&mut fanout);
    broker.shared.lanes.made_progress();
}
