//! Addresses: one grammar for what the agent listens on and what a guest dials.
//!
//! | form | the agent listens | a guest dials |
//! |---|---|---|
//! | `vsock://CID:PORT` | AF_VSOCK, on any CID of its own | AF_VSOCK |
//! | `hvsock://PATH:PORT` | the unix socket `PATH_PORT` | `PATH` with the `CONNECT PORT` handshake |
//! | `unix://PATH`, `unix://@NAME` | unix socket, abstract with `@` | the same |
//! | `tcp://HOST:PORT` | plain TCP | plain TCP |
//! | `tls://HOST:PORT` | TLS over TCP | TLS over TCP |
//!
//! Schemes are matched without regard to case. A CID is a number, `any` (or `-1`), `host` (2) or `local` (1).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Longest unix socket path the kernel takes, in bytes: `sun_path` holds 108 with its final NUL.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// `VMADDR_CID_ANY`: on listening, every CID the machine has.
pub const CID_ANY: u32 = u32::MAX;
/// `VMADDR_CID_HOST`: the machine that runs the guest.
pub const CID_HOST: u32 = 2;
/// `VMADDR_CID_LOCAL`: this machine.
pub const CID_LOCAL: u32 = 1;

/// One parsed address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// AF_VSOCK.
    Vsock {
        /// Context id; [`CID_ANY`] only makes sense for listening.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// Hybrid vsock: the unix sockets by which Firecracker, Cloud Hypervisor and vhost-device-vsock carry a guest's
    /// vsock.
    HybridVsock {
        /// The VMM's own socket (its `uds_path`).
        path: PathBuf,
        /// The vsock port.
        port: u32,
    },
    /// Unix socket in the file system.
    Unix(PathBuf),
    /// Unix socket in the abstract namespace, name without the `@`.
    UnixAbstract(String),
    /// Plain TCP.
    Tcp(Authority),
    /// TLS over TCP.
    Tls(Authority),
}

/// `HOST:PORT`; an IPv6 host is written in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Authority {
    /// Name or numeric address, without brackets.
    pub host: String,
    /// TCP port; 0 lets the kernel choose on listening.
    pub port: u16,
}

/// Why a text is not an address, or not one for this purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointError(String);

impl fmt::Display for EndpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for EndpointError {}

fn refuse<T>(message: impl Into<String>) -> Result<T, EndpointError> {
    Err(EndpointError(message.into()))
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return refuse(format!(
                "address {text:?} has no scheme; expected vsock://, hvsock://, unix://, tcp:// or tls://"
            ));
        };
        match scheme.to_ascii_lowercase().as_str() {
            "vsock" => vsock(text, rest),
            "hvsock" => hybrid_vsock(text, rest),
            "unix" => unix(text, rest),
            "tcp" => authority(text, rest).map(Self::Tcp),
            "tls" => authority(text, rest).map(Self::Tls),
            other => refuse(format!(
                "address {text:?} has the unknown scheme {other:?}; expected vsock, hvsock, unix, tcp or tls"
            )),
        }
    }
}

fn split_port<'a>(text: &str, rest: &'a str, form: &str) -> Result<(&'a str, u32), EndpointError> {
    let Some((before, port)) = rest.rsplit_once(':') else {
        return refuse(format!("address {text:?} has no port; expected {form}"));
    };
    // A sign is no part of a port, though the standard library reads one.
    match port.parse() {
        Ok(number) if number != u32::MAX && !port.starts_with('+') => Ok((before, number)),
        _ => refuse(format!("address {text:?}: port {port:?} is not a number from 0 to 4294967294")),
    }
}

