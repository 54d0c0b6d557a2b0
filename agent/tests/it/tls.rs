//! Who may call: certificates of both sides and bearer tokens, and what each refusal says.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use http::header::CONTENT_TYPE;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Code, Status};
use tower_service::Service;
use vaccel_client::proto::v1::agent_client::AgentClient;
use vaccel_client::proto::v1::{InfoReply, InfoRequest, Usage};
use vaccel_client::{Builder, ClassifyOptions, Client, Error, Pem, Reason, SessionOptions, Tls};

use crate::support::{Agent, connect, digits, endpoint, output_text, read, vaccel};
use crate::tenants::contract;

type Authority = CertifiedIssuer<'static, KeyPair>;

const TOKEN: &str = "0123456789abcdef";

/// Flags of a TLS listener, of client certificates, and of tokens; the files are those of [`papers`].
const SERVER: &[&str] = &["--tls-cert", "{}/agent.pem", "--tls-key", "{}/agent.key"];
const CLIENTS: &[&str] = &["--tls-client-ca", "{}/guests.pem"];
const TOKENS: &[&str] = &["--token-file", "{}/tokens"];

fn authority(folder: &Path, name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(folder.join(format!("{name}.pem")), authority.pem()).unwrap();
    authority
}

fn issue(folder: &Path, file: &str, authority: &Authority, names: &[&str]) {
    let (uris, names): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.contains("://"));
    let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.subject_alt_names.extend(uris.into_iter().map(|uri| SanType::URI(uri.try_into().unwrap())));
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    std::fs::write(folder.join(format!("{file}.pem")), certificate.pem()).unwrap();
    std::fs::write(folder.join(format!("{file}.key")), key.serialize_pem()).unwrap();
}

/// Certificates, keys and tokens of an agent and its guests.
fn papers() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let (agents, guests) = (authority(path, "agents"), authority(path, "guests"));
    issue(path, "agent", &agents, &["localhost", "127.0.0.1"]);
    issue(path, "uri", &guests, &["edge-1.example", "spiffe://example/edge/1"]);
    issue(path, "dns", &guests, &["edge-2.example"]);
    issue(path, "nameless", &guests, &[]);
    issue(path, "stranger", &authority(path, "strangers"), &["edge-2.example"]);
    std::fs::write(path.join("tokens"), format!("# the edge\nedge {TOKEN}\n")).unwrap();
    std::fs::write(path.join("token"), format!("{TOKEN}\n")).unwrap();
    std::fs::write(path.join("wrong-token"), "fedcba9876543210\n").unwrap();
    folder
}

fn start(addresses: &[&str], flags: &[&[&str]]) -> Agent {
    Agent::start_in(papers(), addresses, &flags.concat())
}

/// A guest of a TLS listener that trusts `ca` and shows the certificate `shown`.
fn guest(agent: &Agent, ca: &str, shown: Option<&str>) -> Builder {
    let file = |name: &str, ending: &str| Pem::File(agent.folder().join(format!("{name}.{ending}")));
    let identity = shown.map(|name| (file(name, "pem"), file(name, "key")));
    let tls = Tls { ca: Some(file(ca, "pem")), identity, server_name: None };
    Client::builder(endpoint(agent.address())).tls(tls)
}

/// The guest that a TLS listener with client certificates and tokens takes.
async fn trusted(agent: &Agent) -> Client {
    guest(agent, "agents", Some("uri")).token(TOKEN).connect().await.unwrap()
}

async fn info(builder: Builder) -> Result<InfoReply, Error> {
    builder.connect().await?.info().await
}

async fn assert_classifies(client: &Client) {
    let (image, label) = &digits("png")[0];
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let labels = session.classify([read(image)], ClassifyOptions::default()).await.unwrap();
    assert_eq!(labels[0][0].index as usize, *label);
    session.close().await.unwrap();
}

