//! Guests that break the rules. Each attack is made by one tenant on a real agent; it must end in the right error, cost
//! the agent no more memory than it may, and leave another tenant served.

mod formats;
mod insides;
mod logs;
mod models;
mod requests;
mod resources;
mod wire;

use std::fmt::Debug;

use bytes::Bytes;
use tonic::{Request, Status};
use vaccel_client::proto::error::Detail;
use vaccel_client::proto::limits::MESSAGE_BYTES_MAX;
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::{ModelRunRequest, RunReply, RunRequest};
use vaccel_client::{
    ClassifyOptions, Client, Error, Link, NamedTensor, Reason, Resource, ResourceFiles, ResourceKind,
    Session, SessionOptions, Tensor, named,
};

use crate::support::{Agent, digits, onnxruntime, read};

/// What one attack may add to the agent's memory, in bytes: one message and its copy, and what the allocator keeps.
const ATTACK_BYTES_MAX: u64 = 128 << 20;

/// Longest text of an error: it travels in a header, and clients bound those.
const MESSAGE_CHARS_MAX: usize = 4096;

/// What an agent loads models with.
#[derive(Clone, Copy, Debug)]
enum Engine {
    Tract,
    OnnxRuntime,
}

/// An agent with a well-behaved neighbour of whoever attacks it.
struct Site {
    agent: Agent,
    neighbour: Session,
    image: Bytes,
    label: u32,
}

impl Site {
    async fn start(flags: &[&str]) -> Self {
        Self::on(Engine::Tract, flags).await
    }

    async fn on(engine: Engine, flags: &[&str]) -> Self {
        let addresses = ["unix://{}/hostile", "unix://{}/neighbour"];
        let library = onnxruntime();
        let engine = match engine {
            Engine::Tract => vec!["--engine", "tract"],
            Engine::OnnxRuntime => {
                vec!["--engine", "onnxruntime", "--onnxruntime", library.to_str().unwrap()]
            }
        };
        let agent = Agent::start(&addresses, &[flags, &engine].concat());
        let neighbour = agent.guest(1).await.open_session(SessionOptions::default()).await.unwrap();
        let (path, label) = digits("png").remove(0);
        let site = Self { agent, neighbour, image: read(&path), label: u32::try_from(label).unwrap() };
        // Also loads the engine, so that what memory grows by from here on is the attack's.
        site.serves_others().await;
        site
    }

    /// The neighbour gets the right answer.
    async fn serves_others(&self) {
        let found = self.neighbour.classify([self.image.clone()], ClassifyOptions::default()).await.unwrap();
        assert_eq!(found[0][0].index, self.label);
    }

    async fn attacker(&self) -> Attacker {
        let client = self.agent.guest(0).await;
        let session = client.open_session(SessionOptions::default()).await.unwrap();
        Attacker { client, session }
    }
}

/// A guest that sends what no client library would.
struct Attacker {
    client: Client,
    session: Session,
}

impl Attacker {
    fn link(&self) -> Link {
        self.client.link().clone()
    }

    /// Sends a call as it is.
    async fn run(&self, op: Op) -> Result<RunReply, Error> {
        self.send(Request::new(RunRequest {
            session: self.session.id(),
            op: Some(op),
            ..RunRequest::default()
        }))
        .await
    }

    async fn send(&self, request: Request<RunRequest>) -> Result<RunReply, Error> {
        let client = OperationsClient::new(self.link()).max_encoding_message_size(usize::MAX);
        let reply = client.max_decoding_message_size(MESSAGE_BYTES_MAX).run(request).await;
        reply.map(tonic::Response::into_inner).map_err(|status| Error::from_status(&status))
    }

    async fn register(&self, kind: ResourceKind, files: Vec<(String, Bytes)>) -> Resource {
        self.session.register(ResourceFiles::new(kind, files)).await.unwrap()
    }

    async fn model(&self, content: Bytes) -> Resource {
        self.register(ResourceKind::Model, vec![("model.onnx".into(), content)]).await
    }

    /// What the model gives for one input.
    async fn output(&self, model: &Resource, input: Tensor) -> Result<Tensor, Error> {
        let run = self.session.run(model, vec![named("", input)], &[]).await?;
        Ok(run.outputs[0].tensor.clone().unwrap())
    }
}

fn model_run(model: &str, inputs: Vec<NamedTensor>, outputs: &[&str]) -> Op {
    let outputs = outputs.iter().map(|&name| name.to_owned()).collect();
    Op::ModelRun(ModelRunRequest { model: model.to_owned(), outputs, inputs })
}

fn answer<T>(outcome: Result<tonic::Response<T>, Status>) -> Result<T, Error> {
    outcome.map(tonic::Response::into_inner).map_err(|status| Error::from_status(&status))
}

/// The error of an attack, which must have this reason and, unless empty, name this field.
#[track_caller]
fn refused(attack: &str, outcome: Result<impl Debug, Error>, reason: Reason, field: &str) -> Error {
    let error = outcome.map_or_else(|error| error, |reply| panic!("{attack}: accepted, {reply:?}"));
    assert_eq!(error.reason(), reason, "{attack}: {error:?}");
    assert!(error.message().len() <= MESSAGE_CHARS_MAX, "{attack}: {} characters", error.message().len());
    if !field.is_empty() {
        assert_eq!(error.detail(), &Detail::Field(field.into()), "{attack}: {error:?}");
    }
    error
}
