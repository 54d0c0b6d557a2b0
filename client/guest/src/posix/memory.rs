//! Memory that guest and agent both have: the agent makes it and sends a descriptor of it over a connection of its own.
//! TCP carries none; there a caller from the agent's machine is told where a ticket gets it.
//!
//! What is used: `recvmsg`, `fcntl`, `fstat`, `mmap` and `munmap`. Where one of them is missing there is no such
//! memory.

#![allow(unsafe_code, reason = "memory that is mapped is a pointer and a length")]

use core::ffi::c_int;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use super::{Posix, sys};
use crate::address::Address;
use crate::copy::{PAST_CACHES_BYTES_MIN, past_caches};
use crate::link::TOKEN_BYTES;
use crate::text::Text;
use crate::transport::{Fault, Memory, Transport};

/// What a connection for memory begins with.
const PREFACE: &str = "VACCEL-MEMORY/1 ";

/// A line that asks: 20 digits, a token, and what is around them.
type Wish = Text<{ PREFACE.len() + 20 + 1 + TOKEN_BYTES + 1 }>;

/// Bytes of an answer: the longest are errors in words.
const ANSWER_BYTES_MAX: usize = 512;

/// Memory that the agent has, too.
#[derive(Debug)]
pub struct SharedMemory {
    begin: NonNull<u8>,
    bytes: usize,
    name: Text<64>,
    /// The agent has it for as long as this is open.
    _connection: Posix,
}

/// A descriptor that is closed when it is dropped.
struct File(c_int);

impl Drop for File {
    fn drop(&mut self) {
        sys::close(self.0);
    }
}

impl SharedMemory {
    /// Asks the agent at this address for so many bytes. Where it says that they are got elsewhere, they are.
    pub(super) fn open(address: Address, token: &str, bytes: usize, until: u64) -> Result<Self, Fault> {
        let is_near = match address {
            Address::Unix { .. } => true,
            Address::Tcp { ip, .. } => ip.is_loopback(),
            Address::Vsock { .. } => false,
        };
        if !is_near {
            return Err(Fault::Broken(libc::EOPNOTSUPP));
        }
        let mut wish = Wish::new();
        wish.push(PREFACE).push_number(bytes as u64);
        if !token.is_empty() {
            wish.push(" ").push(token);
        }
        let mut connection = Posix::new(address);
        let mut answer = Answer::to(wish, &mut connection, until)?;
        if let Some((name, ticket)) = answer.word("AT ").and_then(|place| place.split_once(' ')) {
            let address = Address::Unix { path: name.into(), is_abstract: true };
            let mut wish = Wish::new();
            wish.push(PREFACE).push(ticket);
            answer = Answer::to(wish, &mut Posix::new(address), until)?;
        }
        let name: Text<64> = answer.word("OK ").ok_or(Fault::Broken(libc::ENOMEM))?.into();
        let file = answer.file.ok_or(Fault::Broken(libc::EPROTO))?;
        if !is_sealed(&file, bytes) {
            return Err(Fault::Broken(libc::EPROTO));
        }
        let begin = map(&file, bytes).ok_or(Fault::Broken(libc::ENOMEM))?;
        Ok(Self { begin, bytes, name, _connection: connection })
    }
}

/// What an agent answers to a wish: a line, and perhaps a descriptor.
struct Answer {
    line: Text<ANSWER_BYTES_MAX>,
    file: Option<File>,
}

impl Answer {
    /// Connects, and says what is wished for.
    fn to(mut wish: Wish, connection: &mut Posix, until: u64) -> Result<Self, Fault> {
        connection.connect(until)?;
        let mut left = wish.push("\n").as_bytes();
        while !left.is_empty() {
            match connection.write(&[left]) {
                Ok(count) => left = left.get(count..).unwrap_or_default(),
                Err(Fault::WouldBlock) => drop(connection.wait(true, until)?),
                Err(fault) => return Err(fault),
            }
        }
        let mut answer = Self { line: Text::new(), file: None };
        while !answer.line.as_bytes().ends_with(b"\n") {
            let room = answer.line.spare();
            if room.is_empty() {
                return Err(Fault::Broken(libc::EPROTO));
            }
            match receive(connection.fd, room) {
                Ok((0, _)) => return Err(Fault::Broken(libc::ECONNRESET)),
                Ok((count, came)) => {
                    answer.line.grow(count);
                    answer.file = answer.file.or(came);
                }
                Err(Fault::WouldBlock) => drop(connection.wait(false, until)?),
                Err(fault) => return Err(fault),
            }
        }
        Ok(answer)
    }

