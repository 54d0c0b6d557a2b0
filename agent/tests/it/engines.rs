//! Two engines, one meaning: tract and ONNX Runtime give the same results, and what is absent is an error.

use std::process::Command;

use vaccel_agent::Direct;
use vaccel_agent::config::EngineConfig;
use vaccel_client::{
    CallOptions, DType, Reason, ResourceFiles, Session, SessionOptions, Sgemm, Tensor, named,
};

use crate::support::{Agent, digits, onnx, onnxruntime, output_text, read, repository, vaccel};

const TOLERANCE: f32 = 1e-4;

fn session_on(engine: &str) -> SessionOptions {
    SessionOptions { engine: engine.into(), ..SessionOptions::default() }
}

/// The largest difference between two lists of numbers.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[tokio::test]
async fn both_engines_give_the_same_scores_and_probabilities() {
    let library = onnxruntime();
    let agent = Agent::unix(&["--onnxruntime", library.to_str().unwrap()]);
    let client = agent.guest(0).await;
    let images: Vec<_> = digits("png").iter().chain(&digits("jpg")).map(|(path, _)| read(path)).collect();
    let digits_model = read(&repository().join("agent/models/digits.onnx"));
    let pixels: Vec<f32> = (0..4 * 64_u16).map(|n| f32::from(n % 17) / 8.0 - 0.5).collect();
    let batch = Tensor::new(&[4, 1, 8, 8], &pixels).unwrap();

    let mut scores = Vec::new();
    let mut probabilities = Vec::new();
    for engine in ["tract", "onnxruntime"] {
        let session = client.open_session(session_on(engine)).await.unwrap();
        let model =
            session.register(ResourceFiles::model("digits.onnx", digits_model.clone())).await.unwrap();
        let run = session.run(&model, vec![named("image", batch.clone())], &["logits"]).await.unwrap();
        let tensor = run.outputs[0].tensor.clone().unwrap();
        assert_eq!(tensor.shape, [4, 10]);
        scores.push(tensor.elements::<f32>().unwrap().to_vec());
        let options = vaccel_client::ClassifyOptions { model: Some(&model), top_k: 10 };
        let found = session.classify(images.clone(), options).await.unwrap();
        let by_class = found.iter().flat_map(|labels| {
            let mut labels = labels.clone();
            labels.sort_by_key(|label| label.index);
            labels.into_iter().map(|label| label.probability).collect::<Vec<_>>()
        });
        probabilities.push(by_class.collect::<Vec<f32>>());
    }
    assert!(difference(&scores[0], &scores[1]) <= TOLERANCE);
    assert!(difference(&probabilities[0], &probabilities[1]) <= TOLERANCE);
    let engines = client.info().await.unwrap().engines;
    assert!(engines.iter().all(|engine| engine.absent_because.is_empty()), "{engines:?}");
}

#[tokio::test]
async fn numbers_in_fewer_bytes_mean_the_same() {
    let library = onnxruntime();
    let agent = Agent::unix(&["--onnxruntime", library.to_str().unwrap()]);
    let client = agent.guest(0).await;
    let digits_model = read(&repository().join("agent/models/digits.onnx"));
    let bytes: Vec<u8> = (0..=u8::MAX).map(|n| n % 17).collect();
    let shape = [4, 1, 8, 8];
    let whole = Tensor::new(&shape, &bytes.iter().map(|n| f32::from(*n)).collect::<Vec<_>>()).unwrap();
    let narrow = [
        whole.to_f16().unwrap(),
        Tensor::new(&shape, &bytes).unwrap(),
        Tensor::new(&shape, &bytes.iter().map(|n| n.cast_signed()).collect::<Vec<_>>()).unwrap(),
        Tensor::new(&shape, &bytes.iter().map(|n| u16::from(*n)).collect::<Vec<_>>()).unwrap(),
    ];
    for engine in ["tract", "onnxruntime"] {
        let session = client.open_session(session_on(engine)).await.unwrap();
        let files = ResourceFiles::model("digits.onnx", digits_model.clone());
        let model = session.register(files).await.unwrap();
        let run = async |tensor: &Tensor| {
            let inputs = vec![named("image", tensor.clone())];
            let run = session.run(&model, inputs, &["logits"]).await;
            run.map(|run| run.outputs[0].tensor.as_ref().unwrap().data.clone())
        };
        let expected = run(&whole).await.unwrap();
        for tensor in &narrow {
            assert_eq!(run(tensor).await.unwrap(), expected, "{engine}, {}", tensor.dtype().name());
        }
        // Of which some numbers are none of f32.
        let wide = Tensor::new(&shape, &[7_i32; 4 * 64]).unwrap();
        assert_eq!(run(&wide).await.unwrap_err().reason(), Reason::BadArgument);
    }
}

