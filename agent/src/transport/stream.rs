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
use crate::http2::{Wire, poll_read};
use crate::onward;

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

/// What a socket had when it was not known to have anything. The runtime, which was asked before, tells when it has.
fn now(read: rustix::io::Result<usize>) -> Poll<io::Result<usize>> {
    match read {
        Err(rustix::io::Errno::WOULDBLOCK) => Poll::Pending,
        read => Poll::Ready(read.map_err(io::Error::from)),
    }
}

/// Sockets that read to two places at once, and at once when their task is [awake](onward::is_awake).
macro_rules! reads_two {
    ($stream:ty) => {
        impl Wire for $stream {
            fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                let ready = self.poll_read_ready(context);
                if onward::is_awake() { Poll::Ready(Ok(())) } else { ready }
            }

            fn poll_read_one(
                &mut self,
                context: &mut Context<'_>,
                place: &mut [u8],
            ) -> Poll<io::Result<usize>> {
                match poll_read(context, self, place) {
                    Poll::Pending if onward::is_awake() => now(rustix::io::read(&*self, place)),
                    read => read,
                }
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
                    if self.poll_read_ready(context)?.is_pending() {
                        if !onward::is_awake() {
                            return Poll::Pending;
                        }
                        let places = &mut [IoSliceMut::new(first), IoSliceMut::new(second)];
                        return now(rustix::io::readv(&*self, places));
                    }
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

    fn poll_read_one(&mut self, context: &mut Context<'_>, place: &mut [u8]) -> Poll<io::Result<usize>> {
        (**self).poll_read_one(context, place)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::io::Write;
    use std::sync::mpsc;
    use std::task::Waker;

    use crate::onward::Listener;

    /// Reads twelve bytes in one of two ways, and tells each piece.
    async fn reads(
        mut stream: UnixStream,
        in_two: bool,
        tell: mpsc::Sender<Vec<u8>>,
        whose: mpsc::Sender<Waker>,
    ) {
        let (mut first, mut second) = ([0; 4], [0; 8]);
        let mut came = 0;
        while came < 12 {
            let count = poll_fn(|context| {
                whose.send(context.waker().clone()).expect("the test listens");
                ready!(stream.poll_readable(context))?;
                match in_two {
                    true => stream.poll_read_two(context, &mut first, &mut second),
                    false => stream.poll_read_one(context, &mut second),
                }
            });
            let count = count.await.expect("it reads");
            let both = [first, [second[0], second[1], second[2], second[3]]].concat();
            tell.send(if in_two { both[..count.min(8)].to_vec() } else { second[..count].to_vec() })
                .expect("so");
            came += count;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn who_is_awake_reads_what_the_runtime_has_not_seen() {
        for in_two in [false, true] {
            let (near, far) = UnixStream::pair().expect("a pair");
            let mut far = far.into_std().expect("a socket");
            let ((tell, told), (whose, wakers)) = (mpsc::channel(), mpsc::channel());
            let reading = tokio::spawn(onward::task(reads(near, in_two, tell, whose)));
            // The only thread that would see what comes is busy until the test lets it go.
            let (let_on, wait) = mpsc::channel::<()>();
            let (began, begin) = mpsc::channel();
            let looked = std::thread::spawn(move || {
                let listener = Listener::new(&wakers.recv().expect("it waits"));
                begin.recv().expect("it is busy");
                listener.listen(|| false);
                assert!(told.try_recv().is_err(), "there is nothing yet");
                for piece in [b"abcd", b"efgh", b"ijkl"] {
                    far.write_all(piece).expect("written");
                    let looks = Cell::new(0);
                    listener.listen(|| looks.replace(looks.get() + 1) > 0);
                    assert_eq!(told.try_recv().expect("read at once"), piece);
                }
                drop(let_on);
            });
            tokio::spawn(async move {
                began.send(()).expect("somebody waits");
                let _ = wait.recv();
            });
            tokio::task::spawn_blocking(|| looked.join().expect("all was read")).await.expect("no panic");
            reading.await.expect("the runtime knows that it is over");
        }
    }
}
