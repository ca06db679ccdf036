//! Names, cursors and messages that mean something to Redis, to a terminal or to nobody (threat rows 44, 45, 47 to 54, 57, 58).

use futures_util::future::join_all;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use serde_json::{Value, json};

use crate::harness::{Client, Redis, await_metric, eventually, gateway, http, metric, ready};
use crate::hostile::target::Target;
use crate::observe;

const RULES: (&str, &str) = (
    "HUBCAST_CHANNEL_RULES",
    r#"[{"match":"h:*","history":{"size":20,"ttl":"10m"},"client_publish":true},{"match":"*","client_publish":true}]"#,
);

fn bad_names() -> Vec<(u32, &'static str, String)> {
    let mut names: Vec<_> = [
        (49, "a\r\nFLUSHALL\r\n"),
        (49, "a\0b"),
        (49, "a b"),
        (49, "\u{202e}"),
        (49, "é"),
        (49, "a'b\"c"),
        (49, ""),
        (50, "*"),
        (50, "c?"),
        (50, "[a-z]"),
        (51, "{a}b"),
        (51, "{}"),
        (51, "}"),
        (52, "__keyevent@0__:*"),
        (52, "__keyspace@0__:k"),
        (52, "__sentinel__:hello"),
        (52, "__control"),
        (52, "__redis__:invalidate"),
    ]
    .map(|(row, name)| (row, name, name.to_owned()))
    .into();
    names.push((49, "256 bytes", "n".repeat(256)));
    names.push((49, "10 kB", "n".repeat(10_000)));
    names
}

/// By every way in: commands in all their forms, the query of the handshake, and the API.
#[tokio::test(flavor = "multi_thread")]
async fn bad_names_are_refused_everywhere() {
    let redis = Redis::start().await;
    let mut target = Target::start(&[("HUBCAST_REDIS_URL", &redis.url())]).await;
    for (row, what, name) in bad_names() {
        // A connection each: so many bad requests on one would close it.
        let mut client = Client::connect(&target).await;
        let commands = [
            json!({"type": "subscribe", "channel": name, "id": 1}),
            json!({"type": "subscribe", "channels": [name], "id": 1}),
            json!({"type": "subscribe", "channels": [{"channel": name}], "id": 1}),
            json!({"type": "unsubscribe", "channel": name, "id": 1}),
            json!({"type": "publish", "channel": name, "data": 1, "id": 1}),
            json!({"type": "history", "channel": name, "id": 1}),
            json!({"type": "presence", "channel": name, "id": 1}),
        ];
        for command in commands {
            client.send(&command).await;
            let answer = client.json().await;
            assert_eq!((&answer["code"], &answer["id"]), (&json!("bad_request"), &json!(1)), "{command}: {answer}");
        }
        let body = json!({"channel": name, "data": 1}).to_string();
        assert_eq!(http(&target, "POST /api/publish", "", body.as_bytes()).await.status, 400, "{what}");
        if name.len() < 1000 {
            let escaped: String = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
            let status = http(&target, &format!("POST /api/publish/{escaped}"), "", b"1").await.status;
            // The empty name is no route's.
            assert!(matches!(status, 400 | 404), "{what}: {status}");
        }
        observe::threat(row, format!("{}: bad_request", what.escape_default()));
    }
    let channels: Vec<String> = redis.query(&["PUBSUB", "CHANNELS", "*"]).await.unwrap();
    let ours = |channel: &String| channel == "hub:neighbours" || channel.starts_with("hub:__control");
    assert!(channels.iter().all(ours), "{channels:?}");
    assert_eq!(redis.query::<u64>(&["PUBSUB", "NUMPAT"]).await.unwrap(), 0);
    observe::threat(50, "no pattern is subscribed at Redis");
    target.assert_unharmed().await;
}

