//! The load: the script's ops on an open log, several in flight, and how many of them were acknowledged.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use tidemill_log::batch::{BatchBuilder, BatchOptions, Compression, ProducerStamp, RecordParts};
use tidemill_log::fs::RealFs;
use tidemill_log::{
    AddOffsets, Appended, CommitOffsets, Config, Connection, Create, EndTxn, Ended, IfUsed, InitProducer,
    Log, NewTopic, OffsetCommit, Outcome, Position, Producer, Ticket, TopicPartition, WriteError,
};

use crate::script::{Op, SLOTS, Script, value};

/// The group whose offsets are committed.
pub(crate) const GROUP: &str = "readers";
/// Far beyond what any request takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// Small, so that a second of load rolls segments, recycles journal files and writes checkpoints many times.
const SEGMENT_BYTES: u64 = 256 << 10;

/// Opens the directory with a journal of four small files.
pub(crate) fn open(dir: &Path, create: Create) -> Result<Log> {
    let fs = RealFs::new(dir).with_context(|| format!("cannot open {}", dir.display()))?;
    let config = Config { create, journal_file_bytes: 1 << 20, journal_files_max: 4, ..Config::default() };
    Log::open(Arc::new(fs), config).with_context(|| format!("cannot open the log in {}", dir.display()))
}

/// How many ops were acknowledged, in a file that a power cut of the log's disk does not touch.
#[derive(Debug)]
pub(crate) struct Acks {
    file: File,
}

impl Acks {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        let acks = Self { file };
        acks.write(0)?;
        Ok(acks)
    }

    /// One write of one length at one place: a killed process leaves the old number or the new one.
    fn write(&self, acked: u64) -> Result<()> {
        self.file.write_all_at(format!("{acked:020}\n").as_bytes(), 0).context("cannot write the acks")
    }

    pub(crate) fn read(path: &Path) -> Result<u64> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        text.trim().parse().with_context(|| format!("{} holds no number: {text:?}", path.display()))
    }
}

enum Pending {
    Appended(Ticket<Appended>),
    Unit(Ticket<()>),
    Ended(usize, Ticket<Ended>),
}

/// One who asks.
pub(crate) struct Driver<'a> {
    log: &'a Log,
    acks: Acks,
    in_flight_max: usize,
    in_flight: VecDeque<Pending>,
    acked: u64,
    plain: Producer,
    slots: [Producer; SLOTS],
    sequences: HashMap<(Producer, TopicPartition), i32>,
}

/// The log stopped, or refused what it must take.
enum Failed {
    /// It says that its disk is gone.
    Stopped(WriteError),
    Wrong(anyhow::Error),
}

impl<'a> Driver<'a> {
    pub(crate) fn new(log: &'a Log, acks: Acks, in_flight_max: usize) -> Result<Self> {
        let init = |transactional_id: Option<String>| {
            let init = InitProducer { transactional_id, local: true, timeout_ms: 600_000, carried: None };
            log.init_producer(init).wait(DEADLINE).context("no producer id")
        };
        let mut slots = [Producer { id: 0, epoch: 0 }; SLOTS];
        for (i, slot) in slots.iter_mut().enumerate() {
            *slot = init(Some(name(i)))?;
        }
        let plain = init(None)?;
        let (in_flight, sequences) = Default::default();
        Ok(Self { log, acks, in_flight_max, in_flight, acked: 0, plain, slots, sequences })
    }

    /// Asks until the log stops (its error is returned) or `until` ops were asked.
    pub(crate) fn run(mut self, script: &mut Script, until: u64) -> Result<Option<WriteError>> {
        let checkpoints = Instant::now();
        let mut checkpoint_at = Duration::from_millis(50);
        for _ in 0..until {
            if checkpoints.elapsed() > checkpoint_at {
                // Besides those that a full journal asks for.
                self.log.checkpoint();
                checkpoint_at += Duration::from_millis(70);
            }
            match self.ask(&script.next()) {
                Ok(()) => {}
                Err(Failed::Stopped(error)) => return Ok(Some(error)),
                Err(Failed::Wrong(error)) => return Err(error),
            }
        }
        match self.settle(0) {
            Ok(()) => Ok(None),
            Err(Failed::Stopped(error)) => Ok(Some(error)),
            Err(Failed::Wrong(error)) => Err(error),
        }
    }

