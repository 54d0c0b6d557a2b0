//! TCP, unix and vsock sockets, by the calls of the platform's C library.
//!
//! What is used was seen to work in every guest kernel this was tried in: `socket`, `connect`, `send`, `read`, `poll`,
//! `close`, the clock; `readv`, `writev`, `ppoll` and for requests in pieces `setsockopt` where they do, and nothing
//! that has to. Time limits are `poll`'s. No signal is ever raised by a connection that broke. What memory takes that
//! the agent has, too, is told in `memory`.

#[cfg(any(target_os = "linux", target_os = "android"))]
mod memory;

use core::ffi::c_int;
use core::mem::size_of;
use core::net::IpAddr;
use core::ptr;

use crate::address::{Address, NoAddress};
use crate::connection::PIECES_MAX;
use crate::transport::{Fault, Ready, Transport};

#[cfg(any(target_os = "linux", target_os = "android"))]
pub use self::memory::SharedMemory;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub use crate::transport::NoMemory as SharedMemory;

/// Bytes of one write on vsock: some hypervisors break on packets above 32 KiB.
const VSOCK_WRITE_BYTES_MAX: usize = 32 << 10;

/// The same to another VM: vhost-device-vsock loses what does not fit in the receiver's 4 KiB buffers.
const SIBLING_WRITE_BYTES_MAX: usize = 3 << 10;

/// The host's CID; those above it are other VMs.
const CID_HOST: u32 = 2;

/// Pause before connecting again to a unix socket whose queue is full, in milliseconds.
const QUEUE_PAUSE_MS: u64 = 10;

/// What a unix socket should take at once, in bytes; the system may allow less. Each time that it is full costs two
/// changes of processes.
const UNIX_BUFFER_BYTES: c_int = 4 << 20;

/// The standard library ignores SIGPIPE in every program of its own; what C programs do with it is not this library's
/// to change.
const SIGPIPE_IGNORED: bool = cfg!(feature = "std");

/// A socket.
#[derive(Debug)]
pub struct Posix {
    address: Address,
    fd: c_int,
    /// No write raises a signal.
    sigpipe_ignored: bool,
    /// Writes in many pieces work.
    writes_many: bool,
    /// Reads in two pieces work.
    reads_two: bool,
    /// The socket was told that requests go out in pieces.
    pub(crate) hurries: bool,
    /// Waits by microseconds work.
    waits_exactly: bool,
}

impl Posix {
    /// The way to an address. Nothing is opened yet.
    pub const fn new(address: Address) -> Self {
        let is_vsock = matches!(address, Address::Vsock { .. });
        // Vectored calls on vsock lose their first piece in some guests.
        let (writes_many, reads_two) = (!is_vsock, !is_vsock);
        Self {
            address,
            fd: -1,
            sigpipe_ignored: SIGPIPE_IGNORED,
            writes_many,
            reads_two,
            hurries: false,
            waits_exactly: sys::WAITS_EXACTLY,
        }
    }

    /// Says whether the program ignores SIGPIPE: then `write` and `writev` are used, the latter for all there is to
    /// send, and otherwise `send` for each piece of it. Programs with Rust's own `main` do.
    pub const fn set_sigpipe_ignored(&mut self, ignored: bool) {
        self.sigpipe_ignored = ignored;
    }

    /// The way to the agent that the environment names: `VACCEL_RPC_ADDRESS`, then `VACCEL_RPC_ADDR`, then what
    /// `VACCEL_RPC_ADDRESS` was when this library was built, then `tcp://127.0.0.1:65500`.
    ///
    /// # Errors
    /// The address is none.
    #[cfg(feature = "std")]
    pub fn from_env() -> Result<Self, NoAddress> {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        match set("VACCEL_RPC_ADDRESS").or_else(|| set("VACCEL_RPC_ADDR")) {
            Some(address) => address.parse(),
            None => Self::built_in(),
        }
    }

    /// The way to the address this library was built with.
    ///
    /// # Errors
    /// The address is none.
    pub fn built_in() -> Result<Self, NoAddress> {
        option_env!("VACCEL_RPC_ADDRESS").unwrap_or("tcp://127.0.0.1:65500").parse()
    }

    fn write_max(&self) -> usize {
        match self.address {
            Address::Vsock { cid, .. } if cid > CID_HOST => SIBLING_WRITE_BYTES_MAX,
            Address::Vsock { .. } => VSOCK_WRITE_BYTES_MAX,
            _ => usize::MAX,
        }
    }

