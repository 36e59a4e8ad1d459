//! A small workload over every kind of request, what it may rely on, and the check of a directory against that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tidemill_log::batch::{
    BatchBuilder, BatchOptions, Batches, Compression, OpenBatch, ProducerStamp, RecordParts,
};
use tidemill_log::fs::sim::SimFs;
use tidemill_log::{
    AddOffsets, Config, Connection, Corruption, Create, EndTxn, InitProducer, Isolation, Log, NewTopic,
    OffsetCommit, OpenError, Outcome, Position, Producer, ReadError, TopicPartition, WriteError,
};

/// Far beyond what any step takes; a test that reaches it has found a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
const GROUP: &str = "group";
const TRANSACTIONAL_ID: &str = "job";
/// Partitions of the workload: (topic, partition).
pub(crate) const PARTITIONS: [(&str, u32); 3] = [("a", 0), ("a", 1), ("b", 0)];

/// What became of a request, as its client knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Asked; no answer yet, or none that tells.
    Unknown,
    Done,
    /// Refused: it has not happened.
    Refused,
}

#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) partition: usize,
    pub(crate) value: String,
    pub(crate) fate: Fate,
    pub(crate) offset: Option<i64>,
    pub(crate) txn: Option<usize>,
}

#[derive(Debug, Clone)]
pub(crate) struct Txn {
    pub(crate) end: Option<(Outcome, Fate)>,
    /// What it commits for the group.
    pub(crate) position: i64,
    pub(crate) offsets: Fate,
}

/// What the client sent and was told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ghost {
    pub(crate) topics: Vec<(String, Fate)>,
    pub(crate) sent: Vec<Sent>,
    pub(crate) txns: Vec<Txn>,
}

pub(crate) type SharedGhost = Arc<Mutex<Ghost>>;

pub(crate) fn config() -> Config {
    Config {
        create: Create::IfMissing,
        seed: Some(7),
        journal_file_bytes: 64 << 10,
        journal_files_max: 4,
        ..Config::default()
    }
}

pub(crate) fn open(fs: &SimFs) -> Result<Log, OpenError> {
    Log::open(Arc::new(fs.clone()), config())
}

/// What a refused or unanswered request means for a client: did it certainly not happen?
fn fate<T>(result: &Result<T, WriteError>) -> Fate {
    match result {
        Ok(_) => Fate::Done,
        Err(
            WriteError::Busy
            | WriteError::DiskFull { .. }
            | WriteError::Refused(_)
            | WriteError::Fenced { .. },
        ) => Fate::Refused,
        Err(WriteError::Damaged(_)) => Fate::Refused,
        Err(WriteError::Stopped(_)) => Fate::Unknown,
        Err(WriteError::Deadline) => panic!("no answer within the deadline"),
    }
}

/// A client that runs the workload and keeps the ghost.
pub(crate) struct Client<'a> {
    pub(crate) log: &'a Log,
    pub(crate) ghost: &'a SharedGhost,
    producer: Option<Producer>,
    sequences: BTreeMap<(i64, i16, usize), i32>,
    next: usize,
}

/// The log stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stop;

impl<'a> Client<'a> {
    pub(crate) fn new(log: &'a Log, ghost: &'a SharedGhost) -> Self {
        let next = ghost.lock().sent.len();
        Self { log, ghost, producer: None, sequences: BTreeMap::new(), next }
    }

    fn answered<T>(&self, result: Result<T, WriteError>) -> Result<Option<T>, Stop> {
        match (fate(&result), result) {
            (Fate::Unknown, _) => Err(Stop),
            (_, result) => Ok(result.ok()),
        }
    }

    pub(crate) fn partition(&self, i: usize) -> Option<TopicPartition> {
        let (name, partition) = PARTITIONS[i];
        self.log.topic(name).map(|t| TopicPartition { topic: t.uuid, partition })
    }

    pub(crate) fn topics(&self) -> Result<(), Stop> {
        for (name, partitions) in [("a", 2), ("b", 1)] {
            if self.log.topic(name).is_some() {
                continue;
            }
            self.ghost.lock().topics.push((name.to_owned(), Fate::Unknown));
            let topic = NewTopic { segment_bytes_max: 3000, ..NewTopic::new(name, partitions) };
            let result = self.log.create_topic(topic).wait(DEADLINE);
            self.ghost.lock().topics.last_mut().unwrap().1 = fate(&result);
            self.answered(result)?;
        }
        Ok(())
    }

