//! The process that a guest's library runs in: it loads the library it is sent, and calls what it is asked to.

#![allow(unsafe_code, reason = "loads and calls what others wrote")]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use bytes::Bytes;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use prost::Message;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use vaccel_proto::v1::{Arg, ExecRequest};

use super::{TEXT_BYTES_MAX, answer, confine};

/// Where a process's open files are. It is the whole file system later, where that can be had.
pub(super) const OPEN_FILES: &str = "/proc/self/fd";

/// The first file that is neither the line to the agent nor one of those that lead nowhere.
const FIRST_OPEN: libc::c_uint = 3;

/// The highest: whoever has it is ended first.
const OOM_SCORE_MAX: &str = "1000";

/// What a library may need, and finds loaded: it cannot open any.
const SHARED: &[&str] =
    &["libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"];

/// `struct vaccel_arg` of vAccel 0.8, which is what a function has its arguments in.
#[repr(C)]
struct CArg {
    data: *mut c_void,
    size: usize,
    kind: u32,
    custom: u32,
    owned: bool,
}

type Function = unsafe extern "C" fn(*mut CArg, usize, *mut CArg, usize) -> c_int;

/// Is a worker until the agent has no more for it.
pub fn run() -> ExitCode {
    // Whatever the agent's own libraries left open for those that it starts.
    // SAFETY: nothing here has opened a file yet.
    if unsafe { libc::close_range(FIRST_OPEN, libc::c_uint::MAX, 0) } != 0 {
        return ExitCode::FAILURE;
    }
    // The agent's end is its end, also if that was before.
    let agent = getppid();
    if set_parent_process_death_signal(Some(Signal::KILL)).is_err() || getppid() != agent {
        return ExitCode::FAILURE;
    }
    // Where memory is short, this is to be what gives way.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_MAX);
    // SAFETY: the line to the agent, which nobody else has.
    let line = File::from(unsafe { OwnedFd::from_raw_fd(libc::STDIN_FILENO) });
    match serve(line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(mut line: File) -> io::Result<()> {
    // They are the host's own, and there for whoever needs them; not every host has every one.
    // SAFETY: the host's own libraries.
    let _shared: Vec<_> = SHARED
        .iter()
        .filter_map(|&name| unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }.ok())
        .collect();
    let count = take(&mut line)?;
    let count = u64::from_le_bytes(count.try_into().unwrap_or_default());
    let files = (0..count).map(|_| memory(&take(&mut line)?)).collect::<io::Result<Vec<_>>>()?;
    if let Err(why) = confine::before_loading() {
        return say(&mut line, &[answer::NOT_CONFINED], &why);
    }
    line.write_all(&[answer::DONE])?;
    let mut library = None;
    for (index, file) in files.iter().enumerate() {
        match load(file) {
            // One that others need stays.
            Ok(loaded) => library = Some(ManuallyDrop::new(loaded)),
            Err(why) => {
                return say(&mut line, &[answer::NOT_LOADED, u8::try_from(index).unwrap_or(u8::MAX)], &why);
            }
        }
    }
    if let Err(why) = confine::after_loading() {
        return say(&mut line, &[answer::NOT_LOADED, 0], &why);
    }
    line.write_all(&[answer::DONE])?;
    while let Ok(request) = take(&mut line) {
        let request = ExecRequest::decode(Bytes::from(request))?;
        call(&mut line, library.as_deref(), &request)?;
    }
    Ok(())
}

/// Reads bytes behind their number.
fn take(line: &mut File) -> io::Result<Vec<u8>> {
    let mut length = [0; 8];
    line.read_exact(&mut length)?;
    let mut bytes = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX)];
    line.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn say(line: &mut File, first: &[u8], text: &str) -> io::Result<()> {
    let mut place = [0; TEXT_BYTES_MAX];
    place.iter_mut().zip(text.bytes()).for_each(|(place, byte)| *place = byte);
    line.write_all(first)?;
    line.write_all(&place)
}

/// A file without a name, which cannot be changed any more.
fn memory(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("library", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::WRITE | SealFlags::SEAL)?;
    Ok(file)
}

/// Loads a library from an open file, by its number in the file system that is left, or else in the whole one.
fn load(file: &File) -> Result<Library, String> {
    let number = file.as_raw_fd();
    let mut failed = String::new();
    for path in [format!("/{number}"), format!("{OPEN_FILES}/{number}")] {
        // SAFETY: its code may do anything, but this process may do nothing.
        match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => return Ok(library),
            Err(error) => {
                let text =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                let text = text.strip_prefix(&format!("{path}: ")).unwrap_or(&text).to_owned();
                if failed.is_empty() || !text.contains("cannot open shared object file") {
                    failed = text;
                }
            }
        }
    }
    Err(failed)
}

fn call(line: &mut File, library: Option<&Library>, request: &ExecRequest) -> io::Result<()> {
    // SAFETY: whether it is one of this type only its author knows; it can harm this process alone.
    let function =
        library.and_then(|library| unsafe { library.get::<Function>(request.symbol.as_bytes()) }.ok());
    let Some(function) = function else { return line.write_all(&[answer::NO_FUNCTION]) };
    let mut contents = [places(&request.read), places(&request.write)];
    let [mut read, mut write] = [(&request.read, 0), (&request.write, 1)].map(|(args, which)| {
        let args = args.iter().zip(&mut contents[which]);
        args.map(|(arg, content)| CArg {
            data: content.as_mut_ptr().cast(),
            size: content.len(),
            kind: arg.kind.cast_unsigned(),
            custom: arg.custom_kind,
            owned: false,
        })
        .collect::<Vec<_>>()
    });
    // SAFETY: as above; the arguments are there until it returns.
    let returned = unsafe { function(read.as_mut_ptr(), read.len(), write.as_mut_ptr(), write.len()) };
    line.write_all(&[answer::DONE])?;
    line.write_all(&returned.to_le_bytes())?;
    contents[1].iter().try_for_each(|content| line.write_all(content))
}

/// Arguments' bytes, where a function may change them.
fn places(args: &[Arg]) -> Vec<Vec<u8>> {
    let place = |arg: &Arg| {
        let mut bytes = arg.data.to_vec();
        bytes.resize(usize::try_from(arg.room()).unwrap_or(usize::MAX), 0);
        bytes
    };
    args.iter().map(place).collect()
}
