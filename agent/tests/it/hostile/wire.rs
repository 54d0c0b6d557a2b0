//! Bytes that are no calls, calls that are no messages, and connections that say nothing.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::{Code, Status};
use tower_service::Service;
use vaccel_client::proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use vaccel_client::proto::inference::model_infer_request::InferInputTensor;
use vaccel_client::proto::inference::model_repository_parameter::ParameterChoice;
use vaccel_client::proto::inference::{
    InferTensorContents, ModelInferRequest, ModelRepositoryParameter, RepositoryModelLoadRequest,
};
use vaccel_client::proto::v1::{
    ModelRunRequest, NamedTensor, NoopRequest, RunPiece, RunRequest, run_request::Op,
};
use vaccel_client::{Endpoint, Error, Link, Reason, SessionOptions};

use super::{ATTACK_BYTES_MAX, Site, refused};
use crate::support::{Agent, endpoint, socket_path, until};

const RUN: &str = "/vaccel.v1.Operations/Run";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// A request body sent frame by frame.
struct Frames {
    frames: VecDeque<Bytes>,
    /// Whether it never ends.
    stays_open: bool,
}

impl HttpBody for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.frames.pop_front() {
            Some(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
            None if self.stays_open => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

fn request(path: &str, headers: &[(&str, &str)], body: Frames) -> http::Request<Body> {
    let request =
        http::Request::post(path).header("content-type", "application/grpc").header("te", "trailers");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(Body::new(body)).unwrap()
}

/// Sends a request and returns the status of its answer.
async fn sent(link: &Link, request: http::Request<Body>) -> Status {
    let response = match link.clone().call(request).await {
        Ok(response) => response,
        Err(status) => return status,
    };
    if let Some(status) = Status::from_header_map(response.headers()) {
        return status;
    }
    let mut body = std::pin::pin!(response.into_body());
    while let Some(frame) = std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await {
        match frame {
            Ok(frame) => {
                if let Some(status) = frame.trailers_ref().and_then(Status::from_header_map) {
                    return status;
                }
            }
            Err(status) => return status,
        }
    }
    Status::unknown("an answer without a status")
}

/// A message in gRPC's framing.
fn framed(flag: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(flag);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    frame.freeze()
}

fn body(frames: impl IntoIterator<Item = Bytes>) -> Frames {
    Frames { frames: frames.into_iter().collect(), stays_open: false }
}

/// The first bytes of a message that never comes whole.
fn begun(bytes: &'static [u8]) -> Frames {
    Frames { stays_open: true, ..body([Bytes::from_static(bytes)]) }
}

fn too_large(attack: &str, status: &Status) {
    refused(attack, Err::<(), _>(Error::from_status(status)), Reason::MessageTooLarge, "");
}

#[tokio::test]
async fn a_message_beyond_the_limit_is_refused_by_its_length() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let link = attacker.link();
    let before = site.agent.peak();
    for (attack, header) in [
        ("4 GiB claimed", &[0, 0xff, 0xff, 0xff, 0xff][..]),
        ("2 GiB claimed", &[0, 0x80, 0, 0, 0]),
        ("a byte too many claimed", &[0, 0x02, 0, 0, 1]),
        ("4 GiB claimed in pieces", &[1, 0xff, 0xff, 0xff, 0xff]),
    ] {
        too_large(attack, &sent(&link, request(RUN, &[], begun(header))).await);
        site.serves_others().await;
    }
    let honest = framed(0, &vec![0; 33 << 20]);
    let pieces = honest.chunks(1 << 16).map(Bytes::copy_from_slice);
    too_large("33 MiB sent", &sent(&link, request(RUN, &[], body(pieces))).await);
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
    attacker.session.noop().await.unwrap();
    site.serves_others().await;
}

/// A message that is one part after the other, all empty, as long as a message may be.
fn endless(parts: &impl Message) -> Bytes {
    let part = parts.encode_to_vec();
    framed(0, &part.repeat((32 << 20) / part.len()))
}

/// The same inside of a field.
fn endless_inside(field: u32, parts: &impl Message) -> Bytes {
    let part = parts.encode_to_vec();
    let mut message = Vec::new();
    let inside = part.repeat(((32 << 20) - 16) / part.len());
    prost::encoding::encode_key(field, prost::encoding::WireType::LengthDelimited, &mut message);
    prost::encoding::encode_varint(inside.len() as u64, &mut message);
    message.extend_from_slice(&inside);
    framed(0, &message)
}

#[tokio::test]
async fn messages_of_endless_empty_parts_are_refused_before_they_are_decoded() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    let tensors = ModelRunRequest { inputs: vec![NamedTensor::default()], ..Default::default() };
    let inputs = ModelInferRequest { inputs: vec![InferInputTensor::default()], ..Default::default() };
    let strings = InferTensorContents { bytes_contents: vec![Bytes::new()], ..Default::default() };
    let numbers = InferTensorContents { int64_contents: vec![0; 1 << 20], ..Default::default() };
    let in_a_tensor = InferInputTensor { contents: Some(strings), ..Default::default() };
    let of_numbers = InferInputTensor { contents: Some(numbers), ..Default::default() };
    // The numbers of their fields: `model_run` of a run, `inputs` of an inference.
    for (attack, path, message) in [
        ("tensors of a run", RUN, endless_inside(18, &tensors)),
        ("inputs", INFER, endless(&inputs)),
        ("strings in inputs", INFER, endless_inside(5, &in_a_tensor)),
        ("numbers in inputs", INFER, endless_inside(5, &of_numbers)),
    ] {
        too_large(attack, &sent(&attacker.link(), request(path, &[], body([message]))).await);
        site.serves_others().await;
    }
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
}

