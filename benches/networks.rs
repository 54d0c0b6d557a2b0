//! What it costs that a network runs on the other side of a socket: ONNX Runtime in this process, and behind an agent
//! in another one over unix and TCP sockets, with networks of the shapes of MobileNetV2 and ResNet-50.
//!
//! `cargo bench --bench networks` prints a table and writes `target/bench-networks.json`. The ways take turns; a figure
//! is the median of the rounds' medians, a ratio the median of the rounds' ratios. `-- --test` runs the smaller network
//! once, to see that it works. The library is `$ORT_DYLIB_PATH`, or the one that `./test` installs.
//!
//! The networks are made here, with weights that look random: what they say means nothing, and takes as long.

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
use prost::encoding::{WireType, encode_key, encode_varint};
use vaccel_agent::Network;
use vaccel_agent::config::EngineConfig;
use vaccel_client::proto::inference::ModelInferRequest;
use vaccel_client::proto::inference::model_infer_request::InferInputTensor;
use vaccel_client::{Client, Link, Tensor};

/// Messages of ONNX, field by field. *Source:* onnx.proto3.
#[derive(Clone, Default)]
struct Message(Vec<u8>);

impl Message {
    fn bytes(mut self, tag: u32, bytes: impl AsRef<[u8]>) -> Self {
        encode_key(tag, WireType::LengthDelimited, &mut self.0);
        encode_varint(bytes.as_ref().len() as u64, &mut self.0);
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    fn number(mut self, tag: u32, number: u64) -> Self {
        encode_key(tag, WireType::Varint, &mut self.0);
        encode_varint(number, &mut self.0);
        self
    }
}

fn tensor(name: &str, dims: &[usize], values: &[f32]) -> Message {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let message = dims.iter().fold(Message::default(), |message, dim| message.number(1, *dim as u64));
    message.number(2, 1).bytes(8, name).bytes(9, raw)
}

fn numbers(name: &str, values: &[usize]) -> Message {
    let message = Message::default().bytes(1, name).number(20, 7);
    values.iter().fold(message, |message, value| message.number(8, *value as u64))
}

fn number(name: &str, value: usize) -> Message {
    Message::default().bytes(1, name).number(20, 2).number(3, value as u64)
}

/// A graph that grows at its end.
#[derive(Default)]
struct Graph {
    nodes: Vec<Message>,
    weights: Vec<Message>,
    seed: u64,
}

impl Graph {
    /// Values between -scale and scale.
    fn random(&mut self, name: &str, dims: &[usize], scale: f32) {
        let count = dims.iter().product();
        let values = (0..count).map(|_| {
            self.seed =
                self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.seed >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
        });
        let values: Vec<f32> = values.collect();
        self.weights.push(tensor(name, dims, &values));
    }

    fn node(&mut self, operator: &str, inputs: &[&str], attributes: &[Message]) -> String {
        let name = format!("{operator}{}", self.nodes.len());
        let message = inputs.iter().fold(Message::default(), |message, input| message.bytes(1, input));
        let message = message.bytes(2, &name).bytes(4, operator);
        self.nodes.push(attributes.iter().fold(message, |message, one| message.bytes(5, &one.0)));
        name
    }

    /// A convolution of squares, with its bias.
    fn convolve(
        &mut self,
        input: &str,
        from: usize,
        to: usize,
        side: usize,
        stride: usize,
        groups: usize,
    ) -> String {
        let name = format!("w{}", self.nodes.len());
        let fan = (from / groups * side * side) as f32;
        self.random(&name, &[to, from / groups, side, side], (6.0 / fan).sqrt());
        let bias = format!("b{}", self.nodes.len());
        self.random(&bias, &[to], 0.1);
        let pads = [side / 2; 4];
        let attributes = [
            numbers("kernel_shape", &[side, side]),
            numbers("strides", &[stride, stride]),
            numbers("pads", &pads),
            number("group", groups),
        ];
        self.node("Conv", &[input, &name, &bias], &attributes)
    }

