//! The families of model calls: the same network in three formats through each of them, names and places, and what load
//! and unload mean.

use vaccel_client::proto::error::Detail;
use vaccel_client::proto::limits::RUN_OPTIONS_BYTES_MAX;
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_reply::Outcome;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::{RunRequest, TfliteModelRunRequest, TorchModelRunRequest};
use vaccel_client::{
    Client, DType, Error, ModelDescription, NamedTensor, Reason, Resource, ResourceFiles, Session,
    SessionOptions, Tensor, named, tf_input, tf_node,
};

use crate::support::{Agent, onnx, onnxruntime, read, repository};

const TOLERANCE: f64 = 1e-4;

/// A model of `agent/models/write_formats.py` in one of its formats.
fn model_file(name: &str) -> ResourceFiles {
    ResourceFiles::model(name, read(&repository().join("agent/tests/data/formats").join(name)))
}

/// Inputs and outputs that numpy computed.
fn cases() -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(repository().join("agent/tests/data/formats/values.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn numbers(case: &serde_json::Value, name: &str) -> Vec<f64> {
    case[name].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn tensor(case: &serde_json::Value, name: &str, rest: &[i64]) -> Tensor {
    let elements: Vec<f32> = serde_json::from_value(case[name].clone()).unwrap();
    let shape = [&[case["batch"].as_i64().unwrap()], rest].concat();
    Tensor::new(&shape, &elements).unwrap()
}

#[track_caller]
fn agrees(output: &NamedTensor, case: &serde_json::Value, name: &str) {
    let tensor = output.tensor.as_ref().unwrap();
    assert_eq!(tensor.shape[0], case["batch"].as_i64().unwrap());
    let (found, expected) = (tensor.elements::<f32>().unwrap(), numbers(case, name));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() <= TOLERANCE, "{name}: {found} {expected}");
    }
}

const FORMATS: [(&str, &str); 3] = [("onnx", "onnx"), ("tflite", "tflite"), ("pb", "tensorflow")];

/// Loads through every family, which must say the same.
async fn load(session: &Session, model: &Resource) -> ModelDescription {
    let description = session.tf_model_load(model).await.unwrap();
    assert_eq!(session.tflite_model_load(model).await.unwrap(), description);
    assert_eq!(session.torch_model_load(model).await.unwrap(), description);
    description
}

#[tokio::test]
async fn one_network_gives_the_same_in_every_format_through_every_family() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    for (ending, format) in FORMATS {
        let model = session.register(model_file(&format!("net.{ending}"))).await.unwrap();
        let description = load(&session, &model).await;
        assert_eq!(description.format, format);
        let [input, output] = [&description.inputs[0], &description.outputs[0]];
        assert_eq!((input.name.as_str(), input.dtype()), ("image", DType::F32), "{format}");
        assert_eq!(input.shape, [-1, 8, 8, 3], "{format}");
        assert_eq!((output.name.as_str(), output.dtype()), ("probabilities", DType::F32), "{format}");
        assert_eq!(output.shape, [-1, 10], "{format}");
        for case in &cases() {
            let image = || tensor(case, "image", &[8, 8, 3]);
            let ran = session.tf_model_run(&model, vec![tf_input("image", 0, image())], &[]).await.unwrap();
            assert_eq!((ran.status.code, ran.status.message.as_str()), (0, ""));
            agrees(&ran.outputs[0], case, "probabilities");
            let ran = session.tflite_model_run(&model, vec![image()]).await.unwrap();
            agrees(&ran.outputs[0], case, "probabilities");
            let ran = session.torch_model_run(&model, vec![image()]).await.unwrap();
            agrees(&ran.outputs[0], case, "probabilities");
            let ran = session.run(&model, vec![named("image", image())], &["#0"]).await.unwrap();
            agrees(&ran.outputs[0], case, "probabilities");
        }
    }
}

