//! What the guest writes by hand, read with the generated messages of the contract, and the other way round.

use prost::Message;
use prost::bytes::Bytes;
use vaccel_guest::{
    Arg, ArgOut, ArgType, DType, Detection, File, Guest, Input, Label, Output, ResourceId, ResourceKind,
};
use vaccel_proto::v1::{self, RunReply, RunRequest, run_reply::Outcome, run_request::Op};
use vaccel_proto::{carrier, limits};

use crate::peer::{Event, MODEL, SESSION, prefixed};
use crate::random::Random;
use crate::transport::Fake;
use crate::{flow, guest, opened, peer};

/// The calls that came, whole.
fn recording() -> (Guest<Fake>, std::rc::Rc<std::cell::RefCell<Vec<crate::peer::Call>>>) {
    let calls = std::rc::Rc::<std::cell::RefCell<Vec<_>>>::default();
    let own = calls.clone();
    let guest = guest(move |_, event| {
        if let Event::Asked(call) = event {
            own.borrow_mut().push(call.clone());
        }
        false
    });
    (guest, calls)
}

/// The same, with this answer to operations.
fn answering(body: Vec<u8>) -> (Guest<Fake>, std::rc::Rc<std::cell::RefCell<Vec<crate::peer::Call>>>) {
    let calls = std::rc::Rc::<std::cell::RefCell<Vec<_>>>::default();
    let (own, body) = (calls.clone(), prefixed(&body));
    let guest = opened(move |peer, event| {
        let Event::Asked(call) = event else { return false };
        own.borrow_mut().push(call.clone());
        if call.is("Run") {
            peer.reply_bytes(call.stream, &body);
        }
        call.is("Run")
    });
    (guest, calls)
}

/// Where `part` lies in `whole`.
fn position(whole: &[u8], part: &[u8]) -> usize {
    whole.windows(part.len()).position(|window| window == part).expect("the data is there")
}

const SIZES: [usize; 12] = [0, 1, 2, 15, 16, 17, 127, 128, 1024, 1025, 16_383, 70_000];

#[test]
fn small_requests_say_what_they_should() {
    let (mut guest, calls) = recording();
    guest.choose("tract", "cpu");
    guest.wish(0x4001);
    guest.noop().unwrap();
    guest.renew().unwrap();
    let model = flow::model(&mut guest);
    guest.unregister(&model).unwrap();
    guest.info().unwrap();
    guest.close().unwrap();
    guest.choose("", "");
    guest.wish(0);
    guest.open().unwrap();
    let calls = calls.borrow();
    let of = |method: &str| calls.iter().find(|call| call.path() == method).expect("it was called");
    let open = v1::OpenSessionRequest { device: "cpu".into(), engine: "tract".into(), hints: 0x4001 };
    assert_eq!(of("/vaccel.v1.Sessions/Open").message::<v1::OpenSessionRequest>(), open);
    let session = SESSION.to_owned();
    let run = RunRequest {
        session: session.clone(),
        op: Some(Op::Noop(v1::NoopRequest {})),
        ..RunRequest::default()
    };
    assert_eq!(of("/vaccel.v1.Operations/Run").message::<RunRequest>(), run);
    let renew = v1::RenewSessionRequest { session: session.clone() };
    assert_eq!(of("/vaccel.v1.Sessions/Renew").message::<v1::RenewSessionRequest>(), renew);
    let close = v1::CloseSessionRequest { session: session.clone() };
    assert_eq!(of("/vaccel.v1.Sessions/Close").message::<v1::CloseSessionRequest>(), close);
    let unregister = v1::UnregisterResourceRequest { session, resource: MODEL.into(), all: false };
    assert_eq!(of("/vaccel.v1.Resources/Unregister").message::<v1::UnregisterResourceRequest>(), unregister);
    assert!(of("/vaccel.v1.Agent/Info").message::<v1::InfoRequest>() == v1::InfoRequest {});
    assert_eq!(calls.last().unwrap().body, [0; 5], "the agent's choice is an empty message");
}

