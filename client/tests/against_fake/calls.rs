//! Calls that reach the agent, or are stopped before they leave.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::Bytes;
use vaccel_client::proto::limits::{IMAGES_PER_CALL_MAX, MESSAGE_BYTES_MAX};
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::{ResourceKind, RunRequest};
use vaccel_client::{
    CallOptions, ClassifyOptions, Client, DType, Error, Reason, ResourceFiles, SessionOptions, Sgemm, Tensor,
    named,
};

use crate::fake::{Fake, Step};

#[tokio::test]
async fn every_method_reaches_the_agent() {
    let fake = Fake::listening();
    let client = fake.client().await;
    assert_eq!(client.info().await.unwrap().version, "fake");
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    assert_eq!(client.list_sessions().await.unwrap()[0].session, session.id());
    assert_eq!(session.renew().await.unwrap(), Duration::from_secs(1));
    assert_eq!(session.noop().await.unwrap().batch_size, 3);

    let images = [Bytes::from_static(b"abc"), Bytes::from_static(b"d")];
    let labels = session.classify(images, ClassifyOptions::default()).await.unwrap();
    assert_eq!([labels[0][0].index, labels[1][0].index], [3, 1]);

    let model = session.register(ResourceFiles::model("m.onnx", &b"model"[..])).await.unwrap();
    assert_eq!((model.id(), model.kind()), ("m.onnx", ResourceKind::Model));
    assert_eq!(session.list_resources().await.unwrap()[0].resource, model.id());
    let values = [1.0_f32, 2.0, 3.0];
    let run = session.run(&model, vec![named("x", Tensor::new(&[3], &values).unwrap())], &[]).await.unwrap();
    let echo = run.outputs[0].tensor.as_ref().unwrap();
    assert_eq!(echo.elements::<f32>().unwrap().as_ref(), values);
    assert_eq!(run.timings.run_us, 2);
    session.unregister(&model).await.unwrap();
    assert!(session.list_resources().await.unwrap().is_empty());

    session.close().await.unwrap();
    assert!(client.list_sessions().await.unwrap().is_empty());
    assert_eq!(fake.state.connections.load(SeqCst), 1, "all calls share one connection");
}

#[tokio::test]
async fn an_answer_that_is_no_product_and_an_operation_that_is_not_there_are_errors() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    let matrix = || Tensor::new(&[1, 1], &[2.0_f32]).unwrap();
    let echo = session.sgemm(Sgemm::new(matrix(), matrix()).unwrap()).await.unwrap_err();
    assert_eq!(echo.reason(), Reason::BackendFailed, "{echo:?}");
    assert!(echo.message().contains("sgemm"), "{echo}");
    let absent = session.fpga_mmult(matrix(), matrix()).await.unwrap_err();
    assert_eq!(absent.reason(), Reason::UnknownOperation, "{absent:?}");
}

#[tokio::test]
async fn calls_can_move_to_other_threads() {
    fn moves<T: Send>(_: T) {}
    let fake = Fake::listening();
    moves(vaccel_client::connect("unix:///nonexistent"));
    let client = fake.client().await;
    moves(client.info());
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let model = session.register(ResourceFiles::model("m", &b"m"[..])).await.unwrap();
    moves(session.register(ResourceFiles::model("m", &b"m"[..])));
    moves(session.run(&model, vec![], &["y"]));
    moves(session.classify([], ClassifyOptions { model: Some(&model), top_k: 1 }));
    moves(session.close());
}

#[tokio::test]
async fn a_large_tensor_goes_both_ways() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    let model = session.register(ResourceFiles::model("m", &b"m"[..])).await.unwrap();
    let data: Bytes = (0..16_u32 << 20).map(|i| i.to_le_bytes()[2]).collect::<Vec<_>>().into();
    let input = Tensor::from_bytes(DType::U8, &[16 << 20], data.clone());
    let run = session.run(&model, vec![named("x", input)], &[]).await.unwrap();
    assert!(run.outputs[0].tensor.as_ref().unwrap().data == data);
}

