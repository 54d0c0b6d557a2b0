//! From an address to a byte stream.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Empty};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;
use tokio_vsock::{VsockAddr, VsockStream};
use vaccel_proto::endpoint::{Authority, CID_HOST, hybrid_listen_path};
use vaccel_proto::{Endpoint, Error, Reason};

use crate::error::Failure;
use crate::hybrid;
use crate::opening::{Opened, Opening};
use crate::tls::{self, Tls, TlsDialer};
use crate::vsock::ShortWrites;

/// What a connection runs over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {
    /// Its socket, if the bytes of that are the stream's own.
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Stream for UnixStream {
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl Stream for TcpStream {
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl Stream for ShortWrites<VsockStream> {}

impl Stream for TlsStream<TcpStream> {}

/// What a connection that has ended runs over.
impl Stream for Empty {}

/// What tests run over.
#[cfg(test)]
impl Stream for tokio::io::DuplexStream {}

impl Stream for Opening<Box<dyn Stream>> {
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.opened()?.socket()
    }
}

/// What is spoken over a byte stream.
#[derive(Debug)]
pub(crate) struct Protocol {
    pub(crate) name: &'static str,
    /// Its name in TLS handshakes.
    pub(crate) alpn: &'static [u8],
    /// What a server's first bytes begin with.
    pub(crate) first: u8,
}

impl Protocol {
    /// A server begins with a SETTINGS frame, whose length is far below 64 KiB.
    pub(crate) const HTTP2: Self = Self { name: "HTTP/2", alpn: b"h2", first: 0 };
    /// A response begins with the protocol's name.
    #[cfg(feature = "cli")]
    pub(crate) const HTTP1: Self = Self { name: "HTTP/1.1", alpn: b"http/1.1", first: b'H' };
}

/// Opens byte streams to one address.
#[derive(Debug)]
pub(crate) struct Dialer {
    endpoint: Endpoint,
    protocol: Protocol,
    tls: Option<TlsDialer>,
}

impl Dialer {
    /// # Errors
    /// `BAD_ARGUMENT` for an address that can only be listened on, and for unusable TLS files.
    pub(crate) fn new(endpoint: Endpoint, tls: &Tls, protocol: Protocol) -> Result<Self, Error> {
        let endpoint = endpoint.for_dialing().map_err(|e| Error::new(Reason::BadArgument, e.to_string()))?;
        let tls = match &endpoint {
            Endpoint::Tls(authority) => Some(tls.dialer(authority, protocol.alpn)?),
            _ => None,
        };
        Ok(Self { endpoint, protocol, tls })
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// One stream, after all handshakes below HTTP, and where its peer's first bytes are reported.
    pub(crate) async fn dial(&self) -> Result<(Opening<Box<dyn Stream>>, Opened), Failure> {
        let stream = self.connect().await.map_err(|error| self.failure(&error))?;
        Ok(Opening::new(stream, &self.protocol))
    }

    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match &self.endpoint {
            Endpoint::Unix(path) => Box::new(unix(path).await?),
            // To tokio a leading NUL means the abstract namespace, as to the kernel.
            Endpoint::UnixAbstract(name) => Box::new(unix(Path::new(&format!("\0{name}"))).await?),
            Endpoint::HybridVsock { path, port } => Box::new(hybrid_vsock(path, *port).await?),
            Endpoint::Vsock { cid, port } => {
                let stream = VsockStream::connect(VsockAddr::new(*cid, *port)).await?;
                Box::new(ShortWrites::new(stream, *cid > CID_HOST))
            }
            Endpoint::Tcp(authority) => Box::new(tcp(authority).await?),
            Endpoint::Tls(authority) => {
                let stream = tcp(authority).await?;
                let tls = self.tls.as_ref().ok_or(io::ErrorKind::Unsupported)?;
                Box::new(tls.connector.connect(tls.server_name.clone(), stream).await?)
            }
        })
    }

    /// What an error on the way to the agent's first bytes means.
    pub(crate) fn failure(&self, error: &io::Error) -> Failure {
        let endpoint = &self.endpoint;
        tls::failure(endpoint, error).unwrap_or_else(|| {
            Failure::unreachable(format!(
                "cannot reach {endpoint}: {error}{}",
                advice(endpoint, error.kind())
            ))
        })
    }
}

