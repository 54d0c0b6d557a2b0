//! What models that callers bring, and calls of a few bytes, may cost the agent.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bytes::Bytes;
use tonic::{Code, Status};
use vaccel_client::proto::inference::model_infer_request::InferRequestedOutputTensor;
use vaccel_client::proto::inference::model_repository_parameter::ParameterChoice;
use vaccel_client::proto::inference::{
    InferParameter, ModelRepositoryParameter, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
    SystemSharedMemoryRegisterRequest, infer_parameter,
};

use super::{Inference, inference, request, start, tensor};
use crate::support::{Agent, onnx, socket_path};

/// What a call that is refused may add to the agent's memory, in bytes.
const REFUSED_BYTES_MAX: u64 = 48 << 20;

fn set(choice: infer_parameter::ParameterChoice) -> InferParameter {
    InferParameter { parameter_choice: Some(choice) }
}

/// Brings a model whose runs give back what they get.
async fn bring(client: &mut Inference, name: &str, config: &str) -> Result<(), Status> {
    let config = format!(r#"{{ "backend": "identity", {config} }}"#);
    bring_file(client, name, &config, Bytes::from_static(b"x")).await
}

async fn bring_file(client: &mut Inference, name: &str, config: &str, file: Bytes) -> Result<(), Status> {
    let parameter = |choice| ModelRepositoryParameter { parameter_choice: Some(choice) };
    let parameters = HashMap::from([
        ("config".to_owned(), parameter(ParameterChoice::StringParam(config.into()))),
        ("file:1/model.onnx".to_owned(), parameter(ParameterChoice::BytesParam(file))),
    ]);
    let load = RepositoryModelLoadRequest { model_name: name.into(), parameters, ..Default::default() };
    client.repository_model_load(load).await.map(drop)
}

/// Registers memory as the region `r`. It is a hole: nobody has written to it, and it takes none of its caller's.
pub(super) async fn share(client: &mut Inference, bytes: u64) -> tempfile::NamedTempFile {
    let memory = tempfile::Builder::new().prefix("vaccel-test-").tempfile_in("/dev/shm").unwrap();
    memory.as_file().set_len(bytes).unwrap();
    let register = SystemSharedMemoryRegisterRequest {
        name: "r".into(),
        key: memory.path().file_name().unwrap().to_str().unwrap().into(),
        byte_size: bytes,
        ..Default::default()
    };
    client.system_shared_memory_register(register).await.unwrap();
    memory
}

/// Status and body of a call over HTTP.
pub(super) fn http(agent: &Agent, method: &str, path: &str, body: &[u8]) -> (u16, String) {
    let mut socket = UnixStream::connect(socket_path(agent.address())).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(body).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn unload(client: &mut Inference, name: &str) {
    let unload = RepositoryModelUnloadRequest { model_name: name.into(), ..Default::default() };
    client.repository_model_unload(unload).await.unwrap();
}

#[tokio::test]
async fn instances_are_threads_and_a_tenant_has_some() {
    let agent = start(|_| {}, &[]);
    let mut client = inference(&agent.addresses[0]).await;
    let mut other = inference(&agent.addresses[1]).await;
    let instances = |counts: &[i32]| {
        let groups: Vec<_> = counts.iter().map(|count| format!(r#"{{ "count": {count} }}"#)).collect();
        let tensor = r#"[ { "name": "x", "data_type": "TYPE_FP32", "dims": [ 1 ] } ]"#;
        format!(r#""input": {tensor}, "output": {tensor}, "instance_group": [ {} ]"#, groups.join(", "))
    };
    for counts in [&[20_000][..], &[10_000, 10_000], &[i32::MAX; 1000]] {
        let refusal =
            bring(&mut client, "many", &instances(counts)).await.expect_err("more than there may be");
        let total: i64 = counts.iter().map(|count| i64::from(*count)).sum();
        let expected = format!("instance_group: expected at most 256 instances in all groups, got {total}");
        assert_eq!(refusal.code(), Code::InvalidArgument);
        assert!(refusal.message().contains(&expected), "{refusal}");
    }
    bring(&mut client, "one", &instances(&[16, 16])).await.unwrap();
    bring(&mut client, "two", &instances(&[32])).await.unwrap();
    let refusal = bring(&mut client, "three", &instances(&[1])).await.expect_err("all lanes are taken");
    assert_eq!(refusal.code(), Code::ResourceExhausted);
    assert!(refusal.message().contains("lanes of models that this tenant brought"), "{refusal}");
    bring(&mut other, "three", &instances(&[64])).await.expect("another tenant has its own");
    unload(&mut client, "one").await;
    bring(&mut client, "three", &instances(&[32])).await.expect("there is room again");
}

/// Rows without anything in them cost their caller nothing; what the agent would tell the model of each is counted.
#[tokio::test]
async fn rows_without_bytes_make_no_large_tensors() {
    let agent = start(|_| {}, &["--tenant-in-flight-mib", "64"]);
    let mut client = inference(agent.address()).await;
    let port = |name, last| onnx::port(name, onnx::F32, &[-1, last]);
    let nodes =
        vec![onnx::node("Identity", &["x"], &["y"]), onnx::node("Identity", &["start"], &["started"])];
    let inputs = vec![port("x", -1), port("start", 1)];
    let model = onnx::model(nodes, vec![], inputs, vec![port("y", -1), port("started", 1)]);
    let config = r#"{ "max_batch_size": 2147483647,
        "input": [ { "name": "x", "data_type": "TYPE_FP32", "dims": [ -1 ] } ],
        "output": [ { "name": "y", "data_type": "TYPE_FP32", "dims": [ -1 ] } ],
        "sequence_batching": { "control_input": [ { "name": "start",
            "control": [ { "kind": "CONTROL_SEQUENCE_START", "fp32_false_true": [ 0, 1 ] } ] } ] } }"#;
    bring_file(&mut client, "rows", config, model).await.unwrap();
    let mut run = async |rows| {
        let mut asked = request("rows", tensor("x", "FP32", &[rows, 0]), Bytes::new());
        let id = infer_parameter::ParameterChoice::Int64Param(7);
        let begins = infer_parameter::ParameterChoice::BoolParam(true);
        asked.parameters = [("sequence_id", set(id)), ("sequence_start", set(begins))]
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        client.model_infer(asked).await
    };
    run(3).await.expect("a few rows");
    let before = agent.peak();
    let refusal = run(1_000_000_000).await.expect_err("8 GB for one byte of the request");
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    assert!(agent.peak() < before + REFUSED_BYTES_MAX, "{} bytes before, {} at most", before, agent.peak());
}

/// A region that is named many times is read as often: all of it counts before it is read.
#[tokio::test]
async fn what_is_read_from_shared_memory_counts_as_what_is_sent() {
    const BYTES: u32 = 16 << 20;
    let agent = start(|_| {}, &["--tenant-in-flight-mib", "64"]);
    let mut client = inference(agent.address()).await;
    let one = |name: &str| format!(r#"{{ "name": "{name}", "data_type": "TYPE_UINT8", "dims": [ -1 ] }}"#);
    let inputs: Vec<_> = (0..16).map(|index| one(&format!("x{index}"))).collect();
    let config = format!(r#""input": [ {} ], "output": [ {} ]"#, inputs.join(", "), one("y"));
    bring(&mut client, "many", &config).await.unwrap();
    let _memory = share(&mut client, BYTES.into()).await;
    let asked = |bytes: u32| {
        let input = |index: u32| {
            let mut input = tensor(&format!("x{index}"), "UINT8", &[bytes.into()]);
            let (region, size) = ("shared_memory_region", "shared_memory_byte_size");
            let name = infer_parameter::ParameterChoice::StringParam("r".into());
            input.parameters.insert(region.into(), set(name));
            let bytes = infer_parameter::ParameterChoice::Int64Param(bytes.into());
            input.parameters.insert(size.into(), set(bytes));
            input
        };
        let mut asked = request("many", tensor("x", "UINT8", &[]), Bytes::new());
        (asked.inputs, asked.raw_input_contents) = ((0..16).map(input).collect(), Vec::new());
        asked
    };
    for _ in 0..8 {
        let reply = client.model_infer(asked(1 << 20)).await.expect("16 MiB, given back after each");
        assert_eq!(reply.into_inner().raw_output_contents[0].len(), 1 << 20);
    }
    let before = agent.peak();
    let refusal = client.model_infer(asked(BYTES)).await.expect_err("256 MiB");
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    assert!(refusal.message().contains("requests of this tenant in flight"), "{refusal}");
    assert!(agent.peak() < before + (96 << 20), "{} bytes before, {} at most", before, agent.peak());
}

/// However long a sequence may be idle: it is its model's, and what it keeps is given back with it.
#[tokio::test]
async fn sequences_end_with_their_model() {
    let agent = start(|_| {}, &["--tenant-in-flight-mib", "64"]);
    let mut client = inference(agent.address()).await;
    let port = |name, size| onnx::port(name, onnx::F32, &[size]);
    let nodes = vec![onnx::node("Identity", &["x"], &["next"]), onnx::node("Identity", &["state"], &["y"])];
    let (inputs, outputs) = (vec![port("x", -1), port("state", 1)], vec![port("y", 1), port("next", -1)]);
    let model = onnx::model(nodes, vec![], inputs, outputs);
    let config = r#"{ "input": [ { "name": "x", "data_type": "TYPE_FP32", "dims": [ -1 ] } ],
        "output": [ { "name": "y", "data_type": "TYPE_FP32", "dims": [ 1 ] } ],
        "sequence_batching": { "max_sequence_idle_microseconds": 18446744073709551615, "state": [
            { "input_name": "state", "output_name": "next", "data_type": "TYPE_FP32", "dims": [ 1 ] } ] } }"#;
    let keep = async |client: &mut Inference, id| {
        let bytes = Bytes::from(vec![0; 4 << 20]);
        let mut asked = request("kept", tensor("x", "FP32", &[1 << 20]), bytes);
        let id = infer_parameter::ParameterChoice::Int64Param(id);
        let begins = infer_parameter::ParameterChoice::BoolParam(true);
        asked.parameters = [("sequence_id", set(id)), ("sequence_start", set(begins))]
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        client.model_infer(asked).await.map(drop)
    };
    for _ in 0..3 {
        bring_file(&mut client, "kept", config, model.clone()).await.unwrap();
        let mut kept = 0;
        while keep(&mut client, kept + 1).await.is_ok() {
            kept += 1;
        }
        assert!((10..=16).contains(&kept), "{kept} of 4 MiB in 64 MiB, with what was kept before given back");
        unload(&mut client, "kept").await;
    }
}

#[tokio::test]
async fn text_that_would_become_many_values_is_refused() {
    let agent = start(|_| {}, &[]);
    let mut client = inference(agent.address()).await;
    let lists = |bytes: usize| ["[0]"].repeat(bytes / 4).join(",");
    let before = agent.peak();
    for path in ["/v2/repository/index", "/v2/logging", "/v2/systemsharedmemory/region/r/register"] {
        let (status, body) =
            http(&agent, "POST", path, format!(r#"{{"a":[{}]}}"#, lists(8 << 20)).as_bytes());
        assert_eq!(status, 413, "{path}: {body}");
    }
    let infer = |json: &str| http(&agent, "POST", "/v2/models/addone/infer", json.as_bytes());
    let (status, body) = infer(&format!(r#"{{"inputs":[],"parameters":{{"a":[{}]}}}}"#, lists(8 << 20)));
    assert_eq!(status, 400);
    assert!(body.contains("expected a number, a string or a truth value"), "{body}");
    let many: Vec<_> = (0..500_000).map(|index| format!(r#""{index}":1"#)).collect();
    let (status, body) = infer(&format!(r#"{{"inputs":[],"parameters":{{{}}}}}"#, many.join(",")));
    assert_eq!(status, 400);
    assert!(body.contains("expected at most 256 parameters"), "{body}");
    let outputs = [r#"{"name":"output"}"#].repeat(400_000).join(",");
    let (status, body) = infer(&format!(r#"{{"inputs":[],"outputs":[{outputs}]}}"#));
    assert_eq!(status, 400);
    assert!(body.contains("expected at most 256 entries"), "{body}");
    let inputs = [r#"{}"#].repeat(2 << 20).join(",");
    let refusal = bring(&mut client, "m", &format!(r#""input": [{inputs}]"#)).await.expect_err("too long");
    assert!(refusal.message().contains("config: expected at most 262144 bytes"), "{refusal}");
    assert!(agent.peak() < before + REFUSED_BYTES_MAX, "{} bytes before, {} at most", before, agent.peak());
    let (status, body) = infer(
        r#"{"inputs":[{"name":"input","datatype":"FP32","shape":[1,16],"data":[1,2,3,4,5,6,7,8,9,10,11,12,13,
                  14,15,16.5]}],"parameters":{"a":1,"b":"c","d":true}}"#,
    );
    assert_eq!(status, 200, "{body}");
    assert!(body.contains(r#""data":[1.0,2.0,3.0"#) && body.contains("16.5]"), "{body}");
}

/// As text, a tensor is four times as long: that counts before it is written, however short the request was.
#[tokio::test]
async fn answers_in_json_count_before_they_are_written() {
    const MIB: u64 = 1 << 20;
    let agent = start(|_| {}, &["--tenant-in-flight-mib", "40"]);
    let mut client = inference(agent.address()).await;
    let one =
        |name: &str| format!(r#"[ {{ "name": "{name}", "data_type": "TYPE_UINT8", "dims": [ -1 ] }} ]"#);
    bring(&mut client, "i", &format!(r#""input": {}, "output": {}"#, one("x"), one("y"))).await.unwrap();
    let memory = share(&mut client, 16 * MIB).await;
    memory.as_file().write_all(&vec![0xff; 16 << 20]).unwrap();
    let ask = |bytes: u64| {
        let body = format!(
            r#"{{"inputs":[{{"name":"x","datatype":"UINT8","shape":[{bytes}],
            "parameters":{{"shared_memory_region":"r","shared_memory_byte_size":{bytes}}}}}]}}"#
        );
        http(&agent, "POST", "/v2/models/i/infer", body.as_bytes())
    };
    for _ in 0..8 {
        let (status, body) = ask(MIB);
        assert_eq!((status, body.matches("255").count()), (200, 1 << 20));
    }
    let before = agent.peak();
    let (status, body) = ask(16 * MIB);
    assert_eq!(status, 429, "{}", body.len());
    assert!(body.contains("requests of this tenant in flight"), "{body}");
    assert!(agent.peak() < before + 64 * MIB, "{} bytes before, {} at most", before, agent.peak());
    assert_eq!(ask(MIB).0, 200, "all of it was given back");
}

#[tokio::test]
async fn a_path_that_is_no_text_is_answered_as_every_error() {
    let agent = start(|_| {}, &[]);
    for (method, path) in [("GET", "/v2/models/%ff%fe"), ("POST", "/v2/repository/models/%ff/load")] {
        let (status, body) = http(&agent, method, path, b"");
        assert_eq!(status, 400, "{body}");
        assert!(body.starts_with(r#"{"error":""#), "{body}");
    }
}

/// Most of a tensor may be asked for as classes, but not more than an answer has; others are not held up meanwhile.
#[tokio::test]
async fn classes_are_not_without_end() {
    let agent = start(|_| {}, &[]);
    let mut client = inference(agent.address()).await;
    let one = |name: &str| format!(r#"[ {{ "name": "{name}", "data_type": "TYPE_FP64", "dims": [ -1 ] }} ]"#);
    bring(&mut client, "i", &format!(r#""input": {}, "output": {}"#, one("x"), one("y"))).await.unwrap();
    let mut classify = async |classes| {
        let data: Vec<u8> =
            (0..1_000_000_u32).rev().flat_map(|value| f64::from(value).to_le_bytes()).collect();
        let mut asked = request("i", tensor("x", "FP64", &[1_000_000]), data.into());
        let classes = set(infer_parameter::ParameterChoice::Int64Param(classes));
        let parameters = [("classification".to_owned(), classes)].into();
        asked.outputs = vec![InferRequestedOutputTensor { name: "y".into(), parameters }];
        client.model_infer(asked).await
    };
    let found = classify(3).await.expect("three").into_inner();
    let texts = vaccel_client::proto::tensor::strings(&found.raw_output_contents[0]);
    let texts: Vec<_> = texts.map(|text| String::from_utf8(text.unwrap().into()).unwrap()).collect();
    assert_eq!(texts, ["999999.000000:0", "999998.000000:1", "999997.000000:2"]);
    let refusal = classify(1_000_000).await.expect_err("more than an answer has");
    assert_eq!(refusal.code(), Code::InvalidArgument, "{refusal}");
    assert!(refusal.message().contains("classification: expected at most"), "{refusal}");
}
