//! A kernel without user space becomes a machine, and ends.

use std::fs::{self, File};
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use crate::Failure;

/// Modules of the kernel, and in which order to load them: each after those it needs.
const MODULES: &str = "/modules";
const MODULES_LIST: &str = "/modules/list";

/// QEMU's `isa-debug-exit`: what is written to this port ends the machine, and QEMU's exit code is twice that and one.
#[cfg(target_arch = "x86_64")]
const EXIT_PORT: u16 = 0x501;
const EXIT_PASSED: u8 = 0x10;
const EXIT_FAILED: u8 = 0x11;

/// Mounts what programs expect of Linux, and loads the modules of the initramfs.
pub(crate) fn set_up() -> Result<(), Failure> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(at)?;
        mount(kind, at, kind, MountFlags::empty(), None)
            .map_err(|error| format!("mounting {at}: {error}"))?;
    }
    for name in fs::read_to_string(MODULES_LIST)?.lines() {
        let file = File::open(Path::new(MODULES).join(name)).map_err(|error| format!("{name}: {error}"))?;
        finit_module(file, c"", 0).map_err(|error| format!("loading {name}: {error}"))?;
    }
    Ok(())
}

/// Makes the console give back only what this program says.
pub(crate) fn silence_echo() -> Result<(), Failure> {
    let console = std::io::stdin();
    let mut modes = tcgetattr(&console)?;
    modes.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&console, OptionalActions::Now, &modes)?;
    Ok(())
}

/// Ends the machine: under QEMU with an exit code, elsewhere by switching it off.
pub(crate) fn leave(passed: bool) -> ! {
    let code = if passed { EXIT_PASSED } else { EXIT_FAILED };
    exit_with(code);
    let _ = reboot(RebootCommand::PowerOff);
    // The kernel does not survive the end of its first process either.
    std::process::abort()
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "an x86 port is reached by no file of Debian's cloud kernel")]
fn exit_with(code: u8) {
    // SAFETY: only permits this thread to use the port, or fails.
    let permitted = unsafe { libc::ioperm(EXIT_PORT.into(), 1, 1) } == 0;
    if permitted {
        // SAFETY: the port is permitted, and what is behind it touches no memory of this program.
        unsafe { std::arch::asm!("out dx, al", in("dx") EXIT_PORT, in("al") code, options(nostack, nomem)) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn exit_with(_: u8) {}
