//! The job: how often does each address come, per five seconds?

use std::net::IpAddr;
use std::time::Duration;

use tidemill::prelude::*;

use crate::line;

/// Counts lines per address in windows of event time.
#[derive(Debug, Clone, JobArgs)]
pub(crate) struct IpCount {
    /// Topic to read: a line a record, dated by its timestamp.
    #[arg(default = "lines", guarded)]
    input: String,
    /// Topic to write: `HH:mm:ss ip count`, keyed by address.
    #[arg(default = "ip-counts", guarded)]
    output: String,
    /// Length of a window.
    #[arg(default = "5s", guarded)]
    window: Duration,
    /// How much older than the newest line before it a line may be.
    #[arg(default = "0s", guarded)]
    out_of_order: Duration,
}

/// One line that can be counted.
pub(crate) struct Visit {
    ip: IpAddr,
    at: i64,
}

/// The record says when (the ingester wrote it there), its value says who.
fn visit(record: RecordRef<'_>) -> std::result::Result<Visit, Malformed> {
    let line = line::parse(record.value().unwrap_or_default()).map_err(Malformed::new)?;
    Ok(Visit { ip: line.ip, at: record.timestamp() })
}

impl Job for IpCount {
    const NAME: &'static str = "ip-count";

    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic(&self.input), decode_with(visit))
            .skip_malformed()
            .event_time(|visit| visit.at, EventTime::out_of_order(self.out_of_order))
            .key_by(|visit| visit.ip)
            .window(Tumbling::of(self.window))
            .count("visits-per-ip")
            .drop_late()
            .map(|w| format!("{} {} {}", time_of_day(w.start.millis()), w.key, w.value))
            .to(topic(&self.output), Text);
        Ok(())
    }
}

/// `HH:mm:ss` of a moment, UTC.
pub(crate) fn time_of_day(millis: i64) -> String {
    let seconds = millis.div_euclid(1000).rem_euclid(86_400);
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
