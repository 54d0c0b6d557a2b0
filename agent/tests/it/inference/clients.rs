//! Clients of others, unchanged: Triton's and KServe's for Python.

use std::process::Command;

use prost::Message;
use vaccel_client::proto::inference::ModelStatisticsRequest;

use super::{add, floats, inference, request, start, tensor};
use crate::support::{onnx, output_text, repository};

/// Element types with their number in ONNX, their name in configurations and on the wire.
const TYPES: [(u64, &str, &str); 14] = [
    (9, "TYPE_BOOL", "BOOL"),
    (2, "TYPE_UINT8", "UINT8"),
    (4, "TYPE_UINT16", "UINT16"),
    (12, "TYPE_UINT32", "UINT32"),
    (13, "TYPE_UINT64", "UINT64"),
    (3, "TYPE_INT8", "INT8"),
    (5, "TYPE_INT16", "INT16"),
    (6, "TYPE_INT32", "INT32"),
    (7, "TYPE_INT64", "INT64"),
    (10, "TYPE_FP16", "FP16"),
    (1, "TYPE_FP32", "FP32"),
    (11, "TYPE_FP64", "FP64"),
    (8, "TYPE_STRING", "BYTES"),
    (16, "TYPE_BF16", "BF16"),
];

/// Runs a script of one of the clients against an agent with a model for each type and more.
fn run(script: &str) {
    let fill = |models: &super::Models| {
        for (number, kind, name) in TYPES {
            let port = |port| onnx::port(port, number, &[-1, 3]);
            let node = onnx::node("Identity", &["in"], &["out"]);
            models.version(
                &format!("onnx_{name}"),
                1,
                &onnx::model(vec![node], vec![], vec![port("in")], vec![port("out")]),
            );
            let text = format!(
                "backend: \"identity\" max_batch_size: 8\n\
                 input [ {{ name: \"in\" data_type: {kind} dims: [ 3 ] }} ]\n\
                 output [ {{ name: \"out\" data_type: {kind} dims: [ 3 ] }} ]\n"
            );
            models.config(&format!("identity_{name}"), &text);
        }
        models.version("add", 1, &add(1.0)).version("add", 2, &add(2.0));
        models.config("add", "version_policy: { all { } }");
        std::fs::write(models.0.join("../brought.onnx"), add(30.0)).unwrap();
    };
    let agent = start(fill, &[]);
    let folder = repository();
    let output = Command::new(folder.join("target/inference-clients/bin/python"))
        .arg(folder.join("agent/tests/it/inference").join(script))
        .args(
            agent
                .addresses
                .iter()
                .map(|address| address.trim_start_matches("tcp://").replace("unix://", "unix:")),
        )
        .arg(agent.folder().join("brought.onnx"))
        .output()
        .expect("run ./test once: it installs what this needs");
    assert!(output.status.success(), "{}", output_text(&output));
}

#[test]
fn tritons_client_over_grpc_finds_all_that_it_calls() {
    run("triton_grpc.py");
}

#[test]
fn tritons_client_over_http_finds_all_that_it_calls() {
    run("triton_http.py");
}

#[test]
fn kserves_client_infers() {
    run("kserve_infer.py");
}

/// Calls of each load.
const LOAD: usize = 3000;

#[tokio::test]
async fn a_load_tester_of_others_finds_nothing_that_fails() {
    let agent = start(|models| _ = models.version("add", 1, &add(1.0)), &[]);
    let address = agent.addresses[1].replace("tcp://", "http://");
    let message = request("add", tensor("in", "FP32", &[1, 2]), floats(&[1.0, 2.0])).encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let framed = agent.folder().join("grpc");
    std::fs::write(&framed, [&[0][..], &length, &message].concat()).unwrap();
    let json = agent.folder().join("json");
    let text = r#"{"inputs":[{"name":"in","datatype":"FP32","shape":[1,2],"data":[1,2]}]}"#;
    std::fs::write(&json, text).unwrap();
    let mut loads = 0;
    for callers in [1, 8, 32] {
        let paths: [(_, _, _, &[&str]); 2] = [
            (&framed, "application/grpc", "/inference.GRPCInferenceService/ModelInfer", &[]),
            (&json, "application/json", "/v2/models/add/infer", &["--h1"]),
        ];
        for (body, kind, path, protocol) in paths {
            let mut command = Command::new("h2load");
            command.args(["-n", &LOAD.to_string(), "-c", &callers.to_string(), "-m", "1", "-d"]).arg(body);
            command.args(["-H", &format!("content-type: {kind}"), "-H", "te: trailers"]);
            command.args(protocol);
            let output = command.arg(format!("{address}{path}")).output().expect("run ./test once");
            let clean = format!("{LOAD} done, {LOAD} succeeded, 0 failed, 0 errored, 0 timeout");
            assert!(output_text(&output).contains(&clean), "{path} {callers}: {}", output_text(&output));
            loads += 1;
        }
    }
    let mut client = inference(&agent.addresses[1]).await;
    let asked = ModelStatisticsRequest { name: "add".into(), ..Default::default() };
    let stats = client.model_statistics(asked).await.unwrap().into_inner().model_stats.remove(0);
    assert_eq!(stats.inference_stats.unwrap().success.unwrap().count, (loads * LOAD) as u64);
}
