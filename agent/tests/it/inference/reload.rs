//! What works goes on working, whatever is written into its folder meanwhile, until something else is loaded.

use std::collections::HashMap;
use std::path::Path;

use tonic::{Code, Status};
use vaccel_client::proto::inference::model_repository_parameter::ParameterChoice;
use vaccel_client::proto::inference::repository_index_response::ModelIndex;
use vaccel_client::proto::inference::{
    ModelConfigRequest, ModelInferRequest, ModelReadyRequest, ModelRepositoryParameter,
    RepositoryIndexRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
};

use super::{Inference, Models, add, floats, inference, numbers, request, start, tensor};
use crate::support::{Agent, until};

/// What is no model, and is recognised as one.
const BROKEN: &[u8] = b"\x08\x08\x3a\x02\x0a\x00";

fn one_model() -> Agent {
    start(
        |models| {
            models.version("m", 1, &add(1.0));
        },
        &[],
    )
}

fn folder(agent: &Agent) -> Models {
    Models(agent.folder().join("models"))
}

/// The version that answered, and what was added.
async fn run(client: &mut Inference, version: &str) -> Result<(String, f32), Status> {
    let asked = request("m", tensor("in", "FP32", &[1, 2]), floats(&[0.0, 0.0]));
    let asked = ModelInferRequest { model_version: version.into(), ..asked };
    let reply = client.model_infer(asked).await?.into_inner();
    Ok((reply.model_version, numbers(&reply.raw_output_contents[0])[0]))
}

async fn load(client: &mut Inference, config: Option<&str>) -> Result<(), Status> {
    let choice = config.map(|config| ParameterChoice::StringParam(config.into()));
    let parameters = choice
        .map(|choice| ("config".to_owned(), ModelRepositoryParameter { parameter_choice: Some(choice) }));
    let parameters: HashMap<_, _> = parameters.into_iter().collect();
    let asked = RepositoryModelLoadRequest { model_name: "m".into(), parameters, ..Default::default() };
    client.repository_model_load(asked).await.map(drop)
}

async fn index(client: &mut Inference) -> Vec<ModelIndex> {
    let index = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner();
    index.models.into_iter().filter(|row| row.name == "m").collect()
}

fn states(rows: &[ModelIndex]) -> Vec<(&str, &str)> {
    rows.iter().map(|row| (&row.version[..], &row.state[..])).collect()
}

#[tokio::test]
async fn a_broken_file_takes_no_working_model_away() {
    let agent = one_model();
    let mut client = inference(agent.address()).await;
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0));

    // Somebody lists the models while a configuration is written, or a model.
    folder(&agent).config("m", "max_batch_size: ma");
    let rows = index(&mut client).await;
    assert_eq!(states(&rows), [("1", "READY")]);
    assert!(rows[0].reason.contains("config.pbtxt"), "{rows:?}");
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0));
    let refusal = load(&mut client, None).await.expect_err("not a configuration");
    assert_eq!(refusal.code(), Code::InvalidArgument);
    assert_eq!(run(&mut client, "1").await.unwrap(), ("1".into(), 1.0));

    folder(&agent).config("m", "").version("m", 1, BROKEN);
    assert_eq!(states(&index(&mut client).await), [("1", "READY")]);
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0));
    load(&mut client, None).await.expect_err("not a model");
    for _ in 0..2 {
        let rows = index(&mut client).await;
        assert_eq!(states(&rows), [("1", "READY")]);
        assert!(!rows[0].reason.is_empty(), "why the load failed");
        assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0));
    }

    folder(&agent).version("m", 1, &add(3.0));
    load(&mut client, None).await.unwrap();
    let rows = index(&mut client).await;
    assert_eq!((states(&rows), rows[0].reason.as_str()), (vec![("1", "READY")], ""));
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 3.0));
}

