//! A connection for HTTP/1.1, over every address that the client dials: for the protocols that an agent serves as paths
//! and JSON.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use crate::dial::Dialer;
use crate::error::{Failure, Reach, chain};
use crate::opening::Opened;
use crate::wire::Head;

/// One connection, one request at a time. It is dialed when it is needed, and again when it broke; a request is sent
/// once. A clone is a connection of its own to the same address.
pub struct Http1 {
    shared: Arc<Shared>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Shared {
    dialer: Dialer,
    head: Head,
    connect_timeout: Duration,
}

/// A connection that was dialed.
struct Open {
    sender: SendRequest<Full<Bytes>>,
    /// How the peer's first bytes went.
    opened: Opened,
}

impl Http1 {
    pub(crate) fn new(dialer: Dialer, token: Option<&str>, connect_timeout: Duration) -> Result<Self, Error> {
        let head = Head::new(dialer.endpoint(), token, false)?;
        Ok(Self { shared: Arc::new(Shared { dialer, head, connect_timeout }), open: None })
    }

    /// Sends a request, whose URI is a path, and waits for all of the response, whatever its status. When this future
    /// is dropped before, so is the connection.
    ///
    /// # Errors
    /// `UNREACHABLE`, `UNAUTHENTICATED` when one side does not accept the other's certificate, `MESSAGE_TOO_LARGE` for
    /// a response that is longer than messages may be.
    pub async fn send(&mut self, mut request: Request<Bytes>) -> Result<Response<Bytes>, Error> {
        self.shared.head.address_http1(request.headers_mut());
        let mut open = match self.open.take().filter(|open| !open.sender.is_closed()) {
            Some(open) => open,
            None => self.shared.open().await?,
        };
        let broke = |error: &hyper::Error, opened: &mut Opened| match opened.try_recv() {
            // What the connection itself says of it is no more than that it ended.
            Ok(Err(error)) => self.shared.dialer.failure(&error),
            _ => self.shared.head.failure(error, Reach::Sent),
        };
        let response = open.sender.send_request(request.map(Full::new)).await;
        let (parts, body) = response.map_err(|error| broke(&error, &mut open.opened))?.into_parts();
        let body = Limited::new(body, MESSAGE_BYTES_MAX).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() {
                let message = format!("the response is longer than {MESSAGE_BYTES_MAX} bytes");
                return Error::new(Reason::MessageTooLarge, message);
            }
            let endpoint = self.shared.dialer.endpoint();
            let message = format!("the connection to {endpoint} broke during the call: {}", chain(&*error));
            Error::new(Reason::Unreachable, message)
        })?;
        // The peer may want to close it now: then the next request finds it closed, or not ready and waits for that.
        if open.sender.ready().await.is_ok() {
            self.open = Some(open);
        }
        Ok(Response::from_parts(parts, body.to_bytes()))
    }
}

impl Shared {
    async fn open(&self) -> Result<Open, Failure> {
        let endpoint = self.dialer.endpoint();
        let dialed = async {
            let (stream, opened) = self.dialer.dial().await?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| {
                Failure::unreachable(format!("cannot reach {endpoint}: {}", chain(&error)))
            })?;
            tokio::spawn(async move {
                // How the connection ends is told to the request that is on it.
                let _ = connection.await;
            });
            Ok(Open { sender, opened })
        };
        timeout(self.connect_timeout, dialed).await.unwrap_or_else(|_| {
            let limit = self.connect_timeout;
            Err(Failure::unreachable(format!("cannot reach {endpoint}: no answer within {limit:?}")))
        })
    }
}

impl Clone for Http1 {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), open: None }
    }
}

impl fmt::Debug for Http1 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_open = self.open.is_some();
        f.debug_struct("Http1").field("shared", &self.shared).field("open", &is_open).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Client;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    async fn request_of(stream: &mut UnixStream) -> String {
        let mut heard = Vec::new();
        while !heard.ends_with(b"body") {
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0, "the client hung up");
        }
        String::from_utf8(heard).unwrap()
    }

    fn request() -> Request<Bytes> {
        Request::post("/v2/models/m/infer").body(Bytes::from_static(b"body")).unwrap()
    }

    #[tokio::test]
    async fn one_connection_carries_requests_until_it_breaks_and_then_another_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let agent = UnixListener::bind(&path).unwrap();
        let endpoint = format!("unix://{}", path.display()).parse().unwrap();
        let mut http = Client::builder(endpoint).token("secret").http1().unwrap();
        let serve = async {
            let (mut stream, _) = agent.accept().await.unwrap();
            let heard = request_of(&mut stream).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\none").await.unwrap();
            request_of(&mut stream).await;
            drop(stream);
            let (mut stream, _) = agent.accept().await.unwrap();
            request_of(&mut stream).await;
            stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            (heard, stream)
        };
        let ask = async {
            let one = http.send(request()).await.unwrap();
            assert_eq!((one.status().as_u16(), &one.body()[..]), (200, &b"one"[..]));
            assert_eq!(http.send(request()).await.unwrap_err().reason(), Reason::Unreachable);
            assert_eq!(http.send(request()).await.unwrap().status().as_u16(), 404);
        };
        let ((heard, _stream), ()) = tokio::join!(serve, ask);
        let heard = heard.to_lowercase();
        assert!(heard.starts_with("post /v2/models/m/infer http/1.1\r\n"), "{heard}");
        for header in ["host: localhost\r\n", "authorization: bearer secret\r\n", "content-length: 4\r\n"] {
            assert!(heard.contains(header), "{header} in {heard}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_speaks_something_else_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let agent = UnixListener::bind(&path).unwrap();
        let endpoint = format!("unix://{}", path.display()).parse().unwrap();
        let mut http = Client::builder(endpoint).http1().unwrap();
        let (refusal, accepted) = tokio::join!(http.send(request()), async {
            let (mut stream, _) = agent.accept().await.unwrap();
            stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
            stream
        });
        drop(accepted);
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Unreachable);
        assert!(refusal.message().contains("does not speak HTTP/1.1"), "{refusal}");
    }
}
