//! What a library of a guest may do: compute, in the memory of its process, and answer.
//!
//! Each of these would do for most; together a fault of one leaves the others. The process gets no rights by what it
//! runs; a file system without files; Landlock, by which no file can be opened even so; and a list of system calls, in
//! which there is none that makes sockets, processes or threads, or reaches others. Every other one fails with `EPERM`.

#![allow(unsafe_code, reason = "what only a process with one thread may do")]

use std::collections::BTreeMap;
use std::fmt::Display;

use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, chroot, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{UnshareFlags, set_no_new_privs, unshare_unsafe};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
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
    libc::SYS_madvise,
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

/// What `prctl` is asked for when rights are given up.
const NO_NEW_PRIVS: u64 = libc::PR_SET_NO_NEW_PRIVS as u64;

/// What loading a library needs beside, of which nothing is left when it is loaded.
const CALLS_TO_LOAD: &[i64] = &[libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_openat, libc::SYS_seccomp];

/// Gives up everything that loading a library does not need. A library's own code runs when it is loaded.
///
/// # Errors
/// What this host does not have.
pub(super) fn before_loading() -> Result<(), String> {
    let no = |what: &str, error: &dyn Display| format!("{what}: {error}");
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| no("no end with the agent", &e))?;
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
    set_no_new_privs(true).map_err(|e| no("no limit of rights", &e))?;
    leave_files();
    let landlock = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self());
    landlock.map_err(|e| no("Landlock, of Linux 5.13 or newer, is not in use", &e))?;
    // Asked for once more with the next list; of all that this call can do it may do that alone.
    let again =
        (libc::SYS_prctl, SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, NO_NEW_PRIVS));
    only(&[CALLS, CALLS_TO_LOAD].concat(), Some(again))
}

/// Gives up what only loading needed.
pub(super) fn after_loading() -> Result<(), String> {
    only(CALLS, None)
}

/// Makes the process's own open files the only ones that have names: the library is loaded from one. Where neither the
/// agent's rights nor a namespace of users allow that, the names of files can be told apart from those that are none.
fn leave_files() {
    // SAFETY: this process has one thread, and no files of others are shared with it.
    let _ = unsafe { unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS) };
    let _ = chroot(super::inside::OPEN_FILES).and_then(|()| rustix::process::chdir("/"));
}

type Condition = Result<SeccompCondition, seccompiler::BackendError>;

fn only(calls: &[i64], and_if: Option<(i64, Condition)>) -> Result<(), String> {
    let mut rules: BTreeMap<_, _> = calls.iter().map(|&call| (call, Vec::new())).collect();
    if let Some((call, condition)) = and_if {
        let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
        rules.insert(call, vec![rule.map_err(|error| error.to_string())?]);
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch);
    let filter: BpfProgram =
        filter.and_then(TryInto::try_into).map_err(|error: seccompiler::BackendError| error.to_string())?;
    apply_filter(&filter).map_err(|error| format!("no list of system calls: {error}"))
}
