//! What programs give: arrays, texts, and arguments.

use std::ffi::{CStr, c_char};
use std::slice;

use vaccel_client::{Error, Reason};

/// A number of things that C counts with an `int` or a `long`.
pub(crate) fn count(
    what: &str,
    given: impl TryInto<usize> + Copy + std::fmt::Display,
) -> Result<usize, Error> {
    given.try_into().map_err(|_| refused(what, "a count of 0 or more", given))
}

/// # Safety
/// Null, or an array of so many elements.
pub(crate) unsafe fn array<'a, T>(what: &str, data: *const T, count: usize) -> Result<&'a [T], Error> {
    check(what, data, count)?;
    // SAFETY: an array of at least one element, of a length that exists.
    Ok(if count == 0 { &[] } else { unsafe { slice::from_raw_parts(data, count) } })
}

/// # Safety
/// Null, or an array of so many elements, which is this call's alone.
pub(crate) unsafe fn array_mut<'a, T>(what: &str, data: *mut T, count: usize) -> Result<&'a mut [T], Error> {
    check(what, data, count)?;
    // SAFETY: an array of at least one element, of a length that exists, and nobody else's.
    Ok(if count == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(data, count) } })
}

/// Refuses what no array can be.
fn check<T>(what: &str, data: *const T, count: usize) -> Result<(), Error> {
    if count > 0 && data.is_null() {
        return Err(refused(what, "an array", "NULL"));
    }
    if !data.is_aligned() && count > 0 {
        return Err(refused(what, "an array", "one at an odd address"));
    }
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(refused(what, "an array", format!("{count} elements"))),
    }
}

/// # Safety
/// Null, or a text that ends with a NUL.
pub(crate) unsafe fn text<'a>(what: &str, text: *const c_char) -> Result<&'a str, Error> {
    if text.is_null() {
        return Err(refused(what, "a text", "NULL"));
    }
    // SAFETY: not null, so a text.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| refused(what, "a text in UTF-8", text.to_string_lossy()))
}

pub(crate) fn refused(what: &str, expected: &str, got: impl std::fmt::Display) -> Error {
    Error::new(Reason::BadArgument, format!("{what}: expected {expected}, got {got}"))
}
