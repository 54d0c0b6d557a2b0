//! Guests of one agent never meet: each sees, uses and spends only what is its own.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tonic::codegen::tokio_stream;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use vaccel_client::proto::error::Detail;
use vaccel_client::proto::limits::CHUNK_BYTES_MAX;
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::resources_client::ResourcesClient;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::sessions_client::SessionsClient;
use vaccel_client::proto::v1::{
    CloseSessionRequest, ExecRequest, ExecWithResourceRequest, File, ImageClassificationRequest,
    ImageDepthRequest, ImageDetectionRequest, ImagePoseRequest, ImageSegmentationRequest,
    ListResourcesRequest, ModelRunRequest, NoopRequest, ProfileRequest, ReadResourceRequest,
    RegisterResourceReply, RegisterResourceRequest, RenewSessionRequest, ResourceInfo, RunRequest, Shared,
    TfModelLoadRequest, TfModelRunRequest, TfModelUnloadRequest, TfliteModelLoadRequest,
    TfliteModelRunRequest, TfliteModelUnloadRequest, TorchModelLoadRequest, TorchModelRunRequest,
    TorchModelUnloadRequest, UnregisterResourceRequest, UploadRequest, Usage,
};
use vaccel_client::{
    Client, Error, Link, Reason, Resource, ResourceFiles, ResourceKind, Session, SessionOptions, Tensor,
    named,
};

use crate::support::{Agent, digits, endpoint, onnx, read, repository};

/// Ids no agent gave out, as long as those it does.
const ABSENT_SESSION: &str = "11111111111111111111111111111111";
const ABSENT_RESOURCE: &str = "2222222222222222222222222222222222222222222222222222222222222222";

const MEBIBYTE: usize = 1 << 20;

/// Text fields of requests that name nothing the agent holds.
const NO_NAMES: [&str; 18] = [
    "File.name",
    "Label.name",
    "ModelRunRequest.outputs",
    "ModelDescription.format",
    "ModelPort.name",
    "NamedTensor.name",
    "OpenSessionRequest.device",
    "OpenSessionRequest.engine",
    "ReadResourceRequest.file",
    "TfInput.name",
    "TfNode.name",
    "TfStatus.message",
    "OpencvRequest.function",
    "OperationProfile.name",
    "ExecRequest.symbol",
    "ExecWithResourceRequest.symbol",
    "Segment.name",
    "Keypoint.name",
];

/// What the .proto files say.
pub struct Contract {
    /// Path and request of every method.
    pub methods: Vec<(String, String)>,
    /// Every text field of every message but replies, as `Message.field`.
    texts: BTreeSet<String>,
}

/// Reads the contract where a person writes it, so that what is added there is seen here.
pub fn contract() -> Contract {
    let folder = repository().join("proto/vaccel/v1");
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut contract = Contract { methods: Vec::new(), texts: BTreeSet::new() };
    for path in paths.filter(|path| path.extension().is_some_and(|ending| ending == "proto")) {
        contract.add(&path);
    }
    contract
}

impl Contract {
    fn add(&mut self, path: &Path) {
        let text = std::fs::read_to_string(path).unwrap();
        let code = text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n");
        let spaced = code.replace("(stream ", "(").replace(['(', ')', ';'], " ").replace('{', " { ");
        let words: Vec<&str> = spaced.split_whitespace().collect();
        let (mut package, mut service, mut message) = ("", "", "");
        for triple in words.windows(3) {
            match *triple {
                ["package", name, _] => package = name,
                ["service", name, "{"] => service = name,
                ["message", name, "{"] => message = name,
                ["rpc", method, request] => {
                    self.methods.push((format!("/{package}.{service}/{method}"), request.into()));
                }
                ["string", field, "="] if !message.ends_with("Reply") && !message.ends_with("Info") => {
                    self.texts.insert(format!("{message}.{field}"));
                }
                _ => {}
            }
        }
    }
}

