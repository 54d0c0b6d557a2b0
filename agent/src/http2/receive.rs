//! What a peer's frames do.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use http::{HeaderMap, StatusCode};
use vaccel_guest::frame::{self, Header};

use super::connection::{Connection, Going};
use super::fields::{self, Block};
use super::foreseen::Foreseen;
use super::incoming::Delivery;
use super::{
    BLOCK_BYTES_MAX, BLOCK_FRAMES_MAX, CONNECTION_WINDOW, FAR, FRAME_BYTES_MAX, HEADER_BYTES_MAX,
    SETTINGS_MAX, STREAM_WINDOW_MAX, Service, TURN_BYTES, TURN_CALLS, WINDOW_PART, WINDOW_STEP, Wire,
};
use crate::onward::Listener;

/// Why a connection cannot go on.
#[derive(Debug)]
pub(super) enum Fault {
    /// The socket failed.
    Lost(io::Error),
    /// The peer broke the protocol.
    Broken { code: u32, what: &'static str },
}

fn broken<T>(code: u32, what: &'static str) -> Result<T, Fault> {
    Err(Fault::Broken { code, what })
}

fn wrong<T>(what: &'static str) -> Result<T, Fault> {
    broken(frame::PROTOCOL_ERROR, what)
}

/// What the next bytes are.
#[derive(Clone, Copy)]
pub(super) enum Expect {
    Header,
    /// All of a frame's payload, which is short.
    Payload(Header),
    /// The length of the padding of a DATA frame.
    PadLength(Header),
    Data(Data),
    /// Nothing that is of interest.
    Skip(usize),
}

/// A DATA frame.
#[derive(Clone, Copy)]
pub(super) struct Data {
    pub(super) header: Header,
    /// Its stream's place, if somebody wants it.
    pub(super) place: Option<usize>,
    pub(super) rest: usize,
    padding: usize,
}

/// A header block that goes on in the next frame.
pub(super) struct Unfinished {
    stream: u32,
    is_last: bool,
    block: Vec<u8>,
    frames: usize,
}

/// As much of a message is read past the buffer for what is ahead; less is better read together with what follows.
const DIRECT_BYTES_MIN: usize = 4096;

impl<I: Wire, S: Service> Connection<I, S> {
    /// Reads and follows what comes. Ready when nothing more does.
    pub(super) fn poll_input(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let (first, mut read) = (self.last, 0);
        loop {
            let is_long = |last: u32, read: usize| last - first >= 2 * TURN_CALLS || read >= TURN_BYTES;
            while !is_long(self.last, read) && self.step()? {}
            if is_long(self.last, read) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(early) = self.early.take() {
                self.mistaken(&early);
                continue;
            }
            if self.is_owing() {
                return Poll::Pending;
            }
            let Self { io, input, streams, pool, expect, .. } = self;
            let direct = match expect {
                Expect::Data(data) => data.place.and_then(|place| {
                    let delivery = &mut streams[place].as_mut()?.delivery;
                    let most = delivery.missing().0.min(data.rest);
                    (most >= DIRECT_BYTES_MIN).then_some((delivery, most))
                }),
                _ => None,
            };
            let count = match direct {
                Some((delivery, most)) => {
                    let place = delivery.place(most).unwrap_or_default();
                    let count = ready!(io.poll_read_one(context, place)).map_err(Fault::Lost)?;
                    // Whatever comes next may have begun to come.
                    input.keep(delivery.beyond(most, count), pool);
                    self.placed(count.min(most));
                    count
                }
                None => ready!(self.poll_ahead(context)).map_err(Fault::Lost)?,
            };
            if count == 0 {
                return Poll::Ready(Ok(()));
            }
            self.heard();
            read += count;
        }
    }

