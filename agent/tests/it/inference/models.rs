//! Models in folders: versions, configurations, what is loaded when.

use vaccel_client::proto::inference::model_infer_request::InferRequestedOutputTensor;
use vaccel_client::proto::inference::{
    InferParameter, ModelConfigRequest, ModelInferRequest, ModelMetadataRequest, RepositoryIndexRequest,
    RepositoryModelLoadRequest, ServerReadyRequest, infer_parameter::ParameterChoice,
};

use super::{ADDONE, Inference, add, floats, inference, numbers, request, start, tensor};
use crate::support::{Agent, onnxruntime, until};

async fn sum(
    client: &mut Inference,
    model: &str,
    version: &str,
) -> Result<(String, Vec<f32>), tonic::Status> {
    let request = request(model, tensor("in", "FP32", &[1, 2]), floats(&[1.0, 2.0]));
    let request = ModelInferRequest { model_version: version.into(), ..request };
    let reply = client.model_infer(request).await?.into_inner();
    Ok((reply.model_version, numbers(&reply.raw_output_contents[0])))
}

#[tokio::test]
async fn the_newest_version_is_served_unless_the_policy_says_others() {
    let agent = start(
        |models| {
            for name in ["newest", "all", "some"] {
                models.version(name, 1, &add(1.0)).version(name, 2, &add(2.0)).version(name, 10, &add(10.0));
            }
            models.config("all", "version_policy: { all { } }");
            models.config("some", "version_policy: { specific { versions: [ 1, 2 ] } }");
        },
        &[],
    );
    let mut client = inference(agent.address()).await;
    assert_eq!(sum(&mut client, "newest", "").await.unwrap(), ("10".into(), vec![11.0, 12.0]));
    assert!(sum(&mut client, "newest", "1").await.is_err());
    assert_eq!(sum(&mut client, "all", "1").await.unwrap().1, [2.0, 3.0]);
    assert_eq!(sum(&mut client, "all", "").await.unwrap().0, "10");
    assert_eq!(sum(&mut client, "some", "").await.unwrap().0, "2");
    assert!(sum(&mut client, "some", "10").await.is_err());
    let asked = ModelMetadataRequest { name: "all".into(), ..Default::default() };
    assert_eq!(client.model_metadata(asked).await.unwrap().into_inner().versions, ["1", "2", "10"]);
}

#[tokio::test]
async fn what_changes_in_the_folder_is_served_when_it_is_loaded_again() {
    let agent = start(
        |models| {
            models.version("m", 1, &add(1.0));
        },
        &[],
    );
    let mut client = inference(agent.address()).await;
    assert_eq!(sum(&mut client, "m", "").await.unwrap(), ("1".into(), vec![2.0, 3.0]));
    let models = super::Models(agent.folder().join("models"));
    models.version("m", 1, &add(5.0)).version("late", 1, &add(7.0));
    let load = RepositoryModelLoadRequest { model_name: "m".into(), ..Default::default() };
    client.repository_model_load(load.clone()).await.unwrap();
    assert_eq!(sum(&mut client, "m", "").await.unwrap(), ("1".into(), vec![6.0, 7.0]));
    models.version("m", 2, &add(8.0));
    client.repository_model_load(load.clone()).await.unwrap();
    assert_eq!(sum(&mut client, "m", "").await.unwrap(), ("2".into(), vec![9.0, 10.0]));
    let load = RepositoryModelLoadRequest { model_name: "late".into(), ..Default::default() };
    client.repository_model_load(load).await.expect("it came after the agent");
    assert_eq!(sum(&mut client, "late", "").await.unwrap().1, [8.0, 9.0]);
}

#[tokio::test]
async fn what_nobody_wrote_is_in_the_file() {
    let agent = start(
        |models| {
            models.version("m", 1, &add(1.0));
        },
        &[],
    );
    let mut client = inference(agent.address()).await;
    let asked = ModelConfigRequest { name: "m".into(), ..Default::default() };
    let config = client.model_config(asked).await.unwrap().into_inner().config.unwrap();
    assert_eq!((config.name.as_str(), config.max_batch_size), ("m", 64));
    assert_eq!((config.input[0].name.as_str(), &config.input[0].dims[..]), ("in", &[2][..]));
    assert_eq!(config.output[0].data_type().as_str_name(), "TYPE_FP32");
    assert_eq!(config.platform, "onnxruntime_onnx");
}

#[tokio::test]
async fn a_folder_of_files_is_a_model_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("models")).unwrap();
    std::fs::write(folder.path().join("models/net.onnx"), add(3.0)).unwrap();
    let library = onnxruntime();
    let flags = [
        "--model-repository",
        "{}/models",
        "--model-name",
        "served",
        "--onnxruntime",
        library.to_str().unwrap(),
    ];
    let agent = Agent::start_in(folder, &["unix://{}/s"], &flags);
    let mut client = inference(agent.address()).await;
    assert_eq!(sum(&mut client, "served", "").await.unwrap(), ("1".into(), vec![4.0, 5.0]));
}

#[tokio::test]
async fn classes_come_with_their_labels() {
    let agent = start(|_| {}, &[]);
    let mut client = inference(agent.address()).await;
    let values: Vec<f32> = (0..32_u8).map(|value| f32::from(value % 16 * 7 % 16) / 10.0).collect();
    let classes = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(2)) };
    let output = InferRequestedOutputTensor {
        name: "output".into(),
        parameters: [("classification".to_owned(), classes)].into(),
    };
    let mut asked = request("addone", tensor("input", "FP32", &[2, 16]), floats(&values));
    asked.outputs.push(output);
    let reply = client.model_infer(asked).await.unwrap().into_inner();
    assert_eq!((reply.outputs[0].datatype.as_str(), &reply.outputs[0].shape[..]), ("BYTES", &[2, 2][..]));
    let texts: Vec<String> = vaccel_client::proto::tensor::strings(&reply.raw_output_contents[0])
        .map(|text| String::from_utf8(text.unwrap().into()).unwrap())
        .collect();
    // 7 * 9 % 16 is 15, 7 * 2 % 16 is 14.
    assert_eq!(texts, ["1.500000:9", "1.400000:2:two", "1.500000:9", "1.400000:2:two"]);
}

#[tokio::test]
async fn models_that_want_to_be_warm_are_when_the_agent_is_ready() {
    let warmup = |dims: &str| {
        format!(
            r#"{ADDONE} model_warmup [ {{ name: "zeros" batch_size: 4 count: 2
            inputs {{ key: "input" value {{ data_type: TYPE_FP32 dims: [ {dims} ] zero_data: true }} }} }} ]"#
        )
        .replace("label_filename: \"labels.txt\"", "")
    };
    let fill = |models: &super::Models| {
        models.config("warm", &warmup("16")).config("cold", &warmup("-3"));
    };
    let agent = start(fill, &[]);
    let mut client = inference(agent.address()).await;
    until("ready", async || {
        client.clone().server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready
    })
    .await;
    let index = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner();
    let states: Vec<_> = index.models.iter().map(|model| (&model.name[..], &model.state[..])).collect();
    assert_eq!(states, [("addone", "READY"), ("cold", "UNAVAILABLE"), ("warm", "READY")]);
    assert!(index.models[1].reason.contains("model_warmup"), "{:?}", index.models[1]);
}
