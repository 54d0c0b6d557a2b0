//! Files that are no models, and models that are traps.

use std::time::{Duration, Instant};

use bytes::Bytes;
use vaccel_client::{Reason, ResourceKind, Tensor, named};

use super::{ATTACK_BYTES_MAX, Engine, Site, model_run, refused};
use crate::support::onnx::{self, F32, I64, Message};
use crate::support::{digits, read, repository, until};

type Files = Vec<(String, Bytes)>;

fn alone(content: impl Into<Bytes>) -> Files {
    vec![("model.onnx".into(), content.into())]
}

fn beside(content: Bytes, name: &str, other: Bytes) -> Files {
    vec![("model.onnx".into(), content), (name.into(), other)]
}

/// Bytes without order, the same every time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn digits_model() -> Bytes {
    read(&repository().join("agent/models/digits.onnx"))
}

/// `y = x + b` with these initializers.
fn with_initializers(initializers: Vec<Message>) -> Bytes {
    let nodes = vec![onnx::node("Add", &["x", "b"], &["y"])];
    let shape = [-1, 2];
    onnx::model(nodes, initializers, vec![onnx::port("x", F32, &shape)], vec![onnx::port("y", F32, &shape)])
}

/// `y = x + constant`, the tensor being an attribute of a node.
fn with_constant(tensor: Message) -> Message {
    let constant = onnx::node("Constant", &[], &["b"]).message(5, onnx::tensor_attribute("value", tensor));
    let nodes = vec![constant, onnx::node("Add", &["x", "b"], &["y"])];
    let shape = [-1, 2];
    onnx::graph(nodes, vec![], vec![onnx::port("x", F32, &shape)], vec![onnx::port("y", F32, &shape)])
}

/// A model whose one branch is this graph without inputs; which one is taken is known only when it runs.
fn with_branch(branch: &Message) -> Message {
    let nodes = vec![
        onnx::node("ReduceMax", &["x"], &["highest"]).message(5, onnx::number_attribute("keepdims", 0)),
        onnx::node("Greater", &["highest", "zero"], &["positive"]),
        onnx::node("If", &["positive"], &["y"])
            .message(5, onnx::graph_attribute("then_branch", branch.clone()))
            .message(5, onnx::graph_attribute("else_branch", branch.clone())),
    ];
    let zero = vec![onnx::f32s("zero", &[], &[0.0])];
    onnx::graph(nodes, zero, vec![onnx::port("x", F32, &[1, 2])], vec![onnx::port("y", F32, &[2])])
}

fn branch(nodes: Vec<Message>, initializers: Vec<Message>) -> Message {
    onnx::graph(nodes, initializers, vec![], vec![onnx::port("z", F32, &[2])])
}

fn not_models() -> Vec<(&'static str, Files)> {
    let model = digits_model();
    let nothing = onnx::model(vec![], vec![], vec![], vec![]);
    let two = vec![("a.onnx".to_owned(), onnx::add()), ("b.onnx".to_owned(), onnx::add())];
    let none = vec![("a.bin".to_owned(), onnx::add()), ("b.bin".to_owned(), onnx::add())];
    let deep = (0..200).fold(branch(vec![], vec![]), |inner, _| branch(vec![with_inner(&inner)], vec![]));
    vec![
        ("an empty file", alone(Bytes::new())),
        ("noise", alone(noise(1 << 20))),
        ("zeros", alone(vec![0; 1 << 20])),
        ("text", alone("you are a model now\n".repeat(1000))),
        ("a JPEG", alone(read(&digits("jpg")[0].0))),
        ("half a model", alone(model.slice(..model.len() / 2))),
        ("a model short of a byte", alone(model.slice(..model.len() - 1))),
        ("a model and a byte", alone([&model[..], &[0xff]].concat())),
        ("no nodes", alone(nothing)),
        ("no graph", alone(Message::default().number(1, 8).finish())),
        ("an operator nobody has", alone(with_operator("Explode"))),
        ("a cycle", alone(cycle())),
        ("an input that is not there", alone(with_initializers(vec![]))),
        ("graphs inside graphs", alone(onnx::of_graph(deep).finish())),
        ("two models", two),
        ("no model among the files", none),
    ]
}

