//! The corpus: one good history, and every way we know to spoil it. A checker that cannot fail proves nothing.

use std::collections::BTreeMap;

use super::super::batch::build::{Build, Made};
use super::super::history::read_bytes;
use super::*;

const SETTINGS: Settings = Settings { partitions: 2, window_ms: 1_000, bound_ms: 3_000 };
const LOAD: Load = Load { seed: 5, addresses: 20, event_rate: 50, bound_ms: 3_000 };
const TOPICS: Topics<'static> = Topics { input: "in", output: "out", late: "late", dead: "dead" };
const LINES: u64 = 2_000;

/// Partitions as lists of batches, which a test can spoil before they become bytes.
#[derive(Clone, Default)]
struct History(BTreeMap<&'static str, Vec<Vec<Build>>>);

impl Source for History {
    fn partitions(&self, topic: &str) -> u32 {
        self.0.get(topic).map_or(0, |partitions| partitions.len() as u32)
    }

    fn read(
        &self,
        topic: &str,
        partition: u32,
        transactions: &mut Transactions,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()> {
        let batches = self.0[topic][partition as usize].iter().filter(|build| !build.records.is_empty());
        let bytes: Vec<u8> = batches.flat_map(Build::bytes).collect();
        read_bytes(&format!("{topic}-{partition}"), &bytes, transactions, each)
    }
}

fn key_of(line: &str) -> &str {
    line.split(' ').next().unwrap_or_default()
}

fn copy(line: &str) -> (u32, Made) {
    let key = key_of(line);
    (partition_of(key.as_bytes(), 2), (Some(key.into()), Some(line.into()), 5))
}

impl History {
    /// What an exact job leaves of the first lines: the input plain, the output in one transaction of producer 7.
    fn good() -> Self {
        let lines: Vec<String> = (0..LINES).map(|n| LOAD.line(n)).collect();
        let mut recount = Recount::new(SETTINGS);
        lines.iter().for_each(|line| recount.add(line.as_bytes()));
        assert!(!recount.late.is_empty() && !recount.dead.is_empty());
        let mut history = History::default();
        history.put("in", None, lines.iter().map(|line| copy(line)));
        let mut rows: Vec<_> = recount.counts.iter().collect();
        rows.sort_unstable();
        let rows = rows.into_iter().map(|((start, ip), count)| row(*start, &ip.to_string(), *count));
        history.put("out", Some((7, 0)), rows);
        for (topic, set) in [("late", &recount.late), ("dead", &recount.dead)] {
            let mut copies: Vec<_> =
                set.keys().map(|line| String::from_utf8(line.clone()).unwrap()).collect();
            copies.sort_unstable();
            history.put(topic, Some((7, 0)), copies.iter().map(|line| copy(line)));
        }
        history
    }

    fn put(
        &mut self,
        topic: &'static str,
        transaction: Option<(i64, i16)>,
        records: impl Iterator<Item = (u32, Made)>,
    ) {
        let mut partitions = vec![Vec::new(); 2];
        records.for_each(|(partition, record)| partitions[partition as usize].push(record));
        let partitions = partitions.into_iter().map(|records| {
            let end = records.len() as i64;
            if records.is_empty() {
                return Vec::new();
            }
            let (id, epoch) = transaction.unwrap_or((1, 0));
            let attributes = if transaction.is_some() { 0x10 } else { 3 };
            let build = Build { records, attributes, producer: (id, epoch, 0), ..Build::new(0, &[]) };
            let marker = transaction.map(|producer| Build::marker(end, producer, true));
            [build].into_iter().chain(marker).collect()
        });
        self.0.insert(topic, partitions.collect());
    }

    /// The first batch of a partition.
    fn batch(&mut self, topic: &str, partition: usize) -> &mut Build {
        &mut self.0.get_mut(topic).unwrap()[partition][0]
    }

    /// Moves what follows the first batch to where it belongs after that changed its length.
    fn settle(&mut self) {
        for partition in self.0.values_mut().flatten() {
            let mut next = 0;
            for build in partition {
                build.base_offset = next;
                next += build.records.len() as i64;
            }
        }
    }

    fn check(&self) -> Verdict {
        let produced = [Produced { from: 0, acked: LINES - 10, given: LINES }];
        check(self, TOPICS, &Expected { settings: SETTINGS, load: LOAD, produced: &produced })
    }
}

fn row(start: i64, ip: &str, count: u64) -> (u32, Made) {
    let (from, to) = (utc_text(start), utc_text(start + 1_000));
    let value =
        format!("{{\"window_start\":\"{from}\",\"window_end\":\"{to}\",\"ip\":\"{ip}\",\"count\":{count}}}");
    (partition_of(ip.as_bytes(), 2), (Some(ip.into()), Some(value.into()), start + 999))
}

#[test]
fn a_good_history_is_exact() {
    let verdict = History::good().check();
    assert!(verdict.is_exact(), "{verdict:?}");
    assert_eq!((verdict.lines, verdict.acked), (LINES, LINES - 10));
    assert!(verdict.rows > 500 && verdict.late > 0 && verdict.dead > 0);
    assert_eq!(verdict.transactions, (1, 0));
}

/// What a spoiled history must be called.
enum Told {
    Lost,
    Duplicated,
    Broken(&'static str),
}

#[test]
fn every_bad_history_is_rejected() {
    type Spoil = fn(&mut History);
    let corpus: [(&str, Told, Spoil); 18] = [
        ("a row is lost", Told::Lost, |h| drop(h.batch("out", 0).records.remove(3))),
        ("a row is there twice", Told::Duplicated, |h| {
            let again = h.batch("out", 0).records[3].clone();
            h.batch("out", 0).records.push(again);
        }),
        ("a row counts one too few", Told::Lost, |h| recount_row(h, |count| count - 1)),
        ("a row counts one too many", Told::Duplicated, |h| recount_row(h, |count| count + 1)),
        ("a row for nothing", Told::Duplicated, |h| {
            let (partition, record) = row(86_400_000, "10.0.0.1", 1);
            h.batch("out", partition as usize).records.push(record);
        }),
        ("a row in the wrong partition", Told::Broken("key or partition"), |h| {
            let moved = h.batch("out", 0).records.remove(3);
            h.batch("out", 1).records.push(moved);
        }),
        ("a row of another window", Told::Broken("last of its window"), |h| {
            h.batch("out", 0).records[3].2 += 1_000;
            h.batch("out", 0).attributes = 0x10;
        }),
        ("rows of an aborted transaction only", Told::Lost, |h| {
            for (_, topic) in h.0.iter_mut().filter(|(name, _)| **name != "in") {
                for partition in topic.iter_mut().filter(|partition| !partition.is_empty()) {
                    *partition.last_mut().unwrap() = Build::marker(0, (7, 0), false);
                }
            }
        }),
        ("a transaction that ended in one partition only", Told::Broken("has no end"), |h| {
            drop(h.0.get_mut("out").unwrap()[1].pop());
        }),
        ("a torn transaction", Told::Broken("torn"), |h| {
            *h.0.get_mut("late").unwrap()[0].last_mut().unwrap() = Build::marker(0, (7, 0), false);
        }),
        ("a late line is lost", Told::Lost, |h| drop(h.batch("late", 0).records.remove(0))),
        ("a late line is there twice", Told::Duplicated, |h| {
            let again = h.batch("late", 0).records[0].clone();
            h.batch("late", 0).records.push(again);
        }),
        ("a dead letter is lost", Told::Lost, |h| {
            let partition = usize::from(h.0["dead"][0].is_empty());
            h.batch("dead", partition).records.remove(0);
        }),
        ("an acked line is not in the input", Told::Lost, |h| drop(h.batch("in", 0).records.remove(50))),
        ("a line is in the input twice", Told::Duplicated, |h| {
            let again = h.batch("in", 0).records[50].clone();
            h.batch("in", 0).records.push(again);
        }),
        ("a line nobody gave is in the input", Told::Broken("not a line that was given"), |h| {
            h.batch("in", 0).records[50].1 = Some(b"10.0.0.1 something else".to_vec());
        }),
        ("a batch is there twice", Told::Broken("comes next"), |h| {
            let again = h.batch("in", 0).clone();
            h.0.get_mut("in").unwrap()[0].push(again);
        }),
        ("a batch that cannot be decoded", Told::Broken("cannot be read: at byte"), |h| {
            h.batch("out", 1).attributes |= 2;
        }),
    ];
    for (name, told, spoil) in corpus {
        let mut history = History::good();
        spoil(&mut history);
        history.settle();
        let verdict = history.check();
        assert!(!verdict.is_exact(), "{name}: {verdict:?}");
        match told {
            Told::Lost => assert!(verdict.lost > 0, "{name}: {verdict:?}"),
            Told::Duplicated => assert!(verdict.duplicated > 0, "{name}: {verdict:?}"),
            Told::Broken(says) => {
                assert!(verdict.broken.iter().any(|what| what.contains(says)), "{name}: {verdict:?}");
            }
        }
    }
}

/// Changes the count of the first row that counts more than one line.
fn recount_row(history: &mut History, change: impl Fn(u64) -> u64) {
    let records = &mut history.batch("out", 0).records;
    for (_, value, _) in records {
        let text = String::from_utf8(value.clone().unwrap()).unwrap();
        let (front, count) = text.trim_end_matches('}').rsplit_once(':').unwrap();
        let count: u64 = count.parse().unwrap();
        if count > 1 {
            *value = Some(format!("{front}:{}}}", change(count)).into_bytes());
            return;
        }
    }
    panic!("no row counts more than one line");
}

/// A row that an aborted transaction had and a later one has again is no duplicate.
#[test]
fn what_was_aborted_and_written_again_is_exact() {
    let mut history = History::good();
    for (_, topic) in history.0.iter_mut().filter(|(name, _)| **name != "in") {
        for partition in topic.iter_mut().filter(|partition| !partition.is_empty()) {
            let aborted = partition[0].clone();
            partition[0].producer = (7, 1, 0);
            *partition.last_mut().unwrap() = Build::marker(0, (7, 1), true);
            partition.splice(0..0, [aborted, Build::marker(0, (7, 1), false)]);
        }
    }
    history.settle();
    let verdict = history.check();
    assert!(verdict.is_exact(), "{verdict:?}");
    assert_eq!(verdict.transactions, (1, 1));
}
