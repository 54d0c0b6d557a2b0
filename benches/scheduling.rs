//! What the scheduler does for those who wait: batches, fairness, overload, and what it adds when nobody waits.
//!
//! `cargo bench --bench scheduling` starts an agent in a process of its own, calls it over unix sockets with the Open
//! Inference Protocol, prints a table and writes `target/bench-scheduling.json`. Ways that are compared take turns, a
//! figure is the median of the rounds. `-- NAME` runs one part alone: lone, device, network, fairness or overload.
//! `-- --test` runs everything once and briefly, to see that it works.
//!
//! The device is the backend `identity`, which computes nothing and takes a known time, so that what is measured is the
//! scheduler and not the processor; for the opposite case, a small network on the processor, it is the embedded
//! classifier on the built-in engine.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program for people, on known input")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures"
)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use vaccel_agent::Device;
use vaccel_client::proto::inference::ModelInferRequest;
use vaccel_client::proto::inference::model_infer_request::InferInputTensor;
use vaccel_client::{Client, Link, Reason, SessionOptions};

/// Sockets of the agent, each a tenant.
const TENANTS: usize = 4;

/// Calls of one connection at the same time: below the agent's streams of one connection.
const PER_CONNECTION: usize = 32;

/// A device with a cost per launch, and what it costs, in microseconds.
const RUN_US: u64 = 1000;
const ROW_US: u64 = 10;
/// A call on the device with two lanes that tenants share.
const WORK_US: u64 = 2000;
const WORK_LANES: u64 = 2;

struct Effort {
    rounds: usize,
    seconds: f64,
}

