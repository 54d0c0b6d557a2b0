//! Certificates that are right, wrong and missing, on both sides.

use std::sync::Arc;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};
use vaccel_client::{Client, Endpoint, Error, Pem, Reason, Tls};

use crate::fake::Fake;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn pem(text: String) -> Pem {
    Pem::Bytes(Bytes::from(text))
}

fn identity(authority: &Authority) -> (Pem, Pem) {
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["guest".into()]).unwrap().signed_by(&key, authority).unwrap();
    (pem(certificate.pem()), pem(key.serialize_pem()))
}

/// A fake agent on TLS over loopback, with a certificate for 127.0.0.1, that asks for client certificates of
/// `clients`.
async fn agent(authority: &Authority, clients: Option<&Authority>) -> Endpoint {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".into(), "agent.example".into()])
        .unwrap()
        .signed_by(&key, authority)
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let config = match clients {
        None => config.with_no_client_auth(),
        Some(clients) => {
            let mut roots = RootCertStore::empty();
            roots.add(clients.der().clone()).unwrap();
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            config.with_client_cert_verifier(verifier)
        }
    };
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = config.with_single_cert(vec![certificate.der().clone()], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("tls://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move {
        let fake = Fake::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(stream) = acceptor.accept(stream).await {
                fake.serve(stream).await;
            }
        }
    });
    endpoint
}

async fn info(endpoint: Endpoint, tls: Tls) -> Result<String, Error> {
    Ok(Client::builder(endpoint).tls(tls).connect().await?.info().await?.version)
}

#[tokio::test]
async fn an_agent_with_a_trusted_certificate_is_called_by_address_or_by_name() {
    let ca = authority();
    for server_name in [None, Some("agent.example".to_owned())] {
        let tls = Tls { ca: Some(pem(ca.pem())), server_name, ..Tls::default() };
        assert_eq!(info(agent(&ca, None).await, tls).await.unwrap(), "fake");
    }
}

#[tokio::test]
async fn a_certificate_from_elsewhere_or_for_another_name_is_not_trusted() {
    let (ca, stranger) = (authority(), authority());
    for (trusted, server_name) in [(&stranger, None), (&ca, Some("other.example".to_owned()))] {
        let tls = Tls { ca: Some(pem(trusted.pem())), server_name, ..Tls::default() };
        let error = info(agent(&ca, None).await, tls).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Unauthenticated, "{error}");
        assert!(error.to_string().contains("--tls-ca"), "{error}");
    }
}

#[tokio::test]
async fn an_agent_that_wants_a_certificate_gets_one_or_says_so() {
    let (ca, guests, strangers) = (authority(), authority(), authority());
    let tls = |identity| Tls { ca: Some(pem(ca.pem())), identity, ..Tls::default() };
    assert_eq!(info(agent(&ca, Some(&guests)).await, tls(Some(identity(&guests)))).await.unwrap(), "fake");

    for (identity, alert) in [(None, "CertificateRequired"), (Some(identity(&strangers)), "")] {
        // The refusal races with the client's first writes; each time it must win.
        for _ in 0..20 {
            let error = info(agent(&ca, Some(&guests)).await, tls(identity.clone())).await.unwrap_err();
            assert_eq!(error.reason(), Reason::Unauthenticated, "{error}");
            assert!(error.to_string().contains("alert") && error.to_string().contains(alert), "{error}");
        }
    }
}

#[tokio::test]
async fn a_port_without_tls_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint: Endpoint = format!("tls://{}", listener.local_addr().unwrap()).parse().unwrap();
    let fake = Fake::new();
    let tls = Tls { ca: Some(pem(authority().pem())), ..Tls::default() };
    let agent = async {
        let (stream, _) = listener.accept().await.unwrap();
        fake.serve(stream).await;
    };
    let (outcome, ()) = tokio::join!(info(endpoint, tls), agent);
    let error = outcome.unwrap_err();
    assert_eq!(error.reason(), Reason::Unreachable);
    assert!(error.to_string().contains("does the agent listen with tls://"), "{error}");
}

#[tokio::test]
async fn files_that_are_not_what_they_should_be_are_named() {
    let endpoint: Endpoint = "tls://127.0.0.1:1".parse().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.pem");
    for (tls, what) in [
        (Tls { ca: Some(absent.as_path().into()), ..Tls::default() }, "absent.pem"),
        (Tls { ca: Some(pem("nothing".into())), ..Tls::default() }, "no certificate"),
        (
            Tls {
                ca: Some(pem(authority().pem())),
                identity: Some((pem(authority().pem()), pem("x".into()))),
                ..Tls::default()
            },
            "no private key",
        ),
        (
            Tls { ca: Some(pem(authority().pem())), server_name: Some("a b".into()), ..Tls::default() },
            "server name",
        ),
    ] {
        let error = info(endpoint.clone(), tls).await.unwrap_err();
        assert_eq!(error.reason(), Reason::BadArgument);
        assert!(error.to_string().contains(what), "{error}");
    }
}
