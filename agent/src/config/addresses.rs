//! Where to listen: addresses as they are written, and which need another setting.

use std::path::PathBuf;

use vaccel_proto::Endpoint;
use vaccel_proto::endpoint::CID_ANY;
use vaccel_proto::limits::{LOCAL_ADDRESS_DEFAULT, VSOCK_PORT_DEFAULT};

use super::{ConfigError, Settings};

fn is_loopback(host: &str) -> bool {
    host.parse::<std::net::IpAddr>().map_or(host == "localhost", |ip| ip.is_loopback())
}

/// The addresses of a configuration, or those of an agent that was told none.
pub(super) fn addresses(settings: &Settings) -> Result<Vec<Endpoint>, ConfigError> {
    let mut addresses = Vec::new();
    for text in &settings.address {
        let endpoint: Endpoint =
            text.parse().map_err(|error| ConfigError::new(format!("--address: {error}")))?;
        let endpoint =
            endpoint.for_listening().map_err(|error| ConfigError::new(format!("--address: {error}")))?;
        if addresses.contains(&endpoint) {
            return Err(ConfigError::new(format!("--address: {endpoint} is given twice")));
        }
        addresses.push(endpoint);
    }
    let vsock = Endpoint::Vsock { cid: CID_ANY, port: VSOCK_PORT_DEFAULT };
    if settings.vsock == Some(true) && !addresses.contains(&vsock) {
        addresses.push(vsock);
    }
    if addresses.is_empty() {
        let folder = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        addresses.push(Endpoint::Unix(folder.join("vaccel.sock")));
        addresses.push(LOCAL_ADDRESS_DEFAULT.parse().map_err(|error| ConfigError::new(format!("{error}")))?);
    }
    Ok(addresses)
}

/// # Errors
/// An address that needs another setting.
pub(super) fn check(addresses: &[Endpoint], has_tls: bool, insecure: bool) -> Result<(), ConfigError> {
    for address in addresses {
        match address {
            Endpoint::Tls(_) if !has_tls => {
                return Err(ConfigError::new(format!("{address} needs --tls-cert FILE and --tls-key FILE")));
            }
            Endpoint::Tcp(authority) if !insecure && !is_loopback(&authority.host) => {
                return Err(ConfigError::new(format!(
                    "{address} is plain TCP beyond loopback: anybody on the way could read and change it; \
                     use tls://{authority} with --tls-cert and --tls-key, or --insecure on a network you trust"
                )));
            }
            _ => {}
        }
    }
    Ok(())
}