    /// Waits for a connection that is being made.
    fn connected(&mut self, until: u64) -> Result<(), Fault> {
        let failed = match self.wait_for(true, until) {
            Ok((_, false)) => return Ok(()),
            // What it failed on is what reading fails on; there is nothing to read.
            Ok((_, true)) => sys::read(self.fd, &mut [0]).err().filter(|fault| *fault != Fault::WouldBlock),
            Err(fault) => Some(fault),
        };
        // Nobody has it, so nobody would close it.
        self.close();
        Err(failed.unwrap_or(Fault::Broken(0)))
    }

    /// What is ready, and whether the connection has failed.
    fn wait_for(&mut self, write: bool, until: u64) -> Result<(Ready, bool), Fault> {
        loop {
            let left = until.saturating_sub(self.now());
            let timeout = c_int::try_from(left).unwrap_or(c_int::MAX);
            match sys::poll(self.fd, write, timeout) {
                Ok(Some(ready)) => return Ok(ready),
                Ok(None) if left == 0 || self.now() >= until => return Err(Fault::Late),
                Ok(None) | Err(libc::EINTR | libc::EAGAIN) => {}
                Err(errno) => return Err(Fault::Broken(errno)),
            }
        }
    }
}

impl core::str::FromStr for Posix {
    type Err = NoAddress;

    /// With the standard library, `tcp://HOST:PORT` may have a name.
    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let parsed = text.parse();
        #[cfg(feature = "std")]
        let parsed = parsed.or_else(|error| by_name(text).ok_or(error));
        parsed.map(Self::new)
    }
}

/// The first address of a host's name.
#[cfg(feature = "std")]
fn by_name(text: &str) -> Option<Address> {
    let (scheme, authority) = text.split_once("://").filter(|(_, authority)| !authority.starts_with('['))?;
    let mut found = std::net::ToSocketAddrs::to_socket_addrs(authority).ok()?;
    let place = found.next().filter(|place| scheme.eq_ignore_ascii_case("tcp") && place.port() > 0)?;
    Some(Address::Tcp { ip: place.ip(), port: place.port() })
}

impl Drop for Posix {
    fn drop(&mut self) {
        self.close();
    }
}

impl Transport for Posix {
    type Memory = SharedMemory;

    fn authority(&self) -> &str {
        "localhost"
    }

    fn connect(&mut self, until: u64) -> Result<(), Fault> {
        self.close();
        self.hurries = false;
        loop {
            self.fd = sys::socket(&self.address)?;
            let pending = match sys::connect(self.fd, &self.address) {
                Ok(()) => return Ok(()),
                Err(errno) => errno,
            };
            match pending {
                // What became of it is told by the first bytes: some kernels say that a connection is there before
                // they know.
                libc::EINPROGRESS | libc::EINTR | libc::EALREADY => {
                    return self.connected(until);
                }
                // A unix socket whose listener is slow.
                libc::EAGAIN => {
                    self.close();
                    let again = self.now() + QUEUE_PAUSE_MS;
                    if again >= until {
                        return Err(Fault::Late);
                    }
                    self.pause(again);
                }
                errno => {
                    self.close();
                    return Err(Fault::Broken(errno));
                }
            }
        }
    }

    fn write(&mut self, pieces: &[&[u8]]) -> Result<usize, Fault> {
        let Some((first, others)) = pieces.split_first() else { return Ok(0) };
        if self.sigpipe_ignored && self.writes_many && !others.is_empty() {
            match sys::writev(self.fd, pieces) {
                Err(Fault::Broken(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP | libc::EINVAL)) => {
                    self.writes_many = false;
                }
                outcome => return outcome,
            }
        }
        let piece = first.get(..self.write_max()).unwrap_or(first);
        // TCP sends a short piece by itself unless it is told that another one follows.
        let more = !others.is_empty() && matches!(self.address, Address::Tcp { .. });
        match self.sigpipe_ignored && !more {
            true => sys::write(self.fd, piece),
            false => sys::send(self.fd, piece, more),
        }
    }

    fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        if first.is_empty() {
            return sys::read(self.fd, second);
        }
        if self.reads_two {
            match sys::readv(self.fd, first, second) {
                Err(Fault::Broken(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP | libc::EINVAL)) => {
                    self.reads_two = false;
                }
                outcome => return outcome,
            }
        }
        sys::read(self.fd, first)
    }

    fn wait(&mut self, write: bool, until: u64) -> Result<Ready, Fault> {
        self.wait_for(write, until).map(|(ready, _)| ready)
    }

    fn now_exactly(&mut self) -> Option<u64> {
        self.waits_exactly.then(sys::now_exactly)
    }

    fn wait_exactly(&mut self, until: u64) -> Result<Ready, Fault> {
        loop {
            let left = until.saturating_sub(sys::now_exactly());
            match sys::poll_exactly(self.fd, left) {
                Ok(Some((ready, _))) => return Ok(ready),
                Ok(None) if left == 0 || sys::now_exactly() >= until => return Err(Fault::Late),
                Ok(None) | Err(libc::EINTR | libc::EAGAIN) => {}
                Err(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP | libc::EINVAL) => {
                    self.waits_exactly = false;
                    return Ok(Ready::default());
                }
                Err(errno) => return Err(Fault::Broken(errno)),
            }
        }
    }

    fn hurry(&mut self) {
        if core::mem::replace(&mut self.hurries, true) {
            return;
        }
        match self.address {
            Address::Tcp { .. } => sys::set(self.fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
            Address::Unix { .. } => sys::set(self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, UNIX_BUFFER_BYTES),
            Address::Vsock { .. } => {}
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn share(&mut self, token: &str, bytes: usize, until: u64) -> Result<SharedMemory, Fault> {
        SharedMemory::open(self.address, token, bytes, until)
    }

    fn pause(&mut self, until: u64) {
        while let left @ 1.. = until.saturating_sub(self.now()) {
            if sys::poll(-1, false, c_int::try_from(left).unwrap_or(c_int::MAX))
                .is_err_and(|errno| errno != libc::EINTR)
            {
                return;
            }
        }
    }

    fn close(&mut self) {
        if self.fd >= 0 {
            sys::close(self.fd);
            self.fd = -1;
        }
    }

    fn now(&mut self) -> u64 {
        sys::now()
    }
}

/// The calls themselves.
#[allow(unsafe_code, reason = "calls of the platform's C library")]
mod sys {
    use super::*;

    /// The flag that makes a call not wait, where it is one of `socket`.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const NONBLOCK: c_int = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const NONBLOCK: c_int = 0;

    /// Whether there are waits by microseconds.
    pub(super) const WAITS_EXACTLY: bool = cfg!(any(target_os = "linux", target_os = "android"));

    /// A broken connection raises no signal. Hermit has none.
    #[cfg(not(target_os = "hermit"))]
    const NO_SIGNAL: c_int = libc::MSG_NOSIGNAL;
    #[cfg(target_os = "hermit")]
    const NO_SIGNAL: c_int = 0;

    /// Another piece follows at once.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const MORE: c_int = libc::MSG_MORE;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const MORE: c_int = 0;

    /// Why a call failed that returned this.
    #[cfg(target_os = "linux")]
    fn errno(_: isize) -> c_int {
        // SAFETY: the C library gives each thread a place for its last error, for as long as the thread runs.
        unsafe { *libc::__errno_location() }
    }

    /// The same where calls are the kernel's own, which return it.
    #[cfg(not(target_os = "linux"))]
    fn errno(returned: isize) -> c_int {
        if returned < -1 { c_int::try_from(returned.unsigned_abs()).unwrap_or(libc::EIO) } else { libc::EIO }
    }

    pub(super) fn moved(count: isize) -> Result<usize, Fault> {
        match usize::try_from(count) {
            Ok(count) => Ok(count),
            Err(_) => match errno(count) {
                // Nothing was moved: the caller waits and tries again.
                libc::EAGAIN | libc::EINTR => Err(Fault::WouldBlock),
                errno => Err(Fault::Broken(errno)),
            },
        }
    }

    pub(super) fn socket(address: &Address) -> Result<c_int, Fault> {
        let family = match address {
            #[cfg(not(target_os = "hermit"))]
            Address::Vsock { .. } => libc::AF_VSOCK,
            #[cfg(not(target_os = "hermit"))]
            Address::Unix { .. } => libc::AF_UNIX,
            #[cfg(target_os = "hermit")]
            Address::Vsock { .. } | Address::Unix { .. } => return Err(Fault::Broken(libc::EAFNOSUPPORT)),
            Address::Tcp { ip: IpAddr::V4(_), .. } => libc::AF_INET,
            Address::Tcp { ip: IpAddr::V6(_), .. } => libc::AF_INET6,
        };
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | NONBLOCK, 0) };
        if fd < 0 {
            return Err(Fault::Broken(errno(fd as isize)));
        }
        if NONBLOCK == 0 {
            // SAFETY: takes numbers only, of a descriptor just made.
            unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) };
        }
        Ok(fd)
    }

    pub(super) fn connect(fd: c_int, address: &Address) -> Result<(), c_int> {
        match address {
            #[cfg(target_os = "hermit")]
            Address::Vsock { .. } | Address::Unix { .. } => Err(libc::EAFNOSUPPORT),
            #[cfg(not(target_os = "hermit"))]
            Address::Vsock { cid, port } => {
                // SAFETY: a structure of numbers, for which all zeros are a value.
                let mut place: libc::sockaddr_vm = unsafe { core::mem::zeroed() };
                place.svm_family = libc::AF_VSOCK as libc::sa_family_t;
                (place.svm_cid, place.svm_port) = (*cid, *port);
                connect_to(fd, &place, size_of::<libc::sockaddr_vm>())
            }
            #[cfg(not(target_os = "hermit"))]
            Address::Unix { path, is_abstract } => {
                // SAFETY: a structure of numbers, for which all zeros are a value.
                let mut place: libc::sockaddr_un = unsafe { core::mem::zeroed() };
                place.sun_family = libc::AF_UNIX as libc::sa_family_t;
                let skipped = usize::from(*is_abstract);
                for (place, byte) in place.sun_path.iter_mut().skip(skipped).zip(path.as_bytes()) {
                    *place = byte.cast_signed() as libc::c_char;
                }
                // An abstract name has a NUL before it, a path one behind it.
                let length = core::mem::offset_of!(libc::sockaddr_un, sun_path) + path.as_bytes().len() + 1;
                connect_to(fd, &place, length)
            }
            Address::Tcp { ip: IpAddr::V4(ip), port } => {
                // SAFETY: a structure of numbers, for which all zeros are a value.
                let mut place: libc::sockaddr_in = unsafe { core::mem::zeroed() };
                place.sin_family = libc::AF_INET as libc::sa_family_t;
                place.sin_port = port.to_be();
                place.sin_addr.s_addr = u32::from_ne_bytes(ip.octets());
                connect_to(fd, &place, size_of::<libc::sockaddr_in>())
            }
            Address::Tcp { ip: IpAddr::V6(ip), port } => {
                // SAFETY: a structure of numbers, for which all zeros are a value.
                let mut place: libc::sockaddr_in6 = unsafe { core::mem::zeroed() };
                place.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                place.sin6_port = port.to_be();
                place.sin6_addr.s6_addr = ip.octets();
                connect_to(fd, &place, size_of::<libc::sockaddr_in6>())
            }
        }
    }

    fn connect_to<A>(fd: c_int, place: &A, length: usize) -> Result<(), c_int> {
        debug_assert!(length <= size_of::<A>(), "the address is in its structure");
        // SAFETY: `place` is a socket address of the platform, of which the first `length` bytes count.
        let outcome = unsafe { libc::connect(fd, ptr::from_ref(place).cast(), length as libc::socklen_t) };
        if outcome == 0 { Ok(()) } else { Err(errno(outcome as isize)) }
    }

    pub(super) fn send(fd: c_int, bytes: &[u8], more: bool) -> Result<usize, Fault> {
        let flags = NO_SIGNAL | if more { MORE } else { 0 };
        // SAFETY: `bytes` can be read over their whole length.
        moved(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) })
    }

    /// Sets an option. Where there is no such it is slower without, and that is all.
    pub(super) fn set(fd: c_int, level: c_int, option: c_int, value: c_int) {
        let (place, length) = ((&raw const value).cast(), size_of::<c_int>() as libc::socklen_t);
        // SAFETY: `place` points to as many bytes as `length` says.
        unsafe { libc::setsockopt(fd, level, option, place, length) };
    }

    pub(super) fn write(fd: c_int, bytes: &[u8]) -> Result<usize, Fault> {
        // SAFETY: `bytes` can be read over their whole length.
        moved(unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) })
    }

    pub(super) fn writev(fd: c_int, pieces: &[&[u8]]) -> Result<usize, Fault> {
        let mut list = [const { libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 } }; PIECES_MAX];
        let mut count = 0;
        for (place, piece) in list.iter_mut().zip(pieces) {
            *place = libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() };
            count += 1;
        }
        // SAFETY: the first `count` entries are pieces that can be read over their whole length, and are only read.
        moved(unsafe { libc::writev(fd, list.as_ptr(), count) })
    }

    pub(super) fn read(fd: c_int, into: &mut [u8]) -> Result<usize, Fault> {
        // SAFETY: `into` can be written over its whole length, and is nobody else's.
        moved(unsafe { libc::read(fd, into.as_mut_ptr().cast(), into.len()) })
    }

    pub(super) fn readv(fd: c_int, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        let piece = |into: &mut [u8]| libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let pieces = [piece(first), piece(second)];
        // SAFETY: both places can be written over their whole length, and are nobody else's.
        moved(unsafe { libc::readv(fd, pieces.as_ptr(), 2) })
    }

    /// What is ready, and whether the connection has failed; none when the time is over.
    pub(super) fn poll(fd: c_int, write: bool, timeout: c_int) -> Result<Option<(Ready, bool)>, c_int> {
        let events = libc::POLLIN | if write { libc::POLLOUT } else { 0 };
        let mut asked = libc::pollfd { fd, events, revents: 0 };
        // SAFETY: one structure, which nobody else has.
        let count = unsafe { libc::poll(&raw mut asked, 1, timeout) };
        polled(count, asked.revents)
    }

    /// The same of reading, with microseconds.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub(super) fn poll_exactly(fd: c_int, timeout: u64) -> Result<Option<(Ready, bool)>, c_int> {
        let mut asked = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let time = libc::timespec {
            tv_sec: (timeout / 1_000_000) as libc::time_t,
            tv_nsec: (timeout % 1_000_000 * 1000) as libc::c_long,
        };
        // SAFETY: one structure, which nobody else has, a time, and no signals.
        let count = unsafe { libc::ppoll(&raw mut asked, 1, &raw const time, ptr::null()) };
        polled(count, asked.revents)
    }

    /// There is no such wait.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    pub(super) fn poll_exactly(_: c_int, _: u64) -> Result<Option<(Ready, bool)>, c_int> {
        Err(libc::ENOSYS)
    }

    fn polled(count: c_int, events: libc::c_short) -> Result<Option<(Ready, bool)>, c_int> {
        match count {
            0 => Ok(None),
            1.. => {
                let is = |wanted| events & wanted != 0;
                // An error or the end is found by reading.
                let failed = is(libc::POLLERR | libc::POLLNVAL);
                let read = failed || is(libc::POLLIN | libc::POLLHUP);
                Ok(Some((Ready { read, write: is(libc::POLLOUT) }, failed)))
            }
            failed => Err(errno(failed as isize)),
        }
    }

    pub(super) fn close(fd: c_int) {
        // SAFETY: the descriptor is this socket's own, and forgotten after this.
        let _ = unsafe { libc::close(fd) };
    }

    /// Milliseconds of the clock that never goes back; 0 where there is none.
    pub(super) fn now() -> u64 {
        now_exactly() / 1000
    }

    /// Microseconds of the same.
    pub(super) fn now_exactly() -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a place for one time.
        let _ = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        // Platforms count these in numbers of different sizes.
        let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
        seconds * 1_000_000 + nanoseconds / 1000
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_wait_by_microseconds_ends_when_it_is_time_or_something_comes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let mut transport: Posix = format!("unix://{}", path.display()).parse().unwrap();
        transport.connect(u64::MAX).unwrap();
        let (mut agent, _) = listener.accept().unwrap();
        for microseconds in [0, 1, 700, 2300] {
            let until = transport.now_exactly().unwrap() + microseconds;
            assert_eq!(transport.wait_exactly(until), Err(Fault::Late));
            assert!(transport.now_exactly().unwrap() >= until);
        }
        agent.write_all(b"answer").unwrap();
        let until = transport.now_exactly().unwrap() + 60_000_000;
        assert_eq!(transport.wait_exactly(until), Ok(Ready { read: true, write: false }));
        assert!(transport.now() < until / 1000);
    }
    #[test]
    fn a_connection_that_does_not_come_in_time_is_closed() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        while near.write(&[0; 1 << 16]).is_ok() {}
        // Nobody takes anything, as where nobody answers.
        let mut transport: Posix = "unix://agent".parse().unwrap();
        transport.fd = near.into_raw_fd();
        let now = transport.now();
        assert_eq!(transport.connected(now), Err(Fault::Late));
        far.read_to_end(&mut Vec::new()).unwrap();
    }
}
