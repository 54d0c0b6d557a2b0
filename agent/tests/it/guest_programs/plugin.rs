//! The plugin as libvaccel has it, with which programs of vAccel call an agent as they are.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use super::programs::{compile, run, source};
use super::{everything_holds, models};
use crate::exec::compiled;
use crate::support::{Agent, digits, output_text, seer};

/// Where cargo put it, beside these tests.
fn library() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libvaccel_sockets.so")
}

/// A program that has what a plugin sees of libvaccel. It knows when memory is used that is not its own.
fn program(agent: &Agent) -> Command {
    let program = agent.folder().join("plugin");
    let file = source("plugin.c");
    let what = ["-std=gnu11", "-g", "-fsanitize=address,undefined"].map(OsStr::new);
    compile("cc", &[&what[..], &[file.as_os_str()]].concat(), &program);
    let mut command = Command::new(program);
    // What it would need to look for memory that is lost is not allowed in every place.
    command.env("ASAN_OPTIONS", "detect_leaks=0").env("VACCEL_RPC_ADDRESS", agent.address());
    command.arg(library());
    command
}

#[test]
fn every_operation_does_what_programs_of_vaccel_know() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("agent.toml"), "[[policy]]\ntenant = '*'\nexec = true\n").unwrap();
    let flags = ["--engine", "tract", "--config", "{}/agent.toml"];
    let agent = Agent::start_in(folder, &["unix://{}/s"], &flags);
    let mut command = program(&agent);
    let (image, _) = digits("png").remove(0);
    compiled(agent.folder(), "library.c", &["-lm"]);
    let seer = agent.folder().join("seer.onnx");
    std::fs::write(&seer, seer::single()).unwrap();
    command.args(models(&agent)).arg(image).arg("two").arg(agent.folder().join("library.so"));
    command.arg(seer).arg(agent.folder().join("pictures"));
    everything_holds(command, agent);
}

#[test]
fn a_program_that_leaves_its_session_open_ends_in_peace() {
    let agent = Agent::unix(&[]);
    let output = program(&agent).output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    assert_eq!(output_text(&output), "");
}

#[test]
fn nothing_is_imported_from_libvaccel_and_one_name_is_exported() {
    let symbols =
        |which: &str| run(Command::new("nm").args(["--dynamic", "--format=posix", which]).arg(library()));
    let names =
        |text: &str| text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&symbols("--defined-only")), ["vaccel_plugin"]);
    assert!(!names(&symbols("--undefined-only")).iter().any(|name| name.contains("vaccel")));
}