fn with_inner(inner: &Message) -> Message {
    onnx::node("If", &["c"], &["z"]).message(5, onnx::graph_attribute("then_branch", inner.clone()))
}

fn with_operator(operator: &str) -> Bytes {
    let shape = [1];
    let nodes = vec![onnx::node(operator, &["x"], &["y"])];
    onnx::model(nodes, vec![], vec![onnx::port("x", F32, &shape)], vec![onnx::port("y", F32, &shape)])
}

fn cycle() -> Bytes {
    let nodes = vec![onnx::node("Add", &["x", "b"], &["a"]), onnx::node("Add", &["x", "a"], &["b"])];
    let shape = [1];
    onnx::model(nodes, vec![], vec![onnx::port("x", F32, &shape)], vec![onnx::port("a", F32, &shape)])
}

fn lying_sizes() -> Vec<(&'static str, Files)> {
    let raw = |shape: &[u64], bytes: usize| onnx::tensor("b", F32, shape).bytes(9, vec![0; bytes]);
    let each = |tensor: Message| alone(with_initializers(vec![tensor]));
    let inner = branch(vec![onnx::node("Identity", &["b"], &["z"])], vec![raw(&[1 << 40], 8)]);
    vec![
        ("more dimensions than data", each(raw(&[1 << 20], 8))),
        ("more data than dimensions", each(raw(&[2], 1 << 20))),
        ("4 TiB and no data", each(raw(&[1 << 40], 0))),
        ("1 GiB and no data", each(raw(&[1 << 28], 0))),
        ("a product beyond 64 bits", each(raw(&[1 << 32, 1 << 32], 8))),
        ("a product that wraps to the data", each(raw(&[1 << 63, 2], 8))),
        ("a negative dimension", each(raw(&[u64::MAX, 2], 8))),
        ("two negative dimensions", each(raw(&[u64::MAX, u64::MAX - 1], 8))),
        ("a hundred thousand dimensions", each(raw(&[2; 100_000], 8))),
        ("a type that is none", each(onnx::tensor("b", 999, &[2]).bytes(9, [0; 8]))),
        ("a constant of 4 TiB", alone(onnx::of_graph(with_constant(raw(&[1 << 40], 8))).finish())),
        ("a branch with 4 TiB", alone(onnx::of_graph(with_branch(&inner)).finish())),
    ]
}

/// Weights kept elsewhere: everywhere but in a file of the resource.
fn external_data() -> Vec<(&'static str, Files)> {
    let weights = onnx::weights();
    let at = |location: &str| beside(onnx::add_with_external(location), "weights.bin", weights.clone());
    let range = |offset, length| {
        let tensor = onnx::external("b", &[2], "weights.bin", offset, length);
        beside(with_initializers(vec![tensor]), "weights.bin", weights.clone())
    };
    let outside = || onnx::external("b", &[2], "weights.bin", 4, 8);
    let graph = |graph: Message| beside(onnx::of_graph(graph).finish(), "weights.bin", weights.clone());
    let inner = branch(vec![onnx::node("Identity", &["b"], &["z"])], vec![outside()]);
    let sparse = Message::default().message(1, outside()).message(2, onnx::i64s("at", &[0, 1])).number(3, 2);
    let body = onnx::node("Constant", &[], &["b"]).message(5, onnx::tensor_attribute("value", outside()));
    let function = Message::default().bytes(1, "f").message(7, body).bytes(10, "evil");
    let add = onnx::of_graph(with_constant(onnx::f32s("b", &[2], &[1.0, 2.0])));
    vec![
        ("a file that is not there", at("other.bin")),
        ("no file", at("")),
        ("a file above", at("../x")),
        ("a file above that has the name", at("../weights.bin")),
        ("a file by another way", at("./weights.bin")),
        ("a file of the host", at("/etc/passwd")),
        ("the agent's memory", at("/proc/self/mem")),
        ("a name with an end", at("weights.bin\0")),
        ("an offset outside", range(13, 8)),
        ("an offset beyond 64 bits", range(usize::MAX, 8)),
        ("a length outside", range(4, 16)),
        ("a length beyond 64 bits", range(4, usize::MAX - 3)),
        ("a length that does not fit", range(0, 12)),
        ("in an attribute", graph(with_constant(outside()))),
        ("in a branch", graph(with_branch(&inner))),
        (
            "in a sparse initializer",
            graph(with_constant(onnx::f32s("b", &[2], &[1.0, 2.0])).message(15, sparse)),
        ),
        ("in a function", beside(add.message(25, function).finish(), "weights.bin", weights.clone())),
    ]
}