/// What stands for a certificate without names.
fn fingerprint(folder: &Path) -> String {
    let der = CertificateDer::from_pem_file(folder.join("nameless.pem")).unwrap();
    Sha256::digest(&der).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn the_right_papers_are_the_tenant() {
    for (flags, shown, token, tenant) in [
        (vec![SERVER], None, None, "tcp:LISTENER:127.0.0.1"),
        (vec![SERVER, TOKENS], None, Some(TOKEN), "token:edge"),
        (vec![SERVER, CLIENTS], Some("uri"), None, "cert:spiffe://example/edge/1"),
        (vec![SERVER, CLIENTS], Some("dns"), None, "cert:edge-2.example"),
        (vec![SERVER, CLIENTS], Some("nameless"), None, "cert:sha256:FINGERPRINT"),
        (vec![SERVER, CLIENTS, TOKENS], Some("dns"), Some(TOKEN), "cert:edge-2.example+token:edge"),
    ] {
        let agent = start(&["tls://127.0.0.1:0"], &flags);
        let builder = guest(&agent, "agents", shown);
        let builder = token.into_iter().fold(builder, |builder, token| builder.token(token));
        let client = builder.connect().await.unwrap();
        let listener = agent.address().strip_prefix("tls://").unwrap();
        let tenant = tenant.replace("LISTENER", listener);
        let tenant = tenant.replace("FINGERPRINT", &fingerprint(agent.folder()));
        assert_eq!(client.info().await.unwrap().tenant, tenant);
        assert_classifies(&client).await;
    }
}

#[tokio::test]
async fn a_certificate_is_good_for_each_of_its_names() {
    let agent = start(&["tls://localhost:0"], &[SERVER]);
    assert!(agent.address().starts_with("tls://localhost:"));
    assert_classifies(&guest(&agent, "agents", None).connect().await.unwrap()).await;
}

#[tokio::test]
async fn wrong_certificates_are_refused_and_the_refusal_arrives() {
    let agent = start(&["tls://127.0.0.1:0"], &[SERVER, CLIENTS]);
    for (ca, shown, why) in [
        ("strangers", Some("uri"), "is not trusted"),
        ("agents", None, "CertificateRequired"),
        ("agents", Some("stranger"), "UnknownCA"),
    ] {
        // The refusal races with the client's first writes; each time it must win.
        for _ in 0..10 {
            let refusal = info(guest(&agent, ca, shown)).await.unwrap_err();
            assert_eq!(refusal.reason(), Reason::Unauthenticated, "{why}: {refusal:?}");
            assert!(refusal.message().contains(why), "{why}: {refusal:?}");
        }
    }
    assert_classifies(&guest(&agent, "agents", Some("uri")).connect().await.unwrap()).await;
}

#[tokio::test]
async fn wrong_tokens_are_refused_with_what_is_wrong() {
    let agent = start(&["tls://127.0.0.1:0", "tcp://127.0.0.1:0"], &[SERVER, CLIENTS, TOKENS]);
    let not_only_a_token = format!("{TOKEN}, please");
    for client in tokenless(&agent) {
        for (authorization, why) in [
            (None, "a token is needed here"),
            (Some("Bearer fedcba9876543210"), "this token is not known here"),
            (Some("Bearer "), "this token is not known here"),
            (Some("Bearer"), "expected `Bearer TOKEN`"),
            (Some("Basic 0123456789abcdef"), "expected `Bearer TOKEN`"),
            (Some(TOKEN), "expected `Bearer TOKEN`"),
            (Some(not_only_a_token.as_str()), "expected `Bearer TOKEN`"),
            (Some("\u{e9}"), "expected `Bearer TOKEN`"),
            (Some(""), "expected `Bearer TOKEN`"),
        ] {
            let mut request = tonic::Request::new(InfoRequest {});
            if let Some(value) = authorization {
                let value = AsciiMetadataValue::try_from(value.as_bytes()).unwrap();
                request.metadata_mut().insert("authorization", value);
            }
            let refusal = AgentClient::new(client.link().clone()).info(request).await.unwrap_err();
            assert_unauthenticated(&refusal, why);
        }
        // The client's own methods tell the same.
        let refusal = client.info().await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Unauthenticated);
        assert!(refusal.message().contains("a token is needed here"), "{refusal:?}");
    }
    assert_eq!(usage(&trusted(&agent).await).await, IDLE);
}

/// Guests without a token, of a TLS listener with client certificates and of a plain one.
fn tokenless(agent: &Agent) -> [Client; 2] {
    let plain = Client::builder(endpoint(&agent.addresses[1]));
    [guest(agent, "agents", Some("uri")), plain].map(|builder| builder.build().unwrap())
}

/// What a tenant uses that only asks.
const IDLE: Usage = Usage { sessions: 0, calls_in_flight: 1, resource_bytes: 0, cached_bytes: 0 };

async fn usage(client: &Client) -> Usage {
    client.info().await.unwrap().usage.unwrap()
}

fn assert_unauthenticated(status: &Status, why: &str) {
    let refusal = Error::from_status(status);
    assert_eq!((status.code(), refusal.reason()), (Code::Unauthenticated, Reason::Unauthenticated));
    assert!(refusal.message().contains(why), "{why}: {refusal:?}");
    assert!(!refusal.message().contains("0123"), "a refusal never repeats a secret: {refusal:?}");
}

