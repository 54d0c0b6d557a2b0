//! The guest with servers and proxies that others wrote: tonic as it is, gRPC's own library (for Python), nghttpx and
//! HAProxy. `install` beside this file brings them.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "tests"
)]

mod tonic_server;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vaccel_guest::{
    DType, Fault, File, Guest, Input, Label, NoMemory, Output, Posix, Ready, Reason, ResourceId,
    ResourceKind, Transport,
};

/// Longest message the servers take.
const MESSAGE_BYTES_MAX: usize = 24 << 20;

/// A server in a process of its own, killed when dropped.
struct Server(Child);

impl Server {
    fn start(command: &mut Command) -> Self {
        let program = command.get_program().to_owned();
        let started = command.stdin(Stdio::null()).spawn();
        Self(started.unwrap_or_else(|error| panic!("{} (run ./test once): {error}", program.display())))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// gRPC's own library.
fn python(path: &Path, age_ms: u32) -> Server {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(here.join("../../target/interop/python/bin/python"));
    command.arg(here.join("tests/interop/server.py")).arg(path).arg(age_ms.to_string());
    Server::start(&mut command)
}

/// A proxy between two sockets, HTTP/2 on both.
fn nghttpx(folder: &Path, from: &Path, to: &Path) -> Server {
    let mut command = Command::new("/usr/sbin/nghttpx");
    command.args(["--conf=/dev/null", "--workers=1", "--single-process", "--log-level=FATAL"]);
    command.arg(format!("--frontend=unix:{};no-tls", from.display()));
    command.arg(format!("--backend=unix:{};;proto=h2", to.display()));
    command.arg(format!("--pid-file={}", folder.join("pid").display()));
    Server::start(&mut command)
}

fn haproxy(folder: &Path, from: &Path, to: &Path) -> Server {
    let configuration = folder.join("haproxy.cfg");
    let text = format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
         frontend guests\n bind unix@{} proto h2\n default_backend agent\n\
         backend agent\n server agent unix@{} proto h2\n",
        from.display(),
        to.display(),
    );
    std::fs::write(&configuration, text).unwrap();
    Server::start(Command::new("/usr/sbin/haproxy").arg("-q").arg("-f").arg(configuration))
}

/// A guest of a server that is starting: the guest itself waits for it.
fn guest(path: &Path) -> Guest<Posix> {
    Guest::new(format!("unix://{}", path.display()).parse().unwrap())
}

fn echo(guest: &mut Guest<Posix>, model: &ResourceId, size: usize) -> vaccel_guest::Result<()> {
    let data: Vec<u8> = (0..size).map(|at| (at ^ at >> 7 ^ at >> 15) as u8).collect();
    let mut place = vec![0; size];
    let input = Input { name: "x", dtype: DType::U8, shape: &[i64::try_from(size).unwrap()], data: &data };
    guest.run(model, &[input], &["x"], &mut [Output::new(&mut place)])?;
    assert!(place == data, "{size} bytes");
    Ok(())
}

/// What servers say of a message that is too large for them.
const TOO_LARGE: &[Reason] = &[Reason::MessageTooLarge, Reason::QuotaExceeded];

/// Everything a guest can ask for.
fn converse(path: &Path, too_large: &[Reason]) {
    let mut guest = guest(path);
    assert_eq!(guest.info().unwrap().version.as_str(), "interop", "{}", guest.message());
    for _ in 0..100 {
        let timings = guest.noop().unwrap();
        assert_eq!((timings.queue_us, timings.run_us, timings.batch_size), (1, 2, 3));
    }
    let content: Vec<u8> = (0..3_000_000_u32).map(|at| (at >> 5) as u8).collect();
    let files = [File { name: "m", content: &content }, File { name: "empty", content: b"" }];
    let model = guest.register(ResourceKind::Model, &files).unwrap();
    for size in [0, 1, 15, 16_384, 65_400, 65_536, 1 << 20, 20 << 20] {
        echo(&mut guest, &model, size).unwrap();
    }
    labels_and_errors(&mut guest);
    // More than the server takes: it says so before it has everything, each in its way.
    let error = echo(&mut guest, &model, 30 << 20).unwrap_err();
    assert!(too_large.contains(&error.reason), "{error:?} {}", guest.message());
    guest.renew().unwrap();
    guest.unregister(&model).unwrap();
    guest.close().unwrap();
}

fn labels_and_errors(guest: &mut Guest<Posix>) {
    let mut labels = [Label::default(); 99];
    let (count, _) = guest.classify(None, &[b"one", &[2; 40_000], b""], &mut labels[..6]).unwrap();
    assert_eq!((count, labels[5].image, labels[5].index, labels[5].name.as_str()), (6, 2, 1, "class 1"));
    guest
        .classify(None, &[b"x"], &mut labels[..97])
        .expect("asked again after the time that the server says");
    let error = guest.classify(None, &[b"x"], &mut labels[..98]).unwrap_err();
    assert_eq!((error.reason, guest.message()), (Reason::BadArgument, "100 % é"));
    guest.set_deadline_ms(200);
    let begun = Instant::now();
    let error = guest.classify(None, &[b"x"], &mut labels).unwrap_err();
    // tonic cancels by itself at the deadline that it is told, and may be a moment earlier.
    assert!(matches!(error.reason, Reason::Deadline | Reason::Cancelled), "{}", guest.message());
    assert!(begun.elapsed() >= Duration::from_millis(150));
    guest.set_deadline_ms(60_000);
    guest.noop().unwrap();
}

/// A folder for sockets, and two paths in it.
fn sockets() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (front, back) = (folder.path().join("front"), folder.path().join("back"));
    (folder, front, back)
}

