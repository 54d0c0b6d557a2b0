//! Byte streams, whatever carries them.

use std::io::{self, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;
use tokio_vsock::VsockStream;
use vaccel_client::vsock::ShortWrites;

use super::memory;
use crate::http2::Wire;

/// A byte stream, whatever carries it.
pub(crate) trait Stream: Wire + Send {
    /// Writes bytes, with a file descriptor if one is given, which only sockets of this machine carry.
    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> Poll<io::Result<usize>> {
        if file.is_some() {
            return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
        }
        Pin::new(self).poll_write(context, bytes)
    }
}

impl Stream for TcpStream {}
impl Stream for ShortWrites<VsockStream> {}
impl<S: Stream> Stream for TlsStream<S> {}
#[cfg(test)]
impl Stream for tokio::io::DuplexStream {}

/// Sockets that read to two places at once.
macro_rules! reads_two {
    ($stream:ty) => {
        impl Wire for $stream {
            fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.poll_read_ready(context)
            }

            fn reads_two(&self) -> bool {
                true
            }

            fn poll_read_two(
                &mut self,
                context: &mut Context<'_>,
                first: &mut [u8],
                second: &mut [u8],
            ) -> Poll<io::Result<usize>> {
                let room = first.len() + second.len();
                loop {
                    ready!(self.poll_read_ready(context))?;
                    let mut came = None;
                    let read = self.try_io(Interest::READABLE, || {
                        let places = &mut [IoSliceMut::new(first), IoSliceMut::new(second)];
                        let count = rustix::io::readv(&*self, places)?;
                        came = Some(count);
                        // Where less came than there was room for, there is no more: asking again can be spared.
                        if (1..room).contains(&count) {
                            Err(io::ErrorKind::WouldBlock.into())
                        } else {
                            Ok(())
                        }
                    });
                    match (came, read) {
                        (Some(count), _) => return Poll::Ready(Ok(count)),
                        (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                        (None, failed) => return Poll::Ready(failed.map(|()| 0)),
                    }
                }
            }
        }
    };
}

reads_two!(TcpStream);
reads_two!(UnixStream);
// Vectored reads of vsock lose their first piece in some guests' kernels.
impl Wire for ShortWrites<VsockStream> {}
// It has one record at a time.
impl<S: Stream> Wire for TlsStream<S> {}

impl<S: Wire + ?Sized> Wire for Box<S> {
    fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        (**self).poll_readable(context)
    }

    fn reads_two(&self) -> bool {
        (**self).reads_two()
    }

    fn poll_read_two(
        &mut self,
        context: &mut Context<'_>,
        first: &mut [u8],
        second: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        (**self).poll_read_two(context, first, second)
    }
}

impl<S: Stream + ?Sized> Stream for Box<S> {
    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> Poll<io::Result<usize>> {
        (**self).poll_send(context, bytes, file)
    }
}

impl Stream for UnixStream {
    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_write_ready(context))?;
            match self.try_io(Interest::WRITABLE, || memory::send(self, bytes, file)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }
}