/// One after the other, every field by which a request can name a session or a resource: what the agent
/// answers to `session` and `resource` there. Where only a resource is in question, the session is the
/// caller's `own`.
async fn ask(
    link: &Link,
    own: &str,
    session: &str,
    resource: &str,
) -> Vec<(&'static str, Result<(), Status>)> {
    let mut sessions = SessionsClient::new(link.clone());
    let mut resources = ResourcesClient::new(link.clone());
    let (s, r) = (|| session.to_owned(), || resource.to_owned());
    let unregister = |session: String| UnregisterResourceRequest { session, resource: r(), all: false };
    let reading = |session| ReadResourceRequest { session, resource: r(), ..ReadResourceRequest::default() };
    let image = read(&digits("png")[0].0);
    let classify = |model| {
        let images = vec![image.clone()];
        Op::ImageClassification(ImageClassificationRequest { model, top_k: 1, images })
    };
    let infer =
        || Op::ModelRun(ModelRunRequest { model: r(), outputs: vec![], inputs: vec![named("", x())] });
    let mut asked = vec![
        ("RenewSessionRequest.session", sessions.renew(RenewSessionRequest { session: s() }).await.map(drop)),
        ("ProfileRequest.session", sessions.profile(ProfileRequest { session: s() }).await.map(drop)),
        ("RegisterResourceRequest.session", register(link, session, b"a file").await.map(drop)),
        ("UploadRequest.session", upload(link, session, b"a file", 0..6).await.map(drop)),
        ("UnregisterResourceRequest.session", resources.unregister(unregister(s())).await.map(drop)),
        ("UnregisterResourceRequest.resource", resources.unregister(unregister(own.into())).await.map(drop)),
        (
            "ListResourcesRequest.session",
            resources.list(ListResourcesRequest { session: s() }).await.map(drop),
        ),
        ("ReadResourceRequest.session", resources.read(reading(s())).await.map(drop)),
        ("ReadResourceRequest.resource", resources.read(reading(own.into())).await.map(drop)),
        ("RunRequest.session", run(link, session, Op::Noop(NoopRequest {})).await),
        ("RunRequest.session", run(link, session, classify(String::new())).await),
        ("RunRequest.session", run(link, session, infer()).await),
        ("ImageClassificationRequest.model", run(link, own, classify(r())).await),
        ("ModelRunRequest.model", run(link, own, infer()).await),
    ];
    // A region has a name of the same kind; `shared` asks for one that is really another's.
    let shared = Some(Shared { region: s(), ..Shared::default() });
    let in_region = RunRequest {
        session: own.into(),
        shared,
        op: Some(Op::Noop(NoopRequest {})),
        ..RunRequest::default()
    };
    let ran = OperationsClient::new(link.clone()).run(in_region).await;
    asked.push(("Shared.region", ran.map(drop)));
    let held = families(resource).into_iter().chain(libraries(resource)).chain(sights(resource));
    for (field, op) in held {
        asked.push(("RunRequest.session", run(link, session, op.clone()).await));
        asked.push((field, run(link, own, op).await));
    }
    let close = sessions.close(CloseSessionRequest { session: s() }).await.map(drop);
    asked.push(("CloseSessionRequest.session", close));
    asked
}

/// The calls of every family on a model.
fn families(model: &str) -> Vec<(&'static str, Op)> {
    let model = || model.to_owned();
    vec![
        ("TfModelLoadRequest.model", Op::TfModelLoad(TfModelLoadRequest { model: model() })),
        ("TfModelUnloadRequest.model", Op::TfModelUnload(TfModelUnloadRequest { model: model() })),
        (
            "TfModelRunRequest.model",
            Op::TfModelRun(TfModelRunRequest { model: model(), ..Default::default() }),
        ),
        ("TfliteModelLoadRequest.model", Op::TfliteModelLoad(TfliteModelLoadRequest { model: model() })),
        (
            "TfliteModelUnloadRequest.model",
            Op::TfliteModelUnload(TfliteModelUnloadRequest { model: model() }),
        ),
        (
            "TfliteModelRunRequest.model",
            Op::TfliteModelRun(TfliteModelRunRequest { model: model(), ..Default::default() }),
        ),
        ("TorchModelLoadRequest.model", Op::TorchModelLoad(TorchModelLoadRequest { model: model() })),
        ("TorchModelUnloadRequest.model", Op::TorchModelUnload(TorchModelUnloadRequest { model: model() })),
        (
            "TorchModelRunRequest.model",
            Op::TorchModelRun(TorchModelRunRequest { model: model(), ..Default::default() }),
        ),
    ]
}