#[tokio::test]
async fn inputs_and_outputs_go_by_name_by_number_and_by_place() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let cases = cases();
    let case = &cases[1];
    let [a, b] = ["a", "b"].map(|name| tensor(case, name, &[4]));
    for (ending, format) in FORMATS {
        let model = session.register(model_file(&format!("two.{ending}"))).await.unwrap();
        let description = load(&session, &model).await;
        let names: Vec<&str> = description.outputs.iter().map(|port| port.name.as_str()).collect();
        assert_eq!(names, ["sum", "product"], "{format}");
        for (first, second) in [
            (tf_input("a", 0, a.clone()), tf_input("b", 0, b.clone())),
            (tf_input("b:0", 0, b.clone()), tf_input("a:0", 0, a.clone())),
            (tf_input("", 0, a.clone()), tf_input("", 1, b.clone())),
        ] {
            for product in [tf_node("product", 0), tf_node("product:0", 0), tf_node("", 1)] {
                let inputs = vec![first.clone(), second.clone()];
                let ran = session.tf_model_run(&model, inputs, &[product, tf_node("sum", 0)]).await.unwrap();
                assert_eq!(ran.outputs.len(), 2);
                agrees(&ran.outputs[0], case, "product");
                agrees(&ran.outputs[1], case, "sum");
            }
        }
        let placed = vec![a.clone(), b.clone()];
        let lite = session.tflite_model_run(&model, placed.clone()).await.unwrap();
        let torch = session.torch_model_run(&model, placed.clone()).await.unwrap();
        for run in [lite, torch] {
            assert_eq!(run.outputs.len(), 2);
            agrees(&run.outputs[0], case, "sum");
            agrees(&run.outputs[1], case, "product");
        }
        let inputs = placed.into_iter().map(|tensor| named("", tensor)).collect();
        let ran = session.run(&model, inputs, &["#1"]).await.unwrap();
        assert_eq!(ran.outputs.len(), 1);
        agrees(&ran.outputs[0], case, "product");
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T, Error>, reason: Reason, words: &[&str]) -> Error {
    let error = outcome.unwrap_err();
    assert_eq!(error.reason(), reason, "{error:?}");
    for word in words {
        assert!(error.message().contains(word), "{word}: {error}");
    }
    error
}

#[tokio::test]
async fn what_does_not_fit_is_named_with_what_is_there() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let model = session.register(model_file("two.pb")).await.unwrap();
    load(&session, &model).await;
    let x = || Tensor::new(&[1, 4], &[0.0_f32; 4]).unwrap();
    let wide = || Tensor::new(&[1, 5], &[0.0_f32; 5]).unwrap();
    let whole = || Tensor::new(&[1, 4], &[0_i32; 4]).unwrap();
    let tf = async |inputs, outputs: &[_]| session.tf_model_run(&model, inputs, outputs).await;
    let pair = |name: &str, tensor| vec![tf_input("a", 0, x()), tf_input(name, 0, tensor)];
    let bad = Reason::BadArgument;
    refused(tf(pair("c", x()), &[]).await, bad, &["inputs[1].name", "\"c:0\"", "\"a\" f32[?, 4]", "\"b\""]);
    refused(tf(pair("b:1", x()), &[]).await, bad, &["inputs[1].name"]);
    refused(tf(pair("b", wide()), &[]).await, bad, &["inputs[1].shape", "f32[1, 5]"]);
    refused(tf(pair("b", whole()), &[]).await, bad, &["inputs[1].dtype", "i32[1, 4]"]);
    refused(tf(pair("a", x()), &[]).await, bad, &["each input once"]);
    refused(
        tf(pair("b", x()), &[tf_node("x", 0)]).await,
        bad,
        &["outputs[0].name", "\"sum\"", "\"product\""],
    );
    refused(tf(pair("b", x()), &[tf_node("sum", 1)]).await, bad, &["outputs[0].name", "sum:1"]);
    refused(tf(pair("b", x()), &[tf_node("sum", 0), tf_node("", 0)]).await, bad, &["each output once"]);
    let many = vec![tf_input("a", 0, x()); 3];
    refused(tf(many, &[]).await, bad, &["inputs", "2 tensors", "3"]);
    let lite = async |inputs| session.tflite_model_run(&model, inputs).await;
    refused(lite(vec![x()]).await, bad, &["2 tensors"]);
    refused(lite(vec![x(), wide()]).await, bad, &["inputs[1].shape"]);
    refused(lite(vec![x(); 300]).await, bad, &["at most 256 tensors"]);
    refused(session.torch_model_run(&model, vec![x(), whole()]).await, bad, &["inputs[1].dtype"]);
    let doubles = Tensor::new(&[1, 4], &[0.0_f64; 4]).unwrap();
    refused(
        session.torch_model_run(&model, vec![x(), doubles]).await,
        bad,
        &["u8, i8, i16, i32, i64, f16, f32"],
    );
    refused(session.run(&model, vec![named("", x()), named("", x())], &["#2"]).await, bad, &["\"#2\""]);
}

/// Sends what the client library would not.
async fn send(client: &Client, session: &Session, op: Op) -> Result<Outcome, Error> {
    let request =
        tonic::Request::new(RunRequest { session: session.id(), op: Some(op), ..RunRequest::default() });
    let reply = OperationsClient::new(client.link().clone()).run(request).await;
    reply.map(|reply| reply.into_inner().outcome.unwrap()).map_err(|status| Error::from_status(&status))
}

