//! The connection itself: its socket, its windows, the calls on it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::time::Instant;
use tonic::Status;
use vaccel_guest::frame;
use vaccel_proto::Reason;

use super::stream::{Outcome, Stream};
use super::{FRAME_BYTES_MAX, KEEP_ALIVE, Output};
use crate::dial::Stream as Socket;
use crate::error::{Failure, Reach};
use crate::wire::Head;

/// Bytes received and not looked at yet: two frames of any kind but DATA, whose contents are passed on as they come.
const INPUT_BYTES: usize = 2 * frame::FRAME_BYTES_DEFAULT;

/// Bytes in frames that wait to be written. What is in one cannot be taken back, and whoever comes later waits for it.
const QUEUE_BYTES_MAX: usize = 2 << 20;

/// Bytes of answers to an agent that does not read them, such as those to its PINGs.
const OWED_BYTES_MAX: usize = 64 << 10;

/// A connection.
pub(super) struct State {
    pub(super) head: Arc<Head>,
    socket: Box<dyn Socket>,
    input: Box<[u8]>,
    input_begin: usize,
    input_end: usize,
    pub(super) output: Output,
    written: u64,
    pub(super) streams: BTreeMap<u32, Stream>,
    /// Those with requests that are not all in frames.
    pub(super) unframed: VecDeque<u32>,
    pub(super) next: u32,
    /// The DATA frame whose content comes next.
    pub(super) inside: Option<Inside>,
    /// A header block that comes in several frames: its stream, and whether it is the last of it.
    pub(super) block: Option<(u32, bool, Vec<u8>)>,
    /// What the agent takes of all calls, of a new one, in a frame, and how many calls.
    pub(super) window: i64,
    pub(super) stream_window: i64,
    pub(super) frame_bytes: usize,
    pub(super) streams_max: usize,
    /// Bytes of contents since the agent was last given its window back.
    pub(super) consumed: u32,
    /// The agent's settings came.
    pub(super) is_settled: bool,
    /// The agent takes no more calls.
    pub(super) is_leaving: bool,
    /// How it ended.
    end: Option<String>,
    failed_write: Option<io::Error>,
    heard: Instant,
    pinged: Option<Instant>,
    /// Who is to be woken.
    pub(super) woken: Vec<Waker>,
}

/// A DATA frame: content, then padding.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inside {
    pub(super) stream: u32,
    pub(super) left: usize,
    pub(super) padding: usize,
    pub(super) is_last: bool,
}

impl State {
    /// A connection over a socket on which nothing was said.
    pub(super) fn new(socket: Box<dyn Socket>, head: Arc<Head>) -> Self {
        let mut state = Self {
            head,
            socket,
            input: vec![0; INPUT_BYTES].into(),
            input_begin: 0,
            input_end: 0,
            output: Output::default(),
            written: 0,
            streams: BTreeMap::new(),
            unframed: VecDeque::new(),
            next: 1,
            inside: None,
            block: None,
            window: frame::WINDOW_DEFAULT,
            stream_window: frame::WINDOW_DEFAULT,
            frame_bytes: frame::FRAME_BYTES_DEFAULT,
            streams_max: usize::MAX,
            consumed: 0,
            is_settled: false,
            is_leaving: false,
            end: None,
            failed_write: None,
            heard: Instant::now(),
            pinged: None,
            woken: Vec::new(),
        };
        state.output.raw(frame::PREFACE);
        state.output.frame(frame::SETTINGS, 0, 0, |into| {
            for (setting, value) in [
                // Header blocks are read without a table that the agent would have to keep in step with.
                (frame::HEADER_TABLE_SIZE, 0),
                (frame::ENABLE_PUSH, 0),
                // A reply has a limit of its own: no window holds it up.
                (frame::INITIAL_WINDOW_SIZE, frame::WINDOW_MAX),
                (frame::MAX_FRAME_SIZE, FRAME_BYTES_MAX),
                (frame::MAX_HEADER_LIST_SIZE, frame::FRAME_BYTES_DEFAULT as u32),
            ] {
                into.extend(setting.to_be_bytes());
                into.extend(value.to_be_bytes());
            }
        });
        state.give_window(frame::WINDOW_MAX - frame::WINDOW_DEFAULT as u32);
        state
    }

    /// Whether a call may begin.
    pub(super) fn takes_calls(&self) -> bool {
        self.is_settled
            && self.end.is_none()
            && !self.is_leaving
            && self.next < frame::WINDOW_MAX
            && self.streams.len() < self.streams_max
    }

