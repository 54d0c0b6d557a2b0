//! The doors: from the wire to the domain and back, nothing else.
//!
//! [`Gate`] stands in front of all of them: no method of any service runs before it has turned the connection and the
//! call's credentials into a tenant. A new service is a line in [`Gate::new`].

mod body;
mod compression;
mod deadline;
mod health;
mod inference;
mod rest;
mod stream;
mod unary;
mod vaccel;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::BodyExt;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tonic_health::pb::health_server::HealthServer;
use tower_service::Service;
use vaccel_proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::v1::agent_server::AgentServer;
use vaccel_proto::v1::operations_server::OperationsServer;
use vaccel_proto::v1::resources_server::ResourcesServer;
use vaccel_proto::v1::sessions_server::SessionsServer;
use vaccel_proto::{Error, Reason};

pub(crate) use self::body::KeptBody;
use self::body::{CountedBody, HeldBytes, Kept, Messages};
use self::compression::{Coding, Expanded, GRPC_ENCODING};
use crate::dispatch::{Caller, Dispatch};
use crate::http2::{self, is_grpc};
use crate::identity::{Identity, Peer, Tenant};
use crate::onward::Listener;
use crate::quota::{Account, Unit};
use crate::session::ConnectionId;

/// What the gate found out.
fn caller<T>(request: &tonic::Request<T>) -> Result<Caller, Error> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Error::new(Reason::Unauthenticated, "the call did not come through the gate"))
}

/// One connection as the doors see it.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    pub(crate) peer: Peer,
    pub(crate) tenant: Tenant,
    /// The tenant's.
    pub(crate) account: Arc<Account>,
    pub(crate) calls: AtomicU64,
}

/// The way to all services.
#[derive(Clone)]
pub(crate) struct Gate {
    dispatch: Arc<Dispatch>,
    identity: Arc<Identity>,
    routes: Routes,
}

impl Gate {
    /// # Errors
    /// Descriptions that are none: those of the agent itself.
    pub(crate) fn new(
        dispatch: Arc<Dispatch>,
        identity: Identity,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let door = vaccel::Door::new(Arc::clone(&dispatch));
        let inference = inference::Door::new(Arc::clone(&dispatch));
        macro_rules! limited {
            ($server:ident, $door:ident) => {
                $server::from_arc(Arc::clone(&$door))
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX)
            };
        }
        // What is compiled in describes itself: it cannot be wrong.
        macro_rules! reflection {
            ($build:ident) => {
                tonic_reflection::server::Builder::configure()
                    .register_encoded_file_descriptor_set(vaccel_proto::DESCRIPTORS)
                    .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                    .$build()?
            };
        }
        let others = rest::routes(Arc::clone(&dispatch));
        let routes = Routes::from(others)
            .add_service(limited!(AgentServer, door))
            .add_service(limited!(SessionsServer, door))
            .add_service(limited!(ResourcesServer, door))
            .add_service(limited!(OperationsServer, door))
            .add_service(limited!(GrpcInferenceServiceServer, inference))
            .add_service(HealthServer::new(health::Door::new(Arc::clone(&dispatch))))
            .add_service(reflection!(build_v1))
            .add_service(reflection!(build_v1alpha))
            .prepare();
        Ok(Self { dispatch, identity: Arc::new(identity), routes })
    }

    /// The service of one connection.
    pub(crate) fn of(&self, connection: Arc<Connection>) -> ConnectionService {
        ConnectionService { gate: self.clone(), connection }
    }

    /// Whose a connection is that makes no calls, with the token it brings.
    ///
    /// # Errors
    /// Those of [`Identity::of_call`].
    pub(crate) fn owner(&self, tenant: &Tenant, peer: &Peer, token: Option<&str>) -> Result<Tenant, Error> {
        let authorization = token.map(|token| format!("Bearer {token}"));
        self.identity.of_call(tenant, peer, authorization.as_ref().map(String::as_bytes))
    }

    /// Who calls, and the count of the call's bytes.
    fn admit(&self, connection: &Connection, head: &Head) -> Result<(Caller, Arc<HeldBytes>), Error> {
        let Head { request, is_grpc, .. } = head;
        let headers = request.headers();
        if !is_grpc {
            rest::check_headers(headers)?;
        }
        let authorization = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
        let tenant = self.identity.of_call(&connection.tenant, &connection.peer, authorization)?;
        let timeout = head.timeout.map_or_else(|| deadline::timeout(headers), Ok)?;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        if request.uri().path().starts_with(REFLECTION) && !connection.peer.is_near() {
            // What a guest needs to know is in its contract.
            return Err(Error::new(Reason::UnknownOperation, "this agent has no such service or method"));
        }
        let number = connection.calls.fetch_add(1, Ordering::Relaxed);
        // A call's credentials may make it another tenant's than its connection's.
        let is_own = tenant == connection.tenant;
        let account =
            if is_own { Arc::clone(&connection.account) } else { self.dispatch.accounts().of(&tenant) };
        let caller = self.dispatch.arrive(tenant, account, connection.id, number, deadline)?;
        let caller = caller.of_user(connection.peer.uid());
        let counted = caller.account().hold(Unit::InFlightBytes, 0)?;
        // Over HTTP/1 a body is one whatever it says it is.
        let is_messages = *is_grpc && request.version() == http::Version::HTTP_2;
        Ok((caller, HeldBytes::new(counted, is_messages)))
    }
}

