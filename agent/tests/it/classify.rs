//! The main job: a guest with nothing but a socket sends images, and the host's engine labels them.

use std::collections::BTreeSet;
use std::process::Output;

use crate::support::{Agent, digits, output_text, read, vaccel};
use vaccel_agent::Direct;
use vaccel_agent::config::EngineConfig;

const NAMES: [&str; 10] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// The first label of each image, as `vaccel classify --json` prints it.
fn labels(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{}", output_text(output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let first = |image: &serde_json::Value| image["labels"][0]["name"].as_str().unwrap().to_owned();
    json.as_array().unwrap().iter().map(first).collect()
}

#[test]
fn every_socket_gives_the_engines_own_labels() {
    let agent =
        Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0", "hvsock://{}/vm:2048", "unix://{}/t"], &[]);
    assert!(!agent.addresses[1].ends_with(":0"), "the port the kernel chose is told");
    let images = digits("png");
    let contents: Vec<_> = images.iter().map(|(path, _)| read(path)).collect();
    let direct = Direct::new(&EngineConfig::default()).unwrap().classify(&contents, 1).unwrap();
    let expected: Vec<String> = direct.iter().map(|image| image.labels[0].name.clone()).collect();

    let right = expected.iter().zip(&images).filter(|(name, (_, label))| *name == NAMES[*label]).count();
    assert_eq!(images.len(), 100);
    assert!(right >= 97, "{right} of 100 held-out digits are right");

    for address in &agent.addresses {
        let mut command = vaccel();
        command.args(["--json", "--address", address, "classify"]).args(images.iter().map(|(path, _)| path));
        assert_eq!(labels(&command.output().unwrap()), expected, "{address}");
    }
}

#[test]
fn jpeg_images_and_the_address_from_the_environment() {
    let agent = Agent::unix(&[]);
    let images = digits("jpg");
    let mut command = vaccel();
    command.args(["classify", "--json", "--top", "3"]).args(images.iter().map(|(path, _)| path));
    let output =
        command.env("VACCEL_RPC_ADDRESS", agent.address()).env("VACCEL_RPC_ADDR", "tcp://x:1").output();
    let output = output.unwrap();
    let expected: Vec<&str> = images.iter().map(|(_, label)| NAMES[*label]).collect();
    assert_eq!(labels(&output), expected);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let first = json[0]["labels"].as_array().unwrap();
    assert_eq!(first.len(), 3);
    assert!(first[0]["probability"].as_f64() >= first[1]["probability"].as_f64());
}

#[test]
fn the_ready_file_names_the_bound_addresses_and_goes_with_the_agent() {
    let agent = Agent::start(&["tcp://127.0.0.1:0", "unix://{}/s"], &["--ready-file", "{}/ready"]);
    // Written after the addresses are printed; the first answered call is later still.
    let ready = agent.folder().join("ready");
    while !ready.exists() {
        std::thread::yield_now();
    }
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&ready).unwrap()).unwrap();
    assert_eq!(json["pid"], agent.process.id());
    let told: Vec<&str> = json["addresses"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
    assert_eq!(told, agent.addresses);
    let (status, folder) = agent.terminate();
    assert!(status.success());
    let left: BTreeSet<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().eq(["store"]), "left behind: {left:?}");
}
