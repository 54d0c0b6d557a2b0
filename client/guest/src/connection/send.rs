//! What goes to the peer: answers to it, and the call's message in frames of its size and within its windows.

use super::{CONSUMED_BYTES_MAX, COPIED_BYTES_MAX, Call, Connection, TX_BYTES, move_down};
use crate::frame::{self, Header};

impl Connection {
    pub(super) fn room(&self) -> usize {
        TX_BYTES - self.tx_end
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if let Some(place) = self.tx.get_mut(self.tx_end..).and_then(|rest| rest.get_mut(..bytes.len())) {
            place.copy_from_slice(bytes);
            self.tx_end += bytes.len();
        }
    }

    pub(super) fn push_frame(&mut self, kind: u8, flags: u8, stream: u32, length: usize) {
        self.push(&Header { length, kind, flags, stream }.encode());
    }

    /// Ends a stream; where that cannot be said now, the connection takes no more calls.
    pub(super) fn reset(&mut self, stream: u32, code: u32) {
        if self.framed > 0 || self.room() < frame::HEADER_BYTES + 4 {
            self.leaving = true;
            return;
        }
        self.push_frame(frame::RST_STREAM, 0, stream, 4);
        self.push(&code.to_be_bytes());
    }

    /// Moves what is to be sent to the beginning of its place.
    pub(super) fn compact(&mut self) {
        if self.tx_begin > 0 {
            move_down(&mut self.tx, self.tx_begin..self.tx_end, 0);
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
    pub(super) fn answer(&mut self) {
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

    /// Whether a PING is unanswered.
    pub(crate) fn owes_ping(&self) -> bool {
        self.pings_count > 0
    }

    /// Whether an answer to the peer is waiting for something it can be sent with.
    pub(crate) fn owes_answer(&self) -> bool {
        self.settings_unanswered > 0
    }

    /// The bytes to send now, in two pieces; empty when there is nothing to send or the peer has to say something
    /// first. Answers to the peer go with them, or with `answers` by themselves.
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
