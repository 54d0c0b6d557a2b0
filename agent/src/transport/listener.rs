//! Listeners: an [`Endpoint`] bound, and what it tells about each peer.

use std::io;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{
    SocketAddr as UnixAddress, UnixListener as StdUnixListener, UnixStream as StdUnixStream,
};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener, UnixSocket};
use tokio_vsock::{VsockAddr, VsockListener};
use vaccel_client::vsock::ShortWrites;
use vaccel_proto::Endpoint;
use vaccel_proto::endpoint::{Authority, CID_ANY, CID_HOST, CID_LOCAL, hybrid_listen_path};

use super::Stream;
use crate::identity::Peer;

/// Connections the kernel keeps for the accept loop: a burst of guests that boot together.
const BACKLOG: u32 = 1024;

/// One bound address.
pub(crate) struct Listener {
    endpoint: Endpoint,
    socket: Socket,
}

enum Socket {
    Tcp(TcpListener),
    Unix { listener: UnixListener, hybrid: bool, _file: Option<SocketFile> },
    Vsock { listener: VsockListener, in_guest: bool },
}

/// A socket in the file system, removed when the agent is done with it and nobody has replaced it.
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Binds.
    ///
    /// # Errors
    /// What the kernel says, or that a living agent already listens there.
    pub(crate) async fn bind(endpoint: &Endpoint, unix_mode: u32) -> io::Result<Self> {
        let (endpoint, socket) = match endpoint {
            Endpoint::Tcp(authority) => {
                let (authority, socket) = bind_tcp(authority).await?;
                (Endpoint::Tcp(authority), socket)
            }
            Endpoint::Tls(authority) => {
                let (authority, socket) = bind_tcp(authority).await?;
                (Endpoint::Tls(authority), socket)
            }
            Endpoint::Unix(path) => (endpoint.clone(), bind_unix(path, unix_mode, false)?),
            Endpoint::HybridVsock { path, port } => {
                (endpoint.clone(), bind_unix(&hybrid_listen_path(path, *port), unix_mode, true)?)
            }
            Endpoint::UnixAbstract(name) => {
                let listener = StdUnixListener::bind_addr(&UnixAddress::from_abstract_name(name)?)?;
                listener.set_nonblocking(true)?;
                let listener = UnixListener::from_std(listener)?;
                (endpoint.clone(), Socket::Unix { listener, hybrid: false, _file: None })
            }
            Endpoint::Vsock { cid, port } => bind_vsock(*cid, *port)?,
        };
        Ok(Self { endpoint, socket })
    }

    /// What is bound, with the port the kernel chose.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<(Box<dyn Stream>, Peer)> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // A reply is written whole; waiting to fill a segment only delays it.
                stream.set_nodelay(true)?;
                Ok((Box::new(stream), Peer::Tcp { ip: peer.ip().to_canonical() }))
            }
            Socket::Unix { listener, hybrid, .. } => {
                let (stream, _) = listener.accept().await?;
                // Behind a hybrid socket is the VMM whatever guest it carries; the path says which.
                let peer = if *hybrid { Peer::Hybrid } else { Peer::Unix { uid: stream.peer_cred()?.uid() } };
                Ok((Box::new(stream), peer))
            }
            Socket::Vsock { listener, in_guest } => {
                let (stream, peer) = listener.accept().await?;
                let sibling = *in_guest && peer.cid() > CID_HOST;
                Ok((Box::new(ShortWrites::new(stream, sibling)), Peer::Vsock { cid: peer.cid() }))
            }
        }
    }
}

async fn bind_tcp(authority: &Authority) -> io::Result<(Authority, Socket)> {
    let listener = TcpListener::bind((authority.host.as_str(), authority.port)).await?;
    let bound: SocketAddr = listener.local_addr()?;
    Ok((Authority { host: authority.host.clone(), port: bound.port() }, Socket::Tcp(listener)))
}

/// Binds with the mode already set when the first peer can connect.
fn bind_unix(path: &Path, mode: u32, hybrid: bool) -> io::Result<Socket> {
    let bind = || {
        let socket = UnixSocket::new_stream()?;
        socket.bind(path).map(|()| socket)
    };
    let socket = match bind() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            bind()?
        }
        bound => bound?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    let file = SocketFile { path: path.to_owned(), inode: std::fs::symlink_metadata(path)?.ino() };
    Ok(Socket::Unix { listener: socket.listen(BACKLOG)?, hybrid, _file: Some(file) })
}

/// Removes a socket nobody listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path is a file that is not a socket"));
    }
    match StdUnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing a socket that nobody listens on");
            std::fs::remove_file(path)
        }
        _ => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "a living process listens there; stop it or choose another path",
        )),
    }
}

fn bind_vsock(cid: u32, port: u32) -> io::Result<(Endpoint, Socket)> {
    let own = vsock::get_local_cid().ok();
    let bound = match cid {
        CID_ANY => CID_ANY,
        CID_LOCAL => CID_LOCAL,
        cid if own == Some(cid) => cid,
        // vAccel's own agent ignores the CID, and its documents give one address to agent and guest alike.
        cid => {
            tracing::info!(cid, "this is not a CID of this machine: listening on all of them");
            CID_ANY
        }
    };
    let listener = VsockListener::bind(VsockAddr::new(bound, port)).map_err(|error| {
        let hint = if own.is_none() { "; this machine has no vsock (is /dev/vsock there?)" } else { "" };
        io::Error::new(error.kind(), format!("{error}{hint}"))
    })?;
    let in_guest = own.is_some_and(|own| own > CID_HOST && own != CID_ANY);
    Ok((Endpoint::Vsock { cid: bound, port }, Socket::Vsock { listener, in_guest }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stale_sockets_are_replaced_live_ones_and_files_are_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let endpoint = Endpoint::Unix(path.clone());
        // A socket whose process died: bound, never removed.
        drop(StdUnixListener::bind(&path).expect("binds"));
        let live = Listener::bind(&endpoint, 0o600).await.expect("replaces the stale one");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let refusal = Listener::bind(&endpoint, 0o600).await.err().expect("somebody is there");
        assert!(refusal.to_string().contains("living process"), "{refusal}");
        drop(live);
        assert!(!path.exists(), "removed when done");
        std::fs::write(&path, "data").expect("writes");
        assert!(Listener::bind(&endpoint, 0o600).await.is_err());
        assert_eq!(std::fs::read(&path).expect("still there"), b"data");
    }

    #[tokio::test]
    async fn a_socket_that_was_replaced_is_not_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let first = Listener::bind(&Endpoint::Unix(path.clone()), 0o600).await.expect("binds");
        std::fs::remove_file(&path).expect("somebody removes it");
        let _second = Listener::bind(&Endpoint::Unix(path.clone()), 0o600).await.expect("binds anew");
        drop(first);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn port_zero_is_told_as_the_port_the_kernel_chose() {
        let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().expect("valid"), 0).await.expect("binds");
        assert!(matches!(listener.endpoint(), Endpoint::Tcp(authority) if authority.port != 0));
    }
}
