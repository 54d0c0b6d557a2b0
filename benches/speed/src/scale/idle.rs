//! Guests that have opened a session and made a call, and then keep their connection and say nothing but that they are
//! still there. They are written by hand, because thousands of real ones would be what is measured; their header blocks
//! use the table of fields that connections have, as those of gRPC's libraries do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use vaccel_guest::frame::{self, Header};
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{NoopRequest, OpenSessionReply, OpenSessionRequest, RunReply, RunRequest};

use crate::Failure;

/// Connections that are being opened at the same time.
const OPENING: usize = 16;

/// A field that is kept in the connection's table, and one that is not; the name follows.
const KEPT: u8 = 0x40;
const NOT_KEPT: u8 = 0;

/// What carries the bytes.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Connections, kept by a thread. They end when this is dropped.
#[derive(Debug)]
pub(super) struct Idle {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    lost: Arc<AtomicUsize>,
}

impl Idle {
    /// Opens so many.
    ///
    /// # Errors
    /// One could not be opened, or its call failed.
    pub(super) fn open(address: &str, count: usize) -> Result<Self, Failure> {
        let (end, ended) = oneshot::channel();
        let (opened, is_open) = std::sync::mpsc::sync_channel(1);
        let (address, lost) = (address.to_owned(), Arc::new(AtomicUsize::new(0)));
        let losses = Arc::clone(&lost);
        let thread = std::thread::spawn(move || {
            let keeping = async {
                let streams = match open_all(&address, count).await {
                    Ok(streams) => streams,
                    Err(failure) => return drop(opened.send(Err(failure))),
                };
                let mut kept = JoinSet::new();
                for stream in streams {
                    let losses = Arc::clone(&losses);
                    kept.spawn(async move {
                        if keep(stream).await.is_err() {
                            losses.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
                let _ = opened.send(Ok(()));
                let _ = ended.await;
            };
            if let Ok(runtime) = Builder::new_current_thread().enable_all().build() {
                runtime.block_on(keeping);
            }
        });
        let idle = Self { end: Some(end), thread: Some(thread), lost };
        is_open.recv().map_err(|_| "the thread of idle guests ended")??;
        Ok(idle)
    }

    /// Connections that ended by themselves.
    pub(super) fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn open_all(address: &str, count: usize) -> Result<Vec<Box<dyn Stream>>, Failure> {
    let mut streams = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for _ in 0..count {
        if opening.len() == OPENING
            && let Some(stream) = opening.join_next().await
        {
            streams.push(stream??);
        }
        opening.spawn(open(address.to_owned()));
    }
    while let Some(stream) = opening.join_next().await {
        streams.push(stream??);
    }
    Ok(streams)
}

async fn open(address: String) -> Result<Box<dyn Stream>, Failure> {
    let mut stream: Box<dyn Stream> = match address.split_once("://").ok_or("no address")? {
        ("tcp", address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        (_, path) => Box::new(UnixStream::connect(path).await?),
    };
    let opening = [&frame::PREFACE[..], &framed(frame::SETTINGS, 0, 0, &[])].concat();
    stream.write_all(&opening).await?;
    let request = OpenSessionRequest::default().encode_to_vec();
    let reply = call(&mut stream, 1, ("Sessions/Open", KEPT), &request).await?;
    let OpenSessionReply { session, .. } = OpenSessionReply::decode(&reply[..])?;
    let request = RunRequest { session, op: Some(Op::Noop(NoopRequest::default())), ..RunRequest::default() };
    let reply = call(&mut stream, 3, ("Operations/Run", NOT_KEPT), &request.encode_to_vec()).await?;
    RunReply::decode(&reply[..])?.outcome.ok_or("a reply without an outcome")?;
    Ok(stream)
}

/// Makes a call, and gives the message of its reply.
async fn call(
    stream: &mut Box<dyn Stream>,
    id: u32,
    (method, keep): (&str, u8),
    message: &[u8],
) -> Result<Vec<u8>, Failure> {
    let data = [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat();
    let headers = framed(frame::HEADERS, frame::END_HEADERS, id, &block(method, keep));
    stream.write_all(&[headers, framed(frame::DATA, frame::END_STREAM, id, &data)].concat()).await?;
    let mut reply = Vec::new();
    loop {
        let (header, content) = next(stream).await?;
        match header.kind {
            frame::DATA => reply.extend(content),
            frame::RST_STREAM | frame::GOAWAY => {
                return Err("the agent broke an idle guest's call off".into());
            }
            _ => {}
        }
        if header.stream == id && header.has(frame::END_STREAM) {
            // Without a message there is none behind its five bytes, which are not there either.
            return Ok(reply.get(5..).ok_or("the agent refused an idle guest's call")?.to_vec());
        }
    }
}

fn block(method: &str, keep: u8) -> Vec<u8> {
    let path = format!("/vaccel.v1.{method}");
    let fields = [
        (":authority", "localhost"),
        (":path", &*path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("user-agent", "vaccel-speed"),
    ];
    // `:method: POST` and `:scheme: http`. No text is longer than one byte can say.
    let mut block = vec![0x83, 0x86];
    for (name, value) in fields {
        block.push(keep);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend(text.as_bytes());
        }
    }
    block
}

fn framed(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let header = Header { length: content.len(), kind, flags, stream }.encode();
    [&header[..], content].concat()
}

/// The next frame; what has to be answered is.
async fn next(stream: &mut Box<dyn Stream>) -> Result<(Header, Vec<u8>), Failure> {
    let mut header = [0; frame::HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let header = Header::decode(&header);
    let mut content = vec![0; header.length];
    stream.read_exact(&mut content).await?;
    if matches!(header.kind, frame::SETTINGS | frame::PING) && !header.has(frame::ACK) {
        let content = if header.kind == frame::PING { &content[..] } else { &[] };
        stream.write_all(&framed(header.kind, frame::ACK, 0, content)).await?;
    }
    Ok((header, content))
}

/// Answers whatever asks whether somebody is there, until the connection ends.
async fn keep(mut stream: Box<dyn Stream>) -> Result<(), Failure> {
    loop {
        next(&mut stream).await?;
    }
}
