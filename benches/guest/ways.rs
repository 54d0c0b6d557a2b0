//! Ways to make a call, all from the calling thread.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use bytes::Bytes;
use tokio::runtime::Runtime;
use vaccel_client::{Client, DType, Resource, ResourceFiles, Session, SessionOptions, Tensor, named};
use vaccel_guest::{Fault, File, Guest, Input, Output, Posix, Ready, ResourceId, ResourceKind, Transport};

use crate::DOWN_BYTES;
use crate::peers::Stream;

#[allow(dead_code, reason = "models of tests")]
#[path = "../../agent/tests/it/support/onnx.rs"]
mod onnx;

/// A way to make one call.
pub trait Way {
    fn call(&mut self);

    /// System calls so far, where they are counted.
    fn system_calls(&mut self) -> u64 {
        0
    }
}

/// Bytes that come back for so many.
fn down(size: usize) -> usize {
    size.min(DOWN_BYTES)
}

/// A model that gives the first [`DOWN_BYTES`] of its input.
fn model(size: usize) -> Bytes {
    let [whole, part] = [size, down(size)].map(|bytes| (bytes / 4) as i64);
    let [from, to] = [("from", 0), ("to", part)].map(|(name, value)| onnx::i64s(name, &[value]));
    let nodes = vec![onnx::node("Slice", &["x", "from", "to"], &["y"])];
    let port = |name, length| vec![onnx::port(name, onnx::F32, &[length])];
    onnx::model(nodes, vec![from, to], port("x", whole), port("y", part))
}

/// Bytes there and back, and nothing else. An empty call is one byte each way.
pub struct BySocket {
    stream: Box<dyn Stream>,
    request: Vec<u8>,
    reply: Vec<u8>,
}

impl BySocket {
    pub fn new(address: &str, size: usize) -> Self {
        let mut stream: Box<dyn Stream> = match address.split_once("://").unwrap() {
            ("tcp", address) => {
                let stream = TcpStream::connect(address).unwrap();
                stream.set_nodelay(true).unwrap();
                Box::new(stream)
            }
            (_, path) => Box::new(UnixStream::connect(path).unwrap()),
        };
        let [request, reply] = [size, down(size)].map(|bytes| vec![1; bytes.max(1)]);
        for bytes in [&request, &reply] {
            stream.write_all(&(bytes.len() as u32).to_le_bytes()).unwrap();
        }
        Self { stream, request, reply }
    }
}

impl Way for BySocket {
    fn call(&mut self) {
        self.stream.write_all(&self.request).unwrap();
        self.stream.read_exact(&mut self.reply).unwrap();
    }
}

/// The guest's sockets, with its system calls counted.
struct Counted {
    posix: Posix,
    count: u64,
}

impl Transport for Counted {
    fn authority(&self) -> &str {
        self.posix.authority()
    }

    fn connect(&mut self, until: u64) -> Result<(), Fault> {
        self.posix.connect(until)
    }

    fn write(&mut self, pieces: &[&[u8]]) -> Result<usize, Fault> {
        self.count += 1;
        self.posix.write(pieces)
    }

    fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        self.count += 1;
        self.posix.read(first, second)
    }

    fn wait(&mut self, write: bool, until: u64) -> Result<Ready, Fault> {
        self.count += 1;
        self.posix.wait(write, until)
    }

    fn pause(&mut self, until: u64) {
        self.posix.pause(until);
    }

    fn close(&mut self) {
        self.posix.close();
    }

    // The clock is no system call where it is read often.
    fn now(&mut self) -> u64 {
        self.posix.now()
    }
}

/// The thin guest.
pub struct ByGuest {
    guest: Guest<Counted>,
    /// None for an empty call.
    model: Option<ResourceId>,
    data: Vec<u8>,
    place: Vec<u8>,
}

impl ByGuest {
    pub fn new(address: &str, size: usize) -> Self {
        let mut guest = Guest::new(Counted { posix: address.parse().unwrap(), count: 0 });
        let content = model(size);
        let model = (size > 0).then(|| {
            let files = [File { name: "model.onnx", content: &content }];
            guest.register(ResourceKind::Model, &files).unwrap()
        });
        Self { guest, model, data: vec![1; size], place: vec![0; down(size)] }
    }
}

impl Way for ByGuest {
    fn call(&mut self) {
        let Some(model) = &self.model else {
            self.guest.noop().unwrap();
            return;
        };
        let dtype = vaccel_guest::DType::F32;
        let shape = [(self.data.len() / 4) as i64];
        let input = Input { name: "x", dtype, shape: &shape, data: &self.data };
        let mut outputs = [Output::new(&mut self.place)];
        self.guest.run(model, &[input], &[], &mut outputs).unwrap();
        assert!(outputs[0].length > 0);
    }

    fn system_calls(&mut self) -> u64 {
        self.guest.transport().count
    }
}

/// The async client.
pub struct ByClient<'a> {
    runtime: &'a Runtime,
    session: Session,
    model: Option<Resource>,
    data: Bytes,
}

impl<'a> ByClient<'a> {
    pub fn new(runtime: &'a Runtime, address: &str, size: usize) -> Self {
        let (session, model) = runtime.block_on(async {
            let client = Client::builder(address.parse().unwrap()).connect().await.unwrap();
            let session = client.open_session(SessionOptions::default()).await.unwrap();
            let files = ResourceFiles::model("model.onnx", model(size));
            let model = if size > 0 { Some(session.register(files).await.unwrap()) } else { None };
            (session, model)
        });
        Self { runtime, session, model, data: vec![1; size].into() }
    }
}

impl Way for ByClient<'_> {
    fn call(&mut self) {
        let Self { session, model, data, .. } = self;
        self.runtime.block_on(async {
            let Some(model) = model else {
                session.noop().await.unwrap();
                return;
            };
            let tensor = Tensor::from_bytes(DType::F32, &[(data.len() / 4) as i64], data.clone());
            let run = session.run(model, vec![named("x", tensor)], &[]).await.unwrap();
            assert_eq!(run.outputs.len(), 1);
        });
    }
}
