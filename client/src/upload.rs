//! Resources on their way to the agent: what it lacks goes up in pieces, from where the last attempt stopped.

use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use vaccel_proto::limits::DEADLINE_MAX;
use vaccel_proto::v1::UploadRequest;
use vaccel_proto::v1::resources_client::ResourcesClient;
use vaccel_proto::{Error, Reason};

use crate::backoff::Backoff;
use crate::client::timed;
use crate::error::of_status;
use crate::files::{Content, NamedFile, Pieces, Progress};
use crate::link::Link;
use crate::retry::{Deadline, pause_after};

/// Pieces of a file on disk that are read before they can be sent: reading goes on while one is sent.
const READ_AHEAD: usize = 1;

fn malformed(message: &str) -> Error {
    Error::new(Reason::BackendFailed, message)
}

/// How far an upload is, and when it last moved.
pub(crate) struct Meter {
    total: u64,
    progress: Option<Progress>,
    position: Arc<Mutex<Position>>,
}

#[derive(Clone, Copy)]
struct Position {
    done: u64,
    moved: Instant,
}

impl Meter {
    /// A meter that tells `progress`, if anybody, how far the content is.
    pub(crate) fn new(content: &Content, progress: Option<Progress>) -> Self {
        let total = content.bytes();
        Self { total, progress, position: Arc::new(Mutex::new(Position { done: 0, moved: Instant::now() })) }
    }

    fn lacks(&self, bytes: u64) {
        *self.position.lock().unwrap_or_else(PoisonError::into_inner) =
            Position { done: self.total.saturating_sub(bytes), moved: Instant::now() };
        self.tell();
    }

    fn advance(&self, bytes: u64) {
        {
            let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
            position.done += bytes;
            position.moved = Instant::now();
        }
        self.tell();
    }

    fn position(&self) -> Position {
        *self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        if let Some(progress) = &self.progress {
            progress(self.position().done, self.total);
        }
    }

    fn share(&self) -> Self {
        Self { total: self.total, progress: self.progress.clone(), position: Arc::clone(&self.position) }
    }
}

/// Makes the session hold the content; returns the resource's name.
///
/// An upload may take as long as it takes: `patience` bounds the time in which the agent gets no further
/// byte.
pub(crate) async fn register(
    link: &Link,
    session: &str,
    content: &Content,
    meter: &Meter,
    patience: Duration,
) -> Result<String, Error> {
    let mut backoff = Backoff::default();
    let mut deadline = Deadline::after(patience);
    let mut lacking_before = u64::MAX;
    let mut sent = false;
    loop {
        let request = content.request(session);
        let reply = link
            .repeat(deadline, true, |wire, time| {
                let request = timed(request.clone(), time);
                async move { ResourcesClient::new(wire).register(request).await }
            })
            .await?;
        let missing: Option<Vec<_>> = reply.missing.iter().map(|file| content.find(file)).collect();
        let missing =
            missing.ok_or_else(|| malformed("the agent asks for bytes that are not of this resource"))?;
        let lacking = missing.iter().map(|(_, bytes)| bytes).sum();
        meter.lacks(lacking);
        if missing.is_empty() {
            return Ok(reply.resource);
        }
        if lacking < lacking_before {
            (lacking_before, deadline, backoff) = (lacking, Deadline::after(patience), Backoff::default());
        } else if sent {
            return Err(malformed("the agent took the files and still asks for them"));
        }
        let outcome = send_all(link, session, &missing, meter, patience).await;
        sent = outcome.is_ok();
        if let Err(error) = outcome {
            if !is_passing(error.reason()) {
                return Err(error);
            }
            let pause = pause_after(&error, &mut backoff);
            if pause >= deadline.remaining() {
                return Err(deadline.gave_up(&error));
            }
            sleep(pause).await;
        }
    }
}

/// Whether the upload can go on later. A deadline is one of the agent's that ended a long stream.
fn is_passing(reason: Reason) -> bool {
    matches!(reason, Reason::Unreachable | Reason::Overloaded | Reason::ShuttingDown | Reason::Deadline)
}

async fn send_all(
    link: &Link,
    session: &str,
    missing: &[(&NamedFile, u64)],
    meter: &Meter,
    patience: Duration,
) -> Result<(), Error> {
    for &(file, lacking) in missing {
        let wire = link.wire().await?;
        let failure = Failure::default();
        let mut request = Request::new(Messages::new(session, file, lacking, meter.share(), &failure));
        request.set_timeout(DEADLINE_MAX);
        let mut client = ResourcesClient::new(wire);
        let mut upload = pin!(client.upload(request));
        loop {
            let moved = meter.position().moved;
            match timeout_at(moved + patience, upload.as_mut()).await {
                Ok(outcome) => {
                    // A file that cannot be read ends the messages, which says nothing to the agent.
                    if let Some(failure) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
                        return Err(failure);
                    }
                    outcome.map_err(|status| of_status(&status))?;
                    break;
                }
                Err(_) if meter.position().moved > moved => {}
                Err(_) => {
                    let message =
                        format!("{} took no more of {:?} within {patience:?}", link.endpoint(), file.name);
                    return Err(Error::new(Reason::Deadline, message));
                }
            }
        }
    }
    Ok(())
}

