//! The project's own rules, as tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FILE_LINES_MAX: usize = 500;

fn sources(dirs: &[&str]) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    for dir in dirs {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                files.push((path.clone(), fs::read_to_string(path).unwrap()));
            }
        }
    }
    assert!(!files.is_empty());
    files
}

#[test]
fn files_are_short_and_say_what_they_own() {
    for (path, text) in sources(&[
        "src",
        "loadtest/src",
        "loadtest/src/verify",
        "tests",
        "tests/it",
        "tests/it/hostile",
        "fuzz",
        "benches",
    ]) {
        assert!(text.starts_with("//! "), "{} has no header", path.display());
        assert!(text.lines().count() <= FILE_LINES_MAX, "{} is too long", path.display());
        for word in ["TO\u{44}O", "FIX\u{4d}E", "XX\u{58}"] {
            assert!(!text.contains(word), "{} has a {word}", path.display());
        }
    }
}

#[test]
fn there_is_no_test_code_in_src() {
    for (path, text) in sources(&["src"]) {
        assert!(!text.contains("cfg(test)"), "{}", path.display());
    }
}

/// A metric that nothing ever moves is a lie, and one that the README does not name is not found.
#[test]
fn every_metric_moves_and_is_documented() {
    let metrics = include_str!("../../src/metrics.rs");
    let readme = include_str!("../../README.md");
    let others: String =
        sources(&["src"]).into_iter().filter(|(path, _)| !path.ends_with("metrics.rs")).map(|(_, text)| text).collect();
    let fields = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("    pub ")?.split_once(':'))
        .filter(|(field, _)| field.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_'));
    let mut counted = 0;
    for (field, _) in fields {
        let inside = metrics.matches(&format!("self.{field}.")).count();
        assert!(inside > 0 || others.contains(&format!(".{field}.")), "nothing moves {field}");
        counted += 1;
    }
    assert!(counted > 10);
    let registry = hubcast::metrics::Metrics::default().text();
    for line in registry.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let name = line.split(' ').next().unwrap();
        assert!(readme.contains(&format!("`{name}")), "README.md does not name {name}");
    }
}

/// The bugs that `tests/plants/run` plants are ones that this code could have.
#[test]
fn planted_bugs_fit_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = fs::read_dir(root.join("tests/plants")).unwrap().map(|entry| entry.unwrap().path());
    let patches: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == "patch")).collect();
    assert!(patches.len() >= 2);
    for patch in patches {
        let applied = Command::new("git").args(["apply", "--check"]).arg(&patch).current_dir(root).status().unwrap();
        assert!(applied.success(), "{} does not apply", patch.display());
    }
}
