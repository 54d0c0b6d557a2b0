//! Resources on their way to the agent.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use vaccel_client::proto::limits::CHUNK_BYTES_MAX;
use vaccel_client::{Reason, ResourceFiles, ResourceKind, SessionOptions};

use crate::fake::Fake;

const SIZE: usize = 5 * CHUNK_BYTES_MAX + 123;

fn content() -> Bytes {
    (0..u32::try_from(SIZE).unwrap()).map(|i| i.to_le_bytes()[1]).collect::<Vec<_>>().into()
}

#[tokio::test]
async fn only_what_the_agent_lacks_goes_up() {
    let fake = Fake::listening();
    let client = fake.client().await;
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let files = vec![("a".to_owned(), content()), ("empty".to_owned(), Bytes::new())];
    session.register(ResourceFiles::new(ResourceKind::Model, files.clone())).await.unwrap();
    assert_eq!(*fake.state.uploads.lock().unwrap(), [(0, SIZE), (0, 0)]);
    assert!(fake.state.blobs.lock().unwrap().values().any(|blob| *blob == content()));

    let other = client.open_session(SessionOptions::default()).await.unwrap();
    other.register(ResourceFiles::new(ResourceKind::Model, files)).await.unwrap();
    assert_eq!(fake.state.uploads.lock().unwrap().len(), 2, "the second session brings nothing");
}

#[tokio::test]
async fn a_broken_upload_goes_on_where_it_stopped() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    *fake.state.cut_upload_after.lock().unwrap() = Some(2 * CHUNK_BYTES_MAX);
    let seen: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let report = Arc::clone(&seen);
    let files = ResourceFiles::model("m", content())
        .on_progress(move |done, total| report.lock().unwrap().push((done, total)));
    session.register(files).await.unwrap();

    let stopped = 2 * CHUNK_BYTES_MAX;
    assert_eq!(*fake.state.uploads.lock().unwrap(), [(0, stopped), (stopped as u64, SIZE - stopped)]);
    assert!(fake.state.blobs.lock().unwrap().values().any(|blob| *blob == content()));
    let seen = seen.lock().unwrap();
    assert_eq!(seen.first(), Some(&(0, SIZE as u64)));
    assert_eq!(seen.last(), Some(&(SIZE as u64, SIZE as u64)));
    assert!(seen.iter().all(|&(done, total)| done <= total && total == SIZE as u64), "{seen:?}");
}

#[tokio::test]
async fn an_agent_that_restarts_under_an_upload_gets_all_of_it() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    *fake.state.cut_upload_after.lock().unwrap() = Some(CHUNK_BYTES_MAX);
    fake.state.cut_forgets.store(true, SeqCst);
    session.register(ResourceFiles::model("m", content())).await.unwrap();
    assert_eq!(fake.state.opened(), 2);
    assert_eq!(*fake.state.uploads.lock().unwrap(), [(0, CHUNK_BYTES_MAX), (0, SIZE)]);
}

#[tokio::test]
async fn an_upload_that_is_refused_in_its_middle_ends_with_the_reason() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    fake.state.refuse_upload.store(true, SeqCst);
    for _ in 0..20 {
        let error = session.register(ResourceFiles::model("m", content())).await.unwrap_err();
        assert_eq!(error.reason(), Reason::QuotaExceeded, "{error}");
    }
    assert_eq!(fake.state.uploads.lock().unwrap().len(), 20);
    assert_eq!(fake.state.connections.load(SeqCst), 1);
}
