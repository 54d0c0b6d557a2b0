//! Copies that are longer than the caches, for the client on the agent's side of the contract, too.

#![allow(unsafe_code, reason = "instructions of the processor")]

/// Longer copies go past the caches: they would push out everything else, and be gone before they are read.
pub const PAST_CACHES_BYTES_MIN: usize = 4 << 20;

/// Where no such instructions are known.
///
/// # Safety
/// So many bytes may be written there, and the place does not begin inside of what is copied.
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn past_caches(from: &[u8], to: *mut u8) {
    // SAFETY: the caller's.
    unsafe { core::ptr::copy(from.as_ptr(), to, from.len()) }
}

/// Copies without reading what stood there, as an ordinary copy makes the caches do: a third less for the memory to do.
///
/// # Safety
/// So many bytes may be written there, and the place does not begin inside of what is copied.
#[cfg(target_arch = "x86_64")]
pub unsafe fn past_caches(from: &[u8], to: *mut u8) {
    use core::arch::x86_64::{_mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const LINE: usize = 64;
    const PART: usize = 16;
    let head = to.align_offset(LINE).min(from.len());
    let (head, rest) = from.split_at_checked(head).unwrap_or((from, &[]));
    let (lines, tail) = rest.split_at_checked(rest.len() / LINE * LINE).unwrap_or((&[], rest));
    // SAFETY: all three parts are within the place, one after the other, and the second begins on a line; every
    // processor of this architecture has these instructions, and the fence orders them before what follows.
    unsafe {
        core::ptr::copy(head.as_ptr(), to, head.len());
        let middle = to.add(head.len());
        for (line, at) in lines.chunks_exact(LINE).zip((0..).step_by(LINE)) {
            for part in (0..LINE).step_by(PART) {
                let value = _mm_loadu_si128(line.as_ptr().add(part).cast());
                _mm_stream_si128(middle.add(at + part).cast(), value);
            }
        }
        _mm_sfence();
        core::ptr::copy(tail.as_ptr(), middle.add(lines.len()), tail.len());
    }
}
