//! The live log: what a process that owns a data directory works with.

use crate::error::{ReadError, WriteError};
use crate::ticket::Ticket;
use crate::types::*;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// An open data directory. Clones share it; cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    stopped: Arc<str>,
}

/// How a log is doing.
#[derive(Clone, Debug)]
pub struct Status {
    /// The number of times the directory was opened.
    pub incarnation: u32,
    /// Entries sequenced, and released, since the directory was created.
    pub sequenced: u64,
    /// See `sequenced`.
    pub released: u64,
    /// Rounds synced since open.
    pub syncs: u64,
    /// Why the directory is read-only.
    pub damage: Option<crate::error::Corruption>,
    /// Why the log stopped.
    pub stopped: Option<Arc<str>>,
}

/// Tells that something was released: see [`Log::released`].
#[derive(Debug)]
pub struct Released {
    _log: Log,
}

impl Released {
    /// Completes once something was released after the last call (or after the subscription). Cancel safe.
    pub async fn changed(&mut self) {}

    /// The same for threads; false if nothing was released in time.
    pub fn wait(&mut self, _at_most: Duration) -> bool {
        false
    }
}

impl Log {
    /// Opens a data directory, recovering it. The caller holds the directory's lock. Blocks.
    pub fn open(
        _fs: Arc<dyn crate::fs::Fs>,
        _config: crate::config::Config,
    ) -> Result<Self, crate::error::OpenError> {
        Err(crate::error::OpenError::Missing)
    }

    fn no<T>(&self) -> Ticket<T> {
        Ticket::ready(Err(WriteError::Stopped(self.stopped.clone())))
    }

    /// Creates a topic. The answer is refused where the name exists.
    pub fn create_topic(&self, _topic: NewTopic) -> Ticket<TopicInfo> {
        self.no()
    }

    /// Deletes a topic with everything in it.
    pub fn delete_topic(&self, _topic: uuid::Uuid) -> Ticket<()> {
        self.no()
    }

    /// The topics, by name.
    pub fn topics(&self) -> Vec<TopicInfo> {
        Vec::new()
    }

    /// One topic.
    pub fn topic(&self, _name: &str) -> Option<TopicInfo> {
        None
    }

    /// A producer id, or the next epoch of one; aborts the transactional id's open transaction and fences its producer.
    pub fn init_producer(&self, _init: InitProducer) -> Ticket<Producer> {
        self.no()
    }

    /// Appends one batch. A transactional batch opens its producer's transaction, or adds the partition to it.
    pub fn append(&self, _to: TopicPartition, _batch: Bytes, _connection: Connection) -> Ticket<Appended> {
        self.no()
    }

    /// Adds group offsets to the producer's transaction, opening it if need be.
    pub fn add_offsets(&self, _add: AddOffsets) -> Ticket<()> {
        self.no()
    }

    /// Commits group offsets at once.
    pub fn commit_offsets(&self, _commit: CommitOffsets) -> Ticket<()> {
        self.no()
    }

    /// Ends a transaction in one entry.
    pub fn end_transaction(&self, _end: EndTxn) -> Ticket<Ended> {
        self.no()
    }

    /// Reads whole batches from `from`, about `bytes_max` (at least one batch where there is one). Blocks on files.
    pub fn read(
        &self,
        partition: TopicPartition,
        _from: Position,
        _bytes_max: usize,
        _isolation: Isolation,
    ) -> Result<ReadBatches, ReadError> {
        Err(ReadError::UnknownPartition(partition))
    }

    /// A partition's offsets.
    pub fn offsets(&self, partition: TopicPartition) -> Result<PartitionOffsets, ReadError> {
        Err(ReadError::UnknownPartition(partition))
    }

    /// What a group has committed; `None` means every partition it has.
    pub fn group_offsets(&self, _group: &str, _partitions: Option<&[TopicPartition]>) -> GroupOffsets {
        GroupOffsets::default()
    }

    /// Subscribes to releases: new records to read, ended transactions, committed offsets, new topics.
    pub fn released(&self) -> Released {
        Released { _log: self.clone() }
    }

    /// How the log is doing.
    pub fn status(&self) -> Status {
        Status { incarnation: 0, sequenced: 0, released: 0, syncs: 0, damage: None, stopped: None }
    }

    /// Finishes what is queued, writes a checkpoint, and stops the threads. Later requests are answered with
    /// [`WriteError::Stopped`]. Blocks; an error means that not everything queued became durable in time.
    pub fn close(&self, _at_most: Duration) -> Result<(), WriteError> {
        Ok(())
    }
}
