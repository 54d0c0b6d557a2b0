//! An agent by tonic as it is: its own transport, its own settings, the contract's generated services.

use std::collections::HashMap;
use std::future::pending;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use prost::bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use vaccel_proto::error::Detail;
use vaccel_proto::v1::{self, run_reply::Outcome, run_request::Op};
use vaccel_proto::{Error, Reason};

use crate::MESSAGE_BYTES_MAX;

pub const SESSION: &str = "0123456789abcdef0123456789abcdef";

type Reply<T> = Result<Response<T>, Status>;

#[derive(Default)]
struct Agent {
    files: Mutex<HashMap<Bytes, Vec<u8>>>,
    was_busy: Mutex<bool>,
}

#[tonic::async_trait]
impl v1::agent_server::Agent for Agent {
    async fn info(&self, _: Request<v1::InfoRequest>) -> Reply<v1::InfoReply> {
        Ok(Response::new(v1::InfoReply { version: "interop".into(), ..Default::default() }))
    }
}

#[tonic::async_trait]
impl v1::sessions_server::Sessions for Agent {
    async fn open(&self, _: Request<v1::OpenSessionRequest>) -> Reply<v1::OpenSessionReply> {
        Ok(Response::new(v1::OpenSessionReply { session: SESSION.into(), lease_ms: 1000 }))
    }

    async fn renew(&self, _: Request<v1::RenewSessionRequest>) -> Reply<v1::RenewSessionReply> {
        Ok(Response::new(v1::RenewSessionReply { lease_ms: 1000 }))
    }

    async fn close(&self, _: Request<v1::CloseSessionRequest>) -> Reply<v1::CloseSessionReply> {
        Ok(Response::new(v1::CloseSessionReply {}))
    }

    async fn profile(&self, _: Request<v1::ProfileRequest>) -> Reply<v1::ProfileReply> {
        Err(Status::unimplemented("no guest asks"))
    }

    async fn list(&self, _: Request<v1::ListSessionsRequest>) -> Reply<v1::ListSessionsReply> {
        Err(Status::unimplemented("no guest asks"))
    }
}

#[tonic::async_trait]
impl v1::resources_server::Resources for Agent {
    async fn register(
        &self,
        request: Request<v1::RegisterResourceRequest>,
    ) -> Reply<v1::RegisterResourceReply> {
        let request = request.into_inner();
        let files = self.files.lock().unwrap();
        let missing = request.files.iter().filter(|file| !files.contains_key(&file.sha256));
        let missing: Vec<_> =
            missing.map(|file| v1::MissingFile { sha256: file.sha256.clone(), offset: 0 }).collect();
        let resource = if missing.is_empty() { "a".repeat(64) } else { String::new() };
        Ok(Response::new(v1::RegisterResourceReply { resource, missing }))
    }

    async fn upload(&self, request: Request<Streaming<v1::UploadRequest>>) -> Reply<v1::UploadReply> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.unwrap();
        let mut content = first.data.to_vec();
        while let Some(message) = messages.message().await? {
            content.extend_from_slice(&message.data);
        }
        assert_eq!((content.len() as u64, &Sha256::digest(&content)[..]), (first.size, &first.sha256[..]));
        self.files.lock().unwrap().insert(first.sha256, content);
        Ok(Response::new(v1::UploadReply { offset: first.size }))
    }

    type ReadStream = tokio_stream::Empty<Result<v1::ReadResourceReply, Status>>;

    async fn read(&self, _: Request<v1::ReadResourceRequest>) -> Reply<Self::ReadStream> {
        Err(Status::unimplemented("no guest asks"))
    }

    async fn unregister(
        &self,
        _: Request<v1::UnregisterResourceRequest>,
    ) -> Reply<v1::UnregisterResourceReply> {
        Ok(Response::new(v1::UnregisterResourceReply {}))
    }

    async fn list(&self, _: Request<v1::ListResourcesRequest>) -> Reply<v1::ListResourcesReply> {
        Err(Status::unimplemented("no guest asks"))
    }
}

impl Agent {
    async fn classify(&self, request: v1::ImageClassificationRequest) -> Result<Outcome, Status> {
        match request.top_k {
            97 if !std::mem::replace(&mut *self.was_busy.lock().unwrap(), true) => {
                let detail = Detail::RetryAfter(Duration::from_millis(20));
                return Err(Error::new(Reason::Overloaded, "busy").with(detail).to_status());
            }
            98 => return Err(Error::new(Reason::BadArgument, "100 % é").to_status()),
            99 => pending().await,
            _ => {}
        }
        let label = |index| v1::Label { index, name: format!("class {index}"), probability: 0.5 };
        let labels: Vec<_> = (0..request.top_k).map(label).collect();
        let classifications = request.images.iter().map(|_| v1::Classification { labels: labels.clone() });
        let classifications = classifications.collect();
        Ok(Outcome::ImageClassification(v1::ImageClassificationReply { classifications }))
    }
}

#[tonic::async_trait]
impl v1::operations_server::Operations for Agent {
    async fn run(&self, request: Request<v1::RunRequest>) -> Reply<v1::RunReply> {
        let request = request.into_inner();
        assert_eq!(request.session, SESSION);
        let outcome = match request.op.unwrap() {
            Op::Noop(_) => Outcome::Noop(v1::NoopReply {}),
            Op::ImageClassification(request) => self.classify(request).await?,
            Op::ModelRun(request) => Outcome::ModelRun(v1::ModelRunReply { outputs: request.inputs }),
            other => panic!("nothing here asks for {other:?}"),
        };
        let timings = Some(v1::Timings { queue_us: 1, run_us: 2, batch_size: 3 });
        Ok(Response::new(v1::RunReply { timings, outcome: Some(outcome), ..v1::RunReply::default() }))
    }

    type RunLargeStream = tonic::codegen::tokio_stream::Empty<Result<v1::RunPiece, Status>>;

    async fn run_large(&self, _: Request<Streaming<v1::RunPiece>>) -> Reply<Self::RunLargeStream> {
        Err(Status::unimplemented("no guest asks"))
    }
}

/// Serves on a unix socket, on a thread of its own that ends with the test.
pub fn serve(path: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let listener = {
        let _inside = runtime.enter();
        UnixListener::bind(path).unwrap()
    };
    std::thread::spawn(move || {
        let agent = std::sync::Arc::new(Agent::default());
        let operations = v1::operations_server::OperationsServer::from_arc(agent.clone());
        let server = Server::builder()
            .add_service(v1::agent_server::AgentServer::from_arc(agent.clone()))
            .add_service(v1::sessions_server::SessionsServer::from_arc(agent.clone()))
            .add_service(v1::resources_server::ResourcesServer::from_arc(agent))
            .add_service(
                operations.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(usize::MAX),
            );
        runtime.block_on(server.serve_with_incoming(UnixListenerStream::new(listener))).unwrap();
    });
}
