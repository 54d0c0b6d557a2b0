//! What goes to the peer: answers to it, and the call's message in frames of its size and within its windows.

use super::{
    AHEAD_MAX, CONSUMED_BYTES_MAX, COPIED_BYTES_MAX, Call, Connection, PIECES_MAX, PINGS_MAX, TX_BYTES,
    move_down,
};
use crate::frame::{self, Header};

/// Bytes to send that lie one after the other in different places. None is empty.
#[derive(Debug)]
pub(crate) struct Pieces<'a> {
    pieces: [&'a [u8]; PIECES_MAX],
    count: usize,
}

impl<'a> Pieces<'a> {
    pub(crate) fn as_slice(&self) -> &[&'a [u8]] {
        self.pieces.get(..self.count).unwrap_or_default()
    }

    fn is_full(&self) -> bool {
        self.count == PIECES_MAX
    }

    /// Adds one at the end, where there is a place for it.
    fn push(&mut self, piece: &'a [u8]) {
        if let (Some(place), false) = (self.pieces.get_mut(self.count), piece.is_empty()) {
            *place = piece;
            self.count += 1;
        }
    }
}

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
        if let Some(call) = call {
            self.frame(call);
        }
    }

    /// Begins the next frame of the call, or several that are short.
    fn frame(&mut self, call: &mut Call<'_>) {
        while self.framed == 0 && self.room() > frame::HEADER_BYTES + COPIED_BYTES_MAX {
            let window = self.window.min(call.window);
            let Some(header) = call.next_frame(call.unframed, window, self.peer_frame) else { return };
            call.unframed -= header.length;
            self.window -= header.length as i64;
            call.window -= header.length as i64;
            self.push(&header.encode());
            self.framed = header.length;
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

    /// Whether another PING would get no answer.
    pub(crate) fn is_full_of_pings(&self) -> bool {
        self.pings_count == PINGS_MAX
    }

    /// Whether an answer to the peer is waiting for something it can be sent with.
    pub(crate) fn owes_answer(&self) -> bool {
        self.settings_unanswered > 0
    }

    /// The bytes to send now, of as many frames as the peer has room for; none when there is nothing to send or the
    /// peer has to say something first. Answers to the peer go with them, or with `answers` by themselves.
    pub(crate) fn outgoing<'c, 'p: 'c>(
        &'c mut self,
        mut call: Option<&mut Call<'p>>,
        answers: bool,
    ) -> Pieces<'c> {
        self.fill(call.as_deref_mut(), answers);
        let mut pieces = Pieces { pieces: [&[]; PIECES_MAX], count: 0 };
        pieces.push(self.tx.get(self.tx_begin..self.tx_end).unwrap_or_default());
        let Some(call) = call else { return pieces };
        // From here on this is what `frame` will do when the frames before are sent.
        let mut unframed = if call.over { 0 } else { call.unframed };
        let mut window = self.window.min(call.window);
        let frames = unframed.div_ceil(self.peer_frame.max(1));
        let most = match self.settings_unanswered > 0 || self.pings_count > 0 {
            // An answer comes first: a peer's settings hold from the answer to them on.
            true => 0,
            // No short batch comes last: TCP would keep it back until the peer has acknowledged the one before.
            false if frames > AHEAD_MAX => frames / 2,
            false => frames,
        };
        let mut headers = self.ahead.iter_mut().take(most);
        let (mut part, mut offset, mut framed) = (call.part, call.offset, self.framed);
        loop {
            if framed == 0 {
                let Some(header) = call.next_frame(unframed, window, self.peer_frame) else { return pieces };
                let Some(place) = headers.next() else { return pieces };
                *place = header.encode();
                framed = header.length;
                unframed -= framed;
                window -= framed as i64;
                pieces.push(place);
            }
            let rest = call.parts.get(part).and_then(|part| part.get(offset..));
            let Some(rest) = rest.filter(|_| !pieces.is_full()) else { return pieces };
            let piece = rest.get(..framed).unwrap_or(rest);
            pieces.push(piece);
            framed -= piece.len();
            (part, offset) =
                if piece.len() == rest.len() { (part + 1, 0) } else { (part, offset + piece.len()) };
        }
    }

    /// So many of them were sent.
    pub(crate) fn sent(&mut self, mut call: Option<&mut Call<'_>>, mut count: usize) {
        loop {
            let own = count.min(self.tx_end - self.tx_begin);
            self.tx_begin += own;
            if self.tx_begin == self.tx_end {
                (self.tx_begin, self.tx_end) = (0, 0);
            }
            let Some(call) = call.as_deref_mut() else { return };
            let beyond = (count - own).min(self.framed);
            call.advance(beyond);
            self.framed -= beyond;
            count -= own + beyond;
            if self.tx_end == 0 {
                self.copy_short(call);
            }
            if count == 0 || own + beyond == 0 {
                return;
            }
            self.frame(call);
        }
    }
}
