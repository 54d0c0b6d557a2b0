//! Formats of models: told by their bytes, loaded with every type, and refused with what would help.

use bytes::Bytes;
use vaccel_client::{
    ClassifyOptions, DType, Error, Reason, ResourceFiles, ResourceKind, Session, Tensor, named,
};

use crate::support::tensorflow::{self as tf, with};
use crate::support::tflite::{self as lite, Lite};
use crate::support::{Agent, onnx};

async fn load(session: &Session, name: &str, content: impl Into<Bytes>) -> Result<(), Error> {
    let model = session.register(ResourceFiles::model(name, content)).await.unwrap();
    session.tf_model_load(&model).await.map(drop)
}

#[track_caller]
fn rejected(outcome: Result<(), Error>, words: &[&str]) {
    let error = outcome.unwrap_err();
    assert_eq!(error.reason(), Reason::ModelRejected, "{error:?}");
    for word in words {
        assert!(error.message().contains(word), "{word}: {error}");
    }
}

/// An archive with files of these names, as far as anybody looks.
fn zip(names: &[&str]) -> Vec<u8> {
    let length = |name: &str| u16::try_from(name.len()).unwrap().to_le_bytes();
    let mut out = Vec::new();
    for name in names {
        out.extend_from_slice(b"PK\x03\x04");
        out.extend_from_slice(&[0; 22]);
        out.extend_from_slice(&[&length(name)[..], &[0, 0], name.as_bytes()].concat());
    }
    let directory = u32::try_from(out.len()).unwrap();
    for name in names {
        out.extend_from_slice(b"PK\x01\x02");
        out.extend_from_slice(&[0; 24]);
        out.extend_from_slice(&[&length(name)[..], &[0; 16], name.as_bytes()].concat());
    }
    out.extend_from_slice(b"PK\x05\x06");
    out.extend_from_slice(&[0; 12]);
    out.extend_from_slice(&[&directory.to_le_bytes()[..], &[0, 0]].concat());
    out
}

#[tokio::test]
async fn what_no_engine_loads_is_told_with_what_would() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let script = zip(&["net/data.pkl", "net/code/__torch__.py", "net/constants.pkl"]);
    for (name, content, words) in [
        ("model.pt", script, ["TorchScript", "torch.onnx.export"]),
        ("weights.pt", zip(&["archive/data.pkl", "archive/data/0"]), ["state dict", "torch.onnx.export"]),
        (
            "old.pth",
            b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(),
            ["state dict", "torch.onnx.export"],
        ),
        ("m.keras", zip(&["metadata.json", "config.json", "model.weights.h5"]), ["Keras", "TFLiteConverter"]),
        ("m.h5", b"\x89HDF\r\n\x1a\n and more".to_vec(), ["Keras", "TFLiteConverter"]),
        (
            "saved_model.pb",
            b"\x08\x01\x12\x04\x0a\x02\x0a\x00".to_vec(),
            ["SavedModel", "convert_variables_to_constants_v2"],
        ),
        ("m.tflite", b"these are no models".to_vec(), ["19 bytes", "TensorFlow Lite"]),
        ("m.onnx", vec![], ["0 bytes", "ONNX"]),
    ] {
        rejected(load(&session, name, content).await, &[&words[..], &[name]].concat());
    }
    // A whole SavedModel.
    let folder = vec![
        ("saved_model.pb".to_owned(), Bytes::from_static(b"\x08\x01\x12\x04\x0a\x02\x0a\x00")),
        ("variables/variables.index".to_owned(), Bytes::from_static(b"index")),
        ("variables/variables.data-00000-of-00001".to_owned(), Bytes::from_static(b"data")),
    ];
    let model = session.register(ResourceFiles::new(ResourceKind::Model, folder)).await.unwrap();
    rejected(session.tf_model_load(&model).await.map(drop), &["SavedModel", "saved_model.pb", "tf2onnx"]);
}

