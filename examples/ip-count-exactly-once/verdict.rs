//! The verdict: what the sink holds, against what the source holds.
//!
//! A window is complete where the producer has written all five of its seconds; its count must be 5. Rows of one window
//! and address are added up, as whoever bills by them would: a row that came twice makes 10.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, Result, ensure};
use tidemill::{Directory, Isolation, Record};

use crate::job::{SINK, SOURCE, WINDOW};
use crate::producer::{ADDRESSES, SECOND_MS};

/// Records of one address in a complete window.
const FULL: u64 = 5;

/// How a run came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Complete windows, each once per address.
    pub(crate) windows: usize,
    /// Those whose count is 5, more, less.
    pub(crate) exact: usize,
    pub(crate) above: usize,
    pub(crate) below: usize,
    /// Of those below: a later window of the address has its row, so nothing can be added any more.
    pub(crate) lost: usize,
    /// One that is wrong, and what it adds up to.
    pub(crate) example: Option<(String, u64)>,
    /// Rows that readers of committed and of uncommitted data see.
    pub(crate) committed_rows: usize,
    pub(crate) uncommitted_rows: usize,
    /// A row that a reader of uncommitted data sees more than once, and how often.
    pub(crate) seen_often: Option<(String, usize)>,
}

impl Verdict {
    /// Of the data as it is now. The job must have ended.
    pub(crate) fn of(data: &Directory) -> Result<Self> {
        let seconds = seconds(&data.read(SOURCE, Isolation::ReadCommitted)?)?;
        let committed = data.read(SINK, Isolation::ReadCommitted)?;
        let uncommitted = data.read(SINK, Isolation::ReadUncommitted)?;
        let mut verdict = Self::judge(&complete(&seconds), &sums(&committed)?);
        (verdict.committed_rows, verdict.uncommitted_rows) = (committed.len(), uncommitted.len());
        let mut often: BTreeMap<String, usize> = BTreeMap::new();
        for row in &uncommitted {
            *often.entry(row.text().into_owned()).or_default() += 1;
        }
        verdict.seen_often = often.into_iter().filter(|(_, n)| *n > 1).max_by_key(|(_, n)| *n);
        Ok(verdict)
    }

    fn judge(complete: &[(i64, String)], sums: &BTreeMap<(i64, String), u64>) -> Self {
        let mut verdict = Self { windows: complete.len(), ..Self::default() };
        let mut last: BTreeMap<&str, i64> = BTreeMap::new();
        for (start, ip) in sums.keys() {
            last.entry(ip).and_modify(|last| *last = (*last).max(*start)).or_insert(*start);
        }
        for at in complete {
            let sum = sums.get(at).copied().unwrap_or(0);
            match sum.cmp(&FULL) {
                std::cmp::Ordering::Equal => verdict.exact += 1,
                std::cmp::Ordering::Greater => verdict.above += 1,
                std::cmp::Ordering::Less => verdict.below += 1,
            }
            let settled = last.get(at.1.as_str()).is_some_and(|last| at.0 < *last);
            verdict.lost += usize::from(sum < FULL && settled);
            if sum != FULL {
                let name = || format!("{} {}", crate::job::moment(at.0), at.1);
                verdict.example.get_or_insert_with(|| (name(), sum));
            }
        }
        verdict
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { windows, exact, above, below, .. } = self;
        write!(f, "{windows:>7} {exact:>10} {above:>8} {below:>8}")
    }
}

/// The seconds of each address: one record each, without a hole. That is the producer's part of the promise.
fn seconds(records: &[Record]) -> Result<BTreeMap<String, (i64, i64)>> {
    let mut spans: BTreeMap<String, (i64, i64)> = BTreeMap::new();
    for record in records {
        let at = record.timestamp;
        let span = spans.entry(record.key_text().into_owned()).or_insert((at, at - SECOND_MS));
        ensure!(
            at == span.1 + SECOND_MS,
            "after {} of {} comes {}",
            span.1,
            record.key_text(),
            record.text()
        );
        span.1 = at;
    }
    ensure!(spans.len() == ADDRESSES.len(), "{} of {} addresses came", spans.len(), ADDRESSES.len());
    Ok(spans)
}

/// The windows of which every second is there: start and address.
fn complete(seconds: &BTreeMap<String, (i64, i64)>) -> Vec<(i64, String)> {
    let window = i64::try_from(WINDOW.as_millis()).unwrap_or(i64::MAX);
    let mut complete = Vec::new();
    for (ip, (first, last)) in seconds {
        let mut start = first + (-first).rem_euclid(window);
        while start + window <= last + SECOND_MS {
            complete.push((start, ip.clone()));
            start += window;
        }
    }
    complete
}

/// What the rows of each window and address add up to.
fn sums(rows: &[Record]) -> Result<BTreeMap<(i64, String), u64>> {
    let window = i64::try_from(WINDOW.as_millis())?;
    let mut sums: BTreeMap<(i64, String), u64> = BTreeMap::new();
    for row in rows {
        let text = row.text();
        let count = text.rsplit(' ').next().and_then(|count| count.parse::<u64>().ok());
        let count = count.with_context(|| format!("the job wrote {text:?}"))?;
        // A window's result is dated with the window's last millisecond.
        *sums.entry((row.timestamp + 1 - window, row.key_text().into_owned())).or_default() += count;
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_too_few_and_none_are_told_apart() {
        let spans = BTreeMap::from([("a".to_owned(), (3_000, 24_000))]);
        let complete = complete(&spans);
        let starts: Vec<i64> = complete.iter().map(|(start, _)| *start).collect();
        assert_eq!(starts, [5_000, 10_000, 15_000, 20_000], "the window with two seconds is not complete");
        let sums: BTreeMap<_, _> =
            [(5_000, 5), (10_000, 10), (15_000, 3)].map(|(at, n)| ((at, "a".to_owned()), n)).into();
        let verdict = Verdict::judge(&complete, &sums);
        assert_eq!((verdict.windows, verdict.exact, verdict.above, verdict.below), (4, 1, 1, 2));
        assert_eq!(verdict.lost, 0, "the window with 3 is the last that has a row: more may come");
        assert_eq!(verdict.example, Some(("1970-01-01_00:00:10 a".to_owned(), 10)));
    }

    #[test]
    fn a_hole_and_a_repeat_of_the_source_are_noticed() {
        let record = |ip: &str, second: i64| Record {
            partition: 0,
            offset: 0,
            timestamp: second * SECOND_MS,
            key: Some(ip.to_owned().into()),
            value: None,
            headers: Vec::new(),
        };
        let of = |last: &[i64]| {
            let others = ["a", "b", "c"].map(|ip| record(ip, 0));
            seconds(&others.into_iter().chain(last.iter().map(|s| record("d", *s))).collect::<Vec<_>>())
        };
        assert_eq!(of(&[5, 6, 7]).unwrap()["d"], (5_000, 7_000));
        assert!(of(&[5, 7]).is_err(), "a hole");
        assert!(of(&[5, 5]).is_err(), "a repeat");
        assert!(of(&[]).is_err(), "an address that never came");
    }
}
