//! Conversations with peers that do what the protocol allows, and what it does not.

mod foreseen;
mod turns;
mod windows;

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use vaccel_guest::frame::{self, Header};
use vaccel_proto::Error;

use super::*;
use crate::onward::Listener;
use crate::pool::Pool;

/// A reply's body: pieces, trailers, and the request that it is an answer to, if it keeps that.
struct Pieces(VecDeque<Bytes>, Option<HeaderMap>, Option<(Request<Incoming>, Awaited)>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let data = self.0.pop_front().map(Frame::data);
        Poll::Ready(data.or_else(|| self.1.take().map(Frame::trailers)).map(Ok))
    }
}

fn whole(bytes: impl Into<Bytes>) -> Response<Pieces> {
    let trailers = HeaderMap::from_iter([(http::header::ETAG, http::HeaderValue::from_static("end"))]);
    Response::new(Pieces(VecDeque::from([bytes.into()]), Some(trailers), None))
}

/// Bytes that `/large` sends.
const LARGE: usize = 300_000;

/// By path: `/echo` sends back what it got, or why it did not get all of it; `/slow` takes its time with every message;
/// `/large` sends [`LARGE`] bytes; `/talk` does, and keeps the request; `/never` does not answer, `/restless` wakes
/// itself instead; others answer at once. Counts calls without answers, messages `/slow` took, and those expected.
#[derive(Clone, Default)]
struct Echo(Arc<AtomicUsize>, Arc<AtomicUsize>, Arc<AtomicUsize>);

struct Awaited(Arc<AtomicUsize>);

impl Drop for Awaited {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl super::Reply for Pieces {}

impl Service for Echo {
    type Head = Request<()>;
    type Body = Pieces;
    type Answer = Pin<Box<dyn Future<Output = Response<Pieces>> + Send>>;

    fn understand(&self, request: Request<()>) -> Request<()> {
        request
    }

    fn has_messages(head: &Request<()>) -> bool {
        is_grpc(head.headers())
    }

    fn expect(&self, _: Listener) {
        self.2.fetch_add(1, Ordering::SeqCst);
    }

    fn call(&self, head: &Arc<Request<()>>, body: Incoming) -> Self::Answer {
        let request = (**head).clone().map(|()| body);
        self.0.fetch_add(1, Ordering::SeqCst);
        let (awaited, taken) = (Awaited(Arc::clone(&self.0)), Arc::clone(&self.1));
        Box::pin(async move {
            let _awaited = awaited;
            match request.uri().path() {
                "/slow" => {
                    let mut body = request.into_body();
                    while let Some(Ok(_)) = body.frame().await {
                        tokio::task::yield_now().await;
                        taken.fetch_add(1, Ordering::SeqCst);
                    }
                    whole("slow")
                }
                "/echo" => match request.into_body().collect().await {
                    Ok(body) => whole(body.to_bytes()),
                    Err(error) => whole(error.message().to_owned()),
                },
                "/large" => whole(vec![9; LARGE]),
                "/talk" => whole(vec![9; LARGE]).map(|mut body| {
                    body.2 = Some((request, _awaited));
                    body
                }),
                "/never" => std::future::pending().await,
                "/restless" => std::future::poll_fn(turns::restless).await,
                _ => whole("early"),
            }
        })
    }
}

/// The other end of a connection.
struct Peer {
    io: DuplexStream,
    agent: JoinHandle<io::Result<()>>,
    calls: Arc<AtomicUsize>,
    taken: Arc<AtomicUsize>,
    expected: Arc<AtomicUsize>,
}

/// What came on one stream.
#[derive(Debug, Default, PartialEq)]
struct Reply {
    head: Vec<u8>,
    data: Vec<u8>,
    trailers: Vec<u8>,
    reset: Option<u32>,
}

const STATUS_200: u8 = 0x88;

fn fields(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    // POST, http, and a path.
    let mut block = vec![0x83, 0x86, 0x04, u8::try_from(path.len()).expect("short")];
    block.extend(path.as_bytes());
    for (name, value) in more {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("short"));
            block.extend(text.as_bytes());
        }
    }
    block
}

fn message(content: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(content.len()).expect("short").to_be_bytes(), content].concat()
}

