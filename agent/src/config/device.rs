//! Settings of accelerators.

use std::path::PathBuf;

use super::{ConfigError, at_least_one, mebibytes};

/// Bytes of a device that runs of one model may take beside its weights, where nobody says: activations of networks for
/// images in batches of 32 are a third of it.
const WORKSPACE_BYTES: u64 = 1 << 30;

/// Where devices are looked for, and how much of them is used.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Folders of the CUDA libraries; empty for those where drivers and packages put them.
    pub libraries: Vec<PathBuf>,
    /// Bytes of one device that the agent may take; none for nine tenths of it.
    pub bytes_max: Option<u64>,
    /// Bytes of a device that runs of one model may take beside its weights.
    pub workspace_bytes: u64,
}

impl Default for DeviceConfig {
    /// What is found in the usual places.
    fn default() -> Self {
        Self { libraries: Vec::new(), bytes_max: None, workspace_bytes: WORKSPACE_BYTES }
    }
}

impl DeviceConfig {
    pub(super) fn new(
        libraries: Vec<PathBuf>,
        mib: Option<u64>,
        workspace_mib: Option<u64>,
    ) -> Result<Self, ConfigError> {
        let bytes_max = mib.map(|mib| at_least_one("device-mib", mib)).transpose()?.map(mebibytes);
        let workspace = workspace_mib.map(|mib| at_least_one("device-workspace-mib", mib)).transpose()?;
        Ok(Self { libraries, bytes_max, workspace_bytes: workspace.map_or(WORKSPACE_BYTES, mebibytes) })
    }
}