/// The calls of functions of a library.
fn libraries(library: &str) -> [(&'static str, Op); 2] {
    let (library, symbol) = (library.to_owned(), "f".to_owned());
    let exec = ExecRequest { library: library.clone(), symbol: symbol.clone(), ..Default::default() };
    let with = ExecWithResourceRequest { resource: library, symbol, ..Default::default() };
    [
        ("ExecRequest.library", Op::Exec(exec)),
        ("ExecWithResourceRequest.resource", Op::ExecWithResource(with)),
    ]
}

/// The calls on one image.
fn sights(model: &str) -> [(&'static str, Op); 4] {
    let model = || model.to_owned();
    let detection = ImageDetectionRequest { model: model(), ..Default::default() };
    let segmentation = ImageSegmentationRequest { model: model(), ..Default::default() };
    let pose = ImagePoseRequest { model: model(), ..Default::default() };
    let depth = ImageDepthRequest { model: model(), ..Default::default() };
    [
        ("ImageDetectionRequest.model", Op::ImageDetection(detection)),
        ("ImageSegmentationRequest.model", Op::ImageSegmentation(segmentation)),
        ("ImagePoseRequest.model", Op::ImagePose(pose)),
        ("ImageDepthRequest.model", Op::ImageDepth(depth)),
    ]
}

/// A folder for an agent that lets everybody bring libraries: `--config {}/agent.toml`.
fn trusting() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("agent.toml"), "[[policy]]\ntenant = '*'\nexec = true\n").unwrap();
    folder
}

async fn run(link: &Link, session: &str, op: Op) -> Result<(), Status> {
    let request = RunRequest { session: session.into(), op: Some(op), ..RunRequest::default() };
    OperationsClient::new(link.clone()).run(request).await.map(drop)
}

fn x() -> Tensor {
    Tensor::new(&[1, 2], &[0.5_f32, 0.5]).unwrap()
}

fn hash(content: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&Sha256::digest(content))
}

async fn register(link: &Link, session: &str, content: &[u8]) -> Result<RegisterResourceReply, Status> {
    let file = File { name: "f".into(), size: content.len() as u64, sha256: hash(content) };
    let request = RegisterResourceRequest {
        session: session.into(),
        kind: ResourceKind::Data.into(),
        files: vec![file],
    };
    ResourcesClient::new(link.clone()).register(request).await.map(tonic::Response::into_inner)
}

/// Uploads a part of a file; returns how much of it the agent has then.
async fn upload(
    link: &Link,
    session: &str,
    content: &[u8],
    part: std::ops::Range<usize>,
) -> Result<u64, Status> {
    let request = UploadRequest {
        session: session.into(),
        sha256: hash(content),
        size: content.len() as u64,
        offset: part.start as u64,
        data: Bytes::copy_from_slice(&content[part]),
    };
    let mut client = ResourcesClient::new(link.clone());
    Ok(client.upload(tokio_stream::once(request)).await?.into_inner().offset)
}

/// Checks that the session and the resource, each of them somebody else's, answer as those that never were.
async fn assert_hidden(link: &Link, own: &str, session: &str, resource: &str) {
    let real = ask(link, own, session, resource).await;
    let made_up = ask(link, own, ABSENT_SESSION, ABSENT_RESOURCE).await;
    let told = |status: &Status, session: &str, resource: &str| -> (Code, String, String) {
        let hide = |text: &str| text.replace(resource, "RESOURCE").replace(session, "SESSION");
        let details = String::from_utf8_lossy(status.details());
        (status.code(), hide(status.message()), hide(&details))
    };
    for ((field, real), (_, made_up)) in real.into_iter().zip(made_up) {
        let (real, made_up) = (real.expect_err(field), made_up.expect_err(field));
        assert_eq!(Error::from_status(&real).reason(), Reason::NotFound, "{field}: {real:?}");
        let (real, made_up) =
            (told(&real, session, resource), told(&made_up, ABSENT_SESSION, ABSENT_RESOURCE));
        assert_eq!(real, made_up, "{field}");
    }
}

/// A guest with a session that holds a model of its own, and a session that holds nothing.
struct Guest {
    client: Client,
    session: Session,
    model: Resource,
    empty: Session,
}

/// All that a guest can see of what it holds.
type Held = (Vec<(String, u64)>, Vec<ResourceInfo>, Usage);