#[tokio::test]
async fn the_name_of_a_file_does_not_matter() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    load(&session, "model.pb", onnx::echo()).await.unwrap();
    load(&session, "model.onnx", tf::echo(tf::F32, &[-1])).await.unwrap();
    let softmax = lite::single(lite::LOGISTIC, (&[-1, 2], &[-1, 2]), None, None);
    load(&session, "weights.bin", softmax).await.unwrap();
}

#[tokio::test]
async fn all_operators_that_are_missing_are_named() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let (_client, session) = agent.session().await;
    let node = |op: &str, from: &str, to: &str| tf::node(op, to, &[from]);
    let graph = tf::graph(vec![
        tf::placeholder("x", tf::F32, &[1]),
        node("FusedBatchNormV3", "x", "a"),
        node("Elu", "a", "b"),
        with(node("Identity", "b", "c"), vec![tf::type_attribute("T", tf::F32)]),
        node("Erf", "c", "y"),
        node("Elu", "y", "z"),
    ]);
    rejected(load(&session, "m", graph).await, &["3 of its operators", "Elu, Erf, FusedBatchNormV3", "ONNX"]);

    let mut model = Lite::default();
    let tensors = ["x", "a", "b", "c", "y"].map(|name| model.tensor(name, lite::F32, &[1]));
    let [x, a, b, c, y] = tensors;
    model.operator(lite::LOGISTIC, &[x], &[a], None);
    const ELU: i32 = 111;
    const GELU: i32 = 150;
    model.operator(ELU, &[a], &[b], None);
    model.operator(GELU, &[b], &[c], None);
    model.custom("FlexErf", &[c], &[y]);
    (model.inputs, model.outputs) = (vec![x], vec![y]);
    rejected(load(&session, "m", model.finish()).await, &["3 of its operators", "ELU, GELU", "\"FlexErf\""]);

    let step = |op: &str, from: &str, to: &str| onnx::node(op, &[from], &[to]);
    let nodes = vec![step("Explode", "x", "a"), step("Relu", "a", "b"), step("Implode", "b", "y")];
    let (x, y) = (onnx::port("x", onnx::F32, &[1]), onnx::port("y", onnx::F32, &[1]));
    let model = onnx::model(nodes, vec![], vec![x], vec![y]);
    rejected(load(&session, "m", model).await, &["2 of its operators", "Explode, Implode", "onnxruntime"]);
}

/// Type numbers of TensorFlow, those of TensorFlow Lite where it has them, and a tensor of the type.
fn every_type() -> Vec<(u64, Option<i8>, Tensor)> {
    use half::f16;
    let shape = [2];
    let halves = [f16::from_f32(0.5), f16::from_f32(-2.0)];
    let truths = Tensor::from_bytes(DType::Bool, &shape, vec![1, 0].into());
    vec![
        (1, Some(0), Tensor::new(&shape, &[0.5_f32, -2.0]).unwrap()),
        (2, Some(10), Tensor::new(&shape, &[0.5_f64, -2.0]).unwrap()),
        (3, Some(2), Tensor::new(&shape, &[1_i32, i32::MIN]).unwrap()),
        (4, Some(3), Tensor::new(&shape, &[1_u8, 255]).unwrap()),
        (5, Some(7), Tensor::new(&shape, &[1_i16, i16::MIN]).unwrap()),
        (6, Some(9), Tensor::new(&shape, &[1_i8, -128]).unwrap()),
        (9, Some(4), Tensor::new(&shape, &[1_i64, i64::MIN]).unwrap()),
        (10, Some(6), truths),
        (17, Some(16), Tensor::new(&shape, &[1_u16, u16::MAX]).unwrap()),
        (19, Some(1), Tensor::new(&shape, &halves).unwrap()),
        (22, Some(15), Tensor::new(&shape, &[1_u32, u32::MAX]).unwrap()),
        (23, Some(12), Tensor::new(&shape, &[1_u64, u64::MAX]).unwrap()),
    ]
}

