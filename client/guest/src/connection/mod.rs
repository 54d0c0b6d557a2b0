//! One HTTP/2 connection with one call on it at a time, without any I/O.
//!
//! Whoever has the socket asks where incoming bytes go ([`Connection::places`]) and which bytes to send
//! ([`Connection::outgoing`]), and says how many it moved. A tensor's bytes are sent from where the caller has them
//! and arrive where the caller wants them: nothing in between holds them.
//!
//! A peer may cut its frames and mix its PINGs, SETTINGS and WINDOW_UPDATEs with a reply as it likes. What is held of
//! it is bounded by [`RX_BYTES`].
//!
//! *Source:* RFC 9113; gRPC over HTTP/2.

mod receive;
mod send;

use crate::error::{Error, Reason};
use crate::frame::{self, Header};
use crate::hpack;
use crate::protobuf::{Malformed, Reader, Walker};
use crate::status::{Status, TEXT_BYTES};
use crate::text::Text;

/// Bytes received and not looked at yet: a frame of the protocol's default size. Only the contents of DATA frames may
/// be longer, and those are passed on as they come.
const RX_BYTES: usize = frame::FRAME_BYTES_DEFAULT + frame::HEADER_BYTES;

/// Bytes to send that are not the caller's: the opening, request headers, short messages, answers to the peer.
const TX_BYTES: usize = 4096;

/// Bytes of the longest request headers.
const HEAD_BYTES: usize = 1024;

/// Parts of a message up to this length are copied to the other bytes to send, longer ones are sent from their place.
const COPIED_BYTES_MAX: usize = 1024;

/// Frames that are sent together with the one before them, and pieces of memory that these, their headers and the parts
/// of the message in them can be. A peer with frames of 64 KiB is sent a megabyte in one system call.
const AHEAD_MAX: usize = 15;
pub(crate) const PIECES_MAX: usize = 64;

/// DATA frames that the peer may send, in bytes. Fewer frames are fewer system calls; their bytes go straight to the
/// caller's place, so that they cost no memory here.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// Received bytes after which the peer is given its whole window back.
const CONSUMED_BYTES_MAX: u32 = 1 << 30;

/// PINGs whose answers wait for the end of a frame being sent; those beyond them get none. Peers ask one at a time.
const PINGS_MAX: usize = 4;

/// A message of gRPC: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Longest message either side sends, in bytes; the contract's limit.
pub(crate) const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// The call's way as HTTP/2 names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestHead<'a> {
    pub(crate) path: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) token: &'a [u8],
    /// Milliseconds the caller waits.
    pub(crate) timeout_ms: u64,
}

/// One call on its way.
pub(crate) struct Call<'a> {
    stream: u32,
    /// The parts of the message, one after the other, the prefix first.
    parts: &'a [&'a [u8]],
    part: usize,
    offset: usize,
    /// Bytes of them that are in no frame yet.
    unframed: usize,
    window: i64,
    reply: &'a mut dyn Reader,
    prefix: [u8; PREFIX_BYTES],
    prefix_length: usize,
    walker: Option<Walker>,
    status: Status,
    /// The first headers came.
    answered: bool,
    over: bool,
}

impl core::fmt::Debug for Call<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Call").field("stream", &self.stream).field("over", &self.over).finish_non_exhaustive()
    }
}