impl Peer {
    /// A peer that has said nothing.
    fn silent() -> Self {
        let (io, far) = tokio::io::duplex(1 << 20);
        let service = Echo::default();
        let Echo(calls, taken, expected) = service.clone();
        let agent = tokio::spawn(async move {
            let mut connection = Connection::new(far, service, Pool::default());
            let ended = connection.run().await;
            let _ = connection.into_io().shutdown().await;
            ended
        });
        Self { io, agent, calls, taken, expected }
    }

    async fn new() -> Self {
        let mut peer = Self::silent();
        peer.send(frame::SETTINGS, 0, 0, &[]).await;
        peer
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, content: &[u8]) {
        let header = Header { length: content.len(), kind, flags, stream }.encode();
        // A connection that was closed takes nothing, and says why before.
        let _ = self.io.write_all(&[&header[..], content].concat()).await;
    }

    async fn call(&mut self, stream: u32, path: &str, more: &[(&str, &str)]) {
        self.send(frame::HEADERS, frame::END_HEADERS, stream, &fields(path, more)).await;
    }

    async fn end(&mut self, stream: u32, content: &[u8]) {
        self.send(frame::DATA, frame::END_STREAM, stream, content).await;
    }

    /// The next frame; none at the end.
    async fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; frame::HEADER_BYTES];
        self.io.read_exact(&mut header).await.ok()?;
        let header = Header::decode(&header);
        let mut content = vec![0; header.length];
        self.io.read_exact(&mut content).await.ok()?;
        Some((header, content))
    }

    /// The next frame of a kind.
    async fn wait(&mut self, kind: u8) -> (Header, Vec<u8>) {
        loop {
            let next = self.next().await.expect("the connection goes on");
            if next.0.kind == kind {
                return next;
            }
        }
    }

    /// All of a reply.
    async fn reply(&mut self, stream: u32) -> Reply {
        let mut reply = Reply::default();
        loop {
            let (header, content) = self.next().await.expect("the connection goes on");
            if header.stream != stream {
                continue;
            }
            match header.kind {
                frame::HEADERS if reply.head.is_empty() => reply.head = content,
                frame::HEADERS => reply.trailers = content,
                frame::DATA => reply.data.extend(content),
                frame::RST_STREAM => {
                    reply.reset = Some(u32::from_be_bytes(content.try_into().expect("four bytes")));
                    return reply;
                }
                _ => {}
            }
            if header.has(frame::END_STREAM) {
                return reply;
            }
        }
    }

    /// The code with which the agent ends the connection.
    async fn goodbye(mut self) -> u32 {
        let (_, content) = self.wait(frame::GOAWAY).await;
        while self.next().await.is_some() {}
        assert!(self.agent.await.expect("no panic").is_err());
        u32::from_be_bytes(content[4..8].try_into().expect("a code"))
    }

    /// Makes a call that is answered as it should be.
    async fn works(&mut self, stream: u32) {
        self.call(stream, "/echo", &[]).await;
        self.end(stream, b"still here").await;
        let reply = self.reply(stream).await;
        assert_eq!((reply.head[0], &reply.data[..], reply.reset), (STATUS_200, &b"still here"[..], None));
    }
}