#[tokio::test]
async fn requests_carry_the_token_and_the_deadline() {
    let fake = Fake::listening();
    let client = Client::builder(fake.endpoint())
        .token("t0k")
        .deadline(Duration::from_secs(9))
        .connect()
        .await
        .unwrap();
    client.info().await.unwrap();
    let headers = fake.state.headers.lock().unwrap().clone();
    assert_eq!(headers["authorization"], "Bearer t0k");
    assert!(headers["user-agent"].to_str().unwrap().starts_with("vaccel-client/"));
    let timeout = headers["grpc-timeout"].to_str().unwrap();
    let microseconds: u64 = timeout.strip_suffix('u').unwrap().parse().unwrap();
    assert!((1..=9_000_000).contains(&microseconds), "{timeout}");
}

#[tokio::test]
async fn the_deadline_passes_here_too() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    fake.state.then(Step::Hang);
    let hasty =
        session.with(CallOptions { deadline: Some(Duration::from_millis(30)), ..CallOptions::default() });
    let error = hasty.noop().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Deadline);
    let text = error.to_string();
    assert!(
        text.contains("30ms") && text.contains("waiting for the answer") && text.contains("may have run"),
        "{text}"
    );
    session.noop().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_sent_is_refused_before_it_is() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    let model = session.register(ResourceFiles::model("m", &b"m"[..])).await.unwrap();
    let wrong = Tensor::from_bytes(DType::F32, &[2], Bytes::from_static(b"1234"));
    let wrong = session.run(&model, vec![named("x", wrong)], &[]).await.unwrap_err();
    assert_eq!(wrong.reason(), Reason::BadArgument);
    let many = vec![Bytes::new(); IMAGES_PER_CALL_MAX + 1];
    let many = session.classify(many, ClassifyOptions::default()).await.unwrap_err();
    assert_eq!(many.reason(), Reason::BadArgument);
    assert_eq!(fake.state.runs(), 0);
}

#[tokio::test]
async fn what_is_longer_than_a_message_goes_in_pieces_and_comes_back_so() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    let model = session.register(ResourceFiles::model("m", &b"m"[..])).await.unwrap();
    // What a run of another size has around its tensor.
    for (bytes, is_large) in
        [(MESSAGE_BYTES_MAX - 200, 0), (MESSAGE_BYTES_MAX, 1), (3 * MESSAGE_BYTES_MAX + 1, 1)]
    {
        let before = fake.state.large.load(SeqCst);
        let data: Bytes = (0..bytes).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let tensor = Tensor::from_bytes(DType::U8, &[i64::try_from(bytes).unwrap()], data);
        let run = session.run(&model, vec![named("x", tensor.clone())], &[]).await.unwrap();
        let output = run.outputs[0].tensor.as_ref().unwrap();
        assert!(output.data == tensor.data, "{bytes} bytes");
        assert_eq!(fake.state.large.load(SeqCst) - before, is_large, "{bytes} bytes");
    }
    // A reply that is too long for a message is asked for in pieces, unless a call must not run twice.
    let too_large = || Step::Refuse(Error::limit(Reason::MessageTooLarge, "outputs", 1, 2, "bytes"));
    fake.state.then(too_large());
    session.noop().await.unwrap();
    assert_eq!(fake.state.large.load(SeqCst), 3);
    fake.state.then(too_large());
    let once = session.with(CallOptions { repeatable: false, ..CallOptions::default() });
    assert_eq!(once.noop().await.unwrap_err().reason(), Reason::MessageTooLarge);
    assert_eq!(fake.state.large.load(SeqCst), 3);
}

#[tokio::test]
async fn an_error_of_the_agent_arrives_whole_and_at_once() {
    let fake = Fake::listening();
    let session = fake.client().await.open_session(SessionOptions::default()).await.unwrap();
    fake.state.then(Step::Refuse(Error::field("inputs[0].shape", "[1]", "[2]")));
    let error = session.noop().await.unwrap_err();
    assert_eq!(error.reason(), Reason::BadArgument);
    assert_eq!(error.to_string(), "inputs[0].shape: expected [1], got [2]");
    assert_eq!(fake.state.runs(), 1);
}

#[tokio::test]
async fn other_generated_clients_run_over_the_link() {
    let mut fake = Fake::new();
    let client = Client::builder(fake.endpoint()).build().unwrap();
    let status = OperationsClient::new(client.link().clone()).run(RunRequest::default()).await.unwrap_err();
    assert_eq!(Error::from_status(&status).reason(), Reason::Unreachable);
    fake.listen();
    let status = OperationsClient::new(client.link().clone()).run(RunRequest::default()).await.unwrap_err();
    assert_eq!(Error::from_status(&status).reason(), Reason::NotFound);
}