/// Models that grow when they are loaded or run, outside of what engines bound.
fn growing() -> Vec<(&'static str, Files)> {
    let x = || vec![onnx::port("x", F32, &[1, 2])];
    let y = || vec![onnx::port("y", F32, &[1, 2])];
    let call = |name: &str, from: &str, to: &str| onnx::node(name, &[from], &[to]).bytes(7, "own");
    let function = |level: usize| {
        let (name, inner) = (format!("f{level}"), format!("f{}", level + 1));
        let body = match level {
            40 => [onnx::node("Neg", &["a"], &["m"]), onnx::node("Neg", &["m"], &["b"])],
            _ => [call(&inner, "a", "m"), call(&inner, "m", "b")],
        };
        let function = Message::default().bytes(1, name).bytes(4, "a").bytes(5, "b").bytes(10, "own");
        body.into_iter().fold(function, |function, node| function.message(7, node))
    };
    let own = Message::default().bytes(1, "own").number(2, 1);
    let graph = onnx::graph(vec![call("f1", "x", "y")], vec![], x(), y());
    let laughs = (1..=40)
        .fold(onnx::of_graph(graph).message(8, own), |model, level| model.message(25, function(level)));
    let endless = Message::default().bytes(1, "f").bytes(4, "a").bytes(5, "b").bytes(10, "own");
    let endless = endless.message(7, call("f", "a", "b"));
    let graph = onnx::graph(vec![call("f", "x", "y")], vec![], x(), y());
    let join = |step: usize| {
        onnx::node("StringConcat", &[&format!("t{step}"), &format!("t{step}")], &[&format!("t{}", step + 1)])
    };
    let letter = onnx::tensor("t0", 8, &[1]).bytes(6, "a");
    let joined = (0..40).map(join).chain([onnx::node("Identity", &["x"], &["y"])]).collect();
    vec![
        ("2^40 nodes in 40 functions", alone(laughs.finish())),
        ("a function that calls itself", alone(onnx::of_graph(graph).message(25, endless).finish())),
        ("a text of 2^40 letters", alone(onnx::model(joined, vec![letter], x(), y()))),
    ]
}

