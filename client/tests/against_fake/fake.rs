//! An agent small enough to be told what to do wrong, and that counts what reached it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tonic::codegen::tokio_stream;
use tonic::{Request, Response, Status, Streaming};
use vaccel_client::proto::limits::CHUNK_BYTES_MAX;
use vaccel_client::proto::v1::agent_server::{Agent, AgentServer};
use vaccel_client::proto::v1::operations_server::{Operations, OperationsServer};
use vaccel_client::proto::v1::resources_server::{Resources, ResourcesServer};
use vaccel_client::proto::v1::sessions_server::{Sessions, SessionsServer};
use vaccel_client::proto::v1::*;
use vaccel_client::{Client, Endpoint, Error, Reason};

/// What to do with the next run.
pub(crate) enum Step {
    /// Cut the connection and say nothing.
    Cut,
    /// Never answer.
    Hang,
    /// Refuse.
    Refuse(Error),
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) steps: Mutex<VecDeque<Step>>,
    /// The connection of the next upload is cut after so many bytes of it.
    pub(crate) cut_upload_after: Mutex<Option<usize>>,
    /// That cut is a restart.
    pub(crate) cut_forgets: AtomicBool,
    /// Uploads are refused for their size while most of them is still to come.
    pub(crate) refuse_upload: AtomicBool,
    pub(crate) connections: AtomicUsize,
    pub(crate) opened: AtomicUsize,
    pub(crate) runs: AtomicUsize,
    /// Those of them that came over another connection than the first.
    pub(crate) beside: AtomicUsize,
    /// Those of them that came in pieces.
    pub(crate) large: AtomicUsize,
    /// Offset and bytes of each upload.
    pub(crate) uploads: Mutex<Vec<(u64, usize)>>,
    /// Headers of the last request.
    pub(crate) headers: Mutex<http::HeaderMap>,
    /// The next connection gets its first request answered with this frame, and ends.
    pub(crate) hijack: Mutex<Option<&'static [u8]>>,
    cuts: Mutex<Vec<Arc<Notify>>>,
    sessions: Mutex<HashMap<String, BTreeSet<String>>>,
    pub(crate) blobs: Mutex<HashMap<Bytes, Vec<u8>>>,
    next: AtomicUsize,
}

impl State {
    /// As after a restart, with the disk gone too.
    pub(crate) fn forget(&self) {
        self.sessions.lock().unwrap().clear();
        self.blobs.lock().unwrap().clear();
    }

    /// Cuts every connection.
    pub(crate) fn cut_all(&self) {
        self.cuts.lock().unwrap().drain(..).for_each(|cut| cut.notify_one());
    }

    pub(crate) fn runs(&self) -> usize {
        self.runs.load(SeqCst)
    }

    pub(crate) fn opened(&self) -> usize {
        self.opened.load(SeqCst)
    }

    pub(crate) fn held(&self) -> Vec<BTreeSet<String>> {
        self.sessions.lock().unwrap().values().cloned().collect()
    }

    pub(crate) fn then(&self, step: Step) {
        self.steps.lock().unwrap().push_back(step);
    }

    fn session(&self, id: &str) -> Result<(), Status> {
        let known = self.sessions.lock().unwrap().contains_key(id);
        if known { Ok(()) } else { Err(Error::not_found("session", id).into()) }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self: Arc<Self>, stream: S) {
        let number = self.connections.fetch_add(1, SeqCst);
        let hijack = self.hijack.lock().unwrap().take();
        if let Some(frame) = hijack {
            return answer_with(stream, frame).await;
        }
        let cut = Arc::new(Notify::new());
        self.cuts.lock().unwrap().push(Arc::clone(&cut));
        let door = Door(Arc::clone(&self), Arc::clone(&cut), number);
        let service = service_fn(move |request: http::Request<Incoming>| answer(door.clone(), request));
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service);
        tokio::select! {
            _ = connection => {}
            () = cut.notified() => {}
        }
    }
}

