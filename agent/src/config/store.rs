//! Where uploaded files are kept.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::Deserialize;

use super::{ConfigError, at_least_one, mebibytes};

/// MiB of all tenants' files: sixteen tenants at their own default limit, and a part of any disk that an agent is put
/// on.
const STORE_MIB_DEFAULT: u64 = 16 << 10;

/// What a stored file survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum StoreSync {
    /// The end of the machine: file and folder are synchronized before the guest hears of it.
    Always,
    /// The end of the agent, however it comes. After the machine's, a file that did not reach the disk whole is found
    /// out by its hash and uploaded again, which costs less than waiting for the disk every time.
    #[default]
    Rename,
    /// Nothing: the store is emptied when an agent starts.
    Never,
}

/// Where uploaded files are, and how many.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The folder; no two agents share one.
    pub folder: PathBuf,
    /// What a file in it survives.
    pub sync: StoreSync,
    /// Bytes of all files.
    pub bytes_max: u64,
}

impl StoreConfig {
    pub(super) fn new(
        folder: Option<PathBuf>,
        sync: Option<StoreSync>,
        mib: Option<u64>,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            folder: folder.unwrap_or_else(|| store_folder(|name| std::env::var_os(name))),
            sync: sync.unwrap_or_default(),
            bytes_max: mebibytes(at_least_one("store-mib", mib.unwrap_or(STORE_MIB_DEFAULT))?),
        })
    }
}

/// Where programs of this user keep what they can do without, and find again: what systemd made for the service
/// (`StateDirectory=`), else the user's own folder for state, else the one for temporary files.
fn store_folder(variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    // Relative ones are to be ignored (XDG Base Directory Specification).
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(folders) = variable("STATE_DIRECTORY").and_then(|folders| folders.into_string().ok()) {
        // systemd separates several by colons.
        let first = folders.split(':').next().unwrap_or_default();
        if first.starts_with('/') {
            return first.into();
        }
    }
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    state.unwrap_or_else(std::env::temp_dir).join("vaccel-agent")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_store_is_where_the_system_wants_it() {
        let folder = |set: &[(&str, &str)]| {
            store_folder(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
        };
        let home = ("HOME", "/home/a");
        let state = ("XDG_STATE_HOME", "/state");
        assert_eq!(folder(&[home]), Path::new("/home/a/.local/state/vaccel-agent"));
        assert_eq!(folder(&[home, state]), Path::new("/state/vaccel-agent"));
        assert_eq!(folder(&[home, ("XDG_STATE_HOME", "state")]), folder(&[home]));
        assert_eq!(folder(&[home, state, ("STATE_DIRECTORY", "/var/lib/a:/b")]), Path::new("/var/lib/a"));
        assert_eq!(folder(&[]), std::env::temp_dir().join("vaccel-agent"));
    }
}
