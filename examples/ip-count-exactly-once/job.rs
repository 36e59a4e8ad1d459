//! The job: records per address and five seconds. Each address has one a second, so every count must be 5.

use std::io::Read as _;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use jiff::tz::TimeZone;
use tidemill::engine::Mode;
use tidemill::prelude::{
    EventTime, Flow, Job, JobArgs, Malformed, RecordRef, Text, Tumbling, decode_with, topic,
};
use tidemill::runtime::Progress;
use tidemill::{Directory, Guarantee, RunOptions};
use tidemill_examples::say;

use crate::FORM;

pub(crate) const SOURCE: &str = "ip_count_source";
pub(crate) const SINK: &str = "ip_count_sink";
pub(crate) const WINDOW: Duration = Duration::from_secs(5);

/// Counts records per address in windows of five seconds.
#[derive(Debug, Clone, JobArgs)]
pub(crate) struct IpCount {
    /// How much older than the newest record of its partition a record may be.
    #[arg(default = "0s", guarded)]
    out_of_order: Duration,
    /// What a record costs, as a look-up in another system would. So there is always something that was fetched and
    /// not yet processed: what at-most-once loses.
    #[arg(default = "5ms")]
    cost: Duration,
}

/// The key says who; when, the record itself says.
fn visit(record: RecordRef<'_>) -> std::result::Result<(IpAddr, i64), Malformed> {
    let key = std::str::from_utf8(record.key().unwrap_or_default()).ok();
    let ip = key.and_then(|key| key.parse().ok()).ok_or_else(|| Malformed::new("the key is no address"))?;
    Ok((ip, record.timestamp()))
}

impl Job for IpCount {
    const NAME: &'static str = "ip-count-exactly-once";

    fn build(&self, flow: &Flow) -> tidemill::prelude::Result<()> {
        let cost = self.cost;
        flow.source(topic(SOURCE), decode_with(visit))
            .event_time(|(_, at)| *at, EventTime::out_of_order(self.out_of_order))
            .map(move |visit| {
                std::thread::sleep(cost);
                visit
            })
            .key_by(|(ip, _)| *ip)
            .window(Tumbling::of(WINDOW))
            .count("visits-per-ip")
            .drop_late()
            .map(|w| format!("{} {} {}", moment(w.start.millis()), w.key, w.value))
            .to(topic(SINK), Text);
        Ok(())
    }
}

/// `yyyy-MM-dd_HH:mm:ss` of a moment, UTC.
pub(crate) fn moment(millis: i64) -> String {
    let at = jiff::Timestamp::from_millisecond(millis).unwrap_or_default();
    at.to_zoned(TimeZone::UTC).strftime(FORM).to_string()
}

/// Runs the job until standard input ends and one more commit, or to the end of what is there. Prints a line for each
/// change: `open N` (rows in the open transaction), `committed N` (commits so far).
pub(crate) fn run(data: &Path, guarantee: Guarantee, mode: Mode) -> Result<()> {
    let data = Directory::open_with(data, tidemill::broker::Intent::Create, |event| say(event))?;
    let job = data.start::<IpCount>(options(guarantee, mode))?;
    if mode == Mode::Unbounded {
        let monitor = job.monitor().clone();
        std::thread::spawn(move || {
            // Whatever comes, and however it ends: the end of input is the sign to stop.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            monitor.stop();
        });
    }
    let (mut open, mut commits) = (0, 0);
    while !job.is_over() {
        let differs = |now: &Progress| now.open_rows != open || now.commits != commits;
        if job.monitor().wait_until(Duration::from_millis(50), differs) {
            let now = job.monitor().progress();
            if now.open_rows > open {
                crate::tell(format_args!("open {}", now.open_rows))?;
            }
            if now.commits > commits {
                crate::tell(format_args!("committed {}", now.commits))?;
            }
            (open, commits) = (now.open_rows, now.commits);
        }
    }
    job.join()?;
    Ok(())
}

fn options(guarantee: Guarantee, mode: Mode) -> RunOptions {
    // The last pass over what is there need not be slow.
    let sets = if mode == Mode::UntilEnd { vec!["cost=0ms".to_owned()] } else { Vec::new() };
    RunOptions { mode, sets, guarantee: Some(guarantee), tasks: Some(2), ..RunOptions::default() }
}
