//! Memory that guest and agent both have, over unix sockets: the agent makes it and sends a descriptor of it over a
//! connection of its own.
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
use crate::text::Text;
use crate::transport::{Fault, Memory, Transport};

/// What a connection for memory begins with.
const PREFACE: &str = "VACCEL-MEMORY/1 ";

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
    /// Asks the agent at this address for so many bytes.
    pub(super) fn open(address: Address, bytes: usize, until: u64) -> Result<Self, Fault> {
        if !matches!(address, Address::Unix { .. }) {
            return Err(Fault::Broken(libc::EOPNOTSUPP));
        }
        let mut connection = Posix::new(address);
        connection.connect(until)?;
        let mut wish = Text::<64>::new();
        wish.push(PREFACE).push_number(bytes as u64).push("\n");
        let mut left = wish.as_bytes();
        while !left.is_empty() {
            match connection.write(&[left]) {
                Ok(count) => left = left.get(count..).unwrap_or_default(),
                Err(Fault::WouldBlock) => drop(connection.wait(true, until)?),
                Err(fault) => return Err(fault),
            }
        }
        let (mut answer, mut length, mut file) = ([0; ANSWER_BYTES_MAX], 0, None);
        let line = loop {
            let room = answer.get_mut(length..).filter(|room| !room.is_empty());
            match receive(connection.fd, room.ok_or(Fault::Broken(libc::EPROTO))?) {
                Ok((0, _)) => return Err(Fault::Broken(libc::ECONNRESET)),
                Ok((count, came)) => (length, file) = (length + count, file.or(came)),
                Err(Fault::WouldBlock) => drop(connection.wait(false, until)?),
                Err(fault) => return Err(fault),
            }
            if let Some((b'\n', line)) = answer.get(..length).and_then(<[u8]>::split_last) {
                break line;
            }
        };
        let name = line.strip_prefix(b"OK ").and_then(|name| core::str::from_utf8(name).ok());
        let (Some(name), Some(file)) = (name, file) else { return Err(Fault::Broken(libc::ENOMEM)) };
        if !is_sealed(&file, bytes) {
            return Err(Fault::Broken(libc::EPROTO));
        }
        let begin = map(&file, bytes).ok_or(Fault::Broken(libc::ENOMEM))?;
        Ok(Self { begin, bytes, name: name.into(), _connection: connection })
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
    Ok((count, came.then_some(File(descriptor))))
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
