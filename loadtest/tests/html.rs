//! The page that `--html` writes. With `HTML_SAMPLE=path` the full report is written there, to look at.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests document themselves and may panic")]

#[path = "../src/axis.rs"]
mod axis;
#[path = "../src/chart.rs"]
mod chart;
#[path = "../src/html.rs"]
mod html;
#[path = "../src/number.rs"]
mod number;
#[path = "../src/panels.rs"]
mod panels;
#[path = "../src/report.rs"]
mod report;

use std::time::{Duration, SystemTime};

use report::{Curve, Figure, Report, Second, Step, Violation};

fn page(report: &Report) -> String {
    html::page(report, SystemTime::UNIX_EPOCH + Duration::from_secs(1_750_000_000))
}

/// A latency distribution with a tail: it grows by `growth` with every nine.
fn curve(name: &str, median_ms: f64, growth: f64) -> Curve {
    let count = 36_000_000_u64;
    let mut points = vec![(0.0, median_ms / 2.0)];
    points.extend((1..60).map(|step| {
        let nines = f64::from(step) / 8.0;
        (1.0 - 10f64.powf(-nines), median_ms / 2.0 * growth.powf(nines * (0.6 + 0.07 * nines)))
    }));
    points.push((1.0, points[59].1 * 1.1));
    Curve { name: name.to_owned(), count, points }
}

fn second(at: u32) -> Second {
    let wave = (f64::from(at) * 1.7).sin();
    let pause = if at == 17 { 0.55 } else { 1.0 };
    Second {
        at_s: f64::from(at),
        publications: (1_200.0 * pause) as u64,
        deliveries: ((1_200_000.0 + 14_000.0 * wave) * pause) as u64,
        p50_ms: 1.9 + 0.1 * wave,
        p99_ms: if at == 17 { 46.0 } else { 6.2 + wave },
        server_cpu_percent: Some(91.0 + 3.0 * wave),
        own_cpu_percent: 64.0 - 2.0 * wave,
    }
}

fn step(offered: f64, delivered: f64, p99_ms: f64, held: bool) -> Step {
    Step {
        offered,
        deliveries_per_second: delivered,
        p50_ms: p99_ms / 3.0,
        p99_ms,
        lost: if held { 0 } else { 1_204 },
        server_cpu_percent: Some((delivered / 13_000.0).min(100.0)),
        own_cpu_percent: delivered / 20_000.0,
        held,
    }
}

fn full() -> Report {
    let figure = |name: &str, value, unit| Figure { name: name.to_owned(), value, unit };
    let setting = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    Report {
        command: "fanout",
        title: "How fast do 1,000 subscribers & one publisher go when p99 < 50 ms?".to_owned(),
        settings: vec![
            setting("addr", "127.0.0.1:8080"),
            setting("subscribers", "1000"),
            setting("payload", "{\"kind\": \"<quote>\"}"),
            setting("rate", "1200"),
            setting("seconds", "30"),
        ],
        figures: vec![
            figure("deliveries", 1_198_734.2, "/s"),
            figure("publications", 1_198.7, "/s"),
            figure("lost", 0.0, ""),
            figure("server CPU", 0.761_3, "µs a delivery"),
            figure("server memory", 4.22, "KiB a connection"),
            figure("connected in", 214.0, "ms"),
        ],
        latency: vec![
            curve("open loop, from the due time", 1.9, 2.6),
            curve("kernel <floor> & \"bare\" send", 1.1, 2.1),
        ],
        timeline: (1..=30).map(second).collect(),
        capacity: vec![
            step(100.0, 100_000.0, 1.2, true),
            step(200.0, 200_000.0, 1.3, true),
            step(400.0, 400_000.0, 1.9, true),
            step(800.0, 800_000.0, 3.4, true),
            step(1600.0, 1_262_000.0, 910.0, false),
            step(1250.0, 1_248_000.0, 11.8, true),
            step(1400.0, 1_271_000.0, 312.0, false),
            step(1300.0, 1_266_000.0, 88.0, false),
            step(1200.0, 1_199_000.0, 7.4, true),
        ],
        violations: vec![Violation {
            kind: "lost",
            channel: Some("verify:0".to_owned()),
            client: Some(7),
            message: Some("1#42".to_owned()),
            text: "never told missing in 1#41 <here> 1#43".to_owned(),
        }],
        notes: vec![
            "The generator used 96 % of its core in 3 of 30 seconds: the server may be faster than this.".to_owned(),
            "Server and generator share 2 cores <no pinning> & one host.".to_owned(),
        ],
    }
}

#[test]
fn a_full_report_has_every_section() {
    let page = page(&full());
    #[expect(clippy::print_stdout, reason = "says where the sample is")]
    if let Some(path) = std::env::var_os("HTML_SAMPLE") {
        std::fs::write(&path, &page).unwrap();
        println!("written to {}", path.display());
    }
    for title in
        ["Before you believe the figures", "Violations", "Capacity", "Latency", "Over time", "All figures", "Settings"]
    {
        assert!(page.contains(&format!("<h2>{title}</h2>")), "{title}");
    }
    assert!(
        page.contains("lost, channel verify:0, client 7, message 1#42: never told missing in 1#41 &lt;here&gt; 1#43")
    );
    assert!(page.contains("2025-06-15 15:06:40 UTC"));
    assert!(page.contains(concat!("hubcast-loadtest ", env!("CARGO_PKG_VERSION"))));
    // Five charts, each for a wide and for a narrow page.
    assert_eq!(page.matches("<svg class=\"wide\"").count(), 5);
    assert_eq!(page.matches("<svg class=\"narrow\"").count(), 5);
    // The knee is the highest rate that held, not the last one tried or the fastest.
    assert!(page.contains("knee: 1.25M/s at p99 11.8\u{a0}ms"));
    assert_eq!(page.matches("✕</span> broken").count(), 3);
    assert!(page.contains("99.9999\u{a0}%"));
    assert!(page.contains("<td>36,000,000</td>"));
}

