//! The verifier: holds what a run left in its data directory against what it must have left.
//!
//! ```text
//!   input as in the files ─▶ each line known, once; every acked one there
//!            └─▶ recount, partition by partition ─▶ rows, late lines, dead letters ══ equal? ══ output as in the files
//! ```
//!
//! The recount is [`Recount`], the decoder that of [`history`](super::history): neither shares code with what is
//! checked. Differences are counted in input lines: a line is *lost* where it is counted too rarely, *duplicated* where
//! it is counted too often; anything else that is wrong (a row in the wrong partition, a broken rule of the files) is
//! *broken*.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::batch::Record;
use super::history::{Files, Transactions};
use super::load::Load;
use crate::recount::{Lines, Recount, Settings, partition_of, utc_text};

/// Differences shown, at most.
const SHOWN: usize = 20;

/// What a producer process was given and what it said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Produced {
    /// First line it was given.
    pub from: u64,
    /// So many lines, from the first on, were acked.
    pub acked: u64,
    /// So many lines it was given at most.
    pub given: u64,
}

/// What the run must have left.
#[derive(Debug)]
pub struct Expected<'a> {
    /// Window, bound and partitions.
    pub settings: Settings,
    /// What the lines are.
    pub load: Load,
    /// Who produced them.
    pub produced: &'a [Produced],
}

/// The topics of the job.
#[derive(Debug, Clone, Copy)]
pub struct Topics<'a> {
    /// Input.
    pub input: &'a str,
    /// Rows.
    pub output: &'a str,
    /// Late lines.
    pub late: &'a str,
    /// Dead letters.
    pub dead: &'a str,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Lines in the input.
    pub lines: u64,
    /// Lines that were acked.
    pub acked: u64,
    /// Rows of the output.
    pub rows: u64,
    /// Late lines.
    pub late: u64,
    /// Dead letters.
    pub dead: u64,
    /// Transactions that committed and that aborted.
    pub transactions: (usize, usize),
    /// Input lines that the output counts too rarely, and acked lines that are not in the input.
    pub lost: u64,
    /// Input lines that the output counts too often, and lines that are in the input more than once.
    pub duplicated: u64,
    /// What else is wrong.
    pub broken: Vec<String>,
    /// The first differences, for people.
    pub shown: Vec<String>,
}

impl Verdict {
    /// Of a directory whose files cannot even be found.
    pub fn unreadable(error: &anyhow::Error) -> Self {
        Verdict { broken: vec![unreadable(error)], ..Verdict::default() }
    }

    /// Whether nothing is lost, duplicated or broken.
    pub fn is_exact(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.broken.is_empty()
    }

    /// Everything that is wrong, a line each, the first of each kind.
    pub fn what(&self) -> Vec<String> {
        let mut all = vec![format!("{} lines lost, {} duplicated", self.lost, self.duplicated)];
        all.extend(self.shown.iter().chain(&self.broken).cloned());
        all
    }

    /// Adds what was found elsewhere.
    pub fn add(&mut self, other: Verdict) {
        self.lines += other.lines;
        self.acked += other.acked;
        self.rows += other.rows;
        self.late += other.late;
        self.dead += other.dead;
        self.transactions.0 += other.transactions.0;
        self.transactions.1 += other.transactions.1;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.broken.extend(other.broken);
        self.shown.extend(other.shown);
    }

    fn lost(&mut self, lines: u64, what: impl FnOnce() -> String) {
        self.lost += lines;
        self.show("lost", what);
    }

    fn duplicated(&mut self, lines: u64, what: impl FnOnce() -> String) {
        self.duplicated += lines;
        self.show("duplicated", what);
    }

    fn broken(&mut self, what: String) {
        if self.broken.len() < SHOWN {
            self.broken.push(what);
        }
    }

    fn show(&mut self, kind: &str, what: impl FnOnce() -> String) {
        if self.shown.len() < SHOWN {
            self.shown.push(format!("{kind}: {}", what()));
        }
    }
}

/// Where records come from: a data directory, or a test.
pub trait Source {
    /// Partitions of a topic; 0 if it is not there.
    fn partitions(&self, topic: &str) -> u32;

