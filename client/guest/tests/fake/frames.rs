//! HTTP/2 frames and header blocks as a server writes and reads them: the tests' own, so that the guest's are compared
//! with something.

use crate::huffman;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const ALERT: u8 = 0xfa;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
pub const WITH_PRIORITY: u8 = 32;

pub const INITIAL_WINDOW_SIZE: u16 = 4;
pub const MAX_FRAME_SIZE: u16 = 5;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, flags, stream, payload: payload.into() }
    }

    pub fn encode(&self) -> Vec<u8> {
        let [_, length @ ..] = (self.payload.len() as u32).to_be_bytes();
        let stream = self.stream.to_be_bytes();
        [&length[..], &[self.kind, self.flags], &stream, &self.payload].concat()
    }

    /// The first frame of `bytes`, when it is whole, and its length.
    pub fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let [a, b, c, kind, flags, stream @ ..] = *bytes.first_chunk::<9>()?;
        let end = 9 + u32::from_be_bytes([0, a, b, c]) as usize;
        let payload = bytes.get(9..end)?.to_vec();
        Some((Self { kind, flags, stream: u32::from_be_bytes(stream), payload }, end))
    }

    pub fn is(&self, kind: u8, flag: u8) -> bool {
        self.kind == kind && (flag == 0 || self.flags & flag != 0)
    }

    /// The first four bytes as a number: what WINDOW_UPDATE and RST_STREAM say.
    pub fn number(&self) -> u32 {
        u32::from_be_bytes(*self.payload.first_chunk().unwrap())
    }

    pub fn settings(&self) -> impl Iterator<Item = (u16, u32)> {
        let pairs = self.payload.as_chunks::<6>().0.iter();
        pairs.map(|[a, b, value @ ..]| (u16::from_be_bytes([*a, *b]), u32::from_be_bytes(*value)))
    }
}

pub fn settings(settings: &[(u16, u32)]) -> Frame {
    let pairs =
        settings.iter().map(|(setting, value)| [&setting.to_be_bytes()[..], &value.to_be_bytes()].concat());
    Frame::new(SETTINGS, 0, 0, pairs.collect::<Vec<_>>().concat())
}

pub fn ping(content: u64) -> Frame {
    Frame::new(PING, 0, 0, content.to_be_bytes())
}

pub fn window_update(stream: u32, more: u32) -> Frame {
    Frame::new(WINDOW_UPDATE, 0, stream, more.to_be_bytes())
}

pub fn goaway(last: u32) -> Frame {
    Frame::new(GOAWAY, 0, 0, [&last.to_be_bytes()[..], &[0; 4], b"bye"].concat())
}

pub fn reset(stream: u32, code: u32) -> Frame {
    Frame::new(RST_STREAM, 0, stream, code.to_be_bytes())
}

pub fn data(stream: u32, content: &[u8]) -> Frame {
    Frame::new(DATA, 0, stream, content)
}

pub fn headers(stream: u32, headers: &[(&str, &str)]) -> Frame {
    Frame::new(HEADERS, END_HEADERS, stream, block(headers, false))
}

pub fn trailers(stream: u32, headers: &[(&str, &str)]) -> Frame {
    Frame::new(HEADERS, END_HEADERS | END_STREAM, stream, block(headers, false))
}

/// The frame with so many bytes of padding.
pub fn padded(frame: Frame, padding: u8) -> Frame {
    let payload = [&[padding][..], &frame.payload, &vec![0; usize::from(padding)]].concat();
    Frame { flags: frame.flags | PADDED, payload, ..frame }
}

pub const REPLY: &[(&str, &str)] = &[(":status", "200"), ("content-type", "application/grpc")];
pub const OK: &[(&str, &str)] = &[("grpc-status", "0")];

/// A block of literals without a table, their strings as they are or in Huffman's code.
pub fn block(headers: &[(&str, &str)], huffman: bool) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        string(&mut block, name.as_bytes(), huffman);
        string(&mut block, value.as_bytes(), huffman);
    }
    block
}

fn string(block: &mut Vec<u8>, text: &[u8], huffman: bool) {
    let text = if huffman { encode(text) } else { text.to_vec() };
    let pattern = if huffman { 0x80 } else { 0 };
    let mut length = text.len();
    if length < 127 {
        block.push(pattern | length as u8);
    } else {
        block.push(pattern | 127);
        length -= 127;
        while length >= 128 {
            block.push(length as u8 | 128);
            length >>= 7;
        }
        block.push(length as u8);
    }
    block.extend_from_slice(&text);
}

fn encode(text: &[u8]) -> Vec<u8> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u64, 0);
    for byte in text {
        let (code, length) = huffman::code(*byte);
        (bits, count) = (bits << length | u64::from(code), count + length);
        while count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    if count > 0 {
        bytes.push((bits << (8 - count)) as u8 | (0xff >> count) as u8);
    }
    bytes
}

/// The headers of a request, as far as the guest writes them: entries of the static table and plain literals.
pub fn read_block(mut block: &[u8]) -> Vec<(String, String)> {
    const NAMES: &[(usize, &str, &str)] = &[
        (1, ":authority", ""),
        (3, ":method", "POST"),
        (4, ":path", "/"),
        (6, ":scheme", "http"),
        (23, "authorization", ""),
        (31, "content-type", ""),
        (58, "user-agent", ""),
    ];
    let known = |index| NAMES.iter().find(|(known, ..)| *known == index).unwrap();
    let mut headers = Vec::new();
    while let Some(first) = block.first() {
        if first & 0x80 != 0 {
            let (_, name, value) = known(usize::from(first & 0x7f));
            headers.push(((*name).to_owned(), (*value).to_owned()));
            block = &block[1..];
            continue;
        }
        assert!(first & 0x60 == 0, "nothing is to be added to a table");
        let index = integer(&mut block, 4);
        let name = if index == 0 { text(&mut block) } else { known(index).1.to_owned() };
        headers.push((name, text(&mut block)));
    }
    headers
}

fn integer(block: &mut &[u8], prefix: u32) -> usize {
    let full = (1 << prefix) - 1;
    let mut take = || block.split_off_first().map(|byte| usize::from(*byte)).unwrap();
    let first = take() & full;
    if first < full {
        return first;
    }
    let (mut value, mut shift) = (full, 0);
    loop {
        let byte = take();
        value += (byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return value;
        }
    }
}

fn text(block: &mut &[u8]) -> String {
    assert!(block[0] & 0x80 == 0, "the guest has no use for Huffman's code");
    let length = integer(block, 7);
    String::from_utf8(block.split_off(..length).unwrap().to_vec()).unwrap()
}
