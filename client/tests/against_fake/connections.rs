//! Connections beside the first one: when there are some, and what their loss means.

use std::sync::atomic::Ordering::SeqCst;

use tokio::task::JoinSet;
use vaccel_client::{
    Awake, CallOptions, ClassifyOptions, Client, DEADLINE_DEFAULT, Reason, Session, SessionOptions,
};

use crate::fake::{Fake, Step};

/// Calls after which there must be what only takes a moment.
const PATIENCE: usize = 100_000;

async fn session(fake: &Fake, connections: usize) -> Session {
    let client = Client::builder(fake.endpoint()).connections(connections).connect().await.unwrap();
    client.open_session(SessionOptions::default()).await.unwrap()
}

/// A session with a second connection, over which its runs go.
async fn with_another(fake: &Fake) -> Session {
    let session = session(fake, 2).await;
    let before = fake.state.beside.load(SeqCst);
    for _ in 0..PATIENCE {
        session.noop().await.unwrap();
        if fake.state.beside.load(SeqCst) > before {
            return session;
        }
    }
    panic!("no second connection");
}

#[tokio::test]
async fn long_requests_at_the_same_time_get_connections_up_to_the_limit() {
    let fake = Fake::listening();
    let session = session(&fake, 4).await;
    let mut calls = JoinSet::new();
    for number in 0..PATIENCE {
        let session = session.clone();
        calls.spawn(async move {
            let images = [vec![0; 100_000 + number % 2].into()];
            let labels = session.classify(images, ClassifyOptions::default()).await.unwrap();
            assert_eq!(labels[0][0].index as usize, 100_000 + number % 2);
        });
        if calls.len() == 16 {
            calls.join_next().await.unwrap().unwrap();
        }
        if fake.state.connections.load(SeqCst) == 4 {
            break;
        }
    }
    while let Some(done) = calls.join_next().await {
        done.unwrap();
    }
    assert_eq!(fake.state.connections.load(SeqCst), 4);
}

#[tokio::test]
async fn one_connection_is_enough_for_everything() {
    let fake = Fake::listening();
    let session = session(&fake, 1).await;
    for _ in 0..10 {
        session.noop().await.unwrap();
    }
    assert_eq!(fake.state.connections.load(SeqCst), 1);
}

#[tokio::test]
async fn a_run_whose_connection_broke_is_run_again_if_it_may_be() {
    let fake = Fake::listening();
    let session = with_another(&fake).await;
    fake.state.then(Step::Cut);
    session.noop().await.unwrap();

    let session = with_another(&fake).await;
    fake.state.then(Step::Cut);
    let once = CallOptions { repeatable: false, ..CallOptions::default() };
    let error = session.with(once).noop().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Unreachable);
    assert!(error.to_string().contains("may have run"), "{error}");
    session.with(once).noop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stays_awake_hears_replies_and_the_end() {
    let fake = Fake::listening();
    let options =
        CallOptions { awake: Awake::For(DEADLINE_DEFAULT), repeatable: false, ..CallOptions::default() };
    let session = with_another(&fake).await.with(options);
    for length in [1, 100_000, 2, 1_000_000] {
        let labels = session.classify([vec![0; length].into()], ClassifyOptions::default()).await.unwrap();
        assert_eq!(labels[0][0].index as usize, length);
    }
    fake.state.then(Step::Cut);
    let error = session.noop().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Unreachable);
    assert!(error.to_string().contains("may have run"), "{error}");
    session.noop().await.unwrap();
}

#[tokio::test]
async fn an_agent_that_was_restarted_is_found_again() {
    let mut fake = Fake::listening();
    let session = with_another(&fake).await;
    std::fs::remove_file(fake.path()).unwrap();
    fake.state.forget();
    fake.listen();
    fake.state.cut_all();
    session.noop().await.unwrap();
    assert_eq!(fake.state.opened(), 2);
}
