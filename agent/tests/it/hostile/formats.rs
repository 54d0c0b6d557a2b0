//! TensorFlow and TensorFlow Lite files that are broken or traps.

use bytes::Bytes;
use vaccel_client::{Error, Reason, Tensor, named};

use super::{ATTACK_BYTES_MAX, Attacker, Site, model_run, refused};
use crate::support::onnx::{self, Message};
use crate::support::tensorflow::{self as tf, F32, I32, with};
use crate::support::tflite::{self as lite, Lite, Table, Value};
use crate::support::{read, repository};

/// 2^30 numbers of four bytes.
const LARGE: i32 = 1 << 30;

/// Numbers without order, the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

fn file(name: &str) -> Bytes {
    read(&repository().join("agent/tests/data/formats").join(name))
}

/// Registers a model, runs it on an image, and lets it go.
async fn run_on_image(attacker: &Attacker, content: Bytes) -> Result<Tensor, Error> {
    let model = attacker.model(content).await;
    let image = Tensor::new(&[1, 8, 8, 3], &[0.5_f32; 192]).unwrap();
    let outcome = attacker.output(&model, image).await;
    attacker.session.unregister(&model).await.unwrap();
    outcome
}

/// A file that is not what it was is run, refused as a model, or fails as one call; never more.
#[track_caller]
fn contained(what: &str, outcome: Result<Tensor, Error>) {
    let allowed =
        [Reason::ModelRejected, Reason::BadArgument, Reason::BackendFailed, Reason::MessageTooLarge];
    if let Err(error) = outcome {
        assert!(allowed.contains(&error.reason()), "{what}: {error:?}");
        assert!(!error.message().contains(".rs:"), "{what}: {error}");
    }
}

#[tokio::test]
async fn files_that_were_cut_off_are_rejected() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    for name in ["net.pb", "net.tflite", "net.onnx", "two.pb", "two.tflite"] {
        let whole = file(name);
        for part in 0..64 {
            let cut = whole.slice(..whole.len() * part / 64);
            let outcome = run_on_image(&attacker, cut).await;
            // A graph that ends between two nodes is a whole one.
            if name.ends_with(".pb") {
                contained(name, outcome);
            } else {
                refused(&format!("{part}/64 of {name}"), outcome, Reason::ModelRejected, "");
            }
        }
        site.serves_others().await;
    }
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
}

#[tokio::test]
async fn files_with_other_bytes_do_not_end_the_agent() {
    const FILES: usize = 400;
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for name in ["net.pb", "net.tflite", "two.tflite"] {
        let whole = file(name);
        for round in 0..FILES {
            let mut broken = whole.to_vec();
            for _ in 0..=random.below(8) {
                let at = random.below(broken.len());
                broken[at] = match random.below(3) {
                    0 => 0xff,
                    1 => 0,
                    _ => random.below(256).to_le_bytes()[0],
                };
            }
            contained(&format!("{name}, {round}"), run_on_image(&attacker, broken.into()).await);
        }
        site.serves_others().await;
    }
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
}

/// Bytes inside the structure of a small file, each by each: offsets, counts, kinds, sizes.
#[tokio::test]
async fn every_byte_of_the_structure_may_be_anything() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    for name in ["two.tflite", "two.pb"] {
        let whole = file(name);
        for at in 0..whole.len() {
            for value in [0xff, 0x80] {
                let mut broken = whole.to_vec();
                broken[at] ^= value;
                contained(&format!("{name}, {at}"), run_on_image(&attacker, broken.into()).await);
            }
        }
        site.serves_others().await;
    }
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
}

fn pool(width: i32, height: i32) -> Option<(i8, Table)> {
    const OPTIONS: i8 = 5;
    let one = || Value::I32(1);
    let sides = vec![(1, one()), (2, one()), (3, Value::I32(width)), (4, Value::I32(height))];
    Some((OPTIONS, sides))
}

