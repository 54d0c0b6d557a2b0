//! Signals, which are the program's: threads of the plugin take none of them, and none is sent for what it writes.

use std::mem::MaybeUninit;
use std::ptr;

/// Lets no signal come to this thread.
pub(crate) fn block_all() {
    let mut all = MaybeUninit::uninit();
    // SAFETY: a place for a set, which is filled before it is used.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), ptr::null_mut());
    }
}

/// Does something that may write to a connection that is gone, without the signal that would end the program for it.
pub(crate) fn without_pipes<T>(work: impl FnOnce() -> T) -> T {
    /// Puts back what was there, whatever became of the work.
    struct Before {
        mask: libc::sigset_t,
        pipe: libc::sigset_t,
        was_pending: bool,
    }

    impl Drop for Before {
        fn drop(&mut self) {
            let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: sets that were filled, and a time.
            unsafe {
                if !self.was_pending {
                    libc::sigtimedwait(&raw const self.pipe, ptr::null_mut(), &raw const now);
                }
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, ptr::null_mut());
            }
        }
    }

    let [mut mask, mut pipe, mut pending] = [const { MaybeUninit::<libc::sigset_t>::uninit() }; 3];
    // SAFETY: places for sets, each of which is filled before it is used.
    let _before = unsafe {
        libc::sigemptyset(pipe.as_mut_ptr());
        libc::sigaddset(pipe.as_mut_ptr(), libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, pipe.as_ptr(), mask.as_mut_ptr());
        libc::sigpending(pending.as_mut_ptr());
        let was_pending = libc::sigismember(pending.as_ptr(), libc::SIGPIPE) == 1;
        Before { mask: mask.assume_init(), pipe: pipe.assume_init(), was_pending }
    };
    work()
}
