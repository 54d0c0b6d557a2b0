//! The Open Inference Protocol as HTTP with JSON, and what operators and probes ask for, on the same port.
//!
//! Paths, fields and statuses are the protocol's; errors are `{"error": TEXT}`. Tensors travel as JSON numbers or, with
//! the binary extension, behind the JSON. Browsers are turned away: a page that somebody looks at must not be able to
//! call an agent on that machine.

mod answer;
mod json;
mod metrics;

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, State};
use axum::routing::{get, post};
use base64::Engine;
use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, ORIGIN, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use prost::Message;
use serde::Deserialize;
use serde_json::{Value, json};
use tonic::body::Body;
use vaccel_proto::error::Detail;
use vaccel_proto::inference::model_repository_parameter::ParameterChoice;
use vaccel_proto::inference::{
    ModelRepositoryParameter, ModelStatisticsResponse, SystemSharedMemoryRegisterRequest,
};
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use super::body::{CountedBuffer, HeldBytes};
use super::compression;
use super::inference::{log_settings, read_only, server_metadata, trace_settings};
use crate::aside::aside;
use crate::dispatch::{Caller, Dispatch, to_json};
use crate::http2::Meter;
use crate::quota::Hold;

/// Where the tensors begin behind the JSON.
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// What a browser says of whose page a call is.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Longest body without tensors or files, in bytes: those of real callers have some tens. As values, text can take
/// fifty times as much.
const OBJECT_BYTES_MAX: usize = 64 << 10;

type Shared = State<Arc<Dispatch>>;
type Answer = Result<Response<axum::body::Body>, Failed>;

/// An error as this door answers it.
pub(super) struct Failed(pub(super) Error);

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl axum::response::IntoResponse for Failed {
    fn into_response(self) -> Response<axum::body::Body> {
        refusal(&self.0).map(axum::body::Body::new)
    }
}

/// The status of a reason. 499 is what proxies write for a caller that left.
fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::BadArgument | Reason::ModelRejected => StatusCode::BAD_REQUEST,
        Reason::Unauthenticated => StatusCode::UNAUTHORIZED,
        Reason::Denied => StatusCode::FORBIDDEN,
        Reason::NotFound => StatusCode::NOT_FOUND,
        Reason::AlreadyExists | Reason::Disabled => StatusCode::CONFLICT,
        Reason::MessageTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Reason::QuotaExceeded => StatusCode::TOO_MANY_REQUESTS,
        Reason::UnknownOperation => StatusCode::NOT_IMPLEMENTED,
        Reason::Overloaded | Reason::ShuttingDown | Reason::Unreachable => StatusCode::SERVICE_UNAVAILABLE,
        Reason::Deadline => StatusCode::GATEWAY_TIMEOUT,
        Reason::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::REQUEST_TIMEOUT),
        Reason::BackendFailed | Reason::Unusable => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// An error as a response.
