//! One HTTP/2 connection with one call on it at a time, without any I/O.
//!
//! Whoever has the socket asks where incoming bytes go ([`Connection::places`]) and which bytes to send
//! ([`Connection::outgoing`]), and says how many it moved. A tensor's bytes are sent from where the caller has them and
//! arrive where the caller wants them: nothing in between holds them.
//!
//! A peer may cut its frames and mix its PINGs, SETTINGS and WINDOW_UPDATEs with a reply as it likes. What is held of it
//! is bounded by [`RX_BYTES`].
//!
//! *Source:* RFC 9113; gRPC over HTTP/2.

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

/// Parts of a message up to this length are copied to the other bytes to send, longer ones are sent from their place.
const COPIED_BYTES_MAX: usize = 1024;

/// DATA frames that the peer may send, in bytes. Fewer frames are fewer system calls; their bytes go straight to the
/// caller's place, so that they cost no memory here.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// Received bytes after which the peer is given its whole window back.
const CONSUMED_BYTES_MAX: u32 = 1 << 30;

/// Answers to the peer that wait for the end of a frame being sent; beyond them nothing more is read.
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

    /// The rest of the part that is being sent.
    fn rest(&self) -> &'a [u8] {
        self.parts.get(self.part).and_then(|part| part.get(self.offset..)).unwrap_or_default()
    }

    fn advance(&mut self, count: usize) {
        self.offset += count;
        while self.parts.get(self.part).is_some_and(|part| self.offset >= part.len()) {
            self.offset = 0;
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
        !self.leaving && self.next_stream < frame::WINDOW_MAX && self.framed == 0
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
            self.consumed += (left + padding) as u32;
            self.inside = Inside::Skip { left: left + padding };
        }
    }
}

// === sending ===

impl Connection {
    fn room(&self) -> usize {
        TX_BYTES - self.tx_end
    }

    fn push(&mut self, bytes: &[u8]) {
        if let Some(place) = self.tx.get_mut(self.tx_end..).and_then(|rest| rest.get_mut(..bytes.len())) {
            place.copy_from_slice(bytes);
            self.tx_end += bytes.len();
        }
    }

    fn push_frame(&mut self, kind: u8, flags: u8, stream: u32, length: usize) {
        self.push(&Header { length, kind, flags, stream }.encode());
    }

    /// Ends a stream; where that cannot be said now, the connection takes no more calls.
    fn reset(&mut self, stream: u32, code: u32) {
        if self.framed > 0 || self.room() < frame::HEADER_BYTES + 4 {
            self.leaving = true;
            return;
        }
        self.push_frame(frame::RST_STREAM, 0, stream, 4);
        self.push(&code.to_be_bytes());
    }

    /// Moves what is to be sent to the beginning of its place.
    fn compact(&mut self) {
        if self.tx_begin > 0 {
            self.tx.copy_within(self.tx_begin..self.tx_end, 0);
            (self.tx_begin, self.tx_end) = (0, self.tx_end - self.tx_begin);
        }
    }

    /// Readies what can be sent now: answers to the peer, then the next frame of the call.
    fn fill(&mut self, call: Option<&mut Call<'_>>, answers: bool) {
        if self.framed > 0 {
            return;
        }
        self.compact();
        let call = call.filter(|call| !call.over);
        if answers
            || self.tx_end > 0
            || self.pings_count > 0
            || call.as_ref().is_some_and(|call| call.unframed > 0)
        {
            self.answer();
        }
        let Some(call) = call else { return };
        while self.framed == 0 && call.unframed > 0 && self.room() > frame::HEADER_BYTES + COPIED_BYTES_MAX {
            let window = usize::try_from(self.window.min(call.window)).unwrap_or(0);
            let length = call.unframed.min(window).min(self.peer_frame);
            if length == 0 {
                return;
            }
            call.unframed -= length;
            self.window -= length as i64;
            call.window -= length as i64;
            let flags = if call.unframed == 0 { frame::END_STREAM } else { 0 };
            self.push_frame(frame::DATA, flags, call.stream, length);
            self.framed = length;
            self.copy_short(call);
        }
    }

