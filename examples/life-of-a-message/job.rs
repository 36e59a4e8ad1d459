//! The job that the record meets: visits per address and five seconds.

use std::time::Duration;

use tidemill::prelude::*;

pub(crate) const NAME: &str = "life";
pub(crate) const VISITS: &str = "visits";
pub(crate) const COUNTS: &str = "counts";
pub(crate) const STORE: &str = "per-address";

/// Visits per address in windows of five seconds.
#[derive(Debug, Clone, JobArgs)]
pub(crate) struct PerAddress {}

impl Job for PerAddress {
    const NAME: &'static str = NAME;

    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic(VISITS), decode_with(address))
            .event_time(|(_, at)| *at, EventTime::out_of_order(Duration::ZERO))
            .key_by(|(address, _)| address.clone())
            .window(Tumbling::of(Duration::from_secs(5)))
            .count(STORE)
            .drop_late()
            .map(|w| format!("{} {} {}", w.start, w.key, w.value))
            .to(topic(COUNTS), Text);
        Ok(())
    }
}

fn address(record: RecordRef<'_>) -> std::result::Result<(String, i64), Malformed> {
    let key = String::from_utf8(record.key().unwrap_or_default().to_vec());
    Ok((key.map_err(|_| Malformed::new("the key is not text"))?, record.timestamp()))
}
