//! Conversations with an agent that says what a test wants it to say.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::{Code, Status};
use vaccel_guest::frame::{self, Header};

use super::{Connection, KEEP_ALIVE};
use crate::error::{Failure, Reach};
use crate::unary::{Awake, Options};
use crate::wire::Head;

const OPTIONS: Options = Options { time: Duration::from_secs(60), awake: Awake::Foreseen, kind: 0 };
/// How long an agent waits for what may never come.
const PATIENCE: Duration = Duration::from_millis(200);
/// `:status: 200`, and the trailers `grpc-status: 0`, `grpc-status: 5` with a message, as header blocks.
const OK: &[u8] = &[0x88];
const DONE: &[u8] = b"\x00\x0bgrpc-status\x010";
const FAILED: &[u8] = b"\x00\x0bgrpc-status\x015\x00\x0cgrpc-message\x04gone";

/// The agent's end.
struct Agent {
    socket: DuplexStream,
}

impl Agent {
    async fn say(&mut self, kind: u8, flags: u8, stream: u32, content: &[u8]) {
        let header = Header { length: content.len(), kind, flags, stream }.encode();
        self.socket.write_all(&[&header, content].concat()).await.unwrap();
    }

    async fn hear(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; frame::HEADER_BYTES];
        self.socket.read_exact(&mut header).await.ok()?;
        let header = Header::decode(&header);
        let mut content = vec![0; header.length];
        self.socket.read_exact(&mut content).await.ok()?;
        Some((header, content))
    }

    /// The next frame of a kind.
    async fn expect(&mut self, kind: u8) -> (Header, Vec<u8>) {
        loop {
            let (header, content) = self.hear().await.expect("the client is there");
            if header.kind == kind {
                return (header, content);
            }
        }
    }

    /// A whole request: its stream and its content.
    async fn request(&mut self) -> (u32, Vec<u8>) {
        let (head, _) = self.expect(frame::HEADERS).await;
        let mut content = Vec::new();
        loop {
            let (header, more) = self.expect(frame::DATA).await;
            assert_eq!(header.stream, head.stream);
            content.extend(more);
            if header.has(frame::END_STREAM) {
                return (head.stream, content);
            }
        }
    }

    async fn answer(&mut self, stream: u32, content: &[u8]) {
        self.say(frame::HEADERS, frame::END_HEADERS, stream, OK).await;
        self.say(frame::DATA, 0, stream, &framed(content)).await;
        self.say(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, stream, DONE).await;
    }
}

