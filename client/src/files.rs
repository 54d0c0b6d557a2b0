//! The files of a resource: in memory or in the file system, named by their content before anything is sent.

use std::collections::HashMap;
use std::fmt;
use std::fs::File as DiskFile;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use vaccel_proto::limits::{CHUNK_BYTES_MAX, FILES_PER_RESOURCE_MAX, NAME_BYTES_MAX};
use vaccel_proto::v1::{File, MissingFile, RegisterResourceRequest, ResourceKind};
use vaccel_proto::{Error, Reason};

/// Bytes of a piece of an upload: of one that has not come whole when the connection breaks, all are sent again.
pub(crate) const PIECE_BYTES: usize = 256 << 10;
const _: () = assert!(PIECE_BYTES <= CHUNK_BYTES_MAX);

/// Told how many bytes of a resource the agent has, and how many it will have.
pub(crate) type Progress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// The files of a resource.
#[derive(Clone)]
pub struct ResourceFiles {
    /// What they are.
    pub kind: ResourceKind,
    origin: Origin,
    progress: Option<Progress>,
}

#[derive(Clone)]
enum Origin {
    Memory(Vec<(String, Bytes)>),
    Path(PathBuf),
}

impl ResourceFiles {
    /// A resource of several files in memory: name and content. A name is a label such as `model.onnx` or
    /// `variables/index`, not a path.
    pub fn new(kind: ResourceKind, files: Vec<(String, Bytes)>) -> Self {
        Self { kind, origin: Origin::Memory(files), progress: None }
    }

    /// A model in one file in memory.
    pub fn model(name: impl Into<String>, content: impl Into<Bytes>) -> Self {
        Self::new(ResourceKind::Model, vec![(name.into(), content.into())])
    }

    /// The file at a path, or all regular files below a folder, named by their way from there (`variables/index`).
    /// Links to files count as files, links to folders are passed over. They are read when they are registered, a
    /// piece at a time, and must stay as they are as long as the session holds the resource.
    pub fn path(kind: ResourceKind, path: impl Into<PathBuf>) -> Self {
        Self { kind, origin: Origin::Path(path.into()), progress: None }
    }

    /// Calls `progress` with the bytes that are under way or at the agent, and the bytes of all files.
    #[must_use]
    pub fn on_progress(mut self, progress: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Checks the limits that need no agent, and names every file by its content.
    pub(crate) async fn hash(self) -> Result<(Content, Option<Progress>), Error> {
        let Self { kind, origin, progress } = self;
        // A gigabyte takes a second: not on a thread that others wait for.
        let hashed = tokio::task::spawn_blocking(move || {
            let files = match origin {
                Origin::Memory(files) => {
                    files.into_iter().map(|(name, content)| (name, Source::Memory(content))).collect()
                }
                Origin::Path(path) => files_at(&path)?,
            };
            check(&files)?;
            files.into_iter().map(NamedFile::new).collect::<Result<_, _>>()
        });
        let files = hashed
            .await
            .map_err(|e| Error::new(Reason::Cancelled, format!("hashing the files was cut off: {e}")))??;
        Ok((Content { kind, files }, progress))
    }
}

impl fmt::Debug for ResourceFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ResourceFiles");
        shown.field("kind", &self.kind);
        match &self.origin {
            Origin::Memory(files) => {
                let files: Vec<_> = files.iter().map(|(name, content)| (name, content.len())).collect();
                shown.field("files", &files)
            }
            Origin::Path(path) => shown.field("path", path),
        };
        shown.finish_non_exhaustive()
    }
}

fn check(files: &[(String, Source)]) -> Result<(), Error> {
    if files.is_empty() || files.len() > FILES_PER_RESOURCE_MAX {
        return Err(Error::field("files", format!("1 to {FILES_PER_RESOURCE_MAX} files"), files.len()));
    }
    for (index, (name, _)) in files.iter().enumerate() {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            let expected = format!("1 to {NAME_BYTES_MAX} bytes");
            return Err(Error::field(format!("files[{index}].name"), expected, name.len()));
        }
    }
    Ok(())
}