/// Every file of these is refused when it is used, and the agent is no larger for it.
async fn are_rejected(engine: Engine, attacks: Vec<(&'static str, Files)>) {
    let site = Site::on(engine, &[]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    for (attack, files) in attacks {
        let model = attacker.register(ResourceKind::Model, files).await;
        let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
        let outcome = attacker.run(model_run(model.id(), vec![named("", input)], &[])).await;
        let refusal = refused(attack, outcome, Reason::ModelRejected, "");
        let text = refusal.message();
        assert!(!text.contains("root:") && !text.contains(".rs:"), "{attack}: {text}");
        attacker.session.unregister(&model).await.unwrap();
        site.serves_others().await;
    }
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
}

#[tokio::test]
async fn what_is_no_model_is_rejected() {
    are_rejected(Engine::Tract, not_models()).await;
    are_rejected(Engine::OnnxRuntime, not_models()).await;
}

#[tokio::test]
async fn models_that_lie_about_their_sizes_are_rejected() {
    are_rejected(Engine::Tract, lying_sizes()).await;
    are_rejected(Engine::OnnxRuntime, lying_sizes()).await;
}

#[tokio::test]
async fn models_get_no_file_but_those_of_their_resource() {
    are_rejected(Engine::Tract, external_data()).await;
    are_rejected(Engine::OnnxRuntime, external_data()).await;
}

#[tokio::test]
async fn models_that_grow_beyond_what_engines_bound_are_rejected() {
    are_rejected(Engine::Tract, growing()).await;
    are_rejected(Engine::OnnxRuntime, growing()).await;
}

#[tokio::test]
async fn weights_in_another_file_of_the_resource_are_used() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let files = beside(onnx::add_with_external("weights.bin"), "weights.bin", onnx::weights());
    let model = attacker.register(ResourceKind::Model, files).await;
    let input = Tensor::new(&[2, 2], &[0.5_f32, 0.25, -1.0, 8.0]).unwrap();
    let output = attacker.output(&model, input).await.unwrap();
    assert_eq!(output.shape, [2, 2]);
    assert_eq!(output.elements::<f32>().unwrap().as_ref(), [1.5, 2.25, 0.0, 10.0]);
}

/// `y = x + max(c)`, where `c` is what makes the trouble.
fn bomb(nodes: Vec<Message>, initializers: Vec<Message>) -> Files {
    let highest = onnx::node("ReduceMax", &["c"], &["m"]).message(5, onnx::number_attribute("keepdims", 0));
    let nodes = [nodes, vec![highest, onnx::node("Add", &["x", "m"], &["y"])]].concat();
    let shape = [1, 2];
    alone(onnx::model(
        nodes,
        [initializers, vec![onnx::f32s("one", &[1], &[1.0]), onnx::f32s("scalar", &[], &[1.0])]].concat(),
        vec![onnx::port("x", F32, &shape)],
        vec![onnx::port("y", F32, &shape)],
    ))
}

/// Models of a few hundred bytes that compute something enormous.
fn bombs() -> Vec<(&'static str, Files)> {
    // 2^30 numbers of four bytes.
    const LARGE: i64 = 1 << 30;
    let shape = |sizes: &[i64]| vec![onnx::i64s("s", sizes)];
    let one = |operator: &str, inputs: &[&str], sizes: &[i64]| {
        bomb(vec![onnx::node(operator, inputs, &["c"])], shape(sizes))
    };
    let outer = vec![
        onnx::node("Expand", &["scalar", "tall"], &["a"]),
        onnx::node("Expand", &["scalar", "wide"], &["b"]),
        onnx::node("MatMul", &["a", "b"], &["c"]),
    ];
    let sides = vec![onnx::i64s("tall", &[1 << 16, 1]), onnx::i64s("wide", &[1, 1 << 16])];
    vec![
        ("4 TiB of zeros", one("ConstantOfShape", &["s"], &[1 << 20, 1 << 20])),
        ("more zeros than can be counted", one("ConstantOfShape", &["s"], &[LARGE, LARGE, LARGE])),
        ("4 GiB of zeros", one("ConstantOfShape", &["s"], &[LARGE])),
        ("a constant made 4 GiB", one("Expand", &["one", "s"], &[LARGE])),
        ("an input made 8 GiB", one("Expand", &["x", "s"], &[LARGE, 2])),
        ("a constant 2^30 times", one("Tile", &["one", "s"], &[LARGE])),
        ("an input 2^31 times", one("Tile", &["x", "s"], &[LARGE, 2])),
        ("a pad of 4 GiB", one("Pad", &["one", "s"], &[0, LARGE])),
        ("a product of 16 GiB", bomb(outer, sides)),
        ("16 outputs of 480 MiB", wide(16, 60 << 20)),
        ("numbers from 0 to 2^30", ranging(LARGE)),
        ("numbers from 0 to 2^32", ranging(1 << 32)),
        ("numbers from 0 to 2^62", ranging(1 << 62)),
        ("4 GiB in a branch", alone(onnx::of_graph(with_branch(&zeros(LARGE))).finish())),
        ("2^32 classes", one_hot((1 << 32) + 1)),
        ("a window of 4 GiB", windowed(LARGE)),
        ("an image of 64 Ki by 64 Ki", resized(65536.0)),
    ]
}

/// A model with many outputs, each of so many pairs of numbers.
fn wide(outputs: usize, pairs: i64) -> Files {
    let names: Vec<String> = (0..outputs).map(|index| format!("y{index}")).collect();
    let nodes = names.iter().map(|name| onnx::node("Expand", &["x", "s"], &[name])).collect();
    let ports = names.iter().map(|name| onnx::port(name, F32, &[pairs, 2])).collect();
    alone(onnx::model(nodes, vec![onnx::i64s("s", &[pairs, 2])], vec![onnx::port("x", F32, &[1, 2])], ports))
}

fn int(name: &str, value: i64) -> Message {
    onnx::tensor(name, I64, &[]).bytes(9, value.to_le_bytes())
}

fn ranging(to: i64) -> Files {
    let cast = onnx::node("Cast", &["r"], &["c"]).message(5, onnx::number_attribute("to", F32));
    let nodes = vec![onnx::node("Range", &["from", "to", "step"], &["r"]), cast];
    bomb(nodes, vec![int("from", 0), int("to", to), int("step", 1)])
}

/// A branch that makes so many zeros and gives two of them.
fn zeros(count: i64) -> Message {
    let nodes = vec![
        onnx::node("ConstantOfShape", &["s"], &["c"]),
        onnx::node("Slice", &["c", "begin", "end"], &["z"]),
    ];
    branch(nodes, vec![onnx::i64s("s", &[count]), onnx::i64s("begin", &[0]), onnx::i64s("end", &[2])])
}

fn one_hot(classes: i64) -> Files {
    let nodes = vec![onnx::node("OneHot", &["which", "classes", "values"], &["c"])];
    bomb(
        nodes,
        vec![
            onnx::i64s("which", &[0]),
            onnx::i64s("classes", &[classes]),
            onnx::f32s("values", &[2], &[0.0, 1.0]),
        ],
    )
}

fn windowed(size: i64) -> Files {
    bomb(vec![onnx::node("HannWindow", &["size"], &["c"])], vec![int("size", size)])
}

fn resized(scale: f32) -> Files {
    let resize = onnx::node("Resize", &["pixel", "", "scales"], &["c"]);
    let scales = onnx::f32s("scales", &[4], &[1.0, 1.0, scale, scale]);
    bomb(vec![resize], vec![onnx::f32s("pixel", &[1, 1, 1, 1], &[1.0]), scales])
}

/// What all bombs together may take where all computing has one arena.
const ARENA_MIB: u64 = 64;

#[tokio::test]
async fn models_that_compute_something_enormous_get_no_more_than_the_arena() {
    let arena = ARENA_MIB.to_string();
    let site = Site::on(Engine::OnnxRuntime, &["--onnxruntime-mib", &arena]).await;
    let attacker = site.attacker().await;
    let before = site.agent.peak();
    for (attack, files) in bombs() {
        let model = attacker.register(ResourceKind::Model, files).await;
        let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
        let outcome = attacker.run(model_run(model.id(), vec![named("", input)], &[])).await;
        let error = outcome.expect_err(attack);
        let reasons = [Reason::QuotaExceeded, Reason::ModelRejected, Reason::BadArgument];
        assert!(reasons.contains(&error.reason()), "{attack}: {error:?}");
        let grown = site.agent.peak() - before;
        assert!(grown <= ATTACK_BYTES_MAX + (ARENA_MIB << 20), "{attack}: {grown} bytes");
        site.serves_others().await;
    }
}

/// Each is small enough for an engine; as a reply they would be copied once more.
#[tokio::test]
async fn outputs_that_no_reply_could_carry_are_not_copied() {
    for engine in [Engine::Tract, Engine::OnnxRuntime] {
        let site = Site::on(engine, &[]).await;
        let attacker = site.attacker().await;
        let model = attacker.register(ResourceKind::Model, wide(4, 2 << 20)).await;
        let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
        let outcome = attacker.run(model_run(model.id(), vec![named("", input.clone())], &[])).await;
        refused("64 MiB", outcome, Reason::MessageTooLarge, "");
        attacker.run(model_run(model.id(), vec![named("", input)], &["y2"])).await.expect("16 MiB fit");
        site.serves_others().await;
    }
}

#[tokio::test]
async fn models_that_compute_something_enormous_are_refused_before_they_do() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    for (attack, files) in bombs() {
        let before = site.agent.peak();
        let model = attacker.register(ResourceKind::Model, files).await;
        let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
        let outcome = attacker.run(model_run(model.id(), vec![named("", input)], &[])).await;
        refused(attack, outcome, Reason::ModelRejected, "");
        let grown = site.agent.peak() - before;
        assert!(grown <= ATTACK_BYTES_MAX, "{attack}: {grown} bytes");
        site.serves_others().await;
    }
}