pub(super) fn refusal(error: &Error) -> Response<Body> {
    let text = json!({ "error": error.message() }).to_string();
    let mut response = Response::new(Body::new(http_body_util::Full::new(Bytes::from(text))));
    *response.status_mut() = status(error.reason());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Detail::RetryAfter(after) = error.detail() {
        // Whole seconds, by the standard.
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// Turns browsers away, and bodies that are too long before they come.
///
/// # Errors
/// `DENIED` for a call that a page makes, `MESSAGE_TOO_LARGE`.
pub(super) fn check_headers(headers: &HeaderMap) -> Result<(), Error> {
    let limit = MESSAGE_BYTES_MAX as u64;
    if let Some(length) = announced(headers).filter(|length| *length > MESSAGE_BYTES_MAX) {
        return Err(Error::limit(Reason::MessageTooLarge, "body", limit, length as u64, "bytes"));
    }
    if headers.contains_key(ORIGIN) || headers.contains_key(FETCH_SITE) {
        return Err(Error::new(Reason::Denied, "this agent does not take calls from pages in browsers"));
    }
    Ok(())
}

/// How long a body says it is.
fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// All paths.
pub(super) fn routes(dispatch: Arc<Dispatch>) -> Router {
    let model = Router::new()
        .route("/", get(model_metadata))
        .route("/ready", get(model_ready))
        .route("/config", get(model_config))
        .route("/stats", get(model_stats))
        .route("/infer", post(infer));
    let region = "/region/{region}";
    let system = Router::new()
        .route("/status", get(system_status))
        .route(&format!("{region}/status"), get(system_status))
        .route(&format!("{region}/register"), post(system_register))
        .route(&format!("{region}/unregister"), post(system_unregister))
        .route("/unregister", post(system_unregister));
    let cuda = Router::new()
        .route("/status", get(async || found(&json!([]))))
        .route(&format!("{region}/status"), get(cuda_status))
        .route(&format!("{region}/register"), post(cuda_register))
        .route(&format!("{region}/unregister"), post(async || done()))
        .route("/unregister", post(async || done()));
    Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(async || found(&json!({ "live": true }))))
        .route("/v2/health/ready", get(server_ready))
        .route("/v2/models/stats", get(model_stats))
        .nest("/v2/models/{model}", model.clone())
        .nest("/v2/models/{model}/versions/{version}", model)
        .route("/v2/repository/index", post(repository_index))
        .route("/v2/repository/models/{model}/load", post(repository_load))
        .route("/v2/repository/models/{model}/unload", post(repository_unload))
        .nest("/v2/systemsharedmemory", system)
        .nest("/v2/cudasharedmemory", cuda)
        .route("/v2/logging", get(logging).post(set_logging))
        .route("/v2/trace/setting", get(trace).post(set_trace))
        .route("/v2/models/{model}/trace/setting", get(trace).post(set_trace))
        .method_not_allowed_fallback(async || {
            failed(StatusCode::METHOD_NOT_ALLOWED, "this path has other methods")
        })
        .route("/metrics", get(measured))
        .fallback(unknown)
        .with_state(dispatch)
}

/// Paths of no service: gRPC's callers get its own answer.
async fn unknown(headers: HeaderMap) -> Response<axum::body::Body> {
    if super::is_grpc(&headers) {
        let message = "this agent has no such service or method";
        return Error::new(Reason::UnknownOperation, message).to_status().into_http();
    }
    failed(StatusCode::NOT_FOUND, "there is no such path")
}

fn failed(status: StatusCode, why: &str) -> Response<axum::body::Body> {
    let mut response = found(&json!({ "error": why }));
    *response.status_mut() = status;
    response
}

fn done() -> Response<axum::body::Body> {
    Response::new(axum::body::Body::empty())
}

fn found(value: &Value) -> Response<axum::body::Body> {
    let mut response = Response::new(axum::body::Body::from(value.to_string()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A body, and what it is counted as beyond what came.
struct Whole {
    bytes: Bytes,
    /// The count of the call's bytes, until its reply is sent.
    held: Arc<HeldBytes>,
    _counted: Option<Hold>,
}

/// The whole body. What comes in pieces, however small they are, is copied to one place, which counts before it grows;
/// a piece counts as long as it is there.
async fn gathered(mut body: axum::body::Body, headers: &HeaderMap, held: &HeldBytes) -> Result<Bytes, Error> {
    let mut whole = CountedBuffer::new(held);
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(|error| cut(&error))?.into_data() else { continue };
        if whole.bytes.is_empty() {
            if body.is_end_stream() {
                return Ok(piece);
            }
            whole.reserve(announced(headers).unwrap_or(0))?;
        }
        whole.reserve(piece.len())?;
        whole.bytes.extend_from_slice(&piece);
        held.give_back(piece.len());
    }
    Ok(whole.bytes.into())
}

/// Why a body ended before it was whole.
fn cut(error: &axum::Error) -> Error {
    // The error that the gate's body ended in, where it was that.
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(status) = inner.downcast_ref::<tonic::Status>() {
            return Error::from_status(status);
        }
        source = inner.source();
    }
    Error::new(Reason::Cancelled, "the request ended before it was whole").caused_by(error.to_string())
}

/// What the gate found out, and the whole body, as it was before it was compressed.
async fn received(request: Request<axum::body::Body>) -> Result<(Caller, HeaderMap, Whole), Error> {
    let (mut parts, body) = request.into_parts();
    let caller = parts.extensions.remove::<Caller>();
    let (caller, held) = caller
        .zip(parts.extensions.remove::<Arc<HeldBytes>>())
        .ok_or_else(|| Error::new(Reason::Unauthenticated, "the call did not come through the gate"))?;
    let body = gathered(body, &parts.headers, &held).await?;
    let (bytes, counted) = compression::expand(caller.account(), &parts.headers, body, &held).await?;
    Ok((caller, parts.headers, Whole { bytes, held, _counted: counted }))
}

/// A body that may be JSON, or nothing.
fn object(body: &Whole) -> Result<Value, Error> {
    let (body, limit) = (&body.bytes, OBJECT_BYTES_MAX as u64);
    if body.is_empty() {
        return Ok(json!({}));
    }
    if body.len() > OBJECT_BYTES_MAX {
        let length = body.len() as u64;
        return Err(Error::limit(Reason::MessageTooLarge, "body for this path", limit, length, "bytes"));
    }
    serde_json::from_slice(body).map_err(|error| no_json(&error))
}

fn no_json(error: &serde_json::Error) -> Error {
    Error::new(Reason::BadArgument, format!("failed to parse the request JSON buffer: {error}"))
}

async fn server() -> Response<axum::body::Body> {
    found(&to_json("ServerMetadataResponse", &server_metadata()))
}

async fn server_ready(State(dispatch): Shared) -> Response<axum::body::Body> {
    if dispatch.is_ready() {
        found(&json!({ "ready": true }))
    } else {
        failed(StatusCode::SERVICE_UNAVAILABLE, "this agent is starting or stopping")
    }
}

/// What a path names.
struct Names(HashMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Names {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        let names = Path::from_request_parts(parts, state).await;
        // A path that is no text.
        let wrong = |error: PathRejection| Failed(Error::new(Reason::BadArgument, error.body_text()));
        names.map(|Path(names)| Self(names)).map_err(wrong)
    }
}

/// Model and version of a path; empty where it names none.
fn names(names: &HashMap<String, String>) -> (&str, &str) {
    let part = |name| names.get(name).map_or("", String::as_str);
    (part("model"), part("version"))
}

async fn model_metadata(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, ..) = received(request).await?;
    let (name, version) = names(&path);
    let metadata = dispatch.model_metadata(&caller, name, version).await?;
    let mut metadata = to_json("ModelMetadataResponse", &metadata);
    if let Some(fields) = metadata.as_object_mut()
        && fields.get("properties").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty)
    {
        fields.remove("properties");
    }
    Ok(found(&metadata))
}

