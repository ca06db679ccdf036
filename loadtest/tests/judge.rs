//! The judge of `verify`: scripted runs with a planted fault each, and their good twins.
//!
//! A log is written as words: `sub` (`sub:new`, `sub:resumed` with history), `gap`, `end`, `foreign`, or
//! `publisher#sequence`. A publisher's messages are published one after the other, those of all publishers in turn.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests document themselves and may panic")]

#[path = "../src/verify/evidence.rs"]
mod evidence;
#[path = "../src/verify/judge.rs"]
mod judge;
#[path = "../src/verify/order.rs"]
mod order;
#[path = "../src/verify/place.rs"]
mod place;
#[path = "../src/report.rs"]
#[allow(dead_code, reason = "only violations are looked at here")]
mod report;

use evidence::{Log, Mark, MessageId, Outcome, Publication, What};
use judge::{Channel, Verdict, judge};

/// Between the starts of two messages of a publisher; a publish is answered at half of it.
const STEP_US: u64 = 1_000;

struct Run {
    publications: Vec<Vec<Publication>>,
    logs: Vec<Log>,
}

impl Run {
    /// All acknowledged; message `n` is begun at `STEP_US * (n + 1)`.
    fn new(publishers: usize, messages: u64) -> Self {
        let publication = |at: u64| Publication {
            started_us: STEP_US * (at + 1),
            ended_us: STEP_US * (at + 1) + STEP_US / 2,
            outcome: Outcome::Acked,
            cursor: Mark::NONE,
        };
        Self { publications: vec![(0..messages).map(publication).collect(); publishers], logs: Vec::new() }
    }

    fn with(mut self, id: &str, outcome: Outcome) -> Self {
        let id = message(id).unwrap();
        self.publications[usize::from(id.publisher)][id.sequence as usize].outcome = outcome;
        self
    }

    /// Each cursor is the message's name.
    fn with_history(mut self) -> Self {
        for (publisher, published) in self.publications.iter_mut().enumerate() {
            for (sequence, publication) in published.iter_mut().enumerate() {
                publication.cursor = Mark::of(Some(&format!("{publisher}#{sequence}")));
            }
        }
        self
    }

    /// What is told is told when the message before it had been answered.
    fn client(mut self, words: &str) -> Self {
        let mut log = Log::default();
        let mut now_us = 0;
        let mut cursor = Mark::NONE;
        for word in words.split_whitespace() {
            if let Some(id) = message(word) {
                let publication = self
                    .publications
                    .get(usize::from(id.publisher))
                    .and_then(|published| published.get(id.sequence as usize).copied());
                let mark = publication.map_or(Mark::NONE, |publication| publication.cursor);
                now_us = publication.map_or(now_us, |publication| now_us.max(publication.ended_us + 1));
                cursor = mark;
                log.event(id, mark);
                continue;
            }
            let (word, at) = word.split_once('@').map_or((word, None), |(word, at)| (word, at.parse().ok()));
            let new = Mark::of(Some("new"));
            let what = match word {
                "sub" => What::Subscribed { after: Mark::NONE, cursor: Mark::NONE, recovered: None },
                "sub:new" => {
                    let after = std::mem::replace(&mut cursor, new);
                    What::Subscribed { after, cursor, recovered: Some(false) }
                }
                "sub:resumed" => What::Subscribed { after: cursor, cursor, recovered: Some(true) },
                "sub:elsewhere" => What::Subscribed { after: cursor, cursor: new, recovered: Some(true) },
                "gap" => What::Gap { after: cursor, next: Mark::NONE, reason: "slow".into() },
                "gap:upstream" => What::Gap { after: cursor, next: Mark::NONE, reason: "upstream".into() },
                "gap:elsewhere" => What::Gap { after: new, next: Mark::NONE, reason: "slow".into() },
                "gap:announced" => What::Gap { after: cursor, next: new, reason: "slow".into() },
                "end" => What::Ended("1006".into()),
                _ => What::Foreign(word.into()),
            };
            now_us = at.unwrap_or(now_us + 1);
            log.tell(now_us, what);
        }
        self.logs.push(log);
        self
    }

    fn verdict(&self) -> Verdict {
        let mut verdict = Verdict::default();
        let channel = Channel {
            name: "verify:0",
            publications: self.publications.iter().map(Vec::as_slice).collect(),
            logs: self.logs.iter().enumerate().collect(),
        };
        judge(&channel, &mut verdict);
        verdict
    }

    #[track_caller]
    fn is_good(&self) -> Verdict {
        let verdict = self.verdict();
        assert!(verdict.counts.is_empty(), "{:?}", verdict.violations);
        verdict
    }

    /// Exactly the given violations, as `kind client message`.
    #[track_caller]
    fn is_bad(&self, expected: &[&str]) -> Verdict {
        let verdict = self.verdict();
        let of = |violation: &crate::report::Violation| {
            let message = violation.message.as_ref().map(|message| format!(" {message}")).unwrap_or_default();
            format!("{} {}{message}", violation.kind, violation.client.unwrap())
        };
        assert_eq!(verdict.violations.iter().map(of).collect::<Vec<_>>(), expected, "{:?}", verdict.violations);
        assert_eq!(verdict.violation_count(), expected.len() as u64);
        verdict
    }
}

