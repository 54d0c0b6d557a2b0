//! Connections that bring a region of shared memory: one line there, one line and a file descriptor back, and silence
//! for as long as the region is wanted.
//!
//! TCP carries no descriptors. Its callers from this machine get a ticket, for the [`Annex`].

use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use vaccel_proto::{Endpoint, Error, Reason};

use super::{Listener, Stream};
use crate::shared::{Region, random_name};

/// Bytes of a line: 20 digits, and a token of the length that the thin guest has room for.
const LINE_BYTES_MAX: usize = 20 + 1 + 256;

/// What a line of a peer says.
///
/// # Errors
/// The stream's; and `BAD_ARGUMENT` for one that does not end, or is no text.
async fn line(stream: &mut Box<dyn Stream>) -> io::Result<Result<String, Error>> {
    let mut line = Vec::new();
    while line.len() <= LINE_BYTES_MAX {
        match stream.read_u8().await? {
            b'\n' => return Ok(String::from_utf8(line).map_err(|_| wrong("no text"))),
            byte => line.push(byte),
        }
    }
    Ok(Err(wrong("a longer line")))
}

fn wrong(got: impl std::fmt::Display) -> Error {
    Error::field("bytes", "a number, a token if one is needed, and a line's end", got)
}

/// How many bytes the peer wants, and the token it has for it.
///
/// # Errors
/// The stream's; and `BAD_ARGUMENT` for something else than a number.
pub(super) async fn wanted(stream: &mut Box<dyn Stream>) -> io::Result<Result<(u64, Option<String>), Error>> {
    Ok(line(stream).await?.and_then(|line| {
        let (digits, token) =
            line.split_once(' ').map_or((&*line, None), |(digits, token)| (digits, Some(token)));
        let bytes = digits.parse().map_err(|_| wrong(digits.escape_debug()))?;
        Ok((bytes, token.map(str::to_owned)))
    }))
}

/// Says that the peer gets none, and why.
pub(super) async fn refuse(stream: &mut Box<dyn Stream>, error: &Error) -> io::Result<()> {
    say(stream, &format!("ERROR {}: {error}\n", error.reason()), None).await
}

/// Gives the region to the peer.
pub(super) async fn give(stream: &mut Box<dyn Stream>, region: &Region) -> io::Result<()> {
    say(stream, &format!("OK {}\n", region.name()), Some(region.file())).await
}

/// So short a line goes as a whole.
async fn say(stream: &mut Box<dyn Stream>, line: &str, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    poll_fn(|context| stream.poll_send(context, line.as_bytes(), file)).await.map(drop)
}

/// A unix socket where callers over TCP from this machine get their memory. Whoever lists the machine's sockets finds
/// it; what is got there is what a ticket is for, and nobody guesses one.
#[derive(Debug)]
pub(crate) struct Annex {
    name: String,
    tickets: Mutex<HashMap<String, Weak<Region>>>,
}

impl Annex {
    /// # Errors
    /// The system's.
    pub(crate) async fn open() -> io::Result<(Arc<Self>, Listener)> {
        let name = random_name().map_err(io::Error::other)?;
        let annex = Self { name: format!("vaccel-memory-{name}"), tickets: Mutex::default() };
        let listener = Listener::bind(&annex.endpoint(), 0).await?;
        Ok((Arc::new(annex), listener))
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::UnixAbstract(self.name.clone())
    }

    /// Whether this is where its callers come in.
    pub(super) fn is(&self, endpoint: &Endpoint) -> bool {
        matches!(endpoint, Endpoint::UnixAbstract(name) if *name == self.name)
    }

    fn tickets(&self) -> MutexGuard<'_, HashMap<String, Weak<Region>>> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the peer where the region is got and by which ticket, which is valid once and while it is kept.
    pub(super) async fn offer(
        &self,
        stream: &mut Box<dyn Stream>,
        region: &Arc<Region>,
    ) -> io::Result<Ticket<'_>> {
        let ticket = Ticket { annex: self, ticket: random_name().map_err(io::Error::other)? };
        self.tickets().insert(ticket.ticket.clone(), Arc::downgrade(region));
        say(stream, &format!("AT {} {}\n", self.name, ticket.ticket), None).await?;
        Ok(ticket)
    }

    /// Gives a peer that has a ticket what it is for.
    pub(super) async fn redeem(&self, stream: &mut Box<dyn Stream>) -> io::Result<()> {
        let region = line(stream).await?.and_then(|ticket| {
            let region = self.tickets().remove(&ticket).and_then(|region| region.upgrade());
            region.ok_or_else(|| Error::new(Reason::Denied, "expected a ticket that is valid"))
        });
        match region {
            Ok(region) => give(stream, &region).await,
            Err(error) => refuse(stream, &error).await,
        }
    }
}

/// A ticket that may still be used.
#[derive(Debug)]
pub(super) struct Ticket<'a> {
    annex: &'a Annex,
    ticket: String,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.annex.tickets().remove(&self.ticket);
    }
}

/// That a peer of this kind cannot have any memory.
pub(super) fn none_for_others() -> Error {
    Error::new(Reason::Denied, "shared memory is for callers from this machine, over unix sockets or TCP")
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