/// `y` of an operator on a constant.
fn on_constant(number: i32, shape: &[i32], parameter: &[i32], rank: i32) -> Bytes {
    let mut model = Lite::default();
    let x = model.tensor("x", lite::F32, &[1, 2]);
    let one = model.f32s("one", shape, &[1.0]);
    let columns = if number == lite::PAD { vec![rank, 2] } else { vec![rank] };
    let parameter = model.i32s("parameter", &columns, parameter);
    let (grown, y) = (model.tensor("grown", lite::F32, &[1]), model.tensor("y", lite::F32, &[1, 2]));
    let resize = if number == lite::RESIZE_BILINEAR { Some((15, vec![])) } else { None };
    model.operator(number, &[one, parameter], &[grown], resize);
    model.operator(lite::ADD, &[x, grown], &[y], Some((11, vec![])));
    (model.inputs, model.outputs) = (vec![x], vec![y]);
    model.finish()
}

fn lite_traps() -> Vec<(&'static str, Bytes)> {
    let single = |number, shapes: (&[i32], &[i32]), parameter: &[i32]| {
        lite::single(number, shapes, Some(parameter), None)
    };
    let declared = lite::single(lite::LOGISTIC, (&[LARGE, LARGE], &[1]), None, None);
    let many = |shape: &[i32]| lite::single(lite::LOGISTIC, (&[1, 2], shape), None, None);
    let mut bytes_missing = Lite::default();
    let x = bytes_missing.tensor("x", lite::F32, &[1, 2]);
    let weights = bytes_missing.constant("w", lite::F32, &[LARGE], vec![0; 8]);
    let y = bytes_missing.tensor("y", lite::F32, &[1, 2]);
    bytes_missing.operator(lite::ADD, &[x, weights], &[y], Some((11, vec![])));
    (bytes_missing.inputs, bytes_missing.outputs) = (vec![x], vec![y]);
    let (one, image): (&[i32], &[i32]) = (&[1, 2], &[1, 8, 8, 1]);
    let window = |width, height| lite::single(lite::MAX_POOL_2D, (image, image), None, pool(width, height));
    let mut without = Lite::default();
    let x = without.tensor("x", lite::F32, one);
    let y = without.tensor("y", lite::F32, one);
    without.operator(lite::ADD, &[x, -1], &[y], Some((11, vec![])));
    (without.inputs, without.outputs) = (vec![x], vec![y]);
    vec![
        ("a declared input of 4 EiB", declared),
        ("a declared output of 4 GiB", many(&[LARGE])),
        ("a negative dimension", many(&[-5, 2])),
        ("a constant of 4 GiB in 8 bytes", bytes_missing.finish()),
        ("a constant spread to 4 GiB", on_constant(lite::BROADCAST_TO, &[1], &[LARGE], 1)),
        ("a constant padded to 4 GiB", on_constant(lite::PAD, &[1], &[0, LARGE], 1)),
        (
            "a constant image of 2^60 pixels",
            on_constant(lite::RESIZE_BILINEAR, &[1, 1, 1, 1], &[LARGE, LARGE], 2),
        ),
        ("an input spread to 4 GiB", single(lite::BROADCAST_TO, (one, one), &[LARGE / 2, 2])),
        ("an input spread by 2^90", single(lite::BROADCAST_TO, (one, one), &[LARGE, LARGE, LARGE])),
        ("an input padded to 8 GiB", {
            let mut model = Lite::default();
            let (x, y) = (model.tensor("x", lite::F32, one), model.tensor("y", lite::F32, one));
            let amounts = model.i32s("amounts", &[2, 2], &[0, LARGE, 0, 0]);
            model.operator(lite::PAD, &[x, amounts], &[y], None);
            (model.inputs, model.outputs) = (vec![x], vec![y]);
            model.finish()
        }),
        ("an order of axes without an end", single(lite::TRANSPOSE, (one, one), &[1, 1])),
        ("an order of axes that are not there", single(lite::TRANSPOSE, (one, one), &[0, 7])),
        ("a shape whose size wraps", single(lite::RESHAPE, (one, one), &[LARGE, LARGE, 16, 2])),
        ("a window of 2^60", window(LARGE, LARGE)),
        ("a window of -1 by -1", window(-1, -1)),
        ("a window over more channels than there are", {
            lite::single(lite::MAX_POOL_2D, (image, &[1, 8, 8, 100_000]), None, pool(2, 2))
        }),
        ("a window with steps of 0", {
            let steps = vec![(1, Value::I32(0)), (2, Value::I32(0)), (3, Value::I32(2)), (4, Value::I32(2))];
            lite::single(lite::MAX_POOL_2D, (image, image), None, Some((5, steps)))
        }),
        ("a pad of less than nothing", single(lite::PAD, (one, one), &[-1, 1, 0, 0])),
        ("an input left out", without.finish()),
        ("no operators", Lite::default().finish()),
        ("no graph", lite::file(&vec![(0, Value::I32(3))], b"TFL3")),
        ("only a mark", Bytes::from_static(b"\0\0\0\0TFL3")),
        ("a table at the end", Bytes::from_static(b"\x08\0\0\0TFL3\xff\xff\xff\x7f")),
    ]
}

