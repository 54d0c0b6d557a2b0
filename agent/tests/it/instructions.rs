//! What a call costs the agent, in instructions: a figure that neither the machine's mood nor its speed changes, so
//! that a change for the worse of a tenth is a test that fails.
//!
//! The agent runs in callgrind, and what it executed is read before and after some hundred calls of the thin guest, so
//! that its start, the session's opening and what happens but once do not count. Between two calls the guest waits
//! until the agent sleeps: every call then takes the same way through the runtime, from being woken to sleeping again.
//!
//! The figures hold for the test profile. They hold on other processors, too: whatever the processor is, valgrind
//! shows the same one to the program, without AVX-512 and what else it cannot emulate, and so the C library and this
//! program choose the same variants of what they have several of. Only one without AVX2 would be shown as another.
//! A new compiler or C library may change them, and then they are to be recorded anew, as after a change that was
//! meant:
//!
//! ```console
//! $ VACCEL_RECORD_INSTRUCTIONS=1 ./test instructions
//! ```

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use vaccel_guest::{Arg, ArgOut, ArgType, Guest, Posix};

use crate::guest::guest;
use crate::support::{Agent, PATIENCE, repository};

/// How far a figure may be from the recorded one. A better one fails, too: kept as it is, the record would let the gain
/// be lost again unnoticed.
const TOLERANCE: f64 = 0.1;

/// Calls before those that count, and those.
const WARM_CALLS: usize = 200;
const CALLS: usize = 300;

/// Set to anything, figures are recorded instead of compared.
const RECORD: &str = "VACCEL_RECORD_INSTRUCTIONS";

const INSTALL: &str = "run agent/tests/it/instructions/install, as root, or ./test, which does";

const HEAD: &str = "\
# Instructions that the agent executes for one call, in the test profile, by architecture; see instructions.rs.
# Written by: VACCEL_RECORD_INSTRUCTIONS=1 ./test instructions
";

/// Figures of one architecture, by the name of the call.
type Figures = BTreeMap<String, u64>;

/// An agent in callgrind.
struct Counted {
    agent: Agent,
}

impl Counted {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("valgrind");
        command.args(["--quiet", "--tool=callgrind", "--vgdb=yes"]);
        command.arg(format!("--vgdb-prefix={}", folder.path().join("vgdb").display()));
        command.arg(format!("--callgrind-out-file={}", folder.path().join("counts").display()));
        command.arg(env!("CARGO_BIN_EXE_vaccel-agent"));
        command.env("TOKIO_WORKER_THREADS", "1");
        let there = Command::new("valgrind").arg("--version").output();
        assert!(there.is_ok_and(|output| output.status.success()), "valgrind does not run: {INSTALL}");
        let flags = ["--engine", "noop", "--lanes", "1", "--log", "warn"];
        Self { agent: Agent::start_command(command, folder, &["unix://{}/s"], &flags) }
    }

    /// Waits until the agent has nothing to do.
    fn rest(&self) {
        let begun = Instant::now();
        while self.agent.computes() {
            assert!(begun.elapsed() < PATIENCE, "the agent does not come to rest");
            std::thread::yield_now();
        }
    }

    /// Instructions since this was asked last.
    fn take(&self, dump: usize) -> u64 {
        self.rest();
        let folder = self.agent.folder();
        let mut command = Command::new("vgdb");
        command.arg(format!("--vgdb-prefix={}", folder.join("vgdb").display()));
        let pid = self.agent.process.id();
        let output = command.arg(format!("--pid={pid}")).arg("dump").output();
        let output = output.unwrap_or_else(|error| panic!("vgdb does not run ({error}): {INSTALL}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "vgdb cannot ask the agent, which takes ptrace: {said}");
        let counts = std::fs::read_to_string(folder.join(format!("counts.{dump}"))).unwrap();
        let total = counts.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a total");
        total.trim().parse().unwrap()
    }
}

/// One call of nothing.
fn empty(guest: &mut Guest<Posix>) {
    guest.noop().unwrap();
}

/// A call of a library on the engine that computes nothing: 64 KiB go up, or lie in shared memory, 4 KiB of them come
/// back.
fn kib_64(guest: &mut Guest<Posix>) {
    let up = vec![1; 64 << 10];
    let (before, data) = up.split_at(4 << 10);
    let read = [
        Arg { kind: ArgType::UINT8, data: &[1] },
        Arg { kind: ArgType::STRING, data: b"library\0" },
        Arg { kind: ArgType::STRING, data: b"function\0" },
        Arg { kind: ArgType::BUFFER, data },
    ];
    let mut down = vec![0; before.len()];
    let mut write = [ArgOut { kind: ArgType::BUFFER, before, data: &mut down, length: 0 }];
    guest.genop(&read, &mut write).unwrap();
    assert_eq!(write[0].length, before.len());
}

type Call = fn(&mut Guest<Posix>);

fn count() -> Figures {
    let counted = Counted::start();
    let mut guest = guest(counted.agent.address());
    let mut dump = 0;
    let mut each = |call: Call, shared_bytes| {
        guest.set_shared_bytes(shared_bytes);
        let mut calls = |count| {
            for _ in 0..count {
                call(&mut guest);
                counted.rest();
            }
            dump += 1;
            counted.take(dump)
        };
        calls(WARM_CALLS);
        calls(CALLS) / CALLS as u64
    };
    let calls = [("empty", empty as Call, 0), ("kib_64", kib_64, 0), ("kib_64_shared", kib_64, 1 << 20)];
    calls.map(|(name, call, shared_bytes)| (name.to_owned(), each(call, shared_bytes))).into()
}

fn record_path() -> PathBuf {
    repository().join("agent/tests/it/instructions/recorded.toml")
}

fn written(all: &BTreeMap<String, Figures>) -> String {
    let mut text = HEAD.to_owned();
    for (architecture, figures) in all {
        write!(text, "\n[{architecture}]\n").unwrap();
        figures.iter().for_each(|(name, figure)| writeln!(text, "{name} = {figure}").unwrap());
    }
    text
}

fn recorded(path: &Path) -> BTreeMap<String, Figures> {
    toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_call_takes_as_many_instructions_as_are_recorded() {
    if !cfg!(debug_assertions) {
        panic!("the figures hold for the test profile: test without --release");
    }
    let (counted, path, here) = (count(), record_path(), std::env::consts::ARCH);
    let mut all = recorded(&path);
    if std::env::var_os(RECORD).is_some() {
        all.insert(here.into(), counted);
        std::fs::write(path, written(&all)).unwrap();
        return;
    }
    let again = format!("`{RECORD}=1 ./test instructions` records");
    let before = all.get(here).unwrap_or_else(|| panic!("nothing is recorded for {here}: {again} it"));
    let mut complaints = Vec::new();
    for (name, &now) in &counted {
        let before = *before.get(name).unwrap_or(&0);
        println!("{name}: {now} instructions, recorded {before}");
        let ratio = now as f64 / before as f64;
        let what = format!("{name}: {now} instructions by call, {ratio:.2} of the recorded {before}");
        if ratio > 1.0 + TOLERANCE {
            complaints.push(format!("{what}. It got worse; if that is meant, {again} it"));
        } else if ratio < 1.0 - TOLERANCE {
            complaints.push(format!("{what}. It got better: keep that, {again} it"));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
