//! The verification report: what the stories of `tests/it` saw in this very run, row by row of the threat and fault tables.
//!
//! Cargo runs test binaries in the order of their names, so this one comes after `it`. A row that nobody observed fails,
//! and so does a log of any gateway of the run that holds a secret or a line that is not JSON.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests document themselves and may panic")]

#[path = "it/observe.rs"]
mod observe;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const THREATS: &str = include_str!("threats.tsv");
const FAULTS: &str = include_str!("faults.tsv");

/// The lines of a table of tab-separated columns, without its heads.
fn table(text: &'static str, columns: usize) -> Vec<Vec<&'static str>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let rows: Vec<Vec<_>> = lines.map(|line| line.split('\t').map(str::trim).collect()).collect();
    for row in &rows {
        assert_eq!(row.len(), columns, "{row:?}");
    }
    rows
}

#[derive(Default)]
struct Seen {
    threats: BTreeMap<u64, BTreeSet<String>>,
    faults: BTreeMap<String, Vec<Value>>,
    secrets: BTreeSet<String>,
}

fn seen(directory: &Path) -> Seen {
    let mut seen = Seen::default();
    let observations = fs::read_to_string(directory.join("observations.jsonl")).unwrap_or_default();
    for line in observations.lines() {
        let observation: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        if let Some(row) = observation["row"].as_u64() {
            seen.threats.entry(row).or_default().insert(observation["answer"].as_str().unwrap().to_owned());
        } else if let Some(fault) = observation["fault"].as_str() {
            seen.faults.entry(fault.to_owned()).or_default().push(observation);
        } else {
            seen.secrets.insert(observation["secret"].as_str().unwrap().to_owned());
        }
    }
    seen
}

/// The threat table with the answers of this run; the missing ones go to `missing`.
fn threats(seen: &Seen, missing: &mut Vec<String>) -> String {
    let mut text = "## Threats\n\n| # | attack | designed answer | seen in this run |\n|---|---|---|---|\n".to_owned();
    let rows = table(THREATS, 4);
    for (at, row) in rows.iter().enumerate() {
        let [number, attack, designed, note] = row[..] else { unreachable!("four columns") };
        assert_eq!(number.parse(), Ok(at as u64 + 1), "rows stand in order");
        let mut answers: Vec<_> = seen.threats.get(&(at as u64 + 1)).into_iter().flatten().cloned().collect();
        if answers.is_empty() && note.is_empty() {
            missing.push(format!("threat {number}: {attack}"));
            answers.push("**NOT OBSERVED**".to_owned());
        } else if answers.is_empty() || note.starts_with("later feature") {
            answers.push(note.to_owned());
        }
        let _ = writeln!(text, "| {number} | {attack} | {designed} | {} |", answers.join("; ").replace('|', "\\|"));
    }
    for row in seen.threats.keys() {
        assert!((1..=rows.len() as u64).contains(row), "there is no threat {row}");
    }
    text
}

/// The fault table with the times of this run.
fn faults(seen: &Seen, missing: &mut Vec<String>) -> String {
    let mut text = "## Faults\n\nOver all its observations, the slowest: a busy machine measures longer.\n\n\
        | fault | promise | noticed after | over after | what was checked |\n|---|---|---|---|---|\n"
        .to_owned();
    let rows = table(FAULTS, 3);
    for row in &rows {
        let [name, promise, note] = row[..] else { unreachable!("three columns") };
        let Some(times) = seen.faults.get(name) else {
            if note.is_empty() {
                missing.push(format!("fault {name}"));
            }
            let note = if note.is_empty() { "**NOT OBSERVED**" } else { note };
            let _ = writeln!(text, "| {name} | {promise} | | | {note} |");
            continue;
        };
        let slowest = |member: &str| {
            let most = times.iter().filter_map(|time| time[member].as_u64()).max();
            most.map_or("-".to_owned(), |most| format!("{most} ms"))
        };
        let checked: BTreeSet<_> = times.iter().map(|time| time["what"].as_str().unwrap()).collect();
        let checked = checked.into_iter().collect::<Vec<_>>().join("; ");
        let _ = writeln!(
            text,
            "| {name} | {promise} | {} | {} | {checked} |",
            slowest("detected_ms"),
            slowest("recovered_ms")
        );
    }
    for name in seen.faults.keys() {
        assert!(rows.iter().any(|row| row[0] == name), "there is no fault {name}");
    }
    text
}

