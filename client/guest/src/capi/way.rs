//! The platform's sockets, or the C program's own functions, as a [`Transport`].

use core::ffi::{c_int, c_void};

use crate::posix::{Posix, SharedMemory};
use crate::transport::{Fault, Ready, Transport};

/// What `read` and `write` of C programs return when nothing can be moved now.
const AGAIN: isize = -11;
/// What `wait` returns, added up.
const READABLE: c_int = 1;
const WRITABLE: c_int = 2;

/// `vaccel_guest_io`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Io {
    context: *mut c_void,
    connect: extern "C" fn(*mut c_void, u64) -> c_int,
    write: extern "C" fn(*mut c_void, *const c_void, usize) -> isize,
    read: extern "C" fn(*mut c_void, *mut c_void, usize) -> isize,
    wait: extern "C" fn(*mut c_void, c_int, u64) -> c_int,
    close: extern "C" fn(*mut c_void),
    now: extern "C" fn(*mut c_void) -> u64,
}

/// The platform's sockets, or the program's own way.
#[derive(Debug)]
pub(super) enum Way {
    Posix(Posix),
    Own(Io),
}

fn count(moved: isize) -> core::result::Result<usize, Fault> {
    match usize::try_from(moved) {
        Ok(count) => Ok(count),
        Err(_) if moved == AGAIN => Err(Fault::WouldBlock),
        Err(_) => Err(Fault::Broken(c_int::try_from(moved.unsigned_abs()).unwrap_or(0))),
    }
}

impl Transport for Way {
    type Memory = SharedMemory;

    fn authority(&self) -> &str {
        "localhost"
    }

    fn connect(&mut self, until: u64) -> core::result::Result<(), Fault> {
        match self {
            Self::Posix(posix) => posix.connect(until),
            Self::Own(io) => match (io.connect)(io.context, until) {
                0 => Ok(()),
                errno => Err(Fault::Broken(errno.checked_abs().unwrap_or(0))),
            },
        }
    }

    fn write(&mut self, pieces: &[&[u8]]) -> core::result::Result<usize, Fault> {
        match self {
            Self::Posix(posix) => posix.write(pieces),
            Self::Own(io) => {
                let piece = pieces.first().copied().unwrap_or_default();
                count((io.write)(io.context, piece.as_ptr().cast(), piece.len()))
            }
        }
    }

    fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> core::result::Result<usize, Fault> {
        match self {
            Self::Posix(posix) => posix.read(first, second),
            Self::Own(io) => {
                let place = if first.is_empty() { second } else { first };
                count((io.read)(io.context, place.as_mut_ptr().cast(), place.len()))
            }
        }
    }

    fn wait(&mut self, write: bool, until: u64) -> core::result::Result<Ready, Fault> {
        match self {
            Self::Posix(posix) => posix.wait(write, until),
            Self::Own(io) => match (io.wait)(io.context, c_int::from(write), until) {
                0 => Err(Fault::Late),
                ready @ 1.. => Ok(Ready { read: ready & READABLE != 0, write: ready & WRITABLE != 0 }),
                errno => Err(Fault::Broken(errno.checked_abs().unwrap_or(0))),
            },
        }
    }

    fn now_exactly(&mut self) -> Option<u64> {
        match self {
            Self::Posix(posix) => posix.now_exactly(),
            Self::Own(_) => None,
        }
    }

    fn wait_exactly(&mut self, until: u64) -> core::result::Result<Ready, Fault> {
        match self {
            Self::Posix(posix) => posix.wait_exactly(until),
            Self::Own(_) => self.wait(false, until.div_ceil(1000)),
        }
    }

    fn hurry(&mut self) {
        match self {
            Self::Posix(posix) => posix.hurry(),
            Self::Own(_) => {}
        }
    }

    fn share(&mut self, token: &str, bytes: usize, until: u64) -> core::result::Result<SharedMemory, Fault> {
        match self {
            Self::Posix(posix) => posix.share(token, bytes, until),
            Self::Own(_) => Err(Fault::Broken(0)),
        }
    }

    fn pause(&mut self, until: u64) {
        match self {
            Self::Posix(posix) => posix.pause(until),
            Self::Own(io) => while (io.now)(io.context) < until {},
        }
    }

    fn close(&mut self) {
        match self {
            Self::Posix(posix) => posix.close(),
            Self::Own(io) => (io.close)(io.context),
        }
    }

    fn now(&mut self) -> u64 {
        match self {
            Self::Posix(posix) => posix.now(),
            Self::Own(io) => (io.now)(io.context),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_platforms_sockets_do_for_c_what_they_do_elsewhere() {
        let mut way = Way::Posix("unix://agent".parse().expect("an address"));
        let now = way.now_exactly().expect("a clock of microseconds");
        assert_eq!(way.wait_exactly(now + 1), Err(Fault::Late));
        assert!(way.now_exactly().is_some_and(|later| later > now));
        way.hurry();
        let Way::Posix(posix) = &way else { unreachable!("as it was made") };
        assert!(posix.hurries, "small packets do not wait for others");
    }
}