    fn finish(mut self, last: &str, width: usize) -> Bytes {
        let pooled = self.node("GlobalAveragePool", &[last], &[]);
        let flat = self.node("Flatten", &[&pooled], &[]);
        self.random("classes", &[width, 1000], 0.05);
        self.random("offsets", &[1000], 0.05);
        let last = self.node("Gemm", &[&flat, "classes", "offsets"], &[]);
        let port = |name: &str, dims: &[usize]| {
            let batch = Message::default().bytes(2, "batch");
            let shape = Message::default().bytes(1, &batch.0);
            let shape = dims
                .iter()
                .fold(shape, |shape, dim| shape.bytes(1, Message::default().number(1, *dim as u64).0));
            let tensor = Message::default().number(1, 1).bytes(2, shape.0);
            Message::default().bytes(1, name).bytes(2, Message::default().bytes(1, tensor.0).0)
        };
        let graph = self.nodes.iter().fold(Message::default(), |graph, node| graph.bytes(1, &node.0));
        let graph = self.weights.iter().fold(graph.bytes(2, "network"), |graph, one| graph.bytes(5, &one.0));
        let graph = graph.bytes(11, port("image", &[3, SIDE, SIDE]).0).bytes(12, port(&last, &[1000]).0);
        let operators = Message::default().bytes(1, "").number(2, 17);
        Message::default().number(1, 8).bytes(7, graph.0).bytes(8, operators.0).0.into()
    }
}

/// Pixels of a side.
const SIDE: usize = 224;

/// *Source:* Sandler et al., "MobileNetV2", table 2; normalisation is part of the convolutions, as exporters do it.
fn mobilenet() -> Bytes {
    let mut graph = Graph::default();
    graph.weights.push(tensor("zero", &[], &[0.0]));
    graph.weights.push(tensor("six", &[], &[6.0]));
    let clip = |graph: &mut Graph, input: &str| graph.node("Clip", &[input, "zero", "six"], &[]);
    let mut last = graph.convolve("image", 3, 32, 3, 2, 1);
    last = clip(&mut graph, &last);
    let mut from = 32;
    // Expansion, channels, repetitions, stride.
    for (expand, to, times, stride) in [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ] {
        for time in 0..times {
            let (input, stride, inner) = (last.clone(), if time == 0 { stride } else { 1 }, from * expand);
            if expand > 1 {
                last = graph.convolve(&last, from, inner, 1, 1, 1);
                last = clip(&mut graph, &last);
            }
            last = graph.convolve(&last, inner, inner, 3, stride, inner);
            last = clip(&mut graph, &last);
            last = graph.convolve(&last, inner, to, 1, 1, 1);
            if stride == 1 && from == to {
                last = graph.node("Add", &[&last, &input], &[]);
            }
            from = to;
        }
    }
    last = graph.convolve(&last, from, 1280, 1, 1, 1);
    last = clip(&mut graph, &last);
    graph.finish(&last, 1280)
}

/// *Source:* He et al., "Deep residual learning", table 1, 50 layers, with the stride in the 3x3 convolutions.
fn resnet() -> Bytes {
    let mut graph = Graph::default();
    let mut last = graph.convolve("image", 3, 64, 7, 2, 1);
    last = graph.node("Relu", &[&last], &[]);
    let pool = [numbers("kernel_shape", &[3, 3]), numbers("strides", &[2, 2]), numbers("pads", &[1; 4])];
    last = graph.node("MaxPool", &[&last], &pool);
    let mut from = 64;
    for (inner, times, stride) in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)] {
        for time in 0..times {
            let (input, stride, to) = (last.clone(), if time == 0 { stride } else { 1 }, inner * 4);
            last = graph.convolve(&input, from, inner, 1, 1, 1);
            last = graph.node("Relu", &[&last], &[]);
            last = graph.convolve(&last, inner, inner, 3, stride, 1);
            last = graph.node("Relu", &[&last], &[]);
            last = graph.convolve(&last, inner, to, 1, 1, 1);
            let side = if time == 0 { graph.convolve(&input, from, to, 1, stride, 1) } else { input };
            last = graph.node("Add", &[&last, &side], &[]);
            last = graph.node("Relu", &[&last], &[]);
            from = to;
        }
    }
    graph.finish(&last, from)
}

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