async fn model_ready(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, ..) = received(request).await?;
    let (name, version) = names(&path);
    if dispatch.model_ready(&caller, name, version).await? {
        return Ok(found(&json!({ "name": name, "ready": true })));
    }
    Ok(failed(StatusCode::BAD_REQUEST, "Model version not ready"))
}

async fn model_config(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, ..) = received(request).await?;
    let (name, version) = names(&path);
    Ok(found(&to_json("ModelConfig", &dispatch.model_config(&caller, name, version).await?)))
}

async fn model_stats(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, ..) = received(request).await?;
    let (name, version) = names(&path);
    let model_stats = dispatch.model_statistics(&caller, name, version).await?;
    Ok(found(&to_json("ModelStatisticsResponse", &ModelStatisticsResponse { model_stats })))
}

async fn infer(State(dispatch): Shared, Names(path): Names, request: Request<axum::body::Body>) -> Answer {
    let (caller, headers, whole) = received(request).await?;
    let (name, version) = names(&path);
    let body = whole.bytes.clone();
    let header = headers.get(&HEADER_LENGTH).map(|length| {
        let length = length.to_str().ok().and_then(|length| length.parse::<usize>().ok());
        length.filter(|length| *length <= body.len()).ok_or_else(|| {
            let message = format!("{HEADER_LENGTH}: expected a number up to the body's {} bytes", body.len());
            Error::new(Reason::BadArgument, message)
        })
    });
    let (mut asked, wishes) = match header.transpose()? {
        Some(0) => {
            let metadata = dispatch.model_metadata(&caller, name, version).await?;
            (json::raw_request(&metadata, body)?, json::Wishes::all_binary())
        }
        length => {
            let held = Arc::clone(&whole.held);
            let read = move || json::request(&body, length, &held);
            aside(length.unwrap_or(whole.bytes.len()), read).await?
        }
    };
    (asked.model_name, asked.model_version) = (name.to_owned(), version.to_owned());
    let answer = dispatch.infer(&caller, asked).await?;
    let bytes = answer.raw_output_contents.iter().map(Bytes::len).sum();
    let held = Arc::clone(&whole.held);
    // The tensors, while they become text.
    held.grow(bytes as u64)?;
    let write = move || {
        let written = answer::response(&answer, &wishes, &held);
        held.give_back(bytes);
        written
    };
    let answer = aside(bytes, write).await?;
    let (body, coding) = compression::shrink(&headers, answer.body, &whole.held).await?;
    let mut response = Response::new(axum::body::Body::from(body));
    let headers = response.headers_mut();
    if let Some(coding) = coding {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding));
    }
    match answer.header {
        Some(length) => {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            headers.insert(HEADER_LENGTH, HeaderValue::from(length));
        }
        None => drop(headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"))),
    }
    headers.remove(CONTENT_LENGTH);
    Ok(response)
}

