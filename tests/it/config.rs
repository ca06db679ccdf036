//! Configuration: what is taken, what is refused, and that the README tells all of it.

use std::process::Command;

use hubcast::config::Config;
use hubcast::limits_config::channels_of;
use hubcast::variables::VARIABLES;

fn load(env: &[(&str, &str)]) -> Result<Config, String> {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::from_env(env).map_err(|error| error.to_string())
}

#[test]
fn bad_values_stop_the_start_with_one_line_that_says_what_is_allowed() {
    let cases = [
        ("HUBCAST_LISTEN", "8080", "an address and port"),
        ("HUBCAST_PING_INTERVAL", "54", "a duration"),
        ("HUBCAST_PING_INTERVAL", "0s", "a duration"),
        ("HUBCAST_WRITE_TIMEOUT", "-1s", "a duration"),
        ("HUBCAST_OUTBOX_MESSAGES", "0", "a number from 1"),
        ("HUBCAST_OUTBOX_BYTES", "lots", "a size"),
        ("HUBCAST_MESSAGE_BYTES_MAX", "5GiB", "a size"),
        ("HUBCAST_CONNECTIONS_MAX", "-1", "a number from 1"),
        ("HUBCAST_HANDSHAKES_PER_SECOND", "fast", "0 for no limit"),
        ("HUBCAST_HANDSHAKES_PENDING_MAX", "0", "a number from 1"),
        ("HUBCAST_CONNECTIONS_PER_ADDRESS", "-1", "0 for no limit"),
        ("HUBCAST_COMMANDS_PER_SECOND", "many", "0 for no limit"),
        ("HUBCAST_BYTES_PER_SECOND", "100B", "at least 1KiB"),
        ("HUBCAST_MEMORY_MAX", "1MiB", "at least 8MiB"),
        ("HUBCAST_HISTORY_MEMORY_MAX", "1000KiB", "at least 1MiB"),
        ("HUBCAST_WORKER_THREADS", "0", "a number from 1 to 1024"),
        ("HUBCAST_REDIS_URL", "localhost:6379", "redis://"),
        ("HUBCAST_REDIS_URL", "redis://localhost,http://localhost", "redis://"),
        ("HUBCAST_REDIS_MODE", "ring", "cluster"),
        ("HUBCAST_REDIS_PARTITIONS", "0", "1 to 16384"),
        ("HUBCAST_REDIS_CHANNEL_PREFIX", "{a}:", "hash slot"),
        ("HUBCAST_LOG_FORMAT", "xml", "text or json"),
        ("HUBCAST_LOG", "a=b=c", "a level"),
        ("HUBCAST_INSECURE_INTERNAL", "yes", "true or false"),
        ("HUBCAST_ORIGINS", "app.example.org", "https://app.example.org"),
        ("HUBCAST_ORIGINS", "https://a.example.org/path", "https://*.example.org"),
        ("HUBCAST_TRUSTED_PROXIES", "10.0.0.0/33", "10.0.0.0/8"),
        ("HUBCAST_TRUSTED_PROXIES", "proxy.example.org", "networks"),
        ("HUBCAST_FORWARDING_HEADER", "x-real-ip", "x-forwarded-for or forwarded"),
        ("HUBCAST_PROXY_PROTOCOL", "v2", "on or off"),
        ("HUBCAST_AUTH", "yes", "none or jwt"),
        ("HUBCAST_JWT_LIFE_MAX", "32days", "1s to 31days"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"{sub}*"}]"#, "between {sub} and *"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a{x}"}]"#, "braces"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"{sub}:{sub}"}]"#, "braces"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"u:{sub}","access":"public"}]"#, "no \"access\""),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","access":"private"}]"#, "unknown variant"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"u:{sub}"}]"#, "u:{sub} is allowed only with HUBCAST_AUTH=jwt"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","access":"token"}]"#, "HUBCAST_AUTH=jwt"),
        ("HUBCAST_LISTEN", "0.0.0.0:8080", "HUBCAST_AUTH=none if anybody may connect"),
        ("HUBCAST_CHANNEL_RULES", "{}", "a list such as"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a*b"}]"#, "not at the end"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","slow":"newest"}]"#, "unknown variant"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","latest_by":"/k"}]"#, r#"latest_by without "slow":"latest""#),
        (
            "HUBCAST_CHANNEL_RULES",
            r#"[{"match":"a","slow":"drop_oldest","latest_by":"/k"}]"#,
            r#"latest_by without "slow":"latest""#,
        ),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","slow":"latest","latest_by":"k"}]"#, "not a JSON pointer"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","slow":"latest","latest_by":"/a~2"}]"#, "not a JSON pointer"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","histories":{}}]"#, "unknown field"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","history":{"size":5}}]"#, "missing field `ttl`"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","history":{"size":0,"ttl":"1m"}}]"#, "1 to 10000"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","history":{"size":5,"ttl":"40d"}}]"#, "from 1s to 31d"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"client_publish":true}]"#, "missing field"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","coalesce":"1s"}]"#, "0ms to 100ms"),
        ("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","coalesce":5}]"#, "expected a string"),
        ("HUBCAST_COALESCE", "101ms", "0ms to 100ms"),
        ("HUBCAST_COALESCE", "5", "0ms to 100ms"),
    ];
    for (name, value, allowed) in cases {
        let error = load(&[(name, value)]).unwrap_err();
        assert!(error.starts_with(&format!("{name}={value}: ")), "{error}");
        assert!(error.contains(allowed) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn unknown_names_are_refused_with_the_nearest_known_one() {
    for (name, nearest) in [
        ("HUBCAST_LISTENS", "HUBCAST_LISTEN"),
        ("HUBCAST_PING_INTERVALL", "HUBCAST_PING_INTERVAL"),
        ("HUBCAST_REDIS_URI", "HUBCAST_REDIS_URL"),
    ] {
        assert_eq!(load(&[(name, "x")]).unwrap_err(), format!("{name}: unknown, did you mean {nearest}?"));
    }
}

#[test]
fn names_that_kubernetes_injects_are_ignored_with_one_note() {
    let injected = [
        ("HUBCAST_SERVICE_HOST", "10.0.0.1"),
        ("HUBCAST_SERVICE_PORT_WS", "80"),
        ("HUBCAST_PORT", "tcp://10.0.0.1:80"),
        ("HUBCAST_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("HUBCAST_INTERNAL_SERVICE_HOST", "10.0.0.2"),
        ("HUBCAST_INTERNAL_PORT", "tcp://10.0.0.2:80"),
        ("OTHER", "x"),
    ];
    let config = load(&injected).unwrap();
    assert_eq!(config.notes.len(), 1);
    for (name, _) in &injected[..6] {
        assert!(config.notes[0].contains(name), "{name}");
    }
    assert!(VARIABLES.iter().all(|variable| !variable.name.ends_with("_PORT") && !variable.name.contains("_SERVICE_")));
}

/// Keys that nobody could use, or that would be no secret; and no key is ever shown.
#[test]
fn authentication_is_complete_or_refused() {
    let jwt = ("HUBCAST_AUTH", "jwt");
    let secret = ("HUBCAST_JWT_SECRET", "canary canary canary canary canary 1");
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[jwt], "HUBCAST_AUTH=jwt: allowed only with HUBCAST_JWT_SECRET"),
        (&[secret], "HUBCAST_JWT_SECRET: allowed only with HUBCAST_AUTH=jwt"),
        (&[("HUBCAST_JWT_ISSUER", "x")], "HUBCAST_JWT_ISSUER: allowed only with HUBCAST_AUTH=jwt"),
        (&[jwt, ("HUBCAST_JWT_SECRET", "canary")], "HUBCAST_JWT_SECRET=***: allowed is a secret of at least 32 bytes"),
        (&[jwt, ("HUBCAST_JWT_PUBLIC_KEY", "canary")], "a public key in PEM"),
        (&[jwt, ("HUBCAST_JWKS_URL", "http://issuer.example.org/keys")], "http only on loopback"),
        (&[jwt, ("HUBCAST_JWKS_URL", "ftp://localhost/keys")], "https://issuer.example.org"),
        (&[jwt, secret, ("HUBCAST_JWT_ALGORITHM", "none")], "HS256, HS384"),
        (&[jwt, secret, ("HUBCAST_JWT_ALGORITHM", "RS256")], "allowed only with HUBCAST_JWT_PUBLIC_KEY"),
    ];
    for (env, message) in cases {
        let error = load(env).unwrap_err();
        assert!(error.contains(message) && !error.contains('\n'), "{error}");
        assert!(!error.contains("canary") || error.starts_with("HUBCAST_JWT_PUBLIC_KEY=canary"), "{error}");
    }
    let printed = load(&[jwt, secret, ("HUBCAST_JWKS_URL", "https://issuer.example.org/keys")]).unwrap().print(1);
    assert!(printed.contains("HUBCAST_AUTH=jwt\nHUBCAST_JWT_SECRET=***\n"), "{printed}");
    assert!(printed.contains("HUBCAST_JWKS_URL=https://issuer.example.org/keys\n"), "{printed}");
    assert!(printed.contains("HUBCAST_JWT_LIFE_MAX=1day\n"), "{printed}");
    let open = ("HUBCAST_LISTEN", "0.0.0.0:8080");
    assert!(load(&[open, jwt, secret]).is_ok());
    assert!(load(&[open, ("HUBCAST_AUTH", "none")]).is_ok());
    // Without authentication a public channel is what it is anyway.
    assert!(load(&[("HUBCAST_CHANNEL_RULES", r#"[{"match":"a","access":"public"}]"#)]).is_ok());
    // What is found when the key is used: a private one, none at all, a file that is not there.
    for (key, message) in [
        (("HUBCAST_JWT_PUBLIC_KEY", crate::issuer::RSA_PRIVATE), "private key"),
        (
            ("HUBCAST_JWT_PUBLIC_KEY", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"),
            "no RSA, EC or Ed25519",
        ),
        (("HUBCAST_JWT_SECRET", "/nowhere/to/be/found"), "No such file"),
    ] {
        let error = hubcast::authenticator::Authenticator::load(load(&[jwt, key]).unwrap().auth.jwt.unwrap());
        assert!(error.as_ref().is_err_and(|error| error.contains(message)), "{error:?}");
    }
}

/// What is open on purpose is seen by whoever looks after it.
#[tokio::test]
async fn what_is_open_to_anybody_shows() {
    use crate::harness::{gateway, metric};
    let open = gateway(&[
        ("HUBCAST_LISTEN", "0.0.0.0:0"),
        ("HUBCAST_AUTH", "none"),
        ("HUBCAST_INTERNAL_LISTEN", "0.0.0.0:0"),
        ("HUBCAST_INSECURE_INTERNAL", "true"),
    ]);
    let closed = gateway(&[]);
    for what in ["no_auth", "internal"] {
        let series = format!("hubcast_insecure{{what=\"{what}\"}}");
        assert_eq!((metric(&open, &series).await, metric(&closed, &series).await), (1.0, 0.0), "{what}");
    }
    crate::observe::threat(25, "hubcast_insecure 1 where the configuration lets anybody in, and a warning in the log");
}

#[test]
fn an_open_internal_listener_must_be_said_explicitly() {
    let open = ("HUBCAST_INTERNAL_LISTEN", "0.0.0.0:8081");
    assert!(load(&[open]).unwrap_err().contains("HUBCAST_INSECURE_INTERNAL=true"));
    assert!(load(&[open, ("HUBCAST_API_KEYS", "secret")]).is_ok());
    assert!(load(&[open, ("HUBCAST_INSECURE_INTERNAL", "true")]).is_ok());
    crate::observe::threat(25, "an internal listener off loopback without keys: the start is refused");
}

/// What nobody sets is as much as the machine can do.
#[test]
fn defaults_of_limits_follow_the_machine() {
    let printed = |env: &[(&str, &str)], name: &str| {
        let text = load(env).unwrap().print(2);
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned);
        value.unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    let tls = [("HUBCAST_TLS_CERT", "tls.crt"), ("HUBCAST_TLS_KEY", "tls.key")];
    for workers in [1, 8] {
        let threads = ("HUBCAST_WORKER_THREADS", workers.to_string());
        let threads = (threads.0, threads.1.as_str());
        assert_eq!(printed(&[threads], "HUBCAST_HANDSHAKES_PER_SECOND"), (10_000 * workers).to_string());
        let with_tls = [&[threads][..], &tls].concat();
        assert_eq!(printed(&with_tls, "HUBCAST_HANDSHAKES_PER_SECOND"), (1_200 * workers).to_string());
    }
    // A quarter of the memory, where a channel takes 1 KiB.
    for (memory, channels) in [(512 << 20, 131_072), (2 << 30, 524_288), (64 << 30, 1_000_000)] {
        assert_eq!(channels_of(memory), channels);
    }
    // Half of the memory is for what waits: so it says how much there is.
    let memory = load(&[]).unwrap().limits.memory_max * 2;
    let channels: usize = printed(&[], "HUBCAST_CHANNELS_MAX").parse().unwrap();
    assert!(channels_of(memory).abs_diff(channels) <= 1, "{channels} for {memory} bytes");
}

#[test]
fn what_belongs_together_at_the_edge_must_be_said_together() {
    for (name, other) in [
        ("HUBCAST_TLS_CERT", "HUBCAST_TLS_KEY"),
        ("HUBCAST_TLS_KEY", "HUBCAST_TLS_CERT"),
        ("HUBCAST_PROXY_PROTOCOL", "HUBCAST_TRUSTED_PROXIES"),
    ] {
        let error = load(&[(name, "on")]).unwrap_err();
        assert!(error.starts_with(name) && error.contains(&format!("allowed only with {other}")), "{error}");
    }
}

#[test]
fn a_redis_mode_needs_fitting_urls_and_a_refusal_shows_no_secret() {
    for mode in ["sentinel", "cluster"] {
        assert!(load(&[("HUBCAST_REDIS_MODE", mode)]).unwrap_err().contains("HUBCAST_REDIS_URL"), "{mode}");
    }
    let cluster = ("HUBCAST_REDIS_MODE", "cluster");
    let database = load(&[cluster, ("HUBCAST_REDIS_URL", "redis://u:canary@a,redis://u:canary@b/1")]).unwrap_err();
    assert!(database.contains("/db") && !database.contains("canary"), "{database}");
    assert!(load(&[cluster, ("HUBCAST_REDIS_URL", "redis://a/,rediss://b:7000")]).is_ok());
    // A comma in a password has to be written as %2C.
    let split = load(&[("HUBCAST_REDIS_URL", "redis://u:canary,canary@localhost")]).unwrap_err();
    assert!(!split.contains("canary"), "{split}");
}

/// What `--print-config` prints is a configuration, and secrets are not in it.
#[test]
fn the_printed_configuration_can_be_read_back_and_holds_no_secret() {
    let rules = r#"[{"match":"a:*","client_publish":true}]"#;
    let config = load(&[
        ("HUBCAST_API_KEYS", "canary-one,canary-two"),
        ("HUBCAST_REDIS_URL", "redis://user:canary@localhost:6379/1"),
        ("HUBCAST_ORIGINS", "https://App.example.org:443, http://*.example.org:8000,*"),
        ("HUBCAST_TRUSTED_PROXIES", "10.1.2.3/8, 192.0.2.1, 2001:db8::/32"),
        ("HUBCAST_PROXY_PROTOCOL", "on"),
        ("HUBCAST_TLS_CERT", "/etc/tls.crt"),
        ("HUBCAST_TLS_KEY", "/etc/tls.key"),
        ("HUBCAST_PING_INTERVAL", "1m 30s"),
        ("HUBCAST_OUTBOX_BYTES", "3MiB"),
        ("HUBCAST_CHANNEL_RULES", rules),
    ]);
    let printed = config.unwrap().print(1234);
    assert!(!printed.contains("canary"), "{printed}");
    let lines: Vec<_> = printed.lines().filter_map(|line| line.split_once('=')).collect();
    let names: Vec<_> = lines.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, VARIABLES.iter().map(|variable| variable.name).collect::<Vec<_>>());
    for line in [
        "HUBCAST_ORIGINS=https://app.example.org,http://*.example.org:8000,*",
        "HUBCAST_TRUSTED_PROXIES=10.0.0.0/8,192.0.2.1/32,2001:db8::/32",
        "HUBCAST_TLS_KEY=/etc/tls.key",
        "HUBCAST_PING_INTERVAL=1m30s",
        "HUBCAST_OUTBOX_BYTES=3MiB",
        "HUBCAST_CONNECTIONS_MAX=1234",
        "HUBCAST_INSECURE_INTERNAL=false",
    ] {
        assert!(printed.lines().any(|printed| printed == line), "{line} in\n{printed}");
    }
    assert!(printed.contains(&format!("HUBCAST_CHANNEL_RULES={rules}")), "{printed}");
    let again = load(&lines).unwrap();
    assert_eq!(again.print(1234), printed);
}

/// The README's table is the code's: names, defaults and reasons.
#[test]
fn the_readme_tells_every_variable() {
    let readme = include_str!("../../README.md");
    for variable in VARIABLES {
        let default = if variable.default.is_empty() { String::new() } else { format!("`{}`", variable.default) };
        let row = format!("| `{}` | {default} | {} |", variable.name, variable.help.replace('|', "\\|"));
        assert!(readme.contains(&row), "README.md lacks the row\n{row}");
    }
    let rows = readme.lines().filter(|line| line.starts_with("| `HUBCAST_")).count();
    assert_eq!(rows, VARIABLES.len(), "README.md has rows that the code does not know");
}

#[test]
fn the_command_line_helps_and_refuses() {
    let run = |arguments: &[&str], env: &[(&str, &str)]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_hubcast")).args(arguments).envs(env.iter().copied()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, help, _) = run(&["--help"], &[]);
    assert_eq!(code, Some(0));
    assert!(VARIABLES.iter().all(|variable| help.contains(variable.name)), "{help}");
    assert_eq!(run(&["--version"], &[]).1, format!("hubcast {}\n", env!("CARGO_PKG_VERSION")));
    let (code, out, error) = run(&[], &[("HUBCAST_PING_INTERVAL", "soon")]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains("HUBCAST_PING_INTERVAL=soon"), "{error}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let (code, _, error) = run(&[], &[("HUBCAST_LISTEN", &taken), ("HUBCAST_LOG", "off")]);
    assert_eq!(code, Some(1));
    assert!(error.contains(&format!("HUBCAST_LISTEN={taken}: cannot listen there")), "{error}");
}

/// `hubcast token` mints what the gateway takes, and says why it does not allow something.
#[test]
fn tokens_are_minted_and_explained() {
    let run = |arguments: &[&str], env: &[(&str, &str)]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_hubcast")).args(arguments).envs(env.iter().copied()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    let rules = r#"[{"match":"user:{sub}:*"},{"match":"chat:*","client_publish":true}]"#;
    let env = [
        ("HUBCAST_AUTH", "jwt"),
        ("HUBCAST_JWT_SECRET", crate::issuer::SECRET),
        ("HUBCAST_JWT_AUDIENCE", "hubcast"),
        ("HUBCAST_CHANNEL_RULES", rules),
    ];
    let (is_minted, token) =
        run(&["token", "--user", "alice", "--subscribe", "chat:*", "--subscribe", "news", "--publish", "chat:1"], &env);
    assert!(is_minted, "{token}");
    let (_, told) = run(&["token", "explain", token.trim(), "chat:2", "user:alice:x", "user:bob:x", "a b"], &env);
    for line in [
        r#""sub":"alice""#,
        "taken: alice, for 3600 s more",
        "chat:2: rule 2, chat:*\n  subscribe  allowed: the token grants it\n  publish    refused: neither the channel's rule",
        "user:alice:x: rule 1, user:{sub}:*\n  subscribe  allowed: the channel is the user's own\n  publish    refused: no rule with",
        "user:bob:x: rule 1, user:{sub}:*\n  subscribe  refused: neither",
        "\"a b\": a channel name consists of",
    ] {
        assert!(told.contains(line), "{line}\n{told}");
    }
    for (token, told) in [
        (format!("{}x", token.trim()), "refused: its signature is wrong"),
        (token.replacen('.', "..", 1), "refused: "),
        ("\u{1b}[2J".to_owned(), "refused: "),
    ] {
        let (_, text) = run(&["token", "explain", token.trim()], &env);
        assert!(text.contains(told) && !text.contains('\u{1b}'), "{text}");
    }
    for (arguments, env, told) in [
        (&["token", "--expires-in", "2days"][..], &env[..], "hubcast: token: the gateway would refuse it: exp"),
        (&["token", "--subscribe", "a*b"], &env, "the gateway would refuse it"),
        (&["token"], &[], "hubcast: token: only with HUBCAST_AUTH=jwt"),
        (&["token", "explain", "x"], &[("HUBCAST_AUTH", "jwt")], "hubcast: HUBCAST_AUTH=jwt: allowed only with"),
    ] {
        let (is_done, text) = run(arguments, env);
        assert!(!is_done && text.starts_with(told) || text.contains(told), "{arguments:?}: {text}");
    }
}
