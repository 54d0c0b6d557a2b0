//! The way to a model, and those who call it: one protocol or the other, and how many share a connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use vaccel_client::proto::inference::ModelInferRequest;
use vaccel_client::{Builder, Error, Reason};

use super::counters::Counters;
use super::grpc::{self, Grpc};
use super::http::{self, Http};
use super::inputs::{Description, Input};
use crate::args::Protocol;

/// Calls in flight on one connection of gRPC. A connection is one task on either side, so that a single one would
/// measure one core of each; one for each call would be what no program does, and more than an agent takes from one
/// tenant. Triton's own clients let 6 share one.
const CALLS_PER_CONNECTION: usize = 8;
/// Most connections of gRPC, beyond which each takes more calls. An agent takes 256 of a tenant if not told otherwise.
const CONNECTIONS_MAX: usize = 64;

/// What can be asked of a model, by either protocol.
#[derive(Clone)]
pub(crate) enum Door {
    Grpc(Grpc),
    Http(Http),
}

impl Door {
    pub(crate) async fn open(builder: &Builder, protocol: Protocol) -> Result<Self, Error> {
        Ok(match protocol {
            Protocol::Grpc => Self::Grpc(Grpc::new(builder.clone().connect().await?.link().clone())),
            Protocol::Http => Self::Http(Http::new(builder.clone().http1()?)),
        })
    }

    pub(crate) async fn describe(&mut self, model: &str, time: Duration) -> Result<Description, Error> {
        match self {
            Self::Grpc(grpc) => within(time, grpc.describe(model, time)).await,
            Self::Http(http) => within(time, http.describe(model)).await,
        }
    }

    /// None where the server does not count.
    pub(crate) async fn counters(&mut self, model: &str, time: Duration) -> Result<Option<Counters>, Error> {
        match self {
            Self::Grpc(grpc) => within(time, grpc.counters(model, time)).await,
            Self::Http(http) => within(time, http.counters(model)).await,
        }
    }

    /// A caller that runs the model on these inputs.
    pub(crate) fn caller(&self, model: &str, inputs: &[Input]) -> Result<Caller, Error> {
        Ok(match self {
            Self::Grpc(grpc) => Caller::Grpc(grpc.clone(), Arc::new(grpc::call(model, inputs))),
            Self::Http(http) => Caller::Http(http.clone(), Arc::new(http::call(model, inputs)?)),
        })
    }
}

async fn within<T>(time: Duration, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(time, asked).await.unwrap_or_else(|_| {
        let message = format!("the deadline of {time:?} passed while asking for the model");
        Err(Error::new(Reason::Deadline, message))
    })
}

/// Makes the same call again and again, one at a time.
pub(crate) enum Caller {
    Grpc(Grpc, Arc<ModelInferRequest>),
    Http(Http, Arc<http::Call>),
}

impl Caller {
    /// One run of the model; the server may be told how much time there is.
    pub(crate) async fn infer(&mut self, time: Duration) -> Result<(), Error> {
        match self {
            Self::Grpc(grpc, call) => grpc.infer(call, time).await,
            Self::Http(http, call) => http.infer(call).await,
        }
    }

    /// So many callers like this one over connections of their own, which are dialed when they are needed. Neighbours
    /// share a connection, so that those who begin at the first one use no more connections than their calls need.
    pub(crate) fn many(&self, builder: &Builder, count: usize) -> Result<Vec<Self>, Error> {
        let mut callers = Vec::with_capacity(count);
        match self {
            Self::Grpc(_, call) => {
                let connections = count.div_ceil(CALLS_PER_CONNECTION).min(CONNECTIONS_MAX);
                let share = count.div_ceil(connections.max(1));
                while callers.len() < count {
                    let grpc = Grpc::new(builder.clone().build()?.link().clone());
                    let sharing = share.min(count - callers.len());
                    callers.extend((0..sharing).map(|_| Self::Grpc(grpc.clone(), Arc::clone(call))));
                }
            }
            Self::Http(http, call) => {
                callers.extend((0..count).map(|_| Self::Http(http.clone(), Arc::clone(call))));
            }
        }
        Ok(callers)
    }
}
