//! What job `ip-count` wrote, as a consumer sees it, and its comparison with a [`Recount`].

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::recount::{Lines, Recount, utc_text};

/// One value of topic `ip-counts`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    window_start: String,
    window_end: String,
    ip: String,
    count: u64,
}

/// The job's three output topics.
#[derive(Debug, Default)]
pub struct Counted {
    /// Count and window end per (window start, address), times as text.
    pub rows: BTreeMap<(String, String), (u64, String)>,
    /// Late lines.
    pub late: Lines,
    /// Dead letters.
    pub dead: Lines,
    /// Windows and addresses that have more than one row.
    pub repeated: Vec<(String, String)>,
}

impl Counted {
    /// From the text that `consume` printed of each topic.
    pub fn read(counts: &[u8], late: &[u8], dead: &[u8]) -> Result<Self> {
        let mut counted = Counted { late: lines(late), dead: lines(dead), ..Counted::default() };
        for line in each_line(counts) {
            let shown = || format!("not a row of ip-counts: {}", String::from_utf8_lossy(line));
            let row: Row = serde_json::from_slice(line).with_context(shown)?;
            ensure!(row.count > 0, "a row that counts nothing: {row:?}");
            let at = (row.window_start, row.ip);
            if counted.rows.insert(at.clone(), (row.count, row.window_end)).is_some() {
                counted.repeated.push(at);
            }
        }
        Ok(counted)
    }

    /// Rows of the input that are in a window.
    pub fn counted(&self) -> u64 {
        self.rows.values().map(|(count, _)| count).sum()
    }

    /// The addresses with the most rows, most first, equal ones by text.
    pub fn top(&self, n: usize) -> Vec<(String, u64)> {
        let mut by_address: HashMap<&str, u64> = HashMap::new();
        for ((_, ip), (count, _)) in &self.rows {
            *by_address.entry(ip).or_default() += count;
        }
        let mut top: Vec<_> = by_address.into_iter().map(|(ip, n)| (ip.to_owned(), n)).collect();
        top.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        top.truncate(n);
        top
    }

    /// Every way in which this differs from what it must be, a line each, at most ten of a kind. Empty: exact.
    pub fn differences(&self, recount: &Recount, window_ms: i64) -> Vec<String> {
        let mut found = Vec::new();
        let repeated = self.repeated.iter().map(|(start, ip)| format!("{start} {ip} has two rows"));
        found.extend(repeated.take(10));
        let expected: BTreeMap<(String, String), (u64, String)> = recount
            .counts
            .iter()
            .map(|((start, ip), count)| {
                ((utc_text(*start), ip.to_string()), (*count, utc_text(start + window_ms)))
            })
            .collect();
        let wrong = expected.iter().filter_map(|((start, ip), want)| {
            match self.rows.get(&(start.clone(), ip.clone())) {
                Some(have) if have == want => None,
                Some((have, end)) => {
                    Some(format!("{start} {ip}: {have} until {end}, and it is {} until {}", want.0, want.1))
                }
                None => Some(format!("{start} {ip}: no row, and it is {}", want.0)),
            }
        });
        found.extend(wrong.take(10));
        let extra = self.rows.keys().filter(|at| !expected.contains_key(at));
        found.extend(extra.map(|(start, ip)| format!("{start} {ip}: a row for nothing")).take(10));
        found.extend(line_differences("late", &self.late, &recount.late));
        found.extend(line_differences("dead-letter", &self.dead, &recount.dead));
        found
    }
}

fn line_differences(what: &str, have: &Lines, want: &Lines) -> Vec<String> {
    let count = |lines: &Lines, line: &[u8]| lines.get(line).copied().unwrap_or_default();
    let mut found: Vec<_> = want
        .keys()
        .chain(have.keys().filter(|line| !want.contains_key(*line)))
        .filter(|line| count(have, line) != count(want, line))
        .map(|line| {
            let shown = String::from_utf8_lossy(line);
            format!("{what}: {} times, and it is {} times: {shown}", count(have, line), count(want, line))
        })
        .take(10)
        .collect();
    found.sort();
    found
}

/// The lines of a text and how often each is there.
pub fn lines(text: &[u8]) -> Lines {
    let mut lines = Lines::new();
    for line in each_line(text) {
        *lines.entry(line.to_vec()).or_default() += 1;
    }
    lines
}

fn each_line(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.strip_suffix(b"\n").into_iter().flat_map(|text| text.split(|b| *b == b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recount::Settings;

    const LINE: &str = "1.1.1.1 - - [17/May/2015:10:05:03 +0000] \"GET / HTTP/1.1\" 200 1\n";

    fn row(count: u64) -> String {
        format!(
            "{{\"window_start\":\"2015-05-17T10:05:00.000Z\",\"window_end\":\"2015-05-17T10:05:05.000Z\",\"ip\":\"1.1.1.1\",\
             \"count\":{count}}}\n"
        )
    }

    fn differences(counts: &str, late: &str, dead: &str) -> Vec<String> {
        let settings = Settings { partitions: 1, window_ms: 5000, bound_ms: 0 };
        let recount = Recount::of(settings, format!("{LINE}{LINE}\n").as_bytes());
        let counted = Counted::read(counts.as_bytes(), late.as_bytes(), dead.as_bytes()).unwrap();
        counted.differences(&recount, 5000)
    }

    #[test]
    fn exact_output_has_no_difference() {
        assert_eq!(differences(&row(2), "", "\n"), Vec::<String>::new());
    }

    /// Each way to be wrong is seen: a checker that cannot fail proves nothing.
    #[test]
    fn every_wrong_output_is_told() {
        assert_eq!(differences(&row(1), "", "\n").len(), 1, "a row too few");
        assert_eq!(differences(&(row(2) + &row(2)), "", "\n").len(), 1, "twice");
        assert_eq!(differences("", "", "\n").len(), 1, "missing");
        let elsewhere = row(2) + &row(2).replace("1.1.1.1", "1.1.1.2");
        assert_eq!(differences(&elsewhere, "", "\n").len(), 1, "for nothing");
        assert_eq!(differences(&row(2).replace("05:05.000", "05:06.000"), "", "\n").len(), 1, "another end");
        assert_eq!(differences(&row(2), LINE, "\n").len(), 1, "late too many");
        assert_eq!(differences(&row(2), "", "").len(), 1, "dead letter missing");
        assert_eq!(differences(&row(2), "", "\n\n").len(), 1, "dead letter twice");
    }
}