/// A request's head, and what it says.
pub(crate) struct Head {
    request: Request<()>,
    is_grpc: bool,
    /// How long the caller waits, if it says so; none for a header that cannot be read.
    timeout: Option<Option<Duration>>,
    coding: Option<Coding>,
    call: Option<unary::Call>,
}

impl Head {
    fn new(request: Request<()>) -> Self {
        let headers = request.headers();
        let (is_grpc, coding) = (is_grpc(headers), Coding::of_messages(headers));
        let (timeout, call) = (deadline::timeout(headers).ok(), unary::Call::of(&request));
        Self { request, is_grpc, timeout, coding, call }
    }
}

/// All services, for one connection.
#[derive(Clone)]
pub(crate) struct ConnectionService {
    gate: Gate,
    connection: Arc<Connection>,
}

/// What becomes of a call.
type Answer = Pin<Box<dyn Future<Output = Response<KeptBody>> + Send>>;

impl ConnectionService {
    /// A call through the routes.
    fn route(
        &self,
        mut request: Request<Body>,
        caller: Caller,
        held: Arc<HeldBytes>,
    ) -> impl Future<Output = Response<KeptBody>> + Send + use<> {
        request.extensions_mut().insert(caller.clone());
        request.extensions_mut().insert(Arc::clone(&held));
        // A watch of health never ends, and must not keep the agent from stopping.
        let is_kept = !request.uri().path().starts_with(HEALTH);
        let kept = Some(Kept { _caller: caller, _bytes: held }).filter(|_| is_kept);
        let mut routes = self.gate.routes.clone();
        async move {
            let ready = |context: &mut Context<'_>| -> Poll<Result<(), Infallible>> {
                Service::<Request<Body>>::poll_ready(&mut routes, context).map_err(|error| match error {})
            };
            let Ok(()) = std::future::poll_fn(ready).await;
            let reply = match routes.call(request).await {
                Ok(reply) => reply,
                Err(error) => match error {},
            };
            worded(reply).map(|body| KeptBody::new(Body::new(body), kept))
        }
    }

    /// A call with compressed messages, which is one as any other once they are expanded.
    fn expanded(
        &self,
        coding: Coding,
        head: &Head,
        body: http2::Incoming,
        caller: Caller,
        held: Arc<HeldBytes>,
    ) -> Answer {
        let account = Arc::clone(caller.account());
        let body = Expanded::new(body, coding, account, Arc::clone(&held));
        match head.call {
            Some(call) => {
                let dispatch = Arc::clone(&self.gate.dispatch);
                let of_reply = Coding::of_reply(head.request.headers());
                Box::pin(call.answer(dispatch, caller, held, body, of_reply))
            }
            None => {
                let mut request = head.request.clone().map(|()| Body::new(Messages(body)));
                request.headers_mut().remove(GRPC_ENCODING);
                Box::pin(self.route(request, caller, held))
            }
        }
    }

    fn refuse(&self, head: &Head, refusal: &Error) -> Response<KeptBody> {
        let connection = self.connection.id;
        tracing::debug!(?connection, peer = ?self.connection.peer, ?refusal, "call refused at the gate");
        refused(head.request.headers(), refusal)
    }
}

