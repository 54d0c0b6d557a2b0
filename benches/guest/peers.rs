//! What the guest is compared with, in a process of its own: raw sockets, and HTTP/2 servers that do next to nothing.

use std::io::{self, IoSliceMut, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;

use prost::Message;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::{
    DType, ModelRunReply, NamedTensor, OpenSessionReply, RegisterResourceReply, RunReply, Tensor,
};

/// A byte stream, whatever carries it.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

type Serve = fn(&mut dyn Stream) -> io::Result<()>;

/// What is served, in the order in which the places are told.
const PEERS: [(&str, Serve); 3] = [
    ("raw", raw),
    // The agent's own limits.
    ("sink", |stream| sink(stream, 64 << 10, 1 << 20, 4 << 20)),
    ("large", |stream| sink(stream, 1 << 20, 1 << 30, 1 << 30)),
];

/// Serves all of them on TCP and on unix sockets in `folder`, and tells where; ends with its input.
pub fn serve(folder: &Path) {
    for (name, serve) in PEERS {
        listen(&folder.join(name), serve);
    }
    io::copy(&mut io::stdin(), &mut io::sink()).unwrap();
}

/// Listens on TCP and on a unix socket. A connection that ends ends its thread.
fn listen(path: &Path, serve: Serve) {
    let (tcp, unix) = (TcpListener::bind("127.0.0.1:0").unwrap(), UnixListener::bind(path).unwrap());
    println!("tcp://{}\nunix://{}", tcp.local_addr().unwrap(), path.display());
    let converse = move |mut stream: Box<dyn Stream>| {
        std::thread::spawn(move || serve(&mut stream));
    };
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            converse(Box::new(stream));
        }
    });
    std::thread::spawn(move || unix.incoming().for_each(|stream| converse(Box::new(stream.unwrap()))));
}

/// Answers each so many bytes with so many; the peer says first how many those are.
fn raw(stream: &mut dyn Stream) -> io::Result<()> {
    let mut lengths = [[0; 4]; 2];
    stream.read_exact(lengths.as_flattened_mut())?;
    let [mut request, reply] = lengths.map(|length| vec![0; u32::from_le_bytes(length) as usize]);
    loop {
        stream.read_exact(&mut request)?;
        stream.write_all(&reply)?;
    }
}

const HEADER_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;

/// What was read ahead of the place it is for: a frame's content goes straight to its own.
struct Incoming<'a> {
    stream: &'a mut dyn Stream,
    ahead: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Incoming<'_> {
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
            let count =
                self.stream.read_vectored(&mut [IoSliceMut::new(later), IoSliceMut::new(&mut self.ahead)])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            (self.begin, self.end) = (0, count.saturating_sub(room));
            place = &mut later[count.min(room)..];
        }
    }
}

/// Takes calls on one connection and answers without looking at what they are about.
fn sink(stream: &mut dyn Stream, frame_bytes: u32, window: u32, connection: u32) -> io::Result<()> {
    let mut incoming = Incoming { stream, ahead: vec![0; 4096], begin: 0, end: 0 };
    let mut body = vec![0; 33 << 20];
    incoming.exact(&mut body[..24])?;
    let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    let settings = [setting(4, window), setting(5, frame_bytes)].concat();
    let opening = [frame(SETTINGS, 0, 0, &settings), widen(0, connection - 65_535)].concat();
    incoming.stream.write_all(&opening)?;
    let replies = Replies::new();
    let (mut method, mut length, mut owed, mut owed_all) = (Vec::new(), 0, 0, 0);
    loop {
        let mut header = [0; HEADER_BYTES];
        incoming.exact(&mut header)?;
        let [high, middle, low, kind, flags, id @ ..] = header;
        let (size, id) = (u32::from_be_bytes([0, high, middle, low]), u32::from_be_bytes(id));
        let at = if kind == DATA { length } else { 0 };
        let content = &mut body[at..at + size as usize];
        incoming.exact(content)?;
        match kind {
            SETTINGS if flags & 1 == 0 => incoming.stream.write_all(&frame(SETTINGS, 1, 0, &[]))?,
            HEADERS => (method, length, owed) = (content.to_vec(), 0, 0),
            DATA => {
                (length, owed, owed_all) = (length + size as usize, owed + size, owed_all + size);
                if flags & 1 != 0 {
                    incoming.stream.write_all(&replies.of(&method, length, id))?;
                } else if owed >= window / 2 {
                    incoming.stream.write_all(&[widen(0, owed_all), widen(id, owed)].concat())?;
                    (owed, owed_all) = (0, 0);
                }
                if owed_all >= connection / 2 {
                    incoming.stream.write_all(&widen(0, owed_all))?;
                    owed_all = 0;
                }
            }
            _ => {}
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(content.len()).unwrap().to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), content].concat()
}

fn widen(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

/// Messages of replies.
struct Replies {
    opened: Vec<u8>,
    registered: Vec<u8>,
    nothing: Vec<u8>,
    ran_little: Vec<u8>,
    ran: Vec<u8>,
}

impl Replies {
    fn new() -> Self {
        let ran = |bytes: usize| {
            let tensor = Tensor::from_bytes(DType::F32, &[(bytes / 4) as i64], vec![1; bytes].into());
            let outputs = vec![NamedTensor { name: "y".into(), tensor: Some(tensor) }];
            RunReply { outcome: Some(Outcome::ModelRun(ModelRunReply { outputs })), timings: None }
                .encode_to_vec()
        };
        let opened = OpenSessionReply { session: "0".repeat(32), ..OpenSessionReply::default() };
        let registered =
            RegisterResourceReply { resource: "0".repeat(64), ..RegisterResourceReply::default() };
        Self {
            opened: opened.encode_to_vec(),
            registered: registered.encode_to_vec(),
            nothing: Vec::new(),
            ran_little: ran(1024),
            ran: ran(super::DOWN_BYTES),
        }
    }

    /// The frames of a reply to a call with these headers and a message of so many bytes.
    fn of(&self, headers: &[u8], length: usize, stream: u32) -> Vec<u8> {
        let is = |name: &str| headers.windows(name.len()).any(|bytes| bytes == name.as_bytes());
        let message = match length {
            _ if is("/Open") => &self.opened,
            _ if is("/Register") => &self.registered,
            ..64 => &self.nothing,
            64..2048 => &self.ran_little,
            _ => &self.ran,
        };
        // `:status: 200` and `content-type`, then `grpc-status: 0`.
        let head = [&[0x88, 0x0f, 0x10, 16], &b"application/grpc"[..]].concat();
        let tail = [&[0, 11], &b"grpc-status"[..], b"\x010"].concat();
        let prefix = u32::try_from(message.len()).unwrap().to_be_bytes();
        let data = [&[0], &prefix[..], message].concat();
        let frames = [
            frame(HEADERS, 4, stream, &head),
            frame(DATA, 0, stream, &data),
            frame(HEADERS, 5, stream, &tail),
        ];
        frames.concat()
    }
}
