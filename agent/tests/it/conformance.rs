//! Every operation of the agent's list against one table: what it serves, and how each thing that can be wrong with a
//! request is refused. An operation without a row fails.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tonic::Request;
use vaccel_client::proto::error::Detail;
use vaccel_client::proto::limits::{
    IMAGES_PER_CALL_MAX, MBENCH_MS_MAX, MESSAGE_BYTES_MAX, TENSORS_PER_CALL_MAX,
};
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::*;
use vaccel_client::{
    Client, DType, Error, Reason, ResourceFiles, Session, SessionOptions, Tensor, arg, named, room,
};

use crate::exec::compiled;
use crate::support::{Agent, digits, onnx, read, seer};

/// Requests by the model, by tensors, and by both.
type OpOn<'a> = &'a dyn Fn(&str) -> Op;
type OpWith<'a> = &'a dyn Fn(Vec<NamedTensor>) -> Op;
type RunOf<'a> = &'a dyn Fn(&str, Vec<NamedTensor>) -> Op;

/// What a request is refused with.
struct Wrong {
    what: &'static str,
    op: Op,
    reason: Reason,
    /// The field at fault; empty where it is not one field.
    field: &'static str,
}

/// What holds for one operation.
struct Row {
    valid: Op,
    wrong: Vec<Wrong>,
}

/// Two tenants of one agent; the first one's session holds a model, a file of data and a library.
struct Site {
    agent: Agent,
    client: Client,
    session: Session,
    model: String,
    seer: String,
    data: String,
    library: String,
}

impl Site {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("agent.toml"), "[[policy]]\ntenant = '*'\nexec = true\n").unwrap();
        let flags = ["--config", "{}/agent.toml"];
        let agent = Agent::start_in(folder, &["unix://{}/a", "unix://{}/b"], &flags);
        let client = agent.guest(0).await;
        let session = client.open_session(SessionOptions::default()).await.unwrap();
        let model = session.register(ResourceFiles::model("m.onnx", onnx::add())).await.unwrap();
        let seer = session.register(ResourceFiles::new(ResourceKind::Model, seer::files())).await.unwrap();
        let data = vec![("d".into(), Bytes::from_static(b"no model"))];
        let data = session.register(ResourceFiles::new(ResourceKind::Data, data)).await.unwrap();
        let library = compiled(agent.folder(), "library.c", &["-lm"]);
        let library = ResourceFiles::new(ResourceKind::Library, vec![("library.so".into(), library.into())]);
        let library = session.register(library).await.unwrap().id().to_owned();
        for load in [tf_load(model.id()), tflite_load(model.id()), torch_load(model.id())] {
            run(&client, &session.id(), load).await.unwrap();
        }
        let [model, seer, data] = [model, seer, data].map(|resource| resource.id().to_owned());
        Self { agent, client, session, model, seer, data, library }
    }
}

async fn run(client: &Client, session: &str, op: Op) -> Result<RunReply, Error> {
    send(client, Request::new(RunRequest { session: session.into(), op: Some(op), ..RunRequest::default() }))
        .await
}

async fn send(client: &Client, request: Request<RunRequest>) -> Result<RunReply, Error> {
    let mut operations =
        OperationsClient::new(client.link().clone()).max_encoding_message_size(2 * MESSAGE_BYTES_MAX);
    let reply = operations.run(request).await;
    reply.map(tonic::Response::into_inner).map_err(|status| Error::from_status(&status))
}

fn tf_load(model: &str) -> Op {
    Op::TfModelLoad(TfModelLoadRequest { model: model.into() })
}

fn tflite_load(model: &str) -> Op {
    Op::TfliteModelLoad(TfliteModelLoadRequest { model: model.into() })
}

fn torch_load(model: &str) -> Op {
    Op::TorchModelLoad(TorchModelLoadRequest { model: model.into() })
}

fn f32s(shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|value| value as f32).collect();
    Tensor::new(shape, &values).unwrap()
}

fn f64s(count: i64) -> Tensor {
    let values: Vec<f64> = (0..count).map(|value| value as f64).collect();
    Tensor::new(&[count], &values).unwrap()
}

/// The same elements with another type of the same size.
fn typed(dtype: DType, tensor: Tensor) -> Tensor {
    Tensor { dtype: dtype.into(), ..tensor }
}

/// A tensor that says it is larger than it is.
fn short(tensor: Tensor) -> Tensor {
    Tensor { data: tensor.data.slice(1..), ..tensor }
}