    /// Puts short parts of the frame behind its header; a long one is sent from its place.
    fn copy_short(&mut self, call: &mut Call<'_>) {
        while self.framed > 0 {
            let rest = call.rest();
            let part = rest.get(..self.framed).unwrap_or(rest);
            if part.len() > COPIED_BYTES_MAX || part.len() > self.room() {
                return;
            }
            self.push(part);
            self.framed -= part.len();
            call.advance(part.len());
        }
    }

    /// Answers to SETTINGS and PINGs, and windows given back.
    fn answer(&mut self) {
        const ANSWER_BYTES: usize = frame::HEADER_BYTES + 8;
        while self.settings_unanswered > 0 && self.room() >= ANSWER_BYTES {
            self.push_frame(frame::SETTINGS, frame::ACK, 0, 0);
            self.settings_unanswered -= 1;
        }
        while self.pings_count > 0 && self.room() >= ANSWER_BYTES {
            self.pings_count -= 1;
            let ping = self.pings.get(self.pings_count).copied().unwrap_or_default();
            self.push_frame(frame::PING, frame::ACK, 0, 8);
            self.push(&ping);
        }
        if self.consumed >= CONSUMED_BYTES_MAX && self.room() >= ANSWER_BYTES {
            self.push_frame(frame::WINDOW_UPDATE, 0, 0, 4);
            self.push(&self.consumed.to_be_bytes());
            self.consumed = 0;
        }
    }

    /// Whether an answer to the peer is waiting for something it can be sent with.
    pub(crate) fn owes_answer(&self) -> bool {
        self.settings_unanswered > 0
    }

    /// The bytes to send now, in two pieces; empty when there is nothing to send or the peer has to say something first.
    /// Answers to the peer go with them, or with `answers` by themselves.
    pub(crate) fn outgoing<'c, 'p: 'c>(
        &'c mut self,
        mut call: Option<&mut Call<'p>>,
        answers: bool,
    ) -> [&'c [u8]; 2] {
        self.fill(call.as_deref_mut(), answers);
        let own = self.tx.get(self.tx_begin..self.tx_end).unwrap_or_default();
        let rest = call.map_or(&[][..], |call| call.rest());
        [own, rest.get(..self.framed).unwrap_or(rest)]
    }

    /// So many of them were sent.
    pub(crate) fn sent(&mut self, call: Option<&mut Call<'_>>, count: usize) {
        let own = count.min(self.tx_end - self.tx_begin);
        self.tx_begin += own;
        if self.tx_begin == self.tx_end {
            (self.tx_begin, self.tx_end) = (0, 0);
        }
        let (Some(call), beyond @ 1..) = (call, count - own) else { return };
        self.framed = self.framed.saturating_sub(beyond);
        call.advance(beyond);
        if self.tx_end == 0 {
            self.copy_short(call);
        }
    }
}

// === receiving ===

