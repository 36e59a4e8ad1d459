//! What the segment files of a topic say, read from the first byte to the last: which records count, and whether the
//! files keep the rules that every reader relies on.
//!
//! ```text
//!   topics/<uuid>/<partition>/*.log ─▶ batches ─▶ plain: counts at once
//!                                                 transactional: kept per producer ─ marker ─▶ counts | is dropped
//! ```
//!
//! Rules, each told as a violation where it is broken:
//!
//! * offsets have no gap and no repeat, within a file and from one to the next; files are as long as the slot says;
//! * sequence numbers of a (producer id, epoch) begin at 0 in a partition and have no gap and no repeat: no batch of an
//!   idempotent producer is there twice, none is missing in between;
//! * leader epochs do not go back;
//! * a transaction, which has a (producer id, epoch) of its own, ended in every partition it wrote to, and in all of
//!   them the same way: none is torn;
//! * after a clean stop no transaction is open.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::batch::{Batch, Marker, Record, decode};
use super::catalog::{self, Topic};

/// A data directory at rest.
#[derive(Debug)]
pub struct Files {
    data: PathBuf,
    topics: BTreeMap<String, Topic>,
}

/// How the transactions seen so far ended, over all topics.
#[derive(Debug, Default)]
pub struct Transactions {
    ended: HashMap<(i64, i16), (Marker, String)>,
    /// Broken rules.
    pub violations: Vec<String>,
}

/// Where a partition's reader is.
#[derive(Debug, Default)]
struct Reading {
    place: String,
    next_offset: i64,
    leader_epoch: i32,
    sequences: HashMap<(i64, i16), i32>,
    open: HashMap<i64, (i16, Vec<Record>)>,
}

impl Files {
    /// Finds the topics.
    ///
    /// # Errors
    ///
    /// If the directory has no whole checkpoint.
    pub fn open(data: &Path) -> Result<Self> {
        Ok(Files { data: data.to_owned(), topics: catalog::read(data)? })
    }

    /// Names of all topics.
    pub fn topics(&self) -> impl Iterator<Item = &str> {
        self.topics.keys().map(String::as_str)
    }

    /// Partitions of a topic; none of one that is not there.
    pub fn partitions(&self, topic: &str) -> u32 {
        self.topics.get(topic).map_or(0, |topic| topic.partitions.len() as u32)
    }

    /// Gives every record of a partition that counts to `each`, in their order.
    ///
    /// # Errors
    ///
    /// If a file cannot be read or does not hold batches.
    pub fn read(
        &self,
        name: &str,
        partition: u32,
        transactions: &mut Transactions,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()> {
        let topic = self.topics.get(name).with_context(|| format!("there is no topic {name}"))?;
        let known = topic.partitions.get(partition as usize).context("no such partition")?;
        let dir = self.data.join("topics").join(&topic.uuid).join(partition.to_string());
        let mut reading = Reading::new(format!("{name}-{partition}"), known.log_start);
        for segment in &known.segments {
            let file = match segment.revision {
                0 => format!("{:020}.log", segment.base),
                revision => format!("{:020}.{revision}.log", segment.base),
            };
            let path = dir.join(file);
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            ensure!(
                bytes.len() as u64 == segment.bytes,
                "{} has {} bytes, and the checkpoint says {}",
                path.display(),
                bytes.len(),
                segment.bytes
            );
            if reading.next_offset != segment.base {
                let (place, next) = (&reading.place, reading.next_offset);
                transactions
                    .violation(format!("{place}: offset {next} is not in the file of {}", segment.base));
            }
            reading.file(&bytes, transactions, each).with_context(|| path.display().to_string())?;
            ensure!(
                reading.next_offset == segment.end,
                "{} ends at {}, and the checkpoint says {}",
                path.display(),
                reading.next_offset,
                segment.end
            );
        }
        ensure!(
            reading.next_offset == known.log_end,
            "{name}-{partition} ends at {}, and the checkpoint says {}",
            reading.next_offset,
            known.log_end
        );
        reading.end(transactions);
        Ok(())
    }
}

impl Transactions {
    /// How many ended by an abort.
    pub fn aborted(&self) -> usize {
        self.ended.values().filter(|(marker, _)| *marker == Marker::Abort).count()
    }

