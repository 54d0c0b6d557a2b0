//! Requests and replies longer than a message may be: they go in pieces, are counted, and are checked like all others.

use bytes::Bytes;
use tonic::codegen::tokio_stream;
use vaccel_client::proto::limits::{CHUNK_BYTES_MAX, MESSAGE_BYTES_MAX};
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::{NoopRequest, RunPiece, RunRequest};
use vaccel_client::{Client, DType, Error, Reason, ResourceFiles, SessionOptions, Sgemm, Tensor, named};

use prost::Message;

use crate::support::{Agent, onnx};

const MEBIBYTE: usize = 1 << 20;

fn tensor(bytes: usize) -> Tensor {
    let data: Vec<u8> = (0..bytes / 4).flat_map(|at| ((at % 1000) as f32).to_le_bytes()).collect();
    Tensor::from_bytes(DType::F32, &[(bytes / 4) as i64], data.into())
}

#[tokio::test]
async fn a_tensor_longer_than_any_message_goes_through_a_model_and_back() {
    const BYTES: usize = 100 * MEBIBYTE;
    let agent = Agent::unix(&["--tenant-in-flight-mib", "512", "--engine", "tract"]);
    let (_, session) = agent.session().await;
    let echo = session.register(ResourceFiles::model("m", onnx::echo())).await.unwrap();
    session.run(&echo, vec![named("x", tensor(MEBIBYTE))], &[]).await.unwrap();
    let (before, sent) = (agent.peak(), tensor(BYTES));
    let run = session.run(&echo, vec![named("x", sent.clone())], &[]).await.unwrap();
    assert!(run.outputs[0].tensor.as_ref().unwrap().data == sent.data);
    // The request, the engine's input and output, the reply, and the reply as it is encoded.
    let grown = agent.peak() - before;
    assert!(grown < 5 * BYTES as u64 + (64 << 20), "{grown} bytes for a tensor of {BYTES}");
}

#[tokio::test]
async fn a_reply_longer_than_any_message_comes_to_a_short_request() {
    let agent = Agent::unix(&["--tenant-in-flight-mib", "256"]);
    let (_, session) = agent.session().await;
    let (rows, columns) = (4096_i64, 3000_i64);
    let a: Vec<f32> = (0..rows).map(|row| row as f32).collect();
    let (a, b) =
        (Tensor::new(&[rows, 1], &a).unwrap(), Tensor::new(&[1, columns], &vec![2.0_f32; 3000]).unwrap());
    let c = session.sgemm(Sgemm::new(a, b).unwrap()).await.unwrap();
    assert_eq!(c.shape, [rows, columns]);
    assert!(c.data.len() > MESSAGE_BYTES_MAX);
    let numbers = c.elements::<f32>().unwrap();
    assert!(
        numbers.chunks(3000).zip(0_u16..).all(|(line, row)| line.iter().all(|x| *x == 2.0 * f32::from(row)))
    );
}

#[tokio::test]
async fn what_is_in_flight_is_bounded_by_the_tenants_limit() {
    let agent = Agent::start(&["unix://{}/a", "unix://{}/b"], &["--tenant-in-flight-mib", "64"]);
    let (client, session) = agent.session().await;
    assert_eq!(client.info().await.unwrap().limits.unwrap().in_flight_bytes_max, 64 << 20);
    let echo = session.register(ResourceFiles::model("m", onnx::echo())).await.unwrap();
    let refusal = session.run(&echo, vec![named("x", tensor(65 * MEBIBYTE))], &[]).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal}");
    assert!(refusal.message().contains("67108864"), "{refusal}");
    // A reply that would be longer than all that may be in flight.
    let ones = |shape: [i64; 2], count: usize| Tensor::new(&shape, &vec![1.0_f32; count]).unwrap();
    let product = Sgemm::new(ones([6000, 1], 6000), ones([1, 6000], 6000)).unwrap();
    let refusal = session.sgemm(product).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::MessageTooLarge, "{refusal}");
    session.noop().await.unwrap();
    let other = agent.guest(1).await.open_session(SessionOptions::default()).await.unwrap();
    other.noop().await.unwrap();
}

