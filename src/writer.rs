//! What a flusher does with the frames it took from an outbox: as few system calls as possible.

use std::io::{self, IoSlice};
use std::sync::Arc;

use arrayvec::ArrayVec;

use crate::frame::{Frame, Role};

/// Most frames of one vectored write (`IOV_MAX` on Linux).
pub(crate) const WRITE_FRAMES_MAX: usize = 1024;

/// Batches up to this size are joined into one buffer: beyond it a copy costs more than the slices do.
const JOINED_BYTES_MAX: usize = 64 << 10;

/// The transport seam: the writer's only I/O. Readiness comes from the TCP socket.
pub trait Transport {
    /// Writes what fits without blocking.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing fits now; anything else ends the connection.
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Sends what the transport took and could not send yet; a plain socket never holds anything back. It sets
    /// `has_progress` if the socket took some of it.
    ///
    /// # Errors
    /// As [`Transport::try_write`].
    fn flush(&self, has_progress: &mut bool) -> io::Result<()> {
        let _ = has_progress;
        Ok(())
    }
}

/// Scratch space of one flusher, kept from flush to flush so that none allocates.
#[derive(Debug, Default)]
pub struct Writer {
    pub(crate) batch: Batch,
    joined: Joined,
    /// Messages completely written since the owner last reset it.
    pub frames_sent: u64,
    /// Bytes written since the owner last reset it.
    pub bytes_sent: u64,
    /// Writes that the socket took since the owner last reset it.
    pub writes: u64,
    /// Messages taken over from an outbox and dropped by a failing socket or a close, since the owner last reset it.
    pub frames_dropped: u64,
    /// When the first frame of the last batch was made (µs).
    pub oldest_us: u64,
}

/// The last batch of several frames as one buffer. Subscribers of a channel mostly wait for the same
/// frames, so it is made for the first one and serves the rest: one plain send instead of many slices.
#[derive(Debug, Default)]
struct Joined {
    frames: Vec<Arc<Frame>>,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) frames: Vec<Arc<Frame>>,
    /// Frames at the front that are sent.
    done: usize,
    /// Bytes of the frame after those that are sent.
    pub(crate) head_sent: usize,
    /// The socket took some bytes since the flush began.
    pub(crate) progress: bool,
    /// It was taken after the close frame was queued, so that is its last frame.
    pub(crate) has_close: bool,
}

impl Batch {
    pub(crate) fn clear(&mut self) {
        self.frames.clear();
        self.has_close = false;
        self.done = 0;
        self.head_sent = 0;
    }

    /// How many frames are sent.
    pub(crate) fn sent(&self) -> usize {
        self.done
    }

    pub(crate) fn unsent(&self) -> &[Arc<Frame>] {
        &self.frames[self.done..]
    }

    /// How many messages are not sent completely.
    pub(crate) fn messages_unsent(&self) -> usize {
        let mut sent = self.head_sent;
        self.unsent().iter().map(|frame| frame.messages_after(std::mem::take(&mut sent))).sum()
    }

    /// How many messages it drops if the rest is not sent: gaps are nothing that anybody published.
    pub(crate) fn dropped(&self) -> usize {
        let gaps = self.unsent().iter().filter(|frame| matches!(frame.role(), Role::Gap(_))).count();
        self.messages_unsent() - gaps
    }

    /// Keeps of what is unsent only the message that was begun; returns how many that drops.
    pub(crate) fn keep_begun(&mut self) -> usize {
        let before = self.dropped();
        let begun = self.unsent().first().and_then(|head| head.begun(self.head_sent));
        if begun.is_none() {
            self.head_sent = 0;
        }
        self.frames.truncate(self.done);
        self.frames.extend(begun);
        before - self.dropped()
    }

    /// One vectored write of all that is unsent; message borders are the frames' own.
    fn write_once(&self, transport: &impl Transport) -> io::Result<usize> {
        let mut slices = ArrayVec::<IoSlice<'_>, WRITE_FRAMES_MAX>::new();
        let mut skip = self.head_sent;
        for frame in self.unsent() {
            slices.push(IoSlice::new(&frame.bytes()[std::mem::take(&mut skip)..]));
        }
        transport.try_write(&slices)
    }

    /// Moves on by `written` bytes; returns how many messages that completed.
    fn advance(&mut self, written: usize) -> usize {
        let before = self.messages_unsent();
        self.progress = true;
        self.head_sent += written;
        while let Some(frame) = self.frames.get(self.done).filter(|frame| frame.len() <= self.head_sent) {
            self.head_sent -= frame.len();
            self.done += 1;
        }
        before - self.messages_unsent()
    }
}

impl Writer {
    /// Writes the batch until it is sent or the socket refuses.
    pub(crate) fn write(&mut self, transport: &impl Transport) -> io::Result<()> {
        let mut is_joined = self.joined.hold(&self.batch);
        while self.batch.done < self.batch.frames.len() {
            let result = match std::mem::take(&mut is_joined) {
                true => transport.try_write(&[IoSlice::new(&self.joined.bytes)]),
                false => self.batch.write_once(transport),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.writes += 1;
                    self.bytes_sent += written as u64;
                    self.frames_sent += self.batch.advance(written) as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Joined {
    /// Makes the buffer hold a batch from its first byte on, if that is worth it.
    fn hold(&mut self, batch: &Batch) -> bool {
        if batch.frames.len() < 2 || batch.head_sent > 0 {
            return false;
        }
        let is_same = |(ours, theirs): (&Arc<Frame>, &Arc<Frame>)| Arc::ptr_eq(ours, theirs);
        if self.frames.len() == batch.frames.len() && self.frames.iter().zip(&batch.frames).all(is_same) {
            return true;
        }
        if batch.frames.iter().map(|frame| frame.len()).sum::<usize>() > JOINED_BYTES_MAX {
            return false;
        }
        self.frames.clone_from(&batch.frames);
        self.bytes.clear();
        batch.frames.iter().for_each(|frame| self.bytes.extend_from_slice(frame.bytes()));
        true
    }
}
