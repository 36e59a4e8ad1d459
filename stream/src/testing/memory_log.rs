//! A log in memory, with transactions, fencing and positions: what the test driver runs on.
//!
//! A transaction's records are kept aside and appended in one step when it commits, followed by a marker that takes an
//! offset as in a real log. Nothing of it is visible before. How the next end answers can be chosen ([`EndFate`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::fault::{self, Fault};
use crate::io::{
    Cleanup, CommittedOffset, End, Ended, Fetched, Fetching, Input, Log, LogError, NewTopic, OffsetCommit,
    PartitionEnds, Position, TopicId, TopicInfo, TopicUuid, Transactions,
};
use crate::record::{OutRecord, RecordBatch, RecordParts};

/// What becomes of the next transaction that is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EndFate {
    /// It commits.
    #[default]
    Commit,
    /// It was aborted meanwhile.
    Abort,
    /// It commits, but the answer is lost; the next call tells.
    CommitUnknown,
    /// It is aborted, and the answer is lost; the next call tells.
    AbortUnknown,
}

#[derive(Clone, Debug, Default)]
struct Partition {
    /// `None` is a marker.
    slots: Vec<Option<OutRecord>>,
    log_start: i64,
    /// Leader epochs, each with its first offset.
    epochs: Vec<(i32, i64)>,
}

impl Partition {
    fn end(&self) -> i64 {
        self.slots.len() as i64
    }

    /// The place before the record at `offset`.
    fn position(&self, offset: i64) -> Position {
        let before = self.epochs.iter().rev().find(|(_, first)| *first < offset);
        Position { leader_epoch: before.map_or(0, |(epoch, _)| *epoch), offset }
    }

    fn holds(&self, position: Position) -> bool {
        let Position { leader_epoch, offset } = position;
        if leader_epoch == Position::UNCHECKED || offset == 0 {
            return offset <= self.end();
        }
        let known = self.epochs.iter().position(|(epoch, _)| *epoch == leader_epoch);
        let end_of = |at: usize| self.epochs.get(at + 1).map_or(self.end(), |(_, first)| *first);
        known.is_some_and(|at| offset <= end_of(at))
    }
}

#[derive(Clone, Debug)]
struct TopicData {
    info: TopicInfo,
    cleanup: Cleanup,
    partitions: Vec<Partition>,
}

#[derive(Clone, Debug, Default)]
struct Inside {
    topics: BTreeMap<String, TopicData>,
    created: u128,
    offsets: BTreeMap<(String, String, u32), CommittedOffset>,
    fences: BTreeMap<String, u64>,
    fate: EndFate,
    commits: u64,
    /// The leader epoch of what is appended now.
    epoch: i32,
}

/// What a [`MemoryLog`] held at one moment.
#[derive(Clone, Debug)]
pub struct MemoryLogCopy(Inside);

/// The log. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryLog(Arc<Mutex<Inside>>);

impl Inside {
    fn partition(&self, topic: &TopicId, partition: u32) -> Result<&Partition, LogError> {
        let gone = || LogError::NoSuchTopic { topic: topic.name.to_string() };
        let data = self.topics.get(&*topic.name).filter(|t| t.info.id.uuid == topic.uuid).ok_or_else(gone)?;
        data.partitions.get(partition as usize).ok_or_else(gone)
    }

    fn append(&mut self, topic: &str, partition: u32, slot: Option<OutRecord>) -> i64 {
        let topic = self.topics.get_mut(topic).expect("the topic is there");
        let partition = &mut topic.partitions[partition as usize];
        let at = partition.end();
        if partition.epochs.last().is_none_or(|(epoch, _)| *epoch < self.epoch) {
            partition.epochs.push((self.epoch, at));
        }
        partition.slots.push(slot);
        at
    }
}

impl MemoryLog {
    /// Appends a record outside any transaction. Makes no topic.
    ///
    /// # Panics
    ///
    /// If topic or partition are not there.
    pub fn append(&self, topic: &str, partition: u32, record: OutRecord) -> i64 {
        self.0.lock().append(topic, partition, Some(record))
    }

