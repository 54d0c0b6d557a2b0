//! Requests with wrong contents: sessions, tensors, images, operations and deadlines.

use std::time::Duration;

use bytes::Bytes;
use tonic::Request;
use tonic::codegen::tokio_stream;
use tonic::metadata::MetadataValue;
use vaccel_client::proto::error::Detail;
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::resources_client::ResourcesClient;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::sessions_client::SessionsClient;
use vaccel_client::proto::v1::{
    CloseSessionRequest, ImageClassificationRequest, ListResourcesRequest, NoopRequest, OpenSessionRequest,
    RegisterResourceRequest, RenewSessionRequest, RunRequest, UnregisterResourceRequest, UploadRequest,
};
use vaccel_client::{DType, Error, Link, NamedTensor, Reason, ResourceKind, Tensor, named};

use super::{ATTACK_BYTES_MAX, Attacker, Site, answer, model_run, refused};
use crate::support::{digits, onnx, read, until};

/// Every call that names a session, with this one.
async fn each_call(link: &Link, session: &str) -> Vec<(&'static str, Result<(), Error>)> {
    let id = || session.to_owned();
    let mut sessions = SessionsClient::new(link.clone());
    let mut resources = ResourcesClient::new(link.clone());
    let mut operations = OperationsClient::new(link.clone());
    let noop = RunRequest { session: id(), op: Some(Op::Noop(NoopRequest {})), ..RunRequest::default() };
    let register = RegisterResourceRequest { session: id(), kind: 1, files: vec![] };
    let unregister = UnregisterResourceRequest { session: id(), resource: "0".repeat(64), all: false };
    let upload = UploadRequest { session: id(), sha256: vec![0; 32].into(), size: 1, ..Default::default() };
    vec![
        ("renew", answer(sessions.renew(RenewSessionRequest { session: id() }).await).map(drop)),
        ("close", answer(sessions.close(CloseSessionRequest { session: id() }).await).map(drop)),
        ("register", answer(resources.register(register).await).map(drop)),
        ("upload", answer(resources.upload(tokio_stream::once(upload)).await).map(drop)),
        ("unregister", answer(resources.unregister(unregister).await).map(drop)),
        ("list", answer(resources.list(ListResourcesRequest { session: id() }).await).map(drop)),
        ("run", answer(operations.run(noop).await).map(drop)),
    ]
}

#[tokio::test]
async fn a_session_that_is_not_there_is_not_found_by_any_call() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let neighbours = site.neighbour.id();
    let wrong = [
        "",
        "0",
        &"0".repeat(32),
        &"0".repeat(33),
        &attacker.session.id().to_uppercase().replace(|c: char| c.is_ascii_digit(), "F"),
        &neighbours,
        "../../etc/passwd",
        "\u{1b}[2J\r\n",
        &"é".repeat(100_000),
    ];
    for id in wrong {
        for (call, outcome) in each_call(&attacker.link(), id).await {
            let shown: String = id.chars().take(40).collect();
            let refusal = refused(&format!("{call} of {shown:?}"), outcome, Reason::NotFound, "");
            assert!(!refusal.message().contains(char::is_control), "{refusal}");
            assert!(matches!(refusal.detail(), Detail::Resource { kind, .. } if kind == "session"));
        }
    }
    attacker.session.noop().await.unwrap();
    site.serves_others().await;
}

#[tokio::test]
async fn devices_and_engines_that_are_not_there_open_no_session() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let mut sessions = SessionsClient::new(attacker.link());
    for (device, engine, reason, field) in [
        ("cuda:99", "", Reason::Disabled, ""),
        ("\u{0}", "", Reason::Disabled, ""),
        ("", "../libevil.so", Reason::BadArgument, "engine"),
        ("", &"x".repeat(1 << 20), Reason::BadArgument, "engine"),
    ] {
        let request = OpenSessionRequest { device: device.into(), engine: engine.into(), hints: 0 };
        refused(device, answer(sessions.open(request).await), reason, field);
    }
    assert_eq!(attacker.client.info().await.unwrap().usage.unwrap().sessions, 1);
    site.serves_others().await;
}

fn f32s(shape: &[i64], bytes: usize) -> Tensor {
    Tensor::from_bytes(DType::F32, shape, Bytes::from(vec![0; bytes]))
}

