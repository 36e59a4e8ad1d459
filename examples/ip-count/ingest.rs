//! The ingester: from a connection, or a file, into a topic, and a date for every line on the way.
//!
//! ```text
//!   newest record: 28 Feb 23:59:58      line 00:00:03   ─▶  of 28, 29 Feb, 1 Mar the nearest: 29 Feb 00:00:03
//! ```
//!
//! A line says `00:00:03` and not of which day. Of the day before, the same and the next, the ingester takes the one
//! that brings the line nearest to the newest line so far; so a time that goes back across midnight is the next day.
//! After a restart that newest line is the last record of the topic: nothing else has to be remembered.

use std::io::{BufRead, Read as _};

use anyhow::Result;
use tidemill::broker::Topic;
use tidemill::{Directory, Isolation, NewRecord};

use crate::line::{self, Time};

const DAY_MS: i64 = 86_400_000;
/// What is longer is cut: a peer that never ends its line must not fill our memory.
const LINE_BYTES_MAX: u64 = 8 << 10;

/// Gives lines their date.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dater {
    /// Milliseconds since 1970.
    newest: i64,
}

impl Dater {
    /// For lines that follow this moment (milliseconds since 1970).
    pub(crate) fn starting(newest: i64) -> Self {
        Self { newest }
    }

    /// Goes on from the topic's last record; in an empty topic from `first`.
    pub(crate) fn resume(data: &Directory, topic: &Topic, first: i64) -> Result<Self> {
        let last = data.last(&topic.name, 0, Isolation::ReadCommitted)?;
        Ok(Self::starting(last.map_or(first, |record| record.timestamp)))
    }

    /// The moment a line belongs to. One that cannot be read gets the newest: the job will count it as damaged.
    pub(crate) fn date(&mut self, line: &[u8]) -> i64 {
        let at = match line::parse(line).map(|line| line.time) {
            Err(_) => self.newest,
            Ok(Time::Full(at)) => at,
            Ok(Time::OfDay(seconds)) => {
                let day = self.newest.div_euclid(DAY_MS);
                let days = [day - 1, day, day + 1].map(|day| day * DAY_MS + seconds * 1000);
                days.into_iter().min_by_key(|at| at.abs_diff(self.newest)).unwrap_or(self.newest)
            }
        };
        self.newest = self.newest.max(at);
        at
    }
}

/// Appends every line of `input`, as it is and with its date; returns how many, once all of them are durable.
pub(crate) fn append(data: &Directory, topic: &Topic, mut input: impl BufRead, first: i64) -> Result<u64> {
    let mut dater = Dater::resume(data, topic, first)?;
    let producer = data.producer()?;
    let (mut line, mut appended) = (Vec::new(), 0);
    loop {
        line.clear();
        if input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
            producer.flush()?;
            return Ok(appended);
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        producer.send(topic, NewRecord::of(line).at(dater.date(line)))?;
        appended += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 28 February 2024, 00:00.
    const FEB_28: i64 = 1_709_078_400_000;

    fn hour(day: i64, hour: i64) -> i64 {
        FEB_28 + day * DAY_MS + hour * 3_600_000
    }

    #[test]
    fn midnight_makes_a_new_day_in_both_directions() {
        let mut dater = Dater::starting(hour(0, 23));
        assert_eq!(dater.date(b"23:00:00 10.0.0.1"), hour(0, 23));
        assert_eq!(dater.date(b"00:00:00 10.0.0.1"), hour(1, 0), "goes back across midnight: the next day");
        assert_eq!(dater.date(b"23:00:00 10.0.0.1"), hour(0, 23), "a straggler of the day before");
        assert_eq!(dater.date(b"01:00:00 10.0.0.1"), hour(1, 1), "and the straggler changed nothing");
    }

    #[test]
    fn a_line_without_a_time_gets_the_newest_and_one_with_a_date_keeps_its_own() {
        let mut dater = Dater::starting(hour(0, 5));
        assert_eq!(dater.date(b"hello"), hour(0, 5));
        assert_eq!(
            dater.date(b"10.0.0.1 - - [28/Feb/2024:02:00:00 +0000] \"GET / HTTP/1.1\" 200 1"),
            hour(0, 2)
        );
        assert_eq!(dater.date(b"hello"), hour(0, 5));
    }
}
