//! The repository's own rules, read from its files: which room may know which, how long files and functions are, and
//! words that must not appear.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::repository;

/// Longest file and function, in lines: a room, and what fits a screen or two.
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;
const LINE_CHARS_MAX: usize = 120;
const ARCHITECTURE_LINES_MAX: usize = 200;

/// Largest file under version control, in bytes, beside the lock file.
const FILE_BYTES_MAX: u64 = 300_000;

/// Words that say nothing, or that only a stub says, each with what to write instead.
const BANNED: &[(&str, &str)] = &[
    ("todo!", "finish it"),
    ("unimplemented!", "finish it, or return an error"),
    ("FIXME", "fix it"),
    ("TODO", "do it"),
    ("dbg!", "tracing"),
    ("#[ignore", "a test that runs"),
    ("thread::sleep", "wait for the event itself"),
    ("block_in_place", "the scheduler's lanes"),
    ("unbounded_channel", "a bound"),
    ("Manager", "what it manages"),
    ("Helper", "what it does"),
];

/// Rooms from top to bottom, and what each must not name. A room may use itself and what is below it.
const LAYERS: &[&[&str]] = &[
    &["main", "demo", "logs", "self_test"],
    &["lib"],
    &["transport"],
    &["service"],
    &["direct", "dispatch"],
    &["infer"],
    &["policy"],
    &["ops"],
    &["repository"],
    &["session", "resource"],
    &["backend", "profile"],
    &["scheduler"],
    &["http2"],
    &["shared"],
    &["aside", "onward", "quota", "pool"],
    &["identity"],
    &["config", "networks"],
];

/// Names only one place may know: the word, and the paths that may hold it.
const CONFINED: &[(&str, &[&str])] = &[
    ("tonic", &["service/", "Cargo.toml"]),
    ("ort::", &["backend/onnxruntime"]),
    ("tract_onnx", &["backend/tract/"]),
    ("tract_tensorflow", &["backend/tract/"]),
    ("tract_tflite", &["backend/tract/"]),
    ("rustls", &["transport/tls.rs", "identity.rs"]),
    ("hyper", &["transport/", "service/"]),
    ("vaccel_client", &["demo.rs", "http2/connection.rs", "self_test/", "shared.rs", "transport/"]),
    (
        "fs::read",
        &[
            "config.rs",
            "identity.rs",
            "main.rs",
            "repository/folder.rs",
            "resource/disk.rs",
            "resource/tests.rs",
            "self_test/mod.rs",
        ],
    ),
    (
        "fs::",
        &[
            "backend/cuda/tests.rs",
            "backend/exec/inside.rs",
            "config.rs",
            "demo.rs",
            "identity.rs",
            "infer/regions.rs",
            "main.rs",
            "repository/folder.rs",
            "resource/",
            "self_test/",
            "shared.rs",
            "transport/",
        ],
    ),
    ("libc::", &["backend/exec/", "infer/regions.rs", "resource/disk.rs"]),
    // Libraries found at run time, and kernels that take pointers and strides.
    (
        "unsafe",
        &[
            "backend/blas.rs",
            "backend/cuda/cublas.rs",
            "backend/cuda/driver.rs",
            "backend/cuda/library.rs",
            "backend/cuda/nvml.rs",
            "backend/cuda/pins.rs",
            "backend/cuda/stream.rs",
            "backend/cuda/tests.rs",
            "backend/exec/confine.rs",
            "backend/exec/inside.rs",
            "backend/onnxruntime.rs",
            "backend/onnxruntime/device/binding.rs",
        ],
    ),
    ("libloading", &["backend/cuda/library.rs", "backend/cuda/tests.rs", "backend/exec/inside.rs"]),
    ("landlock", &["backend/exec/confine.rs"]),
    ("seccompiler", &["backend/exec/confine.rs"]),
    ("gemm::", &["backend/blas.rs"]),
    ("rayon", &["backend/blas.rs"]),
];

/// The same for the guest.
const CONFINED_IN_GUEST: &[(&str, &[&str])] = &[
    ("unsafe", &["posix/", "capi/", "copy.rs"]),
    ("libc", &["posix/"]),
    ("std::", &["posix/"]),
    ("TcpStream", &[]),
    ("spawn", &[]),
];

fn tracked() -> Vec<PathBuf> {
    let mut command = Command::new("git");
    command.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = command.current_dir(repository()).output().unwrap();
    assert!(output.status.success(), "the tests run in a clone");
    let names = String::from_utf8(output.stdout).unwrap();
    let paths = names.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from);
    paths.filter(|path| repository().join(path).exists()).collect()
}

fn sources(under: &str) -> Vec<(String, String)> {
    let of_rust = |path: &PathBuf| path.starts_with(under) && path.extension().is_some_and(|e| e == "rs");
    let paths = tracked().into_iter().filter(of_rust);
    paths.map(|path| (path.display().to_string(), read(&path))).collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap()
}