/// Inputs for a model that takes `x: f32[?, 2]`, each wrong in the field beside it.
fn wrong_inputs() -> Vec<(&'static str, Vec<NamedTensor>, &'static str)> {
    let one = |tensor: Tensor| vec![named("x", tensor)];
    let typed = |dtype: i32| Tensor { dtype, ..f32s(&[1, 2], 8) };
    let good = || named("x", f32s(&[1, 2], 8));
    let absent = NamedTensor { name: "x".into(), tensor: None };
    let many = vec![good(); 257];
    let padded = Tensor { pad: vec![0; 1 << 20].into(), ..f32s(&[1, 2], 4) };
    vec![
        ("another type", one(typed(DType::I32.into())), "inputs[0].dtype"),
        ("no type", one(typed(0)), "inputs[0].dtype"),
        ("an unknown type", one(typed(99)), "inputs[0].dtype"),
        ("a negative type", one(typed(-1)), "inputs[0].dtype"),
        ("a wrong dimension", one(f32s(&[1, 3], 12)), "inputs[0].shape"),
        ("too few axes", one(f32s(&[2], 8)), "inputs[0].shape"),
        ("too many axes", one(f32s(&[1, 1, 2], 8)), "inputs[0].shape"),
        ("a scalar", one(f32s(&[], 4)), "inputs[0].shape"),
        ("nine axes", one(f32s(&[1, 1, 1, 1, 1, 1, 1, 1, 2], 8)), "inputs[0].shape"),
        ("a million axes", one(f32s(&vec![1; 1_000_000], 4)), "inputs[0].shape"),
        ("a negative dimension", one(f32s(&[-1, 2], 8)), "inputs[0].shape"),
        ("the smallest dimension", one(f32s(&[i64::MIN, 2], 8)), "inputs[0].shape"),
        ("two negative dimensions", one(f32s(&[-1, -2], 8)), "inputs[0].shape"),
        ("a product beyond 64 bits", one(f32s(&[1 << 32, 1 << 32], 0)), "inputs[0].shape"),
        ("bytes beyond 64 bits", one(f32s(&[1 << 62, 2], 0)), "inputs[0].data"),
        ("4 TiB that are not there", one(f32s(&[1 << 39, 2], 8)), "inputs[0].data"),
        ("less data than the shape", one(f32s(&[1, 2], 7)), "inputs[0].data"),
        ("more data than the shape", one(f32s(&[1, 2], 1 << 20)), "inputs[0].data"),
        ("no data", one(f32s(&[1, 2], 0)), "inputs[0].data"),
        ("a pad instead of data", one(padded), "inputs[0].data"),
        ("no tensor", vec![absent], "inputs[0].tensor"),
        ("no inputs", vec![], "inputs"),
        ("one input too many", vec![good(), good()], "inputs"),
        ("257 inputs", many, "inputs"),
        ("an unknown name", vec![named("z", f32s(&[1, 2], 8))], "inputs[0].name"),
        ("an endless name", vec![named("x".repeat(1 << 20), f32s(&[1, 2], 8))], "inputs[0].name"),
    ]
}

#[tokio::test]
async fn tensors_that_do_not_fit_are_refused_by_their_field() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let add = attacker.model(onnx::add()).await;
    let before = site.agent.peak();
    for (attack, inputs, field) in wrong_inputs() {
        let outcome = attacker.run(model_run(add.id(), inputs, &[])).await;
        refused(attack, outcome, Reason::BadArgument, field);
    }
    let good = || vec![named("x", f32s(&[1, 2], 8))];
    let long = "y".repeat(1 << 20);
    for (attack, outputs) in [
        ("an unknown output", vec!["z"]),
        ("an output without a name", vec![""]),
        ("an input as an output", vec!["x"]),
        ("an endless output name", vec![&*long]),
        ("the same output again", vec!["y"; 2]),
        ("257 outputs", vec!["y"; 257]),
    ] {
        let outcome = attacker.run(model_run(add.id(), good(), &outputs)).await;
        refused(attack, outcome, Reason::BadArgument, "outputs");
    }
    refused("no model", attacker.run(model_run("", good(), &[])).await, Reason::BadArgument, "model");
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
    attacker.run(model_run(add.id(), good(), &["y"])).await.unwrap();
    site.serves_others().await;
}

#[tokio::test]
async fn inputs_are_told_apart_by_name() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let port = |name| onnx::port(name, onnx::F32, &[1, 2]);
    let nodes = vec![onnx::node("Sub", &["a", "b"], &["y"])];
    let sub = attacker.model(onnx::model(nodes, vec![], vec![port("a"), port("b")], vec![port("y")])).await;
    let pair = |first, second| vec![named(first, f32s(&[1, 2], 8)), named(second, f32s(&[1, 2], 8))];
    for (attack, inputs, field) in [
        ("the same name twice", pair("a", "a"), "inputs[1].name"),
        ("one name and one place", pair("a", ""), "inputs[1].name"),
        ("an output's name", pair("a", "y"), "inputs[1].name"),
        ("one of two", pair("a", "b")[..1].to_vec(), "inputs"),
    ] {
        let outcome = attacker.run(model_run(sub.id(), inputs, &[])).await;
        refused(attack, outcome, Reason::BadArgument, field);
    }
    attacker.run(model_run(sub.id(), pair("b", "a"), &[])).await.unwrap();
    site.serves_others().await;
}