/// What to do about an error.
fn advice(endpoint: &Endpoint, kind: io::ErrorKind) -> &'static str {
    use io::ErrorKind as K;
    match (endpoint, kind) {
        (Endpoint::Tls(_), K::UnexpectedEof | K::ConnectionReset) => {
            "; does the agent serve TLS there, or is it tcp://?"
        }
        (_, K::UnexpectedEof | K::BrokenPipe) => {
            "; something took the connection and closed it: is it the agent, and does it take more of them?"
        }
        (Endpoint::HybridVsock { .. }, K::NotFound) => {
            "; there is neither the VMM's socket nor the agent's own"
        }
        (Endpoint::Unix(_) | Endpoint::UnixAbstract(_), K::NotFound | K::ConnectionRefused) => {
            "; no agent listens there: start one with --address and this address"
        }
        (_, K::PermissionDenied) => "; this user may not open the socket: see its mode and owner",
        (Endpoint::Vsock { .. }, K::TimedOut | K::ConnectionReset | K::ConnectionRefused) => {
            "; nobody listens on that CID and port: the agent's side is vaccel-agent --vsock"
        }
        (Endpoint::Vsock { .. }, _) => {
            "; is there a vsock device? on the machine that runs guests, dial hvsock:// or unix://"
        }
        (Endpoint::Tcp(_) | Endpoint::Tls(_), K::ConnectionRefused) => "; no agent listens there",
        _ => "",
    }
}

/// What a unix socket should take at once, in bytes; the system may allow less. Each time that it is full costs two
/// changes of processes.
const UNIX_BUFFER_BYTES: usize = 4 << 20;

async fn unix(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path).await?;
    // Where there is no such it is slower without, and that is all.
    let _ = SockRef::from(&stream).set_send_buffer_size(UNIX_BUFFER_BYTES);
    Ok(stream)
}

async fn tcp(authority: &Authority) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((authority.host.as_str(), authority.port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Through the VMM's socket to a port of its guest; or, where that socket is absent, straight to the one on
/// which an agent serves the guest. The second makes one address work on the machine that runs guests even
/// before a VMM does.
async fn hybrid_vsock(path: &Path, port: u32) -> io::Result<UnixStream> {
    match UnixStream::connect(path).await {
        Ok(mut stream) => {
            hybrid::connect(&mut stream, port).await?;
            Ok(stream)
        }
        Err(absent) if absent.kind() == io::ErrorKind::NotFound => {
            UnixStream::connect(hybrid_listen_path(path, port)).await
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    fn dialer(address: &str) -> Dialer {
        Dialer::new(address.parse().unwrap(), &Tls::default(), Protocol::HTTP2).unwrap()
    }

    #[tokio::test]
    async fn a_hybrid_address_without_a_vmm_leads_to_the_agents_own_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let dialer = dialer(&format!("hvsock://{}:2048", path.display()));

        let refusal = dialer.dial().await.err().unwrap();
        assert_eq!(refusal.reason, Reason::Unreachable);
        assert!(refusal.message.contains("neither the VMM's socket"), "{refusal}");

        let agent = UnixListener::bind(hybrid_listen_path(&path, 2048)).unwrap();
        let (stream, accepted) = tokio::join!(dialer.dial(), agent.accept());
        accepted.unwrap().0.write_all(b"hello").await.unwrap();
        let mut heard = String::new();
        stream.unwrap().0.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "hello");
    }

    #[tokio::test]
    async fn an_abstract_socket_is_dialed() {
        let name = format!("vaccel-client-test-{}", std::process::id());
        let dialer = dialer(&format!("unix://@{name}"));
        assert!(dialer.dial().await.err().unwrap().message.contains(&name));
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let agent = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
        dialer.dial().await.unwrap();
        agent.accept().unwrap();
    }

    #[tokio::test]
    async fn failures_name_the_address_and_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let absent = format!("unix://{}/absent", folder.path().display());
        for (address, what) in
            [(absent.as_str(), "start one with"), ("tcp://127.0.0.1:1", "no agent listens")]
        {
            let failure = dialer(address).dial().await.err().unwrap();
            assert_eq!(failure.reason, Reason::Unreachable);
            assert!(failure.message.contains(address) && failure.message.contains(what), "{failure}");
        }
    }

    #[test]
    fn an_address_to_listen_on_is_refused() {
        let endpoint = "vsock://any:2048".parse().unwrap();
        let refusal = Dialer::new(endpoint, &Tls::default(), Protocol::HTTP2).unwrap_err();
        assert_eq!(refusal.reason(), Reason::BadArgument);
    }
}
