//! Who is measured: for each peer a server, a client, and what they can carry.

mod client;
mod guest;
mod listen;
mod model;
mod raw;
mod sink;
mod tonic;
mod ttrpc;

use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use bytes::Bytes;

pub(crate) use ttrpc::NODELAY as TTRPC_NODELAY;

use crate::Failure;
use crate::shape::{Shape, Socket};

/// Name of a server's unix socket in its folder.
pub(crate) const SOCKET: &str = "socket";

/// A program that serves or calls.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    /// This one, as what.
    Own(&'static str),
    /// The agent, with which engine.
    Agent(&'static str),
    Python,
}

/// Which calls a peer is measured with.
#[derive(Clone, Copy, Debug)]
enum Range {
    All,
    /// Those for which it makes a difference whether TCP sockets send at once.
    Tcp,
    /// Those for which a model has something to do.
    Model,
    /// A server that keeps nothing of what comes.
    NoEcho,
    /// Tensors that lie in shared memory.
    Shared,
}

/// A server, a client, and what they can carry.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    pub(crate) server: Program,
    pub(crate) client: Program,
    /// Whether ttrpc's TCP sockets are told to send at once.
    pub(crate) nodelay: bool,
    range: Range,
}

/// Whether a peer is measured with some calls.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cover {
    Yes,
    /// They would say nothing.
    No,
    /// It cannot carry them, because of this.
    Above(&'static str),
}

const RAW_NAME: &str = "raw socket";

/// Bytes and nothing else.
pub(crate) const RAW: Peer = peer(RAW_NAME, Program::Own("raw"), Program::Own("raw"));

/// The thin guest, with the agent's path of a call and no engine behind it.
pub(crate) const GUEST: Peer = peer("guest, agent", Program::Agent("noop"), Program::Own("guest"));

/// The async client through sockets, with the same behind it.
pub(crate) const CLIENT: Peer = peer("async client, agent", Program::Agent("noop"), Program::Own("client"));

/// All of them, what the others are compared with first.
pub(crate) static ALL: [Peer; 17] = [
    RAW,
    GUEST,
    CLIENT,
    shared("guest, memory, copied", "guest-copies"),
    shared("guest, memory, in place", "guest-in-place"),
    shared("async client, memory, copied", "client-copies"),
    shared("async client, memory, in place", "client-in-place"),
    Peer {
        range: Range::Model,
        ..peer("guest, agent, model", Program::Agent("tract"), Program::Own("guest-model"))
    },
    Peer {
        range: Range::Model,
        ..peer("guest, memory, model", Program::Agent("tract"), Program::Own("guest-model-copies"))
    },
    Peer { range: Range::NoEcho, ..peer("guest, sink 64 KiB", Program::Own("sink"), Program::Own("guest")) },
    Peer {
        range: Range::NoEcho,
        ..peer("guest, sink 1 MiB", Program::Own("large-sink"), Program::Own("guest"))
    },
    peer("tonic", Program::Own("tonic"), Program::Own("tonic")),
    peer("ttrpc sync", Program::Own("ttrpc-sync"), Program::Own("ttrpc-sync")),
    nodelay("ttrpc sync, nodelay", "ttrpc-sync"),
    peer("ttrpc async", Program::Own("ttrpc-async"), Program::Own("ttrpc-async")),
    nodelay("ttrpc async, nodelay", "ttrpc-async"),
    peer("grpcio", Program::Python, Program::Python),
];

const fn peer(name: &'static str, server: Program, client: Program) -> Peer {
    Peer { name, server, client, nodelay: false, range: Range::All }
}

const fn nodelay(name: &'static str, kind: &'static str) -> Peer {
    Peer { nodelay: true, range: Range::Tcp, ..peer(name, Program::Own(kind), Program::Own(kind)) }
}

const fn shared(name: &'static str, kind: &'static str) -> Peer {
    Peer { range: Range::Shared, ..peer(name, Program::Agent("noop"), Program::Own(kind)) }
}

impl Peer {
    pub(crate) fn is_raw(&self) -> bool {
        self.name == RAW_NAME
    }

    pub(crate) fn is_python(&self) -> bool {
        matches!(self.server, Program::Python)
    }

    /// Whether it is measured with callers at the same time.
    pub(crate) fn is_crowd(&self) -> bool {
        matches!(
            self.client,
            Program::Own("raw" | "guest" | "guest-copies" | "client" | "client-copies" | "tonic")
        ) && !matches!(self.server, Program::Own("sink" | "large-sink"))
    }

    pub(crate) fn covers(&self, socket: Socket, shape: Shape) -> Cover {
        let is_ttrpc = matches!(self.client, Program::Own("ttrpc-sync" | "ttrpc-async"));
        match self.range {
            Range::Tcp if socket != Socket::Tcp => Cover::No,
            Range::Model if shape.up < model::UP_BYTES_MIN || shape.echo => Cover::No,
            Range::NoEcho if shape.echo => Cover::No,
            Range::Shared if shape.echo || shape.up < client::SHARED_BYTES_MIN => Cover::No,
            _ if is_ttrpc && shape.up >= ttrpc::MESSAGE_BYTES_MAX => Cover::Above(ttrpc::LIMIT),
            _ => Cover::Yes,
        }
    }
}

