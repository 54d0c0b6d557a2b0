//! One HTTP/2 connection as a gRPC transport: it addresses and signs requests, and tells how far a failed one
//! got.

use std::error::Error as _;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{AUTHORIZATION, HeaderMap, HeaderValue, USER_AGENT};
use http::uri::{Authority, Parts, Scheme};
use http_body_util::BodyExt;
use hyper::client::conn::http2::SendRequest;
use tonic::body::Body;
use tower_service::Service;
use vaccel_guest::hpack;
use vaccel_proto::{Endpoint, Error, Reason};

use crate::client::timed;
use crate::error::{Failure, Reach, chain};
use crate::http2::{Connection, Pool};

const AGENT: HeaderValue = HeaderValue::from_static(concat!("vaccel-client/", env!("CARGO_PKG_VERSION")));

/// Bytes of a header block that are neither path nor host nor token: names, lengths, and values that are ours.
const HEAD_BYTES: usize = 256;

/// What every request begins with.
#[derive(Debug)]
pub(crate) struct Head {
    endpoint: Endpoint,
    scheme: Scheme,
    authority: Authority,
    authorization: Option<HeaderValue>,
    /// Whether messages of runs are sent and taken in gzip.
    pub(crate) compresses: bool,
}

impl Head {
    /// # Errors
    /// `BAD_ARGUMENT` for a host or a token that a header cannot carry.
    pub(crate) fn new(endpoint: &Endpoint, token: Option<&str>, compresses: bool) -> Result<Self, Error> {
        let bad = |what: String| Error::new(Reason::BadArgument, what);
        let (scheme, host) = match endpoint {
            Endpoint::Tls(authority) => (Scheme::HTTPS, authority.to_string()),
            Endpoint::Tcp(authority) => (Scheme::HTTP, authority.to_string()),
            _ => (Scheme::HTTP, "localhost".to_owned()),
        };
        let authority = Authority::try_from(host.as_str())
            .map_err(|e| bad(format!("address {endpoint}: {host:?} is not a host name: {e}")))?;
        if token.is_some_and(str::is_empty) {
            return Err(bad("the token is empty".into()));
        }
        let authorization = token.map(|token| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| {
                bad("the token holds characters that a header cannot carry, such as a line end".into())
            })?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        });
        Ok(Self {
            endpoint: endpoint.clone(),
            scheme,
            authority,
            authorization: authorization.transpose()?,
            compresses,
        })
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Writes the header block of a call.
    pub(crate) fn block(&self, path: &str, time: Duration, into: &mut Vec<u8>) {
        let timeout = timed((), time).into_parts().0.into_headers().remove("grpc-timeout");
        let scheme = if self.scheme == Scheme::HTTPS { hpack::SCHEME_HTTPS } else { hpack::SCHEME_HTTP };
        let (authority, token) = (self.authority.as_str(), self.authorization.as_ref());
        let own = path.len() + authority.len() + token.map_or(0, HeaderValue::len);
        let begin = into.len();
        into.resize(begin + own + HEAD_BYTES, 0);
        let mut headers = hpack::Writer::new(&mut into[begin..]);
        headers.indexed(hpack::METHOD_POST);
        headers.indexed(scheme);
        headers.named(hpack::PATH, path.as_bytes());
        headers.named(hpack::AUTHORITY, authority.as_bytes());
        headers.named(hpack::CONTENT_TYPE, b"application/grpc");
        headers.literal(b"te", b"trailers");
        headers.named(hpack::USER_AGENT, AGENT.as_bytes());
        if let Some(timeout) = timeout {
            headers.literal(b"grpc-timeout", timeout.as_bytes());
        }
        if let Some(token) = token {
            headers.secret(hpack::AUTHORIZATION, [token.as_bytes(), b""]);
        }
        let length = headers.finish().unwrap_or(0);
        debug_assert!(length > 0, "HEAD_BYTES is too little");
        into.truncate(begin + length);
    }

    fn address(&self, request: &mut http::Request<Body>) {
        let mut parts = Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = request.uri().path_and_query().cloned();
        // Scheme, host and path are all there, which is what a URI asks for.
        if let Ok(uri) = http::Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
        self.sign(request.headers_mut());
    }

    /// Adds what tells who calls.
    fn sign(&self, headers: &mut HeaderMap) {
        headers.insert(USER_AGENT, AGENT);
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
    }

    /// The same for HTTP/1.1, where the host is a header and the URI no more than a path.
    #[cfg(feature = "cli")]
    pub(crate) fn address_http1(&self, headers: &mut HeaderMap) {
        // What came through the parser of authorities goes into a header.
        if let Ok(host) = HeaderValue::from_str(self.authority.as_str()) {
            headers.insert(http::header::HOST, host);
        }
        self.sign(headers);
    }

    /// What a failed exchange means.
    pub(crate) fn failure(&self, error: &hyper::Error, reach: Reach) -> Failure {
        let message = match reach {
            Reach::Sent if stream_error(error).is_some_and(h2::Error::is_reset) => {
                format!("{} broke the call off: {}", self.endpoint, chain(error))
            }
            Reach::Sent => {
                format!("the connection to {} broke during the call: {}", self.endpoint, chain(error))
            }
            _ => format!("{} did not take the call: {}", self.endpoint, chain(error)),
        };
        Failure { reason: Reason::Unreachable, message, reach }
    }
}

