//! What the command prints: text for people, JSON for programs, and errors.

use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};
use vaccel_client::{Error, Reason};

/// Why the command did not do what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line or the environment is wrong.
    Usage(String),
    /// The call failed.
    Call(Error),
    /// The output could not be written.
    Output(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

/// Standard output: text goes out as it comes, JSON is one document at the end.
pub(crate) struct Output {
    json: bool,
    document: Option<Value>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, document: None }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints text, if text is wanted.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), Failure> {
        if self.json { Ok(()) } else { write(text) }
    }

    /// Sets the document, if JSON is wanted.
    pub(crate) fn document(&mut self, document: Value) {
        if self.json {
            self.document = Some(document);
        }
    }

    pub(crate) fn finish(&mut self) -> Result<(), Failure> {
        match self.document.take() {
            Some(document) => write(&format!("{document:#}\n")),
            None => Ok(()),
        }
    }
}

fn write(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Tells what went wrong on stderr.
pub(crate) fn report(failure: &Failure, json: bool) -> ExitCode {
    let (message, reason, code) = match failure {
        // Whoever read the output has seen enough.
        Failure::Output(error) if error.kind() == ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        Failure::Output(error) => (format!("cannot write the output: {error}"), Reason::BackendFailed, 1),
        Failure::Usage(message) => (message.clone(), Reason::BadArgument, 2),
        Failure::Call(error) => (error.to_string(), error.reason(), 1),
    };
    let text = if json {
        let error = json!({"reason": reason.name(), "message": message, "errno": reason.errno()});
        format!("{}\n", json!({"error": error}))
    } else {
        format!("vaccel: {message} ({reason})\n")
    };
    // There is nowhere left to say that this failed too.
    let _ = io::stderr().write_all(text.as_bytes());
    ExitCode::from(code)
}

/// Why a file or folder that was asked for is not there.
pub(crate) fn unwritable(path: &Path, error: &io::Error) -> Error {
    Error::new(Reason::BackendFailed, format!("cannot write {}: {error}", path.display()))
}

/// Rows as columns, each as wide as its widest cell, the last one free.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// Text from the agent or a file name, as one line that cannot steer a terminal.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A count of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let exponent = (count.ilog2() / 10).min(4);
    let unit = UNITS[exponent as usize - 1];
    // The shift keeps the value small enough to be exact enough for one decimal.
    let tenths = (count >> (10 * (exponent - 1))) * 10 / 1024;
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (32 << 20, "32.0 MiB"),
            (5 << 40, "5.0 TiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["a".into(), "bb".into()], vec!["ccc".into(), "d".into()], vec!["é".into(), String::new()]];
        assert_eq!(table(&rows), "a    bb\nccc  d\né\n");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
