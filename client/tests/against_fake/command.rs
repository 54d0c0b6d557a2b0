//! The `vaccel` command when all goes well, and when one image does not.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::Ordering::SeqCst;

use serde_json::{Value, json};
use vaccel_client::proto::limits::MESSAGE_BYTES_MAX;
use vaccel_client::{Error, Tensor, npy};

use crate::fake::{Fake, Step};

fn vaccel(fake: &Fake, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel"));
    command.env_clear().arg("--address").arg(fake.endpoint().to_string()).args(arguments);
    command
}

/// Runs a command in `folder` beside the fake agent, which lives on this thread.
async fn output(fake: &Fake, folder: &Path, arguments: &[&str]) -> Output {
    let mut command = vaccel(fake, arguments);
    command.current_dir(folder);
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

fn text(output: &Output) -> &str {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::str::from_utf8(&output.stdout).unwrap()
}

fn document(output: &Output) -> Value {
    serde_json::from_str(text(output)).unwrap()
}

#[tokio::test]
async fn info_and_ops_are_text_or_json() {
    let (fake, folder) = (Fake::listening(), tempfile::tempdir().unwrap());
    let info = output(&fake, folder.path(), &["info"]).await;
    assert!(
        text(&info).starts_with(&format!("agent      version fake at {}\n", fake.endpoint())),
        "{}",
        text(&info)
    );
    assert!(text(&info).contains("absent: no library"));
    let info = document(&output(&fake, folder.path(), &["info", "--json"]).await);
    assert_eq!(info["engines"][0]["absent_because"], "no library");
    assert_eq!(text(&output(&fake, folder.path(), &["ops"]).await), "noop  nothing\n");
    let ops = document(&output(&fake, folder.path(), &["--json", "ops"]).await);
    assert_eq!(ops, json!([{"name": "noop", "summary": "nothing"}]));
}

#[tokio::test]
async fn images_are_classified_in_order() {
    let (fake, folder) = (Fake::listening(), tempfile::tempdir().unwrap());
    for (name, content) in [("a.png", "1"), ("long.png", "22"), ("m.onnx", "model")] {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let arguments = ["classify", "a.png", "long.png", "--model", "m.onnx"];
    let human = output(&fake, folder.path(), &arguments).await;
    assert_eq!(text(&human), "a.png       0.0 %\nlong.png    0.0 %\n");
    let labels = document(&output(&fake, folder.path(), &[&arguments[..], &["--json"]].concat()).await);
    let labels_of = |index: u32| json!([{"name": "", "index": index, "probability": 0.0}]);
    let expected =
        json!([{"file": "a.png", "labels": labels_of(1)}, {"file": "long.png", "labels": labels_of(2)}]);
    assert_eq!(labels, expected);
    assert!(fake.state.held().is_empty(), "the sessions are given back");

    fake.state.then(Step::Refuse(Error::field(
        "images[1]",
        "a PNG or JPEG file",
        "2 bytes of something else",
    )));
    let refused = output(&fake, folder.path(), &arguments).await;
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(message.starts_with("vaccel: long.png: images[1]: expected a PNG"), "{message}");
    assert!(fake.state.held().is_empty());
}

#[tokio::test]
async fn a_model_runs_on_files() {
    let (fake, folder) = (Fake::listening(), tempfile::tempdir().unwrap());
    std::fs::write(folder.path().join("m.onnx"), "model").unwrap();
    let tensor = Tensor::new(&[1, 2], &[1.5_f32, 2.0]).unwrap();
    npy::write(&folder.path().join("x.npy"), &tensor).unwrap();
    let arguments = ["run", "m.onnx", "--input", "x=x.npy"];
    let human = output(&fake, folder.path(), &arguments).await;
    assert_eq!(text(&human), "x  f32[1, 2]  1.5 2\nwaited 1 µs, ran 2 µs in a batch of 3\n");

    let arguments = [&arguments[..], &["--output", "out", "--json"]].concat();
    let run = document(&output(&fake, folder.path(), &arguments).await);
    let outputs = json!([{"name": "x", "dtype": "f32", "shape": [1, 2], "file": "out/x.npy"}]);
    assert_eq!(run, json!({"outputs": outputs, "timings": {"queue_us": 1, "run_us": 2, "batch_size": 3}}));
    assert_eq!(npy::read(&folder.path().join("out/x.npy")).unwrap(), tensor);
}

#[tokio::test]
async fn a_file_longer_than_a_message_goes_in_pieces() {
    let (fake, folder) = (Fake::listening(), tempfile::tempdir().unwrap());
    std::fs::write(folder.path().join("m.onnx"), "model").unwrap();
    let bytes = MESSAGE_BYTES_MAX + 1;
    let tensor = Tensor::new(&[i64::try_from(bytes).unwrap()], &vec![1_u8; bytes]).unwrap();
    npy::write(&folder.path().join("x.npy"), &tensor).unwrap();
    let arguments = ["run", "m.onnx", "--input", "x=x.npy", "--output", "out", "--json"];
    document(&output(&fake, folder.path(), &arguments).await);
    assert_eq!(fake.state.large.load(SeqCst), 1);
    assert!(npy::read(&folder.path().join("out/x.npy")).unwrap() == tensor);
}

#[tokio::test]
async fn a_reader_that_left_is_no_error() {
    let fake = Fake::listening();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = vaccel(&fake, &["ops"]);
    command.stdout(writer).stderr(Stdio::piped());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
