//! The task of a connection.

use std::future::poll_fn;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Body as _;
use tokio::time::Sleep;
use vaccel_guest::frame;

use super::bell::{Bell, Place};
use super::fields::Table;
use super::foreseen::{Early, Foreseen};
use super::incoming::{Delivery, lost};
use super::input::{Input, Wire};
use super::receive::{Expect, Fault, Unfinished};
use super::{
    Blocks, CONNECTION_WINDOW, FAREWELL, FRAME_BYTES_MAX, HEADER_BYTES_MAX, KEEP_ALIVE, OWED_BYTES_MAX,
    QUEUE_BYTES_MAX, REQUEST_DURATION_MAX, Reply as _, STREAM_WINDOW, STREAMS_MAX, Service, TURN_ROUNDS,
};
use crate::pool::Pool;
use vaccel_client::http2::Output;

/// What the PING says that goes with the news of closing.
const FAREWELL_PING: [u8; 8] = *b"farewell";

/// What a peer's settings say.
pub(super) struct Peer {
    /// Window of a new stream, in bytes.
    pub(super) window: i64,
    pub(super) frame_bytes: usize,
    pub(super) has_said: bool,
}

/// One call.
pub(super) struct Stream<S: Service> {
    pub(super) id: u32,
    pub(super) delivery: Delivery,
    /// The peer has said all it wants to.
    pub(super) is_whole: bool,
    /// What the peer may still send, in bytes.
    pub(super) window: i64,
    /// When it was told so.
    pub(super) granted: Instant,
    /// What may be sent to the peer, in bytes.
    pub(super) peer_window: i64,
    pub(super) answer: Answer<S>,
    /// It is in the queue of those that have something to send.
    pub(super) is_queued: bool,
    begun: Instant,
}

/// What becomes of a call.
pub(super) enum Answer<S: Service> {
    Awaited(S::Answer),
    Sent(Reply<S::Body>),
}

/// A reply that is being sent.
pub(super) struct Reply<B> {
    pub(super) body: B,
    pub(super) next: Bytes,
    pub(super) trailers: Option<http::HeaderMap>,
    pub(super) is_over: bool,
}

/// How far the end has come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Going {
    On,
    /// The peer was told to call no more, and has not confirmed it.
    Announced,
    /// It knows which call was the last.
    Away,
}

/// A connection.
pub(crate) struct Connection<I, S: Service> {
    pub(super) io: I,
    pub(super) service: S,
    pub(super) pool: Pool,
    pub(super) input: Input,
    /// What came behind what is ahead.
    pub(super) early: Option<Early>,
    pub(super) foreseen: Option<Foreseen>,
    pub(super) expect: Expect,
    pub(super) unfinished: Option<Unfinished>,
    pub(super) table: Table<S::Head>,
    pub(super) output: Output,
    pub(super) peer: Peer,
    /// What may be sent to the peer on all streams, in bytes.
    pub(super) peer_window: i64,
    /// What the peer may still send, and what has come since it was told so, in bytes.
    pub(super) window: i64,
    pub(super) owed: u32,
    /// What a peer may send on a new stream, in bytes.
    pub(super) stream_window: u32,
    pub(super) streams: Vec<Option<Box<Stream<S>>>>,
    pub(super) places: Vec<Arc<Place>>,
    pub(super) bell: Arc<Bell>,
    /// Streams that have something to send and may.
    pub(super) queue: std::collections::VecDeque<usize>,
    pub(super) last: u32,
    pub(super) going: Going,
    /// How the connection ended, while services still take what came before.
    ended: Option<io::Result<()>>,
    is_heard: bool,
    is_asked: bool,
    /// The peer has said that a call is about to come, and none has.
    pub(super) is_alert: bool,
    tick: Pin<Box<Sleep>>,
}

