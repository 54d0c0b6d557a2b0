//! Resources on their way to the agent: what it lacks goes up in pieces, from where the last attempt stopped.

use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Request;
use vaccel_proto::limits::{CHUNK_BYTES_MAX, DEADLINE_MAX, FILES_PER_RESOURCE_MAX, NAME_BYTES_MAX};
use vaccel_proto::v1::resources_client::ResourcesClient;
use vaccel_proto::v1::{File, MissingFile, RegisterResourceRequest, ResourceKind, UploadRequest};
use vaccel_proto::{Error, Reason};

use crate::backoff::Backoff;
use crate::client::timed;
use crate::error::of_status;
use crate::link::Link;
use crate::retry::{Deadline, pause_after};

/// Told how many bytes of a resource the agent has, and how many it will have.
type Progress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// The files of a resource, whole and in memory.
#[derive(Clone)]
pub struct ResourceFiles {
    /// What they are.
    pub kind: ResourceKind,
    /// Name and content; a name is a label such as `model.onnx`, not a path.
    pub files: Vec<(String, Bytes)>,
    progress: Option<Progress>,
}

impl ResourceFiles {
    /// A resource of several files.
    pub fn new(kind: ResourceKind, files: Vec<(String, Bytes)>) -> Self {
        Self { kind, files, progress: None }
    }

    /// A model in one file.
    pub fn model(name: impl Into<String>, content: impl Into<Bytes>) -> Self {
        Self::new(ResourceKind::Model, vec![(name.into(), content.into())])
    }

    /// Calls `progress` with the bytes that are under way or at the agent, and the bytes of all files.
    #[must_use]
    pub fn on_progress(mut self, progress: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Checks the limits that need no agent, and names every file by its content.
    pub(crate) async fn hash(self) -> Result<(Content, Meter), Error> {
        if self.files.is_empty() || self.files.len() > FILES_PER_RESOURCE_MAX {
            return Err(Error::field(
                "files",
                format!("1 to {FILES_PER_RESOURCE_MAX} files"),
                self.files.len(),
            ));
        }
        for (index, (name, _)) in self.files.iter().enumerate() {
            if name.is_empty() || name.len() > NAME_BYTES_MAX {
                let expected = format!("1 to {NAME_BYTES_MAX} bytes");
                return Err(Error::field(format!("files[{index}].name"), expected, name.len()));
            }
        }
        let Self { kind, files, progress } = self;
        // A gigabyte takes a second: not on a thread that others wait for.
        let hashed =
            tokio::task::spawn_blocking(move || files.into_iter().map(NamedFile::new).collect()).await;
        let files: Vec<NamedFile> = hashed
            .map_err(|e| Error::new(Reason::Cancelled, format!("hashing the files was cut off: {e}")))?;
        let content = Content { kind, files };
        let meter = Meter::new(content.bytes(), progress);
        Ok((content, meter))
    }
}

impl fmt::Debug for ResourceFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<_> = self.files.iter().map(|(name, content)| (name, content.len())).collect();
        f.debug_struct("ResourceFiles")
            .field("kind", &self.kind)
            .field("files", &files)
            .finish_non_exhaustive()
    }
}

/// The content of a resource, kept for the day when an agent has lost it.
pub(crate) struct Content {
    kind: ResourceKind,
    files: Vec<NamedFile>,
}

struct NamedFile {
    name: String,
    data: Bytes,
    sha256: Bytes,
}

impl NamedFile {
    fn new((name, data): (String, Bytes)) -> Self {
        let sha256 = Bytes::copy_from_slice(&Sha256::digest(&data));
        Self { name, data, sha256 }
    }

    fn size(&self) -> u64 {
        self.data.len() as u64
    }
}