#[test]
fn images_of_every_size_are_sent_as_they_are() {
    let (mut guest, calls) = recording();
    let model = flow::model(&mut guest);
    for (count, top_k) in [(1, 1), (2, 3), (16, 1), (16, 300)] {
        for (at, size) in SIZES.into_iter().enumerate() {
            let mut random = Random::new(size as u64);
            let images: Vec<_> =
                (0..count).map(|number| random.bytes(SIZES[(at + number) % SIZES.len()].min(size))).collect();
            let slices: Vec<&[u8]> = images.iter().map(|image| &image[..]).collect();
            let mut labels = vec![Label::default(); count * top_k];
            let model = Some(&model).filter(|_| size % 2 == 0);
            let (got, _) = guest.classify(model, &slices, &mut labels).unwrap();
            assert_eq!(got, labels.len());
            for (number, label) in labels.iter().enumerate() {
                assert_eq!((label.image as usize, label.index as usize), (number / top_k, number % top_k));
                assert_eq!(label.name.as_str(), format!("class {}", number % top_k));
                assert!((label.probability - 0.25).abs() < f32::EPSILON);
            }
            let request: RunRequest = calls.borrow().last().unwrap().message();
            let images = images.into_iter().map(Bytes::from).collect();
            let model = if model.is_some() { MODEL.into() } else { String::new() };
            let op = v1::ImageClassificationRequest { model, top_k: top_k as u32, images };
            assert_eq!(
                request,
                RunRequest {
                    session: SESSION.into(),
                    op: Some(Op::ImageClassification(op)),
                    ..RunRequest::default()
                }
            );
        }
    }
}

#[test]
fn an_image_is_sent_as_it_is_and_what_is_in_it_comes_back() {
    let (mut guest, calls) = recording();
    let model = flow::model(&mut guest);
    for (size, (threshold, count)) in
        SIZES.into_iter().zip([(0.0, 1), (0.5, 7), (1.0, 1000), (0.25, 1200)].iter().cycle())
    {
        let image = Random::new(size as u64).bytes(size);
        let mut detections = vec![Detection::default(); *count];
        let named = Some(&model).filter(|_| size % 2 == 0);
        let (got, timings) = guest.detect(named, &image, *threshold, &mut detections).unwrap();
        assert_eq!((got, timings.batch_size), ((*count).min(1000), 3));
        for (index, found) in detections.iter().take(got).enumerate() {
            let Detection { label, left, top, right, bottom } = found;
            assert_eq!(
                (label.index as usize, label.name.as_str()),
                (index, format!("class {index}").as_str())
            );
            assert_eq!(
                [label.probability, *left, *top, *right, *bottom],
                [*threshold, index as f32, -0.5, 1e9, 4.0]
            );
        }
        let request: RunRequest = calls.borrow().last().unwrap().message();
        let (image, at_most) = (image.into(), got as u32);
        let model = if named.is_some() { MODEL.into() } else { String::new() };
        let op = v1::ImageDetectionRequest { model, image, threshold: *threshold, at_most, picture: 0 };
        let op = Some(Op::ImageDetection(op));
        assert_eq!(request, RunRequest { session: SESSION.into(), op, ..RunRequest::default() });
    }
    assert!(guest.detect(Some(&model), b"", 0.0, &mut []).is_err());
}

/// The tensors of one run.
struct Tensors {
    names: Vec<String>,
    shapes: Vec<Vec<i64>>,
    data: Vec<Vec<u8>>,
    dtypes: Vec<u64>,
    outputs: Vec<String>,
}

impl Tensors {
    fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let count = [1, 1, 2, 3, 16][random.below(5)];
        let long = if count == 16 { 20 } else { 257 };
        let name = |random: &mut Random| "n".repeat([0, 1, 7, 127, 256][random.below(5)] % long);
        let shape = |random: &mut Random| {
            let mut dimension = |_| [0, 1, 127, 128, 1 << 40, -1][random.below(6)];
            (0..seed % 9).map(&mut dimension).collect::<Vec<i64>>()
        };
        let names: Vec<_> = (0..count).map(|_| name(&mut random)).collect();
        let outputs = (0..random.below(4)).map(|_| name(&mut random)).collect();
        let shapes = (0..count).map(|_| shape(&mut random)).collect();
        let dtypes = (0..count).map(|_| random.next() % 14).collect();
        let size = |random: &mut Random| SIZES[random.below(SIZES.len())] + random.below(20);
        let data = (0..count).map(|number| {
            let size = if number % 3 == 2 { 0 } else { size(&mut random) };
            random.bytes(size)
        });
        Self { names, shapes, data: data.collect(), dtypes, outputs }
    }

    fn inputs(&self) -> Vec<Input<'_>> {
        let input = |number: usize| Input {
            name: &self.names[number],
            dtype: DType::from_number(self.dtypes[number]),
            shape: &self.shapes[number],
            data: &self.data[number],
        };
        (0..self.names.len()).map(input).collect()
    }
}

