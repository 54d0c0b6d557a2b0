//! The door of package `vaccel.v1`: messages to calls, outcomes to messages.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use prost::Message;
use tokio::time::Instant;
use tonic::codegen::tokio_stream::{self, Stream};
use tonic::{Request, Response, Status, Streaming};
use vaccel_proto::Error;
use vaccel_proto::carrier::Aligned;
use vaccel_proto::limits::CHUNK_BYTES_MAX;
use vaccel_proto::v1::agent_server::Agent;
use vaccel_proto::v1::operations_server::Operations;
use vaccel_proto::v1::resources_server::Resources;
use vaccel_proto::v1::sessions_server::Sessions;
use vaccel_proto::v1::{
    CloseSessionReply, CloseSessionRequest, InfoReply, InfoRequest, ListResourcesReply, ListResourcesRequest,
    ListSessionsReply, ListSessionsRequest, OpenSessionReply, OpenSessionRequest, ProfileReply,
    ProfileRequest, ReadResourceReply, ReadResourceRequest, RegisterResourceReply, RegisterResourceRequest,
    RenewSessionReply, RenewSessionRequest, RunPiece, RunReply, RunRequest, UnregisterResourceReply,
    UnregisterResourceRequest, UploadReply, UploadRequest,
};

use super::body::HeldBytes;
use super::caller;
use crate::dispatch::{Dispatch, Pieces};
use crate::quota::Hold;
use crate::resource::{Hash, ReadBegin, Reading, UploadBegin};
use crate::scheduler::past_deadline;

/// The four services.
#[derive(Debug)]
pub(super) struct Door {
    dispatch: Arc<Dispatch>,
}

