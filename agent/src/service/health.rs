//! The standard health service (`grpc.health.v1`), truthful: for the agent by an empty name, for its services and for
//! models by theirs. A model that the caller cannot see is unknown.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::watch;
use tonic::codegen::tokio_stream::Stream;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use vaccel_proto::limits::NAME_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use super::caller;
use crate::dispatch::{Caller, Dispatch};
use crate::quota::Unit;

/// Services whose health is the agent's.
pub(super) const SERVICES: [&str; 6] = [
    "grpc.health.v1.Health",
    "inference.GRPCInferenceService",
    "vaccel.v1.Agent",
    "vaccel.v1.Operations",
    "vaccel.v1.Resources",
    "vaccel.v1.Sessions",
];

/// The service.
#[derive(Debug)]
pub(super) struct Door {
    dispatch: Arc<Dispatch>,
}

impl Door {
    pub(super) fn new(dispatch: Arc<Dispatch>) -> Self {
        Self { dispatch }
    }
}

/// How a service or model is now.
async fn status(dispatch: &Arc<Dispatch>, caller: &Caller, name: &str) -> ServingStatus {
    let of = |is_serving| if is_serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    let is_ready = dispatch.is_ready();
    if name.is_empty() || SERVICES.contains(&name) || !is_ready {
        return of(is_ready);
    }
    dispatch.model_health(caller, name).await.map_or(ServingStatus::ServiceUnknown, of)
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for Door {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let name = &request.get_ref().service;
        match status(&self.dispatch, &caller(&request)?, name).await {
            ServingStatus::ServiceUnknown => {
                let name = vaccel_proto::error::shown(name);
                let message = format!("there is no service or model {name}");
                Err(Error::new(Reason::NotFound, message).into())
            }
            status => Ok(Response::new(response(status))),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (caller, name) = (caller(&request)?, request.into_inner().service);
        if name.len() > NAME_BYTES_MAX {
            // It would be kept for as long as somebody watches.
            return Err(Error::field("service", format!("at most {NAME_BYTES_MAX} bytes"), name.len()).into());
        }
        let counted = caller.account().hold(Unit::Watches, 1)?;
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let dispatch = Arc::clone(&self.dispatch);
        tokio::spawn(async move {
            let _counted = counted;
            follow(dispatch, caller, name, sender).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Tells of every change, until nobody listens or the agent is gone.
async fn follow(
    dispatch: Arc<Dispatch>,
    caller: Caller,
    name: String,
    listener: tokio::sync::mpsc::Sender<Result<HealthCheckResponse, Status>>,
) {
    // A caller that watches is no call in flight: it must not keep the agent from stopping.
    let caller = caller.uncounted();
    let mut changes: watch::Receiver<u64> = dispatch.changes();
    let mut told = None;
    loop {
        changes.mark_unchanged();
        let now = status(&dispatch, &caller, &name).await;
        if told != Some(now) {
            told = Some(now);
            if listener.send(Ok(response(now))).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = listener.closed() => return,
        }
    }
}
