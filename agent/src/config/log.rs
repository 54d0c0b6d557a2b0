//! Settings of log lines.

use clap::ValueEnum;
use serde::Deserialize;
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::ConfigError;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// A filter of log lines: levels, each of all lines or of a module's.
///
/// # Errors
/// One that is none. A word without a level would be read as a module's name, and nothing of the others be logged.
pub(super) fn filter(written: Option<String>) -> Result<String, ConfigError> {
    let filter = written.unwrap_or_else(|| "info".into());
    for part in filter.split(',') {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        if level.trim().is_empty() || level.trim().parse::<LevelFilter>().is_err() {
            return Err(ConfigError::new(format!(
                "--log: expected error, warn, info, debug, trace or off, or MODULE=LEVEL with one of them, separated \
                 by commas, got {part:?}"
            )));
        }
    }
    filter.parse::<Targets>().map_err(|error| ConfigError::new(format!("--log {filter:?}: {error}")))?;
    Ok(filter)
}