fn refused(headers: &HeaderMap, refusal: &Error) -> Response<KeptBody> {
    let refused = if is_grpc(headers) { grpc_refusal } else { rest::refusal };
    refused(refusal).map(|body| KeptBody::new(body, None))
}

impl http2::Service for ConnectionService {
    type Head = Head;
    type Body = KeptBody;
    type Answer = Answer;

    fn understand(&self, request: Request<()>) -> Head {
        Head::new(request)
    }

    fn has_messages(head: &Head) -> bool {
        head.is_grpc
    }

    fn expect(&self, task: Listener) {
        self.gate.dispatch.expect(task);
    }

    fn call(&self, head: &Arc<Head>, body: http2::Incoming) -> Answer {
        let (caller, held) = match self.gate.admit(&self.connection, head) {
            Ok(admitted) => admitted,
            Err(refusal) => return Box::pin(std::future::ready(self.refuse(head, &refusal))),
        };
        body.charge(Arc::clone(&held) as Arc<dyn http2::Meter>);
        if let Some(coding) = head.coding {
            return self.expanded(coding, head, body, caller, held);
        }
        match head.call {
            Some(call) => {
                if call.ends_with_tensors() {
                    body.align_ends();
                }
                let dispatch = Arc::clone(&self.gate.dispatch);
                Box::pin(call.answer(dispatch, caller, held, body, None))
            }
            None => {
                let body = match head.is_grpc {
                    true => Body::new(Messages(body)),
                    false => Body::new(body.map_err(Status::from)),
                };
                Box::pin(self.route(head.request.clone().map(|()| body), caller, held))
            }
        }
    }
}

impl hyper::service::Service<Request<hyper::body::Incoming>> for ConnectionService {
    type Response = Response<KeptBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<KeptBody>, Infallible>> + Send>>;

    fn call(&self, request: Request<hyper::body::Incoming>) -> Self::Future {
        let (parts, body) = request.into_parts();
        let head = Head::new(Request::from_parts(parts, ()));
        let (caller, held) = match self.gate.admit(&self.connection, &head) {
            Ok(admitted) => admitted,
            Err(refusal) => return Box::pin(std::future::ready(Ok(self.refuse(&head, &refusal)))),
        };
        let headers = head.request.headers().clone();
        let counted = head.request.map(|()| Body::new(CountedBody::new(body, Arc::clone(&held))));
        let answered = self.route(counted, caller, held);
        Box::pin(async move {
            // A request that never becomes whole ends here; whole ones have their own, shorter deadlines.
            let answered = tokio::time::timeout(http2::REQUEST_DURATION_MAX, answered).await;
            Ok(answered.unwrap_or_else(|_| refused(&headers, &http2::too_late())))
        })
    }
}

/// A reply of the routes. What tonic itself says instead of one has no details, and `INTERNAL` it says of what is no
/// request.
fn worded(reply: Response<Body>) -> Response<Body> {
    let is_internal = reply.headers().get(GRPC_STATUS).is_some_and(|status| status == INTERNAL);
    if !is_internal || reply.headers().contains_key(GRPC_DETAILS) {
        return reply;
    }
    grpc_refusal(&Error::field("message", "one message of the contract", "another"))
}

fn grpc_refusal(error: &Error) -> Response<Body> {
    error.to_status().into_http()
}

/// How a call ended, in the head of a reply without messages.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// The number of [`tonic::Code::Internal`].
const INTERNAL: &str = "13";

/// Where the paths of the health service begin.
const HEALTH: &str = "/grpc.health.";

/// Where the paths of reflection begin.
const REFLECTION: &str = "/grpc.reflection.";