    /// How many ended by a commit.
    pub fn committed(&self) -> usize {
        self.ended.len() - self.aborted()
    }

    fn violation(&mut self, what: String) {
        // A broken file breaks a rule at every batch: the first few say it all.
        if self.violations.len() < 50 {
            self.violations.push(what);
        }
    }
}

impl Reading {
    fn new(place: String, log_start: i64) -> Self {
        Reading { place, next_offset: log_start, leader_epoch: -1, ..Reading::default() }
    }

    /// All batches of one file.
    fn file(
        &mut self,
        mut bytes: &[u8],
        transactions: &mut Transactions,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()> {
        let whole = bytes.len();
        while !bytes.is_empty() {
            let (batch, size) =
                decode(bytes).with_context(|| format!("at byte {} of {whole}", whole - bytes.len()))?;
            bytes = &bytes[size..];
            self.batch(batch, transactions, each)?;
        }
        Ok(())
    }

    fn batch(
        &mut self,
        batch: Batch,
        transactions: &mut Transactions,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()> {
        let place = format!("{} at {}", self.place, batch.base_offset);
        if batch.base_offset != self.next_offset {
            transactions.violation(format!("{place}: the offset before it is {}", self.next_offset - 1));
        }
        if batch.leader_epoch < self.leader_epoch {
            let (new, old) = (batch.leader_epoch, self.leader_epoch);
            transactions.violation(format!("{place}: leader epoch {new} after {old}"));
        }
        (self.next_offset, self.leader_epoch) = (batch.next_offset, batch.leader_epoch);
        let (id, epoch, sequence) = batch.producer;
        if let Some(marker) = batch.marker {
            return self.marker(id, epoch, marker, place, transactions, each);
        }
        if id >= 0 {
            let expected = self.sequences.entry((id, epoch)).or_default();
            if sequence != *expected {
                transactions.violation(format!(
                    "{place}: sequence {sequence} of producer {id} epoch {epoch}, and {expected} comes next"
                ));
            }
            *expected = sequence.wrapping_add(batch.records.len() as i32) & i32::MAX;
        }
        if !batch.transactional {
            return batch.records.into_iter().try_for_each(each);
        }
        let open = self.open.entry(id).or_insert_with(|| (epoch, Vec::new()));
        if open.0 != epoch {
            transactions
                .violation(format!("{place}: epoch {epoch} of producer {id} while {} is open", open.0));
        }
        open.1.extend(batch.records);
        Ok(())
    }

    fn marker(
        &mut self,
        id: i64,
        epoch: i16,
        marker: Marker,
        place: String,
        transactions: &mut Transactions,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()> {
        // A partition that joined the transaction but whose batches were refused has a marker and nothing before it.
        let Some((began, records)) = self.open.remove(&id) else { return Ok(()) };
        if began > epoch {
            transactions
                .violation(format!("{place}: a marker of epoch {epoch} ends epoch {began} of producer {id}"));
        }
        let torn = transactions.ended.get(&(id, began)).filter(|(other, _)| *other != marker).cloned();
        if let Some((other, elsewhere)) = torn {
            transactions.violation(format!(
                "torn: producer {id} epoch {began} has {marker:?} in {place} and {other:?} in {elsewhere}"
            ));
        }
        transactions.ended.entry((id, began)).or_insert((marker, place));
        match marker {
            Marker::Commit => records.into_iter().try_for_each(each),
            Marker::Abort => Ok(()),
        }
    }

    fn end(self, transactions: &mut Transactions) {
        for (id, (epoch, records)) in self.open {
            let (place, n) = (&self.place, records.len());
            transactions.violation(format!(
                "{place}: the transaction of producer {id} epoch {epoch} with {n} records has no end after a clean stop"
            ));
        }
    }
}

/// Partitions in memory, for the tests of the checker.
#[cfg(test)]
pub(super) fn read_bytes(
    place: &str,
    bytes: &[u8],
    transactions: &mut Transactions,
    each: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    let mut reading = Reading::new(place.to_owned(), 0);
    reading.file(bytes, transactions, each)?;
    reading.end(transactions);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::batch::build::Build;
    use super::*;

    /// The values that count in these partitions, and what is wrong with them.
    fn read(partitions: &[&[Build]]) -> (Vec<String>, Vec<String>) {
        let (mut values, mut transactions) = (Vec::new(), Transactions::default());
        for (i, batches) in partitions.iter().enumerate() {
            let bytes: Vec<u8> = batches.iter().flat_map(Build::bytes).collect();
            read_bytes(&format!("p-{i}"), &bytes, &mut transactions, &mut |record| {
                values.push(String::from_utf8(record.value.unwrap()).unwrap());
                Ok(())
            })
            .unwrap();
        }
        (values, transactions.violations)
    }

    fn data(base: i64, producer: (i64, i16, i32), values: &[&str]) -> Build {
        Build { producer, attributes: 0x10, ..Build::new(base, values) }
    }

    #[test]
    fn committed_records_count_at_their_marker_and_aborted_ones_never() {
        let partition = [
            data(0, (1, 0, 0), &["a", "b"]),
            Build::new(2, &["plain"]),
            data(3, (2, 0, 0), &["other"]),
            data(4, (1, 0, 2), &["c"]),
            Build::marker(5, (1, 0), true),
            Build::marker(6, (2, 1), false), // fenced: the marker has the next epoch
            data(7, (1, 1, 0), &["d"]),
            Build::marker(8, (1, 1), true),
        ];
        let (values, violations) = read(&[&partition]);
        assert_eq!(values, ["plain", "a", "b", "c", "d"]);
        assert_eq!(violations, Vec::<String>::new());
    }

    #[test]
    fn each_broken_rule_is_told() {
        let commit = |base| Build::marker(base, (1, 0), true);
        let cases: [(&str, &[&[Build]]); 8] = [
            ("the offset before it", &[&[Build::new(0, &["a"]), Build::new(2, &["b"])]]),
            ("the offset before it", &[&[Build::new(0, &["a"]), Build::new(0, &["a"])]]),
            ("and 0 comes next", &[&[data(0, (1, 0, 1), &["a"]), commit(1)]]),
            ("and 1 comes next", &[&[data(0, (1, 0, 0), &["a"]), data(1, (1, 0, 0), &["a"]), commit(2)]]),
            (
                "leader epoch 0 after 1",
                &[&[Build::new(0, &["a"]), Build { leader_epoch: 0, ..Build::new(1, &["b"]) }]],
            ),
            (
                "torn",
                &[
                    &[data(0, (1, 0, 0), &["a"]), commit(1)],
                    &[data(0, (1, 0, 0), &["b"]), Build::marker(1, (1, 1), false)],
                ],
            ),
            ("has no end", &[&[data(0, (1, 0, 0), &["a"])]]),
            ("while 0 is open", &[&[data(0, (1, 0, 0), &["a"]), data(1, (1, 1, 0), &["b"]), commit(2)]]),
        ];
        for (says, partitions) in cases {
            let (_, violations) = read(partitions);
            assert!(violations.iter().any(|v| v.contains(says)), "{says}: {violations:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_batch_are_an_error() {
        let mut bytes = Build::new(0, &["a"]).bytes();
        bytes.push(0);
        let error =
            read_bytes("p", &bytes, &mut Transactions::default(), &mut |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("at byte"), "{error}");
    }
}