/// How much is computed is known only when the numbers are there.
#[tokio::test]
async fn an_input_that_asks_for_something_enormous_is_refused() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let nodes = vec![onnx::node("Range", &["from", "x", "step"], &["y"])];
    let number = |name: &str, value: i64| onnx::tensor(name, I64, &[]).bytes(9, value.to_le_bytes());
    let numbers = vec![number("from", 0), number("step", 1)];
    let range =
        onnx::model(nodes, numbers, vec![onnx::port("x", I64, &[])], vec![onnx::port("y", I64, &[-1])]);
    let model = attacker.model(range).await;
    let before = site.agent.peak();
    let count = |count: i64| Tensor::new(&[], &[count]).unwrap();
    let output = attacker.output(&model, count(3)).await.unwrap();
    assert_eq!(output.elements::<i64>().unwrap().as_ref(), [0, 1, 2]);
    for enormous in [1 << 30, 1 << 40, i64::MAX] {
        let refusal = attacker.output(&model, count(enormous)).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::BadArgument, "{enormous}: {refusal:?}");
        site.serves_others().await;
    }
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
}

/// Many tensors with the same bytes of one file: each is small, together they are not.
#[tokio::test]
async fn one_file_does_not_become_many() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let names: Vec<String> = (0..4096).map(|index| format!("w{index}")).collect();
    let tensor = |name: &String| onnx::external(name, &[1 << 18], "weights.bin", 0, 1 << 20);
    let weights = names.iter().map(tensor).chain([onnx::f32s("b", &[2], &[1.0, 2.0])]).collect();
    let before = site.agent.peak();
    let files = beside(with_initializers(weights), "weights.bin", vec![0; 1 << 20].into());
    let model = attacker.register(ResourceKind::Model, files).await;
    let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
    refused("4 GiB", attacker.output(&model, input).await, Reason::ModelRejected, "");
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
    site.serves_others().await;
}

