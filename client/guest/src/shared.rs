//! Where tensors lie in memory that the agent has, too.
//!
//! A guest on the agent's machine copies long tensors there, once, instead of into the kernel and out of it, and finds
//! those of the reply there. It gets the memory before its second long call: one that calls once is faster without,
//! unless the call is so long that it makes no difference. A call for which there is none goes as all others do, and
//! nothing depends on it but time.

use crate::connection::MESSAGE_BYTES_MAX;
use crate::error::{Error, Reason};
use crate::link::Link;
use crate::text::Text;
use crate::transport::{Memory, Transport};
use crate::types::ITEMS_MAX;

/// Most memory of a guest, in bytes, if nobody said how much: for the longest request and the longest reply. Only pages
/// that were written take any.
pub(crate) const SHARED_BYTES_DEFAULT: usize = 2 * MESSAGE_BYTES_MAX + ITEMS_MAX * ALIGNMENT;

/// Least memory that is asked for, in bytes.
const SHARED_BYTES_MIN: usize = 1 << 20;

/// Tensors of a call that are worth it, together, and each of them, in bytes.
const CALL_BYTES_MIN: usize = 32 << 10;
const TENSOR_BYTES_MIN: usize = 16 << 10;

/// From so many bytes on getting the memory, all pages of which are new, takes no longer than the socket and what the
/// agent keeps for that: the first such call has it, too.
const FIRST_BYTES_MIN: usize = 1 << 20;

/// Bytes of a call that are copied, for which the agent is told before that it comes: that takes as long as its threads
/// take to wake.
const ALERT_BYTES_MIN: usize = 256 << 10;

/// Where tensors begin, in bytes: a cache line.
const ALIGNMENT: usize = 64;

/// How long getting memory may take, and the pause after the agent had none, in milliseconds.
const OPEN_MS: u64 = 1000;
const PAUSE_MS: u64 = 60_000;

/// A guest's memory.
#[derive(Debug)]
pub(crate) struct Shared<M> {
    memory: Option<M>,
    /// Most bytes of it; 0 where none is wanted.
    most: usize,
    /// There was a long call.
    is_wanted: bool,
    /// When the agent may be asked again.
    not_before: u64,
}

/// A place in memory. None is one of no bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// What a request says of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lent {
    /// What the agent calls it.
    pub(crate) region: Text<64>,
    /// Where the request's tensors are, as far as they are not in the request.
    pub(crate) places: [Place; ITEMS_MAX],
    /// Where the reply's tensors go.
    pub(crate) room: Place,
}

fn aligned(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX)
}

fn sum(lengths: impl Iterator<Item = usize>) -> usize {
    lengths.fold(0, usize::saturating_add)
}

fn is_long(data: &&[u8]) -> bool {
    data.len() >= TENSOR_BYTES_MIN
}