fn tensors(all: Vec<Tensor>) -> Vec<NamedTensor> {
    all.into_iter().map(|tensor| named("", tensor)).collect()
}

fn wrong(what: &'static str, op: Op, reason: Reason, field: &'static str) -> Wrong {
    Wrong { what, op, reason, field }
}

fn bad(what: &'static str, op: Op, field: &'static str) -> Wrong {
    wrong(what, op, Reason::BadArgument, field)
}

fn row(valid: Op, wrong: Vec<Wrong>) -> Row {
    Row { valid, wrong }
}

const ABSENT: &str = "2222222222222222222222222222222222222222222222222222222222222222";

/// What can be wrong with tensors of which there are so many, of one type: the request for a list of them.
fn wrong_tensors(
    valid: &[Tensor],
    other: DType,
    list: &'static str,
    op: impl Fn(Vec<NamedTensor>) -> Op,
) -> Vec<Wrong> {
    let field = |name: &str| -> &'static str { format!("{list}[0]{name}").leak() };
    let with_first = |first: Tensor| {
        let mut all = valid.to_vec();
        all[0] = first;
        tensors(all)
    };
    let first = || valid[0].clone();
    let more = tensors([valid, &[first(), first()]].concat());
    let mut absent = tensors(valid.to_vec());
    absent[0].tensor = None;
    let many = vec![named("", first()); TENSORS_PER_CALL_MAX + 1];
    let mut endless = tensors(valid.to_vec());
    endless[0].name = "x".repeat(257);
    vec![
        bad("another type", op(with_first(typed(other, first()))), field(".dtype")),
        bad("no type", op(with_first(typed(DType::Unspecified, first()))), field(".dtype")),
        bad("too little data", op(with_first(short(first()))), field(".data")),
        bad("a negative size", op(with_first(Tensor { shape: vec![-1], ..first() })), field(".shape")),
        bad(
            "a size beyond all",
            op(with_first(Tensor { shape: vec![i64::MAX; 2], ..first() })),
            field(".shape"),
        ),
        bad("nine axes", op(with_first(Tensor { shape: vec![1; 9], ..first() })), field(".shape")),
        bad("one too many", op(more), list),
        bad("none", op(vec![]), list),
        bad("one that is not there", op(absent), field(".tensor")),
        bad("far too many", op(many), list),
        bad("an endless name", op(endless), field(".name")),
    ]
}

fn image_rows(site: &Site, table: &mut BTreeMap<&'static str, Row>) {
    let image = || read(&digits("png")[0].0);
    let classify = |model: &str, images: Vec<Bytes>| {
        Op::ImageClassification(ImageClassificationRequest { model: model.into(), top_k: 1, images })
    };
    let many = vec![image(); IMAGES_PER_CALL_MAX + 1];
    let wrong = vec![
        bad("no image", classify("", vec![]), "images"),
        bad("too many", classify("", many), "images"),
        bad("what is no image", classify("", vec![Bytes::from_static(b"no image")]), "images[0]"),
        bad("a resource that is no model", classify(&site.data, vec![image()]), "model"),
        wrong("no such model", classify(ABSENT, vec![image()]), Reason::NotFound, ""),
        wrong("no classifier", classify(&site.model, vec![image()]), Reason::ModelRejected, ""),
    ];
    table.insert("image_classification", row(classify("", vec![image()]), wrong));
}