/// Speaks just enough HTTP/2 to get one request, answers it with a frame and closes.
async fn answer_with<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, frame: &[u8]) {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const HEADERS: u8 = 1;
    stream.write_all(&SETTINGS).await.unwrap();
    stream.read_exact(&mut [0; b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await.unwrap();
    let mut head = [0; 9];
    while head[3] != HEADERS {
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
    }
    stream.write_all(frame).await.unwrap();
}

async fn answer(
    door: Door,
    request: http::Request<Incoming>,
) -> Result<http::Response<tonic::body::Body>, Infallible> {
    use tower_service::Service;
    *door.0.headers.lock().unwrap() = request.headers().clone();
    let path = request.uri().path().to_owned();
    let request =
        request.map(|body| tonic::body::Body::new(body.map_err(|e| Status::unknown(e.to_string()))));
    match path.split('/').nth(1) {
        Some("vaccel.v1.Agent") => AgentServer::new(door).call(request).await,
        Some("vaccel.v1.Sessions") => SessionsServer::new(door).call(request).await,
        Some("vaccel.v1.Resources") => ResourcesServer::new(door).call(request).await,
        _ => OperationsServer::new(door).max_decoding_message_size(64 << 20).call(request).await,
    }
}

/// The fake agent on a unix socket in a folder of its own.
pub(crate) struct Fake {
    pub(crate) state: Arc<State>,
    folder: tempfile::TempDir,
    task: Option<JoinHandle<()>>,
}

impl Fake {
    /// Not listening yet.
    pub(crate) fn new() -> Self {
        Self { state: Arc::default(), folder: tempfile::tempdir().unwrap(), task: None }
    }

    pub(crate) fn listening() -> Self {
        let mut fake = Self::new();
        fake.listen();
        fake
    }

    pub(crate) fn listen(&mut self) {
        let listener = self.bind();
        let state = Arc::clone(&self.state);
        self.task = Some(tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(Arc::clone(&state).serve(stream));
            }
        }));
    }

    /// The socket, for a test that accepts by itself.
    pub(crate) fn bind(&self) -> UnixListener {
        UnixListener::bind(self.path()).unwrap()
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.path())
    }

    pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S) {
        Arc::clone(&self.state).serve(stream).await;
    }

    /// A client that has one connection for everything.
    pub(crate) async fn client(&self) -> Client {
        Client::builder(self.endpoint()).connections(1).connect().await.unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// One connection's way to the state, what cuts it, and its number.
#[derive(Clone)]
struct Door(Arc<State>, Arc<Notify>, usize);

impl Door {
    async fn cut(&self) -> Status {
        self.1.notify_one();
        std::future::pending().await
    }
}

#[tonic::async_trait]
impl Agent for Door {
    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoReply>, Status> {
        let operations = vec![OperationInfo { name: "noop".into(), summary: "nothing".into() }];
        let absent = "no library".to_owned();
        let engines =
            vec![EngineInfo { name: "ort".into(), absent_because: absent, ..EngineInfo::default() }];
        Ok(Response::new(InfoReply { version: "fake".into(), operations, engines, ..InfoReply::default() }))
    }
}

#[tonic::async_trait]
impl Sessions for Door {
    async fn open(&self, _: Request<OpenSessionRequest>) -> Result<Response<OpenSessionReply>, Status> {
        self.0.opened.fetch_add(1, SeqCst);
        let session = format!("{:032x}", self.0.next.fetch_add(1, SeqCst));
        self.0.sessions.lock().unwrap().insert(session.clone(), BTreeSet::new());
        Ok(Response::new(OpenSessionReply { session, lease_ms: 1000 }))
    }

    async fn renew(
        &self,
        request: Request<RenewSessionRequest>,
    ) -> Result<Response<RenewSessionReply>, Status> {
        self.0.session(&request.get_ref().session)?;
        Ok(Response::new(RenewSessionReply { lease_ms: 1000 }))
    }

    async fn close(
        &self,
        request: Request<CloseSessionRequest>,
    ) -> Result<Response<CloseSessionReply>, Status> {
        self.0.session(&request.get_ref().session)?;
        self.0.sessions.lock().unwrap().remove(&request.get_ref().session);
        Ok(Response::new(CloseSessionReply {}))
    }

    async fn profile(&self, request: Request<ProfileRequest>) -> Result<Response<ProfileReply>, Status> {
        self.0.session(&request.get_ref().session)?;
        Ok(Response::new(ProfileReply::default()))
    }

    async fn list(&self, _: Request<ListSessionsRequest>) -> Result<Response<ListSessionsReply>, Status> {
        let info = |id: &String| SessionInfo { session: id.clone(), ..SessionInfo::default() };
        Ok(Response::new(ListSessionsReply {
            sessions: self.0.sessions.lock().unwrap().keys().map(info).collect(),
        }))
    }
}

#[tonic::async_trait]
impl Resources for Door {
    async fn register(
        &self,
        request: Request<RegisterResourceRequest>,
    ) -> Result<Response<RegisterResourceReply>, Status> {
        let request = request.into_inner();
        self.0.session(&request.session)?;
        let blobs = self.0.blobs.lock().unwrap();
        let missing = request.files.iter().filter_map(|file| {
            let stored = blobs.get(&file.sha256).map(|blob| blob.len() as u64);
            (stored != Some(file.size))
                .then(|| MissingFile { sha256: file.sha256.clone(), offset: stored.unwrap_or(0) })
        });
        let missing: Vec<_> = missing.collect();
        let resource = request.files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join("+");
        if missing.is_empty() {
            let mut sessions = self.0.sessions.lock().unwrap();
            sessions.get_mut(&request.session).unwrap().insert(resource.clone());
        }
        Ok(Response::new(RegisterResourceReply { resource, missing }))
    }

    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadReply>, Status> {
        let mut stream = request.into_inner();
        let first = stream.message().await?.unwrap();
        self.0.session(&first.session)?;
        self.0.uploads.lock().unwrap().push((first.offset, 0));
        if self.0.refuse_upload.load(SeqCst) {
            return Err(Error::limit(Reason::QuotaExceeded, "resources", 1, first.size, "bytes").into());
        }
        let mut piece = first.data;
        loop {
            {
                let mut blobs = self.0.blobs.lock().unwrap();
                let blob = blobs.entry(first.sha256.clone()).or_default();
                blob.extend_from_slice(&piece);
            }
            let taken = {
                let mut uploads = self.0.uploads.lock().unwrap();
                let last = uploads.last_mut().unwrap();
                last.1 += piece.len();
                last.1
            };
            let limit = *self.0.cut_upload_after.lock().unwrap();
            if limit.is_some_and(|limit| taken >= limit) {
                self.0.cut_upload_after.lock().unwrap().take();
                if self.0.cut_forgets.load(SeqCst) {
                    self.0.forget();
                }
                return Err(self.cut().await);
            }
            match stream.message().await? {
                Some(next) => piece = next.data,
                None => break,
            }
        }
        let offset = self.0.blobs.lock().unwrap()[&first.sha256].len() as u64;
        Ok(Response::new(UploadReply { offset }))
    }

    type ReadStream = tonic::codegen::tokio_stream::Empty<Result<ReadResourceReply, Status>>;

    async fn read(&self, _: Request<ReadResourceRequest>) -> Result<Response<Self::ReadStream>, Status> {
        Err(Status::unimplemented("no test reads here"))
    }

    async fn unregister(
        &self,
        request: Request<UnregisterResourceRequest>,
    ) -> Result<Response<UnregisterResourceReply>, Status> {
        let request = request.into_inner();
        self.0.session(&request.session)?;
        self.0.sessions.lock().unwrap().get_mut(&request.session).unwrap().remove(&request.resource);
        Ok(Response::new(UnregisterResourceReply {}))
    }

    async fn list(
        &self,
        request: Request<ListResourcesRequest>,
    ) -> Result<Response<ListResourcesReply>, Status> {
        self.0.session(&request.get_ref().session)?;
        let sessions = self.0.sessions.lock().unwrap();
        let info = |id: &String| ResourceInfo { resource: id.clone(), ..ResourceInfo::default() };
        let resources = sessions[&request.get_ref().session].iter().map(info).collect();
        Ok(Response::new(ListResourcesReply { resources }))
    }
}

#[tonic::async_trait]
impl Operations for Door {
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunReply>, Status> {
        let request = request.into_inner();
        self.0.session(&request.session)?;
        self.0.runs.fetch_add(1, SeqCst);
        self.0.beside.fetch_add(usize::from(self.2 > 0), SeqCst);
        let step = self.0.steps.lock().unwrap().pop_front();
        match step {
            None => {}
            Some(Step::Cut) => return Err(self.cut().await),
            Some(Step::Hang) => std::future::pending().await,
            Some(Step::Refuse(error)) => return Err(error.into()),
        }
        let outcome = match request.op.unwrap() {
            run_request::Op::Noop(_) => run_reply::Outcome::Noop(NoopReply {}),
            // The answer to an image is its length; to a model run, its inputs.
            run_request::Op::ImageClassification(run) => {
                let label =
                    |image: &Bytes| Label { index: u32::try_from(image.len()).unwrap(), ..Label::default() };
                let classify = |image: &Bytes| Classification { labels: vec![label(image)] };
                let classifications = run.images.iter().map(classify).collect();
                run_reply::Outcome::ImageClassification(ImageClassificationReply { classifications })
            }
            run_request::Op::ModelRun(run) => {
                let held = self.0.sessions.lock().unwrap()[&request.session].contains(&run.model);
                if !held {
                    return Err(Error::not_found("resource", &run.model).into());
                }
                run_reply::Outcome::ModelRun(ModelRunReply { outputs: run.inputs })
            }
            // The factors are no product, which is for the client to notice.
            run_request::Op::Sgemm(run) => run_reply::Outcome::Sgemm(SgemmReply { matrices: run.matrices }),
            _ => return Err(Error::new(Reason::UnknownOperation, "the fake has few operations").into()),
        };
        let timings = Some(Timings { queue_us: 1, run_us: 2, batch_size: 3 });
        Ok(Response::new(RunReply { timings, outcome: Some(outcome), ..RunReply::default() }))
    }

    type RunLargeStream = tokio_stream::Iter<std::vec::IntoIter<Result<RunPiece, Status>>>;

    async fn run_large(
        &self,
        request: Request<Streaming<RunPiece>>,
    ) -> Result<Response<Self::RunLargeStream>, Status> {
        let mut pieces = request.into_inner();
        let (mut total, mut whole) = (0, Vec::new());
        while let Some(piece) = pieces.message().await? {
            assert!(piece.data.len() <= CHUNK_BYTES_MAX);
            total += piece.total;
            whole.extend_from_slice(&piece.data);
        }
        assert_eq!(total, whole.len() as u64);
        self.0.large.fetch_add(1, SeqCst);
        let request = RunRequest::decode(&whole[..]).unwrap();
        let reply = self.run(Request::new(request)).await?.into_inner().encode_to_vec();
        let piece = |data: &[u8]| RunPiece { total: 0, data: Bytes::copy_from_slice(data) };
        let mut pieces: Vec<_> = reply.chunks(CHUNK_BYTES_MAX).map(|data| Ok(piece(data))).collect();
        if let Some(Ok(first)) = pieces.first_mut() {
            first.total = reply.len() as u64;
        }
        Ok(Response::new(tokio_stream::iter(pieces)))
    }
}