/// What Redis is asked for is the prefix and the name, byte for byte.
#[test]
fn the_name_at_redis_is_the_name() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let redis = runtime.block_on(Redis::start());
    let config = Config { cases: 64, rng_seed: RngSeed::Fixed(49), failure_persistence: None, ..Config::default() };
    let names = proptest::collection::btree_set("[A-Za-z0-9_.:/@#=,;-]{1,255}", 1..20);
    let outcome = TestRunner::new(config).run(&names, |names| {
        let names: Vec<_> = names.into_iter().filter(|name| !name.starts_with("__")).collect();
        runtime.block_on(subscribed_at_redis(&redis, &names));
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    observe::threat(49, "any allowed names: those very bytes at Redis");
}

async fn subscribed_at_redis(redis: &Redis, names: &[String]) {
    let prefix = format!("p{:x}:", rand::random::<u64>());
    let gateway = gateway(&[("HUBCAST_REDIS_URL", &redis.url()), ("HUBCAST_REDIS_CHANNEL_PREFIX", &prefix)]);
    ready(&gateway).await;
    let mut client = Client::connect(&gateway).await;
    for name in names {
        client.send(&json!({"type": "subscribe", "channel": name})).await;
        client.expect(&json!({"type": "subscribed", "channel": name})).await;
    }
    let mut seen: Vec<String> = redis.query(&["PUBSUB", "CHANNELS", &format!("{prefix}*")]).await.unwrap();
    seen.retain(|channel| !channel.starts_with(&format!("{prefix}__control")));
    seen.sort();
    let mut expected: Vec<_> = names.iter().map(|name| format!("{prefix}{name}")).collect();
    expected.sort();
    assert_eq!(seen, expected);
}

/// JSON that is none, or not what it should be: each is answered, the connection stays, and a good command still works.
#[tokio::test(flavor = "multi_thread")]
async fn bad_json_is_answered() {
    let mut target = Target::start(&[RULES]).await;
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(10_000), close.repeat(10_000));
    let cases = [
        ("not JSON", "nonsense".to_owned(), "bad_request"),
        ("cut off", r#"{"type":"ping""#.into(), "bad_request"),
        ("two values", r#"{"type":"ping"}{"type":"ping"}"#.into(), "bad_request"),
        ("a number", "1".into(), "bad_request"),
        ("null", "null".into(), "bad_request"),
        ("an empty array", "[]".into(), "bad_request"),
        ("arrays in arrays", "[[1]]".into(), "bad_request"),
        ("depth 10,000", deep("[", "]"), "bad_request"),
        ("objects 10,000 deep", deep(r#"{"a":"#, "}"), "bad_request"),
        ("duplicate keys", r#"{"type":"ping","type":"ping"}"#.into(), "bad_request"),
        ("type is a number", r#"{"type":7}"#.into(), "bad_request"),
        ("id is an object", r#"{"type":"ping","id":{}}"#.into(), "bad_request"),
        ("a lone surrogate", r#"{"type":"subscribe","channel":"\ud800"}"#.into(), "bad_request"),
        ("limit is 1e999", r#"{"type":"history","channel":"h:1","limit":1e999}"#.into(), "bad_request"),
        ("limit is negative", r#"{"type":"history","channel":"h:1","limit":-1}"#.into(), "bad_request"),
        ("an unknown type", r#"{"type":"eval","channel":"c"}"#.into(), "unknown_type"),
    ];
    for (what, text, code) in cases {
        // A connection each: those who go on so are closed, which another story tells.
        let mut client = Client::connect(&target).await;
        client.send_text(&text).await;
        let answer = client.json().await;
        assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!(code)), "{what}: {answer}");
        assert!(answer.to_string().len() < 1000, "{what}: an answer does not repeat what it answers");
        client.send(&json!({"type": "ping"})).await;
        client.expect(&json!({"type": "pong"})).await;
        observe::threat(if code == "bad_request" { 44 } else { 45 }, format!("{what}: {code}"));
    }
    // Data is not looked into: numbers too large for any type, and depth that no parser of trees would bear.
    let mut client = Client::subscribed(&target, "c").await;
    for (what, data) in [("1e999", "1e999".to_owned()), ("depth 10,000", deep("[", "]"))] {
        client.send_text(&format!(r#"{{"type":"publish","channel":"c","data":{data}}}"#)).await;
        assert_eq!(client.text().await, format!(r#"{{"type":"event","channel":"c","data":{data}}}"#));
        observe::threat(44, format!("{what} as data: passed on byte for byte"));
    }
    drop(client);
    target.assert_unharmed().await;
}

/// Channels without number do not make series without number.
#[tokio::test(flavor = "multi_thread")]
async fn channels_are_bounded_and_no_labels() {
    let mut target = Target::start(&[("HUBCAST_SUBSCRIPTIONS_MAX", "128")]).await;
    let before = http(&target, "GET /metrics", "", b"").await.body.lines().count();
    for connection in 0..40 {
        let mut client = Client::connect(&target).await;
        let names: Vec<_> = (0..130).map(|number| format!("c:{connection}:{number}")).collect();
        client.send(&json!({"type": "subscribe", "channels": names})).await;
        for number in 0..130 {
            let answer = client.json().await;
            let is_within = number < 128;
            assert_eq!(answer["type"], if is_within { "subscribed" } else { "error" }, "{answer}");
            assert!(is_within || answer["code"] == "limit_exceeded", "{answer}");
        }
        assert_eq!(http(&target, "GET /metrics", "", b"").await.body.lines().count(), before);
    }
    target.assert_unharmed().await;
    observe::threat(47, "the 129th: limit_exceeded; 5,120 channels: the same number of series");
}

/// What an attacker writes comes into the log as one escaped line.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_line_is_one_line() {
    let redis = Redis::start().await;
    let mut target = Target::start(&[("HUBCAST_REDIS_URL", &redis.url())]).await;
    let evil = "x\r\n{\"level\":\"INFO\",\"message\":\"forged\"}\u{1b}[2J\u{202e}\u{2028}";
    let envelope = json!({"v": 99, "id": 1, "from": evil, "ask": {"connections": {"limit": 1}}}).to_string();
    redis.command(&["PUBLISH", "hub:__control", &envelope]).await;
    let line = eventually("the log line", async || {
        let log = target.binary.log();
        log.lines().find(|line| line.contains("another version")).map(str::to_owned)
    })
    .await;
    let parsed: Value = serde_json::from_str(&line).expect("one JSON line");
    assert_eq!(parsed["fields"]["from"], evil, "{line}");
    assert!(!line.contains('\u{1b}') && !line.contains('\r'), "{line}");
    let log = target.binary.log();
    assert!(!log.lines().any(|line| line.starts_with("{\"level\":\"INFO\",\"message\":\"forged\"")), "{log}");
    // In names of users it does not get that far.
    for user in ["a%0D%0Ab", "%1B%5B2J", "a%00"] {
        assert!(Client::try_open_at(target.binary.public, &format!("/ws?user={user}"), None).await.is_err());
    }
    target.assert_unharmed().await;
    observe::threat(53, "CR LF, ESC and bidi in an envelope: one escaped JSON line; in a user's name: 400");

    // The same where the log is text for people.
    let env = [("HUBCAST_REDIS_URL", redis.url()), ("HUBCAST_LOG_FORMAT", "text".to_owned())];
    let mut target = Target::start(&env.each_ref().map(|(name, value)| (*name, value.as_str()))).await;
    redis.command(&["PUBLISH", "hub:__control", &envelope]).await;
    redis.command(&["PUBLISH", "hub:__control", &envelope.replace("99", "\"a\\nb\"")]).await;
    let log = eventually("the log lines", async || {
        let log = target.binary.log();
        (log.contains("another version") && log.contains("cannot be read")).then_some(log)
    })
    .await;
    for line in log.split_terminator('\n') {
        assert!(observe::is_text_line(line), "{line:?}");
    }
    target.assert_unharmed().await;
    observe::threat(53, "the same in a log of text: one line, nothing in it moves the cursor");
}

/// Cursors that nobody gave out.
#[tokio::test(flavor = "multi_thread")]
async fn forged_cursors_recover_nothing() {
    let redis = Redis::start().await;
    let url = redis.url();
    for env in [vec![RULES], vec![RULES, ("HUBCAST_REDIS_URL", url.as_str())]] {
        let mut target = Target::start(&env).await;
        let mut cursors = Vec::new();
        for channel in ["h:1", "h:1", "h:2"] {
            let answer = http(&target, &format!("POST /api/publish/{channel}"), "", b"1").await.json();
            cursors.push(answer["results"][0]["cursor"].as_str().unwrap().to_owned());
        }
        let (ms, sequence) = cursors[1].split_once('-').expect("ms and sequence");
        let forged = [
            "18446744073709551615-18446744073709551615".to_owned(),
            "0-0".into(),
            "-1".into(),
            "-1--1".into(),
            "1e9-1".into(),
            "99999999999999999999999-1".into(),
            format!("{ms}-{}", sequence.parse::<u64>().unwrap() - 1),
            format!("{ms}-0{sequence}"),
            format!("+{ms}-{sequence}"),
            cursors[2].clone(),
            "\0".into(),
            "$".into(),
            ">".into(),
            "+".into(),
            "x".repeat(60_000),
        ];
        for after in forged {
            let mut client = Client::connect(&target).await;
            client.send(&json!({"type": "subscribe", "channel": "h:1", "after": after})).await;
            let answer = client.json().await;
            assert_eq!(answer["recovered"], false, "{after:.60}: {answer}");
            let nobody = json!({"type": "ping"});
            client.send(&nobody).await;
            client.expect(&json!({"type": "pong"})).await;
        }
        // In time, in bytes and in type: none of these is text.
        for after in [json!(1), json!({"a": 1}), json!([]), json!(true)] {
            let mut client = Client::connect(&target).await;
            client.send(&json!({"type": "subscribe", "channel": "h:1", "after": after})).await;
            assert_eq!(client.json().await["code"], "bad_request", "{after}");
        }
        let mut honest = Client::connect(&target).await;
        honest.send(&json!({"type": "subscribe", "channel": "h:1", "after": cursors[0]})).await;
        assert_eq!(honest.json().await["recovered"], true);
        drop(honest);
        eventually("all to have left", async || (metric(&target, "hubcast_channels").await == 1.0).then_some(())).await;
        target.assert_unharmed().await;
    }
    observe::threat(54, "15 forged cursors, of another channel too: recovered:false; other types: bad_request");
}

/// A hundred retries at once are one publish.
#[tokio::test(flavor = "multi_thread")]
async fn racing_retries_are_one_publish() {
    const RETRIES: usize = 100;
    let redis = Redis::start().await;
    let url = redis.url();
    for env in [vec![RULES], vec![RULES, ("HUBCAST_REDIS_URL", url.as_str())]] {
        let mut target = Target::start(&env).await;
        let mut client = Client::connect(&target).await;
        client.send(&json!({"type": "subscribe", "channel": "h:1"})).await;
        assert_eq!(client.json().await["type"], "subscribed");
        let retries = (0..RETRIES).map(|_| http(&target, "POST /api/publish/h:1", "Idempotency-Key: k\r\n", b"1"));
        let answers = join_all(retries).await;
        for answer in &answers {
            assert_eq!((answer.status, &answer.body), (200, &answers[0].body));
        }
        http(&target, "POST /api/publish/h:1", "", b"2").await;
        assert_eq!(client.json().await["data"], 1);
        assert_eq!(client.json().await["data"], 2, "once");
        drop(client);
        target.assert_unharmed().await;
    }
    observe::threat(57, "100 racing retries: published once, one cursor, with and without Redis");
}

/// Anything may be written to Redis by anybody who reaches it.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_at_redis_harms_nobody() {
    let redis = Redis::start().await;
    let mut target = Target::start(&[RULES, ("HUBCAST_REDIS_URL", &redis.url())]).await;
    let mut client = Client::connect(&target).await;
    client.send(&json!({"type": "subscribe", "channels": ["h:1", "c"]})).await;
    for _ in 0..2 {
        assert_eq!(client.json().await["type"], "subscribed");
    }
    let connection = redis::Client::open(redis.url()).unwrap();
    let mut connection = connection.get_multiplexed_async_connection().await.unwrap();
    let garbage: [&[u8]; 8] = [
        b"\xff",
        b"\xff\x01",
        b"\xff\x01\x00\x00",
        b"\xff\x02{}",
        b"\xff\xff\xff\xff\xff",
        b"\xfe\x01",
        b"\x00",
        b"\xff\x01 1-1 1-2 x",
    ];
    for channel in ["hub:h:1", "hub:c"] {
        for bytes in garbage {
            redis::cmd("PUBLISH").arg(channel).arg(bytes).exec_async(&mut connection).await.unwrap();
        }
        redis::cmd("PUBLISH").arg(channel).arg("\"after\"").exec_async(&mut connection).await.unwrap();
    }
    let mut told = 0;
    for _ in 0..2 {
        loop {
            let frame = client.json().await;
            match frame["type"].as_str().unwrap() {
                "event" if frame["data"] == "after" => break,
                // A plain publish of these very bytes, never a half-read entry.
                "event" => {
                    assert!(frame.get("cursor").is_none() && frame.get("data").is_none_or(Value::is_string), "{frame}");
                    told += 1;
                }
                "gap" => told += 1,
                other => panic!("{other}: {frame}"),
            }
        }
    }
    assert!(told > 0);
    observe::threat(58, "bytes that begin like envelopes: told as plain publishes or gaps, no cursor moves");
    // The stream's key is of another type.
    let keys: Vec<String> = redis.query(&["KEYS", "ws:*h:2*"]).await.unwrap();
    assert_eq!(keys, Vec::<String>::new());
    assert_eq!(http(&target, "POST /api/publish/h:2", "", b"1").await.status, 200);
    let keys: Vec<String> = redis.query(&["KEYS", "ws:*h:2*"]).await.unwrap();
    assert!(!keys.is_empty());
    // Each key by itself of another type: nothing was done. A position that is none: the script ends at some line, and
    // what it did before is not to be seen from outside.
    for (key, command, status, outcome) in [
        ("ws:history:h:2", ["SET", "ws:history:h:2", "garbage"], 503, Value::Null),
        ("ws:history_top:h:2", ["RPUSH", "ws:history_top:h:2", "garbage"], 503, Value::Null),
        ("ws:history_top:h:2", ["SET", "ws:history_top:h:2", "garbage"], 504, json!("unknown")),
    ] {
        redis.command(&["DEL", key]).await;
        redis.command(&command).await;
        let answer = http(&target, "POST /api/publish/h:2", "", b"2").await;
        assert_eq!((answer.status, &answer.json()["error"]["outcome"]), (status, &outcome), "{command:?}: {answer:?}");
    }
    client.send(&json!({"type": "subscribe", "channel": "h:2", "after": "1-1"})).await;
    client.send(&json!({"type": "ping"})).await;
    loop {
        let frame = client.json().await;
        assert_ne!(frame["recovered"], true, "{frame}");
        if frame["type"] == "pong" {
            break;
        }
    }
    observe::threat(
        58,
        "a stream or position of the wrong type: publish 503, garbage as position 504, never recovered:true",
    );
    drop(client);
    await_metric(&target, "hubcast_connections", 1.0).await;
    for key in &keys {
        redis.command(&["DEL", key]).await;
    }
    target.assert_unharmed().await;
}
