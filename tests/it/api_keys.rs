//! Keys of the API that are rotated while it is in use.

use std::fs;
use std::os::unix::fs::symlink;

use hubcast::config::Config;
use hubcast::gateway::Gateway;
use tempfile::TempDir;

use crate::harness::{await_metric, eventually, gateway, http, metric};

const FAILED: &str = r#"hubcast_reload_failed{file="api_keys"}"#;
const RELOADS: &str = r#"hubcast_reloads_total{file="api_keys"}"#;

async fn status(gateway: &Gateway, key: &str) -> u16 {
    http(gateway, "POST /api/publish/a", &format!("X-API-Key: {key}\r\n"), b"1").await.status
}

async fn await_status(gateway: &Gateway, key: &str, expected: u16) {
    eventually(&format!("{key} to be answered {expected}"), async || {
        (status(gateway, key).await == expected).then_some(())
    })
    .await;
}

/// A file written in place, replaced, and gone: the keys follow what can be used, and one of the list stays.
#[tokio::test(flavor = "multi_thread")]
async fn keys_in_a_file_are_rotated_without_a_restart() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("keys");
    fs::write(&path, "# ours\n\n  one\ntwo # for a while\n").unwrap();
    let gateway = gateway(&[("HUBCAST_API_KEYS", &format!("fixed, file:{}", path.display()))]);
    for (key, expected) in [("one", 200), ("two", 200), ("fixed", 200), ("three", 401), ("#", 401), ("ours", 401)] {
        assert_eq!(status(&gateway, key).await, expected, "{key}");
    }
    fs::write(&path, "two\nthree\n").unwrap();
    await_status(&gateway, "three", 200).await;
    for (key, expected) in [("one", 401), ("two", 200), ("fixed", 200)] {
        assert_eq!(status(&gateway, key).await, expected, "{key}");
    }
    await_metric(&gateway, RELOADS, 1.0).await;
    for (index, bad) in [&b"# nothing\n"[..], b"", b"\xFF\xFE\n", b"four delete\n"].into_iter().enumerate() {
        fs::write(&path, bad).unwrap();
        await_metric(&gateway, FAILED, 1.0).await;
        assert_eq!((status(&gateway, "two").await, status(&gateway, "four").await), (200, 401), "{index}");
        fs::write(dir.path().join("next"), format!("two\nnew{index}")).unwrap();
        fs::rename(dir.path().join("next"), &path).unwrap();
        await_metric(&gateway, FAILED, 0.0).await;
        assert_eq!(status(&gateway, &format!("new{index}")).await, 200);
    }
    fs::remove_file(&path).unwrap();
    await_metric(&gateway, FAILED, 1.0).await;
    assert_eq!(status(&gateway, "two").await, 200);
}

/// Kubernetes mounts a Secret as a link to a link to a directory, and swaps the one in the middle.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_kubernetes_swaps_is_followed() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (version, key) in [("..v1", "old"), ("..v2", "new")] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("keys"), key).unwrap();
    }
    symlink("..v1", at("..data")).unwrap();
    symlink("..data/keys", at("keys")).unwrap();
    let gateway = gateway(&[("HUBCAST_API_KEYS", at("keys").to_str().unwrap())]);
    assert_eq!(status(&gateway, "old").await, 200);
    symlink("..v2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    await_status(&gateway, "new", 200).await;
    assert_eq!(status(&gateway, "old").await, 401);
}

/// No key, a wrong one, one that is good for something else: 401, 401, 403, each counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_good_for_what_its_line_says() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("keys");
    fs::write(&path, "backend publish\nscreen read\noperator read admin # on call\nroot\n").unwrap();
    let gateway = gateway(&[("HUBCAST_API_KEYS", path.to_str().unwrap())]);
    let publish = ("POST /api/publish/a", "1");
    let batch = ("POST /api/publish", r#"{"channel":"a","data":1}"#);
    let look = ("GET /api/connections", "");
    let act = ("POST /api/disconnect", r#"{"user":"nobody"}"#);
    for (key, allowed) in [
        ("backend", [true, true, false, false]),
        ("screen", [false, false, true, false]),
        ("operator", [false, false, true, true]),
        ("root", [true; 4]),
    ] {
        for ((request, body), is_allowed) in [publish, batch, look, act].into_iter().zip(allowed) {
            let header = format!("Authorization: bearer {key}\r\n");
            let answer = http(&gateway, request, &header, body.as_bytes()).await;
            assert_eq!(answer.status, if is_allowed { 200 } else { 403 }, "{key} {request}");
        }
    }
    for (header, message) in [("", "an API key is needed"), ("X-API-Key: backen\r\n", "the API key is wrong")] {
        let answer = http(&gateway, publish.0, header, b"1").await;
        assert_eq!((answer.status, answer.json()["error"]["message"].as_str()), (401, Some(message)));
        assert!(answer.head.to_lowercase().contains("www-authenticate: bearer"), "{}", answer.head);
    }
    for (reason, count) in [("no_key", 1.0), ("wrong_key", 1.0), ("no_right", 7.0)] {
        let series = format!(r#"hubcast_api_refused_total{{reason="{reason}"}}"#);
        assert_eq!(metric(&gateway, &series).await, count, "{reason}");
    }
}

/// A gateway does not start with a file that would let nobody in; nor does it show a key.
#[tokio::test]
async fn a_file_without_keys_stops_the_start() {
    let dir = TempDir::new().unwrap();
    let (missing, empty) = (dir.path().join("missing"), dir.path().join("empty"));
    fs::write(&empty, "# canary\n").unwrap();
    for (path, message) in [(missing, "No such file"), (empty, "there is no key in it")] {
        let env = [
            ("HUBCAST_LISTEN", "127.0.0.1:0"),
            ("HUBCAST_INTERNAL_LISTEN", "127.0.0.1:0"),
            ("HUBCAST_API_KEYS", &format!("canary,{}", path.display())),
        ];
        let config = Config::from_env(env.map(|(name, value)| (name.to_owned(), value.to_owned()))).unwrap();
        assert!(config.print(1).contains(&format!("HUBCAST_API_KEYS=***,file:{}\n", path.display())));
        let error = Gateway::start(config).expect_err("it must not start").to_string();
        assert!(error.starts_with("HUBCAST_API_KEYS: ") && error.contains(message), "{error}");
        assert!(!error.contains("canary") && !error.contains('\n'), "{error}");
    }
}