/// Why the messages of an upload ended before its file did.
type Failure = Arc<Mutex<Option<Error>>>;

/// The messages that bring the rest of a file: the first names it, each carries a piece.
struct Messages {
    supply: Supply,
    meter: Meter,
}

enum Supply {
    Memory(Naming, Pieces),
    Disk(ReceiverStream<UploadRequest>),
}

/// Makes messages of pieces.
struct Naming(Option<UploadRequest>);

impl Naming {
    fn message(&mut self, data: Bytes) -> UploadRequest {
        UploadRequest { data, ..self.0.take().unwrap_or_default() }
    }
}

impl Messages {
    fn new(session: &str, file: &NamedFile, lacking: u64, meter: Meter, failure: &Failure) -> Self {
        let offset = file.size - lacking;
        let (session, sha256, size) = (session.to_owned(), file.sha256.clone(), file.size);
        let first = UploadRequest { session, sha256, size, offset, data: Bytes::new() };
        let (naming, pieces) = (Naming(Some(first)), file.pieces(offset));
        let supply = if file.is_on_disk() && lacking > 0 {
            Supply::Disk(read_ahead(naming, pieces, Arc::clone(failure)))
        } else {
            Supply::Memory(naming, pieces)
        };
        Self { supply, meter }
    }
}

/// Reads on a thread that may wait.
fn read_ahead(mut naming: Naming, pieces: Pieces, failure: Failure) -> ReceiverStream<UploadRequest> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    tokio::task::spawn_blocking(move || {
        for piece in pieces {
            match piece {
                Ok(data) => {
                    // Sending fails when the upload has ended.
                    if sender.blocking_send(naming.message(data)).is_err() {
                        return;
                    }
                }
                Err(error) => *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
            }
        }
    });
    ReceiverStream::new(receiver)
}

impl Stream for Messages {
    type Item = UploadRequest;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<UploadRequest>> {
        let this = self.get_mut();
        let message = match &mut this.supply {
            Supply::Disk(messages) => ready!(Pin::new(messages).poll_next(context)),
            // Memory can always be read; an empty file is one empty piece.
            Supply::Memory(naming, pieces) => match pieces.next() {
                Some(piece) => piece.ok().map(|data| naming.message(data)),
                None => naming.0.take(),
            },
        };
        if let Some(message) = &message {
            this.meter.advance(message.data.len() as u64);
        }
        Poll::Ready(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{PIECE_BYTES, Source};
    use tokio_stream::StreamExt;

    fn file(bytes: usize) -> NamedFile {
        NamedFile::new(("f".into(), Source::Memory(vec![7; bytes].into()))).unwrap()
    }

    async fn sent(file: &NamedFile, lacking: u64, failure: &Failure) -> Vec<UploadRequest> {
        let position = Arc::new(Mutex::new(Position { done: 0, moved: Instant::now() }));
        let meter = Meter { total: file.size, progress: None, position };
        Messages::new("s", file, lacking, meter, failure).collect().await
    }

    #[tokio::test]
    async fn pieces_are_bounded_and_the_first_names_the_file() {
        let file = file(2 * PIECE_BYTES + 3);
        let pieces = sent(&file, file.size - 5, &Failure::default()).await;
        let sizes: Vec<usize> = pieces.iter().map(|piece| piece.data.len()).collect();
        assert_eq!(sizes, [PIECE_BYTES, PIECE_BYTES - 2]);
        assert_eq!((pieces[0].offset, pieces[0].size, pieces[0].session.as_str()), (5, file.size, "s"));
        assert_eq!(pieces[0].sha256, file.sha256);
        assert!(pieces[1].session.is_empty() && pieces[1].sha256.is_empty());
    }

    #[tokio::test]
    async fn an_empty_file_is_one_empty_piece() {
        let pieces = sent(&file(0), 0, &Failure::default()).await;
        assert_eq!(pieces.iter().map(|piece| piece.data.len()).collect::<Vec<_>>(), [0]);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_any_more_ends_the_messages_and_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; PIECE_BYTES + 1]).unwrap();
        let file = NamedFile::new(("f".into(), Source::Path(path.clone()))).unwrap();
        let failure = Failure::default();
        assert_eq!(sent(&file, file.size, &failure).await.len(), 2);
        std::fs::write(&path, vec![7; PIECE_BYTES]).unwrap();
        assert_eq!(sent(&file, file.size, &failure).await.len(), 1);
        assert!(failure.lock().unwrap().as_ref().unwrap().message().contains("shorter"));
    }
}