impl<M: Memory> Shared<M> {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self { memory: None, most: SHARED_BYTES_DEFAULT, is_wanted: false, not_before: 0 }
    }

    /// Says how much there may be; what there is, is given back.
    pub(crate) fn limit(&mut self, bytes: usize) {
        (self.memory, self.most, self.not_before) = (None, bytes, 0);
    }

    /// Lets the agent have it back.
    pub(crate) fn close(&mut self) {
        self.memory = None;
    }

    /// Takes what was lent, to be lent again.
    pub(crate) fn give_back(&mut self, memory: M) {
        self.memory = Some(memory);
    }

    /// Copies there what is long of the data that is given, and keeps room for results of so many bytes, if that is
    /// worth it.
    pub(crate) fn lend<'d, T: Transport<Memory = M>>(
        &mut self,
        link: &mut Link<T>,
        until: u64,
        given: impl Iterator<Item = &'d [u8]> + Clone,
        results: impl Iterator<Item = usize>,
    ) -> Option<(M, Lent)> {
        let long = sum(given.clone().filter(is_long).map(|data| aligned(data.len())));
        let room = sum(results.map(aligned));
        // What is shorter is as fast in the reply.
        let room = if room < TENSOR_BYTES_MIN { 0 } else { room.min(MESSAGE_BYTES_MAX) };
        let wanted = long.saturating_add(room);
        // What is too long for a request is so for all of them.
        if wanted < CALL_BYTES_MIN || wanted > self.most || long > MESSAGE_BYTES_MAX {
            return None;
        }
        let there = self.memory.take().filter(|memory| memory.len() >= wanted);
        let mut memory = match there {
            Some(memory) => memory,
            None => self.open(link, until, wanted)?,
        };
        if long >= ALERT_BYTES_MIN {
            link.alert();
        }
        let region = memory.name().into();
        let mut lent = Lent { region, places: [Place::default(); ITEMS_MAX], room: Place::default() };
        let mut at = 0;
        for (data, place) in given.zip(&mut lent.places).filter(|(data, _)| is_long(data)) {
            let length = data.len();
            if !memory.put(at, data) {
                return None;
            }
            *place = Place { offset: at as u64, bytes: length as u64 };
            at += aligned(length);
        }
        lent.room = Place { offset: at as u64, bytes: room as u64 };
        Some((memory, lent))
    }

    /// Gets so much or more, unless it is too early for that.
    fn open<T: Transport<Memory = M>>(&mut self, link: &mut Link<T>, until: u64, wanted: usize) -> Option<M> {
        let now = link.transport.now();
        let is_first = !core::mem::replace(&mut self.is_wanted, true);
        if (is_first && wanted < FIRST_BYTES_MIN) || now < self.not_before {
            return None;
        }
        let bytes = wanted.next_power_of_two().max(SHARED_BYTES_MIN).min(self.most);
        let until = until.min(now.saturating_add(OPEN_MS));
        let memory = link.transport.share(link.token.as_str(), bytes, until).ok();
        let memory = memory.filter(|memory| memory.len() >= bytes);
        if memory.is_none() {
            self.not_before = now.saturating_add(PAUSE_MS);
        }
        memory
    }
}

impl Lent {
    /// What of the data that is given lies in this memory.
    pub(crate) fn of<'d>(memory: &impl Memory, given: impl Iterator<Item = &'d [u8]>) -> Self {
        let all = memory.as_ptr_range();
        let mut places = [Place::default(); ITEMS_MAX];
        for (data, place) in given.zip(&mut places) {
            let own = data.as_ptr_range();
            if !data.is_empty() && all.start <= own.start && own.end <= all.end {
                let offset = own.start.addr() - all.start.addr();
                *place = Place { offset: offset as u64, bytes: data.len() as u64 };
            }
        }
        Self { region: memory.name().into(), places, room: Place::default() }
    }

    /// The data of this number as the request has it: none where it lies elsewhere.
    pub(crate) fn rest<'d>(lent: Option<&Self>, index: usize, data: &'d [u8]) -> &'d [u8] {
        let place = lent.and_then(|lent| lent.places.get(index));
        if place.is_some_and(|place| place.bytes > 0) { &[] } else { data }
    }
}

/// Why results were not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotFound {
    /// The agent named what is not there.
    Outside,
    /// The place for the result of this number is too small for so many bytes.
    TooSmall(usize, usize),
}

/// Copies results that lie in this memory to where they are wanted, and says how long they are.
///
/// # Errors
/// They cannot be.
pub(crate) fn fetch<'r>(
    memory: &[u8],
    places: &[Place],
    results: impl Iterator<Item = (&'r mut [u8], &'r mut usize)>,
) -> Result<(), NotFound> {
    let results = places.iter().zip(results).enumerate().filter(|(_, (place, _))| place.bytes > 0);
    for (index, (place, (result, length))) in results {
        let range = |begin: usize, bytes: usize| memory.get(begin..begin.checked_add(bytes)?);
        let there = usize::try_from(place.offset).ok().zip(usize::try_from(place.bytes).ok());
        let there = there.and_then(|(begin, bytes)| range(begin, bytes)).ok_or(NotFound::Outside)?;
        *length = there.len();
        let wanted = result.get_mut(..there.len()).ok_or(NotFound::TooSmall(index, there.len()))?;
        wanted.copy_from_slice(there);
    }
    Ok(())
}

/// Whether the agent may still write to memory that was lent to a call which ended so.
pub(crate) fn is_open(error: Error) -> bool {
    error.may_have_run || matches!(error.reason, Reason::Unreachable | Reason::Deadline | Reason::Cancelled)
}
