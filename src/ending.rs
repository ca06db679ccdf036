//! How a connection ends: our close frame, the end of our side, the end of the peer's.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use crate::close::CloseReason;
use crate::connection::Connection;
use crate::writer::Writer;

/// How long the close frame may take to leave (design section 3, "Closing"). After a drain everything
/// accepted goes first, so a reader has longer.
const CLOSE_SEND_TIME: Duration = Duration::from_secs(1);
const DRAIN_SEND_TIME: Duration = Duration::from_secs(10);

/// How long the peer may take to end the connection after our close frame.
const CLOSE_WAIT_TIME: Duration = Duration::from_secs(5);

/// What is read and thrown away after our close frame, so that no reset overtakes it.
const DISCARD_BYTES_MAX: usize = 1 << 20;

/// Of that, at once.
const DISCARD_READ_BYTES: usize = 4096;

/// The pause before more of it is read, where there is more: whoever was closed for sending too much sends on at full speed.
const DISCARD_REST: Duration = Duration::from_millis(1);

/// Ends the connection in the order of RFC 6455 §7.1.1: our close frame, end of our side, the peer's end.
/// True if it came to that.
pub(crate) async fn finish(connection: &Connection) -> bool {
    let reason = connection.close_reason();
    let send_time = if reason == Some(&CloseReason::Drain) { DRAIN_SEND_TIME } else { CLOSE_SEND_TIME };
    let mut writer = Writer::default();
    let sent = timeout(send_time, std::future::poll_fn(|context| connection.poll_finish(context, &mut writer))).await;
    connection.shared().metrics.flushed(&mut writer);
    if sent.is_err() || connection.has_failed() {
        connection.cut();
        return false;
    }
    let _ = timeout(CLOSE_SEND_TIME, connection.socket().end_writing()).await;
    timeout(CLOSE_WAIT_TIME, discard_input(connection)).await.unwrap_or(false)
}

/// Reads until the peer ends the connection (true), or has sent too much.
async fn discard_input(connection: &Connection) -> bool {
    let mut budget = DISCARD_BYTES_MAX;
    loop {
        if connection.socket().tcp().readable().await.is_err() {
            return true;
        }
        match connection.socket().tcp().try_read(&mut [0; DISCARD_READ_BYTES]) {
            Ok(0) => return true,
            Ok(len) if len >= budget => return false,
            Ok(len) => {
                budget -= len;
                if len == DISCARD_READ_BYTES {
                    tokio::time::sleep(DISCARD_REST).await;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The close frame was sent; a peer that resets afterwards has ended the connection all the same.
            Err(_) => return true,
        }
    }
}
