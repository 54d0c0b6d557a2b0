//! The README's first screen and its tables, held to what the programs do.

use std::process::Command;

use crate::support::{output_text, repository};

fn readme() -> String {
    std::fs::read_to_string(repository().join("README.md")).unwrap()
}

/// The text of every fenced block of this kind.
fn blocks(kind: &str) -> Vec<String> {
    let text = readme();
    let fence = format!("```{kind}\n");
    let blocks = text.split(&fence).skip(1);
    blocks.map(|block| block.split("```").next().unwrap().to_owned()).collect()
}

/// A line with everything that differs from run to run replaced.
fn shape(line: &str) -> String {
    let words = line.split_whitespace().map(|word| {
        let varies = word.chars().any(|c| c.is_ascii_digit()) && !word.starts_with("digit-");
        if varies || word.contains("://") { "#" } else { word }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn the_first_command_prints_what_the_readme_shows() {
    let block = blocks("console").remove(0);
    let mut lines = block.lines();
    assert_eq!(lines.next(), Some("$ cargo run --release -- demo"), "the first command of the README");
    let shown: Vec<String> = lines.take_while(|line| !line.starts_with('$')).map(shape).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    let output = command.arg("demo").env_remove("ORT_DYLIB_PATH").output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    let printed: Vec<String> = String::from_utf8(output.stdout).unwrap().lines().map(shape).collect();
    let shown: Vec<&String> = shown.iter().filter(|line| !line.is_empty()).collect();
    let printed: Vec<&String> = printed.iter().filter(|line| !line.is_empty()).collect();
    assert_eq!(shown, printed);
}

#[test]
fn the_second_command_is_the_test_script() {
    assert!(blocks("console").iter().any(|block| block.lines().any(|line| line == "$ ./test")));
    assert!(repository().join("test").is_file());
}

#[test]
fn every_operation_reason_and_flag_is_in_the_readme() {
    let text = readme();
    for operation in vaccel_agent::operations() {
        let row = format!("| `{}` | {} |", operation.name, operation.summary);
        assert!(text.contains(&row), "the table of operations lacks: {row}");
    }
    for reason in vaccel_client::Reason::ALL {
        let row = format!("| `{}` | {:?} | {} |", reason.name(), reason.code(), reason.errno());
        assert!(text.contains(&row), "the table of errors lacks: {row}");
    }
    let help = Command::new(env!("CARGO_BIN_EXE_vaccel-agent")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let words = help.split_whitespace().map(|word| word.trim_end_matches([',', '.', ']']));
    let flags = words.filter(|word| word.starts_with("--") && word.len() > 2);
    for flag in flags.filter(|flag| !["--help", "--version"].contains(flag)) {
        assert!(
            text.contains(&format!("`{flag}`")) || text.contains(flag),
            "the README lacks the flag {flag}"
        );
    }
}

#[test]
fn the_guest_in_the_readme_is_the_example() {
    let example = std::fs::read_to_string(repository().join("examples/hello.rs")).unwrap();
    let shown = blocks("rust").remove(0);
    let code = |text: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter(|line| !line.starts_with("//!") && !line.starts_with("#!") && !line.is_empty());
        lines.map(str::to_owned).collect()
    };
    assert_eq!(code(&shown), code(&example));
}