/// An open connection. Clones send over the same one.
#[derive(Clone)]
pub(crate) struct Wire {
    sender: SendRequest<Body>,
    head: Arc<Head>,
    broken: Arc<AtomicBool>,
    pool: Option<Pool>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire")
            .field("endpoint", &self.head.endpoint)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Wire {
    /// A connection, and those beside it, if it pays to have them.
    pub(crate) fn new(sender: SendRequest<Body>, head: Arc<Head>, pool: Option<Pool>) -> Self {
        Self { sender, head, broken: Arc::default(), pool }
    }

    pub(crate) fn compresses(&self) -> bool {
        self.head.compresses
    }

    /// A connection beside it for a call of one message there and one back, the request of so many bytes.
    pub(crate) fn beside(&self, bytes: usize) -> Option<Connection> {
        self.pool.as_ref()?.choose(bytes)
    }

    /// Tells the agent that such a call is about to come.
    pub(crate) fn alert(&self) {
        if let Some(pool) = &self.pool {
            pool.alert();
        }
    }

    /// Whether a new request has a chance on this connection.
    pub(crate) fn is_usable(&self) -> bool {
        !self.sender.is_closed() && !self.broken.load(Ordering::Relaxed)
    }
}

impl Service<http::Request<Body>> for Wire {
    type Response = http::Response<Body>;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        self.head.address(&mut request);
        let (head, broken) = (Arc::clone(&self.head), Arc::clone(&self.broken));
        let response = self.sender.try_send_request(request);
        Box::pin(async move {
            match response.await {
                Ok(response) => Ok(response
                    .map(|body| Body::new(body.map_err(move |error| head.failure(&error, Reach::Sent))))),
                Err(mut failed) => {
                    let unsent = failed.take_message().is_some();
                    let error = failed.into_error();
                    let stream = stream_error(&error);
                    // Do not wait until the connection's own task has noticed.
                    broken.fetch_or(!stream.is_some_and(h2::Error::is_reset), Ordering::Relaxed);
                    let reach =
                        if unsent || stream.is_some_and(is_refusal) { Reach::Unsent } else { Reach::Sent };
                    Err(head.failure(&error, reach))
                }
            }
        })
    }
}

fn stream_error(error: &hyper::Error) -> Option<&h2::Error> {
    error.source()?.downcast_ref()
}

/// Whether the agent says that it did not begin with the request: it refused the stream, or its GOAWAY names
/// an earlier one as the last (RFC 9113, 6.8 and 8.7). Streams it did begin with do not fail with the GOAWAY.
fn is_refusal(error: &h2::Error) -> bool {
    error.is_remote()
        && (error.is_go_away() || error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM))
}