#[tokio::test]
async fn every_type_goes_in_and_comes_out() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    for (number, lite_number, tensor) in every_type() {
        let mut models = vec![tf::echo(number, &[-1])];
        if let Some(number) = lite_number {
            // A reshape to the same shape: the format has no identity.
            let mut model = Lite::default();
            let (x, y) = (model.tensor("x", number, &[-1]), model.tensor("y", number, &[-1]));
            let shape = model.i32s("shape", &[1], &[-1]);
            model.operator(lite::RESHAPE, &[x, shape], &[y], None);
            (model.inputs, model.outputs) = (vec![x], vec![y]);
            models.push(model.finish());
        }
        for model in models {
            let model = session.register(ResourceFiles::model("m", model)).await.unwrap();
            let description = session.tflite_model_load(&model).await.unwrap();
            let dtypes = [&description.inputs[0], &description.outputs[0]].map(|port| port.dtype);
            assert_eq!(dtypes, [tensor.dtype; 2], "{}: {description:?}", tensor.signature());
            let ran = session.tflite_model_run(&model, vec![tensor.clone()]).await.unwrap();
            let output = ran.outputs[0].tensor.as_ref().unwrap();
            assert_eq!((output.dtype, &output.data), (tensor.dtype, &tensor.data), "{}", tensor.signature());
        }
    }
}

/// Eight-bit numbers that stand for others go in and out as they are.
#[tokio::test]
async fn quantized_models_take_and_give_their_numbers() {
    use lite::Value::{Ints, Longs, Table};
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    const I8: i8 = 9;
    let mut model = Lite::default();
    let (x, y) = (model.tensor("x", I8, &[-1]), model.tensor("y", I8, &[-1]));
    for tensor in [x, y] {
        let scale = Ints(vec![0.5_f32.to_bits().cast_signed()]);
        model.extend(tensor, vec![(4, Table(vec![(2, scale), (3, Longs(vec![3]))]))]);
    }
    let shape = model.i32s("shape", &[1], &[-1]);
    model.operator(lite::RESHAPE, &[x, shape], &[y], None);
    (model.inputs, model.outputs) = (vec![x], vec![y]);
    let model = session.register(ResourceFiles::model("m", model.finish())).await.unwrap();
    session.tflite_model_load(&model).await.unwrap();
    let numbers = Tensor::new(&[4], &[-128_i8, -1, 3, 127]).unwrap();
    let ran = session.tflite_model_run(&model, vec![numbers.clone()]).await.unwrap();
    assert_eq!(ran.outputs[0].tensor.as_ref().unwrap().data, numbers.data);
}

#[tokio::test]
async fn a_classifier_may_have_any_format() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    // The four pixels of an image are the scores.
    let pixels = lite::single(lite::RESHAPE, (&[-1, 2, 2, 1], &[-1, 4]), Some(&[-1, 4]), None);
    let description = r#"{"width":2,"height":2,"color":"gray","layout":"NHWC","fit":"stretch","filter":"nearest",
        "labels":["a","b","c","d"]}"#;
    let files = vec![
        ("pixels.tflite".to_owned(), pixels),
        ("image_classification.json".to_owned(), Bytes::from_static(description.as_bytes())),
    ];
    let model = session.register(ResourceFiles::new(ResourceKind::Model, files)).await.unwrap();
    let mut png = std::io::Cursor::new(Vec::new());
    let image = image::GrayImage::from_raw(2, 2, vec![10, 20, 250, 30]).unwrap();
    image.write_to(&mut png, image::ImageFormat::Png).unwrap();
    let png = Bytes::from(png.into_inner());
    let options = ClassifyOptions { model: Some(&model), top_k: 2 };
    let found = session.classify(vec![png; 3], options).await.unwrap();
    assert_eq!(found.len(), 3);
    for labels in found {
        assert_eq!(labels.iter().map(|label| label.name.as_str()).collect::<Vec<_>>(), ["c", "d"]);
    }
}

