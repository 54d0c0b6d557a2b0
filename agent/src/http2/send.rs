//! What becomes of answers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use http::HeaderMap;
use http_body::Body as _;
use vaccel_guest::frame;

use super::connection::{Answer, Connection};
use super::{Blocks, Reply as _, Service, Wire, fields};

/// What a stream can do next.
enum Next {
    /// Send more, when it is its turn again.
    Turn,
    /// Wait: for its service, or for the peer's window.
    Wait,
    /// Nothing: its reply has left.
    Over,
    /// Nothing: its service broke off.
    Broken,
}

impl<I: Wire, S: Service> Connection<I, S> {
    /// Looks at a stream that was woken.
    pub(super) fn attend(&mut self, place: usize) {
        let Some(stream) = self.streams.get_mut(place).and_then(Option::as_mut) else { return };
        let id = stream.id;
        if let Poll::Ready(Some((head, is_over))) = stream.poll_answer(&self.places[place]) {
            let blocks = stream.blocks();
            self.write_block(id, is_over, |into| match blocks {
                Some(blocks) => into.extend_from_slice(&blocks.head),
                None => fields::write_head(head.status, &head.headers, into),
            });
            if is_over {
                return self.over(place);
            }
        }
        self.enqueue(place);
        self.credit(place);
    }

    /// Puts a stream that is being answered in the queue.
    pub(super) fn enqueue(&mut self, place: usize) {
        if let Some(stream) = &mut self.streams[place]
            && matches!(stream.answer, Answer::Sent(_))
            && !std::mem::replace(&mut stream.is_queued, true)
        {
            self.queue.push_back(place);
        }
    }

    /// Sends what is in the queue, a frame of each stream in turn, as long as there is room.
    pub(super) fn send_queue(&mut self) {
        while self.has_room()
            && let Some(place) = self.queue.pop_front()
        {
            if let Some(stream) = &mut self.streams[place] {
                stream.is_queued = false;
            }
            match self.send(place) {
                Next::Turn => self.enqueue(place),
                Next::Wait => {}
                Next::Over => self.over(place),
                Next::Broken => {
                    if let Some(stream) = &self.streams[place] {
                        self.reset(stream.id, frame::INTERNAL_ERROR);
                    }
                }
            }
        }
    }

    /// Sends one frame of a stream.
    fn send(&mut self, place: usize) -> Next {
        let Some(stream) = &mut self.streams[place] else { return Next::Wait };
        let Answer::Sent(reply) = &mut stream.answer else { return Next::Wait };
        if reply.next.is_empty() && !reply.is_over {
            let waker = Waker::from(Arc::clone(&self.places[place]));
            match Pin::new(&mut reply.body).poll_frame(&mut Context::from_waker(&waker)) {
                Poll::Pending => return Next::Wait,
                Poll::Ready(None) => reply.is_over = true,
                Poll::Ready(Some(Err(_))) => return Next::Broken,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => reply.next = data,
                    Err(frame) => {
                        reply.trailers = frame.into_trailers().ok();
                        reply.is_over = true;
                    }
                },
            }
        }
        if reply.next.is_empty() {
            if !reply.is_over {
                return Next::Turn;
            }
            let (id, blocks, trailers) = (stream.id, reply.body.blocks(), reply.trailers.take());
            self.write_end(id, blocks, trailers.as_ref());
            return Next::Over;
        }
        let allowed = stream.peer_window.min(self.peer_window).max(0) as usize;
        let count = reply.next.len().min(allowed).min(self.peer.frame_bytes);
        if count == 0 {
            return Next::Wait;
        }
        let data = reply.next.split_to(count);
        stream.peer_window -= count as i64;
        self.peer_window -= count as i64;
        let is_last = reply.next.is_empty() && reply.body.is_end_stream();
        self.output.data(stream.id, count, std::iter::once(data), is_last);
        if is_last { Next::Over } else { Next::Turn }
    }

    fn write_end(&mut self, id: u32, blocks: Option<&Blocks>, trailers: Option<&HeaderMap>) {
        match (blocks, trailers) {
            (Some(blocks), _) => self.write_block(id, true, |into| into.extend_from_slice(&blocks.trailers)),
            (None, Some(trailers)) => self.write_block(id, true, |into| fields::write(trailers, into)),
            (None, None) => self.output.data(id, 0, std::iter::empty(), true),
        }
    }

    /// A header block, in as many frames as it takes.
    fn write_block(&mut self, id: u32, is_last: bool, write: impl FnOnce(&mut Vec<u8>)) {
        let mut block = Vec::with_capacity(128);
        write(&mut block);
        let mut parts = block.chunks(self.peer.frame_bytes).peekable();
        let mut kind = frame::HEADERS;
        while let Some(part) = parts.next() {
            let end = if parts.peek().is_none() { frame::END_HEADERS } else { 0 };
            let last = if is_last && kind == frame::HEADERS { frame::END_STREAM } else { 0 };
            self.output.frame(kind, end | last, id, |into| into.extend_from_slice(part));
            kind = frame::CONTINUATION;
        }
    }

    /// The reply has left. A peer that is still sending its request need not go on.
    fn over(&mut self, place: usize) {
        if let Some(stream) = self.streams[place].take()
            && !stream.is_whole
        {
            self.reset(stream.id, frame::NO_ERROR);
        }
    }
}