/// The operations on one image, by a model that tells the agent how.
fn sight_rows(site: &Site, table: &mut BTreeMap<&'static str, Row>) {
    let image = || seer::image([1, 0], [2, 3]);
    let none = Bytes::from_static(b"no image");
    let op = |of: fn(String, Bytes, i32) -> Op| {
        move |model: &str, image: Bytes| of(model.into(), image, Picture::Reply.into())
    };
    let rows = |op: &dyn Fn(&str, Bytes) -> Op, more: Vec<Wrong>| {
        let mut all = vec![
            bad("no model", op("", image()), "model"),
            bad("what is no image", op(&site.seer, none.clone()), "image"),
            bad("no image", op(&site.seer, Bytes::new()), "image"),
            bad("a resource that is no model", op(&site.data, image()), "model"),
            wrong("no such model", op(ABSENT, image()), Reason::NotFound, ""),
            wrong("a model that says nothing of images", op(&site.model, image()), Reason::ModelRejected, ""),
        ];
        all.extend(more);
        row(op(&site.seer, image()), all)
    };
    let model = || site.seer.clone();
    let detect = |threshold, at_most, picture| {
        let (model, image) = (model(), image());
        Op::ImageDetection(ImageDetectionRequest { model, image, threshold, at_most, picture })
    };
    let pose = |threshold, at_most, picture| {
        let (model, image) = (model(), image());
        Op::ImagePose(ImagePoseRequest { model, image, threshold, at_most, picture })
    };
    let found = |op: &dyn Fn(f32, u32, i32) -> Op, most: u32| {
        vec![
            bad("less than nothing", op(-0.5, 0, 0), "threshold"),
            bad("more than certain", op(1.5, 0, 0), "threshold"),
            bad("what is no number", op(f32::NAN, 0, 0), "threshold"),
            bad("too many", op(0.5, most + 1, 0), "at_most"),
            bad("another kind of picture", op(0.5, 1, 3), "picture"),
        ]
    };
    let detection = op(|model, image, picture| {
        Op::ImageDetection(ImageDetectionRequest { model, image, picture, ..Default::default() })
    });
    table.insert("image_detection", rows(&detection, found(&detect, 1000)));
    let body = op(|model, image, picture| {
        Op::ImagePose(ImagePoseRequest { model, image, picture, ..Default::default() })
    });
    table.insert("image_pose", rows(&body, found(&pose, 100)));
    let segmentation =
        op(|model, image, picture| Op::ImageSegmentation(ImageSegmentationRequest { model, image, picture }));
    table.insert("image_segmentation", rows(&segmentation, vec![]));
    let depth = op(|model, image, picture| Op::ImageDepth(ImageDepthRequest { model, image, picture }));
    table.insert("image_depth", rows(&depth, vec![]));
}

fn library_rows(site: &Site, table: &mut BTreeMap<&'static str, Row>) {
    let numbers = || [40_i32, 2].map(|number| arg(ArgType::Int32, number.to_le_bytes().to_vec())).to_vec();
    let exec = |library: &str, symbol: &str, read, bytes| {
        let (library, symbol, write) = (library.into(), symbol.into(), vec![room(ArgType::Int32, bytes)]);
        Op::Exec(ExecRequest { library, symbol, read, write })
    };
    let with = |resource: &str, symbol: &str, read, bytes| {
        let (resource, symbol, write) = (resource.into(), symbol.into(), vec![room(ArgType::Int32, bytes)]);
        Op::ExecWithResource(ExecWithResourceRequest { resource, symbol, read, write })
    };
    let too_large = |op| wrong("more than a process has room for", op, Reason::MessageTooLarge, "");
    let refused = |op| wrong("what its function refuses", op, Reason::BackendFailed, "");
    let by_name = vec![
        wrong("no such library", exec("absent.so", "add", numbers(), 4), Reason::NotFound, ""),
        wrong("a resource that is no library", exec(&site.data, "add", numbers(), 4), Reason::NotFound, ""),
        bad("no such function", exec("library.so", "missing", numbers(), 4), "symbol"),
        too_large(exec("library.so", "add", numbers(), 1 << 30)),
        refused(exec("library.so", "add", vec![], 4)),
    ];
    table.insert("exec", row(exec("/any/library.so", "add", numbers(), 4), by_name));
    let by_id = vec![
        wrong("no such library", with(ABSENT, "add", numbers(), 4), Reason::NotFound, ""),
        bad("a resource that is no library", with(&site.data, "add", numbers(), 4), "resource"),
        bad("no such function", with(&site.library, "missing", numbers(), 4), "symbol"),
        too_large(with(&site.library, "add", numbers(), 1 << 30)),
        refused(with(&site.library, "add", numbers(), 8)),
    ];
    table.insert("exec_with_resource", row(with(&site.library, "add", numbers(), 4), by_id));
}

