//! A job: how often each name occurs in each window of event time.
//!
//! Its input are lines of text such as `1431857103000 apple`: milliseconds since the epoch, a space, a name.

use std::time::Duration;

use tidemill::prelude::*;

/// The job's arguments. `streamctl run DIR --set window=1m` gives one; the rest have their defaults.
///
/// What the counts depend on is `guarded`: once the job has committed something, a run with another value is refused.
#[derive(Debug, Clone, JobArgs)]
pub struct __Job__ {
    /// Topic to read.
    #[arg(default = "__name__-lines", guarded)]
    pub input: String,
    /// Topic of the counts, keyed by name.
    #[arg(default = "__name__-counts", guarded)]
    pub output: String,
    /// Topic of the lines that came too late for their window, unchanged.
    #[arg(default = "__name__-late")]
    pub late: String,
    /// Topic of the lines that cannot be read, with the reason in a header.
    #[arg(default = "__name__-dead-letter")]
    pub dead_letter: String,
    /// Length of a window.
    #[arg(default = "10s", guarded)]
    pub window: Duration,
    /// How much older than the newest line of its partition a line may be.
    #[arg(default = "2s", guarded)]
    pub out_of_order: Duration,
    /// A partition without new lines for this long no longer holds windows open.
    #[arg(default = "30s")]
    pub idle_after: Duration,
}

/// One line of the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When it happened.
    pub at: Timestamp,
    /// What.
    pub name: String,
}

/// Reads a line.
fn read(record: RecordRef<'_>) -> Result<Event, Malformed> {
    let line = std::str::from_utf8(record.value().unwrap_or_default());
    let line = line.map_err(|error| Malformed::new(error.to_string()))?;
    let (at, name) = line.split_once(' ').ok_or_else(|| Malformed::new("no space after the time"))?;
    let at = at.parse().map_err(|error| Malformed::new(format!("the time {at:?}: {error}")))?;
    Ok(Event { at: Timestamp(at), name: name.to_owned() })
}

impl Job for __Job__ {
    const NAME: &'static str = "__name__";

    fn build(&self, flow: &Flow) -> Result<()> {
        let times = EventTime::out_of_order(self.out_of_order).idle_after(self.idle_after);
        flow.source(topic(&self.input), decode_with(read))
            .dead_letter_to(topic(&self.dead_letter))
            .event_time(|event| event.at, times)
            .key_by(|event| event.name.clone())
            .window(Tumbling::of(self.window))
            .count("per-name")
            .late_to(topic(&self.late))
            .map(|window| format!("{} {} {}", window.start, window.key, window.value))
            .to(topic(&self.output), Text);
        Ok(())
    }
}