#[tokio::test]
async fn an_answer_beyond_the_message_limit_is_an_error() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let nodes = vec![onnx::node("Expand", &["x", "shape"], &["y"])];
    let (x, y) = (onnx::port("x", onnx::F32, &[1]), onnx::port("y", onnx::F32, &[9 << 20]));
    let widen = onnx::model(nodes, vec![onnx::i64s("shape", &[9 << 20])], vec![x], vec![y]);
    let widen = attacker.model(widen).await;
    let outcome = attacker.run(model_run(widen.id(), vec![named("x", f32s(&[1], 4))], &[])).await;
    refused("36 MiB of output", outcome.map(drop), Reason::MessageTooLarge, "");
    site.serves_others().await;
}

/// A PNG file that claims these sides and has no pixels.
fn empty_png(width: u32, height: u32) -> Bytes {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let chunk = |kind: &[u8], content: &[u8]| {
        let body = [kind, content].concat();
        let length = u32::try_from(content.len()).unwrap().to_be_bytes();
        [&length[..], &body, &crc32(&body).to_be_bytes()].concat()
    };
    // An empty zlib stream: the decoder has somewhere to begin.
    let pixels = [0x78, 0x9c, 0x03, 0x00, 0x00, 0x00, 0x00, 0x01];
    let chunks = [chunk(b"IHDR", &header), chunk(b"IDAT", &pixels), chunk(b"IEND", &[])].concat();
    [&b"\x89PNG\r\n\x1a\n"[..], &chunks].concat().into()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        let shift = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        (0..8).fold(crc ^ u32::from(*byte), shift)
    })
}

#[tokio::test]
async fn files_that_are_no_images_are_refused_by_their_place() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let (png, jpeg) = (read(&digits("png")[0].0), read(&digits("jpg")[0].0));
    let half = |file: &Bytes| file.slice(..file.len() / 2);
    let gif = Bytes::from_static(b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00!\xf9\x04");
    let before = site.agent.peak();
    for (attack, images, field) in [
        ("no image", vec![], "images"),
        ("257 images", vec![png.clone(); 257], "images"),
        ("an empty file", vec![Bytes::new()], "images[0]"),
        ("half a PNG", vec![png.clone(), half(&png)], "images[1]"),
        ("half a JPEG", vec![jpeg.clone(), half(&jpeg)], "images[1]"),
        ("only the signature", vec![png.slice(..8)], "images[0]"),
        ("a GIF", vec![gif], "images[0]"),
        ("text", vec![png.clone(), png.clone(), Bytes::from_static(b"P3 1 1 255 0 0 0")], "images[2]"),
        ("50,000 x 50,000 pixels", vec![empty_png(50_000, 50_000)], "images[0]"),
        ("the largest sides", vec![empty_png(i32::MAX as u32, i32::MAX as u32)], "images[0]"),
        ("no sides", vec![empty_png(0, 0)], "images[0]"),
        ("64 Mpx that are not there", vec![empty_png(8192, 8192)], "images[0]"),
        ("256 times 16 Mpx", vec![empty_png(4096, 4096); 256], "images"),
        ("a model", vec![onnx::add()], "images[0]"),
    ] {
        let request = ImageClassificationRequest { model: String::new(), top_k: u32::MAX, images };
        let outcome = attacker.run(Op::ImageClassification(request)).await;
        refused(attack, outcome, Reason::BadArgument, field);
        site.serves_others().await;
    }
    // What one call's pixels may take when decoded, and nothing near what the headers claimed.
    let grown = site.agent.peak() - before;
    assert!(grown <= (192 << 20) + ATTACK_BYTES_MAX, "{grown} bytes");
    let request =
        ImageClassificationRequest { model: String::new(), top_k: u32::MAX, images: vec![png, jpeg] };
    attacker.run(Op::ImageClassification(request)).await.unwrap();
}

#[tokio::test]
async fn resources_of_another_kind_or_of_nobody_are_not_models() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let data = attacker.register(ResourceKind::Data, vec![("model.onnx".into(), onnx::add())]).await;
    let gone = attacker.model(onnx::add()).await;
    attacker.session.unregister(&gone).await.unwrap();
    let neighbours = vaccel_client::ResourceFiles::model("model.onnx", onnx::weights());
    let neighbours = site.neighbour.register(neighbours).await.unwrap();
    let image = read(&digits("png")[0].0);
    let endless = "f".repeat(1 << 20);
    for (attack, model, reason, field) in [
        ("data", data.id(), Reason::BadArgument, "model"),
        ("an unregistered one", gone.id(), Reason::NotFound, ""),
        ("another tenant's", neighbours.id(), Reason::NotFound, ""),
        ("a path", "/etc/passwd", Reason::NotFound, ""),
        ("a session", &attacker.session.id(), Reason::NotFound, ""),
        ("an endless name", &endless, Reason::NotFound, ""),
    ] {
        let inputs = vec![named("x", f32s(&[1, 2], 8))];
        refused(attack, attacker.run(model_run(model, inputs, &[])).await, reason, field);
        let images = vec![image.clone()];
        let classify = ImageClassificationRequest { model: model.into(), top_k: 1, images };
        refused(attack, attacker.run(Op::ImageClassification(classify)).await, reason, field);
    }
    site.serves_others().await;
}

