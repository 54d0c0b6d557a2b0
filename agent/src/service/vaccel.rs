//! The door of package `vaccel.v1`: messages to calls, outcomes to messages.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use prost::Message;
use tonic::{Request, Response, Status, Streaming};
use vaccel_proto::tensor::Aligned;
use vaccel_proto::v1::agent_server::Agent;
use vaccel_proto::v1::operations_server::Operations;
use vaccel_proto::v1::resources_server::Resources;
use vaccel_proto::v1::sessions_server::Sessions;
use vaccel_proto::v1::{
    CloseSessionReply, CloseSessionRequest, InfoReply, InfoRequest, ListResourcesReply, ListResourcesRequest,
    ListSessionsReply, ListSessionsRequest, OpenSessionReply, OpenSessionRequest, ProfileReply,
    ProfileRequest, RegisterResourceReply, RegisterResourceRequest, RenewSessionReply, RenewSessionRequest,
    RunReply, RunRequest, UnregisterResourceReply, UnregisterResourceRequest, UploadReply, UploadRequest,
};
use vaccel_proto::{Error, Reason};

use super::body::HeldBytes;
use crate::dispatch::{Caller, Dispatch, Pieces};
use crate::resource::{Hash, UploadBegin};

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

/// What the gate found out.
fn caller<T>(request: &Request<T>) -> Result<Caller, Error> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Error::new(Reason::Unauthenticated, "the call did not come through the gate"))
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
        let UnregisterResourceRequest { session, resource } = request.get_ref();
        self.dispatch.unregister(&caller(&request)?, session, resource).await?;
        Ok(Response::new(UnregisterResourceReply {}))
    }

    async fn list(
        &self,
        request: Request<ListResourcesRequest>,
    ) -> Result<Response<ListResourcesReply>, Status> {
        let resources = self.dispatch.list_resources(&caller(&request)?, &request.get_ref().session).await?;
        Ok(Response::new(ListResourcesReply { resources }))
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
        let (_metadata, extensions, RunRequest { session, op }) = request.into_parts();
        let mut reply = self.dispatch.run(&caller, &session, op).await?;
        reply.align();
        if let Some(counted) = extensions.get::<HeldBytes>() {
            let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.grow(reply.encoded_len() as u64)?;
        }
        Ok(Response::new(reply))
    }
}