fn vsock(text: &str, rest: &str) -> Result<Endpoint, EndpointError> {
    let (cid, port) = split_port(text, rest, "vsock://CID:PORT")?;
    let cid = match cid.to_ascii_lowercase().as_str() {
        "any" | "-1" => CID_ANY,
        "host" => CID_HOST,
        "local" => CID_LOCAL,
        number if number.starts_with('+') => {
            return refuse(format!("address {text:?}: CID {number:?} is not a number"));
        }
        number => match number.parse() {
            Ok(0) => return refuse(format!("address {text:?}: CID 0 is reserved for the hypervisor")),
            Ok(cid) => cid,
            Err(_) => {
                return refuse(format!(
                    "address {text:?}: CID {number:?} is not a number up to 4294967295, any, host or local"
                ));
            }
        },
    };
    Ok(Endpoint::Vsock { cid, port })
}

fn hybrid_vsock(text: &str, rest: &str) -> Result<Endpoint, EndpointError> {
    let (path, port) = split_port(text, rest, "hvsock://PATH:PORT")?;
    if path.is_empty() {
        return refuse(format!("address {text:?} has no path; expected hvsock://PATH:PORT"));
    }
    check_unix_length(text, &hybrid_listen_path(Path::new(path), port))?;
    Ok(Endpoint::HybridVsock { path: path.into(), port })
}

fn unix(text: &str, rest: &str) -> Result<Endpoint, EndpointError> {
    match rest.strip_prefix('@') {
        _ if rest.is_empty() || rest == "@" => {
            refuse(format!("address {text:?} has no path; expected unix://PATH or unix://@NAME"))
        }
        Some(name) => {
            // The leading NUL of an abstract name takes the place of the `@`.
            check_unix_length(text, Path::new(rest))?;
            Ok(Endpoint::UnixAbstract(name.into()))
        }
        None => {
            check_unix_length(text, Path::new(rest))?;
            Ok(Endpoint::Unix(rest.into()))
        }
    }
}

fn check_unix_length(text: &str, path: &Path) -> Result<(), EndpointError> {
    let length = path.as_os_str().len();
    if length > UNIX_PATH_BYTES_MAX {
        return refuse(format!(
            "address {text:?}: the socket path is {length} bytes, the kernel takes at most {UNIX_PATH_BYTES_MAX}"
        ));
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return refuse(format!("address {text:?}: the socket path holds a NUL byte"));
    }
    Ok(())
}

fn authority(text: &str, rest: &str) -> Result<Authority, EndpointError> {
    let (host, port) = split_port(text, rest, "HOST:PORT")?;
    let Ok(port) = u16::try_from(port) else {
        return refuse(format!("address {text:?}: port {port} is above 65535"));
    };
    let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(inner) => inner,
        None if host.contains(':') => {
            return refuse(format!(
                "address {text:?}: an IPv6 host is written in brackets, as in [::1]:65500"
            ));
        }
        None => host,
    };
    if host.is_empty() {
        return refuse(format!("address {text:?} has no host; expected HOST:PORT"));
    }
    Ok(Authority { host: host.into(), port })
}

/// The unix socket on which the agent serves one guest of a hybrid-vsock VMM.
pub fn hybrid_listen_path(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}

impl Endpoint {
    /// Checks that an agent can listen here.
    ///
    /// # Errors
    /// vsock port 0: guests could not know the port the kernel would choose.
    pub fn for_listening(self) -> Result<Self, EndpointError> {
        match self {
            Self::Vsock { port: 0, .. } | Self::HybridVsock { port: 0, .. } => {
                refuse(format!("address {self}: port 0 cannot be listened on; the usual port is 2048"))
            }
            usable => Ok(usable),
        }
    }