/// Files of a few bytes for each part: decoded, each part takes hundreds.
#[tokio::test]
async fn a_model_of_endless_empty_parts_is_rejected_before_it_is_decoded() {
    const PARTS: usize = 8 << 20;
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let input = || Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
    let before = site.agent.peak();
    for (attack, tag) in [("nodes", 1), ("initializers", 5), ("inputs", 11), ("value infos", 13)] {
        let graph = (0..PARTS).fold(Message::default(), |graph, _| graph.bytes(tag, []));
        let model = attacker.model(onnx::of_graph(graph).finish()).await;
        refused(attack, attacker.output(&model, input()).await, Reason::ModelRejected, "");
        attacker.session.unregister(&model).await.unwrap();
        site.serves_others().await;
    }
    let node = (0..PARTS).fold(onnx::node("Add", &["x", "x"], &["y"]), |node, _| node.bytes(5, []));
    let model = attacker.model(onnx::of_graph(Message::default().message(1, node)).finish()).await;
    refused("attributes", attacker.output(&model, input()).await, Reason::ModelRejected, "");
    let grown = site.agent.peak() - before;
    assert!(grown <= ATTACK_BYTES_MAX, "{grown} bytes");
    site.serves_others().await;
}

#[tokio::test]
async fn a_model_that_takes_too_long_to_load_ends_at_the_load_deadline() {
    let site = Site::start(&["--load-deadline", "0.2"]).await;
    let attacker = site.attacker().await;
    let steps = 30_000;
    let names: Vec<String> = (0..=steps).map(|step| format!("t{step}")).collect();
    let node = |step: usize| onnx::node("Sin", &[&names[step]], &[&names[step + 1]]);
    let ports = |name: &str| vec![onnx::port(name, F32, &[1])];
    let nodes = (0..steps).map(node).collect();
    let long = attacker.model(onnx::model(nodes, vec![], ports("t0"), ports(&names[steps]))).await;
    let begun = Instant::now();
    let input = Tensor::new(&[1], &[1.0_f32]).unwrap();
    let refusal = refused("long", attacker.output(&long, input).await, Reason::Deadline, "");
    assert!(refusal.message().contains("loading the model"), "{refusal}");
    assert!(begun.elapsed() < Duration::from_secs(20), "the call's own deadline is a minute away");
    site.serves_others().await;
}

