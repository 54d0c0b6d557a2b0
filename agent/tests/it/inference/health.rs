//! Health by name, and what services there are.

use tonic::Code;
use tonic::codegen::tokio_stream;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use vaccel_client::proto::inference::{RepositoryModelLoadRequest, RepositoryModelUnloadRequest};

use super::{inference, start};
use crate::support::{connect, until};

fn asked(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

#[tokio::test]
async fn health_is_told_by_service_and_by_model_and_changes_are_told_too() {
    let agent = start(|models| _ = models.config("broken", "backend: \"python\""), &[]);
    let mut health = HealthClient::new(connect(agent.address()).await.link().clone());
    for name in
        ["", "vaccel.v1.Operations", "inference.GRPCInferenceService", "grpc.health.v1.Health", "addone"]
    {
        let status = health.check(asked(name)).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{name}");
    }
    let status = health.check(asked("broken")).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::NotServing);
    for name in ["nope", "vaccel.v1", "inference.Other"] {
        assert_eq!(health.check(asked(name)).await.expect_err(name).code(), Code::NotFound);
    }

    let mut watch = health.watch(asked("addone")).await.unwrap().into_inner();
    let mut absent = health.watch(asked("nope")).await.unwrap().into_inner();
    let mut client = inference(agent.address()).await;
    let load = RepositoryModelLoadRequest { model_name: "addone".into(), ..Default::default() };
    let unload = RepositoryModelUnloadRequest { model_name: "addone".into(), ..Default::default() };
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert_eq!(absent.message().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
    client.repository_model_unload(unload).await.unwrap();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    client.repository_model_load(load).await.unwrap();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    // What one tenant unloads is there for another.
    let mut other = HealthClient::new(connect(&agent.addresses[1]).await.link().clone());
    let mut theirs = other.watch(asked("addone")).await.unwrap().into_inner();
    assert_eq!(theirs.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    agent.signal("TERM");
    for watch in [&mut watch, &mut theirs, &mut absent] {
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    }
}

/// A watch lasts as long as its connection, and is no call: a tenant has so many.
#[tokio::test]
async fn watches_are_counted_and_names_are_short() {
    let agent = start(|_| {}, &["--tenant-connections-max", "4"]);
    let mut health = HealthClient::new(connect(agent.address()).await.link().clone());
    let mut watches = Vec::new();
    let refusal = loop {
        match health.watch(asked("nope")).await {
            Ok(watch) => watches.push(watch.into_inner()),
            Err(refusal) => break refusal,
        }
        assert!(watches.len() <= 64, "{} watches", watches.len());
    };
    assert_eq!((watches.len(), refusal.code()), (64, Code::ResourceExhausted), "{refusal}");
    let mut other = HealthClient::new(connect(&agent.addresses[1]).await.link().clone());
    other.watch(asked("")).await.expect("another tenant has its own");
    for watch in &mut watches {
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
    }
    watches.pop();
    until("room for a watch", async || health.watch(asked("")).await.is_ok()).await;
    watches.clear();
    let long = "x".repeat(257);
    until("an end", async || {
        health.watch(asked(&long)).await.is_err_and(|refusal| refusal.code() == Code::InvalidArgument)
    })
    .await;
    assert_eq!(health.check(asked(&long)).await.expect_err("no model").code(), Code::NotFound);
}

#[tokio::test]
async fn services_describe_themselves_to_those_of_this_machine() {
    let agent = start(|_| {}, &[]);
    for address in &agent.addresses {
        let mut reflection = ServerReflectionClient::new(connect(address).await.link().clone());
        let list = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers =
            reflection.server_reflection_info(tokio_stream::once(list)).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
            panic!("{answer:?}");
        };
        let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
        for name in ["inference.GRPCInferenceService", "vaccel.v1.Operations", "grpc.health.v1.Health"] {
            assert!(names.contains(&name.to_owned()), "{names:?}");
        }
    }
}
