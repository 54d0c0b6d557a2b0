//! What a session computes on, by its own hints and by the host's policy, and what it learns of its calls.

use vaccel_client::{ClassifyOptions, Reason, ResourceFiles, Session, SessionOptions, Tensor, hints, named};

use crate::support::{Agent, digits, onnx, read};

async fn wishing(agent: &Agent, hints: u32) -> Result<Session, vaccel_client::Error> {
    agent.guest(0).await.open_session(SessionOptions { hints, ..SessionOptions::default() }).await
}

/// The name of the class that an image shows.
async fn label(session: &Session) -> String {
    let image = read(&digits("png")[0].0);
    session.classify([image], ClassifyOptions::default()).await.unwrap()[0][0].name.clone()
}

const DUMMY: &str = "This is a dummy classification tag!";

#[tokio::test]
async fn hints_choose_an_engine_and_one_that_is_absent_is_named() {
    let agent = Agent::unix(&[]);
    for wish in [0, hints::CPU, hints::TORCH | hints::GPU, hints::ALL, hints::REMOTE] {
        assert_ne!(label(&wishing(&agent, wish).await.unwrap()).await, DUMMY, "{wish:#x}");
    }
    assert_eq!(label(&wishing(&agent, hints::DEBUG).await.unwrap()).await, DUMMY);
    for wish in [hints::GPU, hints::FPGA, hints::JETSON | hints::GPU] {
        let refusal = wishing(&agent, wish).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Disabled);
        let message = refusal.message();
        assert!(message.contains(&hints::names(wish)) && message.contains("CPU"), "{message}");
    }
    let engines = agent.guest(0).await.info().await.unwrap().engines;
    let kinds = |name: &str| engines.iter().find(|engine| engine.name == name).unwrap().hints;
    assert_eq!((kinds("noop"), kinds("tract") & hints::CPU), (hints::DEBUG, hints::CPU));
}

#[tokio::test]
async fn the_noop_engine_answers_as_vaccels_plugin_and_needs_no_model_that_runs() {
    let agent = Agent::unix(&["--engine", "noop"]);
    let (_, session) = agent.session().await;
    let images = vec![read(&digits("png")[0].0); 2];
    let classified = session.classify(images, ClassifyOptions::default()).await.unwrap();
    assert_eq!(classified.iter().map(|labels| labels[0].name.as_str()).collect::<Vec<_>>(), [DUMMY; 2]);
    let model = session
        .register(ResourceFiles::model("anything", bytes::Bytes::from_static(b"at all")))
        .await
        .unwrap();
    let tensor = Tensor::new(&[3], &[1_u8, 2, 3]).unwrap();
    let run = session.run(&model, vec![named("x", tensor.clone())], &[]).await.unwrap();
    assert_eq!(run.outputs[0].tensor.as_ref().unwrap().data, tensor.data);
    session.unregister(&model).await.unwrap();
    let refusal = session.run(&model, vec![], &[]).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::NotFound);
    // A session may still wish for an engine that computes.
    assert_ne!(label(&wishing(&agent, hints::CPU).await.unwrap()).await, DUMMY);
}

#[tokio::test]
async fn the_hosts_policy_decides_by_tenant() {
    let folder = tempfile::tempdir().unwrap();
    let policy = r#"
        [[policy]]
        tenant = "unix:*/first:*"
        engine = "noop"

        [[policy]]
        tenant = "unix:*"
        operations = ["noop"]
    "#;
    let file = folder.path().join("agent.toml");
    std::fs::write(&file, policy).unwrap();
    let addresses = ["unix://{}/first", "unix://{}/second", "tcp://127.0.0.1:0"];
    let agent = Agent::start(&addresses, &["--config", file.to_str().unwrap()]);
    let session = async |index: usize, engine: &str| {
        let options = SessionOptions { engine: engine.into(), ..SessionOptions::default() };
        agent.guest(index).await.open_session(options).await
    };
    assert_eq!(label(&session(0, "").await.unwrap()).await, DUMMY);
    let refusal = session(0, "tract").await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::Disabled);
    assert!(refusal.message().contains("noop") && refusal.message().contains("policy"), "{refusal}");

    let second = session(1, "tract").await.unwrap();
    second.noop().await.unwrap();
    let image = read(&digits("png")[0].0);
    let refusal = second.classify([image], ClassifyOptions::default()).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::Disabled);
    assert!(refusal.message().contains("image_classification is off"), "{refusal}");
    let operations = agent.guest(1).await.info().await.unwrap().operations;
    assert_eq!(operations.iter().map(|operation| operation.name.as_str()).collect::<Vec<_>>(), ["noop"]);

    assert_ne!(label(&session(2, "").await.unwrap()).await, DUMMY);
}

#[test]
fn a_policy_with_an_operation_that_there_is_none_of_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agent.toml");
    for (policy, named) in [
        ("[[policy]]\ntenant = '*'\noperations = ['nop']", "nop"),
        ("[[policy]]\noperations = ['noop']", "tenant"),
        ("[[policy]]\ntenant = '*'\noperation = ['noop']", "operation"),
    ] {
        std::fs::write(&file, policy).unwrap();
        for command in [&["check-config"][..], &["--address", "tcp://127.0.0.1:0"]] {
            let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
            let output = agent.args(command).arg("--config").arg(&file).output().unwrap();
            assert_eq!(output.status.code(), Some(78), "{policy}");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(text.contains(named), "{policy}: {text}");
        }
    }
}

#[tokio::test]
async fn a_session_learns_what_its_calls_took() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    for _ in 0..10 {
        session.noop().await.unwrap();
    }
    let model = session.register(ResourceFiles::model("m", onnx::echo())).await.unwrap();
    let tensor = Tensor::new(&[3], &[1.0_f32, 2.0, 3.0]).unwrap();
    let run = session.run(&model, vec![named("x", tensor)], &[]).await.unwrap();
    session.run(&model, vec![], &[]).await.unwrap_err();
    let profile = session.profile().await.unwrap();
    assert_eq!(profile.iter().map(|calls| calls.name.as_str()).collect::<Vec<_>>(), ["model_run", "noop"]);
    let [ran, noop] = &profile[..] else { panic!("two operations") };
    assert_eq!((ran.failed, noop.failed), (1, 0));
    assert_eq!(noop.call.unwrap().count, 10);
    let [call, queue, stage] = [ran.call, ran.queue, ran.run].map(Option::unwrap);
    assert_eq!([call.count, queue.count, stage.count], [2, 1, 1]);
    assert_eq!((stage.total_us, stage.p50_us), (run.timings.run_us, run.timings.run_us));
    assert!(call.total_us >= stage.total_us + queue.total_us && call.max_us >= call.p50_us);
    // Another session has its own.
    let other = client.open_session(SessionOptions::default()).await.unwrap();
    assert!(other.profile().await.unwrap().is_empty());
}
