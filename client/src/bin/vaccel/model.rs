//! A model from the file system onto the agent, with a progress line.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use vaccel_client::proto::limits::FILES_PER_RESOURCE_MAX;
use vaccel_client::{Error, Reason, Resource, ResourceFiles, ResourceKind, Session};

use crate::output;

/// Uploads shorter than this need no progress line, and none is redrawn sooner.
const REDRAW: Duration = Duration::from_millis(200);

/// Registers a file, or the regular files of a folder, as a model.
pub(crate) async fn register(session: &Session, path: &Path) -> Result<Resource, Error> {
    let files = ResourceFiles::new(ResourceKind::Model, files(path)?);
    if !std::io::stderr().is_terminal() {
        return session.register(files).await;
    }
    let line = Mutex::new(Line { start: Instant::now(), drawn: None });
    let line = std::sync::Arc::new(line);
    let shared = std::sync::Arc::clone(&line);
    let files = files.on_progress(move |done, total| {
        if let Ok(mut line) = shared.lock() {
            line.draw(done, total);
        }
    });
    let outcome = session.register(files).await;
    if let Ok(line) = line.lock() {
        line.clear();
    }
    outcome
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::new(Reason::BadArgument, format!("cannot read {}: {error}", path.display()))
}

/// Name and content of each file.
fn files(path: &Path) -> Result<Vec<(String, Bytes)>, Error> {
    let mut paths = Vec::new();
    if std::fs::metadata(path).map_err(|e| unreadable(path, &e))?.is_dir() {
        for entry in std::fs::read_dir(path).map_err(|e| unreadable(path, &e))? {
            let entry = entry.map_err(|e| unreadable(path, &e))?;
            if std::fs::metadata(entry.path()).is_ok_and(|file| file.is_file()) {
                paths.push(entry.path());
            }
        }
        // The order is part of the resource's name.
        paths.sort();
        if paths.is_empty() || paths.len() > FILES_PER_RESOURCE_MAX {
            let message = format!(
                "{} holds {} files, a model has 1 to {FILES_PER_RESOURCE_MAX}",
                path.display(),
                paths.len()
            );
            return Err(Error::new(Reason::BadArgument, message));
        }
    } else {
        paths.push(path.into());
    }
    let read = |path: std::path::PathBuf| {
        let content = std::fs::read(&path).map_err(|e| unreadable(&path, &e))?;
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
            Error::new(Reason::BadArgument, format!("the name of {} is not UTF-8", path.display()))
        })?;
        Ok((name.to_owned(), Bytes::from(content)))
    };
    paths.into_iter().map(read).collect()
}

/// The progress line on a terminal.
struct Line {
    start: Instant,
    drawn: Option<Instant>,
}

impl Line {
    fn draw(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        if now.duration_since(self.drawn.unwrap_or(self.start)) < REDRAW {
            return;
        }
        self.drawn = Some(now);
        let text = progress(done, total, now.duration_since(self.start));
        let _ = write!(std::io::stderr(), "\r{text}\x1b[K");
    }

    fn clear(&self) {
        if self.drawn.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn progress(done: u64, total: u64, time: Duration) -> String {
    let percent = u128::from(done) * 100 / u128::from(total.max(1));
    let rate = u128::from(done) * 1000 / time.as_millis().max(1);
    let rate = output::bytes(u64::try_from(rate).unwrap_or(u64::MAX));
    format!("upload {percent:3} %  {} of {}  {rate}/s", output::bytes(done), output::bytes(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_has_bytes_percent_and_rate() {
        let text = progress(3 << 20, 4 << 20, Duration::from_millis(1500));
        assert_eq!(text, "upload  75 %  3.0 MiB of 4.0 MiB  2.0 MiB/s");
        assert_eq!(progress(0, 0, Duration::ZERO), "upload   0 %  0 B of 0 B  0 B/s");
    }

    #[test]
    fn a_folder_is_its_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        assert!(files(folder.path()).unwrap_err().to_string().contains("0 files"));
        for name in ["weights.bin", "model.onnx"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        std::fs::create_dir(folder.path().join("inner")).unwrap();
        let names: Vec<_> = files(folder.path()).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["model.onnx", "weights.bin"]);
        let one = files(&folder.path().join("model.onnx")).unwrap();
        assert_eq!(one, [("model.onnx".to_owned(), Bytes::from_static(b"model.onnx"))]);
        assert!(files(&folder.path().join("absent")).unwrap_err().to_string().contains("absent"));
    }
}
