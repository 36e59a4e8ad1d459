//! Event time: its values, and the settings of sources and windows.
//!
//! Event times are milliseconds since the epoch in an `i64`. [`MIN`] stands for "nothing known yet" (a partition's
//! event-time watermark before its first record), [`END`] for the end of a bounded run; neither is ever a row's time,
//! and `END` is never stored. The rules are in `docs/semantics.md`.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// An event-time watermark below every row.
pub const MIN: i64 = i64::MIN;

/// The event-time watermark at the end of a bounded run: every window closes.
pub const END: i64 = i64::MAX;

/// A moment of event time, in milliseconds since the epoch. Displayed and serialized as RFC 3339 in UTC with
/// milliseconds: `2015-05-17T10:05:00.000Z`.
///
/// ```
/// use tidemill_stream::Timestamp;
/// assert_eq!(Timestamp(1_431_857_100_000).to_string(), "2015-05-17T10:05:00.000Z");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Milliseconds since the epoch.
    pub fn millis(self) -> i64 {
        self.0
    }
}

impl Timestamp {
    /// RFC 3339 of the years 0 to 9999. Results of windows carry two of them, and a general formatter took as long for
    /// one as a row takes from log to state.
    fn text(self) -> Option<[u8; 24]> {
        const DAY: i64 = 86_400_000;
        let (day, millis) = (self.0.div_euclid(DAY), self.0.rem_euclid(DAY));
        // Days of the proleptic Gregorian calendar (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms"):
        // years begin in March, so that the leap day comes last. Day 0 is 0000-03-01.
        let day = day.checked_add(719_468).filter(|day| (-60..3_652_365).contains(day))?;
        let (era, day_of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let mut text = *b"0000-00-00T00:00:00.000Z";
        let mut put = |at: std::ops::Range<usize>, mut n: i64| {
            for digit in text[at].iter_mut().rev() {
                *digit = b'0' + (n % 10) as u8;
                n /= 10;
            }
        };
        put(0..4, year);
        put(5..7, month);
        put(8..10, day_of_month);
        put(11..13, millis / 3_600_000);
        put(14..16, millis / 60_000 % 60);
        put(17..19, millis / 1_000 % 60);
        put(20..23, millis % 1_000);
        Some(text)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(text) = self.text() {
            return f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?);
        }
        // A moment beyond the years that RFC 3339 can name still has to print as something.
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(at) => write!(f, "{at:.3}"),
            Err(_) => write!(f, "{}ms", self.0),
        }
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.text().as_ref().map(|text| std::str::from_utf8(text)) {
            Some(Ok(text)) => serializer.serialize_str(text),
            _ => serializer.collect_str(self),
        }
    }
}

impl From<i64> for Timestamp {
    fn from(millis: i64) -> Self {
        Self(millis)
    }
}

impl From<jiff::Timestamp> for Timestamp {
    fn from(at: jiff::Timestamp) -> Self {
        Self(at.as_millisecond())
    }
}

/// Milliseconds of a duration; what does not fit is as good as for ever.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// How event time advances in a source.
///
/// ```
/// use std::time::Duration;
/// use tidemill_stream::EventTime;
/// let _ = EventTime::out_of_order(Duration::from_secs(10)).idle_after(Duration::from_secs(30));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventTime {
    pub(crate) bound: i64,
    pub(crate) idle_after: Option<i64>,
}

impl EventTime {
    /// Rows come at most this much after a newer row of their partition; those that come later still are late.
    pub fn out_of_order(bound: Duration) -> Self {
        Self { bound: millis(bound), idle_after: None }
    }

    /// How much older than the newest row of its partition a row may be, in milliseconds.
    pub fn bound_ms(&self) -> i64 {
        self.bound
    }

    /// After how many milliseconds a quiet partition no longer holds event time back, if ever.
    pub fn idle_after_ms(&self) -> Option<i64> {
        self.idle_after
    }

    /// A partition that is read to its end and stays empty for this long no longer holds event time back, until it
    /// has data again. Without it a quiet partition holds the whole job.
    pub fn idle_after(self, idle: Duration) -> Self {
        Self { idle_after: Some(millis(idle)), ..self }
    }
}

