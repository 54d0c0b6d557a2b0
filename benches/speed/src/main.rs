//! What a call costs: this project's guests and clients on the agent beside raw sockets, tonic, ttrpc and Python's
//! gRPC, every client and every server a process of its own, over TCP and unix sockets.
//!
//! `benches/speed/run` builds all there is to build, prints tables and writes `target/bench-speed.json` and
//! `target/bench-speed.svg`. Rounds interleave all rows, a few calls of each in turn, so that a change of the machine's
//! mood meets them alike. What it cannot know: what a real network adds, and what more cores would change.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

mod burst;
mod contract;
mod crowd;
mod machine;
mod peers;
mod plot;
mod process;
mod report;
mod rows;
mod scale;
mod shape;
mod usage;
mod wan;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What breaks a measurement, in words.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Rounds that count; one more before them warms everything up.
const ROUNDS: usize = 9;

const USAGE: &str =
    "usage: vaccel-speed --agent PROGRAM --out FOLDER [--python PROGRAM] [--test] [--long] [--only WORD]...";

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    rounds: usize,
    /// One turn of few calls in each round.
    tiny: bool,
    /// More time where time is what counts.
    long: bool,
}

/// What the command line says.
#[derive(Debug, Default)]
struct Flags {
    programs: process::Programs,
    out: PathBuf,
    test: bool,
    long: bool,
    only: Vec<String>,
}

impl Flags {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let mut flags = Self::default();
        while let Some(flag) = arguments.next() {
            let mut value = || arguments.next().ok_or(USAGE);
            match &*flag {
                "--agent" => flags.programs.agent = value()?.into(),
                "--python" => flags.programs.python = Some(value()?.into()),
                "--out" => flags.out = value()?.into(),
                "--only" => flags.only.push(value()?),
                "--test" => flags.test = true,
                "--long" => flags.long = true,
                _ => return Err(USAGE.into()),
            }
        }
        if flags.programs.agent.as_os_str().is_empty() || flags.out.as_os_str().is_empty() {
            return Err(USAGE.into());
        }
        Ok(flags)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["--serve", kind, folder] => peers::serve(kind, Path::new(folder)).map(|()| true),
        ["--call", kind, tcp, unix] => burst::answer(kind, [tcp, unix]).map(|()| true),
        _ => Flags::parse(arguments.into_iter()).and_then(|flags| measure(&flags)),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("vaccel-speed: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Measures and reports. Returns whether everything that was asked for was measured.
fn measure(flags: &Flags) -> Result<bool, Failure> {
    let effort = Effort { rounds: if flags.test { 1 } else { ROUNDS }, tiny: flags.test, long: flags.long };
    let wanted = |name: &str| flags.only.iter().all(|word| name.contains(word.as_str()));
    let mut rows = rows::all(&wanted);
    let mut crowds = crowd::all(&wanted);
    let sockets = crowd::memory_sockets(&wanted);
    let scale = scale::Wanted::new(&wanted);
    let mut wan = wan::all(&wanted);
    let is_nothing = rows.is_empty() && crowds.is_empty() && sockets.is_empty();
    if is_nothing && scale.is_nothing() && wan.is_nothing() {
        return Err("nothing has all of these words in its name".into());
    }
    if flags.programs.python.is_none() {
        let of_python = rows.iter_mut().filter(|row| row.peer.is_python());
        of_python.for_each(|row| row.leave_out(process::NO_PYTHON));
    }
    let kinds = rows.iter().map(|row| row.peer).chain(crowds.iter().map(|crowd| crowd.peer));
    let mut pairs = process::Pairs::start(&flags.programs, kinds);
    if !rows.is_empty() {
        rows::measure(&mut rows, &mut pairs, effort);
    }
    let peaks = pairs.peaks();
    crowd::measure(&mut crowds, &mut pairs, effort);
    drop(pairs);
    let memory = sockets.into_iter().map(|socket| crowd::memory(&flags.programs, socket)).collect();
    let scale = scale::measure(&flags.programs, &scale, effort);
    wan::measure(&mut wan, &flags.programs, effort);

    let machine = machine::Machine::this();
    let report = report::Report { machine, effort, rows, peaks, crowds, memory, scale, wan };
    print!("{}", report.text());
    std::fs::create_dir_all(&flags.out)?;
    std::fs::write(flags.out.join("bench-speed.json"), format!("{:#}\n", report.json()))?;
    std::fs::write(flags.out.join("bench-speed.svg"), plot::svg(&report))?;
    Ok(report.is_whole())
}