    /// Follows one thing that has come whole. Returns whether there was one.
    fn step(&mut self) -> Result<bool, Fault> {
        match self.expect {
            Expect::Header => {
                let Some(header) = self.input.header() else { return Ok(false) };
                self.expect = self.begin(header)?;
            }
            Expect::Payload(header) => {
                let input = std::mem::take(&mut self.input);
                let followed = match input.ahead().get(..header.length) {
                    Some(payload) => self.follow(header, payload).map(|()| true),
                    None => Ok(false),
                };
                self.input = input;
                if !followed? {
                    return Ok(false);
                }
                self.input.consume(header.length);
                self.expect = Expect::Header;
            }
            Expect::PadLength(header) => {
                let Some(&padding) = self.input.ahead().first() else { return Ok(false) };
                self.input.consume(1);
                let padding = usize::from(padding);
                let Some(rest) = (header.length - 1).checked_sub(padding) else {
                    return wrong("more padding than frame");
                };
                self.expect = self.data(header, rest, padding);
            }
            Expect::Data(data) => {
                let ahead = self.input.ahead();
                if ahead.is_empty()
                    && let Some(early) = self.early.take()
                {
                    self.adopt(data, early);
                    return Ok(true);
                }
                let count = ahead.len().min(data.rest);
                if count == 0 && data.rest > 0 {
                    return Ok(false);
                }
                if let Some(stream) = data.place.and_then(|place| self.streams[place].as_mut()) {
                    let is_first = data.rest == data.header.length;
                    stream.delivery.receive(&ahead[..count], &self.pool);
                    if is_first {
                        self.foreseen = Foreseen::after(self.input.passed(), data, &stream.delivery);
                    }
                }
                self.input.consume(count);
                self.took(data, count);
            }
            Expect::Skip(rest) => {
                let count = self.input.ahead().len().min(rest);
                self.input.consume(count);
                self.expect = if count == rest { Expect::Header } else { Expect::Skip(rest - count) };
                return Ok(count == rest);
            }
        }
        Ok(true)
    }

    /// Bytes of a message were read to their place.
    fn placed(&mut self, count: usize) {
        let Expect::Data(data) = self.expect else { return };
        if let Some(stream) = data.place.and_then(|place| self.streams[place].as_mut()) {
            stream.delivery.placed(count);
        }
        self.input.passed_by();
        self.took(data, count);
    }

    /// So many bytes of a DATA frame are where they belong.
    pub(super) fn took(&mut self, data: Data, count: usize) {
        let rest = data.rest - count;
        self.expect = Expect::Data(Data { rest, ..data });
        if let Some(place) = data.place {
            self.make_way(place, rest);
        }
        if rest > 0 {
            return;
        }
        self.expect = if data.padding > 0 { Expect::Skip(data.padding) } else { Expect::Header };
        self.input.mark();
        self.widen(data.header.length as u32);
        if let Some(place) = data.place {
            if data.header.has(frame::END_STREAM) {
                self.finish(place);
            }
            self.credit(place);
        }
    }

    /// The peer has said all it wants to on a stream.
    fn finish(&mut self, place: usize) {
        if let Some(stream) = &mut self.streams[place] {
            stream.is_whole = true;
            stream.delivery.finish();
        }
    }

    /// A frame begins.
    fn begin(&mut self, header: Header) -> Result<Expect, Fault> {
        let Header { length, kind, stream, .. } = header;
        if length > FRAME_BYTES_MAX {
            return broken(frame::FRAME_SIZE_ERROR, "a frame longer than was allowed");
        }
        if self.unfinished.as_ref().is_some_and(|block| kind != frame::CONTINUATION || stream != block.stream)
        {
            return wrong("a frame in the middle of a header block");
        }
        if !self.peer.has_said && kind != frame::SETTINGS {
            return wrong("something before the settings");
        }
        let (has_stream, length_min, length_max) = match kind {
            frame::DATA => return self.begin_data(header),
            frame::HEADERS => (true, 0, BLOCK_BYTES_MAX),
            frame::CONTINUATION if self.unfinished.is_some() => (true, 0, BLOCK_BYTES_MAX),
            frame::RST_STREAM => (true, 4, 4),
            frame::SETTINGS => (false, 0, SETTINGS_MAX * 6),
            frame::PING => (false, 8, 8),
            // What it adds in words is of no interest, however long it is.
            frame::GOAWAY => return Ok(Expect::Skip(length)),
            frame::WINDOW_UPDATE => (stream > 0, 4, 4),
            frame::PUSH_PROMISE | frame::CONTINUATION => return wrong("a frame that has no place here"),
            frame::ALERT => {
                // Once for each call: it wakes somebody.
                if !std::mem::replace(&mut self.is_alert, true)
                    && let Some(task) = self.bell.task()
                {
                    self.service.expect(Listener::new(&task));
                }
                return Ok(Expect::Skip(length));
            }
            // Priorities, and what comes to be defined one day.
            _ => return Ok(Expect::Skip(length)),
        };
        if has_stream != (stream > 0) {
            return wrong("a frame on a stream that it cannot be on");
        }
        if length < length_min {
            return broken(frame::FRAME_SIZE_ERROR, "a frame that is too short");
        }
        if length > length_max {
            let code =
                if length_min == length_max { frame::FRAME_SIZE_ERROR } else { frame::ENHANCE_YOUR_CALM };
            return broken(code, "a frame that is too long for what it is");
        }
        Ok(Expect::Payload(header))
    }