fn model_rows(site: &Site, table: &mut BTreeMap<&'static str, Row>) {
    let x = || f32s(&[1, 2]);
    let model = |name: &str| name.to_owned();
    let add = |inputs| Op::ModelRun(ModelRunRequest { model: model(&site.model), outputs: vec![], inputs });
    let elsewhere = |name: &str| {
        let inputs = tensors(vec![x()]);
        Op::ModelRun(ModelRunRequest { model: model(name), outputs: vec![], inputs })
    };
    let outputs = |outputs: Vec<String>| {
        Op::ModelRun(ModelRunRequest { model: model(&site.model), outputs, inputs: tensors(vec![x()]) })
    };
    let mut all = wrong_tensors(&[x()], DType::I32, "inputs", add);
    all.extend([
        bad("another shape", add(tensors(vec![f32s(&[1, 3])])), "inputs[0].shape"),
        bad("a name there is none of", add(vec![named("z", x())]), "inputs[0].name"),
        bad("an output there is none of", outputs(vec!["z".into()]), "outputs"),
        bad("an output twice", outputs(vec!["y".into(), "y".into()]), "outputs"),
        bad("no model", elsewhere(""), "model"),
        bad("a resource that is no model", elsewhere(&site.data), "model"),
        wrong("no such model", elsewhere(ABSENT), Reason::NotFound, ""),
    ]);
    table.insert("model_run", row(add(tensors(vec![x()])), all));

    let tf = |name: &str, inputs: Vec<NamedTensor>| {
        let input = |named: NamedTensor| TfInput { name: named.name, id: 0, tensor: named.tensor };
        let inputs = inputs.into_iter().map(input).collect();
        Op::TfModelRun(TfModelRunRequest { model: model(name), inputs, ..Default::default() })
    };
    let tflite = |name: &str, inputs| {
        Op::TfliteModelRun(TfliteModelRunRequest { model: model(name), inputs, run_options: Bytes::new() })
    };
    let torch = |name: &str, inputs| {
        Op::TorchModelRun(TorchModelRunRequest { model: model(name), inputs, run_options: Bytes::new() })
    };
    let families: [(&str, RunOf<'_>); 3] =
        [("tf_model_run", &tf), ("tflite_model_run", &tflite), ("torch_model_run", &torch)];
    for (name, run) in families {
        let mut all = wrong_tensors(&[x()], DType::I32, "inputs", |inputs| run(&site.model, inputs));
        all.push(bad("another shape", run(&site.model, tensors(vec![f32s(&[1, 3])])), "inputs[0].shape"));
        all.push(wrong("no such model", run(ABSENT, tensors(vec![x()])), Reason::NotFound, ""));
        table.insert(name, row(run(&site.model, tensors(vec![x()])), all));
    }
    let loads: [(&str, OpOn<'_>); 3] =
        [("tf_model_load", &tf_load), ("tflite_model_load", &tflite_load), ("torch_model_load", &torch_load)];
    for (name, load) in loads {
        let all = vec![
            bad("a resource that is no model", load(&site.data), "model"),
            bad("no model", load(""), "model"),
            wrong("no such model", load(ABSENT), Reason::NotFound, ""),
        ];
        table.insert(name, row(load(&site.model), all));
    }
    let unloads: [(&str, OpOn<'_>); 3] = [
        ("tf_model_unload", &|name| Op::TfModelUnload(TfModelUnloadRequest { model: name.into() })),
        ("tflite_model_unload", &|name| {
            Op::TfliteModelUnload(TfliteModelUnloadRequest { model: name.into() })
        }),
        ("torch_model_unload", &|name| Op::TorchModelUnload(TorchModelUnloadRequest { model: name.into() })),
    ];
    for (name, unload) in unloads {
        let all = vec![wrong("no such model", unload(ABSENT), Reason::NotFound, "")];
        table.insert(name, row(unload(&site.model), all));
    }
}

fn product(m: i64, n: i64, k: i64, matrices: Vec<NamedTensor>) -> SgemmRequest {
    SgemmRequest { m, n, k, alpha: 1.0, beta: 0.0, lda: 0, ldb: 0, ldc: 0, matrices }
}

fn matrix_rows(table: &mut BTreeMap<&'static str, Row>) {
    let ab = || vec![f32s(&[2, 3]), f32s(&[3, 4])];
    let matrices = || tensors(ab());
    let sgemm = |matrices| Op::Sgemm(product(2, 4, 3, matrices));
    let changed = |change: &dyn Fn(&mut SgemmRequest)| {
        let mut request = product(2, 4, 3, matrices());
        change(&mut request);
        Op::Sgemm(request)
    };
    let huge = Op::Sgemm(product(1 << 20, 1 << 20, 0, tensors(vec![f32s(&[0]), f32s(&[0])])));
    let mut all = wrong_tensors(&ab(), DType::I32, "matrices", sgemm);
    all.extend([
        bad("a negative size", changed(&|request| request.m = -1), "m"),
        bad("a short row", changed(&|request| request.lda = 2), "lda"),
        bad("a negative row", changed(&|request| request.ldc = -4), "ldc"),
        bad("rows beyond all", changed(&|request| request.ldb = i64::MAX), "matrices[1].data"),
        bad("a larger product than its matrices", changed(&|request| request.k = 4), "matrices[0].data"),
        bad("beta without c", changed(&|request| request.beta = 1.0), "matrices"),
        wrong("a reply that nothing carries", huge, Reason::MessageTooLarge, ""),
    ]);
    table.insert("sgemm", row(sgemm(matrices()), all));

    let abc = || vec![f32s(&[2, 3]), f32s(&[3, 4]), f32s(&[2, 4])];
    let torch = |tensors| Op::TorchSgemm(TorchSgemmRequest { tensors });
    let mut all = wrong_tensors(&abc(), DType::I32, "tensors", torch);
    let unlike = tensors(vec![f32s(&[2, 3]), f32s(&[2, 4]), f32s(&[2, 4])]);
    all.push(bad("sizes that do not meet", torch(unlike), "tensors[1].shape"));
    table.insert("torch_sgemm", row(torch(tensors(abc())), all));

    let two = || vec![f32s(&[2, 2]), f32s(&[2, 2])];
    let unlike = || tensors(vec![f32s(&[2, 2]), f32s(&[3, 3])]);
    let mmult = |tensors| Op::FpgaMmult(FpgaMmultRequest { tensors });
    let parallel = |tensors| Op::FpgaParallel(FpgaParallelRequest { tensors });
    let vectoradd = |tensors| Op::FpgaVectoradd(FpgaVectoraddRequest { tensors });
    let ops: [(&str, OpWith<'_>); 3] =
        [("fpga_mmult", &mmult), ("fpga_parallel", &parallel), ("fpga_vectoradd", &vectoradd)];
    for (name, op) in ops {
        let mut all = wrong_tensors(&two(), DType::I32, "tensors", op);
        all.push(bad("unlike sizes", op(unlike()), "tensors[1].shape"));
        table.insert(name, row(op(tensors(two())), all));
    }
    let copy = |tensors| Op::FpgaArraycopy(FpgaArraycopyRequest { tensors });
    let ints = || vec![typed(DType::I32, f32s(&[3]))];
    table.insert(
        "fpga_arraycopy",
        row(copy(tensors(ints())), wrong_tensors(&ints(), DType::F32, "tensors", copy)),
    );
}

fn other_rows(table: &mut BTreeMap<&'static str, Row>) {
    table.insert("noop", row(Op::Noop(NoopRequest {}), vec![]));
    let minmax = |tensors| Op::Minmax(MinmaxRequest { low_threshold: 0, high_threshold: 2, tensors });
    let mut all = wrong_tensors(&[f64s(4)], DType::I64, "tensors", minmax);
    let crossed = MinmaxRequest { low_threshold: 3, high_threshold: 2, tensors: tensors(vec![f64s(4)]) };
    all.push(bad("bounds that cross", Op::Minmax(crossed), "low_threshold"));
    table.insert("minmax", row(minmax(tensors(vec![f64s(4)])), all));

    let pixels = || Tensor::new(&[2, 2, 3], &[7_u8; 12]).unwrap();
    let flip = |tensors| {
        let parameters = [("code".to_owned(), 1.0)].into();
        Op::Opencv(OpencvRequest { function: "flip".into(), parameters, tensors })
    };
    let unknown = OpencvRequest { function: "sharpen".into(), ..OpencvRequest::default() };
    let mut all = wrong_tensors(&[pixels()], DType::I8, "tensors", flip);
    all.push(bad("a function there is none of", Op::Opencv(unknown), "function"));
    table.insert("opencv", row(flip(tensors(vec![pixels()])), all));

    let mbench = |milliseconds| Op::Mbench(MbenchRequest { milliseconds });
    let long = bad("longer than may be", mbench(MBENCH_MS_MAX + 1), "milliseconds");
    table.insert("mbench", row(mbench(1), vec![long]));

    let genop = |read: Vec<Arg>| Op::Genop(GenopRequest { legacy: false, read, write: vec![] });
    let number = |number: u8| Arg { kind: 9, data: vec![number].into(), ..Arg::default() };
    let all = vec![
        bad("no number", genop(vec![]), "read[0]"),
        bad("an argument too many", genop(vec![number(0), number(0)]), "read"),
        bad("far too many", genop(vec![number(0); 257]), "read"),
        wrong("no such number", genop(vec![number(24)]), Reason::UnknownOperation, ""),
    ];
    table.insert("genop", row(genop(vec![number(0)]), all));
}

fn table(site: &Site) -> BTreeMap<&'static str, Row> {
    let mut table = BTreeMap::new();
    image_rows(site, &mut table);
    sight_rows(site, &mut table);
    model_rows(site, &mut table);
    matrix_rows(&mut table);
    other_rows(&mut table);
    library_rows(site, &mut table);
    table
}

#[tokio::test]
async fn every_operation_has_a_row_and_every_row_is_an_operation() {
    let site = Site::new().await;
    let operations = site.client.info().await.unwrap().operations;
    let mut known: Vec<String> = operations.into_iter().map(|operation| operation.name).collect();
    known.sort();
    assert_eq!(known, table(&site).into_keys().collect::<Vec<_>>());
}

#[tokio::test]
async fn what_is_right_is_served_and_what_is_wrong_is_refused_by_its_field() {
    let site = Site::new().await;
    let session = site.session.id();
    let mut complaints = Vec::new();
    for (name, Row { valid, wrong }) in table(&site) {
        let reply =
            run(&site.client, &session, valid).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(reply.outcome.is_some() && reply.timings.is_some(), "{name}");
        if name.ends_with("_unload") {
            let family = name.trim_end_matches("_model_unload");
            let load = match family {
                "tf" => tf_load(&site.model),
                "tflite" => tflite_load(&site.model),
                _ => torch_load(&site.model),
            };
            run(&site.client, &session, load).await.unwrap();
        }
        for Wrong { what, op, reason, field } in wrong {
            match run(&site.client, &session, op).await {
                Ok(reply) => complaints.push(format!("{name}: {what}: {reply:?}")),
                Err(refusal) => {
                    let named = field.is_empty() || *refusal.detail() == Detail::Field(field.into());
                    if refusal.reason() != reason || !named {
                        complaints
                            .push(format!("{name}: {what}: expected {reason:?} {field}, got {refusal:?}"));
                    }
                }
            }
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[tokio::test]
async fn no_operation_runs_in_anothers_session_or_after_its_deadline_or_beyond_the_longest_message() {
    let site = Site::new().await;
    let stranger = site.agent.guest(1).await;
    let own = stranger.open_session(SessionOptions::default()).await.unwrap();
    for (name, Row { valid, .. }) in table(&site) {
        for session in [site.session.id(), "0".repeat(32)] {
            let refusal = run(&stranger, &session, valid.clone()).await.expect_err(name);
            assert_eq!(refusal.reason(), Reason::NotFound, "{name}: {refusal}");
            assert!(matches!(refusal.detail(), Detail::Resource { kind, .. } if kind == "session"), "{name}");
        }
        let mut late = Request::new(RunRequest {
            session: site.session.id(),
            op: Some(valid.clone()),
            ..RunRequest::default()
        });
        late.set_timeout(Duration::from_nanos(1));
        let refusal = send(&site.client, late).await.expect_err(name);
        assert_eq!(refusal.reason(), Reason::Deadline, "{name}: {refusal}");
        // What is around an operation is part of its message.
        let long =
            RunRequest { session: "s".repeat(MESSAGE_BYTES_MAX), op: Some(valid), ..RunRequest::default() };
        let refusal = send(&site.client, Request::new(long)).await.expect_err(name);
        assert_eq!(refusal.reason(), Reason::MessageTooLarge, "{name}: {refusal}");
    }
    own.noop().await.unwrap();
}

#[tokio::test]
async fn a_caller_that_leaves_leaves_nothing_behind() {
    let site = Site::new().await;
    for (name, Row { valid, .. }) in table(&site) {
        let session = site.session.id();
        let mut call = Box::pin(run(&site.client, &session, valid));
        // Sent, and not answered yet.
        let _ = std::future::poll_fn(|context| std::task::Poll::Ready(call.as_mut().poll(context))).await;
        drop(call);
        site.session.noop().await.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    // Nothing but the question itself is in flight in the end.
    while site.client.info().await.unwrap().usage.unwrap().calls_in_flight > 1 {
        tokio::task::yield_now().await;
    }
}
