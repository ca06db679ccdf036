//! Which web pages may connect: the table of origins, and a page of somebody else that is turned away.

use hubcast::origin::Origins;
use hyper::header::{COOKIE, HOST, HeaderMap, HeaderValue, ORIGIN};

use crate::harness::{Client, HANDSHAKE, Raw, gateway, metric, publish};

const LISTED: &str = "https://good.com, https://*.apps.example.org, http://dev.example.org:3000, capacitor://localhost";

fn is_allowed(list: &str, origin: &[&str], host: &str, has_cookies: bool) -> bool {
    let mut headers = HeaderMap::new();
    headers.insert(HOST, host.parse().unwrap());
    for origin in origin {
        headers.append(ORIGIN, HeaderValue::from_bytes(origin.as_bytes()).unwrap());
    }
    if has_cookies {
        headers.insert(COOKIE, "session=1".parse().unwrap());
    }
    Origins::parse(list).unwrap().allow(&headers)
}

/// With a list, only what it names gets in, from whatever host and whether with cookies or not.
#[test]
fn a_list_lets_in_what_it_names_and_nothing_that_looks_like_it() {
    let cases = [
        ("https://good.com", true),
        ("https://good.com:443", true),
        ("HTTPS://GOOD.COM", true),
        ("https://a.apps.example.org", true),
        ("https://a.b.apps.example.org", true),
        ("http://dev.example.org:3000", true),
        ("capacitor://localhost", true),
        ("null", false),
        ("", false),
        ("*", false),
        ("http://good.com", false),
        ("https://good.com:8443", false),
        ("https://good.com.evil", false),
        ("https://evilgood.com", false),
        ("https://www.good.com", false),
        ("https://good.com.", false),
        ("https://good.com/", false),
        ("https://good.com@evil.com", false),
        ("https://evil.com#https://good.com", false),
        ("https://evil.com\\good.com", false),
        ("https://good.com https://evil.com", false),
        ("https://good.com:+443", false),
        ("https://good.com:99999", false),
        ("good.com", false),
        ("https://apps.example.org", false),
        ("https://.apps.example.org", false),
        ("https://evilapps.example.org", false),
        ("https://a.apps.example.org.evil.com", false),
        ("https://a.apps.example.org:8443", false),
        ("http://a.apps.example.org", false),
        ("https://*.apps.example.org", false),
        ("http://dev.example.org", false),
        ("http://localhost", false),
        ("https://gööd.com", false),
    ];
    for (origin, expected) in cases {
        for has_cookies in [false, true] {
            assert_eq!(is_allowed(LISTED, &[origin], "gateway.example", has_cookies), expected, "{origin:?}");
        }
    }
    assert!(!is_allowed(LISTED, &["https://gateway.example"], "gateway.example", false), "its own host is not listed");
    assert!(!is_allowed(LISTED, &["https://good.com", "https://good.com"], "gateway.example", false), "two headers");
    assert!(is_allowed(LISTED, &[], "gateway.example", false), "no browser");
    assert!(!is_allowed(LISTED, &[], "gateway.example", true), "no browser, but cookies");
    for (origin, has_cookies) in [(&["https://evil.com"][..], true), (&["null"], true), (&[], true)] {
        assert!(is_allowed("https://good.com,*", origin, "gateway.example", has_cookies), "{origin:?}");
    }
}

/// Without a list, cookies of the visitor work only for pages of the host that they are for.
#[test]
fn without_a_list_cookies_decide() {
    let cases = [
        (&["https://app.example.org"][..], "app.example.org", true),
        (&["https://app.example.org"], "app.example.org:443", true),
        (&["http://app.example.org:8080"], "APP.example.org:8080", true),
        (&["http://[2001:db8::1]:8080"], "[2001:db8::1]:8080", true),
        // Several servers of a developer.
        (&["http://localhost:3000"], "127.0.0.1:8080", true),
        (&["http://app.localhost:3000"], "[::1]:8080", true),
        (&["https://evil.com"], "app.example.org", false),
        (&["https://evil.com"], "127.0.0.1:8080", false),
        (&["https://app.example.org:8443"], "app.example.org", false),
        (&["http://app.example.org"], "app.example.org:443", false),
        (&["http://localhost:3000"], "app.example.org", false),
        (&["http://127.0.0.1.evil.com"], "127.0.0.1:8080", false),
        (&["http://evillocalhost"], "127.0.0.1:8080", false),
        (&["https://example.org"], "app.example.org", false),
        (&["null"], "127.0.0.1:8080", false),
        (&["https://app.example.org", "https://app.example.org"], "app.example.org", false),
        (&[], "app.example.org", false),
    ];
    for (origin, host, expected) in cases {
        assert_eq!(is_allowed("", origin, host, true), expected, "{origin:?} to {host}");
        assert!(is_allowed("", origin, host, false), "{origin:?} to {host}, without cookies");
    }
}

#[test]
fn a_list_that_is_none_is_refused() {
    for list in [
        "example.org",
        "https://",
        "https://*",
        "*.example.org",
        "https://a b",
        "https://a/",
        "null",
        "https://*.*.org",
        "ht!tp://a",
        "https://a:port",
    ] {
        assert_eq!(Origins::parse(list), None, "{list}");
    }
}

/// The page is refused before the upgrade, is told why, and moves nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_somebody_else_is_turned_away() {
    let gateway = gateway(&[("HUBCAST_ORIGINS", "https://app.example.org")]);
    let mut neighbour = Client::subscribed(&gateway, "news").await;
    let from = |origin: &str| format!("GET /ws HTTP/1.1\r\nOrigin: {origin}\r\nCookie: session=1\r\n{HANDSHAKE}");
    let mut foreign = Raw::connect(&gateway).await;
    foreign.send(from("https://app.example.org.evil.com").as_bytes()).await;
    let head = foreign.head().await;
    assert!(head.starts_with("HTTP/1.1 403") && head.contains("connection: close"), "{head}");
    let mut listed = Raw::connect(&gateway).await;
    listed.send(from("https://app.example.org").as_bytes()).await;
    assert!(listed.head().await.starts_with("HTTP/1.1 101"));
    assert_eq!(metric(&gateway, r#"hubcast_connections_refused_total{reason="origin"}"#).await, 1.0);
    publish(&gateway, "news", b"1").await;
    assert_eq!(neighbour.json().await["data"], 1);
    assert_eq!(metric(&gateway, "hubcast_connections_opened_total").await, 2.0);
    crate::observe::threat(12, "an origin that is not listed: 403 before the upgrade, counted; a neighbour receives");
}

/// What the README says to paste into any page's console works as the gateway starts, without configuration.
#[tokio::test(flavor = "multi_thread")]
async fn any_page_without_cookies_connects_to_a_gateway_without_a_list() {
    let gateway = gateway(&[]);
    for (origin, cookies, status) in [
        ("https://www.example.com", "", "101"),
        ("http://localhost:3000", "Cookie: theme=dark\r\n", "101"),
        ("https://www.example.com", "Cookie: session=1\r\n", "403"),
    ] {
        let mut page = Raw::connect(&gateway).await;
        let handshake = HANDSHAKE.replace("Host: test", &format!("Host: {}", gateway.addr()));
        page.send(format!("GET /ws HTTP/1.1\r\nOrigin: {origin}\r\n{cookies}{handshake}").as_bytes()).await;
        let head = page.head().await;
        assert_eq!(head.split(' ').nth(1), Some(status), "{origin} {cookies}\n{head}");
    }
    crate::observe::threat(
        13,
        "no list: without cookies 101, a foreign page with cookies 403; every client of these tests sends no Origin: 101",
    );
}
