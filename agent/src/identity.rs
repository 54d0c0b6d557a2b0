//! Who is calling. A connection's peer, and on TCP and TLS its bearer token, become one [`Tenant`]; nothing else in the
//! agent looks at addresses, certificates or credentials.
//!
//! | listener | tenant | vouched for by |
//! |---|---|---|
//! | vsock | `vsock:CID` | the kernel: a guest cannot choose its CID |
//! | hybrid vsock | `hvsock:PATH` | whoever made the VM's socket: one listening path per VM |
//! | unix | `unix:PATH:UID` | the kernel |
//! | tls, client certificates on | `cert:NAME` (URI or DNS name, else fingerprint) | the authority |
//! | tcp or tls, tokens on | `token:NAME`, with a certificate `cert:…+token:NAME` | the secret |
//! | tcp or tls, neither | `tcp:LISTENER:IP`, of this machine `127.0.0.1` | nobody: for loopback and trusted networks |

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use vaccel_proto::{Endpoint, Error, Reason};

use crate::config::ConfigError;

/// Bytes of a hash that stand for a path: enough to tell a host's tenants apart.
const PUBLIC_DIGEST_BYTES: usize = 6;

/// Scheme of the `authorization` metadata; schemes are matched without regard to case (RFC 9110, section 11.1).
const BEARER: &str = "bearer";

/// Shortest token a token file may hold, in bytes: 16 random characters cannot be guessed over a network.
const TOKEN_BYTES_MIN: usize = 16;

/// A name under which everything is held. Two tenants never see each other's sessions, resources, counters or errors.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tenant(Arc<str>);

impl Tenant {
    pub(crate) fn new(name: impl AsRef<str>) -> Self {
        Self(name.as_ref().into())
    }

    /// The name as the host's people see it.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as the tenant itself may see it: without the host's paths, and still the same for the same tenant.
    pub(crate) fn public(&self) -> String {
        match self.0.split_once(':') {
            Some((kind @ ("unix" | "hvsock"), _)) => {
                let digest = Sha256::digest(self.0.as_bytes());
                format!("{kind}:{}", hex(&digest[..PUBLIC_DIGEST_BYTES]))
            }
            _ => self.0.as_ref().into(),
        }
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The other end of a connection, as the transport knows it.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    Vsock { cid: u32 },
    Hybrid,
    Unix { uid: u32 },
    Tcp { ip: IpAddr },
    Tls { ip: IpAddr, certificate: Option<CertificateName> },
}

impl Peer {
    /// Whether it is a process of this machine, and no guest's.
    pub(crate) fn is_near(&self) -> bool {
        match self {
            Self::Unix { .. } => true,
            Self::Tcp { ip } | Self::Tls { ip, .. } => ip.is_loopback(),
            Self::Vsock { .. } | Self::Hybrid => false,
        }
    }

    /// The user of a process on this machine.
    pub(crate) fn uid(&self) -> Option<u32> {
        if let Self::Unix { uid } = self { Some(*uid) } else { None }
    }
}

/// The name a verified client certificate gives its holder.
#[derive(Clone, Debug)]
pub(crate) struct CertificateName(String);

impl CertificateName {
    /// The first URI name, else the first DNS name, else the SHA-256 fingerprint, of a certificate in DER.
    pub(crate) fn of(der: &[u8]) -> Self {
        let certificate = tokio_rustls::rustls::pki_types::CertificateDer::from(der);
        let named = webpki::EndEntityCert::try_from(&certificate).ok().and_then(|certificate| {
            let mut uris = certificate.valid_uri_names();
            let mut names = certificate.valid_dns_names();
            uris.next().or_else(|| names.next()).map(str::to_owned)
        });
        Self(named.unwrap_or_else(|| format!("sha256:{}", hex(&Sha256::digest(der)))))
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The tenant a connection belongs to before any token: what connection caps are counted by.
pub(crate) fn of_connection(listener: &Endpoint, peer: &Peer) -> Tenant {
    Tenant::new(match peer {
        Peer::Vsock { cid } => format!("vsock:{cid}"),
        Peer::Hybrid => format!("hvsock:{}", listener.to_string().trim_start_matches("hvsock://")),
        Peer::Unix { uid } => format!("unix:{}:{uid}", listener.to_string().trim_start_matches("unix://")),
        Peer::Tls { certificate: Some(name), .. } => format!("cert:{}", name.0),
        Peer::Tcp { ip } | Peer::Tls { ip, certificate: None } => {
            // A process calls from any of the addresses that this machine has for itself: they are all one's.
            let ip = if ip.is_loopback() { Ipv4Addr::LOCALHOST.into() } else { *ip };
            format!("tcp:{}:{ip}", listener.to_string().split_once("://").map_or("", |(_, host)| host))
        }
    })
}

/// The bearer tokens of a token file, kept as hashes.
#[derive(Debug)]
pub(crate) struct Tokens(HashMap<[u8; 32], String>);

impl Tokens {
    /// Reads lines `NAME TOKEN`; blank lines and lines that begin with `#` are passed over.
    pub(crate) fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::new(format!("--token-file {}: {error}", path.display())))?;
        Self::parse(&text)
            .map_err(|error| ConfigError::new(format!("--token-file {}: {error}", path.display())))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut names = HashMap::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let at = number + 1;
            let mut words = line.split_whitespace();
            let (Some(name), Some(token), None) = (words.next(), words.next(), words.next()) else {
                return Err(format!("line {at}: expected NAME TOKEN"));
            };
            if token.len() < TOKEN_BYTES_MIN {
                return Err(format!(
                    "line {at}: expected a token of {TOKEN_BYTES_MIN} bytes or more, got {}",
                    token.len()
                ));
            }
            if names.insert(digest(token), name.to_owned()).is_some() {
                return Err(format!("line {at}: this token is given twice"));
            }
        }
        if names.is_empty() {
            return Err("expected at least one line NAME TOKEN, got none".into());
        }
        Ok(Self(names))
    }