/// Calls a method with a message whose every field has its default; the error, if it is one.
async fn call(client: &Client, path: &str) -> Option<Status> {
    let request = http::Request::post(path).header(CONTENT_TYPE, "application/grpc");
    let message = String::from("\0\0\0\0\0");
    let request = request.body(tonic::body::Body::new(message)).unwrap();
    let response = client.link().clone().call(request).await.unwrap();
    Status::from_header_map(response.headers())
}

#[tokio::test]
async fn no_method_of_any_service_runs_without_a_token() {
    let agent = start(&["tls://127.0.0.1:0", "tcp://127.0.0.1:0"], &[SERVER, CLIENTS, TOKENS]);
    let mut paths: Vec<String> = contract().methods.into_iter().map(|(path, _)| path).collect();
    assert!(paths.contains(&"/vaccel.v1.Operations/Run".to_owned()), "{paths:?}");
    paths.extend(["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"].map(String::from));
    let trusted = trusted(&agent).await;
    for client in tokenless(&agent) {
        // Not even whether there is such a method is told.
        for path in paths.iter().map(String::as_str).chain(["/no.such.Service/Method"]) {
            let refusal = call(&client, path).await.expect(path);
            assert_unauthenticated(&refusal, "a token is needed here");
        }
    }
    assert_eq!(usage(&trusted).await, IDLE);
    // With one, the same calls run: it is the token that was missing.
    for path in &paths {
        let code = call(&trusted, path).await.map(|status| status.code());
        assert!(!matches!(code, Some(Code::Unauthenticated | Code::Unimplemented)), "{path}: {code:?}");
    }
    assert_eq!(trusted.list_sessions().await.unwrap().len(), 1, "the one that Sessions.Open opened");
}

#[tokio::test]
async fn a_token_is_needed_on_tcp_and_not_where_the_kernel_vouches() {
    let agent = start(&["tcp://127.0.0.1:0", "unix://{}/s", "hvsock://{}/vm:2048"], &[TOKENS]);
    let plain = || Client::builder(endpoint(agent.address()));
    assert_eq!(info(plain()).await.unwrap_err().reason(), Reason::Unauthenticated);
    assert_eq!(info(plain().token(TOKEN)).await.unwrap().tenant, "token:edge");
    for (address, tenant) in [(&agent.addresses[1], "unix:"), (&agent.addresses[2], "hvsock:")] {
        let client = connect(address).await;
        assert!(client.info().await.unwrap().tenant.starts_with(tenant), "{address}");
        assert_classifies(&client).await;
    }
}

#[tokio::test]
async fn tls_and_plain_do_not_mix_and_the_agent_goes_on() {
    let agent = start(&["tls://127.0.0.1:0", "tcp://127.0.0.1:0"], &[SERVER]);
    let tls = Tls { ca: Some(Pem::File(agent.folder().join("agents.pem"))), ..Tls::default() };
    for (index, from, to) in [(0, "tls://", "tcp://"), (1, "tcp://", "tls://")] {
        let wrong = agent.addresses[index].replace(from, to);
        let client = Client::builder(endpoint(&wrong)).tls(tls.clone()).build().unwrap();
        let refusal = AgentClient::new(client.link().clone()).info(InfoRequest {}).await.unwrap_err();
        let refusal = Error::from_status(&refusal);
        assert_eq!(refusal.reason(), Reason::Unreachable, "{refusal:?}");
        assert!(refusal.message().contains(&wrong), "{refusal:?}");
        let right = Client::builder(endpoint(&agent.addresses[index])).tls(tls.clone());
        assert_classifies(&right.connect().await.unwrap()).await;
    }
}