#[tokio::test]
async fn replies_come_in_fewer_bytes_where_that_is_asked_for() {
    let agent = Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0"], &["--engine", "tract"]);
    for index in [0, 1] {
        let session = agent.guest(index).await.open_session(session_on("tract")).await.unwrap();
        let model = session.register(ResourceFiles::model("m", onnx::echo())).await.unwrap();
        let wanting = |reply_type| session.with(CallOptions { reply_type, ..CallOptions::default() });
        // The long ones lie in shared memory, from the second call on.
        for count in [3, 70_000, 70_000, 70_000] {
            let numbers: Vec<f32> = (0..count).map(|at| at as f32 / 7.0).collect();
            let whole = Tensor::new(&[count], &numbers).unwrap();
            let run = async |session: Session| {
                let run = session.run(&model, vec![named("x", whole.clone())], &[]).await;
                run.map(|run| run.outputs[0].tensor.clone().unwrap())
            };
            let half = run(wanting(DType::F16)).await.unwrap();
            assert_eq!((half.dtype(), &half.shape), (DType::F16, &whole.shape));
            assert!(half.data == whole.to_f16().unwrap().data);
            let brain = run(wanting(DType::Bf16)).await.unwrap();
            assert_eq!((brain.dtype(), brain.data.len()), (DType::Bf16, 2 * numbers.len()));
            assert!(run(wanting(DType::Unspecified)).await.unwrap().data == whole.data);
            let refusal = run(wanting(DType::F64)).await.unwrap_err();
            assert_eq!(refusal.reason(), Reason::BadArgument);
            assert!(refusal.message().contains("reply_type"), "{refusal}");
        }
        let ones = || Tensor::new(&[4, 4], &[1.0_f32; 16]).unwrap();
        let product = wanting(DType::F16).sgemm(Sgemm::new(ones(), ones()).unwrap()).await.unwrap();
        assert_eq!((product.dtype(), &product.data[..4]), (DType::F32, &4_f32.to_le_bytes()[..]));
    }
}

