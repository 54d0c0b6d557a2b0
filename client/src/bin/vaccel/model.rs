//! A model from the file system onto the agent, with a progress line.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vaccel_client::{Error, Resource, ResourceFiles, ResourceKind, Session};

use crate::output;

/// Uploads shorter than this need no progress line, and none is redrawn sooner.
const REDRAW: Duration = Duration::from_millis(200);

/// Registers the model that was said, if one was.
pub(crate) async fn register_said(
    session: &Session,
    path: Option<&PathBuf>,
) -> Result<Option<Resource>, Error> {
    match path {
        Some(path) => register(session, path).await.map(Some),
        None => Ok(None),
    }
}

/// Registers a file, or the regular files below a folder, as a model.
pub(crate) async fn register(session: &Session, path: &Path) -> Result<Resource, Error> {
    let files = ResourceFiles::path(ResourceKind::Model, path);
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
}
