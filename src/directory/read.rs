//! Readers without futures.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tidemill_adapters::broker::{
    BrokerError, Consumed, Consumer, ConsumerOptions, Event, Isolation, PartitionOffsets, Position,
    TopicPartition,
};

use super::{Directory, DirectoryError};

/// How long [`Reader::read_to_end`] waits for the next part of what is there already.
const READ_WAIT: Duration = Duration::from_secs(60);

/// A record that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its partition.
    pub partition: u32,
    /// Its offset there.
    pub offset: i64,
    /// Milliseconds since 1970 UTC.
    pub timestamp: i64,
    /// The key.
    pub key: Option<Bytes>,
    /// The value.
    pub value: Option<Bytes>,
    /// Headers, in order; names may repeat.
    pub headers: Vec<(String, Option<Bytes>)>,
}

impl Record {
    /// The value as text; what is not UTF-8 in it is replaced, and no value is no text.
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(self.value.as_deref().unwrap_or_default())
    }

    /// The key as text, like [`Record::text`].
    pub fn key_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(self.key.as_deref().unwrap_or_default())
    }
}

/// Where a reader begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// With the first record that is kept.
    Earliest,
    /// Behind the last one there is now.
    Latest,
}

/// Reads a topic from a place on, as records arrive. Dropping it ends it; nobody is told how far it got.
#[derive(Debug)]
pub struct Reader {
    // Before the directory, whose runtime runs its task.
    consumer: Consumer,
    topic: String,
    isolation: Isolation,
    /// Where each partition is read on.
    next: BTreeMap<u32, i64>,
    directory: Directory,
}

impl Directory {
    /// A reader of all partitions of a topic.
    ///
    /// # Errors
    ///
    /// If there is no such topic.
    pub fn reader(
        &self,
        topic: &str,
        start: StartAt,
        isolation: Isolation,
    ) -> Result<Reader, DirectoryError> {
        let described = self.describe(topic)?;
        let place = |offsets: &PartitionOffsets| match start {
            StartAt::Earliest => Position::unchecked(offsets.log_start),
            StartAt::Latest => Position::unchecked(end(offsets, isolation)),
        };
        let positions: Vec<(TopicPartition, Position)> = (0..)
            .zip(&described.offsets)
            .map(|(number, offsets)| (described.topic.partition(number), place(offsets)))
            .collect();
        Ok(self.reader_at(topic, positions, isolation))
    }

    fn reader_at(
        &self,
        topic: &str,
        positions: Vec<(TopicPartition, Position)>,
        isolation: Isolation,
    ) -> Reader {
        let next = positions.iter().map(|(p, position)| (p.partition, position.offset)).collect();
        let options = ConsumerOptions { isolation, ..ConsumerOptions::default() };
        let _runtime = self.inside.runtime.enter();
        let consumer = Consumer::start(self.access().clone(), positions, options);
        Reader { consumer, topic: topic.to_owned(), isolation, next, directory: self.clone() }
    }

    /// Every record of a topic up to its end as it is now: the last stable offset for a reader of committed records,
    /// the high watermark for the other. By partition, in order of offset.
    ///
    /// # Errors
    ///
    /// If there is no such topic, or a partition of it cannot be read.
    pub fn read(&self, topic: &str, isolation: Isolation) -> Result<Vec<Record>, DirectoryError> {
        let mut records = self.reader(topic, StartAt::Earliest, isolation)?.read_to_end()?;
        records.sort_by_key(|record| (record.partition, record.offset));
        Ok(records)
    }

    /// The last record of a partition that a reader sees now; none where it sees none.
    ///
    /// # Errors
    ///
    /// If there is no such topic or partition, or it cannot be read.
    pub fn last(
        &self,
        topic: &str,
        partition: u32,
        isolation: Isolation,
    ) -> Result<Option<Record>, DirectoryError> {
        let described = self.describe(topic)?;
        let Some(offsets) = described.offsets.get(partition as usize) else {
            return Err(BrokerError::UnknownPartition { topic: topic.to_owned(), partition }.into());
        };
        // Markers and aborted records take offsets too, so the last record may be further back than one.
        let (end, mut back) = (end(offsets, isolation), 1);
        loop {
            let start = end.saturating_sub(back).max(offsets.log_start);
            if start >= end {
                return Ok(None);
            }
            let places = vec![(described.topic.partition(partition), Position::unchecked(start))];
            let mut reader = self.reader_at(topic, places, isolation);
            if let Some(record) = reader.read_to(&[(partition, end)].into())?.pop() {
                return Ok(Some(record));
            }
            if start == offsets.log_start {
                return Ok(None);
            }
            back = back.saturating_mul(4);
        }
    }
}

