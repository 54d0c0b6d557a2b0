//! Servers with a thread for each connection.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::Failure;

/// Serves each connection. A connection that breaks ends its thread, and nothing else.
///
/// Sockets are files here: their reads and writes are calls of read and write, which the kernel counts, while those of
/// Rust's sockets are recv and send, which it does not.
pub(super) fn serve(path: &Path, serve: fn(File) -> io::Result<()>) -> Result<(), Failure> {
    let (tcp, unix) = (TcpListener::bind("127.0.0.1:0")?, UnixListener::bind(path)?);
    let address = tcp.local_addr()?.to_string();
    let converse = move |socket: OwnedFd| {
        std::thread::spawn(move || serve(socket.into()));
    };
    std::thread::spawn(move || {
        for stream in tcp.incoming().map_while(Result::ok) {
            // Without it the stream is still one, only slow.
            let _ = stream.set_nodelay(true);
            converse(stream.into());
        }
    });
    std::thread::spawn(move || unix.incoming().map_while(Result::ok).for_each(|s| converse(s.into())));
    super::listening(&address, path)
}
