//! What a guest needs of its network. [`posix`](crate::posix) has it for platforms with a C library; a unikernel with
//! its own way to move bytes implements [`Transport`], or gives four functions through the C interface.

use core::fmt::Debug;
use core::ops::{Deref, DerefMut};

/// Why bytes did not move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing can be moved now; [`Transport::wait`] says when.
    WouldBlock,
    /// The time is over.
    Late,
    /// There is no connection, or it broke; the platform's `errno`, or 0.
    Broken(i32),
}

/// What can be done without waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Something can be read, if only the end.
    pub read: bool,
    /// Something can be written.
    pub write: bool,
}

/// Memory that the agent has, too, for tensors that would take longer through a socket. It is zeros at first, and stays
/// the agent's until it is dropped. Nothing but numbers may lie there: the agent may write them at any time.
pub trait Memory: Debug + Deref<Target = [u8]> + DerefMut {
    /// What the agent calls it.
    fn name(&self) -> &str;

    /// Copies bytes there. Returns whether they are, or were too many.
    fn put(&mut self, offset: usize, bytes: &[u8]) -> bool {
        let place = self.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len()));
        place.map(|place| place.copy_from_slice(bytes)).is_some()
    }
}

/// The memory of a transport that can have none.
#[derive(Debug)]
pub enum NoMemory {}

impl Deref for NoMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match *self {}
    }
}

impl DerefMut for NoMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match *self {}
    }
}

impl Memory for NoMemory {
    fn name(&self) -> &str {
        match *self {}
    }
}

/// A byte stream to the agent that can be opened again, and a clock.
///
/// Reading and writing never wait: they move what can be moved at once. An implementation that cannot tell waits a
/// little in them instead and is as good, except that deadlines are kept less exactly.
pub trait Transport {
    /// Memory that the agent has, too: [`NoMemory`] where there is no such thing.
    type Memory: Memory;

    /// The agent as `:authority` of requests names it.
    fn authority(&self) -> &str;

    /// Opens a connection, after closing any.
    ///
    /// # Errors
    /// [`Fault::Late`] and [`Fault::Broken`].
    fn connect(&mut self, until: u64) -> core::result::Result<(), Fault>;

    /// Writes some bytes of the pieces, one after the other; returns how many. There is at least one piece, and none is
    /// empty. To write only the first is right, and more system calls than it takes.
    ///
    /// # Errors
    /// [`Fault::WouldBlock`] and [`Fault::Broken`].
    fn write(&mut self, pieces: &[&[u8]]) -> core::result::Result<usize, Fault>;

    /// Reads some bytes to `first`, and when it is full to `second`; returns how many, 0 at the end. `first` may be
    /// empty, `second` never is.
    ///
    /// # Errors
    /// [`Fault::WouldBlock`] and [`Fault::Broken`].
    fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> core::result::Result<usize, Fault>;

    /// Waits until something can be read, or with `write` written, or the clock shows `until`.
    ///
    /// # Errors
    /// [`Fault::Late`] and [`Fault::Broken`].
    fn wait(&mut self, write: bool, until: u64) -> core::result::Result<Ready, Fault>;

    /// Microseconds of the clock that [`Transport::now`] shows, where it goes by them and [`Transport::wait_exactly`]
    /// does so, too: then whoever waits for an answer that is foreseen is awake for it.
    fn now_exactly(&mut self) -> Option<u64> {
        None
    }

    /// Waits until something can be read, or that clock shows `until`, or not quite.
    ///
    /// # Errors
    /// [`Fault::Late`] and [`Fault::Broken`].
    fn wait_exactly(&mut self, until: u64) -> core::result::Result<Ready, Fault> {
        self.wait(false, until.div_ceil(1000))
    }

    /// A request goes out in more than one piece: from now on, small packets should be sent at once although others
    /// before them were not confirmed, and as much as can be should be taken in one write. There may be no such thing.
    fn hurry(&mut self) {}

    /// Gets so many bytes of memory that the agent has, too, beside the connection; the token is as in calls, and empty
    /// without one.
    ///
    /// # Errors
    /// [`Fault::Late`], and [`Fault::Broken`] where there is none.
    fn share(
        &mut self,
        _token: &str,
        _bytes: usize,
        _until: u64,
    ) -> core::result::Result<Self::Memory, Fault> {
        Err(Fault::Broken(0))
    }

    /// Does nothing until the clock shows `until`.
    fn pause(&mut self, until: u64);

    /// Closes the connection, if there is one.
    fn close(&mut self);

    /// Milliseconds of a clock that never goes back.
    fn now(&mut self) -> u64;
}