impl Guest {
    async fn new(client: Client, name: &str) -> Self {
        let session = client.open_session(SessionOptions::default()).await.unwrap();
        let empty = client.open_session(SessionOptions::default()).await.unwrap();
        // The producer's name makes it another file.
        let model = [onnx::add(), onnx::Message::default().bytes(2, name).finish()].concat();
        let model = session.register(ResourceFiles::model("m.onnx", model)).await.unwrap();
        Self { client, session, model, empty }
    }

    async fn held(&self) -> Held {
        let sessions = self.client.list_sessions().await.unwrap().into_iter();
        let sessions = sessions.map(|session| (session.session, session.resources)).collect();
        let resources = self.session.list_resources().await.unwrap();
        (sessions, resources, usage(&self.client).await)
    }

    async fn assert_sees_its_own_and_works(&self, held: &Held) {
        assert_eq!(self.held().await, *held);
        assert_eq!(held.0, [(self.session.id(), 1), (self.empty.id(), 0)]);
        assert_eq!(held.1.len(), 1);
        assert_eq!(held.1[0].resource, self.model.id());
        assert!(self.empty.list_resources().await.unwrap().is_empty());
        let run = self.session.run(&self.model, vec![named("", x())], &[]).await.unwrap();
        assert_eq!(run.outputs[0].tensor.as_ref().unwrap().elements::<f32>().unwrap().as_ref(), [1.5, 2.5]);
    }
}

async fn usage(client: &Client) -> Usage {
    client.info().await.unwrap().usage.unwrap()
}

async fn open(client: &Client) -> Session {
    client.open_session(SessionOptions::default()).await.unwrap()
}

/// Two tenants of one agent.
async fn two_tenants(flags: &[&str]) -> (Agent, Client, Client) {
    let flags = [flags, &["--config", "{}/agent.toml"]].concat();
    let agent = Agent::start_in(trusting(), &["unix://{}/a", "unix://{}/b"], &flags);
    let (a, b) = (agent.guest(0).await, agent.guest(1).await);
    (agent, a, b)
}

fn assert_over_quota(refusal: &Error, limit: usize, used: usize, unit: &str) {
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal:?}");
    let Detail::Limit { limit: told_limit, used: told_used, unit: told_unit, .. } = refusal.detail() else {
        panic!("{refusal:?} has no figures");
    };
    assert_eq!((*told_limit, *told_used, told_unit.as_str()), (limit as u64, used as u64, unit));
    for figure in [limit, used] {
        assert!(refusal.message().contains(&figure.to_string()), "{refusal:?}");
    }
}

#[tokio::test]
async fn what_is_anothers_answers_as_what_never_was() {
    let folder = trusting();
    std::fs::write(folder.path().join("tokens"), "red rrrrrrrrrrrrrrrr\nblue bbbbbbbbbbbbbbbb\n").unwrap();
    let addresses =
        ["unix://{}/a", "unix://{}/b", "hvsock://{}/v:2048", "hvsock://{}/w:2048", "tcp://127.0.0.1:0"];
    let agent =
        Agent::start_in(folder, &addresses, &["--token-file", "{}/tokens", "--config", "{}/agent.toml"]);
    let mut guests = Vec::new();
    for index in 0..4 {
        guests.push(Guest::new(agent.guest(index).await, &format!("guest {index}")).await);
    }
    for token in ["rrrrrrrrrrrrrrrr", "bbbbbbbbbbbbbbbb"] {
        let builder = Client::builder(endpoint(&agent.addresses[4])).token(token);
        guests.push(Guest::new(builder.connect().await.unwrap(), token).await);
    }
    for (owner, this) in guests.iter().enumerate() {
        let held = this.held().await;
        for (_, other) in guests.iter().enumerate().filter(|(other, _)| *other != owner) {
            let link = other.client.link();
            assert_hidden(link, &other.empty.id(), &this.session.id(), this.model.id()).await;
        }
        this.assert_sees_its_own_and_works(&held).await;
    }
}

