//! Processes that are measured: each peer has a server and a client of its own.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use tempfile::TempDir;

use crate::Failure;
use crate::peers::{self, Peer, Program, SOCKET, TTRPC_NODELAY};
use crate::shape::{Shape, Socket};
use crate::usage::{self, Usage};

/// A process that says nothing for so long hangs: calls on the agent have ended by themselves before.
const PATIENCE: Duration = Duration::from_secs(90);

/// Python's server and client.
const GRPCIO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/grpcio.py");

/// Why peers in Python are left out.
pub(crate) const NO_PYTHON: &str = "grpcio is not installed, for python3-venv is missing";

/// What every server says before each of its addresses.
const LISTENING: &str = "listening on ";

/// Programs of others.
#[derive(Debug, Default)]
pub(crate) struct Programs {
    pub(crate) agent: PathBuf,
    /// A Python that has grpcio.
    pub(crate) python: Option<PathBuf>,
}

/// A process with which lines are exchanged. It ends when this is dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    /// Why nothing can be asked any more: what came later would be no answer to what was asked then.
    broken: Option<String>,
}

impl Process {
    fn start(mut command: Command) -> Result<Self, Failure> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (stdin, stdout) = child.stdin.take().zip(child.stdout.take()).ok_or("it has no pipes")?;
        // Nobody asks twice before an answer, so there is at most one line to keep.
        let (sender, lines) = sync_channel(1);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, stdin, lines, broken: None })
    }

    fn line(&self) -> Result<String, Failure> {
        self.lines.recv_timeout(PATIENCE).map_err(|error| match error {
            RecvTimeoutError::Timeout => format!("no answer in {} s", PATIENCE.as_secs()).into(),
            RecvTimeoutError::Disconnected => "its process ended".into(),
        })
    }

    fn ask(&mut self, question: &str) -> Result<String, Failure> {
        if let Some(why) = &self.broken {
            return Err(why.clone().into());
        }
        let asked = self.stdin.write_all(question.as_bytes()).map_err(Failure::from);
        let answer =
            asked.and_then(|()| self.line()).inspect_err(|why| self.broken = Some(why.to_string()))?;
        match answer.strip_prefix("failed: ") {
            Some(why) => Err(why.into()),
            None => Ok(answer),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program of a peer's server or client, without its arguments.
fn program(programs: &Programs, peer: &Peer, program: Program) -> Result<Command, Failure> {
    let mut command = match program {
        Program::Own(_) => Command::new(std::env::current_exe()?),
        Program::Agent(_) => Command::new(&programs.agent),
        Program::Python => {
            let python = programs.python.as_ref().ok_or(NO_PYTHON)?;
            let mut command = Command::new(python);
            command.arg(GRPCIO);
            command
        }
    };
    // ttrpc reads it where it makes a socket.
    command.env_remove(TTRPC_NODELAY);
    if peer.nodelay {
        command.env(TTRPC_NODELAY, "1");
    }
    Ok(command)
}

fn server(programs: &Programs, peer: &Peer, folder: &Path, flags: &[String]) -> Result<Command, Failure> {
    let mut command = program(programs, peer, peer.server)?;
    match peer.server {
        Program::Own(kind) => command.args(["--serve", kind]).arg(folder),
        Program::Python => command.arg("serve").arg(folder),
        Program::Agent(engine) => {
            let unix = format!("unix://{}", folder.join(SOCKET).display());
            command.args(["--engine", engine, "--log", "warn", "--store"]).arg(folder.join("store"));
            // Guests that have no turn do not answer whether they are still there, and must find their sessions again.
            command.args(["--session-lease", "3600", "--address", "tcp://127.0.0.1:0", "--address", &unix]);
            command.args(flags)
        }
    };
    Ok(command)
}

fn client(programs: &Programs, peer: &Peer, addresses: &[String; 2]) -> Result<Command, Failure> {
    let mut command = program(programs, peer, peer.client)?;
    match peer.client {
        Program::Own(kind) => command.args(["--call", kind]),
        Program::Python => command.arg("call"),
        Program::Agent(_) => return Err("the agent is no client".into()),
    };
    command.args(addresses);
    Ok(command)
}

/// A peer's server and its client.
#[derive(Debug)]
pub(crate) struct Pair {
    // In the order in which they go.
    client: Process,
    server: Process,
    /// Where the server listens: over TCP, and on a unix socket.
    addresses: [String; 2],
    _folder: TempDir,
}

impl Pair {
    pub(crate) fn start(programs: &Programs, peer: &Peer) -> Result<Self, Failure> {
        Self::start_with(programs, peer, &[], |_| Ok(()))
    }

    /// The same, an agent with further flags, and a client that is told where to go by `lead`.
    pub(crate) fn start_with(
        programs: &Programs,
        peer: &Peer,
        flags: &[String],
        lead: impl FnOnce(&mut [String; 2]) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let folder = tempfile::tempdir()?;
        let server = Process::start(server(programs, peer, folder.path(), flags)?)?;
        let address = || -> Result<String, Failure> {
            let line = server.line()?;
            let address = line.strip_prefix(LISTENING).ok_or_else(|| format!("the server said: {line}"))?;
            Ok(address.to_owned())
        };
        let addresses = [address()?, address()?];
        let mut known = addresses.clone();
        lead(&mut known)?;
        let client = Process::start(client(programs, peer, &known)?)?;
        Ok(Self { client, server, addresses, _folder: folder })
    }

    /// Where the server listens.
    pub(crate) fn address(&self, socket: Socket) -> &str {
        let [tcp, unix] = &self.addresses;
        match socket {
            Socket::Tcp => tcp,
            Socket::Unix => unix,
        }
    }

    fn ask(&mut self, question: &str) -> Result<String, Failure> {
        let answer = self.client.ask(question);
        if answer.is_err()
            && let Ok(Some(status)) = self.server.child.try_wait()
        {
            self.client.broken = Some(format!("the server ended: {status}"));
        }
        answer
    }

    /// Makes calls; how long each took, in microseconds.
    pub(crate) fn call(&mut self, socket: Socket, shape: Shape, calls: usize) -> Result<Vec<f64>, Failure> {
        let answer = self.ask(&format!("call {} {} {} {calls}\n", socket.name(), shape.up, way(shape)))?;
        answer.split_whitespace().map(|time| Ok(time.parse::<f64>()? / 1e3)).collect()
    }

    /// Makes calls from several callers at the same time; how many there were in a second.
    pub(crate) fn crowd(&mut self, socket: Socket, shape: Shape, crowd: Crowded) -> Result<f64, Failure> {
        let Crowded { callers, calls } = crowd;
        let question = format!("crowd {} {} {} {callers} {calls}\n", socket.name(), shape.up, way(shape));
        let seconds = self.ask(&question)?.parse::<f64>()? / 1e9;
        Ok((callers * calls) as f64 / seconds)
    }

    /// What client and server have used.
    pub(crate) fn usage(&self) -> Result<[Usage; 2], Failure> {
        Ok([Usage::of(self.client.child.id())?, Usage::of(self.server.child.id())?])
    }

    /// The memory the server has, in bytes.
    pub(crate) fn resident_bytes(&self) -> Result<i64, Failure> {
        usage::resident_bytes(self.server.child.id())
    }

    /// The most memory the server had, in bytes.
    pub(crate) fn peak_bytes(&self) -> Result<i64, Failure> {
        usage::peak_bytes(self.server.child.id())
    }
}

fn way(shape: Shape) -> &'static str {
    if shape.echo { "echo" } else { "cut" }
}

/// Callers at the same time, and the calls that each makes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Crowded {
    pub(crate) callers: usize,
    pub(crate) calls: usize,
}

/// The processes of all peers that take part, or why a peer has none.
#[derive(Debug)]
pub(crate) struct Pairs(BTreeMap<&'static str, Result<Pair, String>>);

impl Pairs {
    pub(crate) fn start(programs: &Programs, peers: impl Iterator<Item = &'static Peer>) -> Self {
        let mut pairs = BTreeMap::new();
        for peer in peers {
            let start = || Pair::start(programs, peer).map_err(|failure| failure.to_string());
            pairs.entry(peer.name).or_insert_with(start);
        }
        Self(pairs)
    }

    pub(crate) fn of(&mut self, peer: &Peer) -> Result<&mut Pair, Failure> {
        match self.0.get_mut(peer.name) {
            Some(Ok(pair)) => Ok(pair),
            Some(Err(why)) => Err(why.clone().into()),
            None => Err("it was not started".into()),
        }
    }

    /// The most memory that each server had, in bytes.
    pub(crate) fn peaks(&self) -> Vec<(&'static str, i64)> {
        let peak = |peer: &'static Peer| {
            let pair = self.0.get(peer.name)?.as_ref().ok()?;
            Some((peer.name, pair.peak_bytes().ok()?))
        };
        peers::ALL.iter().filter_map(peak).collect()
    }
}
