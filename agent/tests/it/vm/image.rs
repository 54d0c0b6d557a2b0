//! What is in a machine: the program that is its first process, modules for the kernel, images to classify, and in some
//! an agent.

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;

use super::cpio::Archive;
use crate::guest_programs::{guest_in_c, guest_in_rust};
use crate::support::onnx::{self, F32};
use crate::support::{digits, output_text, read, repository};

/// Modules between the kernel and vsock, each after those it needs: nothing in the guest sorts them. Those of PCI and
/// of virtio-mmio are for different machines, and lie idle in the other.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
];

/// The model that takes long multiplies matrices of this side so many times that it never ends by itself.
const ENDLESS_SIDE: i64 = 1024;
const ENDLESS_STEPS: usize = 1000;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What `agent/tests/it/vm/install` puts in target/vm.
pub fn tool(name: &str) -> PathBuf {
    let path = repository().join("target/vm").join(name);
    assert!(path.is_file(), "no {}: run ./test once, it installs what these tests need", path.display());
    path
}

/// An initramfs in this folder. A machine without an agent boots faster.
pub fn initramfs(folder: &Path, with_agent: bool) -> PathBuf {
    let mut archive = Archive::default();
    // The kernel opens it for the first process, before that one can mount anything.
    archive.device("/dev/console", 5, 1);
    archive.file("/init", &stripped(&guest_init(), folder));
    for module in MODULES {
        let name = format!("{module}.ko");
        archive.file(&format!("/modules/{name}"), &read(&tool(&format!("kernel/modules/{name}"))));
    }
    archive.file("/modules/list", MODULES.map(|module| format!("{module}.ko\n")).concat().as_bytes());
    for (path, _) in digits("png").into_iter().chain(digits("jpg")) {
        let name = path.file_name().unwrap().to_str().unwrap();
        archive.file(&format!("/images/{name}"), &read(&path));
    }
    archive.file("/bin/classify", &read(&guest_in_c().path));
    archive.file("/bin/guest-rust", &read(&guest_in_rust().path));
    archive.file("/models/echo.onnx", &onnx::echo());
    archive.file("/models/endless.onnx", &endless());
    if with_agent {
        add_agent(&mut archive, folder);
    }
    let path = folder.join(if with_agent { "agent.cpio" } else { "guest.cpio" });
    std::fs::write(&path, archive.finish()).unwrap();
    path
}

/// A model that computes for longer than any test waits, from a single number: its request is there at once.
pub fn endless() -> Bytes {
    let names: Vec<String> = (0..=ENDLESS_STEPS).map(|step| format!("t{step}")).collect();
    let mut nodes = vec![onnx::node("Expand", &["x", "shape"], &[&names[0]])];
    let step = |pair: &[String]| onnx::node("MatMul", &[&pair[0], &names[0]], &[&pair[1]]);
    nodes.extend(names.windows(2).map(step));
    nodes.push(onnx::node("Identity", &[&names[ENDLESS_STEPS]], &["y"]));
    let shape = onnx::i64s("shape", &[ENDLESS_SIDE, ENDLESS_SIDE]);
    let (x, y) = (onnx::port("x", F32, &[1, 1]), onnx::port("y", F32, &[ENDLESS_SIDE, ENDLESS_SIDE]));
    onnx::model(nodes, vec![shape], vec![x], vec![y])
}

/// The agent as it is tested everywhere else, with the libraries it needs.
fn add_agent(archive: &mut Archive, folder: &Path) {
    let agent = Path::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    archive.file("/bin/vaccel-agent", &stripped(agent, folder));
    let output = Command::new("ldd").arg(agent).output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        archive.file(library, &read(Path::new(library)));
    }
}

/// A program without what only debuggers read: the machine holds all of it in memory.
fn stripped(program: &Path, folder: &Path) -> Vec<u8> {
    let path = folder.join("stripped");
    let output = Command::new("strip").arg("-o").arg(&path).arg(program).output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    std::fs::read(path).unwrap()
}

/// Builds `examples/guest-init` without a dynamic linker, in a folder of its own: its flags would make cargo build the
/// rest again. When nothing changed it takes no time.
fn guest_init() -> PathBuf {
    let folder = repository().join("target/vm/guest");
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--locked", "--package", "guest-init", "--target", TARGET, "--target-dir"]);
    command.arg(&folder).current_dir(repository()).env("RUSTFLAGS", "-C target-feature=+crt-static");
    let output = command.env_remove("CARGO_ENCODED_RUSTFLAGS").output().unwrap();
    assert!(output.status.success(), "{}", output_text(&output));
    folder.join(TARGET).join("debug/guest-init")
}
