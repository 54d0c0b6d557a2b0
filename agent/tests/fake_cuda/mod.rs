//! Builds the driver of `cuda.c` in a folder, under the names that the agent looks for; what else a host with it has.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Names of the libraries, all of which one file serves.
const NAMES: &[&str] = &["libcuda.so.1", "libcublas.so.13", "libnvidia-ml.so.1"];

/// A folder with the libraries, built with settings such as `-DDEVICES=2`.
pub(crate) fn build(folder: &Path, settings: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_cuda/cuda.c");
    let library = folder.join("libfake.so");
    let mut compiler = Command::new("cc");
    compiler
        .args(["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Wno-type-limits", "-Werror", "-pthread"])
        .args(settings);
    let output = compiler.arg("-o").arg(&library).arg(source).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for name in NAMES {
        std::fs::hard_link(&library, folder.join(name)).unwrap();
    }
    folder.to_owned()
}

/// Puts ONNX Runtime's library in a folder, beside what it needs for devices, of which it will say that it is nothing.
pub(crate) fn copy_onnxruntime(from: &Path, folder: &Path) -> PathBuf {
    let library = folder.join("libonnxruntime.so");
    std::fs::copy(from, &library).unwrap();
    for name in ["shared", "cuda"] {
        std::fs::write(folder.join(format!("libonnxruntime_providers_{name}.so")), "").unwrap();
    }
    library
}