#[test]
fn tensors_of_every_size_are_sent_as_they_are_and_begin_on_a_boundary() {
    let (mut guest, calls) = recording();
    let registered = flow::model(&mut guest);
    for seed in 0..500 {
        let sent = Tensors::of(seed);
        // The host's models have names of other lengths.
        let name = "m".repeat(1 + seed as usize % 64);
        let its = ResourceId::of_repository(&name).unwrap();
        let (model, named) = if seed % 2 == 0 { (registered, MODEL) } else { (its, &*name) };
        let names: Vec<&str> = sent.outputs.iter().map(String::as_str).collect();
        let mut places: Vec<_> = sent.data.iter().map(|data| vec![0; data.len()]).collect();
        let mut outputs: Vec<_> = places.iter_mut().map(|place| Output::new(place)).collect();
        let outcome = guest.run(&model, &sent.inputs(), &names, &mut outputs);
        if let Err(error) = outcome {
            panic!("{seed}: {error:?} {}", guest.message());
        }
        for (number, output) in outputs.iter().enumerate() {
            assert_eq!(output.dtype, DType::from_number(sent.dtypes[number]));
            assert_eq!(output.shape(), sent.shapes[number]);
            assert!(output.data[..output.length] == sent.data[number], "{seed}");
        }
        let calls = calls.borrow();
        let call = calls.last().unwrap();
        let request: RunRequest = call.message();
        let Some(Op::ModelRun(run)) = request.op else { panic!("a run of a model") };
        assert_eq!((request.session.as_str(), run.model.as_str()), (SESSION, named));
        assert_eq!(run.outputs, sent.outputs);
        assert_eq!(run.inputs.len(), sent.names.len());
        for (number, input) in run.inputs.iter().enumerate() {
            let tensor = input.tensor.as_ref().unwrap();
            assert_eq!(input.name, sent.names[number]);
            assert_eq!((tensor.dtype as u64, &tensor.shape), (sent.dtypes[number], &sent.shapes[number]));
            assert!(tensor.data == sent.data[number]);
            assert!(tensor.pad.len() < 64 && tensor.pad.iter().all(|byte| *byte == 0));
            if tensor.data.len() > 16 {
                let at = position(&call.body, &tensor.data);
                assert_eq!(at % 16, 0, "{seed}: input {number} begins at {at}");
            }
        }
    }
}

#[test]
fn pads_are_not_longer_than_those_of_the_contract() {
    let (mut guest, calls) = recording();
    let model = flow::model(&mut guest);
    for size in (0..400).chain(16_300..16_400) {
        let data = vec![9; size];
        let shape = [size as i64];
        let input = Input { name: "x", dtype: DType::U8, shape: &shape, data: &data };
        let mut place = vec![0; size];
        guest.run(&model, &[input], &["y"], &mut [Output::new(&mut place)]).unwrap();
        let own: RunRequest = calls.borrow().last().unwrap().message();
        let mut theirs = own.clone();
        let Some(Op::ModelRun(run)) = &mut theirs.op else { panic!("a run of a model") };
        run.inputs[0].tensor.as_mut().unwrap().pad = Bytes::new();
        carrier::Aligned::align(&mut theirs);
        assert!(own.encoded_len() <= theirs.encoded_len() + 16, "{size}");
    }
}