/// Makes calls, one at a time, over one connection.
pub(crate) trait Caller: Send {
    /// # Errors
    /// The call failed, or something else came back than should.
    fn call(&mut self, shape: Shape) -> Result<(), Failure>;
}

/// Callers that make calls at the same time.
pub(crate) trait Crowd {
    /// Makes so many calls of each caller; how long all took together.
    ///
    /// # Errors
    /// That of a call that failed.
    fn call(&mut self, shape: Shape, calls: usize) -> Result<Duration, Failure>;
}

/// Serves on TCP and on a unix socket in `folder`, says where, and ends with its input.
pub(crate) fn serve(kind: &str, folder: &Path) -> Result<(), Failure> {
    let path = folder.join(SOCKET);
    match kind {
        "raw" => listen::serve(&path, raw::serve),
        "sink" => listen::serve(&path, |stream| sink::serve(stream, sink::AGENT)),
        "large-sink" => listen::serve(&path, |stream| sink::serve(stream, sink::LARGE)),
        "tonic" => tonic::serve(&path),
        "ttrpc-sync" => ttrpc::blocking::serve(&path),
        "ttrpc-async" => ttrpc::tasks::serve(&path),
        _ => Err(format!("no server: {kind}").into()),
    }
}

/// Says where a server listens, and waits for the end of its input.
fn listening(tcp: &str, path: &Path) -> Result<(), Failure> {
    println!("listening on tcp://{tcp}\nlistening on unix://{}", path.display());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

/// Bytes to send, made before the calls that count.
#[derive(Default)]
struct Source(Bytes);

impl Source {
    /// So many of them. They are no zeros: the kernel has one page for all of those.
    fn bytes(&mut self, count: usize) -> Bytes {
        if self.0.len() < count {
            self.0 = vec![1; count].into();
        }
        self.0.slice(..count)
    }
}

/// Whether as many bytes came as should.
fn check(came: usize, shape: Shape) -> Result<(), Failure> {
    let expected = shape.down();
    if came == expected {
        return Ok(());
    }
    Err(format!("{came} bytes came instead of {expected}").into())
}

/// Connects.
pub(crate) fn caller(kind: &str, address: &str) -> Result<Box<dyn Caller>, Failure> {
    Ok(match kind {
        "raw" => Box::new(raw::Raw::new(address)),
        "guest" => Box::new(guest::Caller::new(address, guest::Engine::Noop, guest::Way::Socket)?),
        "guest-copies" => Box::new(guest::Caller::new(address, guest::Engine::Noop, guest::Way::Copy)?),
        "guest-in-place" => Box::new(guest::Caller::new(address, guest::Engine::Noop, guest::Way::InPlace)?),
        "guest-model-copies" => {
            Box::new(guest::Caller::new(address, guest::Engine::Tract, guest::Way::Copy)?)
        }
        "guest-model" => Box::new(guest::Caller::new(address, guest::Engine::Tract, guest::Way::Socket)?),
        "client" => Box::new(client::Single::new(address, guest::Way::Socket)?),
        "client-copies" => Box::new(client::Single::new(address, guest::Way::Copy)?),
        "client-in-place" => Box::new(client::Single::new(address, guest::Way::InPlace)?),
        "tonic" => Box::new(tonic::Caller::new(address)?),
        "ttrpc-sync" => Box::new(ttrpc::blocking::Caller::new(address)?),
        "ttrpc-async" => Box::new(ttrpc::tasks::Caller::new(address)?),
        _ => return Err(format!("no client: {kind}").into()),
    })
}

/// Connects several callers: tasks of one runtime where the client is made for that, else threads.
pub(crate) fn crowd(kind: &str, address: &str, count: usize) -> Result<Box<dyn Crowd>, Failure> {
    match kind {
        "client" => return Ok(Box::new(client::Tasks::new(address, guest::Way::Socket, count)?)),
        "client-copies" => return Ok(Box::new(client::Tasks::new(address, guest::Way::Copy, count)?)),
        _ => {}
    }
    let callers = (0..count).map(|_| caller(kind, address)).collect::<Result<_, _>>()?;
    Ok(Box::new(Threads(callers)))
}

/// A thread for each caller.
struct Threads(Vec<Box<dyn Caller>>);

impl Crowd for Threads {
    fn call(&mut self, shape: Shape, calls: usize) -> Result<Duration, Failure> {
        let barrier = &Barrier::new(self.0.len() + 1);
        std::thread::scope(|scope| {
            let work = |caller: &mut Box<dyn Caller>| {
                barrier.wait();
                (0..calls).try_for_each(|_| caller.call(shape))
            };
            let threads: Vec<_> = self.0.iter_mut().map(|caller| scope.spawn(move || work(caller))).collect();
            barrier.wait();
            let begun = Instant::now();
            for thread in threads {
                thread.join().map_err(|_| "a caller panicked")??;
            }
            Ok(begun.elapsed())
        })
    }
}