    /// All committed records of a topic: partition, offset, record.
    pub fn records(&self, topic: &str) -> Vec<(u32, i64, OutRecord)> {
        let inside = self.0.lock();
        let partitions = inside.topics.get(topic).map_or(&[][..], |t| &t.partitions);
        let of = |(p, partition): (usize, &Partition)| -> Vec<_> {
            let slots = partition.slots.iter().enumerate();
            slots.filter_map(|(o, r)| Some((p as u32, o as i64, r.clone()?))).collect()
        };
        partitions.iter().enumerate().flat_map(of).collect()
    }

    /// Adds a partition to a topic.
    ///
    /// # Panics
    ///
    /// If the topic is not there.
    pub fn add_partition(&self, topic: &str) {
        let mut inside = self.0.lock();
        let topic = inside.topics.get_mut(topic).expect("the topic is there");
        topic.partitions.push(Partition::default());
        topic.info.partitions += 1;
    }

    /// Deletes a topic. One made again under its name is another incarnation.
    pub fn delete_topic(&self, topic: &str) {
        self.0.lock().topics.remove(topic);
    }

    /// Drops what is before `log_start` for readers.
    ///
    /// # Panics
    ///
    /// If topic or partition are not there.
    pub fn trim(&self, topic: &str, partition: u32, log_start: i64) {
        let mut inside = self.0.lock();
        let topic = inside.topics.get_mut(topic).expect("the topic is there");
        let start = &mut topic.partitions[partition as usize].log_start;
        *start = log_start.max(*start);
    }

    /// Chooses what becomes of the next transaction that is ended.
    pub fn next_end(&self, fate: EndFate) {
        self.0.lock().fate = fate;
    }

    /// A copy of everything.
    pub fn copy(&self) -> MemoryLogCopy {
        MemoryLogCopy(self.0.lock().clone())
    }

    /// The log loses what was appended since `copy` was taken of it, offsets of groups included. What is appended from
    /// now on has another leader epoch. Who fenced whom is not forgotten.
    pub fn lose_since(&self, copy: &MemoryLogCopy) {
        let mut inside = self.0.lock();
        let (fences, epoch) = (std::mem::take(&mut inside.fences), inside.epoch + 1);
        *inside = Inside { fences, epoch, ..copy.0.clone() };
    }

    /// Number of records and markers, over all topics.
    pub fn size(&self) -> usize {
        let inside = self.0.lock();
        inside.topics.values().flat_map(|t| &t.partitions).map(|p| p.slots.len()).sum()
    }

    /// Number of transactions that committed.
    pub fn commits(&self) -> u64 {
        self.0.lock().commits
    }

    /// Offsets that a group committed, by topic and partition.
    pub fn group(&self, group: &str) -> Vec<CommittedOffset> {
        let inside = self.0.lock();
        inside.offsets.iter().filter(|((g, _, _), _)| g == group).map(|(_, c)| c.clone()).collect()
    }
}

impl Log for MemoryLog {
    fn topic(&self, name: &str) -> Result<Option<TopicInfo>, LogError> {
        Ok(self.0.lock().topics.get(name).map(|t| t.info.clone()))
    }

    fn create_topic(&self, new: &NewTopic) -> Result<TopicInfo, LogError> {
        let mut inside = self.0.lock();
        if let Some(there) = inside.topics.get(&new.name) {
            return Ok(there.info.clone());
        }
        inside.created += 1;
        let id = TopicId { name: new.name.as_str().into(), uuid: TopicUuid(inside.created) };
        let info = TopicInfo { id, partitions: new.partitions };
        let partitions = (0..new.partitions).map(|_| Partition::default()).collect();
        let data = TopicData { info: info.clone(), cleanup: new.cleanup, partitions };
        inside.topics.insert(new.name.clone(), data);
        Ok(info)
    }