async fn measured(State(dispatch): Shared, request: Request<axum::body::Body>) -> Answer {
    let (caller, ..) = received(request).await?;
    let mut response =
        Response::new(axum::body::Body::from(metrics::text(&dispatch.metrics(&caller).await?)));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

async fn repository_index(State(dispatch): Shared, request: Request<axum::body::Body>) -> Answer {
    let (caller, _, body) = received(request).await?;
    let only_ready = object(&body)?.get("ready").and_then(Value::as_bool).unwrap_or(false);
    let mut models = dispatch.repository_index(&caller).await?;
    models.retain(|model| !only_ready || model.state == "READY");
    let row = |model: &_| {
        let mut row = to_json("RepositoryIndexResponse.ModelIndex", model);
        if let Some(fields) = row.as_object_mut() {
            // A field that says nothing is left out.
            fields.retain(|_, value| value.as_str() != Some(""));
        }
        row
    };
    Ok(found(&models.iter().map(row).collect()))
}

async fn repository_load(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, _, body) = received(request).await?;
    let length = body.bytes.len();
    // As texts, which become files one after the other.
    body.held.grow(length as u64)?;
    let parameters = aside(length, move || files(&body)).await?;
    dispatch.repository_load(&caller, names(&path).0, parameters).await?;
    Ok(done())
}

/// The parameters of a body that brings a model, or asks for one of the host's.
fn files(body: &Whole) -> Result<HashMap<String, ModelRepositoryParameter>, Error> {
    #[derive(Default, Deserialize)]
    struct Load {
        #[serde(default)]
        parameters: json::Values,
    }
    let load = if body.bytes.is_empty() {
        Load::default()
    } else {
        serde_json::from_slice(&body.bytes).map_err(|error| no_json(&error))?
    };
    let parameter = |(name, value): (String, Value)| {
        let wrong = || {
            let message = format!("parameter {}: expected a string", vaccel_proto::error::shown(&name));
            Error::new(Reason::BadArgument, message)
        };
        let Value::String(text) = value else { return Err(wrong()) };
        let choice = if name.starts_with("file:") {
            let decoded = base64::engine::general_purpose::STANDARD.decode(&text);
            ParameterChoice::BytesParam(decoded.map_err(|error| wrong().caused_by(error))?.into())
        } else {
            ParameterChoice::StringParam(text)
        };
        Ok((name, ModelRepositoryParameter { parameter_choice: Some(choice) }))
    };
    load.parameters.0.into_iter().map(parameter).collect()
}

async fn repository_unload(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, ..) = received(request).await?;
    dispatch.repository_unload(&caller, names(&path).0).await?;
    Ok(done())
}

fn region(path: &HashMap<String, String>) -> &str {
    path.get("region").map_or("", String::as_str)
}

async fn system_status(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, ..) = received(request).await?;
    let regions = dispatch.regions(&caller, region(&path)).await?;
    let name = "SystemSharedMemoryStatusResponse.RegionStatus";
    Ok(found(&regions.values().map(|region| to_json(name, region)).collect()))
}

async fn system_register(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, _, body) = received(request).await?;
    let body = object(&body)?;
    let number = |name: &str| body.get(name).and_then(Value::as_u64);
    let key = body.get("key").and_then(Value::as_str);
    let (Some(key), Some(byte_size)) = (key, number("byte_size")) else {
        return Err(
            Error::new(Reason::BadArgument, "expected 'key', a string, and 'byte_size', a number").into()
        );
    };
    let asked = SystemSharedMemoryRegisterRequest {
        name: region(&path).into(),
        key: key.into(),
        offset: number("offset").unwrap_or(0),
        byte_size,
    };
    dispatch.register_region(&caller, asked).await?;
    Ok(done())
}

async fn system_unregister(
    State(dispatch): Shared,
    Names(path): Names,
    request: Request<axum::body::Body>,
) -> Answer {
    let (caller, ..) = received(request).await?;
    dispatch.unregister_region(&caller, region(&path)).await?;
    Ok(done())
}

async fn cuda_status(Names(path): Names) -> Answer {
    Err(super::inference::no_cuda_region(region(&path)).into())
}

async fn cuda_register() -> Answer {
    Err(super::inference::no_cuda().into())
}

async fn logging() -> Answer {
    Ok(found(&settings("LogSettingsResponse", &log_settings())))
}

async fn set_logging(request: Request<axum::body::Body>) -> Answer {
    let (_, _, body) = received(request).await?;
    match object(&body)?.as_object().is_none_or(serde_json::Map::is_empty) {
        true => logging().await,
        false => Err(read_only("log settings").into()),
    }
}

async fn trace() -> Answer {
    Ok(found(&settings("TraceSettingResponse", &trace_settings())))
}

async fn set_trace(request: Request<axum::body::Body>) -> Answer {
    let (_, _, body) = received(request).await?;
    match object(&body)?.as_object().is_none_or(serde_json::Map::is_empty) {
        true => trace().await,
        false => Err(read_only("trace settings").into()),
    }
}

/// Settings without the messages around their values.
fn settings(name: &str, message: &impl Message) -> Value {
    let all = to_json(name, message);
    let each = all.get("settings").and_then(Value::as_object).into_iter().flatten();
    let flat =
        each.filter_map(|(name, value)| Some((name.clone(), value.as_object()?.values().next()?.clone())));
    Value::Object(flat.collect())
}
