//! Connections that break, agents that come late, restart or have no room.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use vaccel_client::proto::error::Detail;
use vaccel_client::{
    Awake, CallOptions, Client, DType, Error, Reason, ResourceFiles, Session, SessionOptions, Tensor, named,
};

use crate::fake::{Fake, Step};

const ONCE: CallOptions =
    CallOptions { deadline: None, repeatable: false, reply_type: DType::Unspecified, awake: Awake::Foreseen };

async fn session(fake: &Fake) -> Session {
    fake.client().await.open_session(SessionOptions::default()).await.unwrap()
}

fn within(milliseconds: u64) -> CallOptions {
    CallOptions { deadline: Some(Duration::from_millis(milliseconds)), ..CallOptions::default() }
}

#[tokio::test]
async fn a_repeatable_call_survives_a_broken_connection() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    fake.state.then(Step::Cut);
    session.noop().await.unwrap();
    assert_eq!(fake.state.runs(), 2);
    assert_eq!(fake.state.connections.load(SeqCst), 2);
}

#[tokio::test]
async fn a_call_that_may_have_run_is_not_run_again_unasked() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    fake.state.then(Step::Cut);
    let error = session.with(ONCE).noop().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Unreachable);
    assert!(error.to_string().contains("may have run"), "{error}");
    assert_eq!(fake.state.runs(), 1);
    session.with(ONCE).noop().await.unwrap();
}

/// What becomes of a call that must not run twice, when the connection answers it with this frame and ends.
async fn answered(frame: &'static [u8]) -> Result<(), Error> {
    let fake = Fake::listening();
    let session = session(&fake).await;
    fake.state.then(Step::Cut);
    session.with(ONCE).noop().await.unwrap_err();
    fake.state.hijack.lock().unwrap().replace(frame);
    let outcome = session.with(ONCE).noop().await;
    assert!(fake.state.hijack.lock().unwrap().is_none());
    assert_eq!(fake.state.runs(), if outcome.is_ok() { 2 } else { 1 });
    outcome.map(|_| ())
}

#[tokio::test]
async fn a_call_that_the_agent_did_not_take_is_repeated_always() {
    // RFC 9113, 8.7: REFUSED_STREAM, and a GOAWAY that names an earlier stream as the last.
    const REFUSED: &[u8] = &[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7];
    const GOAWAY_BEFORE: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    answered(REFUSED).await.unwrap();
    answered(GOAWAY_BEFORE).await.unwrap();
}

#[tokio::test]
async fn a_call_that_the_agent_took_is_not() {
    const CANCELLED: &[u8] = &[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 8];
    const GOAWAY_AFTER: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    // `:status 200` and no more.
    const HALF_A_REPLY: &[u8] = &[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88];
    for frame in [CANCELLED, GOAWAY_AFTER, HALF_A_REPLY, b""] {
        let error = answered(frame).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Unreachable);
        assert!(error.to_string().contains("may have run"), "{error}");
    }
}

#[tokio::test]
async fn an_agent_that_comes_late_is_found() {
    let mut fake = Fake::new();
    let absent = Client::builder(fake.endpoint()).connect().await.unwrap_err();
    assert_eq!(absent.reason(), Reason::Unreachable);

    let hasty = Client::builder(fake.endpoint()).deadline(Duration::from_millis(100)).build().unwrap();
    let error = hasty.info().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Unreachable);
    let text = error.to_string();
    assert!(text.contains(&fake.endpoint().to_string()) && text.contains("gave up"), "{text}");

    let patient = Client::builder(fake.endpoint()).build().unwrap();
    let call = tokio::spawn(async move { patient.info().await });
    tokio::task::yield_now().await;
    fake.listen();
    call.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_full_agent_is_asked_again_when_it_said() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    let full = |milliseconds| {
        let after = Detail::RetryAfter(Duration::from_millis(milliseconds));
        Step::Refuse(Error::new(Reason::Overloaded, "queue is full").with(after))
    };
    fake.state.then(full(120));
    fake.state.then(Step::Refuse(Error::new(Reason::ShuttingDown, "about to stop")));
    let start = Instant::now();
    session.noop().await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(120));
    assert_eq!(fake.state.runs(), 3);

    fake.state.then(full(60_000));
    let start = Instant::now();
    let error = session.with(within(10_000)).noop().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Overloaded);
    assert!(start.elapsed() < Duration::from_secs(5), "what comes too late is not waited for");

    fake.state.then(full(1));
    assert_eq!(session.with(ONCE).noop().await.unwrap_err().reason(), Reason::Overloaded);
}

