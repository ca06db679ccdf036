//! From what publishers and clients wrote down to the report.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::evidence::Log;
use super::judge::{Channel, Verdict, judge};
use super::publisher::Published;
use super::stage::Stage;
use super::{DELIVERIES_MAX, Options};
use crate::report::{Report, Violation};

/// Everything that was written down.
pub(crate) struct Evidence {
    pub stage: Arc<Stage>,
    pub seed: u64,
    /// By publisher.
    pub published: Vec<Published>,
    /// By client; of each the channels and their logs.
    pub logs: Vec<(usize, Vec<(usize, Log)>)>,
    /// What instances still held, by their internal listener.
    pub leftovers: Vec<(String, String)>,
    pub published_s: f64,
    /// A signal, or too much to write down.
    pub is_cut_short: bool,
}

impl Evidence {
    /// If no publish at all was acknowledged: the last complaint.
    pub(crate) fn nothing_acked(&self) -> Option<String> {
        let acked = self.stage.tally.acked.load(Ordering::Relaxed);
        (acked == 0).then(|| self.complaint().unwrap_or_else(|| "there was no time to publish".to_owned()))
    }

    fn complaint(&self) -> Option<String> {
        self.published.iter().find_map(|published| published.complaint.clone())
    }

    fn verdict(&self) -> Verdict {
        let mut verdict = Verdict::default();
        for (index, name) in self.stage.channels.iter().enumerate() {
            let of_channel = |(client, logs): &'_ (usize, Vec<(usize, Log)>)| {
                (*client, logs.iter().position(|(at, _)| *at == index))
            };
            let logs = self.logs.iter().filter_map(|seen| {
                let (client, at) = of_channel(seen);
                Some((client, &seen.1[at?].1))
            });
            let publications = self.published.iter().map(|published| published.by_channel[index].as_slice()).collect();
            judge(&Channel { name, publications, logs: logs.collect() }, &mut verdict);
        }
        for (api, held) in &self.leftovers {
            let text = format!("{api} still holds {held}");
            verdict.violation("leftover", || Violation { kind: "", channel: None, client: None, message: None, text });
        }
        verdict
    }

    pub(crate) fn report(&self, options: &Options) -> Report {
        let title = "is anything lost in silence, repeated, or out of order".to_owned();
        let mut report = Report { command: "verify", title, ..Report::default() };
        report.set("clients connect to", options.urls.join(" "));
        report.set("publishers publish to", options.apis.join(" "));
        report.set("channels", format!("{}, as {}0", options.channels, options.prefix));
        report.set("clients", format!("{} on {} channels each", options.clients, options.subscriptions()));
        report.set("leave on purpose", format!("{}, after {} s on average", options.leavers, options.stay));
        report.set("publishers", format!("{}, {} messages a request", options.publishers, options.batch));
        report.set("schedule", format!("{} messages a second, {} s", options.rate, options.seconds));
        report.set("seed", self.seed);
        let verdict = self.verdict();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        let tally = &self.stage.tally;
        report.figure("violations", verdict.violation_count() as f64, "");
        for (kind, count) in &verdict.counts {
            report.figure(&format!("violations: {kind}"), *count as f64, "");
        }
        report.figure("publishes acknowledged", verdict.acked as f64, "");
        report.figure("publishes refused", verdict.refused as f64, "");
        report.figure("publishes of unknown outcome", verdict.unknown as f64, "");
        report.figure("acknowledged", verdict.acked as f64 / self.published_s, "/s");
        report.figure("deliveries", verdict.deliveries as f64, "");
        report.figure("deliveries demanded", verdict.demanded as f64, "");
        report.figure("of these missing, and told so", verdict.told_missing as f64, "");
        report.figure("told a moment after a resume", verdict.told_late as f64, "");
        report.figure("gaps told", verdict.gaps as f64, "");
        report.figure("channels resumed in full", verdict.resumed as f64, "");
        report.figure("channels told to reload", verdict.not_resumed as f64, "");
        report.figure("connections left on purpose", count(&tally.left), "");
        report.figure("connections ended otherwise", count(&tally.ended) - count(&tally.failed), "");
        report.figure("connects that failed", count(&tally.failed), "");
        self.add_notes(&mut report, &verdict);
        report.violations = verdict.violations;
        report
    }

    fn add_notes(&self, report: &mut Report, verdict: &Verdict) {
        if let Some(complaint) = self.complaint() {
            report.notes.push(format!("Not every publish was acknowledged; the last word to one of them: {complaint}"));
        }
        if self.is_cut_short {
            let why =
                if verdict.deliveries > DELIVERIES_MAX { "there is no room to write down more" } else { "told to" };
            report.notes.push(format!("Publishing ended after {:.1} s: {why}.", self.published_s));
        }
    }
}
