//! What a library of a guest may do: compute, in the memory of its process, and answer.
//!
//! Each of these would do for most; together a fault of one leaves the others. The process has none of the agent's
//! rights, and gets none; a file system without files; Landlock, by which no file can be read even so; and a list of
//! system calls, in which there is none that makes sockets, processes or threads, or reaches others. Every other one
//! fails with `EPERM`.

#![allow(unsafe_code, reason = "what only a process with one thread may do")]

use std::collections::BTreeMap;
use std::fmt::Display;

use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use rustix::process::{DumpableBehavior, Resource, Rlimit, chdir, chroot, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities, set_no_new_privs, unshare_unsafe,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::WORKER_BYTES_MAX;

/// Open files: what a library is loaded from, and what loading opens.
const FILES_MAX: u64 = 128;

/// System calls that computing needs, reading and writing of what is open, and the end.
const CALLS: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_lseek,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// A system call of which only some uses are left: the argument that tells, which bits of it, and what these may be.
type Part = (i64, u8, u64, &'static [u64]);

/// All bits of an argument.
const WHOLE: u64 = u32::MAX as u64;

/// Advice about memory that is the process's own affair: nothing that takes pages of the machine out of use, or tells
/// whether others have the same.
const ADVICE: Part = (libc::SYS_madvise, 2, WHOLE, &[0, 1, 2, 3, 4, 8, 14, 15, 16]);

/// What loading a library needs beside. What its own code does meanwhile, it does with these.
const TO_LOAD: &[Part] = &[
    (libc::SYS_fstat, 0, 0, &[0]),
    (libc::SYS_newfstatat, 0, 0, &[0]),
    // Landlock has no word on files that are only named.
    (libc::SYS_openat, 2, libc::O_PATH as u64, &[0]),
    // For the next list.
    (libc::SYS_prctl, 0, WHOLE, &[libc::PR_SET_NO_NEW_PRIVS as u64]),
    (libc::SYS_seccomp, 0, WHOLE, &[libc::SECCOMP_SET_MODE_FILTER as u64]),
];

/// Gives up everything that loading a library does not need. A library's own code runs when it is loaded.
///
/// # Errors
/// What this host does not have.
pub(super) fn before_loading() -> Result<(), String> {
    let no = |what: &str, error: &dyn Display| format!("{what}: {error}");
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|e| no("others could look inside", &e))?;
    let limits = [
        (Resource::As, WORKER_BYTES_MAX),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nofile, FILES_MAX),
    ];
    for (resource, most) in limits {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(|e| no("no limit", &e))?;
    }
    leave_files();
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(|e| no("rights of the agent's stay", &e))?;
    set_no_new_privs(true).map_err(|e| no("rights could be had", &e))?;
    let landlock = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self());
    landlock.map_err(|e| no("Landlock, of Linux 5.13 or newer, is not in use", &e))?;
    only(&[&[ADVICE], TO_LOAD].concat())
}

/// Gives up what only loading needed.
pub(super) fn after_loading() -> Result<(), String> {
    only(&[ADVICE])
}

/// Makes the process's own open files the only ones that have names: the library is loaded from one. Where neither the
/// agent's rights nor a namespace of users allow that, it can be told while a library is loaded which files there are.
fn leave_files() {
    // SAFETY: this process has one thread, and no files of others are shared with it.
    let _ = unsafe { unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS) };
    let _ = chroot(super::inside::OPEN_FILES).and_then(|()| chdir("/"));
}

/// Leaves the system calls of the list, and of others these parts.
fn only(parts: &[Part]) -> Result<(), String> {
    let mut rules: BTreeMap<_, _> = CALLS.iter().map(|&call| (call, Vec::new())).collect();
    for &(call, argument, bits, values) in parts {
        let rule = |&value: &u64| {
            let equal = SeccompCmpOp::MaskedEq(bits);
            SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, equal, value)?])
        };
        let allowed: Result<Vec<_>, BackendError> = values.iter().map(rule).collect();
        rules.insert(call, allowed.map_err(|error| error.to_string())?);
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch);
    let filter: BpfProgram =
        filter.and_then(TryInto::try_into).map_err(|error: BackendError| error.to_string())?;
    apply_filter(&filter).map_err(|error| format!("no list of system calls: {error}"))
}