    fn ends(&self, topic: &TopicId, partition: u32) -> Result<PartitionEnds, LogError> {
        let inside = self.0.lock();
        let partition = inside.partition(topic, partition)?;
        let end = partition.end();
        Ok(PartitionEnds {
            log_start: partition.log_start,
            high_watermark: end,
            last_stable: end,
            end: partition.position(end),
        })
    }

    fn holds(&self, topic: &TopicId, partition: u32, position: Position) -> Result<bool, LogError> {
        let inside = self.0.lock();
        Ok(inside.partition(topic, partition)?.holds(position))
    }

    fn read(
        &self,
        topic: &TopicId,
        partition: u32,
        from: Position,
        bytes_max: usize,
    ) -> Result<Fetched, LogError> {
        let inside = self.0.lock();
        let data = inside.partition(topic, partition)?;
        let lost =
            || LogError::PositionLost { topic: topic.name.to_string(), partition, offset: from.offset };
        if from.offset < data.log_start || from.offset > data.slots.len() as i64 {
            return Err(lost());
        }
        let (mut offset, mut bytes) = (from.offset as usize, 0);
        let mut batches: Vec<RecordBatch> = Vec::new();
        while offset < data.slots.len() && bytes < bytes_max {
            let run = data.slots[offset..].iter().take_while(|s| {
                let more = bytes < bytes_max;
                bytes += s.as_ref().map_or(0, OutRecord::bytes);
                more && s.is_some()
            });
            let records: Vec<_> = run.flatten().map(OutRecord::parts).collect();
            if records.is_empty() {
                offset += 1;
            } else {
                let base = offset as i64;
                offset += records.len();
                batches.push(RecordBatch::copied(base, records));
            }
        }
        let next = data.position(offset as i64);
        Ok(Fetched { partition, batches, next, caught_up: offset == data.slots.len() })
    }

    fn input(&self, topic: &TopicId, partitions: &[(u32, Position)]) -> Result<Box<dyn Input>, LogError> {
        let partitions = partitions.iter().map(|(p, at)| (*p, *at, Fetching::On)).collect();
        Ok(Box::new(MemoryInput { log: self.clone(), topic: topic.clone(), partitions }))
    }

    fn fence(&self, identity: &str) -> Result<Box<dyn Transactions>, LogError> {
        let mut inside = self.0.lock();
        let fence = inside.fences.entry(identity.to_owned()).or_default();
        *fence += 1;
        Ok(Box::new(MemoryTransactions {
            log: self.clone(),
            identity: identity.to_owned(),
            fence: *fence,
            records: Vec::new(),
            offsets: Vec::new(),
            unanswered: None,
        }))
    }

    fn committed(&self, group: &str) -> Result<Vec<CommittedOffset>, LogError> {
        Ok(self.group(group))
    }
}

struct MemoryInput {
    log: MemoryLog,
    topic: TopicId,
    partitions: Vec<(u32, Position, Fetching)>,
}

impl Input for MemoryInput {
    fn poll(&mut self, wait: Duration, bytes_max: usize) -> Result<Vec<Fetched>, LogError> {
        let mut all = Vec::new();
        for (partition, at, _) in self.partitions.iter_mut().filter(|p| p.2 == Fetching::On) {
            let fetched = self.log.read(&self.topic, *partition, *at, bytes_max)?;
            *at = fetched.next;
            all.push(fetched);
        }
        let data = |f: &Fetched| !f.batches.is_empty();
        if all.iter().any(data) {
            all.retain(data);
        } else {
            // The threads runtime runs on this log too: a wait in vain takes its time there.
            std::thread::park_timeout(wait);
        }
        Ok(all)
    }

    fn pause(&mut self, partition: u32, fetching: Fetching) {
        for p in self.partitions.iter_mut().filter(|p| p.0 == partition) {
            p.2 = fetching;
        }
    }
}

struct MemoryTransactions {
    log: MemoryLog,
    identity: String,
    fence: u64,
    records: Vec<(TopicId, u32, OutRecord)>,
    offsets: Vec<(String, OffsetCommit)>,
    unanswered: Option<Ended>,
}

