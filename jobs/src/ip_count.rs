//! Requests per address and window of event time, from the lines of an access log.

use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use tidemill::prelude::*;

use crate::access_log;

/// Counts the requests of each address in tumbling windows of event time.
#[derive(Debug, Clone, JobArgs)]
pub struct IpCount {
    /// Topic to read: access-log lines in common or combined format.
    #[arg(default = "access-log", guarded)]
    pub input: String,
    /// Topic of the counts, keyed by address.
    #[arg(default = "ip-counts", guarded)]
    pub output: String,
    /// Topic of the lines that came too late for their window, unchanged.
    #[arg(default = "ip-counts-late")]
    pub late: String,
    /// Topic of the lines that cannot be read, with the reason in a header.
    #[arg(default = "ip-count-dead-letter")]
    pub dead_letter: String,
    /// Length of a window.
    #[arg(default = "5s", guarded)]
    pub window: Duration,
    /// How much older than the newest line of its partition a line may be.
    #[arg(default = "10s", guarded)]
    pub out_of_order: Duration,
    /// A partition without new lines for this long no longer holds windows open.
    #[arg(default = "30s")]
    pub idle_after: Duration,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    /// Who asked.
    pub ip: IpAddr,
    /// When.
    pub at: Timestamp,
}

/// Reads the lines of an access log.
#[derive(Debug, Clone, Copy)]
pub struct AccessLog;

impl Decoder for AccessLog {
    type Item = Visit;

    fn decode(&self, record: RecordRef<'_>) -> std::result::Result<Visit, Malformed> {
        let line = record.value().unwrap_or_default();
        match access_log::parse(line) {
            Ok(line) => Ok(Visit { ip: line.ip, at: Timestamp(line.at) }),
            Err(reason) => Err(Malformed::new(reason.to_string())),
        }
    }
}

/// One row of the output: the requests of an address in one window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IpWindow {
    /// First moment of the window.
    pub window_start: Timestamp,
    /// First moment after it.
    pub window_end: Timestamp,
    /// The address.
    pub ip: IpAddr,
    /// Its requests.
    pub count: u64,
}

impl Job for IpCount {
    const NAME: &'static str = "ip-count";

    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic(&self.input), AccessLog)
            .dead_letter_to(topic(&self.dead_letter))
            .event_time(|v| v.at, EventTime::out_of_order(self.out_of_order).idle_after(self.idle_after))
            .key_by(|v| v.ip)
            .window(Tumbling::of(self.window))
            .count("visits-per-ip")
            .late_to(topic(&self.late))
            .map(|w| IpWindow { window_start: w.start, window_end: w.end, ip: w.key, count: w.value })
            .to(topic(&self.output), Json::<IpWindow>::new());
        Ok(())
    }
}