#[test]
fn nothing_is_fetched_and_no_number_is_missing() {
    let page = page(&full());
    for outside in ["http://", "https://", "src=", "href=", "<script", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert_drawable(&page);
}

#[test]
fn text_is_escaped_wherever_it_comes_from() {
    let hostile = "</title></style><b>&\"x\" onload=\"y";
    let mut report = full();
    report.title = hostile.to_owned();
    report.notes = vec![hostile.to_owned()];
    report.settings = vec![(hostile.to_owned(), hostile.to_owned())];
    for figure in &mut report.figures {
        figure.name = hostile.to_owned();
    }
    for curve in &mut report.latency {
        curve.name = hostile.to_owned();
    }
    let page = page(&report);
    assert!(!page.contains("<b>"));
    assert!(!page.contains("\"x\""));
    assert_eq!(page.matches("</style>").count(), 1);
    assert!(page.contains("&lt;/title&gt;&lt;/style&gt;&lt;b&gt;&amp;&quot;x&quot;"));
}

#[test]
fn an_empty_report_is_a_page_without_sections() {
    let page = page(&Report::default());
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    for absent in ["<section", "<h2", "<svg", "<table", "<dl"] {
        assert!(!page.contains(absent), "{absent}");
    }
    assert_drawable(&page);
}

/// What a run has that failed at once: two seconds, one point, little delivered, no CPU of the server.
#[test]
fn a_poor_report_is_drawn_all_the_same() {
    let mut broken = step(100.0, 0.0, f64::NAN, false);
    broken.server_cpu_percent = None;
    let idle = |at| Second { deliveries: 0, p50_ms: 0.0, p99_ms: f64::NAN, server_cpu_percent: None, ..second(at) };
    let report = Report {
        figures: vec![Figure { name: "ratio".to_owned(), value: f64::NAN, unit: "" }],
        latency: vec![
            Curve { name: "one".to_owned(), count: 1, points: vec![(1.0, 0.0)] },
            Curve { name: "none".to_owned(), count: 0, points: Vec::new() },
        ],
        // What cannot be placed stands beside what can.
        timeline: vec![idle(0), Second { server_cpu_percent: None, ..second(1) }],
        capacity: vec![broken, step(200.0, 10.0, 5.0, false)],
        ..Report::default()
    };
    let page = page(&report);
    assert_drawable(&page);
    assert!(!page.contains("knee"));
    assert!(page.contains("generator CPU"));
    assert!(!page.contains("server CPU"), "nobody measured it");
    let single = self::page(&Report { timeline: vec![idle(0)], ..Report::default() });
    assert!(!single.contains("Over time"), "one second is no course");
}

#[test]
fn a_limit_that_was_not_reached_is_no_knee() {
    let report =
        Report { capacity: vec![step(100.0, 1e5, 1.0, true), step(200.0, 2e5, 1.1, true)], ..Report::default() };
    let page = page(&report);
    assert!(page.contains("highest rate tried, held: 200k/s"));
    assert!(!page.contains("knee"));
}

#[test]
fn numbers_are_short_on_axes_and_whole_in_tables() {
    let cases = [
        (0.0, "0", "0"),
        (0.041_23, "0.0412", "0.0412"),
        (5.0, "5", "5"),
        (41.26, "41.3", "41.3"),
        (999.7, "1k", "1,000"),
        (1_240_017.0, "1.24M", "1,240,017"),
        (36e9, "36G", "36,000,000,000"),
        (f64::NAN, "–", "–"),
    ];
    for (value, short, full) in cases {
        assert_eq!(number::short(value), short);
        assert_eq!(number::full(value), full);
    }
}

#[test]
fn an_axis_is_logarithmic_only_where_it_has_to_be() {
    let labels = |values: &[f64]| -> Vec<String> {
        let axis = axis::Axis::fit("", values, 7, number::full).unwrap();
        axis.ticks.into_iter().map(|tick| tick.label).collect()
    };
    assert_eq!(labels(&[1.0, 49.0]), ["0", "10", "20", "30", "40", "50"]);
    assert_eq!(labels(&[1.0, 51.0]), ["1", "2", "5", "10", "20", "50", "100"]);
    assert_eq!(labels(&[0.02, 40_000.0]), ["0.1", "1", "10", "100", "1,000", "10,000"]);
    assert_eq!(labels(&[0.0, 0.0]), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
    assert!(axis::Axis::fit("", &[f64::NAN], 7, number::full).is_none());
}

fn assert_drawable(page: &str) {
    for broken in ["NaN", "inf"] {
        assert!(!page.contains(broken), "{broken}");
    }
}
