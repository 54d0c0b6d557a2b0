//! A request's body: from the connection, which receives it, to the service, which takes it.
//!
//! gRPC's messages arrive whole: each is gathered in one aligned buffer, for which its sender is charged as soon as it
//! says how long the message is, and into which the connection reads it from the socket. Of other bodies arrives what
//! has come, in however many pieces that was.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use bytes::Bytes;
use http_body::{Body, Frame};
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::{Error, Reason};

use super::bell::Place;
use crate::pool::{Buffer, Pool};

/// What a message takes beside its bytes until it is taken, in bytes: its place in the queue, its buffer's boundaries,
/// and what the allocator has for each. A message may have no bytes of its own.
pub(crate) const BESIDE_MESSAGE_BYTES: u64 = 512;

/// Who is charged for what arrives.
pub(crate) trait Meter: Send + Sync {
    /// So many bytes are about to be held: of a message that was announced, or of a piece that has come.
    ///
    /// # Errors
    /// They are too many. Nothing more of this body is received.
    fn claim(&self, bytes: usize) -> Result<(), Error>;

    /// A message that was taken makes room for the one after it.
    fn give_back(&self, bytes: usize);
}

/// What is between the two.
struct Inbox {
    state: Mutex<State>,
    /// Wakes the connection for this stream.
    connection: Arc<Place>,
}

#[derive(Default)]
struct State {
    /// Messages that are whole.
    ready: VecDeque<Bytes>,
    /// What has come of another body. One piece for all: each of its own may be a single byte.
    gathered: Vec<u8>,
    /// How the body ended.
    end: Option<Result<(), Error>>,
    /// The service waits.
    reader: Option<Waker>,
    meter: Option<Arc<dyn Meter>>,
    ends_aligned: bool,
    /// Bytes of the message that was taken last.
    taken: usize,
    /// The connection waits until everything is taken.
    is_awaited: bool,
    /// Nobody is going to take anything.
    is_abandoned: bool,
}

impl State {
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.gathered.is_empty()
    }

    fn next(&mut self) -> Option<Bytes> {
        let message = self.ready.pop_front();
        message.or_else(|| {
            Some(std::mem::take(&mut self.gathered).into()).filter(|piece: &Bytes| !piece.is_empty())
        })
    }
}

impl Inbox {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The service's end.
pub(crate) struct Incoming {
    inbox: Arc<Inbox>,
    is_messages: bool,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("is_messages", &self.is_messages).finish_non_exhaustive()
    }
}

impl Incoming {
    /// Says who is charged. Without, nobody is.
    pub(crate) fn charge(&self, meter: Arc<dyn Meter>) {
        self.inbox.state().meter = Some(meter);
    }