#[test]
fn files_are_described_and_sent_as_they_are() {
    let sizes = [0, 1, 127, 128, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (16 << 20) + 5];
    for (number, size) in sizes.into_iter().enumerate() {
        let content = Random::new(size as u64).bytes(size);
        let (expected, mut asked) = (content.clone(), 0);
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if call.is("Upload") {
                let mut at = 0;
                for (number, message) in call.messages().into_iter().enumerate() {
                    let message = v1::UploadRequest::decode(message).unwrap();
                    assert!(message.data.len() <= limits::CHUNK_BYTES_MAX);
                    assert_eq!(message.session.is_empty(), number > 0);
                    if number == 0 {
                        assert_eq!(
                            (message.session.as_str(), message.size),
                            (SESSION, expected.len() as u64)
                        );
                        assert_eq!(message.sha256.len(), 32);
                        at = message.offset as usize;
                    }
                    assert!(expected[at..].starts_with(&message.data));
                    at += message.data.len();
                }
                peer.reply(call.stream, &v1::UploadReply { offset: at as u64 });
                return true;
            }
            let request: v1::RegisterResourceRequest = call.message();
            let names: Vec<&str> = request.files.iter().map(|file| file.name.as_str()).collect();
            assert_eq!((request.session.as_str(), &names[..]), (SESSION, &["", "weights.bin"][..]));
            assert_eq!(
                request.files.iter().map(|file| file.size).collect::<Vec<_>>(),
                [1, expected.len() as u64]
            );
            asked += 1;
            let sha256 = request.files[1].sha256.clone();
            let missing = if asked == 1 { vec![v1::MissingFile { sha256, offset: 0 }] } else { vec![] };
            peer.reply(call.stream, &v1::RegisterResourceReply { resource: MODEL.into(), missing });
            true
        });
        let kind = [ResourceKind::Model, ResourceKind::Data, ResourceKind::Library][number % 3];
        let files = [File { name: "", content: b"x" }, File { name: "weights.bin", content: &content }];
        assert_eq!(guest.register(kind, &files).unwrap().as_str(), MODEL);
    }
}

#[test]
fn what_the_agent_is_is_read_whole() {
    let operation = |name: &str| v1::OperationInfo { name: name.into(), summary: "says nothing".repeat(30) };
    let engine = |name: &str, absent: &str| v1::EngineInfo {
        name: name.into(),
        version: "1.2".into(),
        devices: vec!["cpu".into(), "cuda".into()],
        absent_because: absent.into(),
        hints: 1,
    };
    let reply = v1::InfoReply {
        version: "1.2.3".into(),
        tenant: "unix:/s".into(),
        operations: vec![operation("noop"), operation("model_run")],
        engines: vec![engine("tract", ""), engine("onnxruntime", "not installed"), engine("other", "")],
        limits: Some(v1::Limits {
            message_bytes_max: 32 << 20,
            session_lease_ms: 60_000,
            ..Default::default()
        }),
        usage: Some(v1::Usage { sessions: 1, calls_in_flight: 2, resource_bytes: 3, cached_bytes: 4 }),
    };
    for manner in [1, usize::MAX] {
        let reply = reply.clone();
        let mut guest = guest(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            peer.reply(call.stream, &reply);
            true
        });
        guest.transport().manner.read = manner;
        let info = guest.info().unwrap();
        assert_eq!((info.version.as_str(), info.tenant.as_str()), ("1.2.3", "unix:/s"));
        assert_eq!((info.operations.as_str(), info.engines.as_str()), ("noop model_run", "tract other"));
        assert_eq!((info.message_bytes_max, info.session_lease_ms), (32 << 20, 60_000));
        assert_eq!(peer(&mut guest).asked, ["/vaccel.v1.Agent/Info"], "no session is needed");
    }
}