impl<'a> Call<'a> {
    pub(crate) fn new(parts: &'a [&'a [u8]], reply: &'a mut dyn Reader) -> Self {
        Self {
            stream: 0,
            parts,
            part: 0,
            offset: 0,
            unframed: parts.iter().map(|part| part.len()).sum(),
            window: 0,
            reply,
            prefix: [0; PREFIX_BYTES],
            prefix_length: 0,
            walker: None,
            status: Status::default(),
            answered: false,
            over: false,
        }
    }

    /// Whether nothing more comes or goes.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Whether the peer has begun to answer.
    pub(crate) fn is_answered(&self) -> bool {
        self.answered
    }

    /// Whether some of the request has to wait for the peer's windows.
    pub(crate) fn is_held_up(&self) -> bool {
        self.unframed > 0
    }

    /// Whether bytes of a message came.
    pub(crate) fn has_message(&self) -> bool {
        self.prefix_length > 0
    }

    /// The rest of the part that is being sent.
    fn rest(&self) -> &'a [u8] {
        self.parts.get(self.part).and_then(|part| part.get(self.offset..)).unwrap_or_default()
    }

    /// The frame that begins with so much of the message in none yet.
    fn next_frame(&self, unframed: usize, window: i64, most: usize) -> Option<Header> {
        let length = unframed.min(usize::try_from(window).unwrap_or(0)).min(most);
        let flags = if length == unframed { frame::END_STREAM } else { 0 };
        (length > 0).then_some(Header { length, kind: frame::DATA, flags, stream: self.stream })
    }

    fn advance(&mut self, count: usize) {
        self.offset += count;
        while let Some(part) = self.parts.get(self.part)
            && let Some(beyond) = self.offset.checked_sub(part.len())
        {
            self.offset = beyond;
            self.part += 1;
        }
    }

    /// Bytes of the reply's DATA frames.
    fn data(&mut self, mut bytes: &[u8]) -> Result<(), Malformed> {
        while !bytes.is_empty() {
            if let Some(walker) = &mut self.walker {
                return walker.feed(self.reply, bytes);
            }
            let wanted = PREFIX_BYTES - self.prefix_length;
            let (now, later) = bytes.split_at_checked(wanted).unwrap_or((bytes, &[]));
            let place = self.prefix.get_mut(self.prefix_length..).and_then(|rest| rest.get_mut(..now.len()));
            place.ok_or(Malformed)?.copy_from_slice(now);
            self.prefix_length += now.len();
            bytes = later;
            if self.prefix_length == PREFIX_BYTES {
                let [compressed, length @ ..] = self.prefix;
                let length = u32::from_be_bytes(length) as usize;
                if compressed != 0 || length > MESSAGE_BYTES_MAX {
                    return Err(Malformed);
                }
                self.walker = Some(Walker::new(length));
            }
        }
        Ok(())
    }

    /// How it went, once it is over.
    ///
    /// # Errors
    /// The agent's, or `BACKEND_FAILED` where the reply is none.
    pub(crate) fn outcome(&mut self) -> Result<(), Error> {
        self.status.outcome()?;
        if self.walker.as_ref().is_some_and(Walker::is_whole) {
            return Ok(());
        }
        self.status.text.clear();
        self.status.text.push("the reply is no message of the contract, or was cut");
        Err(Error::new(Reason::BackendFailed))
    }

    /// What people are told about it.
    pub(crate) fn text(&self) -> &Text<TEXT_BYTES> {
        &self.status.text
    }
}

/// Why a connection cannot be used any more, or the call on it not any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The peer broke a rule of HTTP/2 or of gRPC: what it was about.
    Protocol(&'static str),
    /// The reply's message is none of the contract, or does not fit where it should go.
    Reply,
    /// The peer did not take the call: it ran nothing.
    Refused,
    /// The peer ended the call with this code of RST_STREAM.
    Reset(u32),
}

/// What is being read.
#[derive(Clone, Copy, Debug)]
enum Inside {
    /// Nothing: a frame's header comes next.
    Between,
    /// A DATA frame: bytes of content and then of padding still to come.
    Data { left: usize, padding: usize, own: bool, last: bool },
    /// Something to pass over.
    Skip { left: usize },
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Connection {
    rx: [u8; RX_BYTES],
    /// A header block that is not whole yet is at the beginning of `rx`; then what was received and not looked at.
    block: usize,
    /// The stream of that block, and whether it ends the stream; none between blocks.
    block_of: Option<(u32, bool)>,
    rx_begin: usize,
    rx_end: usize,
    tx: [u8; TX_BYTES],
    tx_begin: usize,
    tx_end: usize,
    /// Bytes of the call's parts that follow `tx`, of the DATA frame whose header is at the end of `tx` or was sent.
    framed: usize,
    /// Headers of the frames behind that one.
    ahead: [[u8; frame::HEADER_BYTES]; AHEAD_MAX],
    inside: Inside,
    /// The peer's settings came: it is there, and speaks HTTP/2.
    settled: bool,
    settings_unanswered: u32,
    pings: [[u8; 8]; PINGS_MAX],
    pings_count: usize,
    /// What the peer may send, and was not given back yet.
    consumed: u32,
    window: i64,
    peer_window: i64,
    peer_frame: usize,
    next_stream: u32,
    /// The peer takes no new calls.
    leaving: bool,
}

impl Connection {
    /// A connection that is to be opened.
    pub(crate) const fn new() -> Self {
        Self {
            rx: [0; RX_BYTES],
            block: 0,
            block_of: None,
            rx_begin: 0,
            rx_end: 0,
            tx: [0; TX_BYTES],
            tx_begin: 0,
            tx_end: 0,
            framed: 0,
            ahead: [[0; frame::HEADER_BYTES]; AHEAD_MAX],
            inside: Inside::Between,
            settled: false,
            settings_unanswered: 0,
            pings: [[0; 8]; PINGS_MAX],
            pings_count: 0,
            consumed: 0,
            window: frame::WINDOW_DEFAULT,
            peer_window: frame::WINDOW_DEFAULT,
            peer_frame: frame::FRAME_BYTES_DEFAULT,
            next_stream: 1,
            leaving: false,
        }
    }

