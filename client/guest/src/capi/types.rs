//! The structures of `include/vaccel_guest.h`, and what they point to as Rust has it.

#![allow(unsafe_code, reason = "the boundary to C")]

use core::ffi::{CStr, c_char, c_int};
use core::slice;

use crate::text::Text;
use crate::types::{RANK_MAX, RESOURCE_BYTES, ResourceId};

#[repr(C)]
#[derive(Debug)]
pub(crate) struct Bytes {
    pub(super) data: *const u8,
    pub(super) length: usize,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CFile {
    pub(super) name: *const c_char,
    pub(super) data: *const u8,
    pub(super) length: usize,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CResource {
    pub(super) name: [u8; RESOURCE_BYTES + 1],
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CLabel {
    pub(super) image: u32,
    pub(super) index: u32,
    pub(super) probability: f32,
    pub(super) name: [u8; 65],
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CDetection {
    pub(super) label: CLabel,
    pub(super) left: f32,
    pub(super) top: f32,
    pub(super) right: f32,
    pub(super) bottom: f32,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CInput {
    pub(super) name: *const c_char,
    pub(super) dtype: c_int,
    pub(super) rank: usize,
    pub(super) shape: *const i64,
    pub(super) data: *const u8,
    pub(super) length: usize,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct COutput {
    pub(super) data: *mut u8,
    pub(super) size: usize,
    pub(super) length: usize,
    pub(super) dtype: c_int,
    pub(super) rank: usize,
    pub(super) shape: [i64; RANK_MAX],
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CArg {
    pub(super) kind: u32,
    pub(super) data: *const u8,
    pub(super) length: usize,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CArgOut {
    pub(super) kind: u32,
    pub(super) before: *const u8,
    pub(super) before_length: usize,
    pub(super) data: *mut u8,
    pub(super) size: usize,
    pub(super) length: usize,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CTimings {
    pub(super) queue_us: u64,
    pub(super) run_us: u64,
    pub(super) batch_size: u32,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct CInfo {
    pub(super) version: [u8; 33],
    pub(super) tenant: [u8; 129],
    pub(super) operations: [u8; 1025],
    pub(super) engines: [u8; 129],
    pub(super) message_bytes_max: u64,
    pub(super) session_lease_ms: u64,
}

/// # Safety
/// As the module's contract says, for as long as the result is used.
pub(super) unsafe fn text<'a>(text: *const c_char) -> Option<&'a str> {
    if text.is_null() {
        return Some("");
    }
    // SAFETY: not null, so a string that ends with a NUL.
    unsafe { CStr::from_ptr(text) }.to_str().ok()
}

/// None for elements that are nowhere.
///
/// # Safety
/// As the module's contract says, for as long as the result is used.
pub(super) unsafe fn array<'a, E>(first: *const E, count: usize) -> Option<&'a [E]> {
    if count == 0 {
        return Some(&[]);
    }
    // SAFETY: when it is not null, it is an array of so many elements.
    (!first.is_null()).then(|| unsafe { slice::from_raw_parts(first, count) })
}

/// None for places that are nowhere.
///
/// # Safety
/// As the module's contract says, for as long as the result is used; nobody else uses the array meanwhile.
pub(super) unsafe fn array_mut<'a, E>(first: *mut E, count: usize) -> Option<&'a mut [E]> {
    if count == 0 {
        return Some(&mut []);
    }
    // SAFETY: when it is not null, it is an array of so many elements that is this call's own.
    (!first.is_null()).then(|| unsafe { slice::from_raw_parts_mut(first, count) })
}

/// # Safety
/// As the module's contract says, for as long as the result is used.
pub(super) unsafe fn resource(resource: *const CResource) -> Option<ResourceId> {
    // SAFETY: null, or a resource's name.
    let resource = unsafe { resource.as_ref() }?;
    resource.name.first_chunk().copied().map(ResourceId::of_bytes)
}

/// A text and the NUL at its end, in a place that is one byte longer than the text can be.
pub(super) fn terminate<const N: usize>(text: &Text<N>, place: &mut [u8]) {
    let text = text.as_str().as_bytes();
    for (place, byte) in place.iter_mut().zip(text.iter().chain(core::iter::repeat(&0))) {
        *place = *byte;
    }
    if let Some(last) = place.last_mut() {
        *last = 0;
    }
}