#[tokio::test]
async fn a_lost_session_is_opened_again_with_what_it_held() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    let model = session.register(ResourceFiles::model("model", &b"weights"[..])).await.unwrap();
    let dropped = session.register(ResourceFiles::model("dropped", &b"other"[..])).await.unwrap();
    session.unregister(&dropped).await.unwrap();
    let before = session.id();

    fake.state.forget();
    let input = || vec![named("x", Tensor::new(&[1], &[4.0_f32]).unwrap())];
    // Not even a call that must not run twice notices: the agent that did not know the session ran nothing.
    session.with(ONCE).run(&model, input(), &[]).await.unwrap();
    assert_ne!(session.id(), before);
    assert_eq!(fake.state.opened(), 2);
    assert_eq!(fake.state.held(), [[model.id().to_owned()].into()]);

    fake.state.forget();
    let late = session.register(ResourceFiles::model("late", &b"more"[..])).await.unwrap();
    session.run(&late, input(), &[]).await.unwrap();
    session.run(&model, input(), &[]).await.unwrap();
    assert_eq!(fake.state.opened(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_lose_a_session_together_open_one() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    let model = session.register(ResourceFiles::model("model", vec![7; 100_000])).await.unwrap();
    for round in 0..5 {
        fake.state.forget();
        let calls: Vec<_> = (0..16_u8)
            .map(|number| {
                let (session, model) = (session.clone(), model.clone());
                tokio::spawn(async move {
                    let input = named("x", Tensor::new(&[1], &[number]).unwrap());
                    session.run(&model, vec![input], &[]).await.unwrap().outputs[0]
                        .tensor
                        .as_ref()
                        .unwrap()
                        .data[0]
                })
            })
            .collect();
        for (number, call) in calls.into_iter().enumerate() {
            assert_eq!(usize::from(call.await.unwrap()), number);
        }
        assert_eq!(fake.state.opened(), 2 + round);
    }
}

#[tokio::test]
async fn a_recovery_that_nobody_waits_for_leaves_no_session_behind() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    session.register(ResourceFiles::model("model", vec![7; 100_000])).await.unwrap();
    fake.state.forget();
    let call = tokio::spawn({
        let session = session.clone();
        async move { session.noop().await }
    });
    while fake.state.opened() < 2 {
        tokio::task::yield_now().await;
    }
    call.abort();
    session.noop().await.unwrap();
    assert_eq!(fake.state.opened(), 2);
}

#[tokio::test]
async fn a_closed_session_stays_closed() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    session.close().await.unwrap();
    let error = session.noop().await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound);
    assert!(error.to_string().contains("was closed"), "{error}");
    assert_eq!((fake.state.runs(), fake.state.opened()), (0, 1));
}

#[tokio::test]
async fn closing_a_session_that_is_gone_is_no_error() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    fake.state.forget();
    session.close().await.unwrap();
}

#[tokio::test]
async fn a_lost_resource_is_not_a_lost_session() {
    let fake = Fake::listening();
    let session = session(&fake).await;
    let model = session.register(ResourceFiles::model("model", &b"weights"[..])).await.unwrap();
    session.unregister(&model).await.unwrap();
    let error = session.run(&model, vec![], &[]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound);
    assert_eq!(fake.state.opened(), 1);
}

#[tokio::test]
async fn a_connection_that_ended_while_idle_is_no_reason_to_fail() {
    let mut fake = Fake::listening();
    let session = session(&fake).await;
    for _ in 0..3 {
        fake.state.then(Step::Cut);
        assert!(session.with(ONCE).noop().await.is_err());
        session.with(ONCE).noop().await.unwrap();
    }
    // A new agent on the same path.
    let state = std::sync::Arc::clone(&fake.state);
    std::fs::remove_file(fake.path()).unwrap();
    fake.listen();
    fake.state.then(Step::Cut);
    session.noop().await.unwrap();
    assert_eq!(state.connections.load(SeqCst), 5);
}
