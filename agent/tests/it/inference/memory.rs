//! Tensors in shared memory are no part of their message, however long they are.

use std::os::unix::fs::FileExt;

use bytes::Bytes;
use tonic::Code;
use vaccel_client::proto::inference::infer_parameter::ParameterChoice;
use vaccel_client::proto::inference::model_infer_request::InferRequestedOutputTensor;
use vaccel_client::proto::inference::{InferParameter, ModelInferRequest};

use super::limits::share;
use super::{inference, request, start, tensor};

const MIB: u64 = 1 << 20;

const MODEL: &str = r#"
backend: "identity"
input [ { name: "x" data_type: TYPE_UINT8 dims: [ -1 ] } ]
output [ { name: "x" data_type: TYPE_UINT8 dims: [ -1 ] } ]
"#;

fn at(offset: u64, bytes: u64) -> std::collections::HashMap<String, InferParameter> {
    let number = |value: u64| ParameterChoice::Int64Param(value.try_into().unwrap());
    let named = [
        ("shared_memory_region", ParameterChoice::StringParam("r".into())),
        ("shared_memory_offset", number(offset)),
        ("shared_memory_byte_size", number(bytes)),
    ];
    let set = |choice| InferParameter { parameter_choice: Some(choice) };
    named.map(|(name, choice)| (name.to_owned(), set(choice))).into()
}

/// A run whose input begins the region, with its output behind it where it is `placed`.
fn asked(bytes: u64, placed: bool) -> ModelInferRequest {
    let mut asked = request("long", tensor("x", "UINT8", &[bytes.try_into().unwrap()]), Bytes::new());
    asked.raw_input_contents.clear();
    asked.inputs[0].parameters = at(0, bytes);
    let parameters = if placed { at(bytes, bytes) } else { Default::default() };
    asked.outputs = vec![InferRequestedOutputTensor { name: "x".into(), parameters }];
    asked
}

#[tokio::test]
async fn tensors_in_shared_memory_may_be_longer_than_a_message() {
    let fill = |models: &super::Models| {
        models.config("long", MODEL);
    };
    let agent = start(fill, &["--tenant-in-flight-mib", "128"]);
    let mut client = inference(agent.address()).await;
    let memory = share(&mut client, 512 * MIB).await;
    memory.as_file().write_all_at(b"last", 48 * MIB - 4).unwrap();
    for _ in 0..4 {
        let reply = client.model_infer(asked(48 * MIB, true)).await.unwrap().into_inner();
        assert!(reply.raw_output_contents[0].is_empty());
        let mut end = [0; 4];
        memory.as_file().read_exact_at(&mut end, 96 * MIB - 4).unwrap();
        assert_eq!(&end, b"last");
    }
    let refusal = client.model_infer(asked(48 * MIB, false)).await.expect_err("the reply is a message");
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    let refusal = client.model_infer(asked(200 * MIB, true)).await.expect_err("more than may be in flight");
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    assert!(refusal.message().contains("requests of this tenant in flight"), "{refusal}");
}
