//! Builds the library and the programs that are tested, by the commands that the header and the examples give.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{output_text, repository};

/// Warnings are errors: these files are there to be copied.
const STRICT: &[&str] = &["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// What a small static program is linked with, and what makes it small.
const SMALL: &[&str] = &["-static", "-Os", "-Wl,--gc-sections"];

/// An example that was built; its folder goes with it.
pub struct Program {
    pub path: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

impl Program {
    /// The example in C, in one small file.
    pub fn c() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = c(folder.path(), "classify", &["-s"]);
        Self { path, _folder: Some(folder) }
    }

    /// The example in Rust as cargo builds it with the other programs.
    pub fn rust() -> Self {
        cargo(&["build", "-p", "guest-rust"]);
        Self { path: repository().join("target/debug/guest-rust"), _folder: None }
    }

    /// The same by the last command of its README: one file for any kernel.
    pub fn rust_static() -> Self {
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let is_static = r#"build.rustflags=["-Ctarget-feature=+crt-static"]"#;
        // A folder of its own: other flags would build everything anew.
        let flags = ["--target", &target, "--target-dir", "target/static", "--config", is_static];
        cargo(&[&["build", "-p", "guest-rust", "--profile", "guest"], &flags[..]].concat());
        let path = repository().join("target/static").join(target).join("guest/guest-rust");
        Self { path, _folder: None }
    }
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{command:?}: {error}: run ./test once, it installs what these tests need")
    });
    assert!(output.status.success(), "{command:?}\n{}", output_text(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn cargo(arguments: &[&str]) {
    let mut command = Command::new(env!("CARGO"));
    // What the library is told when it is built shall not depend on who runs the tests.
    command.env_remove("VACCEL_RPC_ADDRESS").current_dir(repository());
    // They would count more than what is said here.
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    run(command.args(["--quiet", "--locked"]).args(arguments));
}

/// The command that the header gives, for either kind of library.
fn library(kind: &str, file: &str) -> PathBuf {
    let header = std::fs::read_to_string(header()).unwrap();
    let line = header.lines().find(|line| line.contains("cargo rustc")).expect("the command in the header");
    let arguments = line.split_once("cargo ").unwrap().1.replace("staticlib", kind);
    cargo(&arguments.split(' ').collect::<Vec<_>>());
    repository().join("target/guest").join(file)
}

pub fn static_library() -> PathBuf {
    library("staticlib", "libvaccel_guest.a")
}

pub fn dynamic_library() -> PathBuf {
    library("cdylib", "libvaccel_guest.so")
}

pub fn header() -> PathBuf {
    repository().join("client/guest/include/vaccel_guest.h")
}

/// A file beside this one.
pub fn source(name: &str) -> PathBuf {
    repository().join("agent/tests/it/guest_programs").join(name)
}

/// Compiles C; `what` are files and flags, in the order in which the linker wants them.
pub fn compile(compiler: &str, what: &[&OsStr], output: &Path) {
    let mut command = Command::new(compiler);
    command.arg("-I").arg(header().parent().unwrap()).args(STRICT).args(what).arg("-o").arg(output);
    run(&mut command);
}

/// The example in C, linked statically, with further flags.
pub fn c(folder: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let output = folder.join(name);
    let (file, library) = (repository().join("examples/guest-c/classify.c"), static_library());
    let mut what = vec![OsStr::new("-std=c99"), file.as_os_str(), library.as_os_str()];
    what.extend(SMALL.iter().chain(flags).map(OsStr::new));
    compile("musl-gcc", &what, &output);
    output
}

/// The example in C with an address of its own.
pub fn c_for(address: &str, folder: &Path) -> PathBuf {
    c(folder, "classify-for", &[&format!("-DVACCEL_ADDRESS=\"{address}\"")])
}

/// The least that a static program in C can be.
pub fn empty(folder: &Path) -> PathBuf {
    let (file, output) = (folder.join("empty.c"), folder.join("empty"));
    std::fs::write(&file, "int main(void) { return 0; }\n").unwrap();
    let mut what = vec![file.as_os_str()];
    what.extend(SMALL.iter().chain(&["-s"]).map(OsStr::new));
    compile("musl-gcc", &what, &output);
    output
}
