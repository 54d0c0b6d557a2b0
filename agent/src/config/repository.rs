//! Settings of models by name.

use std::path::PathBuf;

use super::{ConfigError, at_least_one, machine_memory, mebibytes};

/// Where the host's models are.
#[derive(Clone, Debug)]
pub struct RepositoryConfig {
    /// Folders with a folder for each model, or with the files of one.
    pub folders: Vec<PathBuf>,
    /// Name of a model that is such a folder by itself.
    pub single: String,
    /// Bytes of the files of all models that are loaded at the same time.
    pub bytes_max: u64,
}

impl RepositoryConfig {
    pub(super) fn new(
        folders: Vec<PathBuf>,
        single: Option<String>,
        mib: Option<u64>,
    ) -> Result<Self, ConfigError> {
        let single = single.unwrap_or_else(|| "model".into());
        if single.is_empty() || single.starts_with('.') || single.contains('/') {
            return Err(ConfigError::new(format!(
                "--model-name: expected a name without slashes, got {single:?}"
            )));
        }
        let bytes_max = match mib {
            Some(mib) => mebibytes(at_least_one("models-mib", mib)?),
            None => machine_memory() / 2,
        };
        Ok(Self { folders, single, bytes_max })
    }
}
