//! libFuzzer's way in.

#![no_main]
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "../conversation.rs"]
mod conversation;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    conversation::hold(input);
});
