//! Memory that client and agent share, for tensors that would take longer through a socket.
//!
//! Where the agent is on the same machine, the client asks it for a region when there first is a long tensor, or
//! argument of a generic operation, and from then on copies such data there once, instead of into the kernel and out of
//! it. Data that was produced there, in a [`Buffer`], is not copied at all. A call without room in the region goes as
//! all calls do, and so does everything where there is no region: nothing depends on it but time.

mod mapping;
mod opening;
mod slots;

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tokio::time::Instant;
use vaccel_proto::carrier::{Aligned, Carrier};
use vaccel_proto::error::Detail;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::v1::{Place, RunReply, RunRequest, Shared};
use vaccel_proto::{Endpoint, Error, Reason};

pub use mapping::Mapping;
pub use opening::PREFACE;
use opening::Source;
use slots::Slots;

/// Bytes of a region if nobody said how many. Only pages that were written take memory.
pub(crate) const SHARED_BYTES_DEFAULT: usize = 128 << 20;

/// Tensors of a call that are worth it, together, and each of them, in bytes: below, a system call more does not cost
/// what the detour does.
const CALL_BYTES_MIN: usize = 32 << 10;
const TENSOR_BYTES_MIN: usize = 16 << 10;

/// Bytes of a call that are copied, for which its agent is told before that it comes: that takes as long as its threads
/// take to wake.
const ALERT_BYTES_MIN: usize = 256 << 10;

/// Pause after an agent had no region to give.
const PAUSE: Duration = Duration::from_secs(60);

fn length(carrier: &mut &mut dyn Carrier) -> usize {
    carrier.data_mut().map_or(0, |data| data.len())
}

/// What a client has of shared memory.
#[derive(Debug)]
pub(crate) struct Memory {
    source: Source,
    patience: Duration,
    /// Of a region; 0 where none is wanted.
    bytes: usize,
    region: Mutex<Option<Arc<Region>>>,
    /// Held by who asks for a region.
    opening: Arc<tokio::sync::Mutex<()>>,
    not_before: Mutex<Option<Instant>>,
}

/// A region.
struct Region {
    name: String,
    mapping: Arc<Mapping>,
    slots: Mutex<Slots>,
    /// Bytes that calls may still write to although nobody waits for them any more: nobody gets them again.
    lost: AtomicUsize,
    /// What the tensors of the last reply took: the next one's take as much, more often than not.
    reply_bytes: AtomicUsize,
    /// The agent has it for as long as this is open.
    _connection: Box<dyn std::any::Any + Send + Sync>,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("mapping", &self.mapping).field("slots", &self.slots).finish()
    }
}

/// A part of a region, given back when it is dropped.
#[derive(Debug)]
struct Slot {
    region: Arc<Region>,
    part: Range<usize>,
    /// Somebody may still write there.
    is_lost: bool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.is_lost {
            self.region.lost.fetch_add(self.part.len(), Ordering::Relaxed);
        } else {
            self.region.slots().give(self.part.clone());
        }
    }
}

/// A view of a slot, which keeps it.
struct SlotView {
    slot: Arc<Slot>,
    range: Range<usize>,
}

impl AsRef<[u8]> for SlotView {
    fn as_ref(&self) -> &[u8] {
        self.slot.region.mapping.slice(self.range.clone())
    }
}

impl Region {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, bytes: usize) -> Option<Slot> {
        let part = self.slots().take(bytes)?;
        Some(Slot { region: Arc::clone(self), part, is_lost: false })
    }

    /// Whether so much of it is lost that another one is better.
    fn is_worn(&self) -> bool {
        self.lost.load(Ordering::Relaxed) > self.mapping.bytes() / 2
    }
}

impl Memory {
    /// None yet. Getting some may take as long as `patience`.
    pub(crate) fn new(
        endpoint: &Endpoint,
        token: Option<&str>,
        bytes: usize,
        patience: Duration,
    ) -> Arc<Self> {
        let source = Source::new(endpoint, token);
        let bytes = if source.is_near() { bytes } else { 0 };
        let (region, opening, not_before) = Default::default();
        Arc::new(Self { source, patience, bytes, region, opening, not_before })
    }