    /// Checks that a guest can dial this.
    ///
    /// # Errors
    /// CID `any`, and port 0.
    pub fn for_dialing(self) -> Result<Self, EndpointError> {
        match &self {
            Self::Vsock { cid: CID_ANY, .. } => refuse(format!(
                "address {self}: CID any is for listening; from inside a VM the agent is vsock://host:PORT"
            )),
            Self::Vsock { port: 0, .. } | Self::HybridVsock { port: 0, .. } => {
                refuse(format!("address {self}: port 0 cannot be dialed"))
            }
            Self::Tcp(authority) | Self::Tls(authority) if authority.port == 0 => {
                refuse(format!("address {self}: port 0 cannot be dialed"))
            }
            _ => Ok(self),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid: CID_ANY, port } => write!(f, "vsock://any:{port}"),
            Self::Vsock { cid, port } => write!(f, "vsock://{cid}:{port}"),
            Self::HybridVsock { path, port } => write!(f, "hvsock://{}:{port}", path.display()),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::UnixAbstract(name) => write!(f, "unix://@{name}"),
            Self::Tcp(authority) => write!(f, "tcp://{authority}"),
            Self::Tls(authority) => write!(f, "tls://{authority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Endpoint, String> {
        text.parse::<Endpoint>().map_err(|e| e.to_string())
    }

    #[test]
    fn every_form_parses_and_prints_back() {
        for (text, printed) in [
            ("vsock://42:2048", "vsock://42:2048"),
            ("vsock://any:2048", "vsock://any:2048"),
            ("vsock://-1:2048", "vsock://any:2048"),
            ("vsock://4294967295:2048", "vsock://any:2048"),
            ("VSOCK://Host:1", "vsock://2:1"),
            ("vsock://local:9", "vsock://1:9"),
            ("hvsock:///run/vm.vsock:2048", "hvsock:///run/vm.vsock:2048"),
            ("hvsock:///run/a:b:52", "hvsock:///run/a:b:52"),
            ("unix:///run/v.sock", "unix:///run/v.sock"),
            ("unix://relative.sock", "unix://relative.sock"),
            ("unix://@name", "unix://@name"),
            ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
            ("tcp://[::1]:65500", "tcp://[::1]:65500"),
            ("TLS://gpu.example:443", "tls://gpu.example:443"),
        ] {
            let endpoint = parse(text).expect(text);
            assert_eq!(endpoint.to_string(), printed);
            assert_eq!(parse(printed).expect(printed), endpoint);
        }
    }

    #[test]
    fn every_refusal_says_why() {
        let long = format!("unix:///{}", "x".repeat(UNIX_PATH_BYTES_MAX));
        let long_with_port = format!("hvsock:///{}:2048", "x".repeat(UNIX_PATH_BYTES_MAX - 4));
        for (text, why) in [
            ("/run/v.sock", "no scheme"),
            ("http://x:1", "unknown scheme"),
            ("vsock://2", "no port"),
            ("vsock://0:1", "reserved"),
            ("vsock://4294967296:1", "not a number"),
            ("vsock://me:1", "not a number"),
            ("vsock://2:99999999999", "not a number"),
            ("vsock://2:-1", "not a number"),
            ("vsock://2:+1", "not a number"),
            ("hvsock://:1", "no path"),
            ("hvsock:///run/x", "no port"),
            ("unix://", "no path"),
            ("unix://@", "no path"),
            (long.as_str(), "at most 107"),
            (long_with_port.as_str(), "at most 107"),
            ("unix:///a\0b", "NUL"),
            ("tcp://localhost", "no port"),
            ("tcp://:80", "no host"),
            ("tcp://::1:80", "brackets"),
            ("tcp://h:65536", "above 65535"),
        ] {
            let refusal = parse(text).expect_err(text);
            assert!(refusal.contains(why), "{text}: {refusal}");
        }
    }

    #[test]
    fn each_role_refuses_what_it_cannot_use() {
        let endpoint = |text: &str| parse(text).expect(text);
        assert!(endpoint("vsock://any:0").for_listening().is_err());
        assert!(endpoint("tcp://127.0.0.1:0").for_listening().is_ok());
        let refusal = endpoint("vsock://any:1").for_dialing().expect_err("any is not a destination");
        assert!(refusal.to_string().contains("vsock://host:PORT"));
        assert!(endpoint("tcp://h:0").for_dialing().is_err());
        assert!(endpoint("unix://@a").for_dialing().is_ok());
    }

    #[test]
    fn hybrid_path_is_the_socket_and_the_port() {
        assert_eq!(hybrid_listen_path(Path::new("/run/v"), 52), Path::new("/run/v_52"));
    }
}
