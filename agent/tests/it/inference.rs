//! The Open Inference Protocol: what its clients call, what they are told, and who sees what.

mod catalogue;
mod clients;
mod health;
mod limits;
mod memory;
mod models;
mod namespaces;
mod numbers;
mod reload;
mod sequences;
mod storm;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use vaccel_client::Link;
use vaccel_client::proto::inference::ModelInferRequest;
use vaccel_client::proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use vaccel_client::proto::inference::model_infer_request::InferInputTensor;

use crate::support::{Agent, connect, onnx, onnxruntime};

/// A client of the protocol on the agent's own connection.
type Inference = GrpcInferenceServiceClient<Link>;

async fn inference(address: &str) -> Inference {
    GrpcInferenceServiceClient::new(connect(address).await.link().clone())
}

/// A folder of models.
struct Models(PathBuf);

impl Models {
    fn new(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        Self(folder.to_owned())
    }

    fn config(&self, name: &str, text: &str) -> &Self {
        std::fs::create_dir_all(self.0.join(name)).unwrap();
        std::fs::write(self.0.join(name).join("config.pbtxt"), text).unwrap();
        self
    }

    fn version(&self, name: &str, version: u32, model: &[u8]) -> &Self {
        let folder = self.0.join(name).join(version.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        // Whole before it has its name, as one who changes a folder that is served does it.
        std::fs::write(folder.join(".new"), model).unwrap();
        std::fs::rename(folder.join(".new"), folder.join("model.onnx")).unwrap();
        self
    }
}

/// A model that gives back rows of 16 numbers.
const ADDONE: &str = r#"
backend: "identity"
max_batch_size: 16
input [ { name: "input" data_type: TYPE_FP32 dims: [ 16 ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 16 ] label_filename: "labels.txt" } ]
"#;

/// `out = in + addend`, rows of two numbers.
fn add(addend: f32) -> Bytes {
    let node = onnx::node("Add", &["in", "c"], &["out"]);
    let (input, output) = (onnx::port("in", onnx::F32, &[-1, 2]), onnx::port("out", onnx::F32, &[-1, 2]));
    onnx::model(vec![node], vec![onnx::f32s("c", &[1], &[addend])], vec![input], vec![output])
}

/// An agent with these models, at unix and TCP sockets.
fn start(fill: impl FnOnce(&Models), flags: &[&str]) -> Agent {
    let folder = tempfile::tempdir().unwrap();
    let models = Models::new(&folder.path().join("models"));
    models.config("addone", ADDONE);
    std::fs::write(models.0.join("addone/labels.txt"), "zero\none\ntwo\n").unwrap();
    fill(&models);
    let library = onnxruntime();
    let own = ["--model-repository", "{}/models", "--onnxruntime", library.to_str().unwrap()];
    let addresses = ["unix://{}/s", "tcp://127.0.0.1:0"];
    Agent::start_in(folder, &addresses, &own.into_iter().chain(flags.iter().copied()).collect::<Vec<_>>())
}

fn tensor(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    let (name, datatype) = (name.to_owned(), datatype.to_owned());
    InferInputTensor { name, datatype, shape: shape.to_vec(), ..InferInputTensor::default() }
}

fn floats(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn numbers(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// A run with one input of numbers.
fn request(model: &str, input: InferInputTensor, data: Bytes) -> ModelInferRequest {
    ModelInferRequest {
        model_name: model.into(),
        inputs: vec![input],
        raw_input_contents: vec![data],
        ..ModelInferRequest::default()
    }
}
