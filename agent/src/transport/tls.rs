//! TLS for `tls://` listeners: the server's certificate, and optionally those of clients.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::Stream;
use crate::config::{ConfigError, TlsFiles};
use crate::identity::CertificateName;

/// Makes TLS connections of byte streams.
#[derive(Clone)]
pub(crate) struct Acceptor(TlsAcceptor);

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Acceptor")
    }
}

impl Acceptor {
    /// Reads certificates and key.
    ///
    /// # Errors
    /// A file that cannot be read, is not PEM, or does not fit the others.
    pub(crate) fn new(files: &TlsFiles) -> Result<Self, ConfigError> {
        let chain = certificates("--tls-cert", &files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|error| ConfigError::new(format!("--tls-key {}: {error}", files.key.display())))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| ConfigError::new(format!("TLS: {error}")))?;
        let builder = match &files.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let refuse = |error: &dyn std::fmt::Display| {
                    ConfigError::new(format!("--tls-client-ca {}: {error}", path.display()))
                };
                let mut roots = RootCertStore::empty();
                for certificate in certificates("--tls-client-ca", path)? {
                    roots.add(certificate).map_err(|error| refuse(&error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| refuse(&error))?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| {
            let (cert, key) = (files.cert.display(), files.key.display());
            ConfigError::new(format!("--tls-cert {cert} and --tls-key {key}: {error}"))
        })?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// Shakes hands; with the stream comes the name of the client's verified certificate.
    ///
    /// # Errors
    /// What the handshake failed on, and the stream, on which an alert may be on its way.
    pub(super) async fn accept(
        &self,
        stream: Box<dyn Stream>,
    ) -> Result<(Box<dyn Stream>, Option<CertificateName>), (io::Error, Box<dyn Stream>)> {
        let stream = self.0.accept(stream).into_fallible().await?;
        let certificates = stream.get_ref().1.peer_certificates();
        let name = certificates.and_then(<[_]>::first).map(|certificate| CertificateName::of(certificate));
        Ok((Box::new(stream), name))
    }
}

fn certificates(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let refuse =
        |error: &dyn std::fmt::Display| ConfigError::new(format!("{flag} {}: {error}", path.display()));
    let read = CertificateDer::pem_file_iter(path).map_err(|error| refuse(&error))?;
    let certificates: Vec<_> = read.collect::<Result<_, _>>().map_err(|error| refuse(&error))?;
    if certificates.is_empty() {
        Err(refuse(&"expected a PEM certificate, found none"))
    } else {
        Ok(certificates)
    }
}
