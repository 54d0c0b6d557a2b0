//! The agent's side: a strict HTTP/2 server that counts windows and refuses what a client must not do, and an agent on
//! it that answers everything unless a test's script does.

use std::collections::{HashMap, VecDeque};

use prost::Message;
use prost::bytes::Bytes;
use vaccel_guest::Fault;
use vaccel_proto::v1::{self, RunReply, RunRequest, run_reply::Outcome, run_request::Op};

use crate::frames::{self, Frame};
use crate::transport::Item;

/// What happens to a server.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A guest dials; [`Peer::dial`] may refuse it.
    Dial,
    /// A frame that is none of a call is there.
    Frame,
    /// A call's headers are there.
    Head(&'a Call),
    /// A piece of its message is there.
    Data(&'a Call),
    /// The call is whole.
    Asked(&'a Call),
}

/// A call as it came.
#[derive(Clone, Debug, Default)]
pub struct Call {
    pub stream: u32,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub whole: bool,
}

impl Call {
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    pub fn path(&self) -> &str {
        self.header(":path")
    }

    pub fn is(&self, method: &str) -> bool {
        self.path().ends_with(method)
    }

    /// The messages in it.
    pub fn messages(&self) -> Vec<&[u8]> {
        let (mut messages, mut rest) = (Vec::new(), &self.body[..]);
        while let Some([compressed, length @ ..]) =
            rest.split_off(..5).map(|head| *head.first_chunk::<5>().unwrap())
        {
            assert_eq!(compressed, 0);
            messages.push(rest.split_off(..u32::from_be_bytes(length) as usize).expect("a whole message"));
        }
        assert!(rest.is_empty(), "a cut prefix");
        messages
    }

    pub fn message<M: Message + Default>(&self) -> M {
        let messages = self.messages();
        let [message] = messages[..] else { panic!("one message, not {}", messages.len()) };
        M::decode(message).unwrap()
    }
}

/// What a test has a server do; whether it did something, or the server's own way is wanted.
pub type Script = Box<dyn FnMut(&mut Peer, Event<'_>) -> bool>;

/// The server, and the one connection to it.
pub struct Peer {
    pub now: u64,
    /// Set by a script on [`Event::Dial`]: the guest gets no connection.
    pub dial: Option<Fault>,
    /// Connections that were asked for, and when.
    pub dials: Vec<u64>,
    pub connected: bool,
    pub items: VecDeque<(u64, Item)>,
    /// Milliseconds that what is sent from now on takes.
    pub delay: u64,
    pub writable_from: u64,
    pub write_fails: Option<i32>,
    /// Windows are given back only by the script.
    pub holds_windows: bool,
    /// Paths of calls, all connections together.
    pub asked: Vec<String>,
    /// Frames that came on this connection, of long ones the beginning.
    pub frames: Vec<Frame>,
    /// Streams and lengths of its DATA frames.
    pub sizes: Vec<(u32, usize)>,
    script: Option<Script>,
    input: Vec<u8>,
    greeted: bool,
    /// The guest's first frame was its settings.
    introduced: bool,
    calls: HashMap<u32, Call>,
    /// What the guest may still send, all calls together.
    pub window: i64,
    /// Of each stream, without what every stream begins with.
    windows: HashMap<u32, i64>,
    /// Settings the guest has answered last, which hold until it answers the next: the first window and the longest
    /// frame.
    settings: VecDeque<(i64, usize)>,
    /// What this side may still send.
    pub own_window: i64,
}

/// What holds before any settings.
const SETTINGS: [(i64, usize); 1] = [(65_535, 16_384)];

pub const SESSION: &str = "0123456789abcdef0123456789abcdef";
pub const MODEL: &str = "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccdddddddddddddddd";

impl Peer {
    pub fn new(script: impl FnMut(&mut Self, Event<'_>) -> bool + 'static) -> Self {
        Self {
            now: 1_000_000,
            dial: None,
            dials: Vec::new(),
            connected: false,
            items: VecDeque::new(),
            delay: 0,
            writable_from: 0,
            write_fails: None,
            holds_windows: false,
            asked: Vec::new(),
            frames: Vec::new(),
            sizes: Vec::new(),
            script: Some(Box::new(script)),
            input: Vec::new(),
            greeted: false,
            introduced: false,
            calls: HashMap::new(),
            window: 65_535,
            windows: HashMap::new(),
            settings: SETTINGS.into(),
            own_window: 65_535,
        }
    }

    pub fn dialed(&mut self) {
        assert!(self.input.is_empty() || !self.connected, "the guest closed in the middle of a frame");
        self.dials.push(self.now);
        (self.items, self.delay, self.write_fails) = (VecDeque::new(), 0, None);
        (self.input, self.calls) = (Vec::new(), HashMap::new());
        (self.greeted, self.introduced) = (false, false);
        (self.window, self.own_window) = (65_535, 65_535);
        (self.windows, self.settings) = (HashMap::new(), SETTINGS.into());
        self.frames.clear();
        self.sizes.clear();
    }

    pub fn happen(&mut self, event: Event<'_>) {
        let mut script = self.script.take().expect("no event inside of another");
        let done = script(self, event);
        self.script = Some(script);
        if !done {
            self.answer(event);
        }
    }

    /// Sends a frame, as the rules have it.
    pub fn send(&mut self, frame: Frame) {
        match frame.kind {
            frames::SETTINGS if !frame.is(frames::SETTINGS, frames::ACK) => {
                let (mut window, mut length) = *self.settings.back().unwrap();
                for (setting, value) in frame.settings() {
                    match setting {
                        frames::INITIAL_WINDOW_SIZE => window = i64::from(value),
                        frames::MAX_FRAME_SIZE => length = value as usize,
                        _ => {}
                    }
                }
                self.settings.push_back((window, length));
            }
            frames::WINDOW_UPDATE if frame.stream == 0 => self.window += i64::from(frame.number()),
            frames::WINDOW_UPDATE => {
                *self.windows.entry(frame.stream).or_default() += i64::from(frame.number());
            }
            frames::DATA => {
                self.own_window -= frame.payload.len() as i64;
                assert!(self.own_window >= 0, "the guest gives no window back");
            }
            _ => {}
        }
        self.raw(frame.encode());
    }

    /// Sends bytes that nobody looks at.
    pub fn raw(&mut self, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        if !bytes.is_empty() {
            self.items.push_back((self.now + self.delay, Item::Bytes(bytes.into(), 0)));
        }
    }

    pub fn end(&mut self, errno: i32) {
        self.items.push_back((self.now + self.delay, Item::End(errno)));
    }

    /// Replies with a message.
    pub fn reply(&mut self, stream: u32, message: &impl Message) {
        self.reply_bytes(stream, &prefixed(&message.encode_to_vec()));
    }

    pub fn reply_bytes(&mut self, stream: u32, body: &[u8]) {
        self.send(frames::headers(stream, frames::REPLY));
        body.chunks(16_384).for_each(|piece| self.send(frames::data(stream, piece)));
        self.send(frames::trailers(stream, frames::OK));
    }

    /// Replies with an error of the contract.
    pub fn refuse(&mut self, stream: u32, error: &vaccel_proto::Error) {
        let headers = error.to_status().into_http::<()>().into_parts().0.headers;
        let headers = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap()));
        let headers: Vec<_> = [(":status", "200")].into_iter().chain(headers).collect();
        self.send(frames::trailers(stream, &headers));
    }

    /// Bytes of the guest.
    pub fn take(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        let mut at = 0;
        if !self.greeted {
            let Some(preface) = self.input.get(..frames::PREFACE.len()) else { return };
            assert_eq!(preface, frames::PREFACE);
            (self.greeted, at) = (true, preface.len());
        }
        while let Some((frame, length)) = Frame::parse(&self.input[at..]) {
            at += length;
            self.frames
                .push(Frame { payload: frame.payload[..frame.payload.len().min(64)].to_vec(), ..frame });
            self.introduced |= frame.kind == frames::SETTINGS;
            assert!(self.introduced, "the first frame");
            self.frame(&frame);
        }
        self.input.drain(..at);
    }

    fn frame(&mut self, frame: &Frame) {
        let (_, longest) = self.settings[0];
        assert!(frame.payload.len() <= longest, "a frame of {} bytes", frame.payload.len());
        match frame.kind {
            frames::HEADERS => {
                assert!(frame.stream % 2 == 1 && self.calls.keys().all(|stream| *stream < frame.stream));
                assert_eq!(frame.flags, frames::END_HEADERS);
                let headers = frames::read_block(&frame.payload);
                let call = Call { stream: frame.stream, headers, ..Call::default() };
                self.asked.push(call.path().to_owned());
                self.calls.insert(frame.stream, call.clone());
                self.happen(Event::Head(&call));
            }
            frames::DATA => self.data(frame),
            frames::RST_STREAM => {
                assert!(self.calls.contains_key(&frame.stream), "RST_STREAM of what never was");
                self.calls.get_mut(&frame.stream).unwrap().whole = true;
                self.happen(Event::Frame);
            }
            frames::SETTINGS => {
                if frame.is(frames::SETTINGS, frames::ACK) {
                    assert!(self.settings.len() > 1, "an answer to nothing");
                    self.settings.pop_front();
                } else {
                    self.raw(Frame::new(frames::SETTINGS, frames::ACK, 0, []).encode());
                }
                self.happen(Event::Frame);
            }
            frames::PING => {
                assert_eq!(frame.flags, frames::ACK, "the guest has nothing to ask");
                self.happen(Event::Frame);
            }
            frames::WINDOW_UPDATE => {
                assert_eq!(frame.stream, 0);
                self.own_window += i64::from(frame.number());
                assert!(frame.number() > 0 && self.own_window <= 0x7fff_ffff, "a window that cannot be");
                self.happen(Event::Frame);
            }
            frames::ALERT => {
                assert!(frame.stream == 0 && frame.payload.is_empty());
                self.happen(Event::Frame);
            }
            kind => panic!("the guest sends no frame of kind {kind}"),
        }
    }

    fn data(&mut self, frame: &Frame) {
        let length = frame.payload.len() as i64;
        self.sizes.push((frame.stream, frame.payload.len()));
        self.window -= length;
        let window = self.windows.entry(frame.stream).or_default();
        *window -= length;
        let (first, _) = self.settings[0];
        let fits = *window + first >= 0 && self.window >= 0;
        assert!(length == 0 || fits, "more DATA than the windows hold");
        let mut call = self.calls.remove(&frame.stream).expect("DATA of no call");
        assert!(!call.whole, "DATA after the end");
        call.body.extend_from_slice(&frame.payload);
        call.whole = frame.is(frames::DATA, frames::END_STREAM);
        if !self.holds_windows {
            self.send(frames::window_update(0, length as u32));
            if !call.whole {
                self.send(frames::window_update(frame.stream, length as u32));
            }
        }
        let seen = std::mem::take(&mut call.body);
        self.calls.insert(frame.stream, call.clone());
        call.body = seen;
        match call.whole {
            true => self.happen(Event::Asked(&call)),
            false => self.happen(Event::Data(&call)),
        }
        self.calls.get_mut(&frame.stream).unwrap().body = call.body;
    }

    /// Frames of a kind that came on this connection.
    pub fn came(&self, kind: u8, flag: u8) -> Vec<&Frame> {
        self.frames.iter().filter(|frame| frame.is(kind, flag)).collect()
    }

    /// The agent's own way.
    pub fn answer(&mut self, event: Event<'_>) {
        match event {
            Event::Dial => self.send(frames::settings(&[])),
            Event::Asked(call) => self.serve(call),
            _ => {}
        }
    }

    fn serve(&mut self, call: &Call) {
        let stream = call.stream;
        match call.path() {
            "/vaccel.v1.Sessions/Open" => {
                self.reply(stream, &v1::OpenSessionReply { session: SESSION.into(), lease_ms: 1000 });
            }
            "/vaccel.v1.Sessions/Renew" => self.reply(stream, &v1::RenewSessionReply { lease_ms: 1000 }),
            "/vaccel.v1.Sessions/Close" => self.reply(stream, &v1::CloseSessionReply {}),
            "/vaccel.v1.Agent/Info" => {
                self.reply(stream, &v1::InfoReply { version: "1".into(), ..Default::default() })
            }
            "/vaccel.v1.Resources/Register" => {
                self.reply(stream, &v1::RegisterResourceReply { resource: MODEL.into(), missing: vec![] });
            }
            "/vaccel.v1.Resources/Unregister" => self.reply(stream, &v1::UnregisterResourceReply {}),
            "/vaccel.v1.Operations/Run" => self.reply(stream, &run(call.message())),
            path => panic!("nobody serves {path}"),
        }
    }
}

pub fn prefixed(message: &[u8]) -> Vec<u8> {
    [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat()
}

pub fn timings() -> v1::Timings {
    v1::Timings { queue_us: 1, run_us: 2, batch_size: 3 }
}

/// What an operation replies: models give back what they were given.
pub fn run(request: RunRequest) -> RunReply {
    assert_eq!(request.session, SESSION);
    let outcome = match request.op.unwrap() {
        Op::Noop(_) => Outcome::Noop(v1::NoopReply {}),
        Op::ImageClassification(request) => {
            let label = |index| v1::Label { index, name: format!("class {index}"), probability: 0.25 };
            let one = |_: &Bytes| v1::Classification { labels: (0..request.top_k).map(label).collect() };
            let classifications = request.images.iter().map(one).collect();
            Outcome::ImageClassification(v1::ImageClassificationReply { classifications })
        }
        Op::ImageDetection(request) => {
            let thing = |index: u32| v1::Detection {
                label: Some(v1::Label {
                    index,
                    name: format!("class {index}"),
                    probability: request.threshold,
                }),
                area: Some(v1::Area { left: index as f32, top: -0.5, right: 1e9, bottom: 4.0 }),
            };
            let detections = (0..request.at_most).map(thing).collect();
            let more = v1::ImageDetectionReply { image_name: "name".into(), ..Default::default() };
            Outcome::ImageDetection(v1::ImageDetectionReply { detections, picture: request.image, ..more })
        }
        Op::ModelRun(request) => Outcome::ModelRun(v1::ModelRunReply { outputs: request.inputs }),
        other => panic!("nothing here asks for {other:?}"),
    };
    RunReply { timings: Some(timings()), outcome: Some(outcome), ..RunReply::default() }
}