fn framed(content: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

/// A connection with these settings of the agent's, through a pipe that holds so many bytes.
async fn connected(settings: &[(u16, u32)], room: usize) -> (Connection, Agent) {
    let (near, far) = tokio::io::duplex(room);
    let head = Head::new(&"tcp://agent:1".parse().unwrap(), Some("token"), false).unwrap();
    let mut agent = Agent { socket: far };
    let settings: Vec<u8> = settings
        .iter()
        .flat_map(|(name, value)| [&name.to_be_bytes()[..], &value.to_be_bytes()].concat())
        .collect();
    let greeting = async {
        let mut preface = [0; frame::PREFACE.len()];
        agent.socket.read_exact(&mut preface).await.unwrap();
        assert_eq!(&preface, frame::PREFACE);
        agent.expect(frame::SETTINGS).await;
        agent.say(frame::SETTINGS, 0, 0, &settings).await;
    };
    let (connection, ()) =
        tokio::join!(Connection::open(Box::new(near), Arc::new(head), Arc::default()), greeting);
    (connection.unwrap(), agent)
}

fn call(connection: &Connection, message: &[u8]) -> JoinHandle<Result<Bytes, Status>> {
    let connection = connection.clone();
    let pieces = vec![Bytes::from(framed(message))];
    tokio::spawn(async move { connection.call("/service/Method", OPTIONS, pieces).await })
}

fn reach(outcome: Result<Bytes, Status>) -> Reach {
    Failure::behind(&outcome.expect_err("it failed")).expect("below gRPC").reach
}

#[tokio::test]
async fn a_call_is_heard_and_answered_however_little_goes_at_once() {
    for room in [1, 7, 100, 1 << 20] {
        let (connection, mut agent) = connected(&[], room).await;
        for length in [0, 1, 5000, 40_000] {
            let call = call(&connection, &vec![1; length]);
            let (stream, content) = agent.request().await;
            assert!(content == framed(&vec![1; length]));
            agent.answer(stream, &vec![2; length]).await;
            assert!(call.await.unwrap().unwrap() == vec![2; length], "{length} through {room}");
        }
    }
}

#[tokio::test]
async fn who_stays_awake_for_a_reply_lets_others_work_meanwhile() {
    let (connection, mut agent) = connected(&[], 1 << 16).await;
    // Longer than the agent takes, and less long.
    for awake in [Duration::from_secs(60), Duration::from_micros(1)] {
        let options = Options { awake: Awake::For(awake), ..OPTIONS };
        let pieces = vec![Bytes::from(framed(b"question"))];
        let answering = async {
            let (stream, content) = agent.request().await;
            assert!(content == framed(b"question"));
            agent.answer(stream, b"answer").await;
        };
        let (answer, ()) = tokio::join!(connection.call("/service/Method", options, pieces), answering);
        assert_eq!(answer.unwrap(), &b"answer"[..]);
    }
}

/// What a call does without anything that wakes it, from its first pause on until an agent that waits for that answers.
async fn polls_without_a_reason(connection: &Connection, agent: &mut Agent, enough: usize) -> usize {
    let (polls, is_enough) = (AtomicUsize::new(0), Notify::new());
    let mut call = pin!(connection.call("/service/Method", OPTIONS, vec![Bytes::from(framed(b"question"))]));
    let counting = poll_fn(|context| {
        if polls.fetch_add(1, Ordering::Relaxed) + 1 == enough {
            is_enough.notify_one();
        }
        call.as_mut().poll(context)
    });
    let answering = async {
        let (stream, _) = agent.request().await;
        let _ = timeout(PATIENCE, is_enough.notified()).await;
        agent.answer(stream, b"answer").await;
    };
    let (answer, ()) = tokio::join!(counting, answering);
    assert_eq!(answer.unwrap(), &b"answer"[..]);
    polls.into_inner()
}

#[tokio::test]
async fn who_knows_when_an_answer_comes_is_awake_for_it() {
    let (connection, mut agent) = connected(&[], 1 << 16).await;
    // One that is woken when there is something: at the beginning, and for three frames.
    let few = polls_without_a_reason(&connection, &mut agent, 100).await;
    assert!(few < 20, "{few}");
    // On a busy machine it may wake too late, but not always.
    let mut is_awake = false;
    for _ in 0..20 {
        connection.foresee(OPTIONS.kind, PATIENCE / 2);
        is_awake |= polls_without_a_reason(&connection, &mut agent, 100).await >= 100;
        if is_awake {
            break;
        }
    }
    assert!(is_awake);
    // Among several calls nobody is.
    let another = call(&connection, b"another");
    let (stream, _) = agent.request().await;
    connection.foresee(OPTIONS.kind, PATIENCE / 2);
    assert!(polls_without_a_reason(&connection, &mut agent, 100).await < 20);
    agent.answer(stream, b"answer").await;
    another.await.unwrap().unwrap();
    // The answer comes long before, or only when nobody is awake any more.
    for took in [Duration::from_secs(60), PATIENCE / 8] {
        connection.foresee(OPTIONS.kind, took);
        polls_without_a_reason(&connection, &mut agent, usize::MAX).await;
    }
}

#[tokio::test]
async fn an_agent_is_told_of_a_call_before_it_comes_if_it_has_none() {
    let (connection, mut agent) = connected(&[], 1 << 16).await;
    connection.alert();
    agent.expect(frame::ALERT).await;
    let first = call(&connection, b"first");
    let (stream, _) = agent.request().await;
    connection.alert();
    agent.answer(stream, b"answer").await;
    first.await.unwrap().unwrap();
    // The next frame is another call's.
    let _second = call(&connection, b"second");
    let mut header = [0; frame::HEADER_BYTES];
    agent.socket.read_exact(&mut header).await.unwrap();
    assert_eq!(Header::decode(&header).kind, frame::HEADERS);
}

#[tokio::test]
async fn a_head_says_where_to_what_and_how_long() {
    let (connection, mut agent) = connected(&[], 1 << 16).await;
    let _call = call(&connection, b"");
    let (_, block) = agent.expect(frame::HEADERS).await;
    let mut headers = vaccel_guest::hpack::Headers::new(&block);
    let mut said = Vec::new();
    while let Some((name, value)) = headers.next().unwrap() {
        let text =
            |value: vaccel_guest::hpack::Value<'_>| String::from_utf8(value.bytes().collect()).unwrap();
        said.push(format!("{}={}", text(name), text(value)));
    }
    let agent = concat!("user-agent=vaccel-client/", env!("CARGO_PKG_VERSION"));
    assert_eq!(
        said,
        [
            ":method=POST",
            ":scheme=http",
            ":path=/service/Method",
            ":authority=agent:1",
            "content-type=application/grpc",
            "te=trailers",
            agent,
            "grpc-timeout=60000000u",
            "authorization=Bearer token",
        ]
    );
}

#[tokio::test]
async fn calls_share_a_connection_and_are_answered_in_any_order() {
    let (connection, mut agent) = connected(&[], 1 << 20).await;
    let calls: Vec<_> = (0..50_u8).map(|number| call(&connection, &[number; 100])).collect();
    let mut heard = Vec::new();
    for _ in &calls {
        heard.push(agent.request().await);
    }
    for (stream, content) in heard.into_iter().rev() {
        agent.answer(stream, &content[5..]).await;
    }
    for (number, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.unwrap().unwrap(), vec![u8::try_from(number).unwrap(); 100]);
    }
    assert_eq!(connection.load(), (0, 0));
}

