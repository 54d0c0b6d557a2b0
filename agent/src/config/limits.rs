//! Limits: what the agent computes and accepts at the same time, and what one tenant may hold.

use super::{ConfigError, Settings, at_least_one, cores, mebibytes};

/// Lanes, each of which is a thread: more than any machine has processors, and fewer than it can have threads.
const LANES_MAX: usize = 4096;

/// Connections: more than one process can have files open.
const CONNECTIONS_MAX: usize = 1 << 30;

/// What one tenant may hold.
#[derive(Clone, Debug)]
pub struct TenantLimits {
    /// Connections.
    pub connections: u64,
    /// Sessions.
    pub sessions: u64,
    /// Calls in flight.
    pub calls: u64,
    /// Bytes of stored files, unfinished uploads included.
    pub resource_bytes: u64,
    /// Bytes of requests being received or served.
    pub in_flight_bytes: u64,
    /// Bytes of memory shared with the agent.
    pub shared_bytes: u64,
    /// Bytes of devices' memory.
    pub device_bytes: u64,
}

impl TenantLimits {
    /// # Errors
    /// Those with which no tenant would be served at all.
    pub(super) fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let connections = settings.tenant_connections_max.unwrap_or(256);
        let sessions = settings.tenant_sessions_max.unwrap_or(64);
        let calls = settings.tenant_calls_max.unwrap_or(64);
        let in_flight = settings.tenant_in_flight_mib.unwrap_or(256);
        Ok(Self {
            connections: at_least_one("tenant-connections-max", connections)?,
            sessions: at_least_one("tenant-sessions-max", sessions)?,
            calls: at_least_one("tenant-calls-max", calls)?,
            resource_bytes: mebibytes(settings.tenant_resource_mib.unwrap_or(1024)),
            in_flight_bytes: mebibytes(at_least_one("tenant-in-flight-mib", in_flight)?),
            shared_bytes: mebibytes(settings.tenant_shared_mib.unwrap_or(1024)),
            device_bytes: mebibytes(settings.tenant_device_mib.unwrap_or(16384)),
        })
    }
}

/// # Errors
/// None, and more than there can be threads.
pub(super) fn lanes(written: Option<usize>) -> Result<usize, ConfigError> {
    let lanes = written.unwrap_or_else(|| cores().min(LANES_MAX));
    at_most("lanes", at_least_one("lanes", lanes)?, LANES_MAX)
}

/// # Errors
/// None, and more than can be counted.
pub(super) fn connections(written: Option<usize>) -> Result<usize, ConfigError> {
    let connections = at_least_one("connections-max", written.unwrap_or(1024))?;
    at_most("connections-max", connections, CONNECTIONS_MAX)
}

fn at_most(name: &str, value: usize, most: usize) -> Result<usize, ConfigError> {
    if value <= most {
        return Ok(value);
    }
    Err(ConfigError::new(format!("--{name}: expected at most {most}, got {value}")))
}