#[tokio::test]
async fn every_field_that_names_something_is_asked_about() {
    let contract = contract();
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    let asked = ask(client.link(), &session.id(), ABSENT_SESSION, ABSENT_RESOURCE).await;
    let asked: BTreeSet<String> = asked.into_iter().map(|(field, _)| field.to_owned()).collect();
    let naming: BTreeSet<String> =
        contract.texts.into_iter().filter(|field| !NO_NAMES.contains(&field.as_str())).collect();
    assert_eq!(asked, naming, "a field is missing from `ask`, or from NO_NAMES if it names nothing");
    // Those that name nothing cannot reach what is another's.
    for (path, request) in contract.methods {
        let names = naming.iter().any(|field| field.split_once('.').unwrap().0 == request);
        // The pieces of a request name nothing by themselves; `large` asks what is in them.
        let nameless = ["InfoRequest", "OpenSessionRequest", "ListSessionsRequest", "RunPiece"];
        assert!(names != nameless.contains(&request.as_str()), "{path}: does {request} name something?");
    }
}

#[tokio::test]
async fn what_one_tenant_uploads_is_missing_for_another() {
    let (_agent, a, b) = two_tenants(&[]).await;
    let (first, second) = (open(&a).await.id(), open(&b).await.id());
    let (a, b) = (a.link(), b.link());
    let content = b"known to one, and not to the other";

    assert_eq!(upload(a, &first, content, 0..5).await.unwrap(), 5);
    assert_eq!(register(a, &first, content).await.unwrap().missing[0].offset, 5);
    assert_eq!(register(b, &second, content).await.unwrap().missing[0].offset, 0);
    let refusal = Error::from_status(&upload(b, &second, content, 5..content.len()).await.unwrap_err());
    assert_eq!(refusal.message(), "offset: expected 0, got 5");

    upload(a, &first, content, 5..content.len()).await.unwrap();
    assert!(register(a, &first, content).await.unwrap().missing.is_empty());
    assert_eq!(register(b, &second, content).await.unwrap().missing[0].offset, 0);
    // Nor is the content taken on trust: whoever knows only its hash does not get it.
    assert_eq!(upload(b, &second, content, 0..4).await.unwrap(), 4);
    assert_eq!(register(b, &second, content).await.unwrap().missing[0].offset, 4);
    upload(b, &second, content, 4..content.len()).await.unwrap();
    assert!(register(b, &second, content).await.unwrap().missing.is_empty());
}

#[tokio::test]
async fn sessions_of_a_tenant_share_files_and_not_resources() {
    let (_agent, client, _) = two_tenants(&[]).await;
    let (first, second) = (open(&client).await, open(&client).await);
    let content = onnx::add();
    let model = first.register(ResourceFiles::model("m.onnx", content.clone())).await.unwrap();
    assert_hidden(client.link(), &second.id(), ABSENT_SESSION, model.id()).await;

    // No byte goes up: the one call that registers says that nothing is missing.
    let file = File { name: "m.onnx".into(), size: content.len() as u64, sha256: hash(&content) };
    let kind = ResourceKind::Model.into();
    let request = RegisterResourceRequest { session: second.id(), kind, files: vec![file] };
    let reply = ResourcesClient::new(client.link().clone()).register(request).await.unwrap().into_inner();
    assert_eq!((reply.resource.as_str(), reply.missing), (model.id(), vec![]));
    second.run(&model, vec![named("", x())], &[]).await.unwrap();
    assert_eq!(usage(&client).await.resource_bytes, content.len() as u64, "stored once");

    first.unregister(&model).await.unwrap();
    assert_hidden(client.link(), &first.id(), ABSENT_SESSION, model.id()).await;
    second.run(&model, vec![named("", x())], &[]).await.unwrap();
}

#[tokio::test]
async fn connections_of_one_path_are_one_tenant() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    let again = agent.guest(0).await;
    assert_eq!(again.info().await.unwrap().tenant, client.info().await.unwrap().tenant);
    assert_eq!(again.list_sessions().await.unwrap()[0].session, session.id());
    for link in [client.link(), again.link()] {
        run(link, &session.id(), Op::Noop(NoopRequest {})).await.unwrap();
    }
    let close = CloseSessionRequest { session: session.id() };
    SessionsClient::new(again.link().clone()).close(close).await.unwrap();
    let renew = RenewSessionRequest { session: session.id() };
    let refusal = SessionsClient::new(client.link().clone()).renew(renew).await.unwrap_err();
    assert_eq!(Error::from_status(&refusal).reason(), Reason::NotFound);
}