    /// Gives every record that counts to `each`.
    ///
    /// # Errors
    ///
    /// If the bytes cannot be read.
    fn read(
        &self,
        topic: &str,
        partition: u32,
        transactions: &mut Transactions,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()>;
}

impl Source for Files {
    fn partitions(&self, topic: &str) -> u32 {
        Files::partitions(self, topic)
    }

    fn read(
        &self,
        topic: &str,
        partition: u32,
        transactions: &mut Transactions,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()> {
        Files::read(self, topic, partition, transactions, each)
    }
}

/// One value of the output.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    window_start: String,
    window_end: String,
    ip: String,
    count: u64,
}

/// Window start and address of a row, as text.
type Cell = (String, String);

/// Checks a run that was stopped cleanly after a bounded run to its end.
///
/// Files that cannot be read, or hold no batches, are a broken rule: what is behind them was not checked.
pub fn check(source: &impl Source, topics: Topics<'_>, expected: &Expected<'_>) -> Verdict {
    let mut verdict = Verdict::default();
    let mut transactions = Transactions::default();
    if let Err(error) = hold(source, topics, expected, &mut transactions, &mut verdict) {
        verdict.broken.insert(0, unreadable(&error));
    }
    for violation in std::mem::take(&mut transactions.violations) {
        verdict.broken(violation);
    }
    verdict.transactions = (transactions.committed(), transactions.aborted());
    verdict
}

fn unreadable(error: &anyhow::Error) -> String {
    format!("the files cannot be read: {error:#}")
}

fn hold(
    source: &impl Source,
    topics: Topics<'_>,
    expected: &Expected<'_>,
    transactions: &mut Transactions,
    verdict: &mut Verdict,
) -> Result<()> {
    let recount = input(source, topics.input, expected, transactions, verdict)?;
    rows(source, topics.output, expected, &recount, transactions, verdict)?;
    let late = lines(source, topics.late, expected, transactions, verdict)?;
    verdict.late = late.values().sum();
    compare("late line", &late, &recount.late, verdict);
    let dead = lines(source, topics.dead, expected, transactions, verdict)?;
    verdict.dead = dead.values().sum();
    compare("dead letter", &dead, &recount.dead, verdict);
    Ok(())
}

/// The input: whether it is what was produced, and what the job must make of it.
fn input(
    source: &impl Source,
    topic: &str,
    expected: &Expected<'_>,
    transactions: &mut Transactions,
    verdict: &mut Verdict,
) -> Result<Recount> {
    let partitions = source.partitions(topic);
    if partitions != expected.settings.partitions {
        bail!("topic {topic} has {partitions} partitions, and {} were made", expected.settings.partitions);
    }
    let mut recount = Recount::new(expected.settings);
    let end = expected.produced.iter().map(|p| p.from + p.given).max().unwrap_or(0);
    let mut seen = vec![0u8; usize::try_from(end).context("more lines than fit memory")?];
    for partition in 0..partitions {
        source.read(topic, partition, transactions, &mut |record| {
            let value = record.value.as_deref().unwrap_or_default();
            let shown = || String::from_utf8_lossy(value).into_owned();
            verdict.lines += 1;
            match expected.load.number(value).and_then(|n| seen.get_mut(usize::try_from(n).ok()?)) {
                Some(times) => *times = times.saturating_add(1),
                None => verdict.broken(format!(
                    "{topic}-{partition} at {}: not a line that was given: {}",
                    record.offset,
                    shown()
                )),
            }
            let key = value.split(|byte| *byte == b' ').next().unwrap_or_default();
            let at_home = partition_of(key, partitions) == partition;
            if record.key.as_deref() != Some(key) || !at_home {
                verdict.broken(format!(
                    "{topic}-{partition} at {}: key or partition is not that of {}",
                    record.offset,
                    shown()
                ));
            }
            recount.add(value);
            Ok(())
        })?;
    }
    for (n, times) in seen.iter().enumerate().filter(|(_, times)| **times > 1) {
        verdict.duplicated(u64::from(times - 1), || format!("line {n} is in the input {times} times"));
    }
    for produced in expected.produced {
        verdict.acked += produced.acked;
        for n in produced.from..produced.from + produced.acked {
            if seen.get(n as usize).is_none_or(|times| *times == 0) {
                verdict.lost(1, || format!("line {n} was acked and is not in the input"));
            }
        }
    }
    Ok(recount)
}

fn rows(
    source: &impl Source,
    topic: &str,
    expected: &Expected<'_>,
    recount: &Recount,
    transactions: &mut Transactions,
    verdict: &mut Verdict,
) -> Result<()> {
    let mut found: HashMap<Cell, Vec<u64>> = HashMap::new();
    let partitions = source.partitions(topic);
    for partition in 0..partitions {
        source.read(topic, partition, transactions, &mut |record| {
            let value = record.value.as_deref().unwrap_or_default();
            let place = format!("{topic}-{partition} at {}", record.offset);
            let Ok(row) = serde_json::from_slice::<Row>(value) else {
                verdict.broken(format!("{place}: not a row: {}", String::from_utf8_lossy(value)));
                return Ok(());
            };
            verdict.rows += 1;
            let at_home = partition_of(row.ip.as_bytes(), partitions) == partition;
            if record.key.as_deref() != Some(row.ip.as_bytes()) || !at_home {
                verdict.broken(format!("{place}: key or partition is not that of {}", row.ip));
            }
            let end = record.timestamp.saturating_add(1);
            let start = end.saturating_sub(expected.settings.window_ms);
            if utc_text(end) != row.window_end || utc_text(start) != row.window_start {
                verdict.broken(format!("{place}: the record's time is not the last of its window: {row:?}"));
            }
            found.entry((row.window_start, row.ip)).or_default().push(row.count);
            Ok(())
        })?;
    }
    for ((start, ip), want) in &recount.counts {
        let cell = (utc_text(*start), ip.to_string());
        let have = found.remove(&cell).unwrap_or_default();
        let shown = || format!("{} {}: {have:?}, and it is {want}", cell.0, cell.1);
        let (first, again) = have.split_first().map_or((0, 0), |(first, rest)| (*first, rest.iter().sum()));
        if first < *want {
            verdict.lost(want - first, shown);
        }
        let over = first.saturating_sub(*want) + again;
        if over > 0 {
            verdict.duplicated(over, shown);
        }
    }
    for ((start, ip), counts) in found {
        let lines = counts.iter().sum();
        verdict.duplicated(lines, || format!("{start} {ip}: {counts:?}, and there was no such line"));
    }
    Ok(())
}

/// The lines of a topic of copies, which go to the partition they came from.
fn lines(
    source: &impl Source,
    topic: &str,
    expected: &Expected<'_>,
    transactions: &mut Transactions,
    verdict: &mut Verdict,
) -> Result<Lines> {
    let mut found = Lines::new();
    for partition in 0..source.partitions(topic) {
        source.read(topic, partition, transactions, &mut |record| {
            let value = record.value.unwrap_or_default();
            let key = value.split(|byte| *byte == b' ').next().unwrap_or_default();
            if partition_of(key, expected.settings.partitions) != partition {
                let shown = String::from_utf8_lossy(&value);
                verdict.broken(format!("{topic}-{partition} at {}: from elsewhere: {shown}", record.offset));
            }
            *found.entry(value).or_default() += 1;
            Ok(())
        })?;
    }
    Ok(found)
}

fn compare(what: &str, have: &Lines, want: &Lines, verdict: &mut Verdict) {
    let all = want.keys().chain(have.keys().filter(|line| !want.contains_key(*line)));
    for line in all {
        let count = |lines: &Lines| lines.get(line).copied().unwrap_or_default();
        let (have, want) = (count(have), count(want));
        let shown =
            || format!("{what} {have} times, and it is {want} times: {}", String::from_utf8_lossy(line));
        if have < want {
            verdict.lost(want - have, shown);
        } else if have > want {
            verdict.duplicated(have - want, shown);
        }
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