impl<I: Wire, S: Service> Connection<I, S> {
    /// A connection whose peer has sent its preface.
    pub(crate) fn new(io: I, service: S, pool: Pool) -> Self {
        let mut output = Output::default();
        output.frame(frame::SETTINGS, 0, 0, |into| {
            for (setting, value) in [
                (frame::MAX_CONCURRENT_STREAMS, STREAMS_MAX as u32),
                (frame::INITIAL_WINDOW_SIZE, STREAM_WINDOW),
                (frame::MAX_FRAME_SIZE, FRAME_BYTES_MAX as u32),
                (frame::MAX_HEADER_LIST_SIZE, HEADER_BYTES_MAX as u32),
            ] {
                into.extend(setting.to_be_bytes());
                into.extend(value.to_be_bytes());
            }
        });
        let widened = CONNECTION_WINDOW - frame::WINDOW_DEFAULT as u32;
        output.frame(frame::WINDOW_UPDATE, 0, 0, |into| into.extend(widened.to_be_bytes()));
        Self {
            io,
            service,
            pool,
            input: Input::default(),
            early: None,
            foreseen: None,
            expect: Expect::Header,
            unfinished: None,
            table: Table::default(),
            output,
            peer: Peer {
                window: frame::WINDOW_DEFAULT,
                frame_bytes: frame::FRAME_BYTES_DEFAULT,
                has_said: false,
            },
            peer_window: frame::WINDOW_DEFAULT,
            window: CONNECTION_WINDOW.into(),
            owed: 0,
            stream_window: STREAM_WINDOW,
            streams: Vec::new(),
            places: Vec::new(),
            bell: Arc::default(),
            queue: std::collections::VecDeque::new(),
            last: 0,
            going: Going::On,
            ended: None,
            is_heard: true,
            is_asked: false,
            is_alert: false,
            tick: Box::pin(tokio::time::sleep(first_tick())),
        }
    }

    /// Works until the connection ends, on its own or after [`Self::close`].
    ///
    /// # Errors
    /// The peer broke the protocol, or went silent, or the socket failed.
    pub(crate) async fn run(&mut self) -> io::Result<()> {
        poll_fn(|context| self.poll(context)).await
    }

    /// Takes no new calls, and ends when the present ones are answered.
    pub(crate) fn close(&mut self) {
        if self.going == Going::On {
            self.going = Going::Announced;
            // What the peer sent before it reads this is still taken.
            self.output.frame(frame::GOAWAY, 0, 0, |into| goodbye(frame::WINDOW_MAX, frame::NO_ERROR, into));
            self.output.frame(frame::PING, 0, 0, |into| into.extend(FAREWELL_PING));
            self.tick = Box::pin(tokio::time::sleep(FAREWELL));
        }
    }

    /// The peer answered a PING.
    pub(super) fn ponged(&mut self, content: &[u8]) {
        if content == FAREWELL_PING {
            self.leave();
        }
    }

    fn leave(&mut self) {
        if self.going == Going::Announced {
            self.going = Going::Away;
            let last = self.last;
            self.output.frame(frame::GOAWAY, 0, 0, |into| goodbye(last, frame::NO_ERROR, into));
            self.tick = Box::pin(tokio::time::sleep(KEEP_ALIVE));
        }
    }