    /// What follows this word.
    fn word(&self, word: &str) -> Option<&str> {
        self.line.as_str().trim_end().strip_prefix(word)
    }
}

impl Memory for SharedMemory {
    fn name(&self) -> &str {
        self.name.as_str()
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) -> bool {
        let place = self.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len()));
        let Some(place) = place else { return false };
        if bytes.len() < PAST_CACHES_BYTES_MIN {
            place.copy_from_slice(bytes);
        } else {
            // SAFETY: so many bytes are there, which are borrowed mutably, so that none of `bytes` are among them.
            unsafe { past_caches(bytes, place.as_mut_ptr()) };
        }
        true
    }
}

impl Deref for SharedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped there until `self` is dropped, and whoever borrows them mutably borrows
        // `self`. The file is sealed, so that its pages stay. The agent may write there: what is read are numbers, of
        // which any bits are some.
        unsafe { core::slice::from_raw_parts(self.begin.as_ptr(), self.bytes) }
    }
}

impl DerefMut for SharedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; nobody else in this process has the mapping.
        unsafe { core::slice::from_raw_parts_mut(self.begin.as_ptr(), self.bytes) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, as long as this, and forgotten after it.
        let _ = unsafe { libc::munmap(self.begin.as_ptr().cast(), self.bytes) };
    }
}

// SAFETY: the mapping belongs to the process and to this value alone; any thread may use it.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; without `&mut` it is only read.
unsafe impl Sync for SharedMemory {}

/// What came, and a descriptor if one came with it.
fn receive(fd: c_int, into: &mut [u8]) -> Result<(usize, Option<File>), Fault> {
    /// Room for the header of one control message and what follows it, on its boundary.
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        content: [c_int; 2],
    }
    let mut piece = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: structures of numbers and pointers, for which all zeros are a value.
    let (mut control, mut message): (Control, libc::msghdr) = unsafe { core::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
    message.msg_control = (&raw mut control).cast();
    // One descriptor and not two: the system closes what finds no room.
    // SAFETY: takes a number only.
    message.msg_controllen = unsafe { libc::CMSG_LEN(size_of::<c_int>() as u32) } as _;
    // SAFETY: one piece that can be written over its whole length, and as much room for control messages as was said.
    let count = sys::moved(unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_CMSG_CLOEXEC) })?;
    let came = message.msg_controllen > 0
        && (control.header.cmsg_level, control.header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS);
    let [descriptor, _] = control.content;
    // Not `then_some`: a value that is not wanted would be closed.
    Ok((count, came.then(|| File(descriptor))))
}

/// Whether a file has so many bytes, and always will.
fn is_sealed(file: &File, bytes: usize) -> bool {
    // SAFETY: takes numbers only.
    let seals = unsafe { libc::fcntl(file.0, libc::F_GET_SEALS) };
    // SAFETY: a structure of numbers, for which all zeros are a value.
    let mut about: libc::stat = unsafe { core::mem::zeroed() };
    // SAFETY: a place for what is told about the file.
    let told = unsafe { libc::fstat(file.0, &raw mut about) } == 0;
    seals >= 0
        && seals & libc::F_SEAL_SHRINK != 0
        && told
        && usize::try_from(about.st_size).is_ok_and(|size| size >= bytes)
}

/// The first bytes of a file, for reading and writing.
fn map(file: &File, bytes: usize) -> Option<NonNull<u8>> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, which is nowhere where something was.
    let begin = unsafe { libc::mmap(core::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.0, 0) };
    NonNull::new(begin.cast()).filter(|_| begin != libc::MAP_FAILED)
}