/// The output of an agent that is not expected to serve; one that does is killed, and has no exit code then.
fn agent(folder: &Path, arguments: &[&str]) -> Output {
    let fill = |text: &&str| text.replace("{}", folder.to_str().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    command.env("VACCEL_AGENT_STORE", folder.join("store"));
    command.args(arguments.iter().map(fill)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    if line.starts_with("listening on ") {
        process.kill().unwrap();
    }
    process.wait_with_output().unwrap()
}

#[test]
fn an_agent_that_would_be_open_to_anybody_does_not_start() {
    let folder = papers();
    for (arguments, named) in [
        (vec!["--address", "tcp://0.0.0.0:0"], vec!["tcp://0.0.0.0:0", "--insecure", "tls://"]),
        (vec!["--address", "tcp://[::]:0"], vec!["tcp://[::]:0", "--insecure", "tls://"]),
        (vec!["--address", "tls://127.0.0.1:0"], vec!["--tls-cert", "--tls-key"]),
        (vec!["--address", "tls://127.0.0.1:0", "--tls-cert", "{}/agent.pem"], vec!["--tls-key"]),
        (vec!["--address", "tls://127.0.0.1:0", "--tls-client-ca", "{}/guests.pem"], vec!["--tls-cert"]),
    ] {
        let output = agent(folder.path(), &arguments);
        assert_eq!(output.status.code(), Some(78), "{arguments:?}: {}", output_text(&output));
        for name in named {
            assert!(output_text(&output).contains(name), "{arguments:?}: {}", output_text(&output));
        }
    }
    let output = agent(folder.path(), &["--address", "tcp://0.0.0.0:0", "--insecure=true", "check-config"]);
    assert!(output.status.success(), "{}", output_text(&output));
}

#[test]
fn an_agent_with_broken_papers_names_the_file_and_does_not_start() {
    let folder = papers();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let pem =
        |label: &str, base64: &str| format!("-----BEGIN {label}-----\n{base64}\n-----END {label}-----\n");
    write("empty", "");
    write("not-base64", &pem("CERTIFICATE", "???"));
    write("not-a-certificate", &pem("CERTIFICATE", "AAAA"));
    write("not-a-key", &pem("PRIVATE KEY", "AAAA"));
    write("one-word", &format!("{TOKEN}\n"));
    write("short", "edge 0123\n");
    for (flag, file) in [
        ("--tls-cert", "absent"),
        ("--tls-cert", "empty"),
        ("--tls-cert", "not-base64"),
        ("--tls-cert", "not-a-certificate"),
        ("--tls-cert", "agent.key"),
        ("--tls-key", "absent"),
        ("--tls-key", "empty"),
        ("--tls-key", "not-a-key"),
        ("--tls-key", "agent.pem"),
        ("--tls-key", "stranger.key"),
        ("--tls-client-ca", "absent"),
        ("--tls-client-ca", "empty"),
        ("--tls-client-ca", "not-base64"),
        ("--tls-client-ca", "not-a-certificate"),
        ("--token-file", "absent"),
        ("--token-file", "empty"),
        ("--token-file", "one-word"),
        ("--token-file", "short"),
    ] {
        let mut arguments = [&["--address", "tls://127.0.0.1:0"], SERVER].concat();
        let file = format!("{{}}/{file}");
        match arguments.iter().position(|given| *given == flag) {
            Some(at) => arguments[at + 1] = &file,
            None => arguments.extend([flag, &file]),
        }
        let output = agent(folder.path(), &arguments);
        let text = output_text(&output);
        assert_eq!(output.status.code(), Some(78), "{flag} {file}: {text}");
        let path = file.replace("{}", folder.path().to_str().unwrap());
        assert!(text.contains(flag) && text.contains(&path), "{flag} {file}: {text}");
        assert!(!text.contains("0123"), "a refusal never repeats a secret: {text}");
    }
}

#[test]
fn the_command_takes_the_same_papers_and_says_what_is_wrong() {
    let agent = start(&["tls://127.0.0.1:0"], &[SERVER, CLIENTS, TOKENS]);
    let (image, label) = &digits("png")[0];
    let classify = |ca: &str, shown: Option<&str>, token: &str| {
        let file = |name: &str, ending: &str| agent.folder().join(format!("{name}{ending}"));
        let mut command = vaccel();
        command.args(["--address", agent.address(), "--deadline", "30", "--json"]);
        command.arg("--tls-ca").arg(file(ca, ".pem")).arg("--token-file").arg(file(token, ""));
        if let Some(name) = shown {
            command.arg("--tls-cert").arg(file(name, ".pem")).arg("--tls-key").arg(file(name, ".key"));
        }
        command.arg("classify").arg(image).output().unwrap()
    };
    let output = classify("agents", Some("dns"), "token");
    assert!(output.status.success(), "{}", output_text(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json[0]["labels"][0]["index"], *label);
    for (ca, shown, token, why) in [
        ("strangers", Some("dns"), "token", "is not trusted"),
        ("agents", None, "token", "CertificateRequired"),
        ("agents", Some("stranger"), "token", "UnknownCA"),
        ("agents", Some("dns"), "wrong-token", "this token is not known here"),
    ] {
        let output = classify(ca, shown, token);
        assert_eq!(output.status.code(), Some(1), "{why}: {}", output_text(&output));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(why), "{why}: {text}");
    }
}
