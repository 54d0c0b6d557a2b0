//! Models inside models: what bounds the outer one bounds the inner.

use std::time::Duration;

use bytes::Bytes;
use vaccel_client::{CallOptions, Reason, Tensor, named};

use super::{ATTACK_BYTES_MAX, Site, refused};
use crate::support::onnx::{self, F32, I64, Message};
use crate::support::until;

/// Nodes that make `sum` from the numbers below `end`.
fn summing() -> Vec<Message> {
    vec![
        onnx::node("Reshape", &["end", "scalar"], &["to"]),
        onnx::node("Range", &["from", "to", "step"], &["numbers"]),
        onnx::node("ReduceSum", &["numbers"], &["sum"]),
    ]
}

fn constants() -> Vec<Message> {
    let number = |name: &str, value: i64| onnx::tensor(name, I64, &[]).bytes(9, value.to_le_bytes());
    vec![number("from", 0), number("step", 1), onnx::i64s("scalar", &[])]
}

/// For each row of `x` the sum of the numbers below it.
fn in_a_loop() -> Bytes {
    let (end, sum) = (vec![onnx::port("end", I64, &[1])], vec![onnx::port("sum", I64, &[1])]);
    let body = onnx::graph(summing(), constants(), end, sum);
    let each = onnx::node("Scan", &["x"], &["y"])
        .message(5, onnx::number_attribute("num_scan_inputs", 1))
        .message(5, onnx::graph_attribute("body", body));
    onnx::model(
        vec![each],
        vec![],
        vec![onnx::port("x", I64, &[-1, 1])],
        vec![onnx::port("y", I64, &[-1, 1])],
    )
}

/// The same of one row, if that is not 0.
fn in_a_branch() -> Bytes {
    let sum = || vec![onnx::port("sum", I64, &[1])];
    let zero = onnx::graph(
        vec![onnx::node("Identity", &["zero"], &["sum"])],
        vec![onnx::i64s("zero", &[0])],
        vec![],
        sum(),
    );
    let some = onnx::graph(summing(), constants(), vec![], sum());
    let choice = onnx::node("If", &["some"], &["z"])
        .message(5, onnx::graph_attribute("then_branch", some))
        .message(5, onnx::graph_attribute("else_branch", zero));
    let nodes = vec![
        onnx::node("Reshape", &["x", "one"], &["end"]),
        onnx::node("Cast", &["end"], &["some"]).message(5, onnx::number_attribute("to", 9)),
        choice,
        onnx::node("Reshape", &["z", "row"], &["y"]),
    ];
    let shapes = vec![onnx::i64s("one", &[1]), onnx::i64s("row", &[1, 1])];
    onnx::model(nodes, shapes, vec![onnx::port("x", I64, &[1, 1])], vec![onnx::port("y", I64, &[1, 1])])
}

#[tokio::test]
async fn numbers_that_ask_for_something_enormous_inside_are_refused() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    for (where_it_is, model) in [("loop", in_a_loop()), ("branch", in_a_branch())] {
        let model = attacker.model(model).await;
        let below = |end: i64| Tensor::new(&[1, 1], &[end]).unwrap();
        let sum = attacker.output(&model, below(5)).await.unwrap();
        assert_eq!(sum.elements::<i64>().unwrap().as_ref(), [10], "{where_it_is}");
        let before = site.agent.peak();
        for enormous in [1 << 30, 1 << 40, i64::MAX] {
            let refusal = attacker.output(&model, below(enormous)).await.unwrap_err();
            assert_eq!(refusal.reason(), Reason::BadArgument, "{where_it_is}, {enormous}: {refusal:?}");
            site.serves_others().await;
        }
        let grown = site.agent.peak() - before;
        assert!(grown <= ATTACK_BYTES_MAX, "{where_it_is}: {grown} bytes");
    }
}

/// A loop of a model is one node of it, and may take days.
#[tokio::test]
async fn a_loop_stops_on_the_way() {
    let site = Site::start(&[]).await;
    let attacker = site.attacker().await;
    let (square, item) = ([256, 256], [1]);
    let body = onnx::graph(
        vec![
            onnx::node("MatMul", &["before", "before"], &["after"]),
            onnx::node("Identity", &["item"], &["same"]),
        ],
        vec![],
        vec![onnx::port("before", F32, &square), onnx::port("item", F32, &item)],
        vec![onnx::port("after", F32, &square), onnx::port("same", F32, &item)],
    );
    let power = onnx::node("Scan", &["first", "x"], &["last", "y"])
        .message(5, onnx::number_attribute("num_scan_inputs", 1))
        .message(5, onnx::graph_attribute("body", body));
    let first = onnx::f32s("first", &[256, 256], &vec![0.0; 256 * 256]);
    let ports = |name| vec![onnx::port(name, F32, &[-1, 1])];
    let model = attacker.model(onnx::model(vec![power], vec![first], ports("x"), ports("y"))).await;
    let steps =
        |count: usize| Tensor::new(&[i64::try_from(count).unwrap(), 1], &vec![7.0_f32; count]).unwrap();
    let few = attacker.output(&model, steps(3)).await.unwrap();
    assert_eq!(few.elements::<f32>().unwrap().as_ref(), [7.0; 3]);
    let deadline = Some(Duration::from_secs(1));
    let hurried = attacker.session.with(CallOptions { deadline, ..CallOptions::default() });
    let late = hurried.run(&model, vec![named("", steps(2 << 20))], &[]).await;
    refused("a loop of 2^21 steps", late, Reason::Deadline, "");
    until("the end of the computation", async || !site.agent.computes()).await;
    site.serves_others().await;
}
