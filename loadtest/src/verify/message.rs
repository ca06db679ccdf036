//! What a message of this command looks like: it says who published it where, and is checked byte for byte.

use serde::Deserialize;

use super::evidence::MessageId;

/// The least data that holds every number.
pub(crate) const BYTES_MIN: usize = 112;

#[derive(Deserialize)]
struct Data<'a> {
    run: &'a str,
    publisher: u16,
    sequence: u32,
}

/// The data of one message: JSON of `size` bytes.
pub(crate) fn data(run: u64, channel: usize, id: MessageId, size: usize) -> String {
    let MessageId { publisher, sequence } = id;
    let mut data =
        format!(r#"{{"run":"{run:016x}","channel":{channel},"publisher":{publisher},"sequence":{sequence},"pad":""#);
    data.extend(std::iter::repeat_n('x', size.saturating_sub(data.len() + 2)));
    data.push_str("\"}");
    data
}

/// Whose message it is; if it is none of this run and channel, or altered, what it looks like.
pub(crate) fn identify(data: &str, run: u64, channel: usize, size: usize) -> Result<MessageId, String> {
    const SHOWN_BYTES: usize = 80;
    let shown = || data.chars().take(SHOWN_BYTES).collect::<String>();
    let told: Data<'_> = serde_json::from_str(data).map_err(|_| shown())?;
    if told.run != format!("{run:016x}") {
        return Err(format!("of another run: {}", shown()));
    }
    let id = MessageId { publisher: told.publisher, sequence: told.sequence };
    if self::data(run, channel, id, size) == data {
        Ok(id)
    } else {
        Err(format!("altered, or of another channel: {}", shown()))
    }
}
