//! Resources of many shapes, and their way back.

use vaccel_client::proto::limits::CHUNK_BYTES_MAX;
use vaccel_client::proto::v1::ReadResourceRequest;
use vaccel_client::proto::v1::resources_client::ResourcesClient;
use vaccel_client::{Error, Reason, ResourceFiles, ResourceKind, Session};

use super::Numbers;
use crate::support::Agent;

async fn read(session: &Session, resource: &vaccel_client::Resource, file: &str) -> Vec<u8> {
    session.read_resource(resource, file, 0, 0).await.unwrap().rest().await.unwrap()
}

#[tokio::test]
async fn every_kind_and_shape_comes_back_as_it_was() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let large = Numbers(8).bytes(2 * CHUNK_BYTES_MAX + 5);
    for kind in [ResourceKind::Model, ResourceKind::Data, ResourceKind::Library] {
        let one = ResourceFiles::new(kind, vec![("one".into(), large.clone())]);
        let one = session.register(one).await.unwrap();
        assert_eq!(one.kind(), kind);
        assert!(read(&session, &one, "").await == large);
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("variables/inner")).unwrap();
    for (name, content) in
        [("saved_model.pb", "graph"), ("variables/index", "i"), ("variables/inner/data", "")]
    {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let tree = ResourceFiles::path(ResourceKind::Model, folder.path());
    let tree = session.register(tree).await.unwrap();
    assert_eq!(read(&session, &tree, "variables/index").await, b"i");
    assert_eq!(read(&session, &tree, "variables/inner/data").await, b"");
    let listed = session.list_resources().await.unwrap();
    let listed = listed.iter().find(|listed| listed.resource == tree.id()).unwrap();
    let names: Vec<&str> = listed.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["saved_model.pb", "variables/index", "variables/inner/data"]);
}

#[tokio::test]
async fn a_part_is_read_in_bounded_pieces() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    let content = Numbers(9).bytes(3 * CHUNK_BYTES_MAX);
    let files = vec![("a".into(), content.clone()), ("b".into(), b"another".as_slice().into())];
    let resource = session.register(ResourceFiles::new(ResourceKind::Data, files)).await.unwrap();
    let size = content.len() as u64;
    for (offset, length) in
        [(0, 1), (5, 2 * CHUNK_BYTES_MAX as u64), (size - 3, 100), (size, 0), (7, u64::MAX)]
    {
        let mut reader = session.read_resource(&resource, "a", offset, length).await.unwrap();
        let mut found = Vec::new();
        while let Some(piece) = reader.next().await.unwrap() {
            assert!(!piece.is_empty() && piece.len() <= CHUNK_BYTES_MAX);
            found.extend_from_slice(&piece);
        }
        let end = if length == 0 { size } else { offset.saturating_add(length).min(size) };
        assert!(found == content[usize::try_from(offset).unwrap()..usize::try_from(end).unwrap()]);
    }
    let ask = async |resource: &str, file: &str, offset| {
        let (session, resource, file) = (session.id(), resource.into(), file.into());
        let request = ReadResourceRequest { session, resource, file, offset, length: 0 };
        let reply = ResourcesClient::new(client.link().clone()).read(request).await;
        Error::from_status(&reply.map(drop).unwrap_err())
    };
    for (file, offset, told) in
        [("", 0, "file: "), ("c", 0, "file: "), ("../a", 0, "file: "), ("a", size + 1, "offset: ")]
    {
        let refusal = ask(resource.id(), file, offset).await;
        assert_eq!(refusal.reason(), Reason::BadArgument);
        assert!(refusal.message().starts_with(told), "{refusal}");
    }
    assert_eq!(ask(&"0".repeat(64), "a", 0).await.reason(), Reason::NotFound);
}

#[tokio::test]
async fn what_is_registered_twice_is_held_until_it_was_let_go_twice() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    let files = || ResourceFiles::new(ResourceKind::Data, vec![("f".into(), b"content".as_slice().into())]);
    let resource = session.register(files()).await.unwrap();
    assert_eq!(session.register(files()).await.unwrap(), resource);
    assert_eq!(session.list_resources().await.unwrap().len(), 1);
    session.unregister(&resource).await.unwrap();
    assert_eq!(read(&session, &resource, "").await, b"content");
    session.unregister(&resource).await.unwrap();
    assert_eq!(session.unregister(&resource).await.unwrap_err().reason(), Reason::NotFound);
    assert!(session.list_resources().await.unwrap().is_empty());
    let usage = client.info().await.unwrap().usage.unwrap();
    assert_eq!((usage.resource_bytes, usage.cached_bytes), (0, 7));
}