    fn region(&self) -> Option<Arc<Region>> {
        let mut region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        region.take_if(|region| region.is_worn());
        region.clone()
    }

    /// Puts the tensors of a request into the region, if they are long and there is room. `alert` is called before that
    /// takes some time.
    pub(crate) fn lend(self: &Arc<Self>, request: &RunRequest, alert: impl FnOnce()) -> Option<Lent> {
        if self.bytes == 0 || request.encoded_len() < CALL_BYTES_MIN {
            return None;
        }
        let mut request = request.clone();
        let mut carriers = request.lendable_mut();
        if carriers.iter_mut().map(length).sum::<usize>() < CALL_BYTES_MIN {
            return None;
        }
        let Some(region) = self.region() else {
            self.open_meanwhile();
            return None;
        };
        let data = carriers.iter_mut().filter_map(|carrier| carrier.data_mut());
        let copied = data.filter(|data| region.mapping.place(data).is_none()).map(|data| data.len());
        if copied.sum::<usize>() >= ALERT_BYTES_MIN {
            alert();
        }
        let mut slots = Vec::new();
        let (mut places, mut given) = (Vec::new(), Vec::new());
        for carrier in carriers {
            let mut place = Place::default();
            let mut data = Bytes::new();
            if let Some(long) = carrier.data_mut().filter(|data| data.len() >= TENSOR_BYTES_MIN) {
                let part = match region.mapping.place(long) {
                    Some(part) => part,
                    None => {
                        let slot = region.take(long.len())?;
                        let part = slot.part.start..slot.part.start + long.len();
                        region.mapping.write(part.start, long);
                        slots.push(slot);
                        part
                    }
                };
                place = Place { offset: part.start as u64, bytes: part.len() as u64 };
                data = std::mem::take(long);
                carrier.tensor_mut().into_iter().for_each(|tensor| tensor.pad = Bytes::new());
            }
            places.push(place);
            given.push(data);
        }
        let room =
            region.take(region.reply_bytes.load(Ordering::Relaxed)).filter(|room| !room.part.is_empty());
        let at =
            room.as_ref().map(|room| Place { offset: room.part.start as u64, bytes: room.part.len() as u64 });
        request.shared = Some(Shared { region: region.name.clone(), places, room: at });
        request.align();
        if request.encoded_len() > MESSAGE_BYTES_MAX {
            return None;
        }
        let (memory, attempts) = (Arc::clone(self), AtomicUsize::new(0));
        Some(Lent { memory, region, request, attempts, given, _slots: slots, room, is_over: false })
    }

    /// Gets a region, while calls go on without.
    fn open_meanwhile(self: &Arc<Self>) {
        let memory = Arc::clone(self);
        if self.may_open()
            && let Ok(turn) = Arc::clone(&self.opening).try_lock_owned()
        {
            tokio::spawn(async move {
                memory.open().await;
                drop(turn);
            });
        }
    }

    fn may_open(&self) -> bool {
        let not_before = *self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        not_before.is_none_or(|at| Instant::now() >= at)
    }

    async fn open(&self) {
        match tokio::time::timeout(self.patience, self.source.open(self.bytes)).await {
            Ok(Ok(region)) => {
                *self.region.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(region));
            }
            // Calls go on as they did.
            _ => {
                let at = Instant::now() + PAUSE;
                *self.not_before.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
            }
        }
    }

    /// Memory for so many bytes, in the region if there is one with room.
    pub(crate) async fn buffer(self: &Arc<Self>, bytes: usize) -> Buffer {
        if self.bytes > 0 && bytes >= TENSOR_BYTES_MIN && self.region().is_none() {
            let _turn = self.opening.lock().await;
            // Somebody else may have got it meanwhile.
            if self.region().is_none() && self.may_open() {
                self.open().await;
            }
        }
        let slot = self.region().filter(|_| bytes >= TENSOR_BYTES_MIN).and_then(|region| region.take(bytes));
        match slot {
            Some(slot) => Buffer { content: Content::Shared(slot, bytes) },
            None => Buffer { content: Content::Own(vec![0; bytes]) },
        }
    }

    /// Forgets a region that the agent does not know any more.
    fn forget(&self, region: &Arc<Region>) {
        let mut current = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        current.take_if(|current| Arc::ptr_eq(current, region));
    }
}