    fn append(&mut self, i: usize, records: usize, txn: Option<usize>) -> Result<(), Stop> {
        let (Some(to), Some(producer)) = (self.partition(i), self.producer) else { return Ok(()) };
        let compression = if self.next % 3 == 2 { Compression::Lz4 } else { Compression::None };
        let options = BatchOptions { compression, transactional: txn.is_some(), ..BatchOptions::default() };
        let mut builder = BatchBuilder::new(options);
        let first = self.ghost.lock().sent.len();
        for _ in 0..records {
            let value = format!("{:04} {}", self.next, "x".repeat(self.next * 37 % 500));
            self.next += 1;
            let record =
                RecordParts { timestamp: 5, value: Some(value.as_bytes()), ..RecordParts::default() };
            assert!(builder.push(record));
            self.ghost.lock().sent.push(Sent { partition: i, value, fate: Fate::Unknown, offset: None, txn });
        }
        let sequence = self.sequences.entry((producer.id, producer.epoch, i)).or_default();
        let batch =
            builder.build(ProducerStamp { id: producer.id, epoch: producer.epoch, sequence: *sequence });
        let result = self.log.append(to, batch, Connection::LOCAL).wait(DEADLINE);
        {
            let mut ghost = self.ghost.lock();
            for (sent, i) in ghost.sent[first..].iter_mut().zip(0..) {
                sent.fate = fate(&result);
                sent.offset = result.as_ref().ok().map(|a| a.base_offset + i);
            }
        }
        if result.is_ok() {
            *sequence += records as i32;
        }
        if let Err(error @ (WriteError::Refused(_) | WriteError::Fenced { .. })) = &result {
            panic!("a correct request was refused: {error}");
        }
        self.answered(result).map(|_| ())
    }

    fn init(&mut self, transactional_id: Option<&str>) -> Result<(), Stop> {
        let init = InitProducer {
            transactional_id: transactional_id.map(str::to_owned),
            local: true,
            timeout_ms: 60_000,
            carried: None,
        };
        self.producer = self.answered(self.log.init_producer(init).wait(DEADLINE))?;
        Ok(())
    }

    pub(crate) fn plain(&mut self, appends: usize) -> Result<(), Stop> {
        self.init(None)?;
        for i in 0..appends {
            self.append(i % 3, 1 + i % 4, None)?;
        }
        Ok(())
    }

    pub(crate) fn transaction(&mut self, outcome: Outcome) -> Result<(), Stop> {
        self.init(Some(TRANSACTIONAL_ID))?;
        let Some(producer) = self.producer else { return Ok(()) };
        let txn = {
            let mut ghost = self.ghost.lock();
            let position = ghost.txns.len() as i64 + 1;
            ghost.txns.push(Txn { end: None, position, offsets: Fate::Unknown });
            ghost.txns.len() - 1
        };
        self.append(0, 2, Some(txn))?;
        self.append(2, 1, Some(txn))?;
        let Some(partition) = self.partition(0) else { return Ok(()) };
        let position = Position::unchecked(self.ghost.lock().txns[txn].position);
        let add = AddOffsets {
            producer,
            group: GROUP.into(),
            offsets: vec![OffsetCommit { partition, position, metadata: Bytes::from_static(b"m") }],
            guard: None,
            connection: Connection::LOCAL,
        };
        let result = self.log.add_offsets(add).wait(DEADLINE);
        self.ghost.lock().txns[txn].offsets = fate(&result);
        self.answered(result)?;
        let refused = self.ghost.lock().sent.iter().any(|s| s.txn == Some(txn) && s.fate == Fate::Refused);
        let outcome = if refused { Outcome::Aborted } else { outcome };
        self.ghost.lock().txns[txn].end = Some((outcome, Fate::Unknown));
        let end = EndTxn {
            transactional_id: TRANSACTIONAL_ID.into(),
            producer,
            outcome,
            connection: Connection::LOCAL,
        };
        let result = self.log.end_transaction(end).wait(DEADLINE);
        self.ghost.lock().txns[txn].end = Some((outcome, fate(&result)));
        self.answered(result)?;
        Ok(())
    }

