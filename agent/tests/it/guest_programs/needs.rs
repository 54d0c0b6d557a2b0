//! What a guest needs of its machine: bytes on disk, memory, system calls; measured on the programs themselves.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use image::{GrayImage, ImageFormat};

use super::programs::{self, Program, compile, run, source};
use super::{SOCKETS, command, right, succeed};
use crate::support::{Agent, PATIENCE, digits, output_text, repository};

/// The most that the example in C may be larger than a program that does nothing.
const SIZE_MAX: u64 = 64 << 10;

/// Address space that is enough for any guest, in KiB.
const ADDRESSES_KIB: u64 = 16 << 10;

/// Stack that is enough for the example in C, in KiB: unikernels give their programs 64 or so.
const STACK_KIB: u64 = 32;

/// Memory that a classification may take beside the image.
const HEAP_BYTES_MAX: u64 = 256 << 10;

const SIGSYS: i32 = 31;

#[test]
fn the_example_in_c_is_small_and_nothing_in_it_panics() {
    let folder = tempfile::tempdir().unwrap();
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    let (example, empty) = (Program::c(), programs::empty(folder.path()));
    let (example, empty) = (size(&example.path), size(&empty));
    println!("{example} bytes, of which an empty program is {empty}");
    assert!(example - empty <= SIZE_MAX, "{example} bytes, {empty} without the example");

    let unstripped = programs::c(folder.path(), "unstripped", &[]);
    let symbols = run(Command::new("nm").arg(unstripped));
    assert!(symbols.contains("vaccel_guest_classify"), "{symbols}");
    // No code for what cannot happen, and none that takes memory from anywhere.
    for unwanted in ["panic", "unwind", "malloc", "realloc", "free", "__libc_brk", "mmap", "pthread_create"] {
        let found: Vec<&str> = symbols.lines().filter(|line| names(line, unwanted)).collect();
        assert!(found.is_empty(), "{found:#?}");
    }
}

/// Whether a line of `nm` is of a function that has this in its name, or for short ones is called so.
fn names(line: &str, word: &str) -> bool {
    let name = line.rsplit(' ').next().unwrap();
    if ["panic", "unwind"].contains(&word) { name.contains(word) } else { name == word }
}

#[test]
fn sixteen_megabytes_of_addresses_are_enough() {
    let agent = Agent::start(SOCKETS, &[]);
    let (image, _) = digits("png").remove(0);
    for program in [Program::c(), Program::rust(), Program::rust_static()] {
        for address in &agent.addresses {
            let mut limited = command(Path::new("sh"));
            let script = format!("ulimit -v {ADDRESSES_KIB} && exec \"$@\"");
            limited.args(["-c", &script, "sh"]).arg(&program.path).arg(address).arg(&image);
            succeed(&limited.output().unwrap());
        }
    }
}

#[test]
fn the_example_in_c_runs_on_a_small_stack() {
    let agent = Agent::unix(&[]);
    let image = noise(agent.folder(), 320);
    let mut limited = command(Path::new("sh"));
    // What it was started with lies on the stack too.
    limited.env_clear().args(["-c", &format!("ulimit -s {STACK_KIB} && exec \"$@\""), "sh"]);
    succeed(&limited.arg(&Program::c().path).arg(agent.address()).arg(image).output().unwrap());
}

/// What a program has of memory, in bytes, after it has classified these images. It is looked at while it waits for
/// another image on its standard input.
fn memory(program: &Path, address: &str, images: &[&Path]) -> [u64; 3] {
    let mut command = command(program);
    command.arg(address).args(images).arg("-").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = command.stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    for _ in images {
        lines.next().expect("a line for each image").unwrap();
    }
    let wait = format!("/proc/{}/syscall", process.id());
    let begun = Instant::now();
    // The number of the call `read`, and the descriptor of standard input: the program does nothing more.
    let reads = if cfg!(target_arch = "x86_64") { "0 0x0 " } else { "63 0x0 " };
    while !std::fs::read_to_string(&wait).unwrap().starts_with(reads) {
        assert!(begun.elapsed() < PATIENCE, "{} does not wait for its input", program.display());
        std::thread::yield_now();
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    drop(process.stdin.take());
    process.wait().unwrap();
    ["VmPeak:", "VmHWM:", "VmData:"].map(|key| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    })
}

/// A picture of noise, which is about as long as it has pixels.
fn noise(folder: &Path, side: u32) -> PathBuf {
    let mut state = 1_u32;
    let picture = GrayImage::from_fn(side, side, |_, _| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        image::Luma([(state >> 24) as u8])
    });
    let path = folder.join("noise.png");
    picture.save_with_format(&path, ImageFormat::Png).unwrap();
    path
}

#[test]
fn a_classification_takes_little_memory() {
    let agent = Agent::unix(&[]);
    let image = noise(agent.folder(), 320);
    let length = std::fs::metadata(&image).unwrap().len();
    assert!((95_000..130_000).contains(&length), "{length} bytes are no image of 100 KB");
    for program in [Program::c(), Program::rust(), Program::rust_static()] {
        // From here on the program's own pages are in the system's cache: they would count as what a call takes.
        memory(&program.path, agent.address(), &[&image]);
        let before = memory(&program.path, agent.address(), &[]);
        let after = memory(&program.path, agent.address(), &[&image, &image]);
        let [peak, resident, data] = [0, 1, 2].map(|at| after[at].saturating_sub(before[at]));
        let name = program.path.file_name().unwrap().to_str().unwrap();
        println!("{name}: {peak} bytes more addresses at the peak, {resident} resident, {data} of data kept");
        println!("{name}: in all {} of addresses, {} resident", after[0], after[1]);
        for grown in [peak, resident] {
            assert!(grown <= HEAP_BYTES_MAX + length, "{name}: {grown} bytes for an image of {length}");
        }
        if name == "classify" {
            assert_eq!(data, 0, "the example in C has no heap");
        }
    }
}