    fn begin_data(&mut self, header: Header) -> Result<Expect, Fault> {
        let length = header.length as i64;
        self.window -= length;
        if self.window < 0 {
            return broken(frame::FLOW_CONTROL_ERROR, "more than the window of the connection");
        }
        if header.stream == 0 || header.stream > self.last {
            return wrong("data of no stream");
        }
        if let Some(place) = self.find(header.stream)
            && let Some(stream) = &mut self.streams[place]
        {
            stream.window -= length;
            if stream.is_whole {
                return wrong("data after a stream's end");
            }
            if stream.window < 0 {
                self.reset(header.stream, frame::FLOW_CONTROL_ERROR);
            }
        }
        if !header.has(frame::PADDED) {
            return Ok(self.data(header, header.length, 0));
        }
        if header.length == 0 {
            return broken(frame::FRAME_SIZE_ERROR, "padding in a frame of no length");
        }
        Ok(Expect::PadLength(header))
    }

    /// The contents of a DATA frame begin. A stream that is over, or never was, takes none.
    fn data(&mut self, header: Header, rest: usize, padding: usize) -> Expect {
        Expect::Data(Data { header, place: self.find(header.stream), rest, padding })
    }

    /// Bytes of some stream have come: tells the peer to go on, when it is time.
    fn widen(&mut self, count: u32) {
        self.owed += count;
        if self.owed >= CONNECTION_WINDOW / WINDOW_PART {
            let owed = std::mem::take(&mut self.owed);
            self.window += i64::from(owed);
            self.output.frame(frame::WINDOW_UPDATE, 0, 0, |into| into.extend(owed.to_be_bytes()));
        }
    }

    /// A message that is longer than its stream's window must not wait for one, if its service has taken all others.
    /// `coming` bytes of it have been announced by their frame.
    fn make_way(&mut self, place: usize, coming: usize) {
        let Some(stream) = &mut self.streams[place] else { return };
        let (missing, whole) = stream.delivery.missing();
        let unannounced = missing.saturating_sub(coming);
        if unannounced as i64 > stream.window && stream.delivery.is_taken() {
            self.widen_all((whole as u32).next_multiple_of(WINDOW_STEP));
            self.grant(place, unannounced);
        }
    }

    /// Lets streams have a larger window from now on, as far as there is one.
    fn widen_all(&mut self, window: u32) {
        let window = window.min(STREAM_WINDOW_MAX);
        if window <= self.stream_window {
            return;
        }
        let more = window - std::mem::replace(&mut self.stream_window, window);
        for stream in self.streams.iter_mut().flatten() {
            stream.window += i64::from(more);
        }
        self.output.frame(frame::SETTINGS, 0, 0, |into| {
            into.extend(frame::INITIAL_WINDOW_SIZE.to_be_bytes());
            into.extend(window.to_be_bytes());
        });
    }

    /// Lets the peer send at least so many bytes on a stream.
    fn grant(&mut self, place: usize, bytes: usize) {
        let Some(stream) = &mut self.streams[place] else { return };
        let more = bytes as i64 - stream.window;
        if more > 0 {
            stream.window += more;
            stream.granted = Instant::now();
            let id = stream.id;
            self.output.frame(frame::WINDOW_UPDATE, 0, id, |into| into.extend((more as u32).to_be_bytes()));
        }
    }