#[test]
fn shapes_and_labels_may_be_coded_in_every_allowed_way() {
    // A shape number by number and in two pieces, fields twice and in another order, unknown fields of every kind.
    let tensor = [
        &[0x12, 0x01, 0x02][..],
        &[0x10, 0x03],
        &[0x12, 0x01, 0x04],
        &[0x22, 0x02, b'h', b'i'],
        &[0x08, 0x02],
    ];
    let tensor = tensor.concat();
    let unknown =
        [&[0x78, 0x01][..], &[0x79, 1, 2, 3, 4, 5, 6, 7, 8], &[0x7d, 1, 2, 3, 4], &[0x7a, 0x01, 0x07]]
            .concat();
    let named = [&unknown[..], &[0x12, tensor.len() as u8], &tensor, &[0x0a, 0x01, b'y']].concat();
    let run = [&[0x0a, named.len() as u8][..], &named, &unknown].concat();
    let reply = [&[0x92, 0x01, run.len() as u8][..], &run, &unknown, &[0x0a, 0x02, 0x18, 0x05]].concat();
    assert!(matches!(RunReply::decode(&reply[..]).unwrap().outcome, Some(Outcome::ModelRun(_))));
    for manner in [1, usize::MAX] {
        let body = prefixed(&reply);
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if call.is("Run") {
                peer.reply_bytes(call.stream, &body);
            }
            call.is("Run")
        });
        guest.transport().manner.read = manner;
        let model = flow::model(&mut guest);
        let mut place = [0; 3];
        let mut outputs = [Output::new(&mut place)];
        assert_eq!(guest.run(&model, &[], &[], &mut outputs).unwrap().batch_size, 5);
        let [Output { data, length, dtype, rank, shape }] = outputs;
        assert_eq!((&data[..length], dtype, &shape[..rank]), (&b"hi"[..], DType::U8, &[2, 3, 4][..]));
    }
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    for shape in [&[1; 9][..], &[0x80], &[1, 0xff], &[0xff; 11]] {
        for packed in [true, false] {
            let mut tensor = Vec::new();
            if packed {
                tensor = [&[0x12, shape.len() as u8][..], shape].concat();
            } else {
                shape.iter().for_each(|byte| tensor.extend_from_slice(&[0x10, *byte]));
            }
            let named = [&[0x12, tensor.len() as u8][..], &tensor].concat();
            let run = [&[0x0a, named.len() as u8][..], &named].concat();
            let body = prefixed(&[&[0x92, 0x01, run.len() as u8][..], &run].concat());
            let mut guest = opened(move |peer, event| {
                let Event::Asked(call) = event else { return false };
                if call.is("Run") {
                    peer.reply_bytes(call.stream, &body);
                }
                call.is("Run")
            });
            let model = flow::model(&mut guest);
            let outcome = guest.run(&model, &[], &[], &mut [Output::new(&mut [0])]);
            crate::fails(&guest, outcome, vaccel_guest::Reason::BackendFailed, "no message of the contract");
        }
    }
}

/// Requests for generic operations with arguments of many sizes, as the contract's own encoding reads them.
#[test]
fn generic_operations_say_what_they_should_and_get_what_comes() {
    for size in SIZES {
        let reply = v1::GenopReply {
            write: vec![
                v1::Arg { kind: 26, data: vec![5; size].into(), ..Default::default() },
                v1::Arg { kind: 19, data: vec![6; 8].into(), ..Default::default() },
            ],
        };
        let timings = v1::Timings { queue_us: 1, run_us: 2, batch_size: 3 };
        let outcome = Some(Outcome::Genop(reply));
        let body =
            v1::RunReply { timings: Some(timings), outcome, ..v1::RunReply::default() }.encode_to_vec();
        let (mut guest, calls) = answering(body);
        let data = vec![7; size];
        let read = [
            Arg { kind: ArgType::UINT8, data: &[17] },
            Arg { kind: ArgType::BUFFER, data: &data },
            Arg { kind: ArgType::STRING, data: b"text\0" },
        ];
        let (mut first, mut second) = (vec![0; size], [0; 9]);
        let mut write = [
            ArgOut { before: &data, ..ArgOut::new(ArgType::UCHAR_ARRAY, &mut first) },
            ArgOut::new(ArgType::FLOAT64, &mut second),
        ];
        let took = guest.genop(&read, &mut write).unwrap();
        assert_eq!((took.queue_us, took.run_us, took.batch_size), (1, 2, 3));
        assert_eq!([write[0].length, write[1].length], [size, 8]);
        assert!(first.iter().all(|byte| *byte == 5) && second == [6, 6, 6, 6, 6, 6, 6, 6, 0]);
        let arg =
            |kind, size, data: &[u8]| v1::Arg { kind, size, data: data.to_vec().into(), custom_kind: 0 };
        let expected = v1::GenopRequest {
            legacy: false,
            read: vec![arg(9, 0, &[17]), arg(28, 0, &data), arg(27, 0, b"text\0")],
            write: vec![arg(26, 0, &data), arg(19, 9, &[])],
        };
        let calls = calls.borrow();
        let run = calls.iter().find(|call| call.is("Run")).unwrap().message::<RunRequest>();
        assert_eq!(run.op, Some(Op::Genop(expected)));
    }
}

