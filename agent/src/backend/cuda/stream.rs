//! Streams: what a device does one after the other, and the memory of the host that it copies from and to meanwhile.

use std::any::Any;
use std::ffi::c_uint;
use std::ptr::NonNull;
use std::sync::Arc;

use super::driver::{Context, Failure, Memory, Pinned, Raw};

/// `CU_STREAM_NON_BLOCKING`: not held up by the stream that other code of the process uses.
const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`: an event that only orders.
const EVENT_DISABLE_TIMING: c_uint = 2;

/// Memory of the host that the device copies from and to by itself, and that its owner keeps for as long as this is.
/// Others may read and write it at the same time: nothing but numbers lies there.
pub(crate) struct Held {
    owner: Arc<dyn Any + Send + Sync>,
    place: NonNull<[u8]>,
}

// SAFETY: an address that is only given to the driver, and an owner that any thread may let go.
#[allow(unsafe_code, reason = "an address for the driver")]
unsafe impl Send for Held {}

impl Held {
    /// # Safety
    /// The place is pinned, and mapped, for as long as there is the owner.
    #[allow(unsafe_code, reason = "the caller answers for the place")]
    pub(super) unsafe fn new(owner: Arc<dyn Any + Send + Sync>, place: NonNull<[u8]>) -> Self {
        Self { owner, place }
    }

    /// All of a pinned memory.
    #[allow(unsafe_code, reason = "as the contract demands")]
    pub(super) fn pinned(memory: Pinned) -> Self {
        let place = memory.place();
        // SAFETY: the memory is pinned until it is dropped.
        unsafe { Self::new(Arc::new(memory), place) }
    }

    pub(super) fn bytes(&self) -> usize {
        self.place.len()
    }

    /// So many bytes of it from an offset on.
    #[allow(unsafe_code, reason = "an address within the place")]
    pub(super) fn part(&self, offset: usize, bytes: usize) -> Self {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes()), "a part of it");
        // SAFETY: within the place, by the assertion.
        let begin = unsafe { self.place.cast::<u8>().add(offset) };
        let place = NonNull::slice_from_raw_parts(begin, bytes);
        Self { owner: Arc::clone(&self.owner), place }
    }
}

/// A stream with the pinned memory that goes up and down on it. What was started may be going on until
/// [`wait`](Self::wait); the memory can be seen only when it is not.
pub(super) struct Stream {
    context: Arc<Context>,
    pub(super) raw: Raw,
    event: Raw,
    up: Pinned,
    down: Pinned,
    busy: bool,
    /// Whether a copy reads or writes the memory that comes down.
    down_busy: bool,
    /// Owners of what is copied from and to otherwise.
    held: Vec<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: handles that the driver lets any thread use, one at a time, and memory that belongs to them.
#[allow(unsafe_code, reason = "handles of the driver")]
unsafe impl Send for Stream {}

impl Stream {
    /// A stream with so many pinned bytes for each direction.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Failure> {
        let (up, down) = (Pinned::new(context, bytes)?, Pinned::new(context, bytes)?);
        let (mut raw, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
        let functions = context.enter()?;
        // SAFETY: each call fills its handle; the stream is destroyed where the event cannot be made.
        unsafe {
            context.check("cuStreamCreate", (functions.stream_create)(&raw mut raw, STREAM_NON_BLOCKING))?;
            let made = (functions.event_create)(&raw mut event, EVENT_DISABLE_TIMING);
            context.check("cuEventCreate", made).inspect_err(|_| {
                (functions.stream_destroy)(raw);
            })?;
        }
        let (busy, down_busy, held) = Default::default();
        Ok(Self { context: Arc::clone(context), raw, event, up, down, busy, down_busy, held })
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Waits until all that was started is done.
    #[allow(unsafe_code, reason = "a call of the driver")]
    pub(super) fn wait(&mut self) -> Result<(), Failure> {
        if !self.busy {
            return Ok(());
        }
        // SAFETY: the stream is alive.
        let waited = unsafe { (self.context.enter()?.stream_wait)(self.raw) };
        self.context.check("cuStreamSynchronize", waited)?;
        (self.busy, self.down_busy) = (false, false);
        self.held.clear();
        Ok(())
    }

    /// Fills the memory that goes up, once nothing reads it any more, and starts to copy all that was filled of it to
    /// a place of the device's.
    pub(super) fn upload(
        &mut self,
        to: &Memory,
        offset: usize,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<(), Failure> {
        self.wait()?;
        let bytes = fill(self.up.slice_mut());
        self.start_up(to, offset, bytes, Way::Up)
    }

    /// The same with the memory that comes down afterwards, without waiting for what `upload` started.
    pub(super) fn upload_result(
        &mut self,
        to: &Memory,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<(), Failure> {
        if self.down_busy {
            self.wait()?;
        }
        let bytes = fill(self.down.slice_mut());
        self.down_busy = true;
        self.start_up(to, 0, bytes, Way::Down)
    }

    fn start_up(&mut self, to: &Memory, offset: usize, bytes: usize, way: Way) -> Result<(), Failure> {
        let from = match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        };
        assert!(bytes <= from.place().len(), "it fits");
        let from = NonNull::slice_from_raw_parts(from.place().cast(), bytes);
        self.copy_up(to, offset, from)
    }

    /// Starts to copy to a place of the device's from where the bytes are.
    pub(super) fn upload_from(&mut self, to: &Memory, offset: usize, from: Held) -> Result<(), Failure> {
        self.held.push(from.owner);
        self.copy_up(to, offset, from.place)
    }

    #[allow(unsafe_code, reason = "a call of the driver")]
    fn copy_up(&mut self, to: &Memory, offset: usize, from: NonNull<[u8]>) -> Result<(), Failure> {
        let bytes = from.len();
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= to.bytes), "it fits");
        let functions = self.context.enter()?;
        self.busy = true;
        // SAFETY: the device's place is that long by the assertion, and kept by the caller until it has waited (see
        // `Memory`). The host's is the stream's own and not seen until `wait`, or held until then.
        let started = unsafe {
            let from = from.cast::<std::ffi::c_void>().as_ptr();
            (functions.copy_up)(to.address + offset as u64, from, bytes, self.raw)
        };
        self.context.check("cuMemcpyHtoDAsync", started)
    }

    /// Starts to copy the first bytes of a place of the device's down.
    pub(super) fn download(&mut self, from: &Memory, offset: usize, bytes: usize) -> Result<(), Failure> {
        assert!(bytes <= self.down.place().len(), "it fits");
        self.down_busy = true;
        let to = NonNull::slice_from_raw_parts(self.down.place().cast(), bytes);
        self.copy_down(from, offset, to)
    }

    /// Starts to copy from a place of the device's to where the bytes are wanted.
    pub(super) fn download_to(&mut self, from: &Memory, offset: usize, to: Held) -> Result<(), Failure> {
        self.held.push(to.owner);
        self.copy_down(from, offset, to.place)
    }

    #[allow(unsafe_code, reason = "a call of the driver")]
    fn copy_down(&mut self, from: &Memory, offset: usize, to: NonNull<[u8]>) -> Result<(), Failure> {
        let bytes = to.len();
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= from.bytes), "it fits");
        let functions = self.context.enter()?;
        self.busy = true;
        // SAFETY: as for `copy_up`.
        let started = unsafe {
            (functions.copy_down)(to.cast().as_ptr(), from.address + offset as u64, bytes, self.raw)
        };
        self.context.check("cuMemcpyDtoHAsync", started)
    }

    /// What came down, once all is done.
    pub(super) fn downloaded(&mut self) -> Result<&[u8], Failure> {
        self.wait()?;
        Ok(self.down.slice())
    }

    /// Lets what is started here from now on happen after all that was started on the other.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(super) fn follow(&mut self, other: &mut Self) -> Result<(), Failure> {
        let functions = self.context.enter()?;
        (self.busy, other.busy) = (true, true);
        // SAFETY: the handles are alive; the event is the other stream's own, and recorded again only by its next call
        // of this, which does not change what was waited for.
        unsafe {
            self.context.check("cuEventRecord", (functions.event_record)(other.event, other.raw))?;
            self.context.check("cuStreamWaitEvent", (functions.stream_after)(self.raw, other.event, 0))
        }
    }

    /// Notes that another library started something on the stream.
    pub(super) fn started(&mut self) {
        self.busy = true;
    }
}

/// Which of a stream's memories.
#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

impl Drop for Stream {
    #[allow(unsafe_code, reason = "calls of the driver")]
    fn drop(&mut self) {
        // A device that fails here has failed for good, and touches nothing any more.
        let _ = self.wait();
        if let Ok(functions) = self.context.enter() {
            // SAFETY: made in `new`, destroyed here alone.
            unsafe {
                (functions.event_destroy)(self.event);
                (functions.stream_destroy)(self.raw);
            }
        }
    }
}