#[tokio::test]
async fn usage_is_counted_by_tenant() {
    let (_agent, a, b) = two_tenants(&[]).await;
    let (first, _second, third) = (open(&a).await, open(&a).await, open(&b).await);
    upload(a.link(), &first.id(), b"ten bytes!", 0..3).await.unwrap();
    let used = |sessions, resource_bytes, cached_bytes| Usage {
        sessions,
        calls_in_flight: 1,
        resource_bytes,
        cached_bytes,
    };
    assert_eq!(usage(&a).await, used(2, 10, 0), "a file counts by its declared size");
    assert_eq!(usage(&b).await, used(1, 0, 0));
    upload(b.link(), &third.id(), b"ten bytes!", 0..10).await.unwrap();
    first.close().await.unwrap();
    assert_eq!(usage(&a).await, used(1, 0, 3), "what came stays for whoever goes on with it");
    assert_eq!(usage(&b).await, used(1, 10, 0));
}

#[tokio::test]
async fn a_tenant_opens_as_many_sessions_as_it_may() {
    let (_agent, a, b) = two_tenants(&["--tenant-sessions-max", "2"]).await;
    let (first, _second) = (open(&a).await, open(&a).await);
    let refusal = a.open_session(SessionOptions::default()).await.unwrap_err();
    assert_over_quota(&refusal, 2, 3, "sessions");
    let (_, _) = (open(&b).await, open(&b).await);
    first.close().await.unwrap();
    open(&a).await;
}

#[tokio::test]
async fn a_tenant_stores_as_many_bytes_as_it_may() {
    let (_agent, a, b) = two_tenants(&["--tenant-resource-mib", "1"]).await;
    let data =
        |bytes: usize| ResourceFiles::new(ResourceKind::Data, vec![("f".into(), vec![7; bytes].into())]);
    let session = open(&a).await;
    let refusal = session.register(data(MEBIBYTE + 1)).await.unwrap_err();
    assert_over_quota(&refusal, MEBIBYTE, MEBIBYTE + 1, "bytes");
    session.register(data(MEBIBYTE)).await.unwrap();
    let refusal = session.register(data(1)).await.unwrap_err();
    assert_over_quota(&refusal, MEBIBYTE, MEBIBYTE + 1, "bytes");
    // What is stored already takes nothing.
    open(&a).await.register(data(MEBIBYTE)).await.unwrap();
    open(&b).await.register(data(MEBIBYTE)).await.unwrap();
    assert_eq!(usage(&a).await.resource_bytes, MEBIBYTE as u64);

    for session in a.list_sessions().await.unwrap() {
        let close = CloseSessionRequest { session: session.session };
        SessionsClient::new(a.link().clone()).close(close).await.unwrap();
    }
    assert_eq!(usage(&a).await.resource_bytes, 0);
    let session = open(&a).await;
    let one = session.register(data(1)).await.unwrap();
    let refusal = session.register(data(MEBIBYTE)).await.unwrap_err();
    assert_over_quota(&refusal, MEBIBYTE, MEBIBYTE + 1, "bytes");
    session.unregister(&one).await.unwrap();
    session.register(data(MEBIBYTE)).await.unwrap();
}

#[tokio::test]
async fn a_tenant_has_as_many_calls_in_flight_as_it_may() {
    let (_agent, a, b) = two_tenants(&["--tenant-calls-max", "1"]).await;
    let session = open(&a).await.id();
    let data = Bytes::from(vec![7; CHUNK_BYTES_MAX]);
    let (size, sha256) = (4 * CHUNK_BYTES_MAX as u64, hash(b"whatever it will be"));
    let first = UploadRequest { session, sha256, size, offset: 0, data: data.clone() };
    let (pieces, waiting) = tokio::sync::mpsc::channel(1);
    let mut resources = ResourcesClient::new(a.link().clone());
    let call = tokio::spawn(async move { resources.upload(ReceiverStream::new(waiting)).await });
    pieces.send(first).await.unwrap();
    pieces.send(UploadRequest { data, ..UploadRequest::default() }).await.unwrap();
    // The first piece fills the window: the second leaves when the agent has begun to read, with the call
    // counted.
    drop(pieces.reserve().await.unwrap());

    assert_over_quota(&a.info().await.unwrap_err(), 1, 2, "calls");
    assert_eq!(usage(&b).await.calls_in_flight, 1);
    drop(pieces);
    assert_eq!(call.await.unwrap().unwrap().into_inner().offset, 2 * CHUNK_BYTES_MAX as u64);
    assert_eq!(usage(&a).await.calls_in_flight, 1);
}
