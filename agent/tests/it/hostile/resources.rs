//! Resources whose description or content is not what it should be.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tonic::codegen::tokio_stream;
use vaccel_client::proto::error::Detail;
use vaccel_client::proto::v1::resources_client::ResourcesClient;
use vaccel_client::proto::v1::{File, RegisterResourceReply, RegisterResourceRequest, UploadRequest};
use vaccel_client::{Error, Reason, ResourceKind};

use super::{ATTACK_BYTES_MAX, Attacker, Site, answer, refused};
use crate::support::onnx;

fn sha256(content: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&Sha256::digest(content))
}

fn file(name: &str, content: &[u8]) -> File {
    File { name: name.into(), size: content.len() as u64, sha256: sha256(content) }
}

impl Attacker {
    async fn describe(&self, kind: i32, files: Vec<File>) -> Result<RegisterResourceReply, Error> {
        let request = RegisterResourceRequest { session: self.session.id(), kind, files };
        answer(ResourcesClient::new(self.link()).register(request).await)
    }

    /// Sends the messages of an upload as they are; returns where the agent says it is.
    async fn upload(&self, messages: Vec<UploadRequest>) -> Result<u64, Error> {
        let mut client = ResourcesClient::new(self.link()).max_encoding_message_size(usize::MAX);
        let reply = client.upload(tokio_stream::iter(messages)).await;
        answer(reply).map(|reply| reply.offset)
    }

    /// The first message for a content, all of it.
    fn first(&self, content: &[u8]) -> UploadRequest {
        let (sha256, data) = (sha256(content), Bytes::copy_from_slice(content));
        UploadRequest { session: self.session.id(), sha256, size: content.len() as u64, offset: 0, data }
    }
}

#[tokio::test]
async fn descriptions_that_cannot_be_are_refused_by_their_field() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let model = ResourceKind::Model.into();
    let one = |name: &str| vec![file(name, b"x")];
    let endless = "x".repeat(257);
    for name in [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "./a",
        "a/.",
        "a//b",
        "a/",
        "C:\\x",
        "..\\x",
        "a\0b",
        "a\nb",
        "\u{1b}[2J",
        &endless,
    ] {
        let outcome = attacker.describe(model, one(name)).await;
        let refusal = refused(&format!("{name:?}"), outcome, Reason::BadArgument, "files[0].name");
        assert!(!refusal.message().contains(char::is_control), "{refusal}");
    }
    let short = File { sha256: vec![0; 31].into(), ..file("m", b"x") };
    let long = File { sha256: vec![0; 1 << 20].into(), ..file("m", b"x") };
    for (attack, kind, files, field) in [
        ("no kind", 0, one("m"), "kind"),
        ("an unknown kind", 99, one("m"), "kind"),
        ("a negative kind", -1, one("m"), "kind"),
        ("no files", model, vec![], "files"),
        ("65 files", model, vec![file("m", b"x"); 65], "files"),
        ("the same name twice", model, vec![file("m", b"x"), file("m", b"y")], "files[1].name"),
        ("half a hash", model, vec![file("n", b"x"), short], "files[1].sha256"),
        ("an endless hash", model, vec![long], "files[0].sha256"),
    ] {
        refused(attack, attacker.describe(kind, files).await, Reason::BadArgument, field);
    }
    // Content the agent has, with another size.
    attacker.model(onnx::add()).await;
    let larger = File { size: 1 << 40, ..file("m", &onnx::add()) };
    refused("a size", attacker.describe(model, vec![larger]).await, Reason::BadArgument, "files[0].size");
    site.serves_others().await;
}

#[tokio::test]
async fn uploads_that_lie_are_refused_and_leave_nothing() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let content = vec![7; 1000];
    let first = || attacker.first(&content);
    let more = |bytes: usize| UploadRequest { data: vec![7; bytes].into(), ..UploadRequest::default() };
    let unnamed = UploadRequest { sha256: Bytes::new(), ..first() };
    let part = UploadRequest { data: vec![6; 10].into(), ..attacker.first(&[6; 1000]) };
    let after = |offset| UploadRequest { offset, data: vec![7; 10].into(), ..first() };
    let large = UploadRequest { size: 3 << 20, ..attacker.first(&vec![7; (1 << 20) + 1]) };
    for (attack, messages, reason, field) in [
        ("no message", vec![], Reason::BadArgument, "upload"),
        ("no file", vec![unnamed], Reason::BadArgument, "sha256"),
        ("another offset", vec![after(5)], Reason::BadArgument, "offset"),
        ("the largest offset", vec![after(u64::MAX)], Reason::BadArgument, "offset"),
        (
            "another content",
            vec![UploadRequest { data: vec![8; 1000].into(), ..first() }],
            Reason::BadArgument,
            "sha256",
        ),
        ("too much at once", vec![UploadRequest { size: 999, ..first() }], Reason::BadArgument, "data"),
        ("too much in the end", vec![part, more(500), more(500)], Reason::BadArgument, "data"),
        ("a chunk of more than 1 MiB", vec![large], Reason::MessageTooLarge, ""),
    ] {
        refused(attack, attacker.upload(messages).await, reason, field);
        site.serves_others().await;
    }
    let whole = b"another content".to_vec();
    assert_eq!(attacker.upload(vec![attacker.first(&whole)]).await.unwrap(), 15);
    let registered = attacker.describe(2, vec![file("d", &whole)]).await.unwrap();
    assert!(registered.missing.is_empty());
}

#[tokio::test]
async fn sizes_are_counted_before_they_come() {
    let site = Site::start(&["--tenant-resource-mib", "4"]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    for size in [(4 << 20) + 1, 1 << 40, u64::MAX] {
        let claim = UploadRequest { size, ..attacker.first(b"x") };
        let refusal = refused("a claim", attacker.upload(vec![claim]).await, Reason::QuotaExceeded, "");
        assert!(matches!(refusal.detail(), Detail::Limit { unit, .. } if unit == "bytes"), "{refusal:?}");
    }
    let usage = attacker.client.info().await.unwrap().usage.unwrap();
    assert_eq!(usage.resource_bytes, 0);
    assert!(site.agent.peak() - before <= ATTACK_BYTES_MAX);
    site.serves_others().await;
}

/// One small file under ever new names, and ever new uploads that do not begin: each costs the agent some memory that
/// no count of bytes sees.
#[tokio::test]
async fn what_a_session_names_is_bounded_too() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    attacker.upload(vec![attacker.first(b"x")]).await.unwrap();
    let mut refusal = None;
    for resource in 0..2000 {
        let named = |index| file(&format!("{resource}-{index}"), b"x");
        match attacker.describe(2, (0..64).map(named).collect()).await {
            Ok(reply) => assert!(reply.missing.is_empty()),
            Err(error) => {
                refusal = Some(error);
                break;
            }
        }
    }
    refused("one more name", Err::<(), _>(refusal.expect("names without end")), Reason::QuotaExceeded, "");
    let mut refusal = None;
    for upload in 0_u64..2000 {
        let hash = [&upload.to_le_bytes()[..], &[0; 24]].concat();
        let begin = UploadRequest { sha256: hash.into(), size: 8, ..attacker.first(b"") };
        if let Err(error) = attacker.upload(vec![begin]).await {
            refusal = Some(error);
            break;
        }
    }
    refused(
        "one more upload",
        Err::<(), _>(refusal.expect("uploads without end")),
        Reason::QuotaExceeded,
        "",
    );
    site.serves_others().await;
}
