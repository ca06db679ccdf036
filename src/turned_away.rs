//! How a connection that was not admitted is told so: without HTTP's machinery, because a storm of them must
//! cost less than those who are let in.

use std::io::{self, Write as _};
use std::time::Duration;

use hyper::StatusCode;
use serde_json::json;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::admission::Denied;
use crate::metrics::Refused;
use crate::protocol::ErrorCode;

/// How long the request may take to begin, and then the peer to go.
const WAIT: Duration = Duration::from_secs(1);

/// What is read of the request, and thrown away: unread bytes would make the answer's end a reset.
const READ_BYTES_MAX: usize = 16 << 10;

impl Denied {
    /// 429 if it is the client's own doing, else 503.
    pub fn status(&self) -> StatusCode {
        match self.why {
            Refused::AddressConnections | Refused::AddressRate | Refused::UserConnections | Refused::UserRate => {
                StatusCode::TOO_MANY_REQUESTS
            }
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The error code in the answer's body.
    pub fn code(&self) -> ErrorCode {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS => ErrorCode::RateLimited,
            _ => ErrorCode::Unavailable,
        }
    }

    fn response(&self) -> String {
        let body = json!({"error": {"code": self.code().as_str(), "message": self.message()}}).to_string();
        format!(
            "HTTP/1.1 {}\r\nRetry-After: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}\n",
            self.status(),
            self.retry_after_s(),
            body.len() + 1
        )
    }
}

/// Answers once the request has begun to arrive, and waits a moment for the peer to end the connection.
pub(crate) async fn tell(socket: std::net::TcpStream, denied: Denied) {
    let Ok(socket) = TcpStream::from_std(socket) else { return };
    let _ = timeout(WAIT, socket.readable()).await;
    let _ = socket.try_write(denied.response().as_bytes());
    let _ = SockRef::from(&socket).shutdown(std::net::Shutdown::Write);
    let _ = timeout(WAIT, discard(&socket)).await;
}

/// Answers as far as that can be done without waiting.
pub(crate) fn tell_now(mut socket: &std::net::TcpStream, denied: &Denied) {
    // A fresh socket takes it whole; one that does not is gone.
    let _ = socket.write(denied.response().as_bytes());
}

async fn discard(socket: &TcpStream) {
    let mut left = READ_BYTES_MAX;
    let mut buffer = [0; 1024];
    while socket.readable().await.is_ok() {
        match socket.try_read(&mut buffer) {
            Ok(len) if len > 0 && len < left => left -= len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}