    fn ask(&mut self, op: &Op) -> Result<(), Failed> {
        let pending = match op {
            Op::Create { topic, partitions } => {
                // What comes next needs the topic's id, which is told with the ack.
                self.settle(0)?;
                let topic =
                    NewTopic { segment_bytes_max: SEGMENT_BYTES, ..NewTopic::new(topic, *partitions) };
                answer(self.log.create_topic(topic).wait(DEADLINE))?;
                return self.count();
            }
            Op::Delete { topic } => {
                let info = self.log.topic(topic).ok_or_else(|| missing(topic))?;
                Pending::Unit(self.log.delete_topic(info.uuid, IfUsed::Delete))
            }
            Op::Append { topic, partition, ids, slot } => {
                self.wait_for_end(*slot)?;
                let to = self.partition(topic, *partition)?;
                Pending::Appended(self.append(to, ids, *slot))
            }
            Op::Offsets { topic, partition, offset, slot } => {
                self.wait_for_end(*slot)?;
                let partition = self.partition(topic, *partition)?;
                let position = Position::unchecked(*offset);
                let offsets = vec![OffsetCommit { partition, position, metadata: Bytes::from_static(b"m") }];
                let (group, guard, connection) = (GROUP.into(), None, Connection::LOCAL);
                Pending::Unit(match slot {
                    Some(slot) => {
                        let producer = self.slots[*slot];
                        self.log.add_offsets(AddOffsets { producer, group, offsets, guard, connection })
                    }
                    None => self.log.commit_offsets(CommitOffsets { group, offsets, guard }),
                })
            }
            Op::End { slot, commit } => {
                let end = EndTxn {
                    transactional_id: name(*slot),
                    producer: self.slots[*slot],
                    outcome: if *commit { Outcome::Committed } else { Outcome::Aborted },
                    connection: Connection::LOCAL,
                };
                Pending::Ended(*slot, self.log.end_transaction(end))
            }
        };
        self.in_flight.push_back(pending);
        self.settle(self.in_flight_max - 1)
    }

    fn append(&mut self, to: TopicPartition, ids: &[u64], slot: Option<usize>) -> Ticket<Appended> {
        let producer = slot.map_or(self.plain, |slot| self.slots[slot]);
        let compression = if ids[0] >> 8 & 3 == 0 { Compression::Lz4 } else { Compression::None };
        let mut batch = BatchBuilder::new(BatchOptions {
            compression,
            transactional: slot.is_some(),
            ..Default::default()
        });
        for id in ids {
            let value = value(*id);
            let pushed = batch.push(RecordParts { value: Some(&value), ..RecordParts::default() });
            assert!(pushed, "{} records of at most 500 bytes fit a batch", ids.len());
        }
        let sequence = self.sequences.entry((producer, to)).or_default();
        let stamp = ProducerStamp { id: producer.id, epoch: producer.epoch, sequence: *sequence };
        *sequence += i32::try_from(ids.len()).expect("a few hundred");
        self.log.append(to, batch.build(stamp), Connection::LOCAL)
    }

    /// The producer of a slot's next transaction is told with the ack of the last one's end.
    fn wait_for_end(&mut self, slot: Option<usize>) -> Result<(), Failed> {
        let Some(slot) = slot else { return Ok(()) };
        let ends = |p: &Pending| matches!(p, Pending::Ended(of, _) if *of == slot);
        match self.in_flight.iter().rposition(ends) {
            Some(at) => self.settle(self.in_flight.len() - 1 - at),
            None => Ok(()),
        }
    }

    /// Waits until at most so many are in flight. The log answers in the order of asking.
    fn settle(&mut self, at_most: usize) -> Result<(), Failed> {
        while self.in_flight.len() > at_most {
            match self.in_flight.pop_front().expect("more than none") {
                Pending::Appended(ticket) => drop(answer(ticket.wait(DEADLINE))?),
                Pending::Unit(ticket) => answer(ticket.wait(DEADLINE))?,
                Pending::Ended(slot, ticket) => {
                    let ended = answer(ticket.wait(DEADLINE))?;
                    let old = std::mem::replace(&mut self.slots[slot], ended.next);
                    self.sequences.retain(|(producer, _), _| *producer != old);
                }
            }
            self.count()?;
        }
        Ok(())
    }

    fn count(&mut self) -> Result<(), Failed> {
        self.acked += 1;
        self.acks.write(self.acked).map_err(Failed::Wrong)
    }

    fn partition(&self, topic: &str, partition: u32) -> Result<TopicPartition, Failed> {
        let info = self.log.topic(topic).ok_or_else(|| missing(topic))?;
        Ok(TopicPartition { topic: info.uuid, partition })
    }
}

fn missing(topic: &str) -> Failed {
    Failed::Wrong(anyhow!("topic {topic} is not there, though its creation was acknowledged"))
}

/// Whatever the script asks is right: only a log that stopped may fail it.
fn answer<T>(answer: Result<T, WriteError>) -> Result<T, Failed> {
    match answer {
        Ok(answer) => Ok(answer),
        Err(error @ WriteError::Stopped(_)) => Err(Failed::Stopped(error)),
        Err(error) => Err(Failed::Wrong(anyhow!(error).context("a correct request was refused"))),
    }
}

fn name(slot: usize) -> String {
    format!("job-{slot}")
}

/// The in-flight limits that a seed chooses from: alone, few, and enough to fill rounds.
pub(crate) fn in_flight_of(seed: u64) -> Result<usize> {
    match [1, 8, 64].get(usize::try_from(seed % 3)?) {
        Some(most) => Ok(*most),
        None => bail!("three choices"),
    }
}
