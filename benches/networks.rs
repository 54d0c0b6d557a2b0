//! What it costs that a network runs on the other side of a socket: ONNX Runtime in this process, and behind an agent
//! in another one over unix and TCP sockets, with networks of the shapes of MobileNetV2 and ResNet-50.
//!
//! `cargo bench --bench networks` prints a table and writes `target/bench-networks.json`. The ways take turns; a figure
//! is the median of the rounds' medians, a ratio the median of the rounds' ratios. `-- --test` runs the smaller network
//! once, to see that it works. The library is `$ORT_DYLIB_PATH`, or the one that `./test` installs.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program for people, on known input")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures"
)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vaccel_agent::Network;
use vaccel_agent::config::EngineConfig;
use vaccel_agent::networks::{SIDE, mobilenet, resnet};
use vaccel_client::proto::inference::ModelInferRequest;
use vaccel_client::proto::inference::model_infer_request::InferInputTensor;
use vaccel_client::{Client, Link, Tensor};

fn library() -> PathBuf {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/onnxruntime/libonnxruntime.so");
    std::env::var_os("ORT_DYLIB_PATH").map_or(installed, PathBuf::from)
}

struct Agent {
    process: Child,
    addresses: Vec<String>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Agent {
    fn start(folder: &Path) -> Self {
        let path = folder.display();
        let mut process = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"))
            .args(["--address", &format!("unix://{path}/s"), "--address", "tcp://127.0.0.1:0"])
            .args(["--model-repository", &format!("{path}/models"), "--store", &format!("{path}/store")])
            .arg("--onnxruntime")
            .arg(library())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines().take(2);
        let addresses = lines.map(|line| line.unwrap().strip_prefix("listening on ").unwrap().to_owned());
        let addresses = addresses.collect();
        Self { process, addresses }
    }
}

/// What a call may take.
const TIME: Duration = Duration::from_secs(60);

async fn call(link: &Link, name: &str, image: &Tensor) -> Bytes {
    let (datatype, shape) = ("FP32".to_owned(), image.shape.clone());
    let input = InferInputTensor { name: "image".into(), datatype, shape, ..Default::default() };
    let request = ModelInferRequest {
        model_name: name.into(),
        inputs: vec![input],
        raw_input_contents: vec![image.data.clone()],
        ..Default::default()
    };
    link.infer(&request, TIME).await.unwrap().raw_output_contents.remove(0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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

/// Medians of each round, in milliseconds: direct, over unix, over TCP.
async fn measure(
    agent: &[Link],
    network: &Network,
    name: &str,
    batch: usize,
    rounds: usize,
    calls: usize,
) -> Vec<[f64; 3]> {
    let pixels: Vec<f32> =
        (0..batch * 3 * SIDE * SIDE).map(|index| (index % 255) as f32 / 255.0 - 0.5).collect();
    let image = Tensor::new(&[batch as i64, 3, SIDE as i64, SIDE as i64], &pixels).unwrap();
    let expected = network.run(image.clone()).unwrap();
    let mut all = Vec::new();
    for round in 0..=rounds {
        let mut took = [const { Vec::new() }; 3];
        for _ in 0..calls {
            let begun = Instant::now();
            network.run(image.clone()).unwrap();
            took[0].push(begun.elapsed().as_secs_f64() * 1e3);
            for (client, took) in agent.iter().zip(&mut took[1..]) {
                let begun = Instant::now();
                let scores = call(client, name, &image).await;
                took.push(begun.elapsed().as_secs_f64() * 1e3);
                assert_eq!(scores, expected.data, "the same network gives the same");
            }
        }
        // The first round loads the network, and makes it warm.
        if round > 0 {
            all.push(took.map(median));
        }
    }
    all
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let smoke = std::env::args().any(|argument| argument == "--test");
    let folder = tempfile::tempdir().unwrap();
    let networks: Vec<(&str, Bytes)> = if smoke {
        vec![("mobilenet-v2", mobilenet())]
    } else {
        vec![("mobilenet-v2", mobilenet()), ("resnet-50", resnet())]
    };
    for (name, network) in &networks {
        let version = folder.path().join("models").join(name).join("1");
        std::fs::create_dir_all(&version).unwrap();
        std::fs::write(version.join("model.onnx"), network).unwrap();
    }
    let agent = Agent::start(folder.path());
    let mut clients = Vec::new();
    for address in &agent.addresses {
        let client = Client::builder(address.parse().unwrap()).connect().await.unwrap();
        clients.push(client.link().clone());
    }
    let (rounds, calls) = if smoke { (1, 1) } else { (7, 5) };
    let commit = said("git", &["describe", "--always", "--dirty"]);
    println!("{}\ncommit {commit}; {rounds} rounds of {calls} calls each way, medians", machine());
    println!("\n{:<32}{:>12}{:>12}{:>12}   ratios to direct", "milliseconds", "direct", "unix", "tcp");
    let config = EngineConfig { onnxruntime: Some(library()), ..EngineConfig::default() };
    let mut rows = Vec::new();
    for (name, bytes) in networks {
        let network = Network::load(&config, bytes).unwrap();
        for batch in [1, 8] {
            let all = measure(&clients, &network, name, batch, rounds, calls).await;
            let [direct, unix, tcp] =
                [0, 1, 2].map(|way| median(all.iter().map(|round| round[way]).collect()));
            let ratio = |way: usize| median(all.iter().map(|round| round[way] / round[0]).collect());
            let ratios = [ratio(1), ratio(2)];
            let title = format!("{name}, batch {batch}");
            println!("{title:<32}{direct:>12.2}{unix:>12.2}{tcp:>12.2}   {:.3}  {:.3}", ratios[0], ratios[1]);
            let ms = [direct, unix, tcp];
            rows.push(serde_json::json!({ "network": name, "batch": batch, "ms": ms, "ratios": ratios }));
        }
    }
    let whole = serde_json::json!({ "machine": machine(), "commit": commit, "rows": rows });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench-networks.json");
    std::fs::write(path, whole.to_string()).unwrap();
}
