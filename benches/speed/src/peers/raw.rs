//! What all are compared with: bytes there and back over a blocking socket, and nothing else.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::Caller;
use crate::Failure;
use crate::shape::Shape;

/// Bytes that go up and down for one call: an empty one is one byte each way.
fn lengths(shape: Shape) -> [usize; 2] {
    [shape.up.max(1), shape.down().max(1)]
}

/// Answers each so many bytes with so many; the peer says first how many those are. An echo is what came.
pub(super) fn serve(mut stream: File) -> io::Result<()> {
    let mut lengths = [[0; 8]; 2];
    stream.read_exact(lengths.as_flattened_mut())?;
    let [up, down] = lengths.map(|length| u64::from_le_bytes(length) as usize);
    let mut data = vec![0; up.max(down)];
    loop {
        stream.read_exact(&mut data[..up])?;
        stream.write_all(&data[..down])?;
    }
}

/// A socket for calls of one shape, and another one when the shape changes: so nothing goes over it but payload.
pub(super) struct Raw {
    address: String,
    dialog: Option<Dialog>,
}

struct Dialog {
    shape: Shape,
    stream: File,
    up: Vec<u8>,
    down: Vec<u8>,
}

impl Dialog {
    fn open(address: &str, shape: Shape) -> Result<Self, Failure> {
        let mut stream = connect(address)?;
        let lengths = lengths(shape);
        for length in lengths {
            stream.write_all(&(length as u64).to_le_bytes())?;
        }
        let [up, down] = lengths.map(|length| vec![1; length]);
        Ok(Self { shape, stream, up, down })
    }
}

impl Raw {
    pub(super) fn new(address: &str) -> Self {
        Self { address: address.into(), dialog: None }
    }
}

impl Caller for Raw {
    fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        let current = self.dialog.take().filter(|dialog| dialog.shape == shape);
        let dialog = self.dialog.insert(match current {
            Some(dialog) => dialog,
            None => Dialog::open(&self.address, shape)?,
        });
        dialog.stream.write_all(&dialog.up)?;
        dialog.stream.read_exact(&mut dialog.down)?;
        Ok(())
    }
}

fn connect(address: &str) -> Result<File, Failure> {
    let socket: OwnedFd = match address.split_once("://").ok_or("no address")? {
        ("tcp", address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.into()
        }
        (_, path) => UnixStream::connect(path)?.into(),
    };
    Ok(socket.into())
}