fn pooled(sides: &[i64]) -> Message {
    let attributes = vec![
        tf::type_attribute("T", F32),
        tf::list_attribute("ksize", sides),
        tf::list_attribute("strides", &[1, 1, 1, 1]),
        tf::text_attribute("padding", "SAME"),
        tf::text_attribute("data_format", "NHWC"),
    ];
    with(tf::node("MaxPool", "c", &["image"]), attributes)
}

/// `y = x + max(c)`, where `c` is what makes the trouble.
fn bomb(nodes: Vec<Message>) -> Bytes {
    let keep = || vec![tf::flag_attribute("keep_dims", false), tf::type_attribute("T", F32)];
    let end = vec![
        tf::placeholder("x", F32, &[1, 2]),
        tf::f32s("image", &[1, 1, 1, 1], &[1.0]),
        tf::f32s("scalar", &[], &[1.0]),
        tf::i32s("zero", &[], &[0]),
        tf::i32s("one", &[], &[1]),
        tf::i32s("axes", &[1], &[0]),
        with(tf::node("Max", "m", &["c", "axes"]), keep()),
        with(tf::node("AddV2", "y", &["x", "m"]), vec![tf::type_attribute("T", F32)]),
    ];
    tf::graph([nodes, end].concat())
}

fn graph_traps() -> Vec<(&'static str, Bytes)> {
    let large = i64::from(LARGE);
    let one = |op: &str, inputs: &[&str]| with(tf::node(op, "c", inputs), vec![tf::type_attribute("T", F32)]);
    let sizes = |values: &[i32]| tf::i32s("s", &[i64::try_from(values.len()).unwrap()], values);
    let many: Vec<Message> = (0..64).map(|index| tf::splat(&format!("c{index}"), &[1 << 20], 1.0)).collect();
    let joined = vec![with(tf::node("AddN", "c", &["c0", "c1"]), vec![tf::type_attribute("T", F32)])];
    let add = |name: &str, inputs: &[&str]| {
        with(tf::node("AddV2", name, inputs), vec![tf::type_attribute("T", F32)])
    };
    let deep = (0..200).fold(Message::default().bytes(1, "f"), |inner, _| {
        let entry = Message::default().bytes(1, "a").message(2, Message::default().message(10, inner));
        Message::default().bytes(1, "f").message(2, entry)
    });
    let nested = tf::node("Relu", "c", &["scalar"])
        .message(5, Message::default().bytes(1, "a").message(2, Message::default().message(10, deep)));
    vec![
        ("4 TiB in one number", bomb(vec![tf::splat("c", &[1 << 20, 1 << 20], 1.0)])),
        ("more than can be counted in one number", bomb(vec![tf::splat("c", &[large, large, large], 1.0)])),
        ("64 times 4 MiB in one number", bomb([many, joined].concat())),
        ("a negative dimension", bomb(vec![tf::splat("c", &[-5], 1.0)])),
        ("less data than dimensions", bomb(vec![tf::f32s("c", &[1 << 20], &[1.0, 2.0])])),
        ("4 GiB filled", bomb(vec![sizes(&[LARGE]), one("Fill", &["s", "scalar"])])),
        ("4 EiB filled", bomb(vec![sizes(&[LARGE, LARGE]), one("Fill", &["s", "scalar"])])),
        ("a constant 2^30 times", bomb(vec![sizes(&[LARGE, 1, 1, 1]), one("Tile", &["image", "s"])])),
        ("an input 2^31 times", bomb(vec![sizes(&[LARGE, 2]), one("Tile", &["x", "s"])])),
        (
            "numbers from 0 to 2^30",
            bomb(vec![
                tf::i32s("to", &[], &[LARGE]),
                with(tf::node("Range", "r", &["zero", "to", "one"]), vec![tf::type_attribute("Tidx", I32)]),
                with(
                    tf::node("Cast", "c", &["r"]),
                    vec![tf::type_attribute("SrcT", I32), tf::type_attribute("DstT", F32)],
                ),
            ]),
        ),
        ("a pad of 4 GiB", bomb(vec![tf::i32s("s", &[2, 2], &[0, LARGE, 0, 0]), one("Pad", &["x", "s"])])),
        ("a window of 2^60", bomb(vec![pooled(&[1, large, large, 1])])),
        ("a window of -1 by -1", bomb(vec![pooled(&[1, -1, -1, 1])])),
        ("an order of axes without an end", bomb(vec![sizes(&[1, 1]), one("Transpose", &["x", "s"])])),
        ("output 4 billion of a node", bomb(vec![add("c", &["x:4000000000", "x"])])),
        ("output 2^64 - 1 of a node", bomb(vec![add("c", &["x:18446744073709551615", "x"])])),
        ("a node that is not there", bomb(vec![add("c", &["nobody", "x"])])),
        ("a cycle", bomb(vec![add("c", &["d", "x"]), add("d", &["c", "x"])])),
        ("a name twice", bomb(vec![add("c", &["x", "x"]), add("c", &["x", "x"])])),
        (
            "a loop",
            bomb(vec![with(tf::node("Enter", "c", &["x"]), vec![tf::text_attribute("frame_name", "f")])]),
        ),
        ("attributes inside attributes", bomb(vec![nested])),
        ("a constant of 2^40 in two parts", bomb(vec![merged(&[1 << 20], &[1 << 20])])),
        ("a constant of 2^40 after one of 0", bomb(vec![merged_apart()])),
        ("only constants", tf::graph(vec![tf::f32s("c", &[1], &[1.0])])),
        ("no nodes", Message::default().message(4, Message::default().number(1, 1000)).finish()),
    ]
}

