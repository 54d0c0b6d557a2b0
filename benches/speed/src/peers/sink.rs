//! HTTP/2 servers that do next to nothing for the thin guest's calls: what the guest itself costs.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};

use prost::Message;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::{Arg, GenopReply, OpenSessionReply, RunReply};

use crate::shape::DOWN_BYTES_MAX;

/// What a server lets a client send.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    frame: u32,
    stream: u32,
    connection: u32,
}

/// The agent's own.
pub(super) const AGENT: Limits = Limits { frame: 64 << 10, stream: 1 << 20, connection: 4 << 20 };

/// Those of a server that trusts its clients.
pub(super) const LARGE: Limits = Limits { frame: 1 << 20, stream: 1 << 30, connection: 1 << 30 };

/// Longest request, with what is around its payload.
const REQUEST_BYTES_MAX: usize = 17 << 20;

const PREFACE_BYTES: usize = 24;
const HEADER_BYTES: usize = 9;
const WINDOW_DEFAULT: u32 = 65_535;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;

/// Flags: the last frame of a stream, which is an acknowledgement of settings; the last one of headers.
const END: u8 = 1;
const END_HEADERS: u8 = 4;

/// What was read ahead of the place it is for: a frame's content goes straight to its own.
struct Incoming {
    stream: File,
    ahead: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Incoming {
    fn exact(&mut self, mut place: &mut [u8]) -> io::Result<()> {
        loop {
            let there = place.len().min(self.end - self.begin);
            let (now, later) = place.split_at_mut(there);
            now.copy_from_slice(&self.ahead[self.begin..self.begin + there]);
            self.begin += there;
            if later.is_empty() {
                return Ok(());
            }
            let room = later.len();
            let mut places = [IoSliceMut::new(later), IoSliceMut::new(&mut self.ahead)];
            let count = self.stream.read_vectored(&mut places)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            (self.begin, self.end) = (0, count.saturating_sub(room));
            place = &mut later[count.min(room)..];
        }
    }
}

/// Takes calls on one connection and answers without looking at what they are about.
pub(super) fn serve(stream: File, limits: Limits) -> io::Result<()> {
    let mut incoming = Incoming { stream, ahead: vec![0; 4096], begin: 0, end: 0 };
    let mut body = vec![0; REQUEST_BYTES_MAX];
    incoming.exact(&mut body[..PREFACE_BYTES])?;
    let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    let settings = [setting(4, limits.stream), setting(5, limits.frame)].concat();
    let opening = [frame(SETTINGS, 0, 0, &settings), widen(0, limits.connection - WINDOW_DEFAULT)].concat();
    incoming.stream.write_all(&opening)?;
    let replies = Replies::new();
    let (mut method, mut length, mut owed, mut owed_all) = (Vec::new(), 0, 0, 0);
    loop {
        let mut header = [0; HEADER_BYTES];
        incoming.exact(&mut header)?;
        let [high, middle, low, kind, flags, id @ ..] = header;
        let (size, id) = (u32::from_be_bytes([0, high, middle, low]), u32::from_be_bytes(id));
        let at = if kind == DATA { length } else { 0 };
        let content = body.get_mut(at..at + size as usize).ok_or(io::ErrorKind::InvalidData)?;
        incoming.exact(content)?;
        match kind {
            SETTINGS if flags & END == 0 => incoming.stream.write_all(&frame(SETTINGS, END, 0, &[]))?,
            HEADERS => (method, length, owed) = (content.to_vec(), 0, 0),
            DATA => {
                (length, owed, owed_all) = (length + size as usize, owed + size, owed_all + size);
                if flags & END != 0 {
                    incoming.stream.write_all(&replies.of(&method, length, id))?;
                } else if owed >= limits.stream / 2 {
                    incoming.stream.write_all(&[widen(0, owed_all), widen(id, owed)].concat())?;
                    (owed, owed_all) = (0, 0);
                }
                if owed_all >= limits.connection / 2 {
                    incoming.stream.write_all(&widen(0, owed_all))?;
                    owed_all = 0;
                }
            }
            _ => {}
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    // Frames of a server's own are short.
    let [_, length @ ..] = (content.len() as u32).to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), content].concat()
}

fn widen(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

/// Messages of replies.
struct Replies {
    opened: Vec<u8>,
    nothing: Vec<u8>,
    little: Vec<u8>,
    most: Vec<u8>,
}

impl Replies {
    fn new() -> Self {
        let wrote = |bytes: usize| {
            let write = vec![Arg { data: vec![1; bytes].into(), ..Arg::default() }];
            RunReply { outcome: Some(Outcome::Genop(GenopReply { write })), ..RunReply::default() }
                .encode_to_vec()
        };
        let opened = OpenSessionReply { session: "0".repeat(32), ..OpenSessionReply::default() };
        Self {
            opened: opened.encode_to_vec(),
            nothing: Vec::new(),
            little: wrote(1024),
            most: wrote(DOWN_BYTES_MAX),
        }
    }

    /// The frames of a reply to a call with these headers and a message of so many bytes.
    fn of(&self, headers: &[u8], length: usize, stream: u32) -> Vec<u8> {
        let is = |name: &str| headers.windows(name.len()).any(|bytes| bytes == name.as_bytes());
        let message = match length {
            _ if is("/Open") => &self.opened,
            ..64 => &self.nothing,
            64..2048 => &self.little,
            _ => &self.most,
        };
        // `:status: 200` and `content-type`, then `grpc-status: 0`.
        let head = [&[0x88, 0x0f, 0x10, 16], &b"application/grpc"[..]].concat();
        let tail = [&[0, 11], &b"grpc-status"[..], b"\x010"].concat();
        let data = [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat();
        let frames = [
            frame(HEADERS, END_HEADERS, stream, &head),
            frame(DATA, 0, stream, &data),
            frame(HEADERS, END_HEADERS | END, stream, &tail),
        ];
        frames.concat()
    }
}