/// The part of a file that is the product: without comments and tests.
fn product(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code = before_tests.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.collect::<Vec<_>>().join("\n")
}

/// Whether a text has the word, and not only as the end of a longer one.
fn names(text: &str, word: &str) -> bool {
    let whole = |(at, _): (usize, &str)| !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
    text.match_indices(word).any(whole)
}

fn complain(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn rooms_know_only_what_is_below_them() {
    let level = |room: &str| LAYERS.iter().position(|layer| layer.contains(&room));
    let mut complaints = Vec::new();
    for (path, text) in sources("agent/src") {
        let inside = path.strip_prefix("agent/src/").unwrap();
        let room = inside.split('/').next().unwrap().trim_end_matches(".rs");
        let Some(own) = level(room) else {
            complaints.push(format!("{path}: give the room {room} its place in LAYERS"));
            continue;
        };
        for (number, line) in product(&text).lines().enumerate() {
            for used in line.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if level(&used).is_some_and(|level| level < own) {
                    complaints.push(format!("{path}: {room} is below {used} and names it ({})", number + 1));
                }
            }
        }
    }
    complain(&complaints);
}

#[test]
fn names_stay_where_they_belong() {
    let mut complaints = Vec::new();
    let agent = sources("agent/src").into_iter().map(|file| (file, "agent/src/", CONFINED));
    let guest =
        sources("client/guest/src").into_iter().map(|file| (file, "client/guest/src/", CONFINED_IN_GUEST));
    for ((path, text), folder, confined) in agent.chain(guest) {
        let inside = path.strip_prefix(folder).unwrap();
        let code = product(&text);
        for (word, places) in confined {
            if names(&code, word) && !places.iter().any(|place| inside.starts_with(place)) {
                complaints.push(format!("{path}: {word} is for {places:?}"));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn files_functions_and_lines_are_short() {
    let mut complaints = Vec::new();
    for (path, text) in sources("") {
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            complaints.push(format!("{path}: {lines} lines, at most {FILE_LINES_MAX}: split the room"));
        }
        for (number, line) in text.lines().enumerate() {
            if line.chars().count() > LINE_CHARS_MAX {
                complaints.push(format!("{path}:{}: longer than {LINE_CHARS_MAX} characters", number + 1));
            }
        }
        complaints.extend(long_functions(&path, &text));
    }
    complain(&complaints);
}

/// Functions end where the brace of their own indentation does: rustfmt sees to that.
fn long_functions(path: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut complaints = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        if !(code.contains("fn ") && code.contains('(')) || code.starts_with("//") {
            continue;
        }
        // A declaration without a body, or one with all of it in a line.
        let head = lines[start..].iter().find(|line| line.ends_with(['{', ';', '}']));
        if !head.is_some_and(|line| line.ends_with('{')) {
            continue;
        }
        let end = format!("{}}}", &line[..line.len() - code.len()]);
        let length = lines[start..].iter().position(|line| *line == end).unwrap_or(0);
        if length > FUNCTION_LINES_MAX {
            let at = start + 1;
            complaints
                .push(format!("{path}:{at}: a function of {length} lines, at most {FUNCTION_LINES_MAX}"));
        }
    }
    complaints
}

#[test]
fn banned_words_do_not_appear() {
    let own = "agent/tests/it/tidy.rs";
    let mut complaints = Vec::new();
    for (path, text) in sources("").into_iter().filter(|(path, _)| path != own) {
        for (word, instead) in BANNED {
            for (number, _) in text.lines().enumerate().filter(|(_, line)| line.contains(word)) {
                complaints.push(format!("{path}:{}: {word}: write {instead}", number + 1));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn nothing_large_is_kept_and_the_map_stays_a_map() {
    for path in tracked().iter().filter(|path| !path.ends_with("Cargo.lock")) {
        let length = std::fs::metadata(repository().join(path)).unwrap().len();
        assert!(length <= FILE_BYTES_MAX, "{}: {length} bytes", path.display());
    }
    let lines = read(Path::new("ARCHITECTURE.md")).lines().count();
    assert!(lines <= ARCHITECTURE_LINES_MAX, "ARCHITECTURE.md has {lines} lines");
}

#[test]
fn every_direct_dependency_says_why_it_is_there() {
    let mut complaints = Vec::new();
    for manifest in
        tracked().iter().filter(|path| path.ends_with("Cargo.toml") && *path != Path::new("Cargo.toml"))
    {
        let (text, manifest) = (read(manifest), manifest.display());
        let mut inside = false;
        let mut previous = "";
        for line in text.lines() {
            if line.starts_with('[') {
                inside = line.contains("dependencies]");
            } else if inside && line.contains('=') && !line.starts_with('#') && !previous.starts_with('#') {
                complaints.push(format!("{manifest}: {line}: say why on the line before"));
            }
            previous = line;
        }
    }
    complain(&complaints);
}