    /// Tells the peer to go on with a stream, when it is time and its service keeps up.
    pub(super) fn credit(&mut self, place: usize) {
        let Some(stream) = &mut self.streams[place] else { return };
        let used = i64::from(self.stream_window) - stream.window;
        let is_due = used >= i64::from(self.stream_window / WINDOW_PART);
        if stream.is_whole || stream.delivery.is_over() || !is_due || !stream.delivery.is_taken() {
            return;
        }
        if stream.delivery.is_prompt() && stream.granted.elapsed() >= FAR {
            // Its service waits for the peer, and maybe the peer for its window.
            self.widen_all(2 * self.stream_window);
        }
        self.grant(place, self.stream_window as usize);
    }

    /// A frame that is no DATA.
    fn follow(&mut self, header: Header, payload: &[u8]) -> Result<(), Fault> {
        let number = || payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        match header.kind {
            frame::HEADERS => self.headers(header, payload),
            frame::CONTINUATION => self.continuation(header, payload),
            frame::RST_STREAM if header.stream > self.last => wrong("the end of a stream that never was"),
            frame::RST_STREAM => {
                if let Some(place) = self.find(header.stream) {
                    self.streams[place] = None;
                }
                Ok(())
            }
            frame::SETTINGS => self.settings(header, payload),
            frame::PING if header.has(frame::ACK) => {
                self.ponged(payload);
                Ok(())
            }
            frame::PING => {
                self.output.frame(frame::PING, frame::ACK, 0, |into| into.extend(payload));
                Ok(())
            }
            _ => self.window_update(header.stream, number() & frame::WINDOW_MAX),
        }
    }

    fn headers(&mut self, header: Header, mut payload: &[u8]) -> Result<(), Fault> {
        let mut padding = 0;
        if header.has(frame::PADDED) {
            let Some((&length, rest)) = payload.split_first() else { return wrong("no padding") };
            (padding, payload) = (usize::from(length), rest);
        }
        if header.has(frame::PRIORITY) {
            // A stream and a weight.
            payload = payload.get(5..).map_or_else(|| wrong("no priority"), Ok)?;
        }
        let length = payload.len().checked_sub(padding);
        let block =
            length.map_or_else(|| wrong("more padding than frame"), |length| Ok(&payload[..length]))?;
        let (stream, is_last) = (header.stream, header.has(frame::END_STREAM));
        if header.has(frame::END_HEADERS) {
            return self.block(stream, is_last, block);
        }
        self.unfinished = Some(Unfinished { stream, is_last, block: block.to_vec(), frames: 1 });
        Ok(())
    }

    fn continuation(&mut self, header: Header, payload: &[u8]) -> Result<(), Fault> {
        let Some(unfinished) = &mut self.unfinished else { return wrong("nothing to continue") };
        unfinished.frames += 1;
        unfinished.block.extend_from_slice(payload);
        if unfinished.block.len() > BLOCK_BYTES_MAX || unfinished.frames > BLOCK_FRAMES_MAX {
            return broken(frame::ENHANCE_YOUR_CALM, "a header block that does not end");
        }
        match self.unfinished.take_if(|_| header.has(frame::END_HEADERS)) {
            Some(Unfinished { stream, is_last, block, .. }) => self.block(stream, is_last, &block),
            None => Ok(()),
        }
    }