    pub(crate) fn transaction_left_open(&mut self) -> Result<(), Stop> {
        self.init(Some(TRANSACTIONAL_ID))?;
        let txn = {
            let mut ghost = self.ghost.lock();
            let position = ghost.txns.len() as i64 + 1;
            ghost.txns.push(Txn { end: None, position, offsets: Fate::Unknown });
            ghost.txns.len() - 1
        };
        self.append(0, 3, Some(txn))
    }

    /// Every kind of request, segments that roll, more than one journal file.
    pub(crate) fn scenario(&mut self) -> Result<(), Stop> {
        self.topics()?;
        self.plain(8)?;
        self.transaction(Outcome::Committed)?;
        self.log.checkpoint();
        self.plain(6)?;
        self.transaction(Outcome::Aborted)?;
        self.transaction(Outcome::Committed)?;
        self.plain(10)?;
        Ok(())
    }
}

/// What a directory turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Everything promised is there and nothing else.
    Intact,
    /// It says that it is damaged, and where.
    Named(Corruption),
}

fn named_read<T>(result: Result<T, ReadError>) -> Result<Result<T, Corruption>, String> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(ReadError::Corrupt { corruption, .. }) => Ok(Err(corruption)),
        Err(other) => Err(format!("read: {other}")),
    }
}

/// (offset, value, producer id) of every record of a partition, and the aborted ranges.
fn read_all(
    log: &Log,
    tp: TopicPartition,
    isolation: Isolation,
) -> Result<Result<Vec<(i64, String)>, Corruption>, String> {
    let mut from = Position::unchecked(0);
    let (mut records, mut aborted) = (Vec::new(), BTreeSet::new());
    loop {
        let got = match named_read(log.read(tp, from, 1 << 20, isolation))? {
            Ok(got) => got,
            Err(corruption) => return Ok(Err(corruption)),
        };
        aborted.extend(got.aborted.iter().copied());
        if got.batches.is_empty() {
            break;
        }
        if got.next.offset <= from.offset {
            return Err(format!("{tp}: a read from {from:?} goes on at {:?}", got.next));
        }
        for batch in Batches::new(got.batches) {
            let (header, batch) = batch.map_err(|e| format!("served: {e}"))?;
            let open = OpenBatch::open(&batch, 1 << 20).map_err(|e| format!("served: {e}"))?;
            for record in &open {
                let record = record.map_err(|e| format!("served: {e}"))?;
                if !header.is_control() {
                    let value = String::from_utf8_lossy(record.value.unwrap_or_default()).into_owned();
                    records.push((record.offset, header.producer_id, value));
                }
            }
        }
        from = got.next;
    }
    let gone = |offset: i64, producer: i64| {
        aborted.iter().any(|r| r.producer_id == producer && (r.first..=r.last).contains(&offset))
    };
    records.retain(|(offset, producer, _)| !gone(*offset, *producer));
    Ok(Ok(records.into_iter().map(|(offset, _, value)| (offset, value)).collect()))
}

/// Opens the directory and holds everything it serves against the ghost. An error is a broken promise.
pub(crate) fn check(fs: &SimFs, ghost: &Ghost) -> Result<Found, String> {
    let log = match open(fs) {
        Ok(log) => log,
        Err(OpenError::Corrupt(corruption)) => return Ok(Found::Named(corruption)),
        Err(error @ OpenError::NewerLayout { .. }) => {
            // The layout comes first in `format`: a flipped bit of it is refused by that name.
            let found = error.to_string();
            return Ok(Found::Named(Corruption {
                file: "format".into(),
                position: 0,
                expected: String::new(),
                found,
            }));
        }
        Err(OpenError::Missing) => unreachable!("the configuration creates"),
        Err(OpenError::Io { doing, source }) => return Err(format!("open: {doing}: {source}")),
    };
    let found = check_open(&log, ghost);
    drop(log);
    found
}