    /// The name of the token in the `authorization` metadata. The look-up is by hash, so its timing says nothing about
    /// the secrets.
    fn name(&self, authorization: Option<&[u8]>) -> Result<&str, Error> {
        let refuse = |what| Error::new(Reason::Unauthenticated, what);
        let value = authorization
            .ok_or_else(|| refuse("a token is needed here: send `authorization: Bearer TOKEN`"))?;
        let (_, token) = std::str::from_utf8(value)
            .ok()
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(BEARER))
            .ok_or_else(|| refuse("authorization: expected `Bearer TOKEN`, got something else"))?;
        let name = self.0.get(&digest(token.trim()));
        name.map(String::as_str).ok_or_else(|| refuse("this token is not known here; ask for one that is"))
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// Turns a connection and a call's credentials into a tenant.
#[derive(Debug)]
pub(crate) struct Identity {
    tokens: Option<Tokens>,
}

impl Identity {
    pub(crate) fn new(tokens: Option<Tokens>) -> Self {
        Self { tokens }
    }

    /// The tenant of one call.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` when this listener needs a token and the call has none that is known.
    pub(crate) fn of_call(
        &self,
        connection: &Tenant,
        peer: &Peer,
        authorization: Option<&[u8]>,
    ) -> Result<Tenant, Error> {
        match (&self.tokens, peer) {
            (Some(tokens), Peer::Tcp { .. } | Peer::Tls { certificate: None, .. }) => {
                tokens.name(authorization).map(|name| Tenant::new(format!("token:{name}")))
            }
            (Some(tokens), Peer::Tls { certificate: Some(_), .. }) => {
                tokens.name(authorization).map(|name| Tenant::new(format!("{connection}+token:{name}")))
            }
            _ => Ok(connection.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    #[test]
    fn token_files_are_checked_line_by_line() {
        for (text, why) in [
            ("", "at least one"),
            ("edge", "line 1: expected NAME TOKEN"),
            ("# c\nedge short", "line 2: expected a token of 16"),
            ("a 0123456789abcdef\nb 0123456789abcdef", "line 2: this token is given twice"),
            ("a 0123456789abcdef extra", "line 1"),
        ] {
            let refusal = Tokens::parse(text).expect_err(text);
            assert!(refusal.contains(why), "{text:?}: {refusal}");
            assert!(!refusal.contains("0123"), "a refusal never repeats a secret");
        }
    }

    #[test]
    fn a_token_is_needed_on_tcp_and_nowhere_else() {
        let identity = Identity::new(Some(Tokens::parse(&format!("edge {TOKEN}")).expect("valid")));
        let connection = Tenant::new("c");
        let tcp = Peer::Tcp { ip: IpAddr::from([127, 0, 0, 1]) };
        let good = format!("Bearer {TOKEN}");
        let tenant = identity.of_call(&connection, &tcp, Some(good.as_bytes())).expect("known token");
        assert_eq!(tenant.to_string(), "token:edge");
        assert!(
            identity.of_call(&connection, &tcp, Some(good.replace("Bearer", "bearer").as_bytes())).is_ok()
        );
        for bad in [None, Some("Bearer x".as_bytes()), Some(TOKEN.as_bytes()), Some(&[0xff][..])] {
            let refusal = identity.of_call(&connection, &tcp, bad).expect_err("refused");
            assert_eq!(refusal.reason(), Reason::Unauthenticated);
        }
        let unix = identity.of_call(&connection, &Peer::Unix { uid: 1 }, None).expect("the kernel vouches");
        assert_eq!(unix, connection);
    }

    #[test]
    fn each_path_and_each_uid_is_a_tenant() {
        let tenant =
            |listener: &str, peer: &Peer| of_connection(&listener.parse().expect("valid"), peer).to_string();
        assert_eq!(tenant("unix:///run/a", &Peer::Unix { uid: 7 }), "unix:/run/a:7");
        assert_eq!(tenant("hvsock:///run/vm:52", &Peer::Hybrid), "hvsock:/run/vm:52");
        let seen = Tenant::new("hvsock:/run/vm:52").public();
        assert!(seen.starts_with("hvsock:") && !seen.contains('/'), "{seen}");
        assert_eq!(Tenant::new("cert:edge").public(), "cert:edge");
        assert_eq!(tenant("vsock://any:1", &Peer::Vsock { cid: 9 }), "vsock:9");
        let tcp = |ip: &str| Peer::Tcp { ip: ip.parse().expect("an address") };
        for near in ["127.0.0.1", "127.0.0.2", "127.255.1.9", "::1"] {
            assert_eq!(tenant("tcp://127.0.0.1:80", &tcp(near)), "tcp:127.0.0.1:80:127.0.0.1", "{near}");
        }
        assert_eq!(tenant("tcp://0.0.0.0:80", &tcp("10.0.0.7")), "tcp:0.0.0.0:80:10.0.0.7");
    }
}