#[tokio::test]
async fn a_call_is_answered_however_its_frames_are_cut() {
    let content: Vec<u8> = (0..200_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    for (more, body) in
        [(&[][..], content.clone()), (&[("content-type", "application/grpc")], message(&content))]
    {
        for piece in [997, 16_384, 70_000, 200_005] {
            let mut peer = Peer::new().await;
            // A block in three frames, padded, with a priority.
            let block = fields("/echo", more);
            let first = [&[3, 0, 0, 0, 0, 9][..], &block[..5], &[0; 3]].concat();
            peer.send(frame::HEADERS, frame::PADDED | frame::PRIORITY, 1, &first).await;
            peer.send(frame::CONTINUATION, 0, 1, &block[5..8]).await;
            peer.send(frame::CONTINUATION, frame::END_HEADERS, 1, &block[8..]).await;
            for (number, part) in body.chunks(piece).enumerate() {
                let padded = [&[250][..], part, &[0; 250]].concat();
                match number % 3 {
                    0 => peer.send(frame::DATA, frame::PADDED, 1, &padded).await,
                    1 => peer.send(frame::DATA, 0, 1, part).await,
                    _ => {
                        peer.send(frame::DATA, 0, 1, &[]).await;
                        peer.send(0xbe, 0xff, 1, b"what comes to be defined one day").await;
                        peer.send(frame::DATA, 0, 1, part).await;
                    }
                }
            }
            peer.send(frame::WINDOW_UPDATE, 0, 1, &(1_u32 << 20).to_be_bytes()).await;
            peer.send(frame::WINDOW_UPDATE, 0, 0, &(1_u32 << 20).to_be_bytes()).await;
            peer.end(1, &[]).await;
            let reply = peer.reply(1).await;
            assert!(reply.data == body, "{piece}: {} bytes", reply.data.len());
            assert!(!reply.trailers.is_empty());
            peer.works(3).await;
        }
    }
}

#[tokio::test]
async fn calls_that_come_in_one_piece_are_told_apart() {
    // What follows a long message is read with its end: another frame, or another message in the same one.
    for length in [5_000, 20_000, 40_000] {
        for between in [None, Some(0), Some(3), Some(20)] {
            let mut peer = Peer::new().await;
            let (mut sent, mut expected) = (Vec::new(), [const { Vec::new() }; 3]);
            let mut put = |kind, flags, stream, content: &[u8]| {
                sent.extend(Header { length: content.len(), kind, flags, stream }.encode());
                sent.extend_from_slice(content);
            };
            for (content, stream) in expected.iter_mut().zip([1, 3, 5]) {
                content.extend(message(&vec![stream as u8; length]));
                content.extend(between.map(|more| message(&vec![9; more])).unwrap_or_default());
                let grpc = [("content-type", "application/grpc")];
                put(frame::HEADERS, frame::END_HEADERS, stream, &fields("/echo", &grpc));
                put(frame::DATA, frame::END_STREAM, stream, content);
                put(frame::PING, frame::ACK, 0, &[7; 8]);
            }
            peer.io.write_all(&sent).await.expect("it reads");
            let mut came = [const { Vec::new() }; 3];
            let mut ended = 0;
            while ended < 3 {
                let (header, content) = peer.next().await.expect("answers");
                ended += usize::from(header.kind == frame::HEADERS && header.has(frame::END_STREAM));
                if header.kind == frame::DATA && header.length > 0 {
                    came[header.stream as usize / 2].extend(content);
                    let more = (header.length as u32).to_be_bytes();
                    peer.send(frame::WINDOW_UPDATE, 0, 0, &more).await;
                }
            }
            assert!(came == expected, "{length}, {between:?}");
            peer.works(7).await;
        }
    }
}

#[tokio::test]
async fn trailers_of_a_request_are_its_end() {
    let mut peer = Peer::new().await;
    peer.call(1, "/echo", &[]).await;
    peer.send(frame::DATA, 0, 1, b"with trailers").await;
    peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, &[0, 1, b'x', 1, b'y']).await;
    assert_eq!(peer.reply(1).await.data, b"with trailers");
    peer.works(3).await;
}

#[tokio::test]
async fn messages_that_are_cut_are_told() {
    let mut peer = Peer::new().await;
    peer.call(1, "/echo", &[("content-type", "application/grpc")]).await;
    peer.end(1, &message(b"a message")[..8]).await;
    assert_eq!(peer.reply(1).await.data, b"the request ended in the middle of a message");
    peer.works(3).await;
}

#[tokio::test]
async fn replies_take_turns() {
    let mut peer = Peer::silent();
    let window = [&frame::INITIAL_WINDOW_SIZE.to_be_bytes()[..], &(1_u32 << 20).to_be_bytes()].concat();
    peer.send(frame::SETTINGS, 0, 0, &window).await;
    peer.send(frame::WINDOW_UPDATE, 0, 0, &(1_u32 << 20).to_be_bytes()).await;
    for stream in [1, 3, 5] {
        peer.call(stream, "/large", &[]).await;
    }
    let mut order = Vec::new();
    while order.len() < 30 {
        order.push(peer.wait(frame::DATA).await.0.stream);
    }
    let times = |stream| order.iter().filter(|other| **other == stream).count();
    assert!([1, 3, 5].into_iter().all(|stream| times(stream) >= 5), "{order:?}");
}