/// Where a file's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Memory(Bytes),
    Path(PathBuf),
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::new(Reason::BadArgument, format!("cannot read {}: {error}", path.display()))
}

fn files_at(path: &Path) -> Result<Vec<(String, Source)>, Error> {
    let unreadable = |error: io::Error| unreadable(path, &error);
    if !std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        let name = path.file_name().map(Path::new).and_then(Path::to_str).ok_or_else(|| not_text(path))?;
        return Ok(vec![(name.to_owned(), Source::Path(path.into()))]);
    }
    let mut found = Vec::new();
    walk(path, "", &mut found)?;
    if found.is_empty() || found.len() > FILES_PER_RESOURCE_MAX {
        let many = if found.is_empty() { "0".into() } else { format!("more than {FILES_PER_RESOURCE_MAX}") };
        let message =
            format!("{} holds {many} files, a resource has 1 to {FILES_PER_RESOURCE_MAX}", path.display());
        return Err(Error::new(Reason::BadArgument, message));
    }
    // The order is part of the resource's name.
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

/// Gathers files until there are too many.
fn walk(folder: &Path, prefix: &str, found: &mut Vec<(String, Source)>) -> Result<(), Error> {
    let failed = |error: io::Error| unreadable(folder, &error);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        let name = entry.file_name();
        let label = || name.to_str().map(|name| format!("{prefix}{name}")).ok_or_else(|| not_text(&path));
        if entry.file_type().map_err(failed)?.is_dir() {
            walk(&path, &format!("{}/", label()?), found)?;
        } else if std::fs::metadata(&path).is_ok_and(|file| file.is_file()) {
            found.push((label()?, Source::Path(path.clone())));
        }
        if found.len() > FILES_PER_RESOURCE_MAX {
            break;
        }
    }
    Ok(())
}

fn not_text(path: &Path) -> Error {
    Error::new(Reason::BadArgument, format!("the name of {} is not UTF-8", path.display()))
}

/// The content of a resource, kept for the day when an agent has lost it.
pub(crate) struct Content {
    kind: ResourceKind,
    files: Vec<NamedFile>,
}

pub(crate) struct NamedFile {
    pub(crate) name: String,
    source: Source,
    pub(crate) size: u64,
    pub(crate) sha256: Bytes,
}

impl NamedFile {
    pub(crate) fn new((name, source): (String, Source)) -> Result<Self, Error> {
        let (size, hash) = match &source {
            Source::Memory(data) => (data.len() as u64, Sha256::digest(data)),
            Source::Path(path) => hash_file(path).map_err(|error| unreadable(path, &error))?,
        };
        Ok(Self { name, source, size, sha256: Bytes::copy_from_slice(&hash) })
    }

    /// The content from an offset on.
    pub(crate) fn pieces(&self, offset: u64) -> Pieces {
        let left = self.size.saturating_sub(offset);
        Pieces { left, rest: Rest::Unread(self.source.clone(), offset) }
    }

    /// Whether reading it may wait for a disk.
    pub(crate) fn is_on_disk(&self) -> bool {
        matches!(self.source, Source::Path(_))
    }
}

/// What is still to be read of a file, piece by piece. Reading may wait for a disk.
pub(crate) struct Pieces {
    left: u64,
    rest: Rest,
}

impl Iterator for Pieces {
    type Item = Result<Bytes, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let length = usize::try_from(self.left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let piece = self.rest.next(length);
        self.left = if piece.is_err() { 0 } else { self.left - length as u64 };
        Some(piece)
    }
}

enum Rest {
    Unread(Source, u64),
    Memory(Bytes),
    Disk(PathBuf, DiskFile),
}

