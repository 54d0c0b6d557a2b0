//! What it costs to be remote: one image classified by a direct call, and by the same engine behind an agent in
//! another process, over unix and TCP sockets; and an empty call over both.
//!
//! `cargo bench --bench remote` prints a table and writes `target/bench-remote.json`. Rounds interleave all rows, so
//! that a change of the machine's mood meets them alike; a figure is the median of the rounds' medians. `-- --test`
//! runs one short round, to see that it works.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program for people, on known input")]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vaccel_agent::Direct;
use vaccel_agent::config::EngineConfig;
use vaccel_client::{ClassifyOptions, Client, Session, SessionOptions};

struct Effort {
    rounds: usize,
    calls: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let smoke = std::env::args().any(|argument| argument == "--test");
    let effort = if smoke { Effort { rounds: 1, calls: 10 } } else { Effort { rounds: 7, calls: 500 } };
    let folder = tempfile::tempdir().unwrap();
    let socket = format!("unix://{}/s", folder.path().display());
    let mut agent = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"))
        .args(["--engine", "tract", "--address", &socket, "--address", "tcp://127.0.0.1:0"])
        .arg("--store")
        .arg(folder.path().join("store"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(agent.stdout.take().unwrap()).lines().take(2);
    let addresses: Vec<String> =
        lines.map(|line| line.unwrap().strip_prefix("listening on ").unwrap().to_owned()).collect();

    let mut sessions = Vec::new();
    for address in &addresses {
        let client = Client::builder(address.parse().unwrap()).connect().await.unwrap();
        sessions.push(client.open_session(SessionOptions::default()).await.unwrap());
    }
    let rows = measure(&effort, &sessions).await;
    agent.kill().unwrap();
    agent.wait().unwrap();
    report(&effort, &rows);
}

const ROWS: [&str; 5] =
    ["classify, direct call", "classify, unix", "classify, tcp", "empty call, unix", "empty call, tcp"];

/// Medians of each row in each round, in microseconds.
async fn measure(effort: &Effort, sessions: &[Session]) -> Vec<Vec<f64>> {
    let image = Bytes::from_static(include_bytes!("../examples/images/digit-000-is-2.png"));
    let direct = Direct::new(&EngineConfig { engine: "tract".into(), ..EngineConfig::default() }).unwrap();
    let mut rows = vec![Vec::new(); ROWS.len()];
    for _ in 0..=effort.rounds {
        let mut times = vec![Vec::with_capacity(effort.calls); ROWS.len()];
        for _ in 0..effort.calls {
            let begun = Instant::now();
            direct.classify(std::slice::from_ref(&image), 1).unwrap();
            times[0].push(begun.elapsed());
            for (index, session) in sessions.iter().enumerate() {
                let begun = Instant::now();
                session.classify([image.clone()], ClassifyOptions::default()).await.unwrap();
                times[1 + index].push(begun.elapsed());
                let begun = Instant::now();
                session.noop().await.unwrap();
                times[3 + index].push(begun.elapsed());
            }
        }
        for (row, times) in rows.iter_mut().zip(times) {
            row.push(median(times.iter().map(Duration::as_secs_f64).collect()) * 1e6);
        }
    }
    // The first round warmed everything up.
    rows.iter().map(|row| row[1..].to_vec()).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(effort: &Effort, rows: &[Vec<f64>]) {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let commit = said("git", &["describe", "--always", "--dirty"]);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("", |(_, n)| n);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let machine = format!("{cores} cores of {cpu}, {}", said("uname", &["-sr"]));
    println!(
        "{machine}\ncommit {commit}; {} rounds of {} interleaved calls, medians\n",
        effort.rounds, effort.calls
    );
    println!("{:<24} {:>9}  {:>8}  rounds from … to", "", "µs", "x direct");
    let base = median(rows[0].clone());
    let mut json = Vec::new();
    for (name, row) in ROWS.iter().zip(rows) {
        let middle = median(row.clone());
        let (low, high) = row.iter().fold((f64::MAX, 0_f64), |(low, high), v| (low.min(*v), high.max(*v)));
        println!("{name:<24} {middle:>9.1}  {:>8.2}  {low:.1} … {high:.1}", middle / base);
        json.push(serde_json::json!({ "row": name, "median_us": middle, "rounds_us": row }));
    }
    let document = serde_json::json!({ "machine": machine, "commit": commit, "rows": json });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench-remote.json");
    std::fs::write(path, format!("{document:#}\n")).unwrap();
}
