//! The header is what the library does: its functions, its numbers, and every call made from C.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use vaccel_guest::{DType, FILES_MAX, ITEMS_MAX, RANK_MAX, ResourceKind};

use super::programs::{compile, dynamic_library, header, run, source, static_library};
use super::{everything_holds, models};
use crate::support::{Agent, digits, seer};

/// The header without its comments.
fn declarations() -> String {
    let text = std::fs::read_to_string(header()).unwrap();
    let mut parts = text.split("/*");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |text, part| text + part.split_once("*/").unwrap().1)
}

#[test]
fn the_library_exports_what_the_header_declares_and_nothing_else() {
    let text = declarations();
    let names = text.match_indices("vaccel_guest_").map(|(at, _)| &text[at..]);
    let names = names.filter_map(|rest| rest.split_once('(')).map(|(name, _)| name);
    let is_name = |name: &&str| name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let declared: BTreeSet<&str> = names.filter(is_name).collect();
    let symbols = run(Command::new("nm")
        .args(["--dynamic", "--defined-only", "--format=posix"])
        .arg(dynamic_library()));
    let exported: BTreeSet<&str> = symbols.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(exported, declared);
    assert!(declared.len() > 20, "{declared:?}");
}

#[test]
fn the_numbers_in_the_header_are_those_of_the_library() {
    let text = declarations();
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || "=,;{}".contains(c)).collect();
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
    let number = |name: &str| -> usize {
        let full = format!("VACCEL_GUEST_{name}");
        let at = words.iter().position(|word| *word == full).unwrap_or_else(|| panic!("no {full}"));
        words[at + 1].parse().unwrap()
    };
    assert_eq!(
        (number("ITEMS_MAX"), number("FILES_MAX"), number("RANK_MAX")),
        (ITEMS_MAX, FILES_MAX, RANK_MAX)
    );
    let types = "BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 BF16 F32 F64 BYTES";
    for name in types.split(' ') {
        let dtype = DType::from_number(number(name) as u64);
        assert_eq!(format!("{dtype:?}").to_uppercase(), name);
    }
    let kinds = [ResourceKind::Model, ResourceKind::Data, ResourceKind::Library];
    for kind in kinds {
        assert_eq!(number(&format!("{kind:?}").to_uppercase()), kind as usize);
    }
}

/// Runs `interface.c`, built by this compiler, on an agent.
fn exercise(compiler: &str, library: &Path, flags: &[&str]) {
    let agent = Agent::unix(&["--engine", "tract"]);
    let program = agent.folder().join("interface");
    let file = source("interface.c");
    let mut what = vec![OsStr::new("-std=c11"), OsStr::new("-g"), file.as_os_str(), library.as_os_str()];
    what.extend(flags.iter().map(OsStr::new));
    compile(compiler, &what, &program);
    let images = digits("png").into_iter().take(2).map(|(path, _)| path);
    let seeing = [("seer.onnx", seer::single()), ("things.png", seer::image([2, 1], [0, 3]))];
    let seeing = seeing.map(|(name, content)| {
        let path = agent.folder().join(name);
        std::fs::write(&path, content).unwrap();
        path
    });
    let mut command = Command::new(&program);
    command.arg(agent.address()).args(models(&agent)).args(images).args(seeing);
    command.env("LD_LIBRARY_PATH", library.parent().unwrap());
    everything_holds(command, agent);
}

#[test]
fn every_function_does_from_c_what_the_header_says() {
    exercise("cc", &dynamic_library(), &[]);
    exercise("musl-gcc", &static_library(), &["-static"]);
}