#[tokio::test]
async fn scores_equal_an_independent_implementation() {
    let text = std::fs::read_to_string(repository().join("agent/tests/data/digits_logits.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let files = ResourceFiles::model("digits.onnx", read(&repository().join("agent/models/digits.onnx")));
    let model = session.register(files).await.unwrap();
    let options = vaccel_client::ClassifyOptions { model: Some(&model), top_k: 10 };
    for case in cases.as_array().unwrap() {
        let image = read(&repository().join("examples/images").join(case["file"].as_str().unwrap()));
        let logits: Vec<f64> =
            case["logits"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect();
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        for label in &session.classify([image], options).await.unwrap()[0] {
            let expected = logits[label.index as usize].exp() / sum;
            let found = f64::from(label.probability);
            assert!((found - expected).abs() < 1e-4, "{case}: {} {found} {expected}", label.name);
        }
    }
}

#[tokio::test]
async fn models_run_with_every_type_and_open_dimensions() {
    let library = onnxruntime();
    let agent = Agent::unix(&["--onnxruntime", library.to_str().unwrap()]);
    let client = agent.guest(0).await;
    for engine in ["tract", "onnxruntime"] {
        let session = client.open_session(session_on(engine)).await.unwrap();
        let model = session.register(ResourceFiles::model("m.onnx", onnx::add())).await.unwrap();
        for rows in [1, 3, 0, 2] {
            let input = Tensor::new(&[rows, 2], &vec![0.5_f32; 2 * usize::try_from(rows).unwrap()]).unwrap();
            let run = session.run(&model, vec![named("", input)], &[]).await.unwrap();
            let output = run.outputs[0].tensor.as_ref().unwrap();
            assert_eq!(output.shape, [rows, 2], "{engine}");
            let expected: Vec<f32> = [1.5, 2.5].repeat(usize::try_from(rows).unwrap());
            assert_eq!(output.elements::<f32>().unwrap().as_ref(), expected);
        }
        // ONNX type numbers, the identity of which both engines must give back bit by bit.
        for (number, tensor) in every_type() {
            let shape = [-1];
            let nodes = vec![onnx::node("Identity", &["x"], &["y"])];
            let (x, y) = (onnx::port("x", number, &shape), onnx::port("y", number, &shape));
            let identity = onnx::model(nodes, vec![], vec![x], vec![y]);
            let model = session.register(ResourceFiles::model("m.onnx", identity)).await.unwrap();
            let run = session.run(&model, vec![named("x", tensor.clone())], &[]).await;
            match run {
                Ok(run) => {
                    let output = run.outputs[0].tensor.as_ref().unwrap();
                    assert_eq!((output.dtype, &output.data), (tensor.dtype, &tensor.data), "{engine}");
                }
                // Which the built-in engine does not have.
                Err(refusal) => assert!(engine == "tract" && number == 16, "{engine} {number}: {refusal:?}"),
            }
        }
        session.close().await.unwrap();
    }
}

fn every_type() -> Vec<(u64, Tensor)> {
    use half::{bf16, f16};
    let shape = [2];
    let halves = [f16::from_f32(0.5), f16::from_f32(-2.0)];
    let brains = [bf16::from_f32(0.5), bf16::from_f32(-2.0)];
    let truths = Tensor::from_bytes(vaccel_client::DType::Bool, &shape, vec![1, 0].into());
    vec![
        (1, Tensor::new(&shape, &[0.5_f32, -2.0]).unwrap()),
        (2, Tensor::new(&shape, &[1_u8, 255]).unwrap()),
        (3, Tensor::new(&shape, &[1_i8, -128]).unwrap()),
        (4, Tensor::new(&shape, &[1_u16, u16::MAX]).unwrap()),
        (5, Tensor::new(&shape, &[1_i16, i16::MIN]).unwrap()),
        (6, Tensor::new(&shape, &[1_i32, i32::MIN]).unwrap()),
        (7, Tensor::new(&shape, &[1_i64, i64::MIN]).unwrap()),
        (9, truths),
        (10, Tensor::new(&shape, &halves).unwrap()),
        (11, Tensor::new(&shape, &[0.5_f64, -2.0]).unwrap()),
        (12, Tensor::new(&shape, &[1_u32, u32::MAX]).unwrap()),
        (13, Tensor::new(&shape, &[1_u64, u64::MAX]).unwrap()),
        (16, Tensor::new(&shape, &brains).unwrap()),
    ]
}

#[tokio::test]
async fn an_engine_or_device_that_was_asked_for_and_is_absent_is_an_error() {
    let agent = Agent::unix(&[]);
    let client = agent.guest(0).await;
    let asked = |engine: &str, device: &str| SessionOptions {
        engine: engine.into(),
        device: device.into(),
        ..SessionOptions::default()
    };
    for (options, reason, named) in [
        (asked("", "cuda:0"), Reason::Disabled, "cpu"),
        (asked("tract", "gpu"), Reason::Disabled, "cpu"),
        (asked("onnxruntime", ""), Reason::Disabled, "--onnxruntime"),
        (asked("torch", ""), Reason::BadArgument, "tract"),
    ] {
        let refusal = client.open_session(options).await.unwrap_err();
        assert_eq!(refusal.reason(), reason, "{refusal:?}");
        assert!(refusal.message().contains(named), "{refusal:?}");
    }
    assert!(client.open_session(asked("tract", "cpu")).await.is_ok());
}

#[test]
fn an_agent_whose_engine_or_device_is_absent_does_not_start() {
    for (flags, named) in [
        (vec!["--onnxruntime", "absent.so"], "absent.so"),
        (vec!["--onnxruntime", "Cargo.toml"], "Cargo.toml"),
        (vec!["--engine", "onnxruntime"], "--onnxruntime"),
        (vec!["--engine", "torch"], "torch"),
        (vec!["--device", "cuda:0"], "cuda:0"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
        let output = command.args(&flags).args(["--address", "tcp://127.0.0.1:0"]).output().unwrap();
        assert_eq!(output.status.code(), Some(78), "{flags:?}: {}", output_text(&output));
        assert!(output_text(&output).contains(named), "{flags:?}: {}", output_text(&output));
    }
}

#[test]
fn the_library_is_found_by_its_variable_and_serves_by_default() {
    let library = onnxruntime();
    let config = EngineConfig { onnxruntime: Some(library.clone()), threads: 1, ..EngineConfig::default() };
    let image = read(&digits("png")[0].0);
    let direct = Direct::new(&config).unwrap().classify(&[image], 1).unwrap();
    assert_eq!(direct[0].labels.len(), 1);

    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    command.arg("demo").env("ORT_DYLIB_PATH", &library);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    assert!(output_text(&output).contains("engine  onnxruntime: "), "{}", output_text(&output));
}

#[test]
fn the_command_runs_models_on_numpy_files() {
    let agent = Agent::unix(&[]);
    let folder = agent.folder();
    std::fs::write(folder.join("m.onnx"), onnx::add()).unwrap();
    // As numpy writes float32 [[10, 20]].
    let header = format!("{:<117}\n", "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }");
    let npy =
        [&b"\x93NUMPY\x01\x00\x76\x00"[..], header.as_bytes(), &10_f32.to_le_bytes(), &20_f32.to_le_bytes()];
    std::fs::write(folder.join("x.npy"), npy.concat()).unwrap();
    let mut command = vaccel();
    command.current_dir(folder).args(["--address", agent.address(), "--json", "run", "m.onnx"]);
    let output = command.args(["--input", "x=x.npy", "--output", "out"]).output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    let written = std::fs::read(folder.join("out/y.npy")).unwrap();
    let values: Vec<f32> =
        written[written.len() - 8..].chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    assert_eq!(values, [11.0, 22.0]);
}