/// The calls of the kernel that a program makes, by name, once it has begun.
fn calls(program: &Path, arguments: &[&str], folder: &Path) -> BTreeSet<String> {
    let log = folder.join("calls");
    let mut strace = command(Path::new("strace"));
    strace.arg("-f").arg("-o").arg(&log).arg(program).args(arguments);
    succeed(&strace.output().expect("strace: run ./test once, it installs what these tests need"));
    let text = std::fs::read_to_string(log).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(' ')?.1.trim_start().split_once('('));
    lines.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn the_example_in_c_asks_the_kernel_for_a_socket_and_nothing_else() {
    const START: &[&str] = &["execve", "arch_prctl", "set_tid_address", "rt_sigaction", "exit_group"];
    const IMAGE: &[&str] = &["open", "openat"];
    const SOCKET: &[&str] = &["socket", "connect", "read", "write", "readv", "writev", "poll", "close"];
    let agent = Agent::start(SOCKETS, &[]);
    let image = noise(agent.folder(), 320);
    let program = Program::c();
    for address in &agent.addresses {
        let made = calls(&program.path, &[address, image.to_str().unwrap()], agent.folder());
        println!("{address}: {made:?}");
        let known = [START, IMAGE, SOCKET].concat();
        let more: Vec<&String> = made.iter().filter(|name| !known.contains(&name.as_str())).collect();
        assert!(more.is_empty(), "{address}: {more:?}");
        assert!(made.contains("socket") && made.contains("poll"));
    }
}

/// The launcher, and the program that asks for what it is told to.
fn confinement(folder: &Path) -> (PathBuf, PathBuf) {
    let (confine, control) = (folder.join("confine"), folder.join("control"));
    compile("cc", &["-std=gnu99".as_ref(), source("confine.c").as_ref()], &confine);
    compile("musl-gcc", &["-std=gnu99".as_ref(), source("control.c").as_ref(), "-static".as_ref()], &control);
    (confine, control)
}

fn confined(confine: &Path, kernel: &str, program: &Path, arguments: &[&str]) -> Output {
    let mut command = command(confine);
    command.arg(kernel).arg(program).args(arguments).env("VACCEL_DEADLINE_MS", "5000");
    command.output().unwrap()
}

#[test]
fn the_confinement_bites() {
    const KILLED: [&str; 8] =
        ["epoll", "eventfd", "futex", "thread", "netlink", "datagram", "sendto", "exec"];
    const REFUSED: [&str; 3] = ["sendmsg", "setsockopt", "getrandom"];
    let folder = tempfile::tempdir().unwrap();
    let (confine, control) = confinement(folder.path());
    for name in KILLED.iter().chain(&REFUSED).chain(&["nothing", "writev"]) {
        assert!(command(&control).arg(name).status().unwrap().success(), "{name} is there on this machine");
    }
    for kernel in ["vectored", "unvectored"] {
        for name in KILLED {
            let status = confined(&confine, kernel, &control, &[name]).status;
            assert_eq!(status.signal(), Some(SIGSYS), "{name}: {status:?}");
        }
        for name in REFUSED {
            assert_eq!(confined(&confine, kernel, &control, &[name]).status.code(), Some(3), "{name}");
        }
        assert_eq!(confined(&confine, kernel, &control, &["nothing"]).status.code(), Some(0));
        let writev = confined(&confine, kernel, &control, &["writev"]).status.code();
        assert_eq!(writev, Some(if kernel == "vectored" { 0 } else { 3 }));
    }
}

#[test]
fn both_programs_run_on_a_kernel_with_next_to_nothing() {
    let agent = Agent::start(SOCKETS, &[]);
    let (confine, _) = confinement(agent.folder());
    let images = digits("png").into_iter().map(|(path, _)| path.to_str().unwrap().to_owned());
    let images: Vec<String> = images.collect();
    let large = noise(agent.folder(), 320);
    for program in [Program::c(), Program::rust_static()] {
        for kernel in ["vectored", "unvectored"] {
            for address in &agent.addresses {
                let arguments: Vec<&str> = [address].into_iter().chain(&images).map(String::as_str).collect();
                let printed = succeed(&confined(&confine, kernel, &program.path, &arguments));
                assert!(right(&printed) >= 97, "{kernel} {address}\n{printed}");
                succeed(&confined(&confine, kernel, &program.path, &[address, large.to_str().unwrap()]));
            }
        }
    }
}

#[test]
fn deadlines_need_nothing_more_either() {
    let folder = tempfile::tempdir().unwrap();
    let (confine, _) = confinement(folder.path());
    // Connections are made and never answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", silent.local_addr().unwrap());
    let image = repository().join("examples/images/digit-000-is-2.png");
    for program in [Program::c(), Program::rust_static()] {
        for kernel in ["vectored", "unvectored"] {
            let mut command = command(&confine);
            command.arg(kernel).arg(&program.path).arg(&address).arg(&image);
            let begun = Instant::now();
            let output = command.env("VACCEL_DEADLINE_MS", "400").output().unwrap();
            let took = begun.elapsed();
            assert_eq!(output.status.code(), Some(1), "{}", output_text(&output));
            assert!(output_text(&output).contains("DEADLINE"), "{}", output_text(&output));
            assert!((390..10_000).contains(&took.as_millis()), "{took:?}");
        }
    }
}