/// A run of the operation with number 99, which nobody has.
fn unknown_operation(session: &str) -> Bytes {
    let mut message =
        RunRequest { session: session.into(), op: None, ..RunRequest::default() }.encode_to_vec();
    prost::encoding::encode_key(99, prost::encoding::WireType::LengthDelimited, &mut message);
    prost::encoding::encode_varint(0, &mut message);
    framed(0, &message)
}

#[tokio::test]
async fn operations_that_are_not_there_are_told_with_those_that_are() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let session = attacker.session.id();
    let none = framed(
        0,
        &RunRequest { session: session.clone(), op: None, ..RunRequest::default() }.encode_to_vec(),
    );
    for (attack, message) in [("number 99", unknown_operation(&session)), ("none", none)] {
        let status = sent(&attacker.link(), request(RUN, &[], body([message]))).await;
        let refusal =
            refused(attack, Err::<(), _>(Error::from_status(&status)), Reason::UnknownOperation, "");
        for known in ["noop", "image_classification", "model_run"] {
            assert!(refusal.message().contains(known), "{refusal}");
        }
    }
    for path in
        ["/vaccel.v1.Operations/Exec", "/vaccel.v2.Operations/Run", "/", "/grpc.reflection.v1/x", "/%00"]
    {
        let status = sent(&attacker.link(), request(path, &[], body([framed(0, &[])]))).await;
        assert_eq!(status.code(), Code::Unimplemented, "{path}: {status:?}");
    }
    site.serves_others().await;
}

#[tokio::test]
async fn calls_that_are_no_messages_end_with_a_status() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let noop = RunRequest {
        session: attacker.session.id(),
        op: Some(Op::Noop(NoopRequest {})),
        ..RunRequest::default()
    }
    .encode_to_vec();
    let (gzip, snappy) = ([("grpc-encoding", "gzip")], [("grpc-encoding", "snappy")]);
    let long = "x".repeat(32 << 10);
    for (attack, headers, frames, codes) in [
        ("a cut message", &gzip[..], body([framed(1, &zipped(&noop)[..20])]), &[Code::InvalidArgument][..]),
        ("no gzip", &gzip, body([framed(1, &noop)]), &[Code::InvalidArgument]),
        ("a bomb", &gzip, body([framed(1, &zipped(&vec![0; 64 << 20]))]), &[Code::ResourceExhausted]),
        ("a coding nobody knows", &snappy, body([framed(1, &noop)]), &[Code::Unimplemented]),
        ("compressed by nothing", &[], body([framed(1, &noop)]), &[Code::InvalidArgument]),
        ("a flag that is none", &[], body([framed(7, &noop)]), &[Code::InvalidArgument]),
        ("no message", &[], body([]), &[Code::InvalidArgument]),
        ("half a header", &[], body([Bytes::from_static(&[0, 0])]), &[Code::InvalidArgument]),
        ("half a message", &[], body([framed(0, &noop).slice(..20)]), &[Code::InvalidArgument]),
        ("noise", &[], body([framed(0, &[0xff; 64])]), &[Code::InvalidArgument]),
        (
            "headers of 32 KiB",
            &[("x-long", &*long)],
            body([framed(0, &noop)]),
            &[Code::Unavailable, Code::Unknown],
        ),
    ] {
        let status = sent(&attacker.link(), request(RUN, headers, frames)).await;
        eprintln!("{attack}: {status:?}");
        assert!(codes.contains(&status.code()), "{attack}: {status:?}");
        site.serves_others().await;
    }
    let two = sent(&attacker.link(), request(RUN, &[], body([framed(0, &noop), framed(0, &noop)]))).await;
    assert!([Code::Ok, Code::Internal].contains(&two.code()), "{two:?}");
    attacker.session.noop().await.unwrap();
    site.serves_others().await;
}