impl Door {
    pub(super) fn new(dispatch: Arc<Dispatch>) -> Arc<Self> {
        Arc::new(Self { dispatch })
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[tonic::async_trait]
impl Agent for Door {
    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoReply>, Status> {
        Ok(Response::new(self.dispatch.info(&caller(&request)?).await?))
    }
}

#[tonic::async_trait]
impl Sessions for Door {
    async fn open(&self, request: Request<OpenSessionRequest>) -> Result<Response<OpenSessionReply>, Status> {
        let caller = caller(&request)?;
        let (session, lease) = self.dispatch.open_session(&caller, request.into_inner()).await?;
        Ok(Response::new(OpenSessionReply { session, lease_ms: millis(lease) }))
    }

    async fn renew(
        &self,
        request: Request<RenewSessionRequest>,
    ) -> Result<Response<RenewSessionReply>, Status> {
        let lease = self.dispatch.renew_session(&caller(&request)?, &request.get_ref().session).await?;
        Ok(Response::new(RenewSessionReply { lease_ms: millis(lease) }))
    }

    async fn profile(&self, request: Request<ProfileRequest>) -> Result<Response<ProfileReply>, Status> {
        let operations = self.dispatch.profile(&caller(&request)?, &request.get_ref().session).await?;
        Ok(Response::new(ProfileReply { operations }))
    }

    async fn close(
        &self,
        request: Request<CloseSessionRequest>,
    ) -> Result<Response<CloseSessionReply>, Status> {
        self.dispatch.close_session(&caller(&request)?, &request.get_ref().session).await?;
        Ok(Response::new(CloseSessionReply {}))
    }

    async fn list(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsReply>, Status> {
        let sessions = self.dispatch.list_sessions(&caller(&request)?).await?;
        Ok(Response::new(ListSessionsReply { sessions }))
    }
}

#[tonic::async_trait]
impl Resources for Door {
    async fn register(
        &self,
        request: Request<RegisterResourceRequest>,
    ) -> Result<Response<RegisterResourceReply>, Status> {
        let caller = caller(&request)?;
        let RegisterResourceRequest { session, kind, files } = request.into_inner();
        let registered = self.dispatch.register(&caller, &session, kind, files).await?;
        Ok(Response::new(RegisterResourceReply { resource: registered.id, missing: registered.missing }))
    }

    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadReply>, Status> {
        let caller = caller(&request)?;
        let mut pieces = request.into_inner();
        let first = pieces.message().await?;
        let first =
            first.ok_or_else(|| Error::field("upload", "a first message that names the file", "none"))?;
        let hash = Hash::new("sha256", &first.sha256)?;
        let begin = UploadBegin { hash, size: first.size, offset: first.offset };
        let offset = self.dispatch.upload(&caller, &first.session, begin, first.data, &mut pieces).await?;
        Ok(Response::new(UploadReply { offset }))
    }

    async fn unregister(
        &self,
        request: Request<UnregisterResourceRequest>,
    ) -> Result<Response<UnregisterResourceReply>, Status> {
        let UnregisterResourceRequest { session, resource, all } = request.get_ref();
        self.dispatch.unregister(&caller(&request)?, session, resource, *all).await?;
        Ok(Response::new(UnregisterResourceReply {}))
    }

    async fn list(
        &self,
        request: Request<ListResourcesRequest>,
    ) -> Result<Response<ListResourcesReply>, Status> {
        let resources = self.dispatch.list_resources(&caller(&request)?, &request.get_ref().session).await?;
        Ok(Response::new(ListResourcesReply { resources }))
    }

    type ReadStream = Piecemeal;

    async fn read(&self, request: Request<ReadResourceRequest>) -> Result<Response<Piecemeal>, Status> {
        let caller = caller(&request)?;
        let (_metadata, extensions, request) = request.into_parts();
        let ReadResourceRequest { session, resource, file, offset, length } = request;
        if let Some(counted) = extensions.get::<Arc<HeldBytes>>() {
            counted.grow(READ_BYTES_HELD)?;
        }
        let begin = ReadBegin { file, offset, length };
        let (reading, deadline) = self.dispatch.read(&caller, &session, &resource, begin).await?;
        Ok(Response::new(Piecemeal::new(reading, deadline)))
    }
}

/// What a read keeps in memory however long its file is: the piece that is sent, and its encoded copy.
const READ_BYTES_HELD: u64 = 2 * CHUNK_BYTES_MAX as u64;

type Piece = Result<Option<Bytes>, Error>;
type NextPiece = Pin<Box<dyn Future<Output = (Reading, Piece)> + Send>>;

/// A file's pieces as the messages of a reply. Each is read when the one before has left.
pub(super) struct Piecemeal {
    /// None after the last one.
    next: Option<NextPiece>,
    begun: Instant,
    deadline: Instant,
}

impl Piecemeal {
    fn new(reading: Reading, deadline: Instant) -> Self {
        let mut pieces = Self { next: None, begun: Instant::now(), deadline };
        pieces.go_on(reading);
        pieces
    }

    fn go_on(&mut self, mut reading: Reading) {
        let (begun, deadline) = (self.begun, self.deadline);
        self.next = Some(Box::pin(async move {
            let piece = tokio::time::timeout_at(deadline, reading.next()).await;
            let piece = piece.unwrap_or_else(|_| Err(past_deadline("running", begun)));
            (reading, piece)
        }));
    }
}

impl Stream for Piecemeal {
    type Item = Result<ReadResourceReply, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let Some(next) = &mut this.next else { return Poll::Ready(None) };
        let (reading, piece) = ready!(next.as_mut().poll(context));
        this.next = None;
        match piece {
            Ok(Some(data)) => {
                this.go_on(reading);
                Poll::Ready(Some(Ok(ReadResourceReply { data })))
            }
            Ok(None) => Poll::Ready(None),
            Err(error) => Poll::Ready(Some(Err(error.into()))),
        }
    }
}

impl Pieces for Streaming<RunPiece> {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let piece = self.message().await.map_err(|status| Error::from_status(&status))?;
        Ok(piece.map(|piece| piece.data))
    }
}

/// A reply in pieces, and what is counted until the last one is sent.
#[derive(Debug)]
pub(super) struct ReplyPieces {
    total: u64,
    rest: Bytes,
    _counted: Hold,
}

impl tokio_stream::Stream for ReplyPieces {
    type Item = Result<RunPiece, Status>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let length = self.rest.len().min(CHUNK_BYTES_MAX);
        let data = self.rest.split_to(length);
        // The first piece alone says how many bytes there are.
        let total = std::mem::take(&mut self.total);
        Poll::Ready(Some(Ok(RunPiece { total, data })))
    }
}

impl Pieces for Streaming<UploadRequest> {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let piece = self.message().await.map_err(|status| Error::from_status(&status))?;
        Ok(piece.map(|piece| piece.data))
    }
}

#[tonic::async_trait]
impl Operations for Door {
    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunReply>, Status> {
        let caller = caller(&request)?;
        let (_metadata, extensions, request) = request.into_parts();
        let mut reply = self.dispatch.run(&caller, request).await?;
        reply.align();
        if let Some(counted) = extensions.get::<Arc<HeldBytes>>() {
            counted.grow(reply.encoded_len() as u64)?;
        }
        Ok(Response::new(reply))
    }

    type RunLargeStream = ReplyPieces;

    async fn run_large(
        &self,
        request: Request<Streaming<RunPiece>>,
    ) -> Result<Response<ReplyPieces>, Status> {
        let caller = caller(&request)?;
        let mut pieces = request.into_inner();
        let first = pieces.message().await?;
        let RunPiece { total, data } = first
            .ok_or_else(|| Error::field("total", "a first piece that says how many bytes come", "none"))?;
        let (mut reply, mut counted) = self.dispatch.run_large(&caller, total, data, &mut pieces).await?;
        reply.align();
        let total = reply.encoded_len() as u64;
        counted.grow(total)?;
        Ok(Response::new(ReplyPieces { total, rest: reply.encode_to_vec().into(), _counted: counted }))
    }
}