/// A constant whose tensor comes in two pieces, which add up.
fn merged(first: &[i64], second: &[i64]) -> Message {
    let dims = |dims: &[i64]| {
        dims.iter().fold(Message::default(), |shape, dim| {
            shape.message(2, Message::default().number(1, dim.cast_unsigned()))
        })
    };
    let tensor = |shape: &[i64]| Message::default().number(1, F32).message(2, dims(shape));
    let value = Message::default()
        .message(8, tensor(first).bytes(5, 1.0_f32.to_le_bytes()))
        .message(8, tensor(second));
    let entry = Message::default().bytes(1, "value").message(2, value);
    with(tf::node("Const", "c", &[]), vec![tf::type_attribute("dtype", F32), entry])
}

/// A constant whose first piece says that it is empty, and is then taken back.
fn merged_apart() -> Message {
    let shape = |dim: u64| Message::default().message(2, Message::default().number(1, dim));
    let tensor =
        |dim: u64| Message::default().number(1, F32).message(2, shape(dim)).bytes(5, 1.0_f32.to_le_bytes());
    let value = Message::default().message(8, tensor(0)).number(3, 1).message(8, tensor(1 << 40));
    let entry = Message::default().bytes(1, "value").message(2, value);
    with(tf::node("Const", "c", &[]), vec![tf::type_attribute("dtype", F32), entry])
}