#[tokio::test]
async fn a_broken_new_version_leaves_the_one_before() {
    let agent = one_model();
    let mut client = inference(agent.address()).await;
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0));
    folder(&agent).version("m", 2, BROKEN);
    load(&mut client, None).await.expect_err("not a model");
    assert_eq!(states(&index(&mut client).await), [("1", "READY"), ("2", "UNAVAILABLE")]);
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0));
    folder(&agent).version("m", 2, &add(2.0));
    load(&mut client, None).await.unwrap();
    assert_eq!(states(&index(&mut client).await), [("2", "READY")]);
    assert_eq!(run(&mut client, "").await.unwrap(), ("2".into(), 2.0));
}

#[tokio::test]
async fn a_new_version_is_there_for_whoever_asks_for_it() {
    let agent = one_model();
    let mut client = inference(agent.address()).await;
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0));
    // A folder whose file is still to come is no version.
    std::fs::create_dir(agent.folder().join("models/m/2")).unwrap();
    assert_eq!(states(&index(&mut client).await), [("1", "READY")]);
    folder(&agent).version("m", 2, &add(2.0));
    // Nobody lists or loads.
    until("version 2", async || {
        let asked = ModelReadyRequest { name: "m".into(), version: "2".into() };
        client.clone().model_ready(asked).await.unwrap().into_inner().ready
    })
    .await;
    assert_eq!(run(&mut client, "").await.unwrap(), ("1".into(), 1.0), "it is not loaded yet");
    assert_eq!(run(&mut client, "2").await.unwrap(), ("2".into(), 2.0));
    assert_eq!(run(&mut client, "").await.unwrap(), ("2".into(), 2.0), "and is the newest now");
}

#[tokio::test]
async fn a_model_that_could_not_be_served_can_once_it_is_mended() {
    let agent = one_model();
    let mut client = inference(agent.address()).await;
    folder(&agent).config("late", "colour: 1").version("late", 1, &add(1.0));
    let rows = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner().models;
    assert!(rows.iter().any(|row| row.name == "late" && row.state == "UNAVAILABLE"), "{rows:?}");
    folder(&agent).config("late", "");
    until("the mended model", async || {
        let asked = ModelReadyRequest { name: "late".into(), version: String::new() };
        client.clone().model_ready(asked).await.unwrap().into_inner().ready
    })
    .await;
}

async fn rows_max(client: &mut Inference) -> i32 {
    let asked = ModelConfigRequest { name: "m".into(), ..Default::default() };
    client.model_config(asked).await.unwrap().into_inner().config.unwrap().max_batch_size
}

#[tokio::test]
async fn a_configuration_alone_is_another_one_for_the_hosts_model_and_its_tenants_own() {
    let agent = one_model();
    let mut one = inference(&agent.addresses[0]).await;
    let mut other = inference(&agent.addresses[1]).await;
    load(&mut one, Some(r#"{"max_batch_size": 7}"#)).await.unwrap();
    assert_eq!((rows_max(&mut one).await, rows_max(&mut other).await), (7, 64));
    assert_eq!(run(&mut one, "").await.unwrap(), ("1".into(), 1.0));
    let refusal = load(&mut one, Some(r#"{"max_batch_size": -7}"#)).await.expect_err("cannot be");
    assert!(refusal.message().contains("max_batch_size: expected 0 or more"), "{refusal}");
    assert_eq!(rows_max(&mut one).await, 7);
    load(&mut one, None).await.unwrap();
    assert_eq!(rows_max(&mut one).await, 64, "as it is in its folder");

    load(&mut one, Some(r#"{"max_batch_size": 9}"#)).await.unwrap();
    let unload = RepositoryModelUnloadRequest { model_name: "m".into(), ..Default::default() };
    one.repository_model_unload(unload).await.unwrap();
    assert_eq!(run(&mut one, "").await.expect_err("unloaded").code(), Code::NotFound);
    assert_eq!(run(&mut other, "").await.unwrap(), ("1".into(), 1.0));
    assert!(Path::new(agent.folder()).join("models/m/1/model.onnx").is_file());
}