    /// Begins anew: what a client says first is ready to be sent.
    pub(crate) fn open(&mut self) {
        (self.block, self.block_of, self.rx_begin, self.rx_end) = (0, None, 0, 0);
        (self.tx_begin, self.tx_end, self.framed, self.inside) = (0, 0, 0, Inside::Between);
        (self.settled, self.settings_unanswered, self.pings_count, self.consumed) = (false, 0, 0, 0);
        (self.window, self.peer_window) = (frame::WINDOW_DEFAULT, frame::WINDOW_DEFAULT);
        (self.peer_frame, self.next_stream, self.leaving) = (frame::FRAME_BYTES_DEFAULT, 1, false);
        self.push(frame::PREFACE);
        let settings = [
            (frame::HEADER_TABLE_SIZE, 0),
            (frame::ENABLE_PUSH, 0),
            (frame::INITIAL_WINDOW_SIZE, frame::WINDOW_MAX),
            (frame::MAX_FRAME_SIZE, FRAME_BYTES_MAX as u32),
            (frame::MAX_HEADER_LIST_SIZE, frame::FRAME_BYTES_DEFAULT as u32),
        ];
        self.push_frame(frame::SETTINGS, 0, 0, settings.len() * 6);
        for (setting, value) in settings {
            self.push(&setting.to_be_bytes());
            self.push(&value.to_be_bytes());
        }
        self.push_frame(frame::WINDOW_UPDATE, 0, 0, 4);
        self.push(&(frame::WINDOW_MAX - frame::WINDOW_DEFAULT as u32).to_be_bytes());
    }

    /// Whether the peer has shown that it is one.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled
    }

    /// Whether a new call may begin.
    pub(crate) fn takes_calls(&self) -> bool {
        let room = TX_BYTES - self.tx_end.saturating_sub(self.tx_begin);
        !self.leaving && self.next_stream < frame::WINDOW_MAX && self.framed == 0 && room >= HEAD_BYTES
    }

    /// Says that a call is about to come; returns whether there is something to send.
    pub(crate) fn alert(&mut self) -> bool {
        let may = self.settled && self.takes_calls();
        if may {
            self.compact();
            self.push_frame(frame::ALERT, 0, 0, 0);
        }
        may
    }

    /// Puts the call's headers on their way.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when the address or token is too long for a header.
    pub(crate) fn start(&mut self, head: &RequestHead<'_>, call: &mut Call<'_>) -> Result<(), Error> {
        self.compact();
        let place = self.tx.get_mut(self.tx_end + frame::HEADER_BYTES..).unwrap_or_default();
        let mut headers = hpack::Writer::new(place);
        headers.indexed(hpack::METHOD_POST);
        headers.indexed(hpack::SCHEME_HTTP);
        headers.named(hpack::PATH, head.path.as_bytes());
        headers.named(hpack::AUTHORITY, head.authority.as_bytes());
        headers.named(hpack::CONTENT_TYPE, b"application/grpc");
        headers.literal(b"te", b"trailers");
        headers.named(hpack::USER_AGENT, concat!("vaccel-guest/", env!("CARGO_PKG_VERSION")).as_bytes());
        let mut timeout = Text::<16>::new();
        // The header has room for 8 digits; in milliseconds that is a day.
        timeout.push_number(head.timeout_ms.min(99_999_999)).push("m");
        headers.literal(b"grpc-timeout", timeout.as_bytes());
        if !head.token.is_empty() {
            headers.secret(hpack::AUTHORIZATION, [b"Bearer ", head.token]);
        }
        let length = headers.finish().ok_or(Error::new(Reason::BadArgument))?;
        call.stream = self.next_stream;
        call.window = self.peer_window;
        self.next_stream += 2;
        self.push_frame(frame::HEADERS, frame::END_HEADERS, call.stream, length);
        self.tx_end += length;
        Ok(())
    }

    /// Gives the call up: what is left of it is not sent, and what still comes for it is passed over. Returns whether
    /// the connection can go on: not in the middle of a frame.
    pub(crate) fn abandon(&mut self, call: &mut Call<'_>) -> bool {
        call.over = true;
        self.skip_content();
        self.reset(call.stream, frame::CANCEL);
        self.takes_calls()
    }

    /// Passes over what is left of a DATA frame.
    fn skip_content(&mut self) {
        if let Inside::Data { left, padding, .. } = self.inside {
            self.consumed = self.consumed.saturating_add((left + padding) as u32);
            self.inside = Inside::Skip { left: left + padding };
        }
    }
}

/// Moves a part of a buffer towards its beginning.
fn move_down(buffer: &mut [u8], part: core::ops::Range<usize>, to: usize) {
    // Always so; said for the compiler, which then knows that nothing here panics.
    if part.start <= part.end && part.end <= buffer.len() && to <= part.start {
        buffer.copy_within(part, to);
    }
}
