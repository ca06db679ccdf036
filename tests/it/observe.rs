//! What a run of the tests saw, written down for `tests/verification.rs`, which makes the report of it.
//!
//! All of a run lies in one directory, named after the `cargo test` that started it, so that nothing of an earlier run
//! can be taken for this one's.

#![allow(dead_code, reason = "shared by the two test binaries, and each needs a part of it")]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

/// Every secret of the tests holds this word, and no log may.
pub const CANARY: &str = "canary";

/// Where this run's observations and logs are.
pub fn run_directory() -> PathBuf {
    let cargo = std::os::unix::process::parent_id();
    let stat = fs::read_to_string(format!("/proc/{cargo}/stat")).expect("the parent lives");
    // Field 22 of proc_pid_stat(5), counted from behind the name in parentheses: process ids come again, this does not.
    let started = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)).expect("a start time");
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("run-{cargo}-{started}"))
}

/// A file of this run, to append to.
pub fn file(name: &str) -> File {
    let directory = run_directory();
    fs::create_dir_all(&directory).expect("a directory for the run");
    OpenOptions::new().create(true).append(true).open(directory.join(name)).expect("a file of the run")
}

/// A row of `tests/threats.tsv` was answered so.
pub fn threat(row: u32, answer: impl AsRef<str>) {
    note(&json!({"row": row, "answer": answer.as_ref()}));
}

/// A fault of `tests/faults.tsv` was noticed and healed in these times; `None` where there is nothing to notice.
pub fn fault(name: &str, detected: Option<Duration>, recovered: Duration, what: &str) {
    let detected_ms = detected.map(|time| time.as_millis() as u64);
    note(
        &json!({"fault": name, "detected_ms": detected_ms, "recovered_ms": recovered.as_millis() as u64, "what": what}),
    );
}

/// Whether a line is one of a log of text: time, level, and nothing that a terminal would act on.
pub fn is_text_line(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let time = words.next().unwrap_or_default();
    let is_time = time.len() > 19 && time.ends_with('Z') && time.as_bytes()[10] == b'T' && time.starts_with("20");
    let level = words.next().unwrap_or_default();
    is_time && ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"].contains(&level) && !line.contains(char::is_control)
}

/// No log of this run may hold this text. Those with [`CANARY`] in them need not be named.
pub fn secret(text: &str) {
    note(&json!({"secret": text}));
}

/// One line in one write, so that processes do not mix theirs.
fn note(observation: &Value) {
    let line = format!("{observation}\n");
    file("observations.jsonl").write_all(line.as_bytes()).expect("the observation is written");
}
