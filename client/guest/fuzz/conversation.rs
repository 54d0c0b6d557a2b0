//! A conversation of a guest with an agent that says what some bytes make it say: anything, in any cuts. The test
//! `fake` holds some thousands of them, `run` beside this file as many as there is time for.

use vaccel_guest::{
    DType, Fault, File, Guest, Input, Label, NoMemory, Output, Ready, ResourceKind, Transport,
};

/// What the bytes of a conversation are read as.
struct Script<'a> {
    rest: &'a [u8],
    /// The guest's call that is answered, from 1.
    call: u32,
}

impl<'a> Script<'a> {
    fn byte(&mut self) -> u8 {
        self.rest.split_off_first().copied().unwrap_or(0)
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let count = usize::from(self.byte()).min(most).min(self.rest.len());
        self.rest.split_off(..count).unwrap_or_default()
    }

    fn number(&mut self) -> u32 {
        // Small numbers, and those at the edges, more often than others.
        let byte = u32::from(self.byte());
        match self.byte() & 7 {
            0..=2 => byte,
            3 => byte << 24 | 0xff_ffff,
            4 => 0x7fff_ffff - byte,
            5 => 65_535 + byte - 128,
            6 => byte << 12,
            _ => u32::from_be_bytes([byte as u8, self.byte(), self.byte(), self.byte()]),
        }
    }

    fn stream(&mut self) -> u32 {
        match self.byte() {
            0..=0x9f => self.call * 2 - 1,
            byte @ 0xa0..=0xef => u32::from(byte & 7) * 2 + 1,
            byte => u32::from(byte & 3),
        }
    }
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let [_, length @ ..] = (payload.len() as u32).to_be_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// `:status: 200`, `content-type: application/grpc`; `grpc-status: 0`.
const REPLY: &[u8] = b"\x88\x0f\x10\x10application/grpc";
const OK: &[u8] = b"\0\x0bgrpc-status\x010";

fn reply(out: &mut Vec<u8>, stream: u32, message: &[u8], cut: usize) {
    let body = [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat();
    let (first, second) = body.split_at(cut.min(body.len()));
    frame(out, 1, 4, stream, REPLY);
    frame(out, 0, 0, stream, first);
    frame(out, 0, 0, stream, second);
    frame(out, 1, 5, stream, OK);
}

/// An error as an agent would send it, its details made of these bytes.
fn refuse(out: &mut Vec<u8>, stream: u32, code: u8, details: &[u8]) {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits =
        details.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect::<Vec<_>>();
    let digit = |bits: &[u8]| DIGITS[usize::from(bits.iter().fold(0, |all, bit| all << 1 | bit)) & 63];
    let details: Vec<u8> = bits.chunks(6).map(digit).take(120).collect();
    let mut block = b"\x88\0\x0bgrpc-status\x02".to_vec();
    block.extend_from_slice(&[b'0' + code / 10 % 10, b'0' + code % 10]);
    block.extend_from_slice(b"\0\x17grpc-status-details-bin");
    block.push(details.len() as u8);
    block.extend_from_slice(&details);
    frame(out, 1, 5, stream, &block);
}

/// A message whose lengths are right, of messages inside each other.
fn message(script: &mut Script<'_>, depth: u32) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..=script.byte() % 4 {
        let choice = script.byte();
        let field = match (choice >> 4, depth) {
            (number @ 0..=7, _) => u32::from(number % 5) + 1,
            (number, 0) => 16 + u32::from(number % 3),
            (number, _) => u32::from(number % 2) + 1,
        };
        let content = match choice & 7 {
            0..=3 if depth < 5 => message(script, depth + 1),
            0..=4 => script.bytes(70).to_vec(),
            5 => {
                out.extend_from_slice(&[(field << 3) as u8, script.byte() & 0x7f]);
                continue;
            }
            6 => vec![script.byte(); usize::from(script.byte()) * 3],
            _ => {
                out.extend_from_slice(&[(field << 3 | 5) as u8, 0, 0, 0, script.byte()]);
                continue;
            }
        };
        let tag = field << 3 | 2;
        if tag >= 128 {
            out.push(tag as u8 | 128);
        }
        out.push(if tag >= 128 { (tag >> 7) as u8 } else { tag as u8 });
        let length = content.len();
        out.extend((0..2).filter(|byte| length >> (7 * byte) > 0 || *byte == 0).map(|byte| {
            let more = length >> (7 * (byte + 1)) > 0;
            (length >> (7 * byte) & 0x7f) as u8 | u8::from(more) << 7
        }));
        out.extend_from_slice(&content);
        if out.len() > 4000 {
            break;
        }
    }
    out.truncate(8000);
    out
}

/// One thing the agent says.
fn say(script: &mut Script<'_>, out: &mut Vec<u8>) {
    let stream = script.stream();
    match script.byte() % 20 {
        0 => frame(out, 4, script.byte() & 1, 0, &[]),
        1 => frame(out, 1, script.byte() | 4, stream, REPLY),
        2 => frame(out, 0, script.byte() & 9, stream, script.bytes(255)),
        3 => frame(out, 1, 5, stream, OK),
        4 => refuse(out, stream, script.byte() % 20, script.bytes(90)),
        5 => frame(out, 6, script.byte() & 1, 0, &[script.byte(); 8]),
        6 => frame(out, 8, 0, if stream > 8 { 0 } else { stream }, &script.number().to_be_bytes()),
        7 => {
            let (setting, value) = (u16::from(script.byte() & 7), script.number());
            frame(out, 4, 0, 0, &[&setting.to_be_bytes()[..], &value.to_be_bytes()].concat());
        }
        8 => frame(out, 3, 0, stream, &script.number().to_be_bytes()),
        9 => frame(out, 7, 0, 0, &[&script.number().to_be_bytes()[..], &[0; 4]].concat()),
        10 => frame(out, 1, script.byte(), stream, script.bytes(255)),
        11 => frame(out, 9, script.byte() & 4, stream, script.bytes(255)),
        12 => frame(out, script.byte(), script.byte(), stream, script.bytes(255)),
        13 => out.extend_from_slice(script.bytes(255)),
        14 => {
            let zeros = script.number().min(70_000) as usize;
            frame(out, script.byte() % 12, script.byte(), stream, &vec![0; zeros]);
        }
        15 => {
            let cut = usize::from(script.byte());
            reply(out, stream, script.bytes(255), cut);
        }
        _ => {
            let cut = usize::from(script.byte());
            let message = message(script, 0);
            reply(out, stream, &message, cut);
        }
    }
}

/// The agent, and the network before it.
struct Agent {
    said: Vec<u8>,
    at: usize,
    /// Places in it, and how many calls must have come before what is behind them is said.
    gates: Vec<(usize, u32)>,
    calls: u32,
    now: u64,
    /// What decides how bytes are cut.
    cuts: u32,
    /// What happens when everything was said: silence, the end or a reset.
    end: u8,
    dials: u32,
    turns: u32,
    /// Of what the guest says: bytes of the preface and of the frame on their way.
    preface: usize,
    head: Vec<u8>,
    left: usize,
}

/// More than any conversation takes; the guest turns in a circle.
const TURNS_MAX: u32 = 1_000_000;

impl Agent {
    /// How much was said by now.
    fn ready(&self) -> usize {
        let closed = self.gates.iter().find(|(_, calls)| self.calls < *calls);
        closed.map_or(self.said.len(), |(at, _)| *at) - self.at
    }