#[tokio::test]
async fn a_call_that_is_not_polled_holds_up_no_other() {
    let (connection, mut agent) = connected(&[], 1 << 20).await;
    let mut lazy = Box::pin(connection.call("/service/Method", OPTIONS, vec![framed(b"lazy").into()]));
    // Alone, it works on the connection itself; from here on nobody polls it.
    assert!(lazy.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    let (first, _) = agent.request().await;
    let other = call(&connection, b"other");
    let (second, _) = agent.request().await;
    agent.answer(first, b"1").await;
    agent.answer(second, b"2").await;
    assert_eq!(other.await.unwrap().unwrap(), &b"2"[..]);
    assert_eq!(lazy.await.unwrap(), &b"1"[..]);
}

#[tokio::test]
async fn requests_wait_for_windows_and_take_frames_of_the_agents_size() {
    let settings = [(frame::INITIAL_WINDOW_SIZE, 1000), (frame::MAX_FRAME_SIZE, 20_000)];
    let (connection, mut agent) = connected(&settings, 1 << 20).await;
    let call = call(&connection, &[1; 70_000]);
    let (_, first) = agent.expect(frame::DATA).await;
    assert_eq!(first.len(), 1000);
    agent.say(frame::WINDOW_UPDATE, 0, 1, &50_000_u32.to_be_bytes()).await;
    let mut lengths = Vec::new();
    for _ in 0..3 {
        lengths.push(agent.expect(frame::DATA).await.1.len());
    }
    assert_eq!(lengths, [20_000, 20_000, 10_000]);
    // More for streams by the settings, and for all together.
    agent.say(frame::SETTINGS, 0, 0, &[&[0, 4][..], &100_000_u32.to_be_bytes()].concat()).await;
    let (_, more) = agent.expect(frame::DATA).await;
    assert_eq!(more.len(), 65_535 - 51_000);
    agent.say(frame::WINDOW_UPDATE, 0, 0, &100_000_u32.to_be_bytes()).await;
    let (last, rest) = agent.expect(frame::DATA).await;
    assert_eq!(rest.len(), 70_005 - 65_535);
    assert!(last.has(frame::END_STREAM));
    agent.answer(1, b"yes").await;
    assert_eq!(call.await.unwrap().unwrap(), &b"yes"[..]);
}

#[tokio::test]
async fn answers_that_are_none_say_what_is_wrong_and_cost_only_their_call() {
    const END: u8 = frame::END_HEADERS | frame::END_STREAM;
    let message = &framed(b"message");
    let two = &[framed(b"one"), framed(b"two")].concat();
    type Frame<'a> = (u8, u8, &'a [u8]);
    let cases: [(&[Frame<'_>], Code, &str); 11] = [
        (&[(frame::HEADERS, END, &[OK, FAILED].concat())], Code::NotFound, "gone"),
        (&[(frame::HEADERS, 4, OK), (frame::HEADERS, END, FAILED)], Code::NotFound, "gone"),
        (&[(frame::HEADERS, 4, OK), (frame::HEADERS, END, DONE)], Code::Internal, "has no message"),
        (&[(frame::HEADERS, END, OK)], Code::Internal, "without a status"),
        (&[(frame::HEADERS, 4, OK), (frame::DATA, 1, message)], Code::Internal, "without a status"),
        (&[(frame::HEADERS, 4, OK), (frame::DATA, 0, two)], Code::Internal, "more than one"),
        (
            &[(frame::HEADERS, 4, OK), (frame::DATA, 0, &message[..8]), (frame::HEADERS, END, DONE)],
            Code::Internal,
            "ends in the middle",
        ),
        (
            &[(frame::HEADERS, 4, OK), (frame::DATA, 0, &[1, 0, 0, 0, 0]), (frame::HEADERS, END, DONE)],
            Code::Internal,
            "compressed",
        ),
        (
            &[(frame::HEADERS, 4, OK), (frame::DATA, 0, &[0, 0xff, 0, 0, 0])],
            Code::ResourceExhausted,
            "at most",
        ),
        (&[(frame::DATA, 0, message)], Code::Internal, "no beginning"),
        // A proxy's 503.
        (&[(frame::HEADERS, 4, b"\x08\x03503")], Code::Unavailable, "503"),
    ];
    let (connection, mut agent) = connected(&[], 1 << 20).await;
    for (frames, code, text) in cases {
        let failed = call(&connection, b"request");
        let (stream, _) = agent.request().await;
        for (kind, flags, content) in frames {
            agent.say(*kind, *flags, stream, content).await;
        }
        let status = failed.await.unwrap().expect_err(text);
        assert_eq!((status.code(), status.message().contains(text)), (code, true), "{text}: {status}");
    }
    let fine = call(&connection, b"request");
    let (stream, _) = agent.request().await;
    agent.answer(stream, b"fine").await;
    assert_eq!(fine.await.unwrap().unwrap(), &b"fine"[..]);
}

#[tokio::test]
async fn headers_come_in_pieces_with_padding_and_information_before_them() {
    let (connection, mut agent) = connected(&[], 1 << 20).await;
    let call = call(&connection, b"request");
    let (stream, _) = agent.request().await;
    // 103, which announces; a head with padding and priority in two frames; content with padding.
    agent.say(frame::HEADERS, frame::END_HEADERS, stream, b"\x08\x03103").await;
    let head = [&[2][..], &[0; 5], OK, &[0; 2]].concat();
    agent.say(frame::HEADERS, frame::PADDED | frame::PRIORITY, stream, &head).await;
    agent.say(frame::CONTINUATION, frame::END_HEADERS, stream, &[]).await;
    let content = [&[3][..], &framed(b"reply"), &[0; 3]].concat();
    agent.say(frame::DATA, frame::PADDED, stream, &content).await;
    agent.say(frame::DATA, 0, stream, &[]).await;
    agent.say(frame::HEADERS, frame::END_STREAM, stream, &DONE[..5]).await;
    agent.say(frame::CONTINUATION, frame::END_HEADERS, stream, &DONE[5..]).await;
    assert_eq!(call.await.unwrap().unwrap(), &b"reply"[..]);
}

#[tokio::test]
async fn who_breaks_the_rules_is_told_so_and_the_call_may_have_run() {
    let long = vec![0; frame::FRAME_BYTES_DEFAULT + 1];
    let cases: [(u8, u8, u32, &[u8]); 12] = [
        (frame::DATA, 0, 0, &[]),
        (frame::DATA, 0, 9, &[]),
        (frame::DATA, frame::PADDED, 1, &[5]),
        (frame::HEADERS, frame::END_HEADERS, 9, OK),
        (frame::HEADERS, frame::END_HEADERS, 1, &[0xff]),
        (frame::CONTINUATION, frame::END_HEADERS, 1, OK),
        (frame::HEADERS, frame::END_HEADERS, 1, &long),
        (frame::PUSH_PROMISE, frame::END_HEADERS, 1, &[0; 4]),
        (frame::SETTINGS, 0, 0, &[0; 5]),
        (frame::SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1]),
        (frame::WINDOW_UPDATE, 0, 0, &[0; 4]),
        (frame::PING, 0, 0, &[0; 7]),
    ];
    for (kind, flags, stream, content) in cases {
        let (connection, mut agent) = connected(&[], 1 << 20).await;
        let call = call(&connection, b"request");
        agent.request().await;
        agent.say(kind, flags, stream, content).await;
        assert_eq!(reach(call.await.unwrap()), Reach::Sent, "{kind} {content:?}");
        let (_, goodbye) = agent.expect(frame::GOAWAY).await;
        assert_eq!(goodbye[4..], frame::PROTOCOL_ERROR.to_be_bytes());
        assert!(connection.is_closed());
    }
}

#[tokio::test]
async fn whether_a_call_can_have_run_is_known() {
    // Closed under it.
    let (connection, mut agent) = connected(&[], 1 << 20).await;
    let running = call(&connection, b"request");
    agent.request().await;
    drop(agent);
    assert_eq!(reach(running.await.unwrap()), Reach::Sent);
    assert_eq!(reach(call(&connection, b"").await.unwrap()), Reach::Unsent);

    // Refused by itself, refused with all after the last one taken; the one before that is answered.
    let (connection, mut agent) = connected(&[], 1 << 20).await;
    let refused = call(&connection, b"request");
    let (stream, _) = agent.request().await;
    agent.say(frame::RST_STREAM, 0, stream, &frame::REFUSED_STREAM.to_be_bytes()).await;
    assert_eq!(reach(refused.await.unwrap()), Reach::Unsent);
    let broken_off = call(&connection, b"request");
    let (stream, _) = agent.request().await;
    agent.say(frame::RST_STREAM, 0, stream, &frame::INTERNAL_ERROR.to_be_bytes()).await;
    assert_eq!(reach(broken_off.await.unwrap()), Reach::Sent);
    let taken = call(&connection, b"taken");
    let (stream, _) = agent.request().await;
    let late = call(&connection, b"late");
    agent.request().await;
    agent.say(frame::GOAWAY, 0, 0, &[stream.to_be_bytes(), [0; 4]].concat()).await;
    assert_eq!(reach(late.await.unwrap()), Reach::Unsent);
    assert!(connection.is_closed());
    agent.answer(stream, b"still").await;
    assert_eq!(taken.await.unwrap().unwrap(), &b"still"[..]);
    assert_eq!(reach(call(&connection, b"").await.unwrap()), Reach::Unsent);
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_is_taken_back() {
    let (connection, mut agent) = connected(&[(frame::INITIAL_WINDOW_SIZE, 10)], 1 << 20).await;
    let given_up = call(&connection, &[1; 100]);
    let (header, _) = agent.expect(frame::DATA).await;
    given_up.abort();
    let (reset, code) = agent.expect(frame::RST_STREAM).await;
    assert_eq!((reset.stream, &code[..]), (header.stream, &frame::CANCEL.to_be_bytes()[..]));
    // What still comes for it is passed over.
    agent.answer(header.stream, b"late").await;
    let next = call(&connection, &[1; 100]);
    let (head, _) = agent.expect(frame::HEADERS).await;
    agent.answer(head.stream, b"early").await;
    assert_eq!(next.await.unwrap().unwrap(), &b"early"[..]);
    // It had its answer before its request was all there.
    let (reset, code) = agent.expect(frame::RST_STREAM).await;
    assert_eq!((reset.stream, &code[..]), (head.stream, &frame::NO_ERROR.to_be_bytes()[..]));
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_answers_pings_and_one_that_vanished_is_given_up() {
    let (connection, mut agent) = connected(&[], 1 << 16).await;
    let first = call(&connection, b"");
    let (stream, _) = agent.request().await;
    agent.answer(stream, b"").await;
    first.await.unwrap().unwrap();
    agent.say(frame::PING, 0, 0, b"12345678").await;
    let (pong, content) = agent.expect(frame::PING).await;
    assert!(pong.has(frame::ACK) && content == b"12345678");
    // It asks by itself after a while, and the answer counts.
    let (ping, content) = agent.expect(frame::PING).await;
    assert!(!ping.has(frame::ACK));
    agent.say(frame::PING, frame::ACK, 0, &content).await;
    agent.expect(frame::PING).await;
    let waiting = call(&connection, b"");
    agent.request().await;
    let refusal = waiting.await.unwrap();
    assert!(refusal.as_ref().unwrap_err().message().contains("vanished"), "{refusal:?}");
    assert!(connection.is_closed());
    assert!(agent.hear().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_nobody_uses_is_closed() {
    let (connection, mut agent) = connected(&[], 1 << 16).await;
    let long = call(&connection, b"long");
    let (stream, _) = agent.request().await;
    // Whoever waits uses it, however long.
    for _ in 0..5 {
        let (ping, content) = agent.expect(frame::PING).await;
        assert!(!ping.has(frame::ACK));
        agent.say(frame::PING, frame::ACK, 0, &content).await;
    }
    agent.answer(stream, b"at last").await;
    assert_eq!(long.await.unwrap().unwrap(), &b"at last"[..]);
    while let Some((header, content)) = agent.hear().await {
        assert_eq!(header.kind, frame::PING);
        agent.say(frame::PING, frame::ACK, 0, &content).await;
    }
    assert!(connection.is_closed());
    assert_eq!(reach(call(&connection, b"").await.unwrap()), Reach::Unsent);
}

#[tokio::test]
async fn a_connection_is_closed_when_nobody_has_it() {
    let (connection, mut agent) = connected(&[], 1 << 16).await;
    agent.expect(frame::SETTINGS).await;
    drop(connection);
    assert!(agent.hear().await.is_none());
}

#[tokio::test]
async fn what_is_no_agent_is_found_out_at_once() {
    for (greeting, why) in [(&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "as HTTP/2"), (b"", "closed")] {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        far.write_all(greeting).await.unwrap();
        far.shutdown().await.unwrap();
        let head = Head::new(&"tcp://agent:1".parse().unwrap(), None, false).unwrap();
        let refusal = Connection::open(Box::new(near), Arc::new(head), Arc::default()).await.expect_err(why);
        assert!(refusal.contains(why), "{refusal}");
    }
}

#[tokio::test]
async fn padding_behind_a_part_of_a_message_is_passed_over() {
    let (connection, mut agent) = connected(&[], 1 << 20).await;
    let call = call(&connection, b"request");
    let (stream, _) = agent.request().await;
    let reply = framed(&vec![7; 200_000]);
    let (first, rest) = reply.split_at(100_000);
    agent.say(frame::HEADERS, frame::END_HEADERS, stream, OK).await;
    agent.say(frame::DATA, frame::PADDED, stream, &[&[100], first, &[0; 100]].concat()).await;
    agent.say(frame::DATA, 0, stream, rest).await;
    agent.say(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, stream, DONE).await;
    assert_eq!(call.await.unwrap().unwrap().len(), 200_000);
}

#[tokio::test]
async fn an_agent_that_dies_while_much_is_to_be_written_is_noticed() {
    const CALLS: usize = 300;
    let (connection, agent) = connected(&[], 1 << 12).await;
    let calls: Vec<_> = (0..CALLS).map(|_| call(&connection, &[1; 900])).collect();
    while connection.load().1 < CALLS {
        tokio::task::yield_now().await;
    }
    drop(agent);
    for call in calls {
        let ended = timeout(KEEP_ALIVE / 2, call).await;
        ended.expect("long before it is asked whether it is there").unwrap().unwrap_err();
    }
}