#[test]
fn a_guest_of_tonic() {
    let (_folder, _, path) = sockets();
    tonic_server::serve(&path);
    converse(&path, TOO_LARGE);
}

#[test]
fn a_guest_of_grpc_for_python() {
    let (_folder, _, path) = sockets();
    let _server = python(&path, 0);
    converse(&path, TOO_LARGE);
}

type Proxy = fn(&Path, &Path, &Path) -> Server;

fn behind(proxy: Proxy) {
    let (folder, front, back) = sockets();
    tonic_server::serve(&back);
    let _proxy = proxy(folder.path(), &front, &back);
    converse(&front, TOO_LARGE);
    let (folder, front, back) = sockets();
    let _server = python(&back, 0);
    // A proxy that finds nothing behind it says so at once.
    guest(&back).info().unwrap();
    let _proxy = proxy(folder.path(), &front, &back);
    converse(&front, TOO_LARGE);
}

#[test]
fn a_guest_behind_nghttpx() {
    behind(nghttpx);
}

#[test]
fn a_guest_behind_haproxy() {
    behind(haproxy);
}

#[test]
fn a_guest_of_grpc_for_python_behind_both_proxies() {
    let (folder, front, back) = sockets();
    let _server = python(&back, 0);
    let between = folder.path().join("between");
    // A proxy that finds nothing behind it says so at once.
    guest(&back).info().unwrap();
    let _inner = haproxy(folder.path(), &between, &back);
    guest(&between).info().unwrap();
    let _outer = nghttpx(folder.path(), &front, &between);
    // On this way the server's word is lost: what arrives is RST_STREAM.
    converse(&front, &[TOO_LARGE, &[Reason::BackendFailed]].concat());
}

#[test]
fn a_server_that_says_goodbye_again_and_again_loses_no_call() {
    let (_folder, _, path) = sockets();
    let _server = python(&path, 50);
    let posix: Posix = format!("unix://{}", path.display()).parse().unwrap();
    let mut guest = Guest::new(Counted { posix, connections: 0 });
    guest.noop().unwrap();
    let begun = Instant::now();
    let mut calls = 0;
    while guest.transport().connections < 6 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{calls} calls over one connection");
        guest.noop().unwrap_or_else(|error| panic!("after {calls}: {error:?} {}", guest.message()));
        calls += 1;
    }
}

#[test]
fn a_proxy_without_a_server_is_told_from_an_agent() {
    for proxy in [nghttpx, haproxy] {
        let (folder, front, back) = sockets();
        let _proxy = proxy(folder.path(), &front, &back);
        let mut guest = guest(&front);
        guest.set_deadline_ms(2000);
        let error = guest.noop().unwrap_err();
        assert_eq!(error.reason, Reason::Unreachable, "{}", guest.message());
    }
}

/// Sockets, and how often one was opened.
struct Counted {
    posix: Posix,
    connections: usize,
}

impl Transport for Counted {
    type Memory = NoMemory;

    fn authority(&self) -> &str {
        self.posix.authority()
    }

    fn connect(&mut self, until: u64) -> Result<(), Fault> {
        self.posix.connect(until).inspect(|()| self.connections += 1)
    }

    fn write(&mut self, pieces: &[&[u8]]) -> Result<usize, Fault> {
        self.posix.write(pieces)
    }

    fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        self.posix.read(first, second)
    }

    fn wait(&mut self, write: bool, until: u64) -> Result<Ready, Fault> {
        self.posix.wait(write, until)
    }

    fn pause(&mut self, until: u64) {
        self.posix.pause(until);
    }

    fn close(&mut self) {
        self.posix.close();
    }

    fn now(&mut self) -> u64 {
        self.posix.now()
    }
}
