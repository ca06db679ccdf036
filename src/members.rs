//! The subscriber set of one channel: segments of slots with stable positions.
//!
//! Joining and leaving are O(1) at any size: a slot that is left is reused, nobody else moves,
//! and a join copies at most one segment when it grows. A segment that empties gives its memory
//! back, so a channel that once was big is neither slow to walk nor expensive to keep.

/// Slots of a segment: 8 KiB of pointers.
const SEGMENT_SLOTS: usize = 1024;

/// Where a member is; valid until it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u64);

impl Position {
    /// The position as a number below 2^63, for an atomic.
    pub fn to_u64(self) -> u64 {
        self.0
    }

    /// The position of a number from [`Position::to_u64`].
    pub fn from_u64(number: u64) -> Self {
        Self(number)
    }
}

/// A set of members.
#[derive(Debug)]
pub struct Members<S> {
    segments: Vec<Segment<S>>,
    /// Segments with a free slot.
    open: Vec<usize>,
    len: usize,
}

#[derive(Debug)]
struct Segment<S> {
    slots: Vec<Option<S>>,
    free: Vec<u16>,
}

impl<S> Default for Members<S> {
    fn default() -> Self {
        Self { segments: Vec::new(), open: Vec::new(), len: 0 }
    }
}

impl<S> Members<S> {
    /// How many members there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a member.
    pub fn insert(&mut self, member: S) -> Position {
        let index = *self.open.last().unwrap_or(&self.segments.len());
        if index == self.segments.len() {
            self.segments.push(Segment { slots: Vec::new(), free: Vec::new() });
            self.open.push(index);
        }
        let segment = &mut self.segments[index];
        let slot = match segment.free.pop() {
            Some(slot) => {
                segment.slots[usize::from(slot)] = Some(member);
                usize::from(slot)
            }
            None => {
                segment.slots.push(Some(member));
                segment.slots.len() - 1
            }
        };
        if segment.is_full() {
            self.open.pop();
        }
        self.len += 1;
        Position((index * SEGMENT_SLOTS + slot) as u64)
    }

    /// Removes the member at a position that [`Members::insert`] gave and that was not removed yet.
    pub fn remove(&mut self, position: Position) -> Option<S> {
        let (index, slot) = (position.0 as usize / SEGMENT_SLOTS, position.0 as usize % SEGMENT_SLOTS);
        let segment = self.segments.get_mut(index)?;
        let was_full = segment.is_full();
        let member = segment.slots.get_mut(slot)?.take()?;
        segment.free.push(slot as u16);
        if segment.free.len() == segment.slots.len() {
            *segment = Segment { slots: Vec::new(), free: Vec::new() };
        }
        if was_full {
            self.open.push(index);
        }
        self.len -= 1;
        Some(member)
    }

    /// Takes all members out, in no particular order.
    pub fn take_all(&mut self) -> impl Iterator<Item = S> + use<S> {
        std::mem::take(self).segments.into_iter().flat_map(|segment| segment.slots.into_iter().flatten())
    }

    /// The member at a position.
    pub fn get_mut(&mut self, position: Position) -> Option<&mut S> {
        let (index, slot) = (position.0 as usize / SEGMENT_SLOTS, position.0 as usize % SEGMENT_SLOTS);
        self.segments.get_mut(index)?.slots.get_mut(slot)?.as_mut()
    }

    /// All members, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &S> {
        self.segments.iter().flat_map(|segment| segment.slots.iter().flatten())
    }
}

impl<S> Segment<S> {
    fn is_full(&self) -> bool {
        self.slots.len() == SEGMENT_SLOTS && self.free.is_empty()
    }
}
