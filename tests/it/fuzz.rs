//! The fuzz targets on the stable compiler: over the kept corpus, and over what chance makes of it, always the same.
//!
//! `PROPTEST_CASES=1000000 cargo test --test it fuzz::` goes on for longer. What it finds is kept in `fuzz/corpus`.

use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

#[path = "../../fuzz/targets.rs"]
mod targets;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no corpus");
    paths.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// One change of a file of the corpus: bytes are replaced, removed, doubled, or another file follows.
fn mutate(mut bytes: Vec<u8>, other: &[u8], changes: &[(u8, u16, u8)]) -> Vec<u8> {
    for (kind, at, byte) in changes {
        let at = usize::from(*at) % (bytes.len() + 1);
        match kind {
            0 if at < bytes.len() => bytes[at] = *byte,
            1 if at < bytes.len() => bytes[at] ^= 1 << (byte % 8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => bytes.insert(at, *byte),
            4 => bytes.truncate(at),
            5 => {
                let end = bytes.len().min(at + usize::from(*byte));
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            _ => bytes.splice(at..at, other.iter().copied()).for_each(drop),
        }
    }
    bytes
}

/// Fuzzes one target with as many cases as usual, or as `PROPTEST_CASES` says.
fn fuzz(name: &str, share: u32) {
    let (_, target) = targets::TARGETS.into_iter().find(|(target, _)| *target == name).unwrap();
    let corpus = corpus(name);
    corpus.iter().for_each(|bytes| target(bytes));
    let usual = Config::default().cases;
    let is_usual = usual == 256;
    let config = Config {
        cases: if is_usual { 20_000 / share } else { usual },
        rng_seed: if is_usual { RngSeed::Fixed(6) } else { RngSeed::Random },
        failure_persistence: None,
        ..Config::default()
    };
    let files = proptest::sample::select(corpus);
    let changes = proptest::collection::vec((0_u8..7, any::<u16>(), any::<u8>()), 1..12);
    let changed = (files.clone(), files, changes).prop_map(|(bytes, other, changes)| mutate(bytes, &other, &changes));
    let bytes = prop_oneof![4 => changed, 1 => proptest::collection::vec(any::<u8>(), 0..300)];
    let outcome = TestRunner::new(config).run(&bytes, |bytes| {
        target(&bytes);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{name}: {error}"));
}

#[test]
fn frames() {
    fuzz("frames", 1);
}

#[test]
fn handshake() {
    fuzz("handshake", 20);
}

#[test]
fn commands() {
    fuzz("commands", 1);
}

#[test]
fn cursor() {
    fuzz("cursor", 1);
}

#[test]
fn envelope() {
    fuzz("envelope", 1);
}

#[test]
fn channel_name() {
    fuzz("channel_name", 1);
}

#[test]
fn subscriptions() {
    fuzz("subscriptions", 10);
}