/// What tract would compute wrongly is not computed.
#[tokio::test]
async fn what_an_engine_misreads_is_refused() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let conv = |dilations: &[i64]| {
        let attributes = vec![
            tf::type_attribute("T", tf::F32),
            tf::list_attribute("strides", &[1, 1, 1, 1]),
            tf::list_attribute("dilations", dilations),
            tf::text_attribute("padding", "VALID"),
            tf::text_attribute("data_format", "NHWC"),
        ];
        tf::graph(vec![
            tf::placeholder("x", tf::F32, &[1, 4, 4, 1]),
            tf::f32s("k", &[2, 2, 1, 1], &[1.0; 4]),
            with(tf::node("Conv2D", "y", &["x", "k"]), attributes),
        ])
    };
    load(&session, "m", conv(&[1, 1, 1, 1])).await.unwrap();
    rejected(load(&session, "m", conv(&[1, 2, 2, 1])).await, &["\"y\"", "dilations", "ONNX"]);
    let format = tf::text_attribute("data_format", "NCHW");
    let bias = with(tf::node("BiasAdd", "y", &["x", "b"]), vec![tf::type_attribute("T", tf::F32), format]);
    let nodes = vec![tf::placeholder("x", tf::F32, &[1, 2, 2, 2]), tf::f32s("b", &[2], &[1.0; 2]), bias];
    rejected(load(&session, "m", tf::graph(nodes)).await, &["NCHW"]);
}

#[tokio::test]
async fn a_graph_says_what_it_knows_of_its_outputs() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let attributes = vec![tf::flag_attribute("transpose_a", false), tf::flag_attribute("transpose_b", false)];
    let graph = tf::graph(vec![
        tf::placeholder("x", tf::F32, &[-1, 2]),
        tf::f32s("w", &[2, 3], &[1.0; 6]),
        with(tf::node("MatMul", "wide", &["x", "w"]), attributes),
        tf::node("NoOp", "init", &["^wide"]),
        tf::node("Shape", "size", &["x"]),
    ]);
    let model = session.register(ResourceFiles::model("m", graph)).await.unwrap();
    let description = session.tf_model_load(&model).await.unwrap();
    let names: Vec<&str> = description.outputs.iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["wide", "size"], "not what only orders nodes");
    assert_eq!(
        (description.outputs[0].dtype(), &description.outputs[0].shape[..]),
        (DType::F32, &[-1, 3][..])
    );
    let x = Tensor::new(&[5, 2], &[1.0_f32; 10]).unwrap();
    let run = session.run(&model, vec![named("x", x)], &["wide"]).await.unwrap();
    assert_eq!(run.outputs[0].tensor.as_ref().unwrap().shape, [5, 3]);
}

/// Sizes may be open along any axis. What is too small for the model is one call's error and not the model's.
#[tokio::test]
async fn an_axis_that_is_not_the_first_may_be_open() {
    use lite::Value::{I8, I32};
    const VALID: i8 = 1;
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let one = || I32(1);
    let options = vec![(0, I8(VALID)), (1, one()), (2, one()), (3, I32(3)), (4, I32(3))];
    let shape = &[-1, -1, -1, 2];
    let pool = lite::single(lite::MAX_POOL_2D, (shape, shape), None, Some((5, options)));
    let model = session.register(ResourceFiles::model("m", pool)).await.unwrap();
    let description = session.tflite_model_load(&model).await.unwrap();
    assert_eq!(description.inputs[0].shape, [-1, -1, -1, 2]);
    for side in [3_i64, 5, 1, 4] {
        let count = usize::try_from(2 * side * side * 2).unwrap();
        let x = Tensor::new(&[2, side, side, 2], &vec![0.5_f32; count]).unwrap();
        let ran = session.tflite_model_run(&model, vec![x]).await;
        if side < 3 {
            ran.unwrap_err();
            continue;
        }
        let outputs = ran.unwrap().outputs;
        let output = outputs[0].tensor.as_ref().unwrap();
        assert_eq!(output.shape, [2, side - 2, side - 2, 2]);
        assert!(output.elements::<f32>().unwrap().iter().all(|number| *number == 0.5));
    }
}