/// A request whose tensors lie in the region.
#[derive(Debug)]
pub(crate) struct Lent {
    memory: Arc<Memory>,
    region: Arc<Region>,
    request: RunRequest,
    /// How often it was sent, or was about to be.
    attempts: AtomicUsize,
    /// What lies at the places that the request names.
    given: Vec<Bytes>,
    _slots: Vec<Slot>,
    room: Option<Slot>,
    /// The agent is done with the call.
    is_over: bool,
}

impl Lent {
    /// The request, for an attempt.
    pub(crate) fn request(&self) -> RunRequest {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        self.request.clone()
    }

    /// The reply, with its tensors' data where the agent put it; none if the agent does not know the region, and has
    /// done nothing.
    ///
    /// # Errors
    /// Those of the call, and `BACKEND_FAILED` for places outside of the room.
    pub(crate) fn finish(mut self, reply: Result<RunReply, Error>) -> Option<Result<RunReply, Error>> {
        match reply {
            Err(error) if is_lost_region(&error) => {
                self.memory.forget(&self.region);
                None
            }
            Err(error) => {
                // Who has no answer does not know whether the agent is about to write.
                let without = [Reason::Unreachable, Reason::Deadline, Reason::Cancelled];
                self.is_over = self.was_asked_once() && !without.contains(&error.reason());
                if let (Reason::MessageTooLarge, Detail::Limit { used, .. }) =
                    (error.reason(), error.detail())
                {
                    self.expect(usize::try_from(*used).unwrap_or(usize::MAX));
                }
                Some(Err(error))
            }
            Ok(reply) => {
                self.is_over = self.was_asked_once();
                Some(self.receive(reply))
            }
        }
    }

    /// Whether no earlier attempt can be on its way still.
    fn was_asked_once(&self) -> bool {
        self.attempts.load(Ordering::Relaxed) <= 1
    }

    /// Takes note of how many bytes the tensors of a reply have.
    fn expect(&self, bytes: usize) {
        // A little more, for where each of them begins.
        let room = if bytes >= CALL_BYTES_MIN { bytes.saturating_add(TENSOR_BYTES_MIN) } else { 0 };
        self.region.reply_bytes.store(room, Ordering::Relaxed);
    }

    fn receive(&mut self, mut reply: RunReply) -> Result<RunReply, Error> {
        let places = std::mem::take(&mut reply.places);
        let mut carriers = reply.lendable_mut();
        let inline: usize = carriers.iter_mut().map(length).sum();
        let placed: u64 = places.iter().map(|place| place.bytes).sum();
        let all = inline.saturating_add(usize::try_from(placed).unwrap_or(usize::MAX));
        self.expect(all);
        if places.is_empty() {
            return Ok(reply);
        }
        let wrong =
            || Error::new(Reason::BackendFailed, "the agent's reply names places that are not its own");
        if places.len() != carriers.len() {
            return Err(wrong());
        }
        let room = self.room.take().map(|mut room| {
            room.is_lost = !self.is_over;
            Arc::new(room)
        });
        for (place, carrier) in places.iter().zip(carriers) {
            let Some(data) = carrier.data_mut().filter(|_| place.bytes > 0) else { continue };
            *data = self.view(place, room.as_ref()).ok_or_else(wrong)?;
        }
        Ok(reply)
    }

    /// The bytes at a place: in the room, where they stay as long as somebody looks at them, or what the call itself
    /// brought.
    fn view(&self, place: &Place, room: Option<&Arc<Slot>>) -> Option<Bytes> {
        let begin = usize::try_from(place.offset).ok()?;
        let range = begin..begin.checked_add(usize::try_from(place.bytes).ok()?)?;
        let is_in = |part: &Range<usize>| part.start <= range.start && range.end <= part.end;
        if let Some(slot) = room.filter(|room| is_in(&room.part)) {
            return Some(Bytes::from_owner(SlotView { slot: Arc::clone(slot), range }));
        }
        // An engine that passes its inputs on.
        let shared = self.request.shared.as_ref()?;
        let own = shared.places.iter().position(|own| own == place)?;
        self.given.get(own).cloned()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(room) = &mut self.room {
            room.is_lost = !self.is_over;
        }
    }
}