pub(crate) fn check_open(log: &Log, ghost: &Ghost) -> Result<Found, String> {
    let damage = log.status().damage;
    let topics: BTreeSet<String> = log.topics().into_iter().map(|t| t.name).collect();
    if let Some(damage) = damage {
        // Read-only at the last checkpoint: what it serves is still held against what was sent.
        for (i, (name, partition)) in PARTITIONS.into_iter().enumerate() {
            let Some(topic) = log.topic(name) else { continue };
            let tp = TopicPartition { topic: topic.uuid, partition };
            if let Ok(records) = read_all(log, tp, Isolation::ReadUncommitted)? {
                for (offset, value) in &records {
                    let sent = ghost.sent.iter().find(|s| s.partition == i && s.value == *value);
                    let sent = sent.ok_or_else(|| format!("{tp} serves what was never sent: {value:.8}"))?;
                    if sent.offset.is_some_and(|o| o != *offset) {
                        return Err(format!("{value:.8} is at {offset}, was acked at {:?}", sent.offset));
                    }
                }
            }
        }
        return Ok(Found::Named(damage));
    }
    for (name, fate) in &ghost.topics {
        if *fate == Fate::Done && !topics.contains(name) {
            return Err(format!("topic {name} is lost"));
        }
    }
    let mut found = Found::Intact;
    let mut seen: BTreeMap<Level, BTreeSet<String>> = BTreeMap::new();
    for (i, (name, partition)) in PARTITIONS.into_iter().enumerate() {
        let Some(topic) = log.topic(name) else { continue };
        let tp = TopicPartition { topic: topic.uuid, partition };
        for isolation in [Level::Uncommitted, Level::Committed] {
            let records = match read_all(log, tp, isolation.into())? {
                Ok(records) => records,
                Err(corruption) => {
                    found = Found::Named(corruption);
                    continue;
                }
            };
            // In the order they were sent, at the offsets that were told, each once.
            let mut rest = ghost.sent.iter().filter(|s| s.partition == i);
            for (offset, value) in &records {
                let sent = rest.find(|s| s.value == *value).ok_or_else(|| {
                    format!("{tp} at {offset} serves {value:.8}: never sent, twice, or out of order")
                })?;
                if sent.fate == Fate::Refused {
                    return Err(format!("{value:.8} was refused and is served"));
                }
                if sent.offset.is_some_and(|o| o != *offset) {
                    return Err(format!("{value:.8} is at {offset}, was acked at {:?}", sent.offset));
                }
            }
            seen.entry(isolation).or_default().extend(records.into_iter().map(|(_, value)| value));
        }
    }
    if found != Found::Intact {
        return Ok(found);
    }
    let empty = BTreeSet::new();
    let dirty = seen.get(&Level::Uncommitted).unwrap_or(&empty);
    let clean = seen.get(&Level::Committed).unwrap_or(&empty);
    for sent in ghost.sent.iter().filter(|s| s.fate == Fate::Done) {
        if !dirty.contains(&sent.value) {
            return Err(format!("acked and lost: {:.8} at {:?}", sent.value, sent.offset));
        }
        if sent.txn.is_none() && !clean.contains(&sent.value) {
            return Err(format!("acked and not served to read-committed readers: {:.8}", sent.value));
        }
    }
    let mut committed = None;
    for (number, txn) in ghost.txns.iter().enumerate() {
        let of_txn: Vec<_> = ghost.sent.iter().filter(|s| s.txn == Some(number)).collect();
        let visible = of_txn.iter().filter(|s| clean.contains(&s.value)).count();
        let expected = match txn.end {
            Some((Outcome::Committed, Fate::Done)) => visible == of_txn.len(),
            Some((Outcome::Committed, Fate::Unknown)) => visible == 0 || visible == of_txn.len(),
            _ => visible == 0,
        };
        if !expected {
            return Err(format!(
                "transaction {number} {:?}: {visible} of {} are served",
                txn.end,
                of_txn.len()
            ));
        }
        if visible > 0 && txn.offsets == Fate::Done {
            committed = Some(txn.position);
        }
    }
    let offsets = log.group_offsets(GROUP, None);
    if !offsets.pending.is_empty() {
        return Err("a transaction of this process is still open".into());
    }
    let stored = offsets.committed.first().map(|c| c.position.offset);
    if stored != committed {
        return Err(format!("the group is at {stored:?}, its transactions committed {committed:?}"));
    }
    Ok(Found::Intact)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Uncommitted,
    Committed,
}

impl From<Level> for Isolation {
    fn from(value: Level) -> Self {
        match value {
            Level::Uncommitted => Self::ReadUncommitted,
            Level::Committed => Self::ReadCommitted,
        }
    }
}