    /// The underlying stream, for a last word.
    pub(crate) fn into_io(self) -> I {
        self.io
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bell.listen(context.waker());
        for _ in 0..TURN_ROUNDS {
            if self.ended.is_some() {
                return self.poll_rest();
            }
            self.poll_tick(context)?;
            if let Poll::Ready(ended) = self.poll_input(context) {
                self.end(ended, context);
                continue;
            }
            let is_owing = self.is_owing();
            self.bell.take().for_each(|place| self.attend(place));
            self.send_queue();
            let flushed = self.output.poll_flush(context, &mut self.io)?;
            if self.going == Going::Away && flushed.is_ready() && self.streams.iter().all(Option::is_none) {
                return Poll::Ready(Ok(()));
            }
            // What could go on now that there is room.
            let is_behind = flushed.is_ready() && (!self.queue.is_empty() || is_owing);
            if !is_behind && !self.bell.is_lit() {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// The connection ends: says why, if there is somebody to tell. Nobody waits for replies any more; what came of an
    /// upload is still taken.
    fn end(&mut self, ended: Result<(), Fault>, context: &mut Context<'_>) {
        for place in &mut self.streams {
            match place {
                // Once it is answered nobody asks for more of the reply, and whoever makes it would wait for that.
                Some(stream)
                    if !stream.is_whole
                        && !stream.delivery.is_taken()
                        && matches!(stream.answer, Answer::Awaited(_)) =>
                {
                    stream.delivery.end(Err(lost()));
                }
                _ => *place = None,
            }
        }
        self.ended = Some(match ended {
            Ok(()) => Ok(()),
            Err(Fault::Lost(error)) => Err(error),
            Err(Fault::Broken { code, what }) => {
                let last = self.last;
                self.output.frame(frame::GOAWAY, 0, 0, |into| goodbye(last, code, into));
                // A peer that breaks the protocol is not waited for.
                let _ = self.output.poll_flush(context, &mut self.io);
                Err(io::Error::new(io::ErrorKind::InvalidData, what))
            }
        });
    }

    /// Lets services take what came before the end.
    fn poll_rest(&mut self) -> Poll<io::Result<()>> {
        for place in self.bell.take() {
            if let Some(stream) = self.streams.get_mut(place)
                && stream.as_mut().is_none_or(|stream| stream.poll_answer(&self.places[place]).is_ready())
            {
                *stream = None;
            }
        }
        if self.streams.iter().any(Option::is_some) {
            return Poll::Pending;
        }
        Poll::Ready(self.ended.take().unwrap_or(Ok(())))
    }

    /// Whether the peer has to read before anything more is read of it.
    pub(super) fn is_owing(&self) -> bool {
        self.output.own_bytes() >= OWED_BYTES_MAX
    }

    /// Whether there is room in the queue.
    pub(super) fn has_room(&self) -> bool {
        self.output.bytes() < QUEUE_BYTES_MAX
    }

    pub(super) fn heard(&mut self) {
        self.is_heard = true;
    }

    fn poll_tick(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.tick.as_mut().poll(context).is_ready() {
            self.tick.as_mut().reset(tokio::time::Instant::now() + KEEP_ALIVE);
            if self.going == Going::Announced {
                self.leave();
                continue;
            }
            let is_silent = !std::mem::take(&mut self.is_heard);
            if is_silent && std::mem::replace(&mut self.is_asked, true) {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not answer"));
            }
            if is_silent {
                self.output.frame(frame::PING, 0, 0, |into| into.extend([0; 8]));
            } else {
                self.is_asked = false;
            }
            for stream in self.streams.iter_mut().flatten() {
                if !stream.is_whole && stream.begun.elapsed() > REQUEST_DURATION_MAX {
                    stream.delivery.end(Err(super::too_late()));
                }
            }
        }
        Ok(())
    }

    /// The place of a stream.
    pub(super) fn find(&self, id: u32) -> Option<usize> {
        self.streams.iter().position(|stream| stream.as_ref().is_some_and(|stream| stream.id == id))
    }

    /// Puts a stream in a place that is free; none when there is none.
    pub(super) fn free_place(&mut self) -> Option<usize> {
        if let Some(place) = self.streams.iter().position(Option::is_none) {
            return Some(place);
        }
        let place = self.streams.len();
        if place == STREAMS_MAX {
            return None;
        }
        self.streams.push(None);
        self.places.push(self.bell.place(place));
        Some(place)
    }

    /// Puts a stream in its place.
    pub(super) fn start(&mut self, place: usize, id: u32, delivery: Delivery, answer: S::Answer) {
        self.places[place].light();
        self.is_alert = false;
        let begun = Instant::now();
        self.streams[place] = Some(Box::new(Stream {
            id,
            delivery,
            is_whole: false,
            window: self.stream_window.into(),
            granted: begun,
            peer_window: self.peer.window,
            answer: Answer::Awaited(answer),
            is_queued: false,
            begun,
        }));
    }

    /// Ends a stream before its time.
    pub(super) fn reset(&mut self, id: u32, code: u32) {
        if let Some(place) = self.find(id) {
            self.streams[place] = None;
        }
        self.output.frame(frame::RST_STREAM, 0, id, |into| into.extend(code.to_be_bytes()));
    }
}

/// When a connection is looked at first: not together with all others that were opened when it was.
fn first_tick() -> Duration {
    let random = RandomState::new().build_hasher().finish();
    KEEP_ALIVE / 2 + KEEP_ALIVE.mul_f64(random as f64 / u64::MAX as f64) / 2
}

impl<S: Service> Stream<S> {
    /// The head of the answer, when it is there; the rest of it is to be sent.
    pub(super) fn poll_answer(&mut self, place: &Arc<Place>) -> Poll<Option<(http::response::Parts, bool)>> {
        let Answer::Awaited(answer) = &mut self.answer else { return Poll::Ready(None) };
        let waker = Waker::from(Arc::clone(place));
        let response = ready!(Pin::new(answer).poll(&mut Context::from_waker(&waker)));
        let (head, body) = response.into_parts();
        let is_over = body.is_end_stream();
        self.answer = Answer::Sent(Reply { body, next: Bytes::new(), trailers: None, is_over });
        Poll::Ready(Some((head, is_over)))
    }

    /// The header blocks of its reply, where they are always the same.
    pub(super) fn blocks(&self) -> Option<&'static Blocks> {
        match &self.answer {
            Answer::Sent(reply) => reply.body.blocks(),
            Answer::Awaited(_) => None,
        }
    }
}

fn goodbye(last: u32, code: u32, into: &mut Vec<u8>) {
    into.extend(last.to_be_bytes());
    into.extend(code.to_be_bytes());
}
