//! Getting a region from an agent: a connection of its own, over which the file descriptor comes.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use vaccel_proto::Endpoint;

use super::{Mapping, Region, Slots};

/// What a connection for memory begins with; the number of bytes and a line's end follow.
pub const PREFACE: &[u8] = b"VACCEL-MEMORY/1 ";

/// Bytes of an answer: the longest are errors in words.
const ANSWER_BYTES_MAX: usize = 512;

/// Asks for a region.
///
/// # Errors
/// The socket's; and that the agent, or whatever answered, gave none.
pub(super) async fn open(endpoint: &Endpoint, bytes: usize) -> io::Result<Region> {
    let mut stream = match endpoint {
        Endpoint::Unix(path) => UnixStream::connect(path).await?,
        Endpoint::UnixAbstract(name) => UnixStream::connect(format!("\0{name}")).await?,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    stream.write_all(&[PREFACE, format!("{bytes}\n").as_bytes()].concat()).await?;
    let mut answer = Vec::new();
    let mut file = None;
    while answer.last() != Some(&b'\n') {
        let mut part = [0; ANSWER_BYTES_MAX];
        let (count, came) = stream.async_io(Interest::READABLE, || receive(&stream, &mut part)).await?;
        answer.extend_from_slice(&part[..count]);
        file = file.or(came);
        if count == 0 || answer.len() > ANSWER_BYTES_MAX {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let answer = String::from_utf8_lossy(&answer).trim_end().to_owned();
    let (Some(name), Some(file)) = (answer.strip_prefix("OK "), file) else {
        return Err(io::Error::other(answer));
    };
    let connection: StdUnixStream = stream.into_std()?;
    Ok(Region {
        name: name.to_owned(),
        mapping: Mapping::new(&file, bytes)?,
        slots: Mutex::new(Slots::new(bytes)),
        lost: AtomicUsize::new(0),
        reply_bytes: AtomicUsize::new(0),
        _connection: connection,
    })
}

/// What came, and a file descriptor if one came with it.
fn receive(stream: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [io::IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Ok((received.bytes, file))
}