#[tokio::test]
async fn compressed_runs_take_less_of_the_line_and_say_the_same() {
    let agent = Agent::start(&["tcp://127.0.0.1:0"], &["--engine", "tract"]);
    let line = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("tcp://{}", line.local_addr().unwrap());
    let to = agent.address().trim_start_matches("tcp://").to_owned();
    let carried = tokio::spawn(async move {
        let mut near = line.accept().await.unwrap().0;
        let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
        tokio::io::copy_bidirectional(&mut near, &mut far).await.unwrap()
    });
    let client = Client::builder(address.parse().unwrap()).compresses(true).connections(1);
    let session = client.connect().await.unwrap().open_session(SessionOptions::default()).await.unwrap();
    let echo = session.register(ResourceFiles::model("m", onnx::echo())).await.unwrap();
    for bytes in [4, 4096, 8 * MEBIBYTE] {
        let run = session.run(&echo, vec![named("x", tensor(bytes))], &[]).await.unwrap();
        assert!(run.outputs[0].tensor.as_ref().unwrap().data == tensor(bytes).data);
    }
    session.noop().await.unwrap();
    let refusal = session.run(&echo, vec![named("y", tensor(4096))], &[]).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::BadArgument);
    drop(session);
    let (up, down) = carried.await.unwrap();
    assert!(up.max(down) < 2 * MEBIBYTE as u64, "{up} up, {down} down");
}

/// Sends these pieces.
async fn pieces(client: &Client, pieces: Vec<RunPiece>) -> Result<(), Error> {
    let mut operations = OperationsClient::new(client.link().clone());
    let reply = operations.run_large(tokio_stream::iter(pieces)).await;
    let mut reply = reply.map_err(|status| Error::from_status(&status))?.into_inner();
    while reply.message().await.map_err(|status| Error::from_status(&status))?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn pieces_that_are_no_request_are_refused_and_nobody_is_disturbed() {
    let agent = Agent::start(&["unix://{}/a", "unix://{}/b"], &[]);
    let (client, session) = agent.session().await;
    let other = agent.guest(1).await.open_session(SessionOptions::default()).await.unwrap();
    let request = |session: String| {
        RunRequest { session, op: Some(Op::Noop(NoopRequest {})), ..RunRequest::default() }.encode_to_vec()
    };
    let whole = request(session.id());
    let piece =
        |total: usize, data: &[u8]| RunPiece { total: total as u64, data: Bytes::copy_from_slice(data) };
    let (first, second) = whole.split_at(7);
    pieces(&client, vec![piece(whole.len(), first), piece(0, second)]).await.unwrap();
    pieces(&client, vec![piece(whole.len(), &whole), piece(0, &[])]).await.unwrap();
    for (what, sent, reason) in [
        ("nothing", vec![], Reason::BadArgument),
        ("less than was said", vec![piece(whole.len() + 1, &whole)], Reason::BadArgument),
        ("more than was said", vec![piece(whole.len() - 1, &whole)], Reason::BadArgument),
        ("nothing said", vec![piece(0, &whole)], Reason::BadArgument),
        ("no message", vec![piece(3, &[0xff; 3])], Reason::BadArgument),
        ("an endless claim", vec![RunPiece { total: u64::MAX, data: Bytes::new() }], Reason::QuotaExceeded),
        (
            "a piece that is too long",
            vec![piece(2 * MEBIBYTE, &vec![0; CHUNK_BYTES_MAX + 1])],
            Reason::MessageTooLarge,
        ),
        ("no operation", vec![piece(0, &[])], Reason::NotFound),
        ("another's session", vec![piece(whole.len(), &request(other.id()))], Reason::NotFound),
    ] {
        let refusal = pieces(&client, sent).await.expect_err(what);
        assert_eq!(refusal.reason(), reason, "{what}: {refusal}");
    }
    session.noop().await.unwrap();
    other.noop().await.unwrap();
    assert_eq!(client.info().await.unwrap().usage.unwrap().calls_in_flight, 1);
}
