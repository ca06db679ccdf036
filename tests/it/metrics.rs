//! Stories over `/metrics`: what threads count at once adds up.

use crate::harness::{Client, await_metric, gateway, http, publish};

/// All series of one histogram as they are scraped: the buckets with their bounds, the sum and the count.
#[derive(Debug, PartialEq)]
struct Scraped {
    buckets: Vec<(f64, u64)>,
    sum: f64,
    count: u64,
}

async fn scrape(gateway: &hubcast::gateway::Gateway, name: &str) -> Scraped {
    let text = http(gateway, "GET /metrics", "", b"").await.body;
    assert!(text.contains(&format!("# TYPE {name} histogram\n")), "{text}");
    let series = |suffix: &str| {
        let start = format!("{name}_{suffix}");
        text.lines().filter_map(move |line| line.strip_prefix(&start)?.split_once(' ').map(|(a, b)| (a, b.to_owned())))
    };
    let bound = |labels: &str| labels.strip_prefix("{le=\"")?.strip_suffix("\"}")?.parse().ok();
    Scraped {
        buckets: series("bucket").map(|(labels, number)| (bound(labels).unwrap(), number.parse().unwrap())).collect(),
        sum: series("sum").next().unwrap().1.parse().unwrap(),
        count: series("count").next().unwrap().1.parse().unwrap(),
    }
}

/// Eight threads observe known durations at once; Prometheus sees each of them, in the bucket whose `le` it
/// does not exceed, and their exact sum.
#[tokio::test]
async fn a_histogram_loses_nothing_among_threads() {
    const ROUNDS: u64 = 1_000;
    let durations_us = [0, 1, 2, 3, 4, 5, 1_000, 1 << 20, (1 << 23) - 1, 1 << 23, (1 << 23) + 1, 60_000_000];
    let gateway = gateway(&[]);
    let histogram = &gateway.broker().shared.metrics.fanout;
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..ROUNDS).for_each(|_| durations_us.iter().for_each(|us| histogram.observe_us(*us))));
        }
    });
    let scraped = scrape(&gateway, "hubcast_fanout_duration_seconds").await;
    let times = 8 * ROUNDS;
    assert_eq!(scraped.count, times * durations_us.len() as u64);
    assert_eq!(scraped.sum, (times * durations_us.iter().sum::<u64>()) as f64 / 1e6);
    let bounds: Vec<f64> = (0..24).map(|power| f64::from(1 << power) / 1e6).chain([f64::INFINITY]).collect();
    assert_eq!(scraped.buckets.iter().map(|(bound, _)| *bound).collect::<Vec<_>>(), bounds);
    for (bound, number) in scraped.buckets {
        let within = durations_us.iter().filter(|us| **us as f64 / 1e6 <= bound).count() as u64;
        assert_eq!(number, times * within, "at most {bound} s");
    }
}

/// Real publications and flushes are each counted once, with a sum that their buckets allow.
#[tokio::test]
async fn every_publication_and_flush_is_one_observation() {
    const PUBLICATIONS: u64 = 20;
    let gateway = gateway(&[]);
    let mut client = Client::subscribed(&gateway, "c").await;
    for _ in 0..PUBLICATIONS {
        publish(&gateway, "c", b"1").await;
        client.json().await;
    }
    // The welcome and the reply were flushed too; each publication was read before the next one came.
    await_metric(&gateway, "hubcast_publish_to_socket_seconds_count", (PUBLICATIONS + 2) as f64).await;
    let fanout = scrape(&gateway, "hubcast_fanout_duration_seconds").await;
    assert_eq!(fanout.count, PUBLICATIONS);
    for scraped in [fanout, scrape(&gateway, "hubcast_publish_to_socket_seconds").await] {
        let (mut least, mut most, mut before) = (0.0, 0.0, (0.0, 0));
        for (bound, number) in &scraped.buckets {
            assert!(*number >= before.1, "buckets are cumulative: {scraped:?}");
            let inside = (number - before.1) as f64;
            if inside > 0.0 {
                least += inside * before.0;
                most += inside * bound;
            }
            before = (*bound, *number);
        }
        assert_eq!(before, (f64::INFINITY, scraped.count), "{scraped:?}");
        let is_allowed = (least - 1e-9..=most + 1e-9).contains(&scraped.sum);
        assert!(is_allowed, "{least} to {most}: {scraped:?}");
    }
}