#[tokio::test]
async fn options_are_bounded_and_names_have_no_place() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    let model = session.register(model_file("net.tflite")).await.unwrap();
    load(&session, &model).await;
    let image = || tensor(&cases()[0], "image", &[8, 8, 3]);
    let lite = |options: usize, name: &str| {
        Op::TfliteModelRun(TfliteModelRunRequest {
            model: model.id().into(),
            run_options: vec![7; options].into(),
            inputs: vec![named(name, image())],
        })
    };
    let outcome = send(&client, &session, lite(RUN_OPTIONS_BYTES_MAX, "")).await.unwrap();
    assert!(matches!(outcome, Outcome::TfliteModelRun(run) if run.outputs.len() == 1));
    let error = refused(
        send(&client, &session, lite(RUN_OPTIONS_BYTES_MAX + 1, "")).await,
        Reason::BadArgument,
        &["4096"],
    );
    assert_eq!(error.detail(), &Detail::Field("run_options".into()));
    let error = refused(send(&client, &session, lite(0, "image")).await, Reason::BadArgument, &["by place"]);
    assert_eq!(error.detail(), &Detail::Field("inputs[0].name".into()));
    let torch = TorchModelRunRequest { inputs: vec![named("", image())], ..Default::default() };
    let error = refused(send(&client, &session, Op::TorchModelRun(torch)).await, Reason::BadArgument, &[]);
    assert_eq!(error.detail(), &Detail::Field("model".into()));
}

/// What torch has no type for may still come out of a model.
#[tokio::test]
async fn torch_gives_no_type_that_it_does_not_have() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    const F64: u64 = 11;
    let cast = onnx::node("Cast", &["x"], &["y"]).message(5, onnx::number_attribute("to", F64));
    let (x, y) = (onnx::port("x", onnx::F32, &[2]), onnx::port("y", F64, &[2]));
    let model = onnx::model(vec![cast], vec![], vec![x], vec![y]);
    let model = session.register(ResourceFiles::model("m", model)).await.unwrap();
    load(&session, &model).await;
    let x = || Tensor::new(&[2], &[0.5_f32, 2.0]).unwrap();
    refused(session.torch_model_run(&model, vec![x()]).await, Reason::ModelRejected, &["f64", "model_run"]);
    let ran = session.tflite_model_run(&model, vec![x()]).await.unwrap();
    assert_eq!(ran.outputs[0].tensor.as_ref().unwrap().elements::<f64>().unwrap().as_ref(), [0.5, 2.0]);
}

#[tokio::test]
async fn a_model_is_loaded_by_one_session_through_one_family_until_it_is_unloaded() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    let other = client.open_session(SessionOptions::default()).await.unwrap();
    let model = session.register(model_file("two.tflite")).await.unwrap();
    let x = || Tensor::new(&[1, 4], &[1.0_f32; 4]).unwrap();
    let pair = || vec![x(), x()];
    let absent = Reason::NotFound;
    refused(session.tflite_model_run(&model, pair()).await, absent, &["tflite_model_load"]);
    refused(session.tflite_model_unload(&model).await, absent, &["tflite_model_load"]);
    refused(other.tflite_model_load(&model).await, absent, &["resource"]);

    session.tflite_model_load(&model).await.unwrap();
    session.tflite_model_load(&model).await.unwrap();
    session.tflite_model_run(&model, pair()).await.unwrap();
    // By family.
    refused(session.torch_model_run(&model, pair()).await, absent, &["torch_model_load"]);
    let nodes = || vec![tf_input("a", 0, x()), tf_input("b", 0, x())];
    refused(session.tf_model_run(&model, nodes(), &[]).await, absent, &["tf_model_load"]);
    // By session, though both hold the resource.
    other.register(model_file("two.tflite")).await.unwrap();
    refused(other.tflite_model_run(&model, pair()).await, absent, &["tflite_model_load"]);
    other.tflite_model_load(&model).await.unwrap();
    session.tflite_model_unload(&model).await.unwrap();
    refused(session.tflite_model_run(&model, pair()).await, absent, &["tflite_model_load"]);
    refused(session.tflite_model_unload(&model).await, absent, &["tflite_model_load"]);
    other.tflite_model_run(&model, pair()).await.unwrap();
    // What loads on first use does so still.
    let inputs = || vec![named("", x()), named("", x())];
    session.run(&model, inputs(), &[]).await.unwrap();
    other.tflite_model_unload(&model).await.unwrap();
    session.run(&model, inputs(), &[]).await.unwrap();
    session.tflite_model_load(&model).await.unwrap();
    session.tflite_model_run(&model, pair()).await.unwrap();
    session.unregister(&model).await.unwrap();
    refused(session.tflite_model_run(&model, pair()).await, absent, &["resource"]);
}