impl Rest {
    fn next(&mut self, length: usize) -> Result<Bytes, Error> {
        if let Self::Unread(source, offset) = self {
            *self = match source {
                // The offset lies within the data, which is in memory.
                Source::Memory(data) => Self::Memory(data.slice(usize::try_from(*offset).unwrap_or(0)..)),
                Source::Path(path) => {
                    let file = DiskFile::open(&*path).and_then(|mut file| {
                        file.seek(SeekFrom::Start(*offset))?;
                        Ok(file)
                    });
                    let file = file.map_err(|error| unreadable(path, &error))?;
                    Self::Disk(path.clone(), file)
                }
            };
        }
        match self {
            Self::Unread(..) => Ok(Bytes::new()),
            Self::Memory(data) => Ok(data.split_to(length)),
            Self::Disk(path, file) => {
                let mut piece = vec![0; length];
                file.read_exact(&mut piece).map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => Error::new(
                        Reason::BadArgument,
                        format!("{} became shorter while it was sent", path.display()),
                    ),
                    _ => unreadable(path, &error),
                })?;
                Ok(piece.into())
            }
        }
    }
}

fn hash_file(path: &Path) -> io::Result<(u64, sha2::digest::Output<Sha256>)> {
    let mut file = DiskFile::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    let mut size = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((size, hasher.finalize())),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                size += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Content {
    /// Bytes of all files; the same content under two names goes up once.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| (&file.sha256, file.size)).collect::<HashMap<_, _>>().values().sum()
    }

    pub(crate) fn request(&self, session: &str) -> RegisterResourceRequest {
        let file =
            |file: &NamedFile| File { name: file.name.clone(), size: file.size, sha256: file.sha256.clone() };
        RegisterResourceRequest {
            session: session.into(),
            kind: self.kind.into(),
            files: self.files.iter().map(file).collect(),
        }
    }

    /// The file the agent misses, and the bytes it lacks of it.
    pub(crate) fn find(&self, missing: &MissingFile) -> Option<(&NamedFile, u64)> {
        let file = self.files.iter().find(|file| file.sha256 == missing.sha256)?;
        Some((file, file.size.checked_sub(missing.offset)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(content.find(&stranger).is_none());
        let beyond = MissingFile { sha256: content.files[0].sha256.clone(), offset: 4 };
        assert!(content.find(&beyond).is_none());
    }

    fn names(path: &Path) -> Result<Vec<String>, Error> {
        Ok(files_at(path)?.into_iter().map(|(name, _)| name).collect())
    }

    #[test]
    fn a_folder_is_its_files_in_order_with_their_way() {
        let folder = tempfile::tempdir().unwrap();
        assert!(names(folder.path()).unwrap_err().to_string().contains("0 files"));
        std::fs::create_dir_all(folder.path().join("variables/empty")).unwrap();
        for name in ["weights.bin", "model.onnx", "variables/index"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("weights.bin", folder.path().join("linked.bin")).unwrap();
        std::os::unix::fs::symlink(".", folder.path().join("loop")).unwrap();
        let all = ["linked.bin", "model.onnx", "variables/index", "weights.bin"];
        assert_eq!(names(folder.path()).unwrap(), all);
        assert_eq!(names(&folder.path().join("model.onnx")).unwrap(), ["model.onnx"]);
        assert!(names(&folder.path().join("absent")).unwrap_err().to_string().contains("absent"));
        for number in 0..FILES_PER_RESOURCE_MAX {
            std::fs::write(folder.path().join(number.to_string()), "").unwrap();
        }
        assert!(names(folder.path()).unwrap_err().to_string().contains("more than 64 files"));
    }

    #[test]
    fn a_file_on_disk_comes_in_the_same_pieces_as_one_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let content: Vec<u8> = (0..=250).cycle().take(2 * CHUNK_BYTES_MAX + 3).collect();
        std::fs::write(&path, &content).unwrap();
        let memory = NamedFile::new(("f".into(), Source::Memory(content.into()))).unwrap();
        let disk = NamedFile::new(("f".into(), Source::Path(path.clone()))).unwrap();
        assert_eq!((disk.size, &disk.sha256), (memory.size, &memory.sha256));
        for offset in [0, 5, memory.size - 1, memory.size] {
            let all = |file: &NamedFile| file.pieces(offset).collect::<Result<Vec<_>, _>>().unwrap();
            assert_eq!(all(&disk), all(&memory));
        }
        std::fs::write(&path, "short").unwrap();
        let mut pieces = disk.pieces(0);
        assert!(pieces.next().unwrap().unwrap_err().to_string().contains("shorter"));
        assert!(pieces.next().is_none());
    }
}