impl Connection {
    /// Where the next bytes from the peer go: the first place is the caller's own and may be empty, the second is for
    /// everything behind it and never is, as long as [`Connection::process`] had its turn.
    pub(crate) fn places<'c>(&'c mut self, call: Option<&'c mut Call<'_>>) -> [&'c mut [u8]; 2] {
        let direct = match (self.inside, call) {
            (Inside::Data { left, own: true, .. }, Some(call))
                if self.rx_begin == self.rx_end && !call.over =>
            {
                let place = match &call.walker {
                    Some(walker) => walker.direct(call.reply),
                    None => Default::default(),
                };
                let length = place.len().min(left);
                place.get_mut(..length).unwrap_or_default()
            }
            _ => Default::default(),
        };
        if self.rx_begin == self.rx_end {
            (self.rx_begin, self.rx_end) = (self.block, self.block);
        } else if self.rx_begin > self.block {
            self.rx.copy_within(self.rx_begin..self.rx_end, self.block);
            (self.rx_begin, self.rx_end) = (self.block, self.block + self.rx_end - self.rx_begin);
        }
        [direct, self.rx.get_mut(self.rx_end..).unwrap_or_default()]
    }

    /// `direct` bytes came in the first place and `buffered` in the second.
    pub(crate) fn received(
        &mut self,
        call: Option<&mut Call<'_>>,
        direct: usize,
        buffered: usize,
    ) -> Result<(), Fault> {
        self.rx_end = (self.rx_end + buffered).min(RX_BYTES);
        let (Some(call), 1..) = (call, direct) else { return Ok(()) };
        let Call { walker: Some(walker), reply, .. } = &mut *call else { return Err(Fault::Reply) };
        walker.directed(&mut **reply, direct).map_err(|_| Fault::Reply)?;
        self.content(direct, call);
        Ok(())
    }

    /// So many bytes of a DATA frame's content were taken.
    fn content(&mut self, count: usize, call: &mut Call<'_>) {
        self.consumed += count as u32;
        let Inside::Data { left, padding, own, last } = self.inside else { return };
        let left = left.saturating_sub(count);
        self.inside = Inside::Data { left, padding, own, last };
        if left > 0 {
            return;
        }
        self.inside = Inside::Skip { left: padding };
        self.consumed += padding as u32;
        if own && last {
            self.finish(call);
        }
    }

    fn received_bytes(&self) -> &[u8] {
        self.rx.get(self.rx_begin..self.rx_end).unwrap_or_default()
    }

    /// Looks at everything received, as far as it is whole.
    ///
    /// # Errors
    /// The connection, or the call on it, cannot go on.
    pub(crate) fn process(&mut self, mut call: Option<&mut Call<'_>>) -> Result<(), Fault> {
        loop {
            let available = self.received_bytes().len();
            match self.inside {
                Inside::Skip { left } => {
                    let now = left.min(available);
                    self.rx_begin += now;
                    self.inside =
                        if now == left { Inside::Between } else { Inside::Skip { left: left - now } };
                    if now < left {
                        return Ok(());
                    }
                }
                Inside::Data { left, own, .. } => {
                    let now = left.min(available);
                    if now == 0 && left > 0 {
                        return Ok(());
                    }
                    let Some(call) = call.as_deref_mut().filter(|call| own && !call.over) else {
                        self.skip_content();
                        continue;
                    };
                    let bytes = self.rx.get(self.rx_begin..self.rx_begin + now).unwrap_or_default();
                    call.data(bytes).map_err(|_| Fault::Reply)?;
                    self.rx_begin += now;
                    self.content(now, call);
                }
                Inside::Between => {
                    if !self.next_frame(call.as_deref_mut())? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Begins the next frame, and takes it in unless it is of DATA; returns whether there was one, whole as far as it
    /// has to be.
    fn next_frame(&mut self, call: Option<&mut Call<'_>>) -> Result<bool, Fault> {
        let received = self.received_bytes();
        let Some((header, after)) = received.split_first_chunk() else { return Ok(false) };
        let header = Header::decode(header);
        if !self.settled && header.kind != frame::SETTINGS {
            return Err(Fault::Protocol("the first frame is not SETTINGS"));
        }
        if header.length > FRAME_BYTES_MAX {
            return Err(Fault::Protocol("a frame is longer than this side allows"));
        }
        if let Some((stream, _)) = self.block_of
            && (header.kind, header.stream) != (frame::CONTINUATION, stream)
        {
            return Err(Fault::Protocol("a header block was interrupted"));
        }
        match header.kind {
            frame::DATA => return self.begin_data(header, call),
            frame::PUSH_PROMISE => {
                return Err(Fault::Protocol("PUSH_PROMISE, which this side does not allow"));
            }
            frame::HEADERS
            | frame::CONTINUATION
            | frame::RST_STREAM
            | frame::SETTINGS
            | frame::PING
            | frame::GOAWAY
            | frame::WINDOW_UPDATE => {}
            // PRIORITY, and what comes to be defined one day.
            _ => {
                self.rx_begin += frame::HEADER_BYTES;
                self.inside = Inside::Skip { left: header.length };
                return Ok(true);
            }
        }
        if header.length + frame::HEADER_BYTES + self.block > RX_BYTES {
            return Err(Fault::Protocol(
                "headers, or a frame that is no DATA, are longer than this side allows",
            ));
        }
        if after.len() < header.length {
            return Ok(false);
        }
        let begin = self.rx_begin + frame::HEADER_BYTES;
        if header.kind == frame::PING && header.flags & frame::ACK == 0 && self.pings_count == PINGS_MAX {
            // Its answer has to wait for those before it.
            return Ok(false);
        }
        self.rx_begin = begin + header.length;
        match header.kind {
            frame::HEADERS | frame::CONTINUATION => self.headers(header, begin, call)?,
            _ => self.control(header, begin, call)?,
        }
        Ok(true)
    }

    fn begin_data(&mut self, header: Header, call: Option<&mut Call<'_>>) -> Result<bool, Fault> {
        if header.stream == 0 || header.stream >= self.next_stream {
            return Err(Fault::Protocol("DATA on a stream that is not open"));
        }
        let mut padding = 0;
        let mut head = frame::HEADER_BYTES;
        if header.has(frame::PADDED) {
            let Some(length) = self.received_bytes().get(head) else { return Ok(false) };
            padding = usize::from(*length);
            head += 1;
            self.consumed += 1;
        }
        let content = (header.length + frame::HEADER_BYTES).checked_sub(head + padding);
        let left = content.ok_or(Fault::Protocol("more padding than frame"))?;
        self.rx_begin += head;
        let call = call.filter(|call| call.stream == header.stream && !call.over);
        let own = call.is_some();
        let last = header.has(frame::END_STREAM);
        if let Some(call) = call {
            if !call.status.may_carry_message() {
                return Err(Fault::Protocol("DATA without headers of gRPC before it"));
            }
        }
        self.inside = Inside::Data { left, padding, own, last };
        Ok(true)
    }

    /// Takes in HEADERS or CONTINUATION: their content begins at `begin` and ends at `rx_begin`.
    fn headers(&mut self, header: Header, begin: usize, call: Option<&mut Call<'_>>) -> Result<(), Fault> {
        let (mut begin, mut end) = (begin, self.rx_begin);
        let (stream, last) = match (header.kind, self.block_of) {
            (frame::CONTINUATION, Some(block)) => block,
            (frame::CONTINUATION, None) => return Err(Fault::Protocol("CONTINUATION of nothing")),
            _ => {
                if header.stream == 0 || header.stream >= self.next_stream {
                    return Err(Fault::Protocol("HEADERS on a stream that is not open"));
                }
                if header.has(frame::PADDED) {
                    end = end.saturating_sub(usize::from(self.rx.get(begin).copied().unwrap_or(0)));
                    begin += 1;
                }
                if header.has(frame::PRIORITY) {
                    begin += 5;
                }
                if begin > end {
                    return Err(Fault::Protocol("more padding than frame"));
                }
                (header.stream, header.has(frame::END_STREAM))
            }
        };
        if !header.has(frame::END_HEADERS) || self.block > 0 {
            self.rx.copy_within(begin..end, self.block);
            self.block += end - begin;
            self.block_of = Some((stream, last));
            if !header.has(frame::END_HEADERS) {
                return Ok(());
            }
            (begin, end) = (0, self.block);
        }
        (self.block, self.block_of) = (0, None);
        let block = self.rx.get(begin..end).unwrap_or_default();
        let own = call.filter(|call| call.stream == stream && !call.over);
        match own {
            Some(call) => {
                Self::read_block(block, &mut call.status)?;
                call.answered = true;
                if call.status.is_informational() && !last {
                    call.status = Status::default();
                } else if last {
                    self.finish(call);
                } else if !call.status.may_carry_message() {
                    // No gRPC: what follows is for people with browsers.
                    call.over = true;
                    self.reset(stream, frame::CANCEL);
                }
                Ok(())
            }
            None => Self::read_block(block, &mut Status::default()),
        }
    }

    fn read_block(block: &[u8], status: &mut Status) -> Result<(), Fault> {
        let mut headers = hpack::Headers::new(block);
        loop {
            match headers.next() {
                Ok(Some((name, value))) => status.header(name, value),
                Ok(None) => return Ok(()),
                Err(hpack::Broken) => return Err(Fault::Protocol("headers that cannot be read")),
            }
        }
    }

    /// The peer has said everything about the call.
    fn finish(&mut self, call: &mut Call<'_>) {
        call.over = true;
        // A peer that answers before it has the whole request does not want the rest.
        if call.unframed > 0 {
            self.reset(call.stream, frame::NO_ERROR);
        }
    }

    /// Takes in a frame about the connection or a stream.
    fn control(&mut self, header: Header, begin: usize, call: Option<&mut Call<'_>>) -> Result<(), Fault> {
        if header.kind == frame::SETTINGS && !header.has(frame::ACK) {
            return self.settings(begin, call);
        }
        let content: [u8; 8] =
            self.rx.get(begin..).and_then(<[u8]>::first_chunk).copied().unwrap_or_default();
        let [a, b, c, d, ..] = content;
        let number = u32::from_be_bytes([a, b, c, d]);
        let wanted = match header.kind {
            frame::SETTINGS => 0,
            frame::PING => 8,
            // With any text of the peer behind it.
            frame::GOAWAY => header.length.max(8),
            _ => 4,
        };
        if header.length != wanted {
            return Err(Fault::Protocol("a frame of the wrong length"));
        }
        let own = call.filter(|call| call.stream == header.stream || header.kind == frame::GOAWAY);
        match header.kind {
            frame::PING if !header.has(frame::ACK) => {
                if let Some(place) = self.pings.get_mut(self.pings_count) {
                    *place = content;
                    self.pings_count += 1;
                }
            }
            frame::GOAWAY => {
                self.leaving = true;
                if own.is_some_and(|call| call.stream > number & frame::WINDOW_MAX && !call.answered) {
                    return Err(Fault::Refused);
                }
            }
            frame::WINDOW_UPDATE => {
                let window = match own {
                    _ if header.stream == 0 => &mut self.window,
                    Some(call) => &mut call.window,
                    None => return Ok(()),
                };
                let more = i64::from(number & frame::WINDOW_MAX);
                *window += more;
                if more == 0 || *window > i64::from(frame::WINDOW_MAX) {
                    return Err(Fault::Protocol("a window that cannot be"));
                }
            }
            frame::RST_STREAM if own.is_some_and(|call| !call.over) => {
                return Err(if number == frame::REFUSED_STREAM {
                    Fault::Refused
                } else {
                    Fault::Reset(number)
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn settings(&mut self, begin: usize, mut call: Option<&mut Call<'_>>) -> Result<(), Fault> {
        const SETTING_BYTES: usize = 6;
        if !(self.rx_begin - begin).is_multiple_of(SETTING_BYTES) {
            return Err(Fault::Protocol("a frame of the wrong length"));
        }
        for at in (begin..self.rx_begin).step_by(SETTING_BYTES) {
            let Some([high, low, value @ ..]) =
                self.rx.get(at..).and_then(<[u8]>::first_chunk::<SETTING_BYTES>)
            else {
                break;
            };
            let value = u32::from_be_bytes(*value);
            match u16::from_be_bytes([*high, *low]) {
                frame::INITIAL_WINDOW_SIZE if value > frame::WINDOW_MAX => {
                    return Err(Fault::Protocol("a window that cannot be"));
                }
                frame::INITIAL_WINDOW_SIZE => {
                    // Streams that are open already gain or lose the difference.
                    if let Some(call) = call.as_deref_mut() {
                        call.window += i64::from(value) - self.peer_window;
                    }
                    self.peer_window = i64::from(value);
                }
                frame::MAX_FRAME_SIZE => {
                    let value = value as usize;
                    if !(frame::FRAME_BYTES_DEFAULT..=frame::FRAME_BYTES_MAX).contains(&value) {
                        return Err(Fault::Protocol("a frame size that cannot be"));
                    }
                    self.peer_frame = value;
                }
                _ => {}
            }
        }
        self.settled = true;
        self.settings_unanswered += 1;
        Ok(())
    }
}