    /// Says that messages end with what is to be aligned, and that its length is a multiple of the boundary. Without,
    /// they begin on the boundary, and their senders can see to the rest.
    pub(crate) fn align_ends(&self) {
        self.inbox.state().ends_aligned = true;
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = Error;

    /// The next message with its five bytes of framing, or of other bodies what has come.
    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let mut state = self.inbox.state();
        let taken = std::mem::take(&mut state.taken);
        if let Some(meter) = state.meter.as_ref().filter(|_| taken > 0) {
            meter.give_back(taken);
        }
        if let Some(bytes) = state.next() {
            state.taken = if self.is_messages { bytes.len() } else { 0 };
            let is_awaited = state.is_empty() && std::mem::take(&mut state.is_awaited);
            drop(state);
            if is_awaited {
                Wake::wake_by_ref(&self.inbox.connection);
            }
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        match state.end.take() {
            None => {
                state.reader = Some(context.waker().clone());
                Poll::Pending
            }
            Some(Err(error)) => {
                state.end = Some(Ok(()));
                Poll::Ready(Some(Err(error)))
            }
            Some(Ok(())) => {
                state.end = Some(Ok(()));
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let state = self.inbox.state();
        state.is_empty() && matches!(state.end, Some(Ok(())))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let mut state = self.inbox.state();
        state.is_abandoned = true;
        state.ready.clear();
        state.gathered = Vec::new();
        let is_awaited = std::mem::take(&mut state.is_awaited);
        drop(state);
        if is_awaited {
            Wake::wake_by_ref(&self.inbox.connection);
        }
    }
}

/// The connection's end.
pub(super) struct Delivery {
    inbox: Arc<Inbox>,
    is_messages: bool,
    prefix: [u8; GRPC_HEADER_BYTES],
    prefix_bytes: usize,
    /// The message that is arriving.
    message: Option<Buffer>,
    is_prompt: bool,
    is_over: bool,
}

impl Delivery {
    /// Both ends, for a body of gRPC's messages or of anything; `connection` wakes the connection for its stream.
    pub(super) fn new(is_messages: bool, connection: Arc<Place>) -> (Self, Incoming) {
        let inbox = Arc::new(Inbox { state: Mutex::default(), connection });
        let delivery = Self {
            inbox: Arc::clone(&inbox),
            is_messages,
            prefix: [0; GRPC_HEADER_BYTES],
            prefix_bytes: 0,
            message: None,
            is_prompt: false,
            is_over: false,
        };
        (delivery, Incoming { inbox, is_messages })
    }

    /// Where the next bytes of the message that is arriving may be read to, at most so many; and at its end a few more,
    /// which are of something else.
    pub(super) fn place(&mut self, most: usize) -> Option<&mut [u8]> {
        self.message.as_mut().map(|message| message.room_for(most))
    }

    /// What was read there, of which so many bytes are the message's.
    pub(super) fn beyond(&mut self, most: usize, count: usize) -> &[u8] {
        self.place(most).and_then(|place| place.get(most..count)).unwrap_or_default()
    }

    /// So many bytes were read there.
    pub(super) fn placed(&mut self, count: usize) {
        if let Some(message) = &mut self.message {
            message.advance(count);
        }
        self.hand_over();
    }

    /// Takes bytes that were read elsewhere.
    pub(super) fn receive(&mut self, mut bytes: &[u8], pool: &Pool) {
        while !bytes.is_empty() && !self.is_over {
            if !self.is_messages {
                if self.claim(bytes.len()) {
                    self.deliver(|state| state.gathered.extend_from_slice(bytes));
                }
                return;
            }
            if let Some(message) = &mut self.message {
                let count = message.put(bytes);
                bytes = &bytes[count..];
                self.hand_over();
                continue;
            }
            let count = bytes.len().min(GRPC_HEADER_BYTES - self.prefix_bytes);
            self.prefix[self.prefix_bytes..self.prefix_bytes + count].copy_from_slice(&bytes[..count]);
            self.prefix_bytes += count;
            bytes = &bytes[count..];
            if self.prefix_bytes == GRPC_HEADER_BYTES {
                self.prefix_bytes = 0;
                let [_, length @ ..] = self.prefix;
                let whole = GRPC_HEADER_BYTES + u32::from_be_bytes(length) as usize;
                if self.claim(whole) {
                    let mut message = pool.take_for(whole, self.ends_aligned());
                    message.put(&self.prefix);
                    self.message = Some(message);
                    self.hand_over();
                }
            }
        }
    }

    /// Takes the beginning of a message that was read to a buffer for all of it, whose end is aligned or its beginning.
    ///
    /// # Errors
    /// It is no beginning of such a message.
    pub(super) fn adopt(&mut self, buffer: Buffer, ends_aligned: bool) -> Result<(), Buffer> {
        let whole = buffer.filled().first_chunk().map(|&[_, length @ ..]: &[u8; GRPC_HEADER_BYTES]| {
            GRPC_HEADER_BYTES + u32::from_be_bytes(length) as usize
        });
        let is_begin = self.is_messages && self.message.is_none() && self.prefix_bytes == 0 && !self.is_over;
        if !is_begin || whole != Some(buffer.capacity()) || self.ends_aligned() != ends_aligned {
            return Err(buffer);
        }
        if self.claim(buffer.capacity()) {
            self.message = Some(buffer);
            self.hand_over();
        }
        Ok(())
    }

    /// Whether the ends of messages are aligned, and not their beginnings.
    pub(super) fn ends_aligned(&self) -> bool {
        self.inbox.state().ends_aligned
    }

    /// Charges for so many bytes; returns whether they may come.
    fn claim(&mut self, bytes: usize) -> bool {
        let state = self.inbox.state();
        if state.is_abandoned {
            self.is_over = true;
            return false;
        }
        let claimed = state.meter.as_ref().map_or(Ok(()), |meter| meter.claim(bytes));
        drop(state);
        claimed.map_err(|error| self.end(Err(error))).is_ok()
    }

    /// Hands the message over when it is whole.
    fn hand_over(&mut self) {
        if let Some(message) = self.message.take_if(|message| message.is_full()) {
            let message = message.freeze();
            self.deliver(|state| state.ready.push_back(message));
        }
    }

    fn deliver(&mut self, put: impl FnOnce(&mut State)) {
        let mut state = self.inbox.state();
        if state.is_abandoned {
            self.is_over = true;
            return;
        }
        put(&mut state);
        self.is_prompt = state.reader.is_some();
        drop(state);
        self.tell();
    }

    /// Tells the service that there is something for it.
    fn tell(&self) {
        let reader = self.inbox.state().reader.take();
        if let Some(reader) = reader {
            // Usually it is this very task that waits, and needs no waking.
            self.inbox.connection.light();
            reader.wake();
        }
    }

    /// No more bytes come: the peer has said all it wanted to say.
    pub(super) fn finish(&mut self) {
        let is_whole = self.message.is_none() && self.prefix_bytes == 0;
        let cut = || Error::new(Reason::BadArgument, "the request ended in the middle of a message");
        self.end(if is_whole { Ok(()) } else { Err(cut()) });
    }

    /// No more bytes come, for this reason. What is said first holds.
    pub(super) fn end(&mut self, how: Result<(), Error>) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        self.message = None;
        self.inbox.state().end = Some(how);
        self.tell();
    }

    /// Whether bytes that come are thrown away.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Bytes of the message that is arriving: those that have not come, and all of them.
    pub(super) fn missing(&self) -> (usize, usize) {
        self.message
            .as_ref()
            .map_or((0, 0), |message| (message.capacity() - message.filled().len(), message.capacity()))
    }

    /// Whether the service was waiting for what came last.
    pub(super) fn is_prompt(&self) -> bool {
        self.is_prompt
    }

    /// Whether everything that arrived was taken; if not, the connection is woken when it is.
    pub(super) fn is_taken(&self) -> bool {
        let mut state = self.inbox.state();
        state.is_awaited = !state.is_empty();
        !state.is_awaited
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.end(Err(lost()));
    }
}

/// The peer left, or took the call back.
pub(super) fn lost() -> Error {
    Error::new(Reason::Cancelled, "the request ended before it was whole")
}

#[cfg(test)]
mod tests {
    use super::super::bell::Bell;
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Charges up to a limit.
    #[derive(Default)]
    struct Purse {
        held: AtomicUsize,
    }

    const LIMIT: usize = 100_000;

    impl Meter for Purse {
        fn claim(&self, bytes: usize) -> Result<(), Error> {
            let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
            if held > LIMIT {
                return Err(Error::limit(Reason::QuotaExceeded, "bytes", LIMIT as u64, held as u64, "bytes"));
            }
            Ok(())
        }

        fn give_back(&self, bytes: usize) {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    fn body(is_messages: bool) -> (Arc<Purse>, Delivery, Incoming) {
        let purse = Arc::new(Purse::default());
        let (delivery, incoming) = Delivery::new(is_messages, Arc::new(Bell::default()).place(0));
        incoming.charge(Arc::clone(&purse) as Arc<dyn Meter>);
        (purse, delivery, incoming)
    }

    fn message(length: usize) -> Vec<u8> {
        [&[0][..], &u32::try_from(length).expect("short").to_be_bytes(), &vec![7; length]].concat()
    }

    fn next(incoming: &mut Incoming) -> Poll<Option<Result<Bytes, Error>>> {
        let frame = Pin::new(incoming).poll_frame(&mut Context::from_waker(Waker::noop()));
        frame.map(|frame| frame.map(|frame| frame.map(|frame| frame.into_data().expect("data"))))
    }

    fn taken(incoming: &mut Incoming) -> Bytes {
        match next(incoming) {
            Poll::Ready(Some(Ok(bytes))) => bytes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_arrive_whole_however_they_are_cut_and_charge_one_by_one() {
        let messages = [message(60), message(0), message(70_000), message(1)];
        let stream = messages.concat();
        for cut in [1, 3, 5, 64, 4096, stream.len()] {
            let (purse, mut delivery, mut incoming) = body(true);
            let mut came = Vec::new();
            for part in stream.chunks(cut) {
                // Half of what has a place goes there.
                let missing = delivery.missing().0;
                let direct = delivery.place(missing).map_or(0, |place| {
                    let count = missing.min(part.len() / 2);
                    place[..count].copy_from_slice(&part[..count]);
                    count
                });
                delivery.placed(direct);
                delivery.receive(&part[direct..], &Pool::default());
                while let Poll::Ready(Some(Ok(bytes))) = next(&mut incoming) {
                    assert!(purse.held.load(Ordering::Relaxed) >= bytes.len());
                    came.push(bytes);
                }
            }
            delivery.finish();
            assert!(matches!(next(&mut incoming), Poll::Ready(None)) && incoming.is_end_stream());
            assert_eq!(came, messages, "{cut}");
            assert_eq!(purse.held.load(Ordering::Relaxed), 0, "{cut}: all were given back");
        }
    }

    #[test]
    fn what_a_message_ends_with_is_aligned_where_that_is_asked_for() {
        for length in [64, 100, 1024, 70_000] {
            let (_, mut delivery, mut incoming) = body(true);
            incoming.align_ends();
            delivery.receive(&message(length), &Pool::default());
            assert_eq!(taken(&mut incoming).as_ptr_range().end.align_offset(16), 0, "{length}");
        }
    }

    #[test]
    fn a_claim_that_is_too_large_is_refused_before_its_bytes_come() {
        let (_, mut delivery, mut incoming) = body(true);
        delivery.receive(&message(LIMIT)[..GRPC_HEADER_BYTES], &Pool::default());
        let Poll::Ready(Some(Err(refusal))) = next(&mut incoming) else { panic!("it is refused") };
        assert_eq!(refusal.reason(), Reason::QuotaExceeded);
        assert!(delivery.is_over() && delivery.place(1).is_none());
        delivery.receive(&[0; 100], &Pool::default());
        delivery.finish();
        assert!(matches!(next(&mut incoming), Poll::Ready(None)));
    }

    #[test]
    fn a_body_that_is_cut_says_so() {
        for cut in [1, 4, 5, 20] {
            let (_, mut delivery, mut incoming) = body(true);
            delivery.receive(&message(60)[..cut], &Pool::default());
            delivery.finish();
            let Poll::Ready(Some(Err(refusal))) = next(&mut incoming) else { panic!("it is cut") };
            assert_eq!(refusal.reason(), Reason::BadArgument, "{cut}");
        }
        let (_, delivery, mut incoming) = body(true);
        drop(delivery);
        let Poll::Ready(Some(Err(refusal))) = next(&mut incoming) else { panic!("the peer left") };
        assert_eq!(refusal.reason(), Reason::Cancelled);
    }

    #[test]
    fn other_bodies_arrive_as_they_come_and_are_charged_together() {
        let (purse, mut delivery, mut incoming) = body(false);
        for piece in [&b"one"[..], b"two"] {
            delivery.receive(piece, &Pool::default());
            assert_eq!(taken(&mut incoming), piece);
        }
        assert_eq!(purse.held.load(Ordering::Relaxed), 6);
        for byte in b"in pieces of one" {
            delivery.receive(&[*byte], &Pool::default());
        }
        assert!(!delivery.is_taken());
        assert_eq!(taken(&mut incoming), &b"in pieces of one"[..], "what nobody took is one piece");
        assert!(delivery.is_taken());
        delivery.receive(&vec![0; LIMIT], &Pool::default());
        assert!(matches!(next(&mut incoming), Poll::Ready(Some(Err(_)))));
    }

    #[test]
    fn the_connection_is_told_when_everything_is_taken() {
        let bell = Arc::new(Bell::default());
        let (mut delivery, mut incoming) = Delivery::new(true, bell.place(3));
        delivery.receive(&[message(1), message(2)].concat(), &Pool::default());
        assert!(!delivery.is_taken());
        taken(&mut incoming);
        assert_eq!(bell.take().next(), None);
        taken(&mut incoming);
        assert_eq!(bell.take().next(), Some(3));
        assert!(delivery.is_taken());
        delivery.receive(&message(3), &Pool::default());
        assert!(!delivery.is_taken());
        drop(incoming);
        assert_eq!(bell.take().next(), Some(3), "nobody is going to take the rest");
        delivery.receive(&message(3), &Pool::default());
        assert!(delivery.is_over());
    }
}