fn end(offsets: &PartitionOffsets, isolation: Isolation) -> i64 {
    match isolation {
        Isolation::ReadCommitted => offsets.last_stable,
        Isolation::ReadUncommitted => offsets.high_watermark,
    }
}

impl Reader {
    /// The next records: those of one partition that came together. Waits at most `wait`, and is empty if there were
    /// none by then. A reader of committed records is given the end of a transaction with its beginning where both fit
    /// in one fetch (a megabyte of a partition).
    ///
    /// # Errors
    ///
    /// If a partition cannot be read any further; the others can still be, by calling again.
    pub fn next(&mut self, wait: Duration) -> Result<Vec<Record>, DirectoryError> {
        let until = Instant::now() + wait;
        loop {
            match self.step(until.saturating_duration_since(Instant::now()))? {
                None => return Ok(Vec::new()),
                // Markers and aborted records only.
                Some(records) if records.is_empty() => {}
                Some(records) => return Ok(records),
            }
        }
    }

    /// All records up to the topic's end as it is now, in the order in which they come: by offset in a partition.
    ///
    /// # Errors
    ///
    /// If a partition cannot be read any further.
    pub fn read_to_end(&mut self) -> Result<Vec<Record>, DirectoryError> {
        let described = self.directory.describe(&self.topic)?;
        let ends = (0..).zip(&described.offsets).map(|(p, offsets)| (p, end(offsets, self.isolation)));
        self.read_to(&ends.collect())
    }

    fn read_to(&mut self, ends: &BTreeMap<u32, i64>) -> Result<Vec<Record>, DirectoryError> {
        let mut records = Vec::new();
        while self.next.iter().any(|(partition, next)| ends.get(partition).is_some_and(|end| next < end)) {
            let Some(more) = self.step(READ_WAIT)? else {
                let what = format!("the rest of {}", self.topic);
                return Err(DirectoryError::Deadline { what, seconds: READ_WAIT });
            };
            records.extend(more);
        }
        Ok(records)
    }

    /// Progress in one partition; none where `wait` passed without any.
    fn step(&mut self, wait: Duration) -> Result<Option<Vec<Record>>, DirectoryError> {
        let until = tokio::time::Instant::now() + wait;
        loop {
            let event = self
                .directory
                .inside
                .runtime
                .block_on(async { tokio::time::timeout_at(until, self.consumer.next()).await });
            match event {
                Err(_) => return Ok(None),
                Ok(None) => {
                    let gone = std::io::Error::other(format!("the reader of {} has ended", self.topic));
                    return Err(DirectoryError::Threads(gone));
                }
                Ok(Some(Ok(Event::Batches(consumed)))) => {
                    self.next.insert(consumed.partition.partition, consumed.next.offset);
                    return Ok(Some(records(&consumed)?));
                }
                Ok(Some(Ok(Event::CaughtUp))) => {}
                Ok(Some(Ok(Event::Failed { partition, at, error }))) => {
                    return Err(DirectoryError::Partition {
                        topic: self.topic.clone(),
                        partition: partition.partition,
                        offset: at.offset,
                        source: error,
                    });
                }
                Ok(Some(Err(error))) => return Err(error.into()),
            }
        }
    }
}

fn records(consumed: &Consumed) -> Result<Vec<Record>, DirectoryError> {
    let mut records = Vec::new();
    for batch in &consumed.batches {
        for record in &batch.open()? {
            let record = record?;
            if record.offset < consumed.from {
                continue;
            }
            // Copied: a record that a program keeps must not keep the whole fetch it came with.
            let headers = record.headers.iter();
            records.push(Record {
                partition: consumed.partition.partition,
                offset: record.offset,
                timestamp: record.timestamp,
                key: record.key.map(Bytes::copy_from_slice),
                value: record.value.map(Bytes::copy_from_slice),
                headers: headers
                    .map(|h| (h.name().into_owned(), h.value.map(Bytes::copy_from_slice)))
                    .collect(),
            });
        }
    }
    Ok(records)
}