    fn cut(&mut self, room: usize) -> usize {
        self.turns += 1;
        assert!(self.turns < TURNS_MAX, "the guest turns in a circle");
        self.cuts = self.cuts.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let most = match self.cuts >> 28 {
            0..=5 => room,
            6..=9 => 1,
            _ => (self.cuts >> 16 & 0xff) as usize,
        };
        most.min(room)
    }

    /// What the guest says has to be frames at least, whole ones before it closes or not.
    fn hear(&mut self, mut bytes: &[u8]) {
        const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        while let Some((byte, rest)) = bytes.split_first() {
            if self.preface < PREFACE.len() {
                assert_eq!(*byte, PREFACE[self.preface]);
                self.preface += 1;
                bytes = rest;
            } else if self.left > 0 {
                let now = self.left.min(bytes.len());
                (self.left, bytes) = (self.left - now, &bytes[now..]);
            } else {
                self.head.push(*byte);
                bytes = rest;
                if let [a, b, c, kind, ..] = self.head[..]
                    && self.head.len() == 9
                {
                    assert!(matches!(kind, 0 | 1 | 3 | 4 | 6 | 8), "a frame of kind {kind}");
                    self.left = u32::from_be_bytes([0, a, b, c]) as usize;
                    self.calls += u32::from(kind == 1);
                    self.head.clear();
                }
            }
        }
    }
}

impl Transport for Agent {
    type Memory = NoMemory;

    fn authority(&self) -> &str {
        "agent"
    }

    fn connect(&mut self, _until: u64) -> Result<(), Fault> {
        self.dials += 1;
        (self.preface, self.left) = (0, 0);
        self.head.clear();
        if self.dials > 6 { Err(Fault::Broken(111)) } else { Ok(()) }
    }

    fn write(&mut self, pieces: &[&[u8]]) -> Result<usize, Fault> {
        let count = self.cut(pieces.iter().map(|piece| piece.len()).sum());
        if count == 0 {
            return if self.cuts & 0xf00 == 0 { Err(Fault::Broken(32)) } else { Err(Fault::WouldBlock) };
        }
        let mut left = count;
        for piece in pieces {
            assert!(!piece.is_empty(), "an empty piece");
            let now = left.min(piece.len());
            self.hear(&piece[..now]);
            left -= now;
        }
        Ok(count)
    }

    fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        assert!(!second.is_empty(), "no place to read to");
        let left = self.ready();
        if left == 0 {
            return match self.end {
                _ if self.at < self.said.len() => Err(Fault::WouldBlock),
                0 => Err(Fault::WouldBlock),
                1 => Ok(0),
                errno => Err(Fault::Broken(i32::from(errno))),
            };
        }
        let count = self.cut(left.min(first.len() + second.len()));
        if count == 0 {
            return Err(Fault::WouldBlock);
        }
        let own = count.min(first.len());
        let (now, later) = self.said[self.at..self.at + count].split_at(own);
        first[..own].copy_from_slice(now);
        second[..count - own].copy_from_slice(later);
        self.at += count;
        Ok(count)
    }

    fn wait(&mut self, write: bool, until: u64) -> Result<Ready, Fault> {
        let read = self.ready() > 0 || (self.at == self.said.len() && self.end > 0);
        if !read && !write {
            self.now = self.now.max(until);
        }
        if self.now >= until && until > 0 {
            return Err(Fault::Late);
        }
        self.turns += 1;
        self.now += u64::from(until > 0 && self.turns.is_multiple_of(16));
        Ok(Ready { read, write })
    }

    fn pause(&mut self, until: u64) {
        self.now = self.now.max(until);
    }

    fn close(&mut self) {}

    fn now(&mut self) -> u64 {
        self.now
    }
}

const DEADLINE_MS: u32 = 500;

/// What lies around the caller's places, and has to lie there afterwards.
const CANARY: u8 = 0xa5;

/// Makes a call and looks at what it left; returns whether it was answered.
fn call(guest: &mut Guest<Agent>, which: u8) -> bool {
    let (mut place, mut tiny) = ([CANARY; 80], [CANARY; 4]);
    let mut labels = [Label::default(); 6];
    let model = guest.register(ResourceKind::Model, &[File { name: "m", content: &[7; 3000] }]);
    // Registering is several calls.
    let before = guest.transport().now;
    let answered = match (which % 8, model) {
        (0 | 1, Ok(model)) => {
            let data = [3; 2000];
            let input = |name| Input { name, dtype: DType::U8, shape: &[20, 100], data: &data };
            let mut outputs = [Output::new(&mut place[8..72]), Output::new(&mut tiny[..2])];
            let outcome = guest.run(&model, &[input("a"), input("")], &["y"], &mut outputs);
            assert!(outputs.iter().all(|output| output.length <= output.data.len()));
            outcome.is_ok() && outputs.iter().any(|output| output.length > 0)
        }
        (2, model) => {
            let images = [&[1; 40][..], &[2; 2000]];
            let outcome = guest.classify(model.ok().as_ref(), &images, &mut labels[..4]);
            let count = outcome.map_or(0, |(count, _)| count);
            assert!(count <= 4 && labels[4].name.is_empty());
            count > 0
        }
        (3, _) => guest.info().is_ok(),
        (4, _) => guest.close().is_ok(),
        (5, Ok(model)) => guest.unregister(&model).is_ok(),
        (6, _) => {
            guest.attend();
            false
        }
        _ => guest.noop().is_ok(),
    };
    let passed = guest.transport().now - before;
    assert!(passed <= u64::from(DEADLINE_MS) + 1, "{passed} ms");
    assert!(place[..8].iter().chain(&place[72..]).all(|byte| *byte == CANARY));
    assert!(tiny[2..].iter().all(|byte| *byte == CANARY));
    assert!(guest.message().len() <= 512);
    answered
}

/// Holds the conversation; returns which of its two calls were answered.
pub fn hold(input: &[u8]) -> [bool; 2] {
    let mut script = Script { rest: input, call: 1 };
    let (mode, calls, cuts) = (script.byte(), script.byte(), u32::from(script.byte()) * 0x0101_0101);
    let (mut said, mut gates) = (Vec::new(), Vec::new());
    if mode & 1 == 0 {
        frame(&mut said, 4, 0, 0, &[]);
    }
    if mode & 2 == 0 {
        gates.push((said.len(), script.call));
        script.call += 1;
        reply(&mut said, 1, b"\x0a\x200123456789abcdef0123456789abcdef", 40);
    }
    if mode & 4 == 0 {
        gates.push((said.len(), script.call));
        script.call += 1;
        let id = b"\x0a\x40aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccdddddddddddddddd";
        reply(&mut said, script.call * 2 - 3, id, usize::from(mode));
    }
    if mode & 8 == 0 {
        while !script.rest.is_empty() && said.len() < 1 << 18 {
            match script.byte() {
                0..=0x5f => gates.push((said.len(), script.call)),
                0x60..=0x9f => script.call += 1,
                _ => {}
            }
            say(&mut script, &mut said);
        }
    } else {
        said.extend_from_slice(script.rest);
    }
    let end = mode >> 4 & 3;
    let agent = Agent {
        said,
        at: 0,
        gates,
        calls: 0,
        now: 1000,
        cuts,
        end,
        dials: 0,
        turns: 0,
        preface: 0,
        head: Vec::new(),
        left: 0,
    };
    let mut guest = Guest::new(agent);
    guest.set_deadline_ms(DEADLINE_MS);
    guest.set_repeatable(mode & 0x40 != 0);
    [call(&mut guest, calls), call(&mut guest, calls >> 3)]
}