impl MemoryTransactions {
    fn check(&self, inside: &Inside) -> Result<(), LogError> {
        if inside.fences.get(&self.identity) == Some(&self.fence) {
            Ok(())
        } else {
            Err(LogError::Fenced { identity: self.identity.clone() })
        }
    }

    fn commit_offset(inside: &mut Inside, group: String, commit: &OffsetCommit) {
        let key = (group, commit.topic.name.to_string(), commit.partition);
        let OffsetCommit { topic, partition, position, metadata } = commit.clone();
        inside.offsets.insert(key, CommittedOffset { topic, partition, position, metadata });
    }
}

fn copied(r: RecordParts<'_>) -> OutRecord {
    let part = |part: Option<&[u8]>| part.map(|p| p.to_vec().into());
    OutRecord { timestamp: r.timestamp, key: part(r.key), value: part(r.value), headers: r.headers.to_vec() }
}

impl Transactions for MemoryTransactions {
    fn send(
        &mut self,
        topic: &TopicId,
        partition: u32,
        records: &mut dyn Iterator<Item = RecordParts<'_>>,
    ) -> Result<(), LogError> {
        let log = self.log.clone();
        let inside = log.0.lock();
        self.check(&inside)?;
        inside.partition(topic, partition)?;
        self.records.extend(records.map(|r| (topic.clone(), partition, copied(r))));
        Ok(())
    }

    fn send_outside(
        &mut self,
        topic: &TopicId,
        partition: u32,
        records: &mut dyn Iterator<Item = RecordParts<'_>>,
    ) -> Result<(), LogError> {
        let mut inside = self.log.0.lock();
        inside.partition(topic, partition)?;
        for r in records {
            inside.append(&topic.name, partition, Some(copied(r)));
        }
        Ok(())
    }

    fn offsets(&mut self, group: &str, offsets: &[OffsetCommit]) -> Result<(), LogError> {
        let mut inside = self.log.0.lock();
        self.check(&inside)?;
        for commit in offsets {
            if fault::active(Fault::OffsetsOutside) {
                Self::commit_offset(&mut inside, group.to_owned(), commit);
            } else {
                self.offsets.push((group.to_owned(), commit.clone()));
            }
        }
        Ok(())
    }

    fn end(&mut self, how: End) -> Result<Ended, LogError> {
        let mut inside = self.log.0.lock();
        self.check(&inside)?;
        if let Some(outcome) = self.unanswered.take() {
            return Ok(outcome);
        }
        let fate = std::mem::take(&mut inside.fate);
        let commit = how == End::Commit && matches!(fate, EndFate::Commit | EndFate::CommitUnknown);
        let (records, offsets) = (std::mem::take(&mut self.records), std::mem::take(&mut self.offsets));
        let outcome = if commit {
            inside.commits += 1;
            let mut touched: BTreeMap<(TopicId, u32), i64> = BTreeMap::new();
            for (topic, partition, record) in records {
                let offset = inside.append(&topic.name, partition, Some(record));
                touched.insert((topic, partition), offset + 1);
            }
            for (group, commit) in &offsets {
                Self::commit_offset(&mut inside, group.clone(), commit);
            }
            for (topic, partition) in touched.keys() {
                inside.append(&topic.name, *partition, None);
            }
            let behind = |((topic, partition), offset): ((TopicId, u32), i64)| {
                let position =
                    inside.partition(&topic, partition).expect("it was appended to").position(offset);
                (topic, partition, position)
            };
            Ended::Committed(touched.into_iter().map(behind).collect())
        } else {
            Ended::Aborted
        };
        if matches!(fate, EndFate::CommitUnknown | EndFate::AbortUnknown) {
            self.unanswered = Some(outcome);
            return Ok(Ended::Unknown);
        }
        Ok(outcome)
    }
}

impl MemoryLog {
    /// Whether the topic is compacted.
    pub fn is_compacted(&self, topic: &str) -> bool {
        self.0.lock().topics.get(topic).is_some_and(|t| t.cleanup == Cleanup::Compact)
    }
}
