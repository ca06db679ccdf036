//! The script that publishes to a channel with history has quick ways and a slow one: what they do is the same.

use std::time::{Duration, Instant};

use hubcast::cursor::Cursor;
use hubcast::history_redis::{Place, publish_script};
use hubcast::history_store::Retention;
use hubcast::topology::Topology;

use crate::harness::Redis;

/// Over several renewals of the keys: each id follows from the one before and the random bits, whatever they look like; each
/// entry names its predecessor; the keys live for as long as the newest entry, and little more than the rule's size is kept.
#[tokio::test]
async fn whichever_way_a_publish_goes_it_does_the_same() {
    const SIZE: usize = 100;
    let redis = Redis::start().await;
    let mut link = redis::Client::open(redis.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    redis.command(&["SCRIPT", "LOAD", &publish_script()]).await;
    for (ttl_ms, payload_bytes) in [(150, 20), (999, 20), (1000, 600), (600_000, 20)] {
        let place = Place::new("t:", &format!("c{ttl_ms}"), &Topology::servers_of(1, "hub:"));
        let retention = Retention::new(SIZE, Duration::from_millis(ttl_ms));
        let (started, mut last, mut same, mut later) = (Instant::now(), None::<Cursor>, 0, 0);
        while started.elapsed() < Duration::from_millis(1200) {
            let mut pipeline = redis::pipe();
            let randoms: Vec<u64> = (0..30).map(|_| rand::random::<u64>() >> rand::random_range(16..64)).collect();
            for random in &randoms {
                pipeline.invoke_script(&place.publish(&vec![b'x'; payload_bytes], &retention, *random, None));
            }
            pipeline.cmd("PTTL").arg(&place.stream).cmd("PTTL").arg(&place.top);
            pipeline.cmd("XLEN").arg(&place.stream).cmd("GET").arg(&place.top);
            pipeline.cmd("XRANGE").arg(&place.stream).arg(&["-", "+"]);
            let answer: Vec<redis::Value> = pipeline.query_async(&mut link).await.unwrap();
            let (ids, rest) = answer.split_at(randoms.len());
            for (id, random) in ids.iter().zip(&randoms) {
                let id: String = redis::from_redis_value_ref(id).unwrap();
                let id = Cursor::parse(&id).unwrap_or_else(|| panic!("{id} is written like a cursor"));
                match last {
                    Some(last) if last.ms == id.ms => {
                        assert_eq!(id.sequence, last.sequence + 1 + (random >> 16), "{id} after {last}");
                        same += 1;
                    }
                    Some(last) => {
                        assert!(id.ms > last.ms && id.sequence == *random, "{id} after {last}");
                        later += 1;
                    }
                    None => {}
                }
                last = Some(id);
            }
            let number = |at: usize| redis::from_redis_value_ref::<i64>(&rest[at]).unwrap();
            let (ttl, slack) = (ttl_ms as i64, 100);
            assert!((ttl - slack..=2 * ttl).contains(&number(0)), "the stream of {ttl} ms lives for {}", number(0));
            let position_ttl = retention.position_ttl.as_millis() as i64;
            assert!((position_ttl - slack..=position_ttl + ttl).contains(&number(1)), "the position: {}", number(1));
            // Whole nodes of up to 100 small entries go, and that at every eighth publish or so.
            assert!(number(2) <= SIZE as i64 + 100 + 200, "{} entries", number(2));
            let top: String = redis::from_redis_value_ref(&rest[3]).unwrap();
            assert_eq!(Cursor::parse(&top), last);
            let entries: Vec<(String, Vec<String>)> = redis::from_redis_value_ref(&rest[4]).unwrap();
            assert!(entries.windows(2).all(|pair| pair[1].1[1] == pair[0].0), "{entries:?}");
            assert_eq!(entries.last().map(|entry| &entry.0), Some(&top));
        }
        assert!(same > 100 && later > 20, "{same} in the same millisecond, {later} in a later one");
    }
}

/// Some is refused, some is not needed yet; nothing is done by half.
#[tokio::test]
async fn bad_arguments_for_a_channel_that_there_is_change_nothing() {
    let redis = Redis::start().await;
    let script = publish_script();
    let publish = async |arguments: &str| {
        let mut words = vec!["EVAL", &script, "2", "s", "t"];
        words.extend(arguments.split(' '));
        redis.query::<String>(&words).await
    };
    publish("10 600000 86400000 5 PUBLISH c x").await.expect("a cursor");
    let big = "x".repeat(2100);
    for arguments in [
        format!("x 600000 86400000 5 PUBLISH c {big}"),
        format!("-5 600000 86400000 5 PUBLISH c {big}"),
        "10 600000 86400000 5 GET c x".to_owned(),
        "10 600000 86400000 5.5 PUBLISH c x".to_owned(),
        "10 600000 86400000 -5 PUBLISH c x".to_owned(),
        "10 600000 86400000 281474976710656 PUBLISH c x".to_owned(),
        "10 600000 86400000 nan PUBLISH c x".to_owned(),
        "10 600000 86400000".to_owned(),
    ] {
        for _ in 0..5 {
            let state = async || {
                let stream = redis.query::<Vec<redis::Value>>(&["XRANGE", "s", "-", "+"]).await.unwrap();
                (stream, redis.query::<String>(&["GET", "t"]).await.unwrap())
            };
            let before = state().await;
            publish(&arguments).await.expect_err(&arguments);
            assert_eq!(state().await, before, "{arguments}");
        }
    }
    // A stream that somebody deleted comes back with an end.
    redis.command(&["DEL", "s"]).await;
    publish("10 600000 86400000 5 PUBLISH c x").await.expect("a cursor");
    assert!(redis.query::<i64>(&["PTTL", "s"]).await.unwrap() > 600_000);
}
