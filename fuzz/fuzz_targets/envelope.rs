//! cargo-fuzz: see `fuzz/targets.rs`.

#![no_main]

#[path = "../targets.rs"]
#[allow(dead_code, reason = "shared by all targets, and each needs one")]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::envelope(bytes));
