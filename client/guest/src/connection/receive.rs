//! What comes from the peer, frame by frame; the contents of DATA frames go on to the call as they come.

use super::{Call, Connection, FRAME_BYTES_MAX, Fault, Inside, PINGS_MAX, RX_BYTES, move_down};
use crate::frame::{self, Header};
use crate::hpack;
use crate::status::Status;

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
            move_down(&mut self.rx, self.rx_begin..self.rx_end, self.block);
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
        self.consumed = self.consumed.saturating_add(count as u32);
        let Inside::Data { left, padding, own, last } = self.inside else { return };
        let left = left.saturating_sub(count);
        self.inside = Inside::Data { left, padding, own, last };
        if left > 0 {
            return;
        }
        self.inside = Inside::Skip { left: padding };
        self.consumed = self.consumed.saturating_add(padding as u32);
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
        if self.consumed as usize + header.length > frame::WINDOW_MAX as usize {
            return Err(Fault::Protocol("more DATA than this side allows"));
        }
        let mut padding = 0;
        let mut head = frame::HEADER_BYTES;
        if header.has(frame::PADDED) {
            let Some(length) = self.received_bytes().get(head) else { return Ok(false) };
            padding = usize::from(*length);
            head += 1;
            self.consumed = self.consumed.saturating_add(1);
        }
        let content = (header.length + frame::HEADER_BYTES).checked_sub(head + padding);
        let left = content.ok_or(Fault::Protocol("more padding than frame"))?;
        self.rx_begin += head;
        let call = call.filter(|call| call.stream == header.stream && !call.over);
        let own = call.is_some();
        let last = header.has(frame::END_STREAM);
        if call.is_some_and(|call| !call.status.may_carry_message()) {
            return Err(Fault::Protocol("DATA without headers of gRPC before it"));
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
            move_down(&mut self.rx, begin..end, self.block);
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
                if self.pings_count == PINGS_MAX && self.framed == 0 {
                    self.answer();
                }
                // A peer that asks more than it reads answers gets fewer.
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
                        if call.window > i64::from(frame::WINDOW_MAX) {
                            return Err(Fault::Protocol("a window that cannot be"));
                        }
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