/// A request for this model with this much time.
fn timed(attacker: &Attacker, op: Op, time: Duration) -> Request<RunRequest> {
    let mut request =
        Request::new(RunRequest { session: attacker.session.id(), op: Some(op), ..RunRequest::default() });
    request.set_timeout(time);
    request
}

#[tokio::test]
async fn a_deadline_says_where_the_call_was_when_it_passed() {
    let site = Site::start(&["--lanes", "1"]).await;
    let attacker = site.attacker().await;
    let slow = attacker.model(onnx::slow(512, 3000)).await;
    let op = || model_run(slow.id(), vec![named("x", f32s(&[512, 512], 4 << 18))], &[]);
    // Asking for an output that is not there loads the model and runs nothing.
    refused("load", attacker.run(model_run(slow.id(), vec![], &[])).await, Reason::BadArgument, "inputs");

    let passed = attacker.send(timed(&attacker, Op::Noop(NoopRequest {}), Duration::ZERO)).await;
    let refusal = refused("already over", passed, Reason::Deadline, "");
    assert!(refusal.message().contains("queued"), "{refusal}");

    let late = attacker.send(timed(&attacker, op(), Duration::from_millis(200))).await;
    let refusal = refused("while running", late, Reason::Deadline, "");
    assert!(refusal.message().contains("running"), "{refusal}");
    // The lane is free, and nobody computes any more.
    site.serves_others().await;
    until("the end of the computation", async || !site.agent.computes()).await;

    let busy = site.attacker().await;
    let model = busy.model(onnx::slow(512, 3000)).await;
    let inputs = vec![named("x", f32s(&[512, 512], 4 << 18))];
    let busy = tokio::spawn(async move { busy.run(model_run(model.id(), inputs, &[])).await.map(drop) });
    until("waiting for the only lane", async || {
        let late = attacker.send(timed(&attacker, op(), Duration::from_millis(50))).await;
        // Where it is foreseen that the lane is free too late, the call is not let wait for it.
        late.is_err_and(|error| error.reason() == Reason::Overloaded || error.message().contains("queued"))
    })
    .await;
    assert!(!busy.is_finished());
    busy.abort();
    site.serves_others().await;
}

#[tokio::test]
async fn a_timeout_that_is_none_is_refused() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    for timeout in
        ["", "soon", "1", "S", "-1S", "+1S", "1.5S", "123456789S", "1s", "1x", "0x1S", " 1S", "1 S"]
    {
        let op = Some(Op::Noop(NoopRequest {}));
        let mut request =
            Request::new(RunRequest { session: attacker.session.id(), op, ..RunRequest::default() });
        request.metadata_mut().insert("grpc-timeout", MetadataValue::try_from(timeout).unwrap());
        refused(timeout, attacker.send(request).await, Reason::BadArgument, "grpc-timeout");
    }
    site.serves_others().await;
}

#[tokio::test]
async fn a_tenant_that_leaves_runs_behind_waits_for_them() {
    let site = Site::start(&["--lanes", "1"]).await;
    let attacker = site.attacker().await;
    let stubborn = attacker.model(onnx::stubborn(1 << 24)).await;
    let op = || model_run(stubborn.id(), vec![named("x", f32s(&[1, 1], 4))], &[]);
    refused("load", attacker.run(model_run(stubborn.id(), vec![], &[])).await, Reason::BadArgument, "inputs");
    let mut left_behind = 0;
    let refusal = loop {
        let late = attacker.send(timed(&attacker, op(), Duration::from_millis(300))).await;
        // The lane is free although the engine has not stopped.
        site.serves_others().await;
        match late {
            Err(error) if error.reason() == Reason::Deadline => left_behind += 1,
            other => break refused("one more", other, Reason::QuotaExceeded, ""),
        }
    };
    assert!((4..100).contains(&left_behind), "{left_behind} runs");
    assert!(
        matches!(refusal.detail(), Detail::Limit { limit: 4, unit, .. } if unit == "runs"),
        "{refusal:?}"
    );
    attacker.session.noop().await.unwrap();
    site.serves_others().await;
}