fn is_lost_region(error: &Error) -> bool {
    matches!(error.detail(), Detail::Resource { kind, .. } if kind == REGION)
}

/// What a region is called in errors.
pub const REGION: &str = "region";

/// Memory to produce a tensor's data in. Where client and agent share memory it lies there, and the client does not
/// copy it for a call; elsewhere it is memory as any other.
#[derive(Debug)]
pub struct Buffer {
    content: Content,
}

#[derive(Debug)]
enum Content {
    Own(Vec<u8>),
    Shared(Slot, usize),
}

impl Buffer {
    /// Whether the agent shares it.
    pub fn is_shared(&self) -> bool {
        matches!(self.content, Content::Shared(..))
    }

    /// The bytes as a tensor's data, which cannot be changed any more.
    pub fn freeze(self) -> Bytes {
        match self.content {
            Content::Own(bytes) => bytes.into(),
            Content::Shared(slot, bytes) => {
                let range = slot.part.start..slot.part.start + bytes;
                Bytes::from_owner(SlotView { slot: Arc::new(slot), range })
            }
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.content {
            Content::Own(bytes) => bytes,
            Content::Shared(slot, bytes) => {
                slot.region.mapping.slice(slot.part.start..slot.part.start + bytes)
            }
        }
    }
}

impl DerefMut for Buffer {
    #[allow(unsafe_code, reason = "the part of the mapping is this buffer's alone")]
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.content {
            Content::Own(bytes) => bytes,
            Content::Shared(slot, bytes) => {
                let range = slot.part.start..slot.part.start + *bytes;
                // SAFETY: the slot is this buffer's alone, which is borrowed for as long as the bytes can be written;
                // no call knows of it before `freeze` takes the buffer away.
                unsafe { slot.region.mapping.part_mut(range) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::v1::run_request::Op;
    use vaccel_proto::v1::{ModelRunRequest, NamedTensor, Tensor};

    const BYTES: usize = 1 << 20;

    /// Memory with a region, in which the next reply gets room.
    fn memory() -> (Arc<Memory>, Arc<Region>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES as u64).unwrap();
        let region = Arc::new(Region {
            name: "r".into(),
            mapping: Mapping::new(&file, BYTES).unwrap(),
            slots: Mutex::new(Slots::new(BYTES)),
            lost: AtomicUsize::new(0),
            reply_bytes: AtomicUsize::new(64 << 10),
            _connection: Box::new(()),
        });
        let memory = Memory::new(&Endpoint::Unix("/s".into()), None, BYTES, Duration::from_secs(1));
        *memory.region.lock().unwrap() = Some(Arc::clone(&region));
        (memory, region)
    }

    fn request() -> RunRequest {
        let tensor = Tensor::new(&[64 << 10], &vec![7_u8; 64 << 10]).unwrap();
        let input = NamedTensor { name: "x".into(), tensor: Some(tensor) };
        let run = ModelRunRequest { inputs: vec![input], ..ModelRunRequest::default() };
        RunRequest { op: Some(Op::ModelRun(run)), ..RunRequest::default() }
    }

    #[test]
    fn nobody_gets_the_room_of_an_attempt_that_may_still_write_to_it() {
        for (attempts, lost) in [(1, false), (2, true)] {
            let (memory, region) = memory();
            let lent = memory.lend(&request(), || ()).expect("there is room");
            (0..attempts).for_each(|_| drop(lent.request()));
            lent.finish(Ok(RunReply::default())).expect("it knows the region").expect("a reply");
            assert_eq!(region.lost.load(Ordering::Relaxed) > 0, lost, "{attempts} attempts");
        }
    }
}