/// The text of an error is bounded however much there is to say.
#[tokio::test]
async fn a_model_with_thousands_of_inputs_gets_a_readable_error() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let names: Vec<String> = (0..5000).map(|index| format!("input-number-{index}")).collect();
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let inputs = names.iter().map(|name| onnx::port(name, F32, &[1])).collect();
    let nodes = vec![onnx::node("Add", &[all[0], all[1]], &["y"])];
    let model = attacker.model(onnx::model(nodes, vec![], inputs, vec![onnx::port("y", F32, &[1])])).await;
    let input = Tensor::new(&[1], &[1.0_f32]).unwrap();
    let outcome = attacker.run(model_run(model.id(), vec![named("", input)], &[])).await;
    refused("one of 5000", outcome, Reason::BadArgument, "inputs");
    site.serves_others().await;
}

/// Models nested as deep as the format lets them: the engine's stack must hold them.
#[tokio::test]
async fn branches_inside_branches_do_not_end_the_agent() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let leaf = branch(vec![onnx::node("Identity", &["k"], &["z"])], vec![onnx::f32s("k", &[2], &[1.0, 2.0])]);
    let nest = |inner: Message| {
        let choice = onnx::node("If", &["positive"], &["z"])
            .message(5, onnx::graph_attribute("then_branch", inner.clone()))
            .message(5, onnx::graph_attribute("else_branch", leaf.clone()));
        branch(vec![choice], vec![])
    };
    for depth in [1, 10, 20, 30] {
        let nested = (0..depth).fold(leaf.clone(), |inner, _| nest(inner));
        let model = attacker.model(onnx::of_graph(with_branch(&nested)).finish()).await;
        let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
        match attacker.output(&model, input).await {
            Ok(output) => assert_eq!(output.elements::<f32>().unwrap().as_ref(), [1.0, 2.0]),
            Err(refusal) => eprintln!("{depth} branches: {refusal:?}"),
        }
        site.serves_others().await;
    }
}

/// A guest that goes away takes its computation with it.
#[tokio::test]
async fn a_guest_that_leaves_is_computed_for_no_longer() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let side = Tensor::new(&[512, 512], &vec![0.0_f32; 512 * 512]).unwrap();
    let slow = attacker.model(onnx::slow(512, 3000)).await;
    let load = attacker.run(model_run(slow.id(), vec![], &[])).await;
    refused("load", load, Reason::BadArgument, "inputs");
    let client = attacker.client.clone();
    let call = tokio::spawn(async move { attacker.output(&slow, side).await });
    let in_flight = async || client.info().await.unwrap().usage.unwrap().calls_in_flight;
    until("the call", async || in_flight().await == 2).await;
    until("the computation", async || site.agent.computes()).await;
    call.abort();
    until("the end of the call", async || in_flight().await == 1).await;
    until("the end of the computation", async || !site.agent.computes()).await;
    site.serves_others().await;
}