impl Content {
    /// Bytes of all files; the same content under two names goes up once.
    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| (&file.sha256, file.size())).collect::<HashMap<_, _>>().values().sum()
    }

    fn request(&self, session: &str) -> RegisterResourceRequest {
        let file = |file: &NamedFile| File {
            name: file.name.clone(),
            size: file.size(),
            sha256: file.sha256.clone(),
        };
        RegisterResourceRequest {
            session: session.into(),
            kind: self.kind.into(),
            files: self.files.iter().map(file).collect(),
        }
    }

    /// The file the agent misses, and the bytes it lacks of it.
    fn find(&self, missing: &MissingFile) -> Result<(&NamedFile, u64), Error> {
        self.files
            .iter()
            .find(|file| file.sha256 == missing.sha256)
            .and_then(|file| Some((file, file.size().checked_sub(missing.offset)?)))
            .ok_or_else(|| malformed("the agent asks for bytes that are not of this resource"))
    }
}

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
    fn new(total: u64, progress: Option<Progress>) -> Self {
        Self { total, progress, position: Arc::new(Mutex::new(Position { done: 0, moved: Instant::now() })) }
    }

    /// A meter nobody looks at.
    pub(crate) fn silent(content: &Content) -> Self {
        Self::new(content.bytes(), None)
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
        let missing = reply.missing.iter().map(|file| content.find(file)).collect::<Result<Vec<_>, _>>()?;
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
        let pieces = Pieces::new(session, file, lacking);
        let reporter = meter.share();
        let pieces = pieces.inspect(move |piece| reporter.advance(piece.data.len() as u64));
        let mut request = Request::new(tokio_stream::iter(pieces));
        request.set_timeout(DEADLINE_MAX);
        let mut client = ResourcesClient::new(wire);
        let mut upload = pin!(client.upload(request));
        loop {
            let moved = meter.position().moved;
            match timeout_at(moved + patience, upload.as_mut()).await {
                Ok(outcome) => {
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

/// The messages that bring the rest of a file: the first names it, each carries a piece.
struct Pieces {
    first: Option<UploadRequest>,
    rest: Bytes,
}

impl Pieces {
    fn new(session: &str, file: &NamedFile, lacking: u64) -> Self {
        let offset = file.size() - lacking;
        // The offset lies within the file's data, which is in memory.
        let mut rest = file.data.slice(usize::try_from(offset).unwrap_or(file.data.len())..);
        let first = UploadRequest {
            session: session.into(),
            sha256: file.sha256.clone(),
            size: file.size(),
            offset,
            data: rest.split_to(rest.len().min(CHUNK_BYTES_MAX)),
        };
        Self { first: Some(first), rest }
    }
}

impl Iterator for Pieces {
    type Item = UploadRequest;

    fn next(&mut self) -> Option<UploadRequest> {
        let piece = |data| UploadRequest { data, ..UploadRequest::default() };
        self.first.take().or_else(|| {
            let length = self.rest.len().min(CHUNK_BYTES_MAX);
            (length > 0).then(|| piece(self.rest.split_to(length)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: usize) -> NamedFile {
        NamedFile::new(("f".into(), Bytes::from(vec![7; bytes])))
    }

    #[test]
    fn pieces_are_bounded_and_the_first_names_the_file() {
        let file = file(2 * CHUNK_BYTES_MAX + 3);
        let pieces: Vec<_> = Pieces::new("s", &file, file.size() - 5).collect();
        let sizes: Vec<usize> = pieces.iter().map(|piece| piece.data.len()).collect();
        assert_eq!(sizes, [CHUNK_BYTES_MAX, CHUNK_BYTES_MAX - 2]);
        assert_eq!((pieces[0].offset, pieces[0].size, pieces[0].session.as_str()), (5, file.size(), "s"));
        assert_eq!(pieces[0].sha256, file.sha256);
        assert!(pieces[1].session.is_empty() && pieces[1].sha256.is_empty());
    }

    #[test]
    fn an_empty_file_is_one_empty_piece() {
        assert_eq!(Pieces::new("s", &file(0), 0).map(|piece| piece.data.len()).collect::<Vec<_>>(), [0]);
    }

    #[tokio::test]
    async fn wrong_file_lists_are_refused_before_they_are_sent() {
        for files in [vec![], vec![(String::new(), Bytes::new())], vec![("x".repeat(257), Bytes::new())]] {
            let refusal = ResourceFiles::new(ResourceKind::Data, files).hash().await.err().unwrap();
            assert_eq!(refusal.reason(), Reason::BadArgument);
        }
    }

    #[tokio::test]
    async fn the_same_content_counts_once() {
        let content = Bytes::from_static(b"abc");
        let files = vec![("a".into(), content.clone()), ("b".into(), content)];
        let (content, _) = ResourceFiles::new(ResourceKind::Data, files).hash().await.unwrap();
        assert_eq!(content.bytes(), 3);
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(content.files[0].sha256.iter().map(|b| format!("{b:02x}")).collect::<String>(), abc);
        let stranger = MissingFile { sha256: Bytes::from_static(&[0; 32]), offset: 0 };
        assert!(content.find(&stranger).is_err());
        let beyond = MissingFile { sha256: content.files[0].sha256.clone(), offset: 4 };
        assert!(content.find(&beyond).is_err());
    }
}