    /// A whole header block: a call begins, or its body has ended.
    fn block(&mut self, id: u32, is_last: bool, block: &[u8]) -> Result<(), Fault> {
        let Self { table, service, .. } = self;
        let read = table.read(block, HEADER_BYTES_MAX, |request| service.understand(request));
        let Ok(block) = read else {
            return broken(frame::COMPRESSION_ERROR, "a header block that cannot be read");
        };
        if let Some(place) = self.find(id) {
            if !is_last {
                return wrong("trailers that are not the end");
            }
            self.finish(place);
            return Ok(());
        }
        if id <= self.last {
            // Trailers of a call that was answered before they came.
            return Ok(());
        }
        if id.is_multiple_of(2) {
            return wrong("a stream with a number of the server's");
        }
        self.last = id;
        if self.going == Going::Away {
            self.reset(id, frame::REFUSED_STREAM);
            return Ok(());
        }
        match block {
            Block::Request(head) => self.call(id, is_last, &head),
            Block::Wrong => self.reset(id, frame::PROTOCOL_ERROR),
            Block::TooLarge => {
                let flags = frame::END_HEADERS | frame::END_STREAM;
                self.output.frame(frame::HEADERS, flags, id, |into| {
                    let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
                    fields::write_head(status, &HeaderMap::new(), into);
                });
                if !is_last {
                    self.reset(id, frame::NO_ERROR);
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, id: u32, is_last: bool, head: &Arc<S::Head>) {
        let Some(place) = self.free_place() else { return self.reset(id, frame::REFUSED_STREAM) };
        let (delivery, incoming) = Delivery::new(S::has_messages(head), Arc::clone(&self.places[place]));
        let answer = self.service.call(head, incoming);
        self.start(place, id, delivery, answer);
        if is_last {
            self.finish(place);
        }
    }

    fn settings(&mut self, header: Header, payload: &[u8]) -> Result<(), Fault> {
        if header.has(frame::ACK) {
            return if payload.is_empty() {
                Ok(())
            } else {
                broken(frame::FRAME_SIZE_ERROR, "an answer with content")
            };
        }
        let (settings, rest) = payload.as_chunks::<6>();
        if !rest.is_empty() {
            return broken(frame::FRAME_SIZE_ERROR, "settings that are cut");
        }
        self.peer.has_said = true;
        for &[a, b, c, d, e, f] in settings {
            let (setting, value) = (u16::from_be_bytes([a, b]), u32::from_be_bytes([c, d, e, f]));
            match setting {
                frame::ENABLE_PUSH if value > 1 => return wrong("a setting that is neither on nor off"),
                frame::INITIAL_WINDOW_SIZE if value > frame::WINDOW_MAX => {
                    return broken(frame::FLOW_CONTROL_ERROR, "a window larger than there are");
                }
                frame::INITIAL_WINDOW_SIZE => {
                    let more = i64::from(value) - std::mem::replace(&mut self.peer.window, value.into());
                    for place in 0..self.streams.len() {
                        self.widen_peer(place, more)?;
                    }
                }
                frame::MAX_FRAME_SIZE => {
                    if !(frame::FRAME_BYTES_DEFAULT..=frame::FRAME_BYTES_MAX).contains(&(value as usize)) {
                        return wrong("a frame size that is none");
                    }
                    self.peer.frame_bytes = value as usize;
                }
                _ => {}
            }
        }
        self.output.frame(frame::SETTINGS, frame::ACK, 0, |_| ());
        Ok(())
    }

    fn window_update(&mut self, id: u32, more: u32) -> Result<(), Fault> {
        if id > self.last {
            return wrong("a window of no stream");
        }
        if id > 0 {
            return match self.find(id) {
                Some(_) if more == 0 => {
                    self.reset(id, frame::PROTOCOL_ERROR);
                    Ok(())
                }
                Some(place) => self.widen_peer(place, more.into()),
                None => Ok(()),
            };
        }
        if more == 0 {
            return wrong("a window that does not grow");
        }
        self.peer_window += i64::from(more);
        if self.peer_window > frame::WINDOW_MAX.into() {
            return broken(frame::FLOW_CONTROL_ERROR, "a window larger than there are");
        }
        (0..self.streams.len()).for_each(|place| self.enqueue(place));
        Ok(())
    }

    /// The peer takes more of a stream, or less.
    fn widen_peer(&mut self, place: usize, more: i64) -> Result<(), Fault> {
        let Some(stream) = &mut self.streams[place] else { return Ok(()) };
        stream.peer_window += more;
        if stream.peer_window > frame::WINDOW_MAX.into() {
            return broken(frame::FLOW_CONTROL_ERROR, "a window larger than there are");
        }
        self.enqueue(place);
        Ok(())
    }
}