    /// How the connection ended, once it did.
    pub(super) fn end(&self) -> Option<&str> {
        self.end.as_deref()
    }

    /// Puts a call on its way.
    pub(super) fn begin(&mut self, path: &str, time: Duration, pieces: Vec<Bytes>) -> u32 {
        let id = self.next;
        self.next += 2;
        let begins_at = self.written + self.output.bytes() as u64;
        let head = Arc::clone(&self.head);
        self.output.frame(frame::HEADERS, frame::END_HEADERS, id, |into| head.block(path, time, into));
        self.streams.insert(id, Stream::new(pieces, self.stream_window, begins_at));
        self.unframed.push_back(id);
        self.fill();
        id
    }

    /// The outcome of a call, when there is one; then it is forgotten.
    pub(super) fn take_outcome(&mut self, id: u32) -> Option<Outcome> {
        let outcome = self.streams.get_mut(&id)?.outcome.take()?;
        self.streams.remove(&id);
        Some(outcome)
    }

    /// Whom to wake when a call has its outcome.
    pub(super) fn wait(&mut self, id: u32, waker: &Waker) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.waker.as_ref().is_some_and(|known| known.will_wake(waker))
        {
            stream.waker = Some(waker.clone());
        }
    }

    /// Gives a call up; what of it is not in frames is not sent, and what still comes for it is passed over.
    pub(super) fn give_up(&mut self, id: u32) {
        let stream = self.streams.remove(&id);
        if stream.is_some_and(|stream| stream.outcome.is_none()) && self.end.is_none() {
            self.reset(id, frame::CANCEL);
        }
    }

    pub(super) fn reset(&mut self, id: u32, code: u32) {
        self.output.frame(frame::RST_STREAM, 0, id, |into| into.extend(code.to_be_bytes()));
    }

    pub(super) fn give_window(&mut self, bytes: u32) {
        self.output.frame(frame::WINDOW_UPDATE, 0, 0, |into| into.extend(bytes.to_be_bytes()));
    }

    /// Puts requests in frames, as far as the agent has room for them.
    pub(super) fn fill(&mut self) {
        let mut at = 0;
        while self.window > 0
            && self.output.bytes() < QUEUE_BYTES_MAX
            && let Some(&id) = self.unframed.get(at)
        {
            let stream = self.streams.get_mut(&id).filter(|stream| stream.unframed > 0);
            let Some(stream) = stream else {
                self.unframed.remove(at);
                continue;
            };
            let room = usize::try_from(self.window.min(stream.window)).unwrap_or(0).min(self.frame_bytes);
            if room == 0 {
                // The next one may have room.
                at += 1;
                continue;
            }
            let length = room.min(stream.unframed);
            let taken = i64::try_from(length).unwrap_or(i64::MAX);
            self.window -= taken;
            stream.window -= taken;
            let is_last = length == stream.unframed;
            self.output.data(id, length, stream.next(length), is_last);
        }
    }

    /// Reads and writes what can be without waiting, until the call of this number has its outcome. Who is awake does
    /// not wait for the runtime either, of which another thread may have to wake before it says that something came.
    pub(super) fn drive(&mut self, context: &mut Context<'_>, own: Option<u32>, is_awake: bool) {
        while self.end.is_none() {
            self.flush(context);
            let has_outcome = |id| self.streams.get(&id).is_none_or(|stream| stream.outcome.is_some());
            // What cannot be written any more is owed to nobody; what there is to read is the end, or why.
            let is_owing = self.failed_write.is_none() && self.output.own_bytes() > OWED_BYTES_MAX;
            if own.is_some_and(has_outcome) || is_owing {
                return;
            }
            match self.poll_read(context, is_awake) {
                Poll::Ready(Ok(0)) => {
                    self.finish(chain_of(self.failed_write.as_ref(), "closed by the agent"))
                }
                Poll::Ready(Ok(_)) => {
                    (self.heard, self.pinged) = (Instant::now(), None);
                    if let Err(what) = self.process() {
                        self.output.frame(frame::GOAWAY, 0, 0, |into| {
                            into.extend([0; 4]);
                            into.extend(frame::PROTOCOL_ERROR.to_be_bytes());
                        });
                        self.flush(context);
                        self.finish(what.to_owned());
                    }
                }
                Poll::Ready(Err(error)) => self.finish(error.to_string()),
                // Whatever the agent had to say before it closed has been read.
                Poll::Pending => match self.failed_write.take() {
                    Some(error) => self.finish(error.to_string()),
                    None => return,
                },
            }
        }
    }

    /// Writes what can be written.
    pub(super) fn flush(&mut self, context: &mut Context<'_>) {
        while self.end.is_none() && self.failed_write.is_none() && self.output.bytes() > 0 {
            let before = self.output.bytes();
            let flushed = self.output.poll_flush(context, &mut self.socket);
            self.written += (before - self.output.bytes()) as u64;
            match flushed {
                Poll::Ready(Ok(())) => self.fill(),
                Poll::Ready(Err(error)) => self.failed_write = Some(error),
                Poll::Pending => return,
            }
        }
    }

    /// Looks at how long the agent has been silent.
    pub(super) fn look(&mut self, now: Instant) {
        match self.pinged {
            Some(at) if now - at >= KEEP_ALIVE => self.finish("the agent has vanished".to_owned()),
            None if now - self.heard >= KEEP_ALIVE => {
                self.output.frame(frame::PING, 0, 0, |into| into.extend([0; 8]));
                self.pinged = Some(now);
            }
            _ => {}
        }
    }

    /// Ends the connection, and with it the calls that have no outcome.
    pub(super) fn finish(&mut self, why: String) {
        for stream in self.streams.values_mut().filter(|stream| stream.outcome.is_none()) {
            let reach = if stream.begins_at < self.written { Reach::Sent } else { Reach::Unsent };
            stream.outcome = Some(Err(failed(&self.head, reach, &why)));
            self.woken.extend(stream.waker.take());
        }
        self.end = Some(why);
        // Whoever still holds the connection does not hold the agent's end open.
        self.socket = Box::new(tokio::io::empty());
    }

    /// Decides a call. `open` is whether the agent may say more about it, or expect more of it.
    pub(super) fn decide(&mut self, id: u32, outcome: Outcome, open: bool) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.outcome = Some(outcome);
        self.woken.extend(stream.waker.take());
        let is_unsent = std::mem::take(&mut stream.unframed) > 0;
        stream.pieces.clear();
        if open {
            self.reset(id, frame::CANCEL);
        } else if is_unsent {
            // Who answers before the whole request came does not want the rest.
            self.reset(id, frame::NO_ERROR);
        }
    }

    /// Reads what comes next: content to where it goes, everything else to the input.
    fn poll_read(&mut self, context: &mut Context<'_>, is_awake: bool) -> Poll<io::Result<usize>> {
        if self.input_begin == self.input_end {
            (self.input_begin, self.input_end) = (0, 0);
            // After the content its padding may be left, which has no place.
            if let Some(inside) = self.inside.as_mut().filter(|inside| inside.left > 0)
                && let Some(stream) = self.streams.get_mut(&inside.stream)
                && let Some(mut place) = stream.place(inside.left)
            {
                let read = pin!(self.socket.read_buf(&mut place)).poll(context);
                if let Poll::Ready(Ok(count)) = read {
                    stream.placed(count);
                    inside.left -= count;
                }
                return read;
            }
        }
        if self.input_end == self.input.len() {
            self.input.copy_within(self.input_begin..self.input_end, 0);
            (self.input_begin, self.input_end) = (0, self.input_end - self.input_begin);
        }
        if is_awake && let Some(socket) = self.socket.socket() {
            let read = rustix::io::read(socket, &mut self.input[self.input_end..]);
            if !matches!(read, Err(Errno::AGAIN | Errno::INTR)) {
                return Poll::Ready(read.inspect(|count| self.input_end += count).map_err(io::Error::from));
            }
        }
        let mut place = ReadBuf::new(&mut self.input[self.input_end..]);
        std::task::ready!(std::pin::Pin::new(&mut self.socket).poll_read(context, &mut place))?;
        let count = place.filled().len();
        self.input_end += count;
        Poll::Ready(Ok(count))
    }

    /// Takes in what was read.
    fn process(&mut self) -> Result<(), &'static str> {
        let input = std::mem::take(&mut self.input);
        let taken = self.frames(&input[self.input_begin..self.input_end]);
        self.input = input;
        self.input_begin += taken?;
        self.fill();
        Ok(())
    }
}

/// What a failed exchange is to its caller.
pub(super) fn failed(head: &Head, reach: Reach, why: &str) -> Status {
    let endpoint = head.endpoint();
    let message = match reach {
        Reach::Sent => format!("the connection to {endpoint} broke during the call: {why}"),
        _ => format!("{endpoint} did not take the call: {why}"),
    };
    Status::from_error(Box::new(Failure { reason: Reason::Unreachable, message, reach }))
}

fn chain_of(error: Option<&io::Error>, otherwise: &str) -> String {
    error.map_or_else(|| otherwise.to_owned(), ToString::to_string)
}