fn message(word: &str) -> Option<MessageId> {
    let (publisher, sequence) = word.split_once('#')?;
    Some(MessageId { publisher: publisher.parse().ok()?, sequence: sequence.parse().ok()? })
}

#[test]
fn all_is_well() {
    let run = Run::new(2, 3).client("sub 0#0 1#0 1#1 0#1 0#2 1#2").client("sub 0#0 1#0 1#1 0#1 0#2 1#2");
    let verdict = run.is_good();
    assert_eq!((verdict.acked, verdict.deliveries, verdict.demanded), (6, 12, 12));
}

#[test]
fn a_lost_message_is_found() {
    let run = Run::new(1, 4).client("sub 0#0 0#1 0#2 0#3").client("sub 0#0 0#2 0#3");
    let verdict = run.is_bad(&["lost 1 0#1"]);
    assert!(verdict.violations[0].text.contains("0#0 0#2 0#3"), "{}", verdict.violations[0].text);
}

#[test]
fn the_last_message_may_not_be_lost_either_nor_all_of_them() {
    Run::new(1, 2).client("sub 0#0").is_bad(&["lost 0 0#1"]);
    Run::new(1, 2).client("sub").is_bad(&["lost 0 0#0", "lost 0 0#1"]);
}

#[test]
fn what_nobody_got_is_lost_too() {
    Run::new(1, 3).client("sub 0#0 0#2").client("sub 0#0 0#2").is_bad(&["lost 0 0#1", "lost 1 0#1"]);
}

#[test]
fn a_duplicate_is_found_also_after_a_resume() {
    Run::new(1, 2).client("sub 0#0 0#0 0#1").is_bad(&["repeated 0 0#0"]);
    let run = Run::new(1, 2).with_history();
    run.client("sub:new 0#0 0#1 end sub:resumed 0#1").is_bad(&["repeated 0 0#1"]);
}

#[test]
fn one_publisher_keeps_its_order() {
    Run::new(1, 3).client("sub 0#1 0#0 0#2").is_bad(&["out of order 0 0#0"]);
}

#[test]
fn what_is_unknown_has_no_order_of_its_own_but_a_common_one() {
    let run = || Run::new(1, 3).with("0#0", Outcome::Unknown);
    run().client("sub 0#1 0#0 0#2").client("sub 0#1 0#0 0#2").is_good();
    run().client("sub 0#1 0#0 0#2").client("sub 0#0 0#1 0#2").is_bad(&["no common order 0 0#1"]);
}

#[test]
fn two_clients_see_one_order() {
    let run = Run::new(2, 2).client("sub 0#0 1#0 0#1 1#1").client("sub 1#0 0#0 0#1 1#1");
    let verdict = run.is_bad(&["no common order 0 0#0"]);
    let text = &verdict.violations[0].text;
    assert_eq!(text, "client 0 saw 0#0 before 1#0, client 1 saw 1#0 before 0#0");
}

#[test]
fn three_clients_see_one_order_even_if_every_two_do() {
    let run = Run::new(3, 1).client("sub 0#0 1#0 gap").client("sub 1#0 2#0 gap").client("sub 2#0 0#0 gap");
    let verdict = run.verdict();
    assert_eq!(verdict.counts.get("no common order"), Some(&1), "{:?}", verdict.violations);
    assert_eq!(verdict.violations[0].text.matches("saw").count(), 3);
}

#[test]
fn what_was_refused_or_never_published_does_not_come() {
    let run = Run::new(1, 3).with("0#1", Outcome::Refused);
    run.client("sub 0#0 0#2").client("sub 0#0 0#1 0#2").is_bad(&["refused 1 0#1"]);
    Run::new(1, 1).client("sub 0#0 0#9 7#0").is_bad(&["unpublished 0 0#9", "unpublished 0 7#0"]);
    Run::new(1, 1).client("sub foreign 0#0").is_bad(&["unpublished 0"]);
}

#[test]
fn what_is_unknown_comes_at_most_once() {
    let run = || Run::new(1, 3).with("0#1", Outcome::Unknown);
    run().client("sub 0#0 0#1 0#2").client("sub 0#0 0#2").is_good();
    run().client("sub 0#0 0#1 0#1 0#2").is_bad(&["repeated 0 0#1"]);
}

#[test]
fn a_gap_covers_what_belongs_there() {
    let run = Run::new(1, 4).client("sub 0#0 0#1 0#2 0#3").client("sub 0#0 gap@3600 0#3");
    assert_eq!(run.is_good().told_missing, 2);
    // Also where nobody got the message, and at the end.
    Run::new(1, 3).client("sub 0#0 gap@2600 0#2").is_good();
    Run::new(1, 3).client("sub 0#0 0#1 gap@9000").is_good();
}

