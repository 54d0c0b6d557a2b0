//! TLS: whom the client trusts, what it shows of itself, and what a refusal means.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, AlertDescription, ClientConfig, RootCertStore};
use vaccel_proto::endpoint::Authority;
use vaccel_proto::{Error, Reason};

use crate::error::Failure;

/// Authorities of the system, where nothing else is given.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A PEM file, or what is in one.
#[derive(Clone)]
pub enum Pem {
    /// A file, read when the client connects for the first time.
    File(PathBuf),
    /// The content of one.
    Bytes(Bytes),
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            // It may be a private key.
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

impl From<PathBuf> for Pem {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

impl From<&Path> for Pem {
    fn from(path: &Path) -> Self {
        Self::File(path.into())
    }
}

impl From<Bytes> for Pem {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

/// How to speak TLS to a `tls://` address; other addresses ignore it.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// Certificates of the authorities that may vouch for the agent; without it, the system's.
    pub ca: Option<Pem>,
    /// The client's own certificate chain and its private key, where the agent wants one.
    pub identity: Option<(Pem, Pem)>,
    /// Name the agent's certificate must be for, where it is not the host of the address.
    pub server_name: Option<String>,
}

/// A TLS client for one address.
#[derive(Clone)]
pub(crate) struct TlsDialer {
    pub(crate) connector: TlsConnector,
    pub(crate) server_name: ServerName<'static>,
}

impl fmt::Debug for TlsDialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsDialer").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl Tls {
    /// # Errors
    /// `BAD_ARGUMENT` for files that cannot be read or do not hold what they should, and for an unusable
    /// server name.
    pub(crate) fn dialer(&self, authority: &Authority, alpn: &[u8]) -> Result<TlsDialer, Error> {
        let name = self.server_name.as_ref().unwrap_or(&authority.host);
        let server_name = ServerName::try_from(name.clone()).map_err(|e| {
            bad(format!("TLS server name {name:?} is neither a DNS name nor an IP address: {e}"))
        })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| bad(format!("TLS versions: {e}")))?
            .with_root_certificates(self.roots()?);
        let mut config = match &self.identity {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let what = format!("{} and {}", certificate.shown(), key.shown());
                config
                    .with_client_auth_cert(
                        certificate.certificates("client certificate")?,
                        key.private_key()?,
                    )
                    .map_err(|e| bad(format!("client certificate and key in {what} cannot be used: {e}")))?
            }
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(TlsDialer { connector: TlsConnector::from(Arc::new(config)), server_name })
    }

    fn roots(&self) -> Result<RootCertStore, Error> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(pem) => {
                for certificate in pem.certificates("CA")? {
                    let refused = |e| bad(format!("CA certificate in {} cannot be used: {e}", pem.shown()));
                    roots.add(certificate).map_err(refused)?;
                }
            }
            None if Path::new(SYSTEM_AUTHORITIES).exists() => {
                // A system's list may hold old certificates that cannot be used; the others still can.
                roots.add_parsable_certificates(Pem::File(SYSTEM_AUTHORITIES.into()).certificates("CA")?);
            }
            None => {
                return Err(bad(format!(
                    "no CA to check the agent's certificate with: there is no {SYSTEM_AUTHORITIES}; give one \
                     (--tls-ca, VACCEL_TLS_CA)"
                )));
            }
        }
        Ok(roots)
    }
}

impl Pem {
    fn shown(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Bytes(_) => "the given PEM".into(),
        }
    }

    fn read(&self) -> Result<Bytes, Error> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::File(path) => std::fs::read(path)
                .map(Bytes::from)
                .map_err(|e| bad(format!("cannot read {}: {e}", path.display()))),
        }
    }

    fn certificates(&self, role: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
        let text = self.read()?;
        let certificates = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| bad(format!("{role} file {} is not PEM: {e}", self.shown())))?;
        if certificates.is_empty() {
            return Err(bad(format!("{role} file {} holds no certificate", self.shown())));
        }
        Ok(certificates)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, Error> {
        PrivateKeyDer::from_pem_slice(&self.read()?)
            .map_err(|e| bad(format!("key file {} holds no private key: {e}", self.shown())))
    }
}

fn bad(message: String) -> Error {
    Error::new(Reason::BadArgument, message)
}

/// What a TLS error on the way to `address` means; none when `error` is not one.
pub(crate) fn failure(address: &dyn fmt::Display, error: &io::Error) -> Option<Failure> {
    let cause = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match cause {
        rustls::Error::InvalidCertificate(_) => Failure::unauthenticated(format!(
            "the certificate of {address} is not trusted: {cause}; check --tls-ca (the CA that signed it) \
             and --tls-server-name (the name it is for)"
        )),
        rustls::Error::AlertReceived(alert) if is_refusal(*alert) => Failure::unauthenticated(format!(
            "{address} refuses this client: {cause}; check --tls-cert and --tls-key (a certificate from the \
             CA that the agent trusts)"
        )),
        _ => Failure::unreachable(format!(
            "TLS with {address} failed: {cause}; does the agent listen with tls:// there?"
        )),
    })
}

/// Whether an alert is the agent's judgement of the client's certificate.
fn is_refusal(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        // TLS 1.2 knows no better word for a missing certificate than a failed handshake.
        A::CertificateRequired
            | A::NoCertificate
            | A::HandshakeFailure
            | A::UnknownCA
            | A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::AccessDenied
            | A::DecryptError
    )
}