async fn are_refused(traps: Vec<(&'static str, Bytes)>) {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    for (attack, content) in traps {
        let model = attacker.model(content).await;
        let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
        let outcome = attacker.run(model_run(model.id(), vec![named("", input)], &[])).await;
        let refusal = refused(attack, outcome, Reason::ModelRejected, "");
        assert!(!refusal.message().contains(".rs:"), "{attack}: {refusal}");
        attacker.session.unregister(&model).await.unwrap();
        let grown = site.agent.peak() - before;
        assert!(grown <= ATTACK_BYTES_MAX, "{attack}: {grown} bytes");
        site.serves_others().await;
    }
}

#[tokio::test]
async fn lite_models_that_are_traps_are_rejected() {
    are_refused(lite_traps()).await;
}

#[tokio::test]
async fn graphs_that_are_traps_are_rejected() {
    are_refused(graph_traps()).await;
}

/// ONNX has the same operators.
#[tokio::test]
async fn endless_orders_and_windows_of_onnx_are_rejected() {
    let shape = [1, 2];
    let ports = || (vec![onnx::port("x", onnx::F32, &shape)], vec![onnx::port("y", onnx::F32, &shape)]);
    let list = onnx::numbers_attribute;
    let model = |node: Message| {
        let (x, y) = ports();
        onnx::model(vec![node], vec![], x, y)
    };
    let same = Message::default().bytes(1, "auto_pad").bytes(4, "SAME_UPPER").number(20, 3);
    let pool = |side: u64| {
        let pool = onnx::node("MaxPool", &["x"], &["y"]).message(5, same.clone());
        model(pool.message(5, list("kernel_shape", &[side, side])))
    };
    let turn = onnx::node("Transpose", &["x"], &["y"]).message(5, list("perm", &[1, 1]));
    are_refused(vec![
        ("an order of axes without an end", model(turn)),
        ("a window of 2^60", pool(1 << 30)),
        ("a window of -1 by -1", pool(u64::MAX)),
    ])
    .await;
}

/// Files of a few bytes for each part: decoded, each part takes hundreds.
#[tokio::test]
async fn a_graph_of_endless_empty_parts_is_rejected_before_it_is_decoded() {
    const PARTS: usize = 8 << 20;
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    let input = || Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
    let first = || Message::default().message(1, tf::node("Relu", "y", &["x"]));
    let nodes = (0..PARTS).fold(first(), |graph, _| graph.bytes(1, []));
    let attributes = (0..PARTS).fold(tf::node("Relu", "y", &["x"]), |node, _| node.bytes(5, []));
    let inputs = (0..PARTS).fold(tf::node("Relu", "y", &["x"]), |node, _| node.bytes(3, []));
    for (attack, graph) in [
        ("nodes", nodes),
        ("attributes", Message::default().message(1, attributes)),
        ("inputs", Message::default().message(1, inputs)),
    ] {
        let model = attacker.model(graph.finish()).await;
        refused(attack, attacker.output(&model, input()).await, Reason::ModelRejected, "");
        attacker.session.unregister(&model).await.unwrap();
        site.serves_others().await;
    }
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
}

/// How large something becomes may follow from the call.
#[tokio::test]
async fn a_batch_that_asks_for_something_enormous_is_refused() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let columns = |count: i32| {
        let mut model = Lite::default();
        let (x, y) = (model.tensor("x", lite::F32, &[-1, 1]), model.tensor("y", lite::F32, &[-1, 1]));
        let amounts = model.i32s("amounts", &[2, 2], &[0, 0, 0, count]);
        model.operator(lite::PAD, &[x, amounts], &[y], None);
        (model.inputs, model.outputs) = (vec![x], vec![y]);
        model.finish()
    };
    let model = attacker.model(columns(1 << 20)).await;
    let rows = |rows: usize| Tensor::new(&[i64::try_from(rows).unwrap(), 1], &vec![1.0_f32; rows]).unwrap();
    let before = site.agent.peak();
    let output = attacker.output(&model, rows(2)).await.unwrap();
    assert_eq!(output.shape, [2, (1 << 20) + 1]);
    let refusal = attacker.output(&model, rows(1000)).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::BadArgument, "{refusal:?}");
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
    site.serves_others().await;
}