#[test]
fn a_gap_elsewhere_covers_nothing() {
    let run = || Run::new(1, 4).client("sub 0#0 0#1 0#2 0#3");
    run().client("sub 0#0 0#2 gap 0#3").is_bad(&["lost 1 0#1"]);
    run().client("sub gap 0#0 0#2 0#3").is_bad(&["lost 1 0#1"]);
    // Told before it was published.
    run().client("sub 0#0 0#1 gap").is_bad(&["lost 1 0#2", "lost 1 0#3"]);
}

#[test]
fn the_place_of_a_loss_is_taken_from_who_got_it() {
    // Published at the same time by two publishers, so that only the other client tells where 1#1 belongs.
    let run = || Run::new(2, 3).client("sub 0#0 1#0 0#1 1#1 0#2 1#2");
    run().client("sub 0#0 1#0 0#1 gap 0#2 1#2").is_good();
    run().client("sub 0#0 1#0 gap 0#1 0#2 1#2").is_bad(&["lost 1 1#1"]);
}

#[test]
fn nothing_is_demanded_from_before_the_first_subscription() {
    Run::new(1, 3).client("sub@2000 0#2").is_good();
    Run::new(1, 3).client("sub@1999 0#2").is_bad(&["lost 0 0#1"]);
}

#[test]
fn without_history_a_new_connection_covers_what_was_published_meanwhile() {
    Run::new(1, 4).client("sub 0#0 end@1900 sub@3100 0#3").is_good();
    // Published after the second subscription.
    Run::new(1, 4).client("sub 0#0 end@1900 sub@2900 0#3").is_bad(&["lost 0 0#2"]);
    // Lost before the connection was.
    Run::new(1, 4).client("sub 0#0 0#2 end@3600 sub@3700 0#3").is_bad(&["lost 0 0#1"]);
}

#[test]
fn a_resume_that_says_so_has_all() {
    let run = || Run::new(1, 4).with_history();
    let verdict = run().client("sub:new 0#0 end@1900 sub:resumed@3100 0#1 0#2 0#3").is_good();
    assert_eq!((verdict.resumed, verdict.not_resumed), (1, 0));
    run().client("sub:new 0#0 end@1900 sub:resumed@3100 0#2 0#3").is_bad(&["lost 0 0#1"]);
    run().client("sub:new 0#0 end@1900 sub:resumed@3100 gap 0#2 0#3").is_good();
}

/// Elsewhere it was known of the loss, and marked behind what this instance had let it resume to.
#[test]
fn whoever_resumed_after_a_loss_may_be_told_a_moment_later() {
    let run = || Run::new(1, 4).with_history();
    let verdict = run().client("sub:new 0#0 end@1900 sub:resumed@3100 0#2 gap:upstream 0#3").is_good();
    assert_eq!((verdict.told_late, verdict.told_missing), (1, 0));
    // Not who was there when it was published, or resumed before, nor for ever, nor by any gap.
    run().client("sub:new 0#0 0#2 gap:upstream 0#3").is_bad(&["lost 0 0#1"]);
    run().client("sub:new 0#0 end@1900 sub:resumed@1950 0#2 gap:upstream 0#3").is_bad(&["lost 0 0#1"]);
    run().client("sub:new 0#0 end@1900 sub:resumed@3100 0#2 0#3 gap:upstream@9000000").is_bad(&["lost 0 0#1"]);
    run().client("sub:new 0#0 end@1900 sub:resumed@3100 0#2 gap 0#3").is_bad(&["lost 0 0#1"]);
}

#[test]
fn a_resume_that_says_no_covers_what_came_in_between() {
    let run = || Run::new(1, 4).with_history();
    let verdict = run().client("sub:new 0#0 end@1900 sub:new@3100 0#3").is_good();
    assert_eq!((verdict.resumed, verdict.not_resumed, verdict.told_missing), (0, 1, 2));
    run().client("sub:new 0#0 end@1900 sub:new@2100 0#3").is_bad(&["lost 0 0#2"]);
}

#[test]
fn cursors_are_where_they_say() {
    let run = || Run::new(1, 2).with_history();
    run().client("sub:new 0#0 end sub:elsewhere 0#1").is_bad(&["wrong resume 0"]);
    run().client("sub:resumed 0#0 0#1").is_bad(&["wrong resume 0"]);
    run().client("sub:new 0#0 gap:elsewhere 0#1").is_bad(&["wrong cursor 0"]);
    run().client("sub:new 0#0 gap:announced 0#1").is_bad(&["wrong cursor 0 0#1"]);
    let mut run = run().client("sub:new 0#0 0#1");
    run.publications[0][1].cursor = Mark::of(Some("another"));
    run.is_bad(&["wrong cursor 0 0#1"]);
}

#[test]
fn who_is_away_at_the_end_is_named_but_has_lost_nothing() {
    Run::new(1, 3).client("sub 0#0 end").is_bad(&["away 0"]);
    Run::new(1, 3).client("").is_bad(&["away 0"]);
}

#[test]
fn an_event_without_a_subscription_is_found() {
    Run::new(1, 2).client("sub 0#0 end 0#1 sub").is_bad(&["outside 0 0#1"]);
}