#[tokio::test]
async fn only_models_are_loaded() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let data =
        ResourceFiles::new(vaccel_client::ResourceKind::Data, vec![("d".to_owned(), vec![1_u8].into())]);
    let data = session.register(data).await.unwrap();
    refused(session.tf_model_load(&data).await, Reason::BadArgument, &["a resource of kind MODEL", "DATA"]);
}

#[tokio::test]
async fn a_session_of_an_agent_that_was_restarted_has_loaded_what_it_had() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let model = session.register(model_file("two.onnx")).await.unwrap();
    session.torch_model_load(&model).await.unwrap();
    let x = || Tensor::new(&[1, 4], &[1.0_f32; 4]).unwrap();
    session.torch_model_run(&model, vec![x(), x()]).await.unwrap();
    let folder = agent.kill();
    let _agent = Agent::start_in(folder, &["unix://{}/s"], &[]);
    session.torch_model_run(&model, vec![x(), x()]).await.unwrap();
    // What was not loaded before is not loaded now.
    refused(session.tflite_model_run(&model, vec![x(), x()]).await, Reason::NotFound, &["tflite_model_load"]);
}

#[tokio::test]
async fn the_noop_engine_gives_back_what_it_gets() {
    let agent = Agent::unix(&[]);
    let client = agent.guest(0).await;
    let options = SessionOptions { engine: "noop".into(), ..SessionOptions::default() };
    let session = client.open_session(options).await.unwrap();
    let model = session.register(ResourceFiles::model("m", "no model at all")).await.unwrap();
    let description = load(&session, &model).await;
    assert_eq!(description, ModelDescription::default());
    let [one, two] = [[1.0_f32, 2.0], [3.0, 4.0]].map(|numbers| Tensor::new(&[2], &numbers).unwrap());
    let inputs = vec![tf_input("a", 0, one.clone()), tf_input("b", 0, two.clone())];
    let ran = session.tf_model_run(&model, inputs.clone(), &[tf_node("y", 0)]).await.unwrap();
    assert_eq!(ran.status.message, "Operation handled by noop plugin");
    assert_eq!((ran.status.code, ran.outputs.len(), ran.outputs[0].name.as_str()), (0, 1, "y"));
    assert_eq!(ran.outputs[0].tensor.as_ref().unwrap().data, one.data);
    let ran = session.tf_model_run(&model, inputs, &[]).await.unwrap();
    let given = |outputs: Vec<NamedTensor>| -> Vec<Vec<u8>> {
        outputs.into_iter().map(|output| output.tensor.unwrap().data.to_vec()).collect()
    };
    let both = vec![one.data.to_vec(), two.data.to_vec()];
    assert_eq!(given(ran.outputs), both);
    let placed = || vec![one.clone(), two.clone()];
    assert_eq!(given(session.tflite_model_run(&model, placed()).await.unwrap().outputs), both);
    assert_eq!(given(session.torch_model_run(&model, placed()).await.unwrap().outputs), both);
    session.tf_model_unload(&model).await.unwrap();
    session.torch_model_unload(&model).await.unwrap();
    session.unregister(&model).await.unwrap();
    refused(session.tf_model_load(&model).await, Reason::NotFound, &["resource"]);
    refused(session.tflite_model_run(&model, placed()).await, Reason::NotFound, &["resource"]);
}

#[tokio::test]
async fn onnx_runtime_serves_the_families_and_says_what_it_does_not_load() {
    let library = onnxruntime();
    let agent = Agent::unix(&["--onnxruntime", library.to_str().unwrap()]);
    let client = agent.guest(0).await;
    let on = async |engine: &str| {
        let options = SessionOptions { engine: engine.into(), ..SessionOptions::default() };
        client.open_session(options).await.unwrap()
    };
    let session = on("onnxruntime").await;
    let model = session.register(model_file("net.onnx")).await.unwrap();
    load(&session, &model).await;
    let case = &cases()[1];
    let image = || tensor(case, "image", &[8, 8, 3]);
    agrees(&session.torch_model_run(&model, vec![image()]).await.unwrap().outputs[0], case, "probabilities");
    for (name, title) in [("net.tflite", "TensorFlow Lite"), ("net.pb", "frozen TensorFlow graph")] {
        let model = session.register(model_file(name)).await.unwrap();
        refused(session.tf_model_load(&model).await, Reason::ModelRejected, &[title, "tract", "onnxruntime"]);
        // Without a wish the engine is the one that loads it.
        let free = on("").await;
        let model = free.register(model_file(name)).await.unwrap();
        free.tflite_model_load(&model).await.unwrap();
        agrees(
            &free.tflite_model_run(&model, vec![image()]).await.unwrap().outputs[0],
            case,
            "probabilities",
        );
    }
}
