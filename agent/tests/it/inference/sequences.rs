//! Calls that belong together, and answers that were given before.

use tonic::Code;
use vaccel_client::proto::inference::{
    InferParameter, ModelInferRequest, ModelStatisticsRequest, infer_parameter::ParameterChoice,
};

use super::{ADDONE, Inference, floats, inference, numbers, request, start, tensor};
use crate::support::onnx;

/// Keeps the sum of what a sequence gave it: `out = in + state * (1 - start)`, which is the next state, too.
fn accumulate() -> bytes::Bytes {
    let port = |name| onnx::port(name, onnx::F32, &[-1, 1]);
    let nodes = vec![
        onnx::node("Sub", &["one", "start"], &["goes_on"]),
        onnx::node("Mul", &["state", "goes_on"], &["before"]),
        onnx::node("Add", &["in", "before"], &["out"]),
        onnx::node("Identity", &["out"], &["next"]),
    ];
    let inputs = vec![port("in"), port("start"), port("state")];
    onnx::model(nodes, vec![onnx::f32s("one", &[1], &[1.0])], inputs, vec![port("out"), port("next")])
}

const SEQUENCES: &str = r#"
max_batch_size: 8
input [ { name: "in" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "out" data_type: TYPE_FP32 dims: [ 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  control_input [ { name: "start" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] } ]
  state [ { input_name: "state" output_name: "next" data_type: TYPE_FP32 dims: [ 1 ] } ]
}
"#;

async fn add(
    client: &mut Inference,
    id: ParameterChoice,
    value: f32,
    flags: &[&str],
) -> Result<f32, tonic::Status> {
    let mut asked = request("sum", tensor("in", "FP32", &[1, 1]), floats(&[value]));
    let parameter = |choice| InferParameter { parameter_choice: Some(choice) };
    asked.parameters.insert("sequence_id".into(), parameter(id));
    for flag in flags {
        asked.parameters.insert((*flag).into(), parameter(ParameterChoice::BoolParam(true)));
    }
    let reply = client.model_infer(asked).await?.into_inner();
    assert_eq!(reply.outputs.len(), 1, "the state is no caller's");
    Ok(numbers(&reply.raw_output_contents[0])[0])
}

#[tokio::test]
async fn a_sequence_goes_on_where_it_was_and_nobody_elses_does() {
    let agent = start(|models| _ = models.config("sum", SEQUENCES).version("sum", 1, &accumulate()), &[]);
    let mut one = inference(&agent.addresses[0]).await;
    let mut other = inference(&agent.addresses[1]).await;
    let number = || ParameterChoice::Int64Param(7);
    let text = || ParameterChoice::StringParam("seven".into());
    let begin = &["sequence_start"][..];
    assert_eq!(add(&mut one, number(), 1.0, begin).await.unwrap(), 1.0);
    assert_eq!(add(&mut one, text(), 100.0, begin).await.unwrap(), 100.0);
    assert_eq!(add(&mut one, number(), 2.0, &[]).await.unwrap(), 3.0);
    assert_eq!(add(&mut one, text(), 1.0, &[]).await.unwrap(), 101.0);
    let refusal = add(&mut other, number(), 1.0, &[]).await.expect_err("another tenant's");
    let message = "[request id: <id_unknown>] inference request for sequence 7 to model 'sum' must specify the START \
                   flag on the first request of the sequence";
    assert_eq!((refusal.code(), refusal.message()), (Code::InvalidArgument, message));
    assert_eq!(add(&mut other, number(), 50.0, begin).await.unwrap(), 50.0);
    assert_eq!(add(&mut one, number(), 4.0, &["sequence_end"]).await.unwrap(), 7.0);
    assert!(add(&mut one, number(), 1.0, &[]).await.is_err(), "it is over");
    assert_eq!(add(&mut one, text(), 5.0, begin).await.unwrap(), 5.0, "begins again");
    let refusal = add(&mut one, ParameterChoice::Int64Param(0), 1.0, begin).await.expect_err("no sequence");
    assert!(refusal.message().contains("must specify a non-zero or non-empty correlation ID"), "{refusal:?}");
    let refusal = add(&mut one, ParameterChoice::BoolParam(true), 1.0, begin).await.expect_err("no id");
    assert_eq!(refusal.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn calls_of_a_sequence_run_one_after_the_other() {
    let agent = start(|models| _ = models.config("sum", SEQUENCES).version("sum", 1, &accumulate()), &[]);
    let mut client = inference(agent.address()).await;
    let id = || ParameterChoice::Uint64Param(u64::MAX);
    add(&mut client, id(), 0.0, &["sequence_start"]).await.unwrap();
    let calls: Vec<_> = (0..50)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { add(&mut client, id(), 1.0, &[]).await.unwrap() })
        })
        .collect();
    let mut sums = Vec::new();
    for call in calls {
        sums.push(call.await.unwrap());
    }
    sums.sort_by(f32::total_cmp);
    let expected: Vec<f32> = (1..=50_u8).map(f32::from).collect();
    assert_eq!(sums, expected, "each saw what the one before it left");
}

#[tokio::test]
async fn answers_are_kept_where_the_configuration_says_so() {
    let cached =
        format!("{ADDONE} response_cache {{ enable: true }}").replace("label_filename: \"labels.txt\"", "");
    let agent = start(|models| _ = models.config("kept", &cached), &[]);
    let mut client = inference(agent.address()).await;
    let mut other = inference(&agent.addresses[1]).await;
    let ask = |model: &str, value: f32| -> ModelInferRequest {
        request(model, tensor("input", "FP32", &[1, 16]), floats(&[value; 16]))
    };
    for value in [1.0, 1.0, 2.0, 1.0] {
        let reply = client.model_infer(ask("kept", value)).await.unwrap().into_inner();
        assert_eq!(numbers(&reply.raw_output_contents[0]), [value; 16]);
    }
    other.model_infer(ask("kept", 1.0)).await.unwrap();
    let counted = async |client: &mut Inference, name: &str| {
        let asked = ModelStatisticsRequest { name: name.into(), ..Default::default() };
        let stats = client.model_statistics(asked).await.unwrap().into_inner().model_stats.remove(0);
        let sums = stats.inference_stats.unwrap();
        [sums.success, sums.cache_hit, sums.cache_miss].map(|sum| sum.unwrap().count)
    };
    assert_eq!(counted(&mut client, "kept").await, [4, 2, 2]);
    assert_eq!(counted(&mut other, "kept").await, [1, 0, 1], "nobody gets another tenant's answers");
    client.model_infer(ask("addone", 1.0)).await.unwrap();
    assert_eq!(counted(&mut client, "addone").await, [1, 0, 0]);
}
