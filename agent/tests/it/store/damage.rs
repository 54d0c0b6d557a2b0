//! Disks that fail: damaged files, and no room.

use std::os::unix::fs::PermissionsExt;

use vaccel_client::proto::error::Detail;
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::{ModelRunRequest, RunRequest};
use vaccel_client::{
    Error, NamedTensor, Reason, Resource, ResourceFiles, ResourceKind, Session, Tensor, named,
};

use super::{Numbers, missing, stored, upload};
use crate::support::{Agent, onnx};

fn one() -> NamedTensor {
    named("x", Tensor::new(&[1, 2], &[1.0_f32, 1.0]).unwrap())
}

async fn answer(session: &Session, model: &Resource) -> Result<Vec<f32>, Error> {
    let run = session.run(model, vec![one()], &[]).await?;
    Ok(run.outputs[0].tensor.as_ref().unwrap().elements::<f32>().unwrap().to_vec())
}

#[tokio::test]
async fn a_damaged_model_is_refused_and_comes_again() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let (client, session) = agent.session().await;
    let content = onnx::add();
    let model = session.register(ResourceFiles::model("m.onnx", content.clone())).await.unwrap();
    let path = stored(agent.folder(), "complete").remove(0);
    let mut damaged = content.to_vec();
    damaged[content.len() / 2] ^= 1;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&path, damaged).unwrap();
    let op = Op::ModelRun(ModelRunRequest { model: model.id().into(), outputs: vec![], inputs: vec![one()] });
    let request = RunRequest { session: session.id(), op: Some(op), ..RunRequest::default() };
    let refusal = OperationsClient::new(client.link().clone()).run(request).await.unwrap_err();
    let refusal = Error::from_status(&refusal);
    assert_eq!(refusal.reason(), Reason::NotFound, "{refusal:?}");
    assert!(matches!(refusal.detail(), Detail::Resource { kind, .. } if kind == "file"), "{refusal:?}");
    assert!(refusal.message().contains("register"), "{refusal}");
    assert!(!refusal.message().contains(agent.folder().to_str().unwrap()), "{refusal}");
    assert!(!path.exists(), "it is removed");
    assert_eq!(missing(client.link(), &session.id(), &content).await.unwrap()[0].offset, 0);
    // The client has the content and brings it again.
    assert_eq!(answer(&session, &model).await.unwrap(), [2.0, 3.0]);
    assert!(missing(client.link(), &session.id(), &content).await.unwrap().is_empty());
    // The engine has made its own of it: what the disk does now is of no matter until it is loaded again.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(answer(&session, &model).await.unwrap(), [2.0, 3.0]);
}

/// A limit on the size of files stands for a disk without room: writing fails in the middle of a piece.
#[tokio::test]
async fn a_full_disk_refuses_clearly_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("agent");
    let text = format!(
        "#!/bin/sh\ntrap '' XFSZ\nulimit -f 3072\nexec {} \"$@\"\n",
        env!("CARGO_BIN_EXE_vaccel-agent")
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    let agent = Agent::start_program(&program, folder, &["unix://{}/s"], &["--engine", "tract"]);
    let (client, session) = agent.session().await;
    let (link, session_id) = (client.link(), session.id());
    let small = Numbers(10).bytes(1 << 20);
    upload(link, &session_id, &small, 0..small.len()).await.unwrap();
    assert!(missing(link, &session_id, &small).await.unwrap().is_empty());

    // In kibibytes or in blocks of 512 bytes, as the shell likes.
    let large = Numbers(11).bytes(5 << 20);
    let refusal = upload(link, &session_id, &large, 0..large.len()).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal:?}");
    assert!(refusal.message().contains("full"), "{refusal}");
    assert!(!refusal.message().contains('/'), "{refusal}");
    // What came is there, the agent serves, and nothing half is complete.
    let kept = missing(link, &session_id, &large).await.unwrap()[0].offset;
    assert!(kept > 1 << 20 && kept < 5 << 20, "{kept}");
    assert_eq!(stored(agent.folder(), "complete").len(), 1);
    let resource = ResourceFiles::new(ResourceKind::Data, vec![("f".into(), small.clone())]);
    let resource = session.register(resource).await.unwrap();
    let mut reader = session.read_resource(&resource, "", 0, 0).await.unwrap();
    assert!(reader.rest().await.unwrap() == small);

    // With room again the upload goes on.
    let agent = Agent::start_in(agent.kill(), &["unix://{}/s"], &["--engine", "tract"]);
    let (client, session) = agent.session().await;
    let at = usize::try_from(missing(client.link(), &session.id(), &large).await.unwrap()[0].offset).unwrap();
    assert_eq!(at as u64, kept);
    upload(client.link(), &session.id(), &large, at..large.len()).await.unwrap();
    assert!(missing(client.link(), &session.id(), &large).await.unwrap().is_empty());
}

/// Another tenant's content, whole or in part, is as absent, whatever its own tenant does with it.
#[tokio::test]
async fn what_another_tenant_stores_tells_nothing() {
    let agent = Agent::start(&["unix://{}/a", "unix://{}/b"], &["--tenant-resource-mib", "4"]);
    let (a, b) = (agent.guest(0).await, agent.guest(1).await);
    let (first, second) = (
        a.open_session(Default::default()).await.unwrap(),
        b.open_session(Default::default()).await.unwrap(),
    );
    let content = Numbers(12).bytes(3 << 20);
    let never = Numbers(13).bytes(3 << 20);
    upload(a.link(), &first.id(), &content, 0..content.len()).await.unwrap();
    for known in [&content, &never] {
        let lacking = missing(b.link(), &second.id(), known).await.unwrap();
        assert_eq!((lacking.len(), lacking[0].offset), (1, 0));
    }
    // Its quota is its own too.
    upload(b.link(), &second.id(), &content, 0..content.len()).await.unwrap();
    assert_eq!(stored(agent.folder(), "complete").len(), 2);
    let texts = [a.link(), b.link()].map(async |link| {
        let session = if std::ptr::eq(link, a.link()) { first.id() } else { second.id() };
        upload(link, &session, &never, 0..1).await.unwrap_err().message().to_owned()
    });
    let [of_a, of_b] = texts;
    assert_eq!(of_a.await, of_b.await);
}