/// Reads every log of the run: each line is JSON, or one of text where that was asked for, and none holds a secret.
fn logs(directory: &Path, secrets: &BTreeSet<String>) -> (String, String) {
    let (mut files, mut lines, mut text_lines) = (0, 0, 0);
    for entry in fs::read_dir(directory).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        files += 1;
        let is_text = path.to_string_lossy().ends_with(".text.log");
        for line in fs::read_to_string(&path).unwrap().lines() {
            lines += 1;
            // What is said to whoever starts the process, before there is a log and when it ends at once.
            let is_said = line.starts_with("hubcast: ");
            let is_line = match is_text {
                true => observe::is_text_line(line),
                false => serde_json::from_str::<Value>(line).is_ok_and(|line| line["level"].is_string()),
            };
            text_lines += usize::from(is_text);
            assert!(is_said || is_line, "{}: not one line of its format: {line}", path.display());
            let told = secrets.iter().map(String::as_str).chain([observe::CANARY]).find(|secret| line.contains(secret));
            assert!(told.is_none(), "{}: a log tells the secret {told:?}: {line}", path.display());
        }
    }
    let is_each = text_lines > 0 && lines > text_lines;
    assert!(is_each, "the gateways of this run have not logged in each format, so nothing is known of their logs");
    let told = format!("{lines} lines of {files} logs hold none of them");
    let known = secrets.len();
    let canary = observe::CANARY;
    let text = format!(
        "## Logs\n\n{told}: {known} tokens, and all that has `{canary}` in it. Each line is JSON, or in the {text_lines} of text a time, a level and nothing that a terminal acts on.\n"
    );
    (text, told)
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

fn head(target: &Path) -> String {
    let autobahn = fs::read_to_string(target.join("autobahn/run/summary.txt"));
    let autobahn = autobahn.unwrap_or_else(|_| "not run here (see what .ci/autobahn says)\n".to_owned());
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "# Verification\n\nMade by `cargo test` from what this very run observed.\n\n- Commit {}\n- {}\n- {}\n- {}, {processors} processors\n- Conformance: {autobahn}\n",
        first_line("git", &["describe", "--always", "--dirty", "--abbrev=12"]),
        first_line("rustc", &["--version"]),
        first_line("redis-server", &["--version"]),
        first_line("uname", &["-srm"]),
    )
}

#[test]
fn every_threat_and_fault_was_observed_in_this_run_and_no_log_tells_a_secret() {
    let directory = observe::run_directory();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    assert!(directory.is_dir(), "nothing was observed: this test follows those of `it`, in one `cargo test`");
    let mut seen = seen(&directory);
    let (logs, told) = logs(&directory, &seen.secrets);
    seen.threats.entry(20).or_default().insert(told);
    let mut missing = Vec::new();
    let report = [
        head(target),
        threats(&seen, &mut missing),
        faults(&seen, &mut missing),
        logs,
        include_str!("known_limits.md").to_owned(),
    ];
    fs::write(target.join("verification.md"), report.join("\n")).unwrap();
    assert!(missing.is_empty(), "nobody observed in this run: {missing:#?}");
    // Kept only where something is wrong, and no longer than the next whole run.
    fs::remove_dir_all(&directory).unwrap();
    for other in fs::read_dir(env!("CARGO_TARGET_TMPDIR")).unwrap() {
        let path = other.unwrap().path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cargo = name.strip_prefix("run-").and_then(|rest| rest.split('-').next());
        if cargo.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            fs::remove_dir_all(path).unwrap();
        }
    }
}
