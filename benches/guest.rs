//! What the thin guest costs: an empty call and tensors of several sizes with 4 KB coming back, on a real agent and on
//! HTTP/2 servers that do nothing, against a raw blocking socket that moves as many bytes and the async client,
//! over TCP and unix sockets. Every server is a process of its own, every client this process's one thread.
//!
//! `cargo bench --bench guest` prints a table and writes `target/bench-guest.json`. Rounds interleave the rows of a
//! size, a few calls of each in turn, so that a change of the machine's mood meets them alike; a figure is the median
//! of the rounds' medians. Whether the kernel keeps client and server on one core decides about a short call and
//! stays for a round or more: the best round of each compares them in the same mood. `-- --test` runs one short
//! round, to see that it works.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    unreachable_pub,
    reason = "a program for people, on known input"
)]

#[path = "guest/peers.rs"]
mod peers;
#[path = "guest/ways.rs"]
mod ways;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use ways::{ByClient, ByGuest, BySocket, Way};

/// Bytes that come back from a call with a tensor, at most.
pub const DOWN_BYTES: usize = 4096;

/// Bytes of the tensor that goes up, 0 for a call without one, and calls of a round.
const SIZES: [(usize, usize); 6] =
    [(0, 500), (1 << 10, 500), (64 << 10, 300), (602_112, 100), (4 << 20, 30), (16 << 20, 10)];

/// Calls of one row before the next has its turn.
const BURST: usize = 10;

fn main() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("--peers") {
        return peers::serve(Path::new(&arguments.next().unwrap()));
    }
    let smoke = std::env::args().any(|argument| argument == "--test");
    let rounds = if smoke { 1 } else { 9 };
    let folder = tempfile::tempdir().unwrap();
    let own = std::env::current_exe().unwrap();
    let peers = Server::start(Command::new(own).arg("--peers").arg(folder.path()), "", 6);
    let unix = format!("unix://{}/agent", folder.path().display());
    let mut agent = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    let agent = agent.args(["--engine", "tract", "--address", "tcp://127.0.0.1:0", "--address", &unix]);
    let agent = agent.arg("--store").arg(folder.path().join("store"));
    let agent = Server::start(agent, "listening on ", 2);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut rows = Vec::new();
    for (size, _) in SIZES {
        for (socket, name) in ["tcp", "unix"].into_iter().enumerate() {
            let peer = |kind: usize| &*peers.addresses[2 * kind + socket];
            let agent = &*agent.addresses[socket];
            let mut row = |what, way: Box<dyn Way>| rows.push(Row::new(size, name, what, way));
            row("raw socket", Box::new(BySocket::new(peer(0), size)));
            row("guest, sink", Box::new(ByGuest::new(peer(1), size)));
            row("guest, large sink", Box::new(ByGuest::new(peer(2), size)));
            row("guest, agent", Box::new(ByGuest::new(agent, size)));
            row("async client, agent", Box::new(ByClient::new(&runtime, agent, size)));
        }
    }
    // The first round warms everything up.
    for round in 0..=rounds {
        for (size, calls) in SIZES {
            measure(
                rows.iter_mut().filter(|row| row.size == size).collect(),
                if smoke { BURST } else { calls },
            );
        }
        if round == 0 {
            rows.iter_mut().for_each(Row::forget);
        }
    }
    report(rounds, &rows);
}

/// A process that tells where it listens.
struct Server {
    process: Child,
    addresses: Vec<String>,
}

impl Server {
    /// Starts it; it says `before` before each address.
    fn start(command: &mut Command, before: &str, addresses: usize) -> Self {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines().take(addresses);
        let addresses = lines.map(|line| line.unwrap().strip_prefix(before).unwrap().to_owned()).collect();
        Self { process, addresses }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the thread has used up.
#[derive(Clone, Copy, Default)]
struct Used {
    cpu_ns: u64,
    faults: u64,
    system_calls: u64,
}

impl Used {
    fn now(way: &mut dyn Way) -> Self {
        // The kernel brings its accounts up to date when the thread lets others run.
        std::thread::yield_now();
        let file =
            |name: &str| std::fs::read_to_string(format!("/proc/thread-self/{name}")).unwrap_or_default();
        let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
        let cpu_ns = number(file("schedstat").split(' ').next());
        // Behind the name come nine fields and then the minor faults.
        let faults = number(file("stat").rsplit(')').next().unwrap_or_default().split(' ').nth(8));
        Self { cpu_ns, faults, system_calls: way.system_calls() }
    }
}

/// One way to make calls of one size.
struct Row<'a> {
    size: usize,
    socket: &'static str,
    what: &'static str,
    way: Box<dyn Way + 'a>,
    times: Vec<f64>,
    /// Medians of the rounds, in microseconds.
    rounds: Vec<f64>,
    calls: u64,
    used: Used,
}

impl<'a> Row<'a> {
    fn new(size: usize, socket: &'static str, what: &'static str, way: Box<dyn Way + 'a>) -> Self {
        let (times, rounds, used) = (Vec::new(), Vec::new(), Used::default());
        Self { size, socket, what, way, times, rounds, calls: 0, used }
    }