#[tokio::test]
async fn an_upload_that_nobody_waits_for_is_told_to_stop() {
    let mut peer = Peer::new().await;
    peer.call(1, "/early", &[]).await;
    let reply = peer.reply(1).await;
    assert_eq!((&reply.data[..], reply.reset), (&b"early"[..], None));
    let (header, content) = peer.wait(frame::RST_STREAM).await;
    assert_eq!((header.stream, content), (1, frame::NO_ERROR.to_be_bytes().to_vec()));
    // What is on its way is passed over.
    peer.send(frame::DATA, 0, 1, &[1; 5000]).await;
    peer.end(1, &[1; 5000]).await;
    peer.works(3).await;
}

#[tokio::test]
async fn what_came_of_an_upload_is_taken_although_the_peer_has_left() {
    let mut peer = Peer::new().await;
    peer.call(1, "/slow", &[("content-type", "application/grpc")]).await;
    for number in 0..5 {
        peer.send(frame::DATA, 0, 1, &message(&[number; 100])).await;
    }
    peer.call(3, "/never", &[]).await;
    let Peer { io, agent, calls, taken, .. } = peer;
    drop(io);
    let _ = agent.await.expect("no panic");
    assert_eq!((taken.load(Ordering::SeqCst), calls.load(Ordering::SeqCst)), (5, 0));
}

