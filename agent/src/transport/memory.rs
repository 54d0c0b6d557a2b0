//! Connections that bring a region of shared memory: one line there, one line and a file descriptor back, and silence
//! for as long as the region is wanted.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use vaccel_proto::{Error, Reason};

use super::Stream;
use crate::identity::Peer;
use crate::shared::Region;

/// Bytes of a line: digits and its end.
const LINE_BYTES_MAX: usize = 21;

/// How many bytes the peer wants.
///
/// # Errors
/// The stream's; and `BAD_ARGUMENT` for something else than a number.
pub(super) async fn wanted(stream: &mut Box<dyn Stream>) -> io::Result<Result<u64, Error>> {
    let mut line = Vec::new();
    while line.len() < LINE_BYTES_MAX {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    let number = str::from_utf8(&line).ok().and_then(|digits| digits.parse().ok());
    Ok(number.ok_or_else(|| Error::field("bytes", "a number and a line's end", line.escape_ascii())))
}

/// That a peer of another kind cannot have any.
pub(super) fn check(peer: &Peer) -> Result<(), Error> {
    match peer {
        Peer::Unix { .. } => Ok(()),
        _ => Err(Error::new(Reason::Denied, "shared memory is for callers of a unix socket")),
    }
}

/// Says what became of the wish.
pub(super) async fn answer(stream: &mut Box<dyn Stream>, region: &Result<Region, Error>) -> io::Result<()> {
    let line = match region {
        Ok(region) => format!("OK {}\n", region.name()),
        Err(error) => format!("ERROR {}: {error}\n", error.reason()),
    };
    let file = region.as_ref().ok().map(Region::file);
    // So short a line goes as a whole.
    poll_fn(|context| stream.poll_send(context, line.as_bytes(), file)).await.map(drop)
}

/// Writes to a unix socket.
pub(super) fn send(stream: &UnixStream, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = file.as_slice();
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Waits until the peer is gone.
pub(super) async fn gone(stream: &mut Box<dyn Stream>) {
    let mut byte = [0];
    // Whatever it says, it has nothing to say any more.
    while let Ok(1..) = stream.read(&mut byte).await {}
}
