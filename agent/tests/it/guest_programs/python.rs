//! The module for Python, with everything it has.

use std::process::Command;

use super::programs::{dynamic_library, header, run, source};
use super::{everything_holds, models};
use crate::support::onnx::{self, F32, f32s, model, node, port};
use crate::support::{Agent, digits, onnxruntime, output_text, repository, seer};

/// Python, as it finds the module.
fn python() -> Command {
    let mut command = Command::new(repository().join("target/inference-clients/bin/python"));
    command.env("PYTHONPATH", repository().join("client/python")).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("VACCEL_GUEST_LIBRARY", dynamic_library());
    command
}

#[test]
fn the_program_in_the_readme_does_what_it_shows() {
    let agent = Agent::unix(&["--engine", "tract"]);
    std::fs::copy(&digits("png")[0].0, agent.folder().join("photo.png")).unwrap();
    std::fs::write(agent.folder().join("model.onnx"), onnx::add()).unwrap();
    let readme = std::fs::read_to_string(repository().join("README.md")).unwrap();
    let shown = readme.split("```python\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let mut command = python();
    command.args(["-c", shown]).env("VACCEL_RPC_ADDRESS", agent.address()).current_dir(agent.folder());
    assert_eq!(run(&mut command), "two [[2.0, 4.0]] [[1.0, 2.0], [3.0, 4.0]] 1\n");
}

#[test]
fn without_the_library_it_says_what_to_do() {
    let output =
        python().args(["-c", "import vaccel"]).env("VACCEL_GUEST_LIBRARY", "/absent.so").output().unwrap();
    let said = output_text(&output);
    assert!(!output.status.success() && said.contains("ImportError: /absent.so: "), "{said}");
    assert!(said.contains("name it in VACCEL_GUEST_LIBRARY"), "{said}");
}

#[test]
fn every_method_does_from_python_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![node("Identity", &["x"], &["same"]), node("Add", &["x", "b"], &["more"])];
    let float = |name| port(name, F32, &[-1, 2]);
    let both = model(
        nodes,
        vec![f32s("b", &[2], &[1.0, 2.0])],
        vec![float("x")],
        vec![float("same"), float("more")],
    );
    let texts = |name| port(name, 8, &[-1, 2]);
    let strings =
        model(vec![node("Identity", &["in"], &["out"])], vec![], vec![texts("in")], vec![texts("out")]);
    let things = seer::image([2, 1], [0, 3]);
    for (path, content) in [
        ("models/both/1/model.onnx", &both[..]),
        ("models/strings/1/model.onnx", &strings),
        ("seer.onnx", &seer::single()),
        ("things.png", &things),
    ] {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    let library = onnxruntime();
    let engines = ["--engine", "tract", "--onnxruntime", library.to_str().unwrap()];
    let flags = [&engines[..], &["--model-repository", "{}/models"]].concat();
    let agent = Agent::start_in(folder, &["unix://{}/s"], &flags);
    let mut command = python();
    command.arg(source("python.py")).arg(agent.address()).arg(header()).args(models(&agent));
    command.args(digits("png").into_iter().take(2).map(|(path, _)| path));
    command.args(["seer.onnx", "things.png"].map(|name| agent.folder().join(name)));
    everything_holds(command, agent);
}
