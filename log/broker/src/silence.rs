//! Counts how long one holder of a data directory has said nothing.

use std::time::{Duration, Instant};

use crate::directory::Holder;

/// A clock that runs while one holder is silent. Between two looks at most a second counts: if more passed, it was
/// this process that did not run.
#[derive(Debug)]
pub(crate) struct Silence {
    holder: Option<Holder>,
    counted: Duration,
    last: Instant,
}

impl Silence {
    /// So much silence of one holder is a failure.
    pub(crate) const MOST: Duration = Duration::from_secs(5);
    const LOOK_MOST: Duration = Duration::from_secs(1);

    pub(crate) fn new(now: Instant) -> Self {
        Silence { holder: None, counted: Duration::ZERO, last: now }
    }

    /// A byte came.
    pub(crate) fn heard(&mut self) {
        self.counted = Duration::ZERO;
    }

    /// Nothing came since the last look. Gives the holder once it has been silent for long enough.
    pub(crate) fn count(&mut self, now: Instant, holder: Option<Holder>) -> Option<Holder> {
        let passed = now.duration_since(self.last).min(Self::LOOK_MOST);
        self.last = now;
        if holder.is_none() || holder != self.holder {
            self.holder = holder;
            self.counted = Duration::ZERO;
            return None;
        }
        self.counted += passed;
        holder.filter(|_| self.counted >= Self::MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Option<Holder> = Some(Holder { pid: 7, elsewhere: false, started: 1 });
    const B: Option<Holder> = Some(Holder { pid: 7, elsewhere: false, started: 2 });

    #[test]
    fn five_seconds_of_one_holder_count() {
        let begin = Instant::now();
        let mut silence = Silence::new(begin);
        let at = |tenths: u64| begin + Duration::from_millis(100 * tenths);
        assert_eq!(silence.count(at(0), A), None);
        for tenth in 1..50 {
            assert_eq!(silence.count(at(tenth), A), None);
        }
        assert_eq!(silence.count(at(50), A), A);
    }

    #[test]
    fn a_byte_another_holder_or_no_holder_begins_again() {
        let begin = Instant::now();
        let mut silence = Silence::new(begin);
        let at = |secs: u64| begin + Duration::from_secs(secs);
        silence.count(at(0), A);
        for second in 1..5 {
            assert_eq!(silence.count(at(second), A), None);
        }
        assert_eq!(silence.count(at(5), B), None, "the same pid, a later process");
        for second in 6..10 {
            assert_eq!(silence.count(at(second), B), None);
        }
        silence.heard();
        assert_eq!(silence.count(at(10), B), None);
        assert_eq!(silence.count(at(11), None), None);
        assert_eq!(silence.count(at(12), B), None);
    }

    #[test]
    fn a_stop_of_this_process_counts_as_a_second() {
        let begin = Instant::now();
        let mut silence = Silence::new(begin);
        silence.count(begin, A);
        assert_eq!(silence.count(begin + Duration::from_secs(3600), A), None);
        assert_eq!(silence.counted, Duration::from_secs(1));
    }
}