/// Windows of one size that follow each other without gap or overlap, aligned to the epoch.
///
/// A window holds the times from its start (included) to its end (excluded).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tumbling {
    pub(crate) size: i64,
    pub(crate) offset: i64,
}

impl Tumbling {
    /// Windows of this size. Less than a millisecond is refused when the plan is built.
    pub fn of(size: Duration) -> Self {
        Self { size: millis(size), offset: 0 }
    }

    /// Windows that start this much after the epoch's multiples of their size.
    pub fn offset(self, offset: Duration) -> Self {
        Self { offset: millis(offset), ..self }
    }

    /// Their length in milliseconds.
    pub fn size_ms(&self) -> i64 {
        self.size
    }

    /// How much after the epoch's multiples of their size they start, in milliseconds.
    pub fn offset_ms(&self) -> i64 {
        self.offset
    }

    /// End of the window that holds `t`. Saturates at the ends of time, where windows are cut short.
    pub fn end_of(self, t: i64) -> i64 {
        let into = (i128::from(t) - i128::from(self.offset)).rem_euclid(i128::from(self.size));
        let end = i128::from(t) - into + i128::from(self.size);
        i64::try_from(end).unwrap_or(END - 1).min(END - 1)
    }

    /// Start of the window that ends at `end`.
    pub fn start_of(self, end: i64) -> i64 {
        end.saturating_sub(self.size)
    }
}

/// A window's result, or what became of it on its way to the sink: key, bounds and value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window<K, V> {
    /// The group.
    pub key: K,
    /// First moment of the window.
    pub start: Timestamp,
    /// First moment after the window.
    pub end: Timestamp,
    /// The aggregate.
    pub value: V,
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    #[test]
    fn windows_are_aligned_and_saturate() {
        let w = Tumbling { size: 5, offset: 0 };
        assert_eq!([w.end_of(0), w.end_of(4), w.end_of(5), w.end_of(-1), w.end_of(-5)], [5, 5, 10, 0, 0]);
        let w = Tumbling { size: 5, offset: 7 };
        assert_eq!([w.end_of(1), w.end_of(2), w.start_of(w.end_of(2))], [2, 7, 2]);
        assert_eq!(w.end_of(i64::MAX), END - 1);
        assert!(w.end_of(i64::MIN) > i64::MIN);
    }

    #[test]
    fn timestamps_print_as_a_calendar_library_does() {
        let mut rng = SmallRng::seed_from_u64(1);
        let at = |text: &str| text.parse::<jiff::Timestamp>().unwrap().as_millisecond();
        let (first, last) = (at("0000-01-01T00:00:00Z"), at("9999-12-30T22:00:00Z"));
        let edges =
            [first, first - 1, last, 0, -1, at("2000-02-29T23:59:59.999Z"), at("1900-03-01T00:00:00Z")];
        // Every day of a cycle of the calendar, at a random time of it.
        let days = (0..146_097).map(|day| first + day * 86_400_000 + rng.random_range(0..86_400_000));
        for millis in days.chain(edges).collect::<Vec<_>>() {
            let expected = format!("{:.3}", jiff::Timestamp::from_millisecond(millis).unwrap());
            assert_eq!(Timestamp(millis).to_string(), expected, "{millis}");
            assert_eq!(serde_json::to_string(&Timestamp(millis)).unwrap(), format!("\"{expected}\""));
        }
        for _ in 0..200_000 {
            let millis = rng.random_range(first..last);
            let expected = format!("{:.3}", jiff::Timestamp::from_millisecond(millis).unwrap());
            assert_eq!(Timestamp(millis).to_string(), expected, "{millis}");
        }
        assert!(Timestamp(first).text().is_some() && Timestamp(first - 1).text().is_none());
    }

    #[test]
    fn timestamps_print_milliseconds() {
        assert_eq!(Timestamp(-1).to_string(), "1969-12-31T23:59:59.999Z");
        assert_eq!(Timestamp(i64::MAX).to_string(), format!("{}ms", i64::MAX));
    }
}