struct Agent {
    process: Child,
    sockets: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn identity(width: usize, rest: &str) -> String {
    format!(
        "backend: \"identity\"\ninput [ {{ name: \"in\" data_type: TYPE_FP32 dims: [ {width} ] }} ]\n\
         output [ {{ name: \"out\" data_type: TYPE_FP32 dims: [ {width} ] }} ]\n{rest}"
    )
}

fn cost(run: u64, row: u64) -> String {
    let parameter = |name: &str, value: u64| {
        format!("parameters {{ key: \"{name}\" value {{ string_value: \"{value}\" }} }}\n")
    };
    parameter("run_us", run) + &parameter("row_us", row)
}

fn models(folder: &Path) {
    let write = |name: &str, config: &str| {
        std::fs::create_dir_all(folder.join(name)).unwrap();
        std::fs::write(folder.join(name).join("config.pbtxt"), config).unwrap();
    };
    let device = format!("max_batch_size: 64\n{}", cost(RUN_US, ROW_US));
    write("alone", &identity(4, &device));
    write("together", &identity(4, &format!("{device}dynamic_batching {{ }}\n")));
    write("nothing", &identity(4, "max_batch_size: 64\n"));
    let lanes = format!("max_batch_size: 1\ninstance_group [ {{ count: {WORK_LANES} }} ]\n");
    write("work", &identity(4, &format!("{lanes}{}", cost(WORK_US, 0))));
    let network = include_bytes!("../agent/models/digits.onnx");
    for (name, config) in [
        ("network-alone", "backend: \"tract\"\nmax_batch_size: 64\n"),
        ("network-together", "backend: \"tract\"\nmax_batch_size: 64\ndynamic_batching { }\n"),
    ] {
        write(name, config);
        std::fs::create_dir_all(folder.join(name).join("1")).unwrap();
        std::fs::write(folder.join(name).join("1/model.onnx"), network).unwrap();
    }
}

impl Agent {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        models(&folder.path().join("models"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
        for tenant in 0..TENANTS {
            command.args(["--address", &format!("unix://{path}/{tenant}")]);
        }
        command.args(["--model-repository", &format!("{path}/models"), "--store", &format!("{path}/store")]);
        let mut process =
            command.args(["--tenant-calls-max", "4096"]).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines().take(TENANTS);
        let sockets = lines.map(|line| line.unwrap().strip_prefix("listening on ").unwrap().to_owned());
        let sockets = sockets.collect();
        Self { process, sockets, _folder: folder }
    }

    /// Connections of a tenant, enough for so many calls at the same time.
    async fn connections(&self, tenant: usize, calls: usize) -> Vec<Link> {
        let mut connections = Vec::new();
        for _ in 0..calls.div_ceil(PER_CONNECTION) {
            let client = Client::builder(self.sockets[tenant].parse().unwrap()).connect().await.unwrap();
            connections.push(client.link().clone());
        }
        connections
    }
}

fn request(model: &str) -> ModelInferRequest {
    let is_network = model.starts_with("network");
    let (name, shape) = if is_network { ("image", vec![1, 1, 8, 8]) } else { ("in", vec![1, 4]) };
    let elements: i64 = shape.iter().product();
    let input = InferInputTensor { name: name.into(), datatype: "FP32".into(), shape, ..Default::default() };
    ModelInferRequest {
        model_name: model.into(),
        inputs: vec![input],
        raw_input_contents: vec![Bytes::from(vec![0; elements as usize * 4])],
        ..Default::default()
    }
}

/// What calls took, and how many there were in a second.
#[derive(Clone, Debug)]
struct Figures {
    per_second: f64,
    /// Microseconds.
    median: f64,
    p99: f64,
}

fn figures(mut took: Vec<f64>, seconds: f64) -> Figures {
    took.sort_by(f64::total_cmp);
    let at = |share: f64| took.get(((took.len() as f64 * share) as usize).min(took.len().max(1) - 1));
    let at = |share| at(share).copied().unwrap_or(f64::NAN);
    Figures { per_second: took.len() as f64 / seconds, median: at(0.5), p99: at(0.99) }
}

/// What a call may take.
const TIME: Duration = Duration::from_secs(60);

/// So many callers, each of which calls again when it has its answer.
async fn closed_loop(connections: &[Link], model: &str, callers: usize, seconds: f64) -> Figures {
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(seconds);
    let mut running = JoinSet::new();
    for caller in 0..callers {
        let (link, request) = (connections[caller % connections.len()].clone(), request(model));
        running.spawn(async move {
            let mut took = Vec::new();
            while Instant::now() < end {
                let begun = Instant::now();
                link.infer(&request, TIME).await.unwrap();
                took.push(begun.elapsed().as_secs_f64() * 1e6);
            }
            took
        });
    }
    let took = running.join_all().await.concat();
    figures(took, begin.elapsed().as_secs_f64())
}

/// What became of calls that came at fixed times.
struct Flood {
    /// Answers in time, in a second.
    good: f64,
    refused: Figures,
    late: usize,
}

/// Calls that come at fixed times, whatever becomes of them, and have so long.
async fn open_loop(connections: &[Link], model: &str, rate: f64, time: Duration, seconds: f64) -> Flood {
    let begin = tokio::time::Instant::now();
    let mut running = JoinSet::new();
    let count = (rate * seconds) as usize;
    for call in 0..count {
        tokio::time::sleep_until(begin + Duration::from_secs_f64(call as f64 / rate)).await;
        let (link, request) = (connections[call % connections.len()].clone(), request(model));
        running.spawn(async move {
            let begun = Instant::now();
            let outcome = link.infer(&request, time).await.map(drop).map_err(|error| error.reason());
            (outcome, begun.elapsed())
        });
    }
    let all = running.join_all().await;
    let good = all.iter().filter(|(outcome, took)| outcome.is_ok() && *took <= time).count();
    let is_refusal = |reason: &Reason| *reason == Reason::Overloaded;
    let refused = all.iter().filter(|(outcome, _)| outcome.as_ref().is_err_and(is_refusal));
    let refused: Vec<f64> = refused.map(|(_, took)| took.as_secs_f64() * 1e6).collect();
    let late = all.len() - good - refused.len();
    Flood { good: good as f64 / seconds, refused: figures(refused, seconds), late }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn medians(rounds: &[Figures]) -> Figures {
    let of = |figure: fn(&Figures) -> f64| median(rounds.iter().map(figure).collect());
    Figures { per_second: of(|f| f.per_second), median: of(|f| f.median), p99: of(|f| f.p99) }
}

/// Two models that take turns, with so many callers.
async fn turns(agent: &Agent, models: [&str; 2], callers: usize, effort: &Effort) -> [Figures; 2] {
    let connections = agent.connections(0, callers).await;
    let mut rounds = [Vec::new(), Vec::new()];
    for round in 0..=effort.rounds {
        for (model, figures) in models.iter().zip(&mut rounds) {
            let measured = closed_loop(&connections, model, callers, effort.seconds).await;
            // The first round is for the agent to learn, and engines to prepare themselves.
            if round > 0 {
                figures.push(measured);
            }
        }
    }
    rounds.map(|rounds| medians(&rounds))
}

/// A device in this process, with so many callers.
async fn device(rows_max: usize, run: u64, row: u64, callers: usize, seconds: f64) -> Figures {
    let (run, row) = (Duration::from_micros(run), Duration::from_micros(row));
    let device = Arc::new(Device::new(rows_max, run, row).unwrap());
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(seconds);
    let mut running = JoinSet::new();
    for _ in 0..callers {
        let device = Arc::clone(&device);
        running.spawn(async move {
            let mut took = Vec::new();
            while Instant::now() < end {
                let begun = Instant::now();
                device.call().await.unwrap();
                took.push(begun.elapsed().as_secs_f64() * 1e6);
            }
            took
        });
    }
    let took = running.join_all().await.concat();
    figures(took, begin.elapsed().as_secs_f64())
}

async fn device_batches(effort: &Effort, report: &mut Report) {
    let mut rounds = [Vec::new(), Vec::new()];
    for _ in 0..effort.rounds {
        for (rows_max, figures) in [0, 64].into_iter().zip(&mut rounds) {
            figures.push(device(rows_max, RUN_US, ROW_US, 64, effort.seconds).await);
        }
    }
    let [alone, together] = rounds.map(|rounds| medians(&rounds));
    report.line("the same device in one process, without messages");
    report.row("  one call a run", &alone);
    report.row("  together", &together);
    report.figure("  throughput, together to alone", together.per_second / alone.per_second, "x");
    report.figure("  p99 together, to a batch of 64", together.p99 / (RUN_US + 64 * ROW_US) as f64, "x");
}

async fn batches(agent: &Agent, effort: &Effort, report: &mut Report) {
    let [alone, together] = turns(agent, ["alone", "together"], 64, effort).await;
    let batch = (RUN_US + 64 * ROW_US) as f64;
    report.line(&format!("a device that takes {RUN_US} us for a run and {ROW_US} us for a row, 64 callers"));
    report.row("  one call a run", &alone);
    report.row("  together", &together);
    report.figure("  throughput, together to alone", together.per_second / alone.per_second, "x");
    report.figure("  p99 together, to a batch of 64", together.p99 / batch, "x");
}

async fn network(agent: &Agent, effort: &Effort, report: &mut Report) {
    // Two ways that are nearly the same: their tails differ by a tenth by chance in fewer rounds.
    let effort = &Effort { rounds: effort.rounds * 3, seconds: effort.seconds };
    for callers in [1, 8, 32] {
        let [alone, together] = turns(agent, ["network-alone", "network-together"], callers, effort).await;
        report.line(&format!("a small network on the processor, {callers} callers"));
        report.row("  one call a run", &alone);
        report.row("  together where that is worth it", &together);
        report.figure("  throughput, to one call a run", together.per_second / alone.per_second, "x");
        report.figure("  p99, to one call a run", together.p99 / alone.p99, "x");
    }
}

/// What a lone call takes that needs no lane, and one that does.
async fn lone(agent: &Agent, effort: &Effort, report: &mut Report) {
    let client = Client::builder(agent.sockets[0].parse().unwrap()).connect().await.unwrap();
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let mut rounds = [Vec::new(), Vec::new()];
    let calls = (effort.seconds * 2000.0) as usize;
    for _ in 0..=effort.rounds {
        for (kind, figures) in rounds.iter_mut().enumerate() {
            let mut took = Vec::new();
            for _ in 0..calls {
                let begun = Instant::now();
                if kind == 0 {
                    session.noop().await.unwrap();
                } else {
                    client.link().infer(&request("nothing"), TIME).await.unwrap();
                }
                took.push(begun.elapsed().as_secs_f64() * 1e6);
            }
            figures.push(self::figures(took, effort.seconds));
        }
    }
    let [bare, run] = rounds.map(|rounds| medians(&rounds[1..]));
    report.line("a lone call on an idle agent");
    report.row("  of nothing", &bare);
    report.row("  that runs a model which does nothing", &run);
    report.figure("  what tensors, scheduler and lane add", run.median - bare.median, "us");
    let mut alone = Vec::new();
    for _ in 0..effort.rounds {
        alone.push(device(64, 0, 0, 1, effort.seconds).await);
    }
    report.row("  scheduler and lane, in one process", &medians(&alone));
}

async fn fairness(agent: &Agent, effort: &Effort, report: &mut Report) {
    let mut connections = Vec::new();
    for tenant in 0..TENANTS {
        connections.push(agent.connections(tenant, if tenant == 0 { 256 } else { 1 }).await);
    }
    let mut alone = Vec::new();
    let mut beside = vec![Vec::new(); TENANTS];
    for _ in 0..effort.rounds {
        alone.push(closed_loop(&connections[1], "work", 1, effort.seconds).await);
        let loops = connections.iter().enumerate().map(|(tenant, connections)| {
            let callers = if tenant == 0 { 256 } else { 1 };
            let connections = connections.clone();
            let seconds = effort.seconds;
            tokio::spawn(async move { closed_loop(&connections, "work", callers, seconds).await })
        });
        for (tenant, running) in loops.collect::<Vec<_>>().into_iter().enumerate() {
            beside[tenant].push(running.await.unwrap());
        }
    }
    let alone = medians(&alone);
    let beside: Vec<Figures> = beside.iter().map(|rounds| medians(rounds)).collect();
    let share = beside.iter().map(|tenant| tenant.per_second).sum::<f64>() / TENANTS as f64;
    report.line(&format!(
        "{TENANTS} tenants on {WORK_LANES} lanes, calls of {WORK_US} us: one has 256 in flight"
    ));
    report.row("  a modest tenant (one at a time) alone", &alone);
    report.row("  the greedy one", &beside[0]);
    for tenant in &beside[1..] {
        report.row("  a modest one beside it", tenant);
    }
    let least = beside[1..].iter().map(|tenant| tenant.per_second / share).fold(f64::INFINITY, f64::min);
    let slowest = beside[1..].iter().map(|tenant| tenant.p99 / alone.p99).fold(0.0, f64::max);
    report.figure("  least share of a modest one, to a fair one", least, "x");
    report.figure("  largest p99 of a modest one, to alone", slowest, "x");
}

async fn overload(agent: &Agent, effort: &Effort, report: &mut Report) {
    let connections = agent.connections(0, 1024).await;
    let peak = closed_loop(&connections, "work", 32, effort.seconds).await;
    let time = Duration::from_millis(200);
    let flood =
        open_loop(&connections, "work", 4.0 * peak.per_second, time, effort.seconds.max(1.0) * 2.0).await;
    report.line("four times as many calls as can be served, each with 200 ms");
    report.row("  as many as can be served", &peak);
    report.row("  refused", &flood.refused);
    report.figure("  answers in time, to as many as can be", flood.good / peak.per_second, "x");
    report.figure("  computed for nobody, or late", flood.late as f64, "calls");
}

/// The table, and the same for programs.
#[derive(Default)]
struct Report(Vec<serde_json::Value>);

impl Report {
    fn line(&mut self, text: &str) {
        println!("\n{text:<48}{:>10}{:>12}{:>12}", "calls/s", "p50 us", "p99 us");
        self.0.push(serde_json::json!({ "title": text }));
    }

    fn row(&mut self, name: &str, figures: &Figures) {
        let Figures { per_second, median, p99 } = figures;
        println!("{name:<48}{per_second:>10.0}{median:>12.0}{p99:>12.0}");
        let (name, row) = (name.trim(), [per_second, median, p99]);
        self.0.push(serde_json::json!({ "name": name, "calls/s, p50 us, p99 us": row }));
    }

    fn figure(&mut self, name: &str, value: f64, unit: &str) {
        println!("{name:<48}{value:>10.2} {unit}");
        self.0.push(serde_json::json!({ "name": name.trim(), "value": value, "unit": unit }));
    }
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = |line: &str| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned());
    let cpu = cpuinfo.lines().find_map(named).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} cores of {cpu}, {}", said("uname", &["-sr"]))
}

#[tokio::main]
async fn main() {
    let smoke = std::env::args().any(|argument| argument == "--test");
    let effort = if smoke { Effort { rounds: 1, seconds: 0.1 } } else { Effort { rounds: 5, seconds: 2.0 } };
    let commit = said("git", &["describe", "--always", "--dirty"]);
    println!("{}\ncommit {commit}; {} rounds, medians", machine(), effort.rounds);
    let agent = Arc::new(Agent::start());
    let mut report = Report::default();
    let named: Vec<String> = std::env::args().skip(1).filter(|name| !name.starts_with("--")).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|named| named == name);
    if wanted("lone") {
        lone(&agent, &effort, &mut report).await;
    }
    if wanted("device") {
        device_batches(&effort, &mut report).await;
        batches(&agent, &effort, &mut report).await;
    }
    if wanted("network") {
        network(&agent, &effort, &mut report).await;
    }
    if wanted("fairness") {
        fairness(&agent, &effort, &mut report).await;
    }
    if wanted("overload") {
        overload(&agent, &effort, &mut report).await;
    }
    let whole = serde_json::json!({ "machine": machine(), "commit": commit, "rows": report.0 });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench-scheduling.json");
    std::fs::write(path, whole.to_string()).unwrap();
}
