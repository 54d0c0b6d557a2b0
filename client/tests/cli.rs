//! The real `vaccel` command, without an agent: what it refuses, how it fails, and how it says so.

#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// The command in an environment that says nothing about an agent.
fn vaccel() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("VACCEL_") {
            command.env_remove(name);
        }
    }
    command
}

fn run(arguments: &[&str]) -> Output {
    vaccel().args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_wrong_command_line_is_exit_code_2_and_says_why() {
    for (arguments, why) in [
        (&[][..], "Usage"),
        (&["fly"], "unrecognized subcommand"),
        (&["classify"], "<IMAGE>"),
        (&["classify", "a.png", "--top", "0"], "--top"),
        (&["run", "model.onnx"], "--input"),
        (&["run", "model.onnx", "--input", "x="], "NAME=FILE.npy"),
        (&["bench"], "<MODEL>"),
        (&["bench", "m", "--concurrency", "1,0"], "--concurrency"),
        (&["bench", "m", "--rate", "10", "--concurrency", "1"], "cannot be used with"),
        (&["bench", "m", "--shape", "x"], "NAME:D1,D2"),
        (&["info", "--deadline", "0"], "--deadline"),
        (&["info", "--deadline", "601"], "at most 600"),
        (&["info", "--address", "http://x"], "unknown scheme"),
        (&["info", "--address", "vsock://any:2048"], "vsock://host:PORT"),
        (&["info", "--tls-cert", "c.pem"], "--tls-key"),
        (&["info", "--token-file", "/nonexistent/token"], "/nonexistent/token"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(why), "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn help_and_version_are_exit_code_0() {
    for arguments in [["--help"], ["--version"]] {
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8(output.stdout).unwrap().contains("vaccel"));
    }
}

#[test]
fn an_agent_that_is_not_there_is_exit_code_1_with_its_address() {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix://{}/agent.sock", folder.path().display());
    let start = Instant::now();
    for command in [&["info"][..], &["ops"], &["classify", "a.png"], &["run", "m.onnx", "--input", "x.npy"]] {
        let output = run(&[command, &["--address", &address, "--deadline", "5"]].concat());
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let text = stderr(&output);
        assert!(text.contains(&address) && text.contains("UNREACHABLE"), "{text}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "nothing is waited for");
}

#[test]
fn a_silent_port_is_given_up_within_the_deadline() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let output = run(&["info", "--address", &address, "--deadline", "0.2"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains(&format!("{address}: no answer within 200ms")), "{}", stderr(&output));
}

#[test]
fn with_json_an_error_is_json() {
    let output = run(&["--json", "info", "--address", "unix:///nonexistent/agent.sock"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let document: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(document["error"]["reason"], "UNREACHABLE");
    assert_eq!(document["error"]["errno"], 111);
    assert!(document["error"]["message"].as_str().unwrap().contains("/nonexistent/agent.sock"));
}

#[test]
fn the_address_comes_from_the_environment() {
    let with = |variables: &[(&str, &str)]| {
        let output = vaccel().arg("info").envs(variables.iter().copied()).output().unwrap();
        (output.status.code(), stderr(&output))
    };
    let (new, old) =
        (("VACCEL_RPC_ADDRESS", "unix:///nonexistent/new"), ("VACCEL_RPC_ADDR", "unix:///nonexistent/old"));
    assert!(with(&[new, old]).1.contains("unix:///nonexistent/new"));
    assert!(with(&[old]).1.contains("unix:///nonexistent/old"));
    let (code, text) = with(&[("VACCEL_RPC_ADDRESS", "nowhere")]);
    assert_eq!(code, Some(2));
    assert!(text.contains("VACCEL_RPC_ADDRESS"), "{text}");
}

#[test]
fn tls_without_a_usable_ca_says_which_file() {
    let output = run(&["info", "--address", "tls://127.0.0.1:1", "--tls-ca", "/nonexistent/ca.pem"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("/nonexistent/ca.pem"), "{}", stderr(&output));
}