fn zipped(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// A claim is refused with its reason in every call: those that tonic answers, too.
#[tokio::test]
async fn claims_beyond_the_limit_are_told_by_their_reason_everywhere() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    for path in [RUN, "/vaccel.v1.Resources/Upload", "/vaccel.v1.Sessions/List"] {
        let status = sent(&attacker.link(), request(path, &[], begun(&[0, 0xff, 0, 0, 0, 0x0a]))).await;
        assert_eq!(Error::from_status(&status).reason(), Reason::MessageTooLarge, "{path}: {status:?}");
    }
    attacker.session.noop().await.unwrap();
}

/// What is no message of the contract is told so by every call, wherever in it that comes.
#[tokio::test]
async fn requests_that_are_no_messages_are_told_so_everywhere() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let refuse = async |attack: &str, path: &str, frames: &[Bytes]| {
        let status = sent(&attacker.link(), request(path, &[], body(frames.iter().cloned()))).await;
        refused(
            &format!("{attack} to {path}"),
            Err::<(), _>(Error::from_status(&status)),
            Reason::BadArgument,
            "",
        );
    };
    let (noise, flag) = (framed(0, &[0xff; 12]), framed(7, &[]));
    for path in [
        RUN,
        "/vaccel.v1.Operations/RunLarge",
        "/vaccel.v1.Resources/Upload",
        "/vaccel.v1.Resources/Read",
        "/vaccel.v1.Sessions/Open",
        INFER,
        STREAM,
        "/inference.GRPCInferenceService/ModelMetadata",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    ] {
        refuse("noise", path, std::slice::from_ref(&noise)).await;
        refuse("a flag that is none", path, std::slice::from_ref(&flag)).await;
    }
    refuse("nothing", "/vaccel.v1.Sessions/Open", &[]).await;
    let piece = framed(0, &RunPiece { total: 1000, data: vec![0; 10].into() }.encode_to_vec());
    for second in [noise, flag] {
        refuse("a second piece", "/vaccel.v1.Operations/RunLarge", &[piece.clone(), second]).await;
    }
    attacker.session.noop().await.unwrap();
    site.serves_others().await;
}

/// A model whose runs take three seconds each, as many at a time as one stream has.
async fn bring_slow(link: &Link) {
    let tensor = r#"[ { "name": "x", "data_type": "TYPE_UINT8", "dims": [ 1 ] } ]"#;
    let config = format!(
        r#"{{ "backend": "identity", "input": {tensor}, "output": {tensor},
            "instance_group": [ {{ "count": 32 }} ],
            "parameters": {{ "run_us": {{ "string_value": "3000000" }} }} }}"#
    );
    let parameter = |choice| ModelRepositoryParameter { parameter_choice: Some(choice) };
    let parameters = [
        ("config".to_owned(), parameter(ParameterChoice::StringParam(config))),
        ("file:1/m".to_owned(), parameter(ParameterChoice::BytesParam(Bytes::from_static(b"x")))),
    ]
    .into();
    let load = RepositoryModelLoadRequest { model_name: "slow".into(), parameters, ..Default::default() };
    GrpcInferenceServiceClient::new(link.clone()).repository_model_load(load).await.unwrap();
}

/// Messages without anything in them take room, too: behind runs that take their time, only so many are kept.
#[tokio::test]
async fn messages_without_bytes_are_not_kept_without_end() {
    let site = Site::start(&["--tenant-in-flight-mib", "64"]).await;
    let link = site.attacker().await.link();
    bring_slow(&link).await;
    // A long message widens the windows of all streams.
    sent(&link, request(RUN, &[], body([framed(0, &vec![0xff; 31 << 20])]))).await;
    let before = site.agent.peak();
    let input =
        InferInputTensor { name: "x".into(), datatype: "UINT8".into(), shape: vec![1], ..Default::default() };
    let run = ModelInferRequest {
        model_name: "slow".into(),
        inputs: vec![input],
        raw_input_contents: vec![Bytes::from_static(&[0])],
        ..Default::default()
    };
    let runs = std::iter::repeat_n(framed(0, &run.encode_to_vec()), 33);
    let empty = std::iter::repeat_n(Bytes::from(vec![0; 5 << 16]), 32);
    sent(&link, request(STREAM, &[], body(runs.chain(empty)))).await;
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
    site.serves_others().await;
}