    fn burst(&mut self) {
        let before = Used::now(&mut *self.way);
        for _ in 0..BURST {
            let begun = Instant::now();
            self.way.call();
            self.times.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        let after = Used::now(&mut *self.way);
        self.calls += BURST as u64;
        self.used.cpu_ns += after.cpu_ns - before.cpu_ns;
        self.used.faults += after.faults - before.faults;
        self.used.system_calls += after.system_calls - before.system_calls;
    }

    fn forget(&mut self) {
        (self.calls, self.used) = (0, Used::default());
        self.rounds.clear();
    }

    fn range(&self) -> (f64, f64) {
        self.rounds.iter().fold((f64::MAX, 0.0), |(low, high), round| (low.min(*round), high.max(*round)))
    }

    /// Prints the row and gives it for programs.
    fn report(&self, raw: &Self) -> serde_json::Value {
        let Self { size, socket, what, rounds, used, .. } = self;
        let (middle, (low, high)) = (median(rounds.clone()), self.range());
        let ratio = median(rounds.iter().zip(&raw.rounds).map(|(own, raw)| own / raw).collect());
        let best = low / raw.range().0;
        let each = |count: u64| count as f64 / self.calls as f64;
        let [cpu, system_calls, faults] = [used.cpu_ns, used.system_calls, used.faults].map(each);
        let cpu = cpu / 1e3;
        let calls = if used.system_calls > 0 { format!("{system_calls:.1}") } else { String::new() };
        let spread = format!("{low:.1} … {high:.1}");
        println!(
            "{size:>8} {socket:<4} {what:<19} {middle:>8.1} {ratio:>6.2} {best:>6.2}  {spread:<18} {cpu:>7.1} \
             {calls:>6} {faults:>6.1}"
        );
        serde_json::json!({
            "bytes": size, "socket": socket, "row": what, "median_us": middle, "x_raw": ratio, "x_best": best,
            "rounds_us": rounds, "cpu_us": cpu, "system_calls": system_calls, "page_faults": faults,
        })
    }
}

/// One round of rows in turn.
fn measure(mut rows: Vec<&mut Row<'_>>, calls: usize) {
    for _ in 0..calls / BURST {
        rows.iter_mut().for_each(|row| row.burst());
    }
    for row in rows {
        let times = std::mem::take(&mut row.times);
        row.rounds.push(median(times));
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn machine() -> [String; 2] {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let commit = said("git", &["describe", "--always", "--dirty"]);
    [format!("{cores} cores of {cpu}, {}", said("uname", &["-sr"])), commit]
}

fn report(rounds: usize, rows: &[Row<'_>]) {
    let [machine, commit] = machine();
    println!(
        "{machine}\ncommit {commit}; medians of {rounds} interleaved rounds; x raw is the median of the rounds'"
    );
    println!(
        "ratios, x best that of the best rounds; CPU, system calls and page faults are the client's, by call\n"
    );
    println!(
        "{:>8} {:<4} {:<19} {:>8} {:>6} {:>6}  {:<18} {:>7} {:>6} {:>6}",
        "bytes", "", "", "µs", "x raw", "x best", "rounds from … to", "CPU µs", "calls", "faults"
    );
    let mut json = Vec::new();
    for row in rows {
        let raw = rows.iter().find(|other| (other.size, other.socket) == (row.size, row.socket)).unwrap();
        json.push(row.report(raw));
    }
    let document = serde_json::json!({ "machine": machine, "commit": commit, "rows": json });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench-guest.json");
    std::fs::write(path, format!("{document:#}\n")).unwrap();
}
