//! Every tenant has a namespace of its own.

use std::collections::HashMap;

use tonic::Code;
use vaccel_client::proto::inference::model_repository_parameter::ParameterChoice;
use vaccel_client::proto::inference::{
    ModelRepositoryParameter, ModelStatisticsRequest, RepositoryIndexRequest, RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest, SystemSharedMemoryStatusRequest,
};

use vaccel_client::{Error, Reason, Resource, ResourceFiles, SessionOptions, Tensor, named};

use crate::support::connect;

use super::{Inference, add, floats, inference, numbers, request, start, tensor};

async fn names(client: &mut Inference) -> Vec<String> {
    let index = client.repository_index(RepositoryIndexRequest { ready: true, ..Default::default() }).await;
    index.unwrap().into_inner().models.into_iter().map(|model| model.name).collect()
}

fn bring(name: &str, addend: f32) -> RepositoryModelLoadRequest {
    let parameter = |choice| ModelRepositoryParameter { parameter_choice: Some(choice) };
    let config = parameter(ParameterChoice::StringParam(r#"{"backend":"onnxruntime"}"#.into()));
    let file = parameter(ParameterChoice::BytesParam(add(addend)));
    let parameters = HashMap::from([("config".to_owned(), config), ("file:1/model.onnx".to_owned(), file)]);
    RepositoryModelLoadRequest { model_name: name.into(), parameters, ..Default::default() }
}

async fn sum(client: &mut Inference, model: &str) -> Result<Vec<f32>, tonic::Status> {
    let request = request(model, tensor("in", "FP32", &[1, 2]), floats(&[1.0, 2.0]));
    Ok(numbers(&client.model_infer(request).await?.into_inner().raw_output_contents[0]))
}

#[tokio::test]
async fn what_a_tenant_brings_and_unloads_is_its_own_affair() {
    let agent = start(
        |models| {
            models.version("shared", 1, &add(1.0));
        },
        &[],
    );
    let mut one = inference(&agent.addresses[0]).await;
    let mut other = inference(&agent.addresses[1]).await;
    assert_eq!(names(&mut one).await, ["addone", "shared"]);

    one.repository_model_load(bring("mine", 10.0)).await.unwrap();
    one.repository_model_load(bring("shared", 20.0)).await.unwrap();
    assert_eq!(names(&mut one).await, ["addone", "mine", "shared"]);
    assert_eq!(names(&mut other).await, ["addone", "shared"]);
    assert_eq!(sum(&mut one, "mine").await.unwrap(), [11.0, 12.0]);
    let status = sum(&mut other, "mine").await.expect_err("not its own");
    assert_eq!(
        (status.code(), status.message()),
        (Code::NotFound, "Request for unknown model: 'mine' is not found")
    );
    assert_eq!(sum(&mut one, "shared").await.unwrap(), [21.0, 22.0], "its own goes first");
    assert_eq!(sum(&mut other, "shared").await.unwrap(), [2.0, 3.0]);

    let unload = |name: &str| RepositoryModelUnloadRequest { model_name: name.into(), ..Default::default() };
    one.repository_model_unload(unload("shared")).await.unwrap();
    assert_eq!(sum(&mut one, "shared").await.unwrap(), [2.0, 3.0], "the host's is there again");
    one.repository_model_unload(unload("shared")).await.unwrap();
    assert_eq!(sum(&mut one, "shared").await.expect_err("unloaded").code(), Code::NotFound);
    assert_eq!(sum(&mut other, "shared").await.unwrap(), [2.0, 3.0], "for the other it is as it was");

    // Nor does anybody see what others run.
    let all = ModelStatisticsRequest::default();
    let counted = |reply: tonic::Response<vaccel_client::proto::inference::ModelStatisticsResponse>| {
        let stats = reply.into_inner().model_stats.into_iter();
        stats.map(|stats| (stats.name, stats.inference_count)).collect::<Vec<_>>()
    };
    // What was counted for a model that was brought is gone with it.
    let expected = [("mine".to_owned(), 1), ("shared".to_owned(), 1)];
    assert_eq!(counted(one.model_statistics(all.clone()).await.unwrap()), expected);
    assert_eq!(counted(other.model_statistics(all).await.unwrap()), [("shared".to_owned(), 2)]);
    let regions =
        other.system_shared_memory_status(SystemSharedMemoryStatusRequest::default()).await.unwrap();
    assert!(regions.into_inner().regions.is_empty());
}

#[tokio::test]
async fn a_rule_says_which_of_the_hosts_models_a_tenant_sees() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agent.toml");
    std::fs::write(&file, "[[policy]]\ntenant = \"tcp:*\"\nmodels = [\"pub*\"]\n").unwrap();
    let fill = |models: &super::Models| {
        models.version("public", 1, &add(1.0)).version("private", 1, &add(2.0));
    };
    let agent = start(fill, &["--config", file.to_str().unwrap()]);
    let mut local = inference(&agent.addresses[0]).await;
    let mut far = inference(&agent.addresses[1]).await;
    assert_eq!(names(&mut local).await, ["addone", "private", "public"]);
    assert_eq!(names(&mut far).await, ["public"]);
    let status = sum(&mut far, "private").await.expect_err("not for it");
    assert_eq!(status.message(), "Request for unknown model: 'private' is not found");
    assert_eq!(sum(&mut far, "public").await.unwrap(), [2.0, 3.0]);
    let load = RepositoryModelLoadRequest { model_name: "private".into(), ..Default::default() };
    assert_eq!(far.repository_model_load(load).await.expect_err("not for it").code(), Code::Internal);
}

/// A resource of a session is a model by its id, for its tenant and as long as a session holds it; and the calls of
/// sessions take models of the repository by their names.
#[tokio::test]
async fn sessions_and_the_repository_are_one_namespace() {
    let fill = |models: &super::Models| {
        models.version("shared", 1, &add(1.0)).version("shared", 2, &add(2.0));
    };
    let agent = start(fill, &[]);
    let (mut own, mut other) = (inference(&agent.addresses[0]).await, inference(&agent.addresses[1]).await);
    let client = connect(&agent.addresses[0]).await;
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let held = session.register(ResourceFiles::model("m.onnx", add(10.0))).await.unwrap();
    assert_eq!(sum(&mut own, held.id()).await.unwrap(), [11.0, 12.0]);
    assert_eq!(sum(&mut other, held.id()).await.expect_err("not its own").code(), Code::NotFound);

    let call = async |model: &Resource| {
        let input = named("in", Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap());
        let run = session.run(model, vec![input], &[]).await?;
        Ok::<_, Error>(run.outputs[0].tensor.as_ref().unwrap().elements::<f32>().unwrap().into_owned())
    };
    assert_eq!(call(&held).await.unwrap(), [11.0, 12.0]);
    assert_eq!(call(&Resource::of_repository("shared")).await.unwrap(), [3.0, 4.0], "the latest version");
    let refusal = call(&Resource::of_repository("absent")).await.expect_err("is nowhere");
    assert_eq!(refusal.reason(), Reason::NotFound);
    let refusal = call(&Resource::of_repository("addone")).await.expect_err("has a device of its own");
    assert_eq!(refusal.reason(), Reason::BadArgument, "{refusal}");
    let stats = ModelStatisticsRequest { name: held.id().into(), ..Default::default() };
    let stats = own.model_statistics(stats).await.unwrap().into_inner().model_stats;
    assert_eq!((stats.len(), stats[0].inference_count), (1, 1), "by the protocol's own calls");

    session.close().await.unwrap();
    assert_eq!(sum(&mut own, held.id()).await.expect_err("nobody holds it").code(), Code::NotFound);
}