/// What a body of two million pieces may add to the agent's memory, in bytes.
const PIECES_BYTES_MAX: u64 = 32 << 20;

/// A body over HTTP takes no more for coming byte by byte.
#[tokio::test]
async fn bodies_in_pieces_of_one_byte_take_what_they_are_long() {
    const PIECES: usize = 2_000_000;
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    let pieces = body(std::iter::repeat_n(Bytes::from_static(b" "), PIECES));
    let request = http::Request::post("/v2/models/x/infer").header("content-type", "application/json");
    let answered = attacker.link().call(request.body(Body::new(pieces)).unwrap()).await.unwrap();
    assert!(answered.status().is_client_error(), "{answered:?}");
    let mut stream = dial(site.agent.address()).await;
    let head = "POST /v2/models/x/infer HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all("1\r\n \r\n".repeat(PIECES).as_bytes()).await.unwrap();
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    let grown = site.agent.peak() - before;
    assert!(grown <= PIECES_BYTES_MAX, "{grown} bytes");
    site.serves_others().await;
}

/// A body that is no gRPC's has no framing, whatever its path says, and is answered as any other path of HTTP.
#[tokio::test]
async fn paths_of_calls_with_bodies_of_anything_are_no_calls() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let link = attacker.link();
    for path in [RUN, INFER] {
        for content in [&[0][..], &[0; 4], &[0; 5], b"{}"] {
            let request = http::Request::post(path).header("content-type", "text/plain");
            let request = request.body(Body::new(body([Bytes::copy_from_slice(content)]))).unwrap();
            // Whatever the status: the connection goes on.
            assert!(link.clone().call(request).await.is_ok(), "{path}: {content:?}");
        }
    }
    attacker.session.noop().await.unwrap();
    site.serves_others().await;
}

/// Messages that begin and never end hold a place each, and no more places than the tenant has.
#[tokio::test]
async fn messages_that_never_come_whole_hold_one_tenants_places_only() {
    let site = Site::start(&["--tenant-calls-max", "32"]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    let mut slow = JoinSet::new();
    for _ in 0..33 {
        let link = attacker.link();
        // 1 MiB claimed, one byte sent.
        slow.spawn(async move { sent(&link, request(RUN, &[], begun(&[0, 0, 0x10, 0, 0, 0x0a]))).await });
    }
    // The one that found no place.
    let refusal = Error::from_status(&slow.join_next().await.unwrap().unwrap());
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal:?}");
    let refusal = attacker.session.noop().await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal:?}");
    site.serves_others().await;
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
    slow.abort_all();
    until("a place", async || attacker.session.noop().await.is_ok()).await;
}

/// What messages claim is charged before it comes: no tenant can make the agent keep more free than it may have.
#[tokio::test]
async fn messages_that_claim_more_than_a_tenant_may_have_are_refused_at_their_first_bytes() {
    let site = Site::start(&["--tenant-in-flight-mib", "64"]).await;
    let attacker = site.attacker().await;
    let mut slow = JoinSet::new();
    for _ in 0..3 {
        let link = attacker.link();
        // 30 MiB claimed, one byte sent.
        slow.spawn(async move { sent(&link, request(RUN, &[], begun(&[0, 0x01, 0xe0, 0, 0, 0x0a]))).await });
    }
    let refusal = Error::from_status(&slow.join_next().await.unwrap().unwrap());
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal:?}");
    attacker.session.noop().await.unwrap();
    site.serves_others().await;
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A bare connection.
async fn dial(address: &str) -> Box<dyn Stream> {
    match endpoint(address) {
        Endpoint::Tcp(authority) => Box::new(TcpStream::connect(authority.to_string()).await.unwrap()),
        Endpoint::HybridVsock { path, port } => {
            let path = vaccel_client::proto::endpoint::hybrid_listen_path(&path, port);
            Box::new(UnixStream::connect(path).await.unwrap())
        }
        _ => Box::new(UnixStream::connect(socket_path(address)).await.unwrap()),
    }
}

