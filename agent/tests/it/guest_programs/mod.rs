//! Programs that use the thin guest as others will: in C and in Rust, on kernels with next to nothing; and the files of
//! `examples/` that bring them to microVMs and unikernels.

mod configurations;
mod interface;
mod needs;
mod plugin;
mod programs;
mod python;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use self::programs::Program;
use crate::support::{Agent, digits, onnx, output_text};

/// Where agents listen: what these programs can reach on this machine.
const SOCKETS: &[&str] = &["unix://{}/s", "tcp://127.0.0.1:0"];

/// The example in C, for whoever takes it elsewhere.
pub fn guest_in_c() -> Program {
    Program::c()
}

/// The example in Rust in one file that needs no other, for the same.
pub fn guest_in_rust() -> Program {
    Program::rust_static()
}

/// A command that hears nothing of this session's settings.
fn command(program: &std::path::Path) -> Command {
    let mut command = Command::new(program);
    for variable in ["VACCEL_RPC_ADDRESS", "VACCEL_RPC_ADDR", "VACCEL_TOKEN", "VACCEL_DEADLINE_MS"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

fn succeed(output: &Output) -> String {
    assert!(output.status.success(), "{:?}\n{}", output.status, output_text(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Two models in an agent's folder: one that adds 1 and 2 to rows of two numbers, and one that changes nothing.
fn models(agent: &Agent) -> [PathBuf; 2] {
    [("add.onnx", onnx::add()), ("echo.onnx", onnx::echo())].map(|(name, content)| {
        let path = agent.folder().join(name);
        std::fs::write(&path, content).unwrap();
        path
    })
}

/// Runs a program that checks all by itself; kills and starts the agent when it says so.
fn everything_holds(mut command: Command, agent: Agent) {
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(process.stdout.take().unwrap());
    let mut text = String::new();
    while !text.ends_with("restart\n") {
        assert!(said.read_line(&mut text).unwrap() > 0, "{command:?}: {text}{:?}", process.wait());
    }
    let folder = agent.kill();
    let _agent = Agent::start_in(folder, &["unix://{}/s"], &["--engine", "tract"]);
    process.stdin.take().unwrap().write_all(b"\n").unwrap();
    said.read_to_string(&mut text).unwrap();
    let status = process.wait().unwrap();
    assert!(status.success() && text.ends_with("everything holds\n"), "{command:?}: {status:?}\n{text}");
}

/// How many lines name the digit that the image shows; all have a file, a label and a probability.
fn right(printed: &str) -> usize {
    const NAMES: [&str; 10] =
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
    let mut right = 0;
    let digits = digits("png");
    assert_eq!(printed.lines().count(), digits.len(), "a line for each image:\n{printed}");
    for (line, (path, digit)) in printed.lines().zip(digits) {
        let (file, said) = line.rsplit_once(": ").unwrap();
        assert_eq!(file, path.to_str().unwrap());
        let (name, probability) = said.split_once(' ').unwrap();
        let (whole, places) = probability.split_once('.').unwrap();
        assert!(["0", "1"].contains(&whole) && places.len() == 4, "{line}");
        let probability: f32 = probability.parse().unwrap();
        assert!((0.1..=1.0).contains(&probability), "{line}");
        right += usize::from(name == NAMES[digit]);
    }
    right
}

#[test]
fn both_programs_know_the_digits_over_unix_and_tcp() {
    let agent = Agent::start(SOCKETS, &[]);
    let images: Vec<_> = digits("png").into_iter().map(|(path, _)| path).collect();
    for program in [Program::c(), Program::rust(), Program::rust_static()] {
        for address in &agent.addresses {
            let printed = succeed(&command(&program.path).arg(address).args(&images).output().unwrap());
            let right = right(&printed);
            assert!(right >= 97, "{} on {address}: {right} of 100", program.path.display());
        }
    }
}

#[test]
fn both_programs_find_their_agent_in_arguments_the_environment_or_the_library() {
    let agent = Agent::unix(&[]);
    let [address, nobody] = [agent.address().to_owned(), format!("{}-nobody", agent.address())];
    let (image, _) = digits("png").remove(0);
    let line = format!("{}: two 1.0000\n", image.display());
    let folder = tempfile::tempdir().unwrap();
    let built_for = programs::c_for(&address, folder.path());
    let printed = succeed(&command(&built_for).arg(&image).output().unwrap());
    assert_eq!(printed, line, "the address it was compiled with");
    for program in [Program::c(), Program::rust()] {
        let mut newer = command(&program.path);
        newer.env("VACCEL_RPC_ADDRESS", &address).env("VACCEL_RPC_ADDR", &nobody).arg(&image);
        assert_eq!(succeed(&newer.output().unwrap()), line);
        let mut older = command(&program.path);
        older.env("VACCEL_RPC_ADDRESS", "").env("VACCEL_RPC_ADDR", &address).arg(&image);
        assert_eq!(succeed(&older.output().unwrap()), line);
        let mut argument = command(&program.path);
        argument.env("VACCEL_RPC_ADDRESS", &nobody).args([address.as_ref(), image.as_os_str()]);
        assert_eq!(succeed(&argument.output().unwrap()), line);
        let mut input = command(&program.path);
        input.args([&address, "-"]).stdin(std::fs::File::open(&image).unwrap());
        assert_eq!(succeed(&input.output().unwrap()), "-: two 1.0000\n");
    }
}

#[test]
fn both_programs_say_what_failed_and_how_by_their_exit_code() {
    let agent = Agent::unix(&[]);
    let address = agent.address();
    let nobody = format!("{address}-nobody");
    let (image, _) = digits("png").remove(0);
    let image = image.to_str().unwrap();
    let broken = agent.folder().join("broken.png");
    std::fs::write(&broken, b"no image").unwrap();
    let broken = broken.to_str().unwrap();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&[], 2, &["usage: ", "[ADDRESS] IMAGE..."]),
        (&[address], 2, &["usage: "]),
        (&["vsock://2", image], 2, &["expected vsock://CID:PORT"]),
        (&[address, "absent.png"], 1, &["absent.png: "]),
        (&[address, broken], 1, &["broken.png: BAD_ARGUMENT: "]),
        (&[&nobody, image], 1, &[": UNREACHABLE: ", "cannot reach"]),
    ];
    for program in [Program::c(), Program::rust()] {
        for (arguments, code, words) in cases {
            let mut command = command(&program.path);
            let output = command.env("VACCEL_DEADLINE_MS", "200").args(*arguments).output().unwrap();
            assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {}", output_text(&output));
            assert!(output.stdout.is_empty(), "{arguments:?}: {}", output_text(&output));
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(
                words.iter().all(|word| said.contains(word)),
                "{arguments:?} should say {words:?}: {said}"
            );
        }
        // What can be classified is, whatever the others are.
        let output = command(&program.path).args([address, broken, image]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{image}: two 1.0000\n"));
    }
}

#[test]
fn a_token_goes_with_every_call() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokens"), "edge secret-of-the-edge\n").unwrap();
    let agent = Agent::start_in(folder, &["tcp://127.0.0.1:0"], &["--token-file", "{}/tokens"]);
    let (image, _) = digits("png").remove(0);
    for program in [Program::c(), Program::rust()] {
        let with = |token: &str| {
            let mut command = command(&program.path);
            command.env("VACCEL_TOKEN", token).arg(agent.address()).arg(&image);
            command.output().unwrap()
        };
        succeed(&with("secret-of-the-edge"));
        let refused = with("guessed");
        assert_eq!(refused.status.code(), Some(1));
        assert!(output_text(&refused).contains("UNAUTHENTICATED"), "{}", output_text(&refused));
    }
}