#[tokio::test]
async fn more_streams_than_allowed_are_refused_one_by_one() {
    let mut peer = Peer::new().await;
    for number in 0..STREAMS_MAX as u32 {
        peer.call(2 * number + 1, "/never", &[]).await;
    }
    let one_more = 2 * STREAMS_MAX as u32 + 1;
    peer.call(one_more, "/never", &[]).await;
    assert_eq!(peer.reply(one_more).await.reset, Some(frame::REFUSED_STREAM));
    assert_eq!(peer.calls.load(Ordering::SeqCst), STREAMS_MAX);
    // Taken back, they make room; what they held is gone.
    for number in 0..STREAMS_MAX as u32 {
        peer.send(frame::RST_STREAM, 0, 2 * number + 1, &frame::CANCEL.to_be_bytes()).await;
    }
    peer.works(one_more + 2).await;
    assert_eq!(peer.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn calls_that_are_taken_back_again_and_again_end_nothing() {
    let mut peer = Peer::new().await;
    for number in 0..10_000 {
        peer.call(2 * number + 1, "/never", &[]).await;
        peer.send(frame::RST_STREAM, 0, 2 * number + 1, &frame::CANCEL.to_be_bytes()).await;
    }
    peer.works(20_001).await;
    assert_eq!(peer.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn requests_that_are_none_end_alone() {
    let mut peer = Peer::new().await;
    // No path; a header of connections; a head that is too large, of one that is in the table.
    peer.send(frame::HEADERS, frame::END_HEADERS, 1, &[0x83, 0x86]).await;
    assert_eq!(peer.reply(1).await.reset, Some(frame::PROTOCOL_ERROR));
    peer.call(3, "/echo", &[("connection", "close")]).await;
    assert_eq!(peer.reply(3).await.reset, Some(frame::PROTOCOL_ERROR));
    let kept = [&fields("/echo", &[])[..], &[0x40, 1, b'x', 100], &[b'y'; 100]].concat();
    peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 5, &kept).await;
    assert_eq!(peer.reply(5).await.head[0], STATUS_200);
    let large = [&fields("/echo", &[])[..], &[0xbe; 1000]].concat();
    peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 7, &large).await;
    assert_eq!(peer.reply(7).await.head, [8, 3, b'4', b'3', b'1']);
    peer.works(9).await;
}

#[tokio::test]
async fn pings_and_settings_are_answered() {
    let mut peer = Peer::new().await;
    assert!(peer.wait(frame::SETTINGS).await.0.length > 0);
    assert!(peer.wait(frame::SETTINGS).await.0.has(frame::ACK));
    peer.send(frame::PING, 0, 0, b"12345678").await;
    let (header, content) = peer.wait(frame::PING).await;
    assert_eq!((header.has(frame::ACK), &content[..]), (true, &b"12345678"[..]));
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_not_read_either() {
    let mut peer = Peer::new().await;
    let pings = Header { length: 8, kind: frame::PING, flags: 0, stream: 0 }.encode();
    let many = [&pings[..], &[0; 8]].concat().repeat(1000);
    let mut sent = 0;
    // What the two sockets hold, what the agent owes, and what it has read: once to owe it, once not to look at it.
    let limit = 2 * (1 << 20) + OWED_BYTES_MAX + 2 * AHEAD_BYTES;
    // When the agent had its turn again and again and there is no room, there will be none.
    let idle = async || {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    };
    loop {
        tokio::select! {
            biased;
            count = peer.io.write(&many[sent % many.len()..]) => sent += count.expect("the connection is there"),
            () = idle() => break,
        }
        assert!(sent <= limit, "{sent} bytes were taken");
    }
    assert!(sent > OWED_BYTES_MAX);
}

#[tokio::test]
async fn what_breaks_the_protocol_ends_the_connection_and_says_why() {
    const PING: u8 = frame::PING;
    let long = vec![0; FRAME_BYTES_MAX + 1];
    let (open, block) = (fields("/never", &[]), vec![0xbe; 4]);
    let zero_window = [&frame::INITIAL_WINDOW_SIZE.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
    let frame_size = [&frame::MAX_FRAME_SIZE.to_be_bytes()[..], &16_u32.to_be_bytes()].concat();
    let (headers, whole) = (frame::HEADERS, frame::END_HEADERS);
    let full = frame::WINDOW_MAX.to_be_bytes();
    type Frames<'a> = Vec<(u8, u8, u32, &'a [u8])>;
    let cases: Vec<(&str, Frames<'_>, u32)> = vec![
        ("a frame that is too long", vec![(frame::DATA, 0, 1, &long)], frame::FRAME_SIZE_ERROR),
        ("data of no stream", vec![(frame::DATA, 0, 0, b"x")], frame::PROTOCOL_ERROR),
        ("data of a stream that never was", vec![(frame::DATA, 0, 9, b"x")], frame::PROTOCOL_ERROR),
        ("a stream of the server's", vec![(headers, whole, 2, &open)], frame::PROTOCOL_ERROR),
        ("headers of no stream", vec![(headers, whole, 0, &open)], frame::PROTOCOL_ERROR),
        (
            "padding longer than its frame",
            vec![(headers, whole | frame::PADDED, 1, &[9, 0])],
            frame::PROTOCOL_ERROR,
        ),
        ("a promise", vec![(frame::PUSH_PROMISE, whole, 1, &open)], frame::PROTOCOL_ERROR),
        ("nothing to continue", vec![(frame::CONTINUATION, whole, 1, &open)], frame::PROTOCOL_ERROR),
        ("a block that is cut", vec![(headers, 0, 1, &open), (PING, 0, 0, &[0; 8])], frame::PROTOCOL_ERROR),
        ("a block that is none", vec![(headers, whole, 1, &block)], frame::COMPRESSION_ERROR),
        ("a short ping", vec![(PING, 0, 0, &[0; 7])], frame::FRAME_SIZE_ERROR),
        ("a ping of a stream", vec![(PING, 0, 1, &[0; 8])], frame::PROTOCOL_ERROR),
        ("settings that are cut", vec![(frame::SETTINGS, 0, 0, &[0; 5])], frame::FRAME_SIZE_ERROR),
        ("a window that is none", vec![(frame::SETTINGS, 0, 0, &zero_window)], frame::FLOW_CONTROL_ERROR),
        ("a frame size that is none", vec![(frame::SETTINGS, 0, 0, &frame_size)], frame::PROTOCOL_ERROR),
        ("a window that does not grow", vec![(frame::WINDOW_UPDATE, 0, 0, &[0; 4])], frame::PROTOCOL_ERROR),
        ("a window of no stream", vec![(frame::WINDOW_UPDATE, 0, 5, &full)], frame::PROTOCOL_ERROR),
        ("a window beyond all", vec![(frame::WINDOW_UPDATE, 0, 0, &full)], frame::FLOW_CONTROL_ERROR),
        ("an end of no stream", vec![(frame::RST_STREAM, 0, 7, &[0; 4])], frame::PROTOCOL_ERROR),
        (
            "data after the end",
            vec![(headers, whole | frame::END_STREAM, 1, &open), (frame::DATA, 0, 1, b"x")],
            frame::PROTOCOL_ERROR,
        ),
        (
            "headers twice",
            vec![(headers, whole, 1, &open), (headers, whole, 1, &open)],
            frame::PROTOCOL_ERROR,
        ),
    ];
    for (what, frames, code) in cases {
        let mut peer = Peer::new().await;
        for (kind, flags, stream, content) in frames {
            peer.send(kind, flags, stream, content).await;
        }
        assert_eq!(peer.goodbye().await, code, "{what}");
    }
    let mut peer = Peer::silent();
    peer.send(PING, 0, 0, &[0; 8]).await;
    assert_eq!(peer.goodbye().await, frame::PROTOCOL_ERROR, "something before the settings");
}

#[tokio::test]
async fn blocks_that_do_not_end_are_not_gathered() {
    for (piece, times) in [(0, BLOCK_FRAMES_MAX), (BLOCK_BYTES_MAX / 2, 2)] {
        let mut peer = Peer::new().await;
        peer.send(frame::HEADERS, 0, 1, &fields("/never", &[])).await;
        for _ in 0..times {
            peer.send(frame::CONTINUATION, 0, 1, &vec![0xbe; piece]).await;
        }
        assert_eq!(peer.goodbye().await, frame::ENHANCE_YOUR_CALM, "{piece}");
    }
}

#[tokio::test]
async fn a_peer_that_leaves_takes_its_calls_along() {
    let mut peer = Peer::new().await;
    peer.call(1, "/never", &[]).await;
    peer.works(3).await;
    assert_eq!(peer.calls.load(Ordering::SeqCst), 1);
    let Peer { io, agent, calls, .. } = peer;
    drop(io);
    let _ = agent.await.expect("no panic");
    assert_eq!(calls.load(Ordering::SeqCst), 0);
}

/// A connection that is told to close when a message comes.
fn closing() -> (Peer, tokio::sync::oneshot::Sender<()>) {
    let (io, far) = tokio::io::duplex(1 << 20);
    let service = Echo::default();
    let (calls, taken) = (Arc::clone(&service.0), Arc::clone(&service.1));
    let (close, closed) = tokio::sync::oneshot::channel();
    let agent = tokio::spawn(async move {
        let mut connection = Connection::new(far, service, Pool::default());
        tokio::select! {
            ended = connection.run() => return ended,
            _ = closed => connection.close(),
        }
        connection.run().await
    });
    (Peer { io, agent, calls, taken, expected: Arc::default() }, close)
}

#[tokio::test]
async fn a_connection_that_closes_answers_what_came_before_and_refuses_what_comes_after() {
    let (mut peer, close) = closing();
    peer.send(frame::SETTINGS, 0, 0, &[]).await;
    peer.call(1, "/echo", &[]).await;
    peer.send(frame::PING, 0, 0, &[0; 8]).await;
    peer.wait(frame::PING).await;
    close.send(()).expect("it listens");
    let (_, content) = peer.wait(frame::GOAWAY).await;
    assert_eq!(content[..4], frame::WINDOW_MAX.to_be_bytes());
    let (_, farewell) = peer.wait(frame::PING).await;
    // On its way when the agent said so, and sent after the peer knew.
    peer.call(3, "/echo", &[]).await;
    peer.send(frame::PING, frame::ACK, 0, &farewell).await;
    let (_, content) = peer.wait(frame::GOAWAY).await;
    assert_eq!(content[..4], 3_u32.to_be_bytes());
    peer.call(5, "/echo", &[]).await;
    assert_eq!(peer.reply(5).await.reset, Some(frame::REFUSED_STREAM));
    for stream in [1, 3] {
        peer.end(stream, b"in time").await;
        assert_eq!(peer.reply(stream).await.data, b"in time");
    }
    assert!(peer.next().await.is_none());
    peer.agent.await.expect("no panic").expect("a good end");
}

#[tokio::test]
async fn a_peer_that_does_not_say_goodbye_is_not_waited_for() {
    let (mut peer, close) = closing();
    peer.send(frame::SETTINGS, 0, 0, &[]).await;
    peer.works(1).await;
    close.send(()).expect("it listens");
    peer.agent.await.expect("no panic").expect("a good end");
}