#[test]
fn arguments_that_find_no_place_are_told() {
    let arg = |length: usize| v1::Arg { kind: 26, data: vec![5; length].into(), ..Default::default() };
    for (write, text) in [
        (vec![arg(4), arg(5)], "write[1]: expected a place for 5 bytes"),
        (vec![arg(4), arg(4), arg(1)], "write[2]: expected a place for 1 bytes"),
    ] {
        let outcome = Some(Outcome::Genop(v1::GenopReply { write }));
        let (mut guest, _) =
            answering(v1::RunReply { timings: None, outcome, ..v1::RunReply::default() }.encode_to_vec());
        let (mut first, mut second) = ([0; 4], [0; 4]);
        let mut write = [&mut first, &mut second].map(|data| ArgOut::new(ArgType::UCHAR_ARRAY, data));
        let outcome = guest.genop(&[Arg { kind: ArgType::UINT8, data: &[1] }], &mut write);
        let lengths = write.each_ref().map(|arg| arg.length);
        let error = crate::fails(&guest, outcome, vaccel_guest::Reason::BadArgument, text);
        assert!(error.may_have_run && (lengths == [4, 5] || lengths == [4, 4]));
    }
    let (mut guest, _) = answering(Vec::new());
    let outcome = guest.genop(&[Arg { kind: ArgType::UINT8, data: &[1] }; 17], &mut []);
    crate::fails(&guest, outcome, vaccel_guest::Reason::BadArgument, "16 arguments");
}

#[test]
fn numbers_and_limits_are_those_of_the_contract() {
    for number in 0..20 {
        let own = DType::from_number(number);
        match v1::DType::try_from(number as i32) {
            Ok(theirs) => {
                assert_eq!((own as i32, own.size()), (theirs as i32, theirs.size()));
                assert_eq!(format!("{own:?}"), format!("{theirs:?}"));
            }
            Err(_) => assert_eq!(own, DType::Unspecified),
        }
    }
    for (own, theirs) in [
        (ResourceKind::Model, v1::ResourceKind::Model),
        (ResourceKind::Data, v1::ResourceKind::Data),
        (ResourceKind::Library, v1::ResourceKind::Library),
    ] {
        assert_eq!(own as i32, theirs as i32);
    }
    for (own, theirs) in [
        (ArgType::RAW, v1::ArgType::Raw),
        (ArgType::INT64, v1::ArgType::Int64),
        (ArgType::UINT8, v1::ArgType::Uint8),
        (ArgType::FLOAT32_ARRAY, v1::ArgType::Float32Array),
        (ArgType::UCHAR_ARRAY, v1::ArgType::UcharArray),
        (ArgType::STRING, v1::ArgType::String),
        (ArgType::CUSTOM, v1::ArgType::Custom),
    ] {
        assert_eq!(own.0, theirs as u32);
    }
    assert_eq!(vaccel_guest::RANK_MAX, limits::TENSOR_RANK_MAX);
    const { assert!(vaccel_guest::ITEMS_MAX <= limits::TENSORS_PER_CALL_MAX) };
    const { assert!(vaccel_guest::ITEMS_MAX <= limits::IMAGES_PER_CALL_MAX) };
    const { assert!(vaccel_guest::FILES_MAX <= limits::FILES_PER_RESOURCE_MAX) };
    assert_eq!(SESSION.len(), 2 * limits::SESSION_ID_BYTES);
    // The longest names, and the longest message: in `sessions`.
    let (mut guest, _) = recording();
    let model = flow::model(&mut guest);
    let longest = "n".repeat(limits::NAME_BYTES_MAX);
    let input = |name| Input { name, dtype: DType::U8, shape: &[1; limits::TENSOR_RANK_MAX], data: &[1] };
    guest.run(&model, &[input(&longest)], &[], &mut [Output::new(&mut [0])]).unwrap();
    let longer = "n".repeat(limits::NAME_BYTES_MAX + 1);
    guest.run(&model, &[input(&longer)], &[], &mut [Output::new(&mut [0])]).unwrap_err();
}