/// Reads until the agent closes.
async fn closed(mut stream: Box<dyn Stream>) {
    let mut read = [0; 1024];
    while let Ok(1..) = stream.read(&mut read).await {}
}

const OTHER_PROTOCOLS: &[(&str, &[u8])] = &[
    ("HTTP/1.1 with a method of its own", b"BREW /pot HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ("a request that is none", b"GET \x00\x01\x02 nothing\r\n\r\n"),
    ("another HTTP/2", b"PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n"),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ("a VMM", b"CONNECT 2048\n"),
    ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n"),
    ("zeros", &[0; 64]),
    ("ones", &[0xff; 64]),
    ("a preface and no frames", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
];

const UNFINISHED: &[(&str, &[u8])] = &[
    ("nothing", b""),
    ("a byte", b"P"),
    ("half a method", b"POS"),
    ("half a preface", b"PRI * HTTP/2"),
    ("all but a byte", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r"),
];

fn all_sockets() -> Agent {
    Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0", "hvsock://{}/vm:2048"], &["--engine", "tract"])
}

#[tokio::test]
async fn another_protocol_is_closed_at_once_on_every_socket() {
    let agent = all_sockets();
    for (index, address) in agent.addresses.iter().enumerate() {
        let session = agent.guest(index).await.open_session(SessionOptions::default()).await.unwrap();
        for (protocol, bytes) in OTHER_PROTOCOLS {
            let mut stream = dial(address).await;
            // The agent may have closed at the first byte.
            let _ = stream.write_all(bytes).await;
            let at_once = Duration::from_secs(4);
            let end = tokio::time::timeout(at_once, closed(stream)).await;
            end.unwrap_or_else(|_| panic!("{protocol} at {address}: still open"));
            session.noop().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_peer_that_does_not_open_is_closed_in_time_while_others_are_served() {
    let agent = all_sockets();
    let mut silent = JoinSet::new();
    let mut sessions = Vec::new();
    for (index, address) in agent.addresses.iter().enumerate() {
        sessions.push(agent.guest(index).await.open_session(SessionOptions::default()).await.unwrap());
        for (_, bytes) in UNFINISHED {
            let mut stream = dial(address).await;
            stream.write_all(bytes).await.unwrap();
            silent.spawn(closed(stream));
        }
    }
    let all = tokio::time::timeout(crate::support::PATIENCE, async {
        let mut served = 0;
        while !silent.is_empty() {
            for session in &sessions {
                session.noop().await.unwrap();
                served += 1;
            }
            while let Some(ended) = silent.try_join_next() {
                ended.unwrap();
            }
        }
        served
    });
    let served = all.await.expect("a silent peer is kept");
    assert!(served >= 3 * sessions.len(), "{served} calls");
}

/// 300 connections that say nothing, 256 of which the tenant may have.
#[tokio::test]
async fn silent_connections_fill_one_tenants_places_only() {
    let site = Site::start(&[]).await;
    let address = &site.agent.addresses[0];
    let mut silent = JoinSet::new();
    for _ in 0..300 {
        silent.spawn(closed(dial(address).await));
    }
    for _ in 0..300 - 256 {
        silent.join_next().await.unwrap().unwrap();
    }
    assert!(silent.try_join_next().is_none(), "a place less than the tenant has");
    // Not even a guest that speaks.
    closed(dial(address).await).await;
    site.serves_others().await;
    let neighbour = site.agent.guest(1).await.open_session(SessionOptions::default()).await.unwrap();
    neighbour.noop().await.unwrap();
    while let Some(ended) = silent.join_next().await {
        ended.unwrap();
    }
    site.attacker().await.session.noop().await.unwrap();
}

/// A process is one tenant, from whichever of the addresses it calls that this machine has for itself.
#[tokio::test]
async fn this_machine_is_one_tenant_over_tcp() {
    let flags = ["--engine", "tract", "--tenant-connections-max", "1"];
    let agent = Agent::start(&["tcp://127.0.0.1:0"], &flags);
    let client = agent.guest(0).await;
    client.info().await.unwrap();
    let address = agent.address().strip_prefix("tcp://").unwrap().parse().unwrap();
    for from in [[127, 0, 0, 1], [127, 0, 0, 2], [127, 200, 0, 1]] {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        // It may be closed before it says anything.
        let _ =
            stream.write_all(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "{from:?}: {}", String::from_utf8_lossy(&answer));
    }
    client.info().await.unwrap();
}
