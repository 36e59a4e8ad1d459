//! The engine's log over the broker's service: the same code whether the broker is this process or another one.
//!
//! ```text
//!   tidemill_stream::io::Log            tidemill_broker::Broker
//!     topic, create_topic, ends   ──▶    describe, create_topic, list_offsets
//!     read, holds                 ──▶    fetch that does not wait
//!     input                       ──▶    fetches ahead of the engine            (input.rs)
//!     fence                       ──▶    init_producer, and what it sends       (transaction.rs)
//! ```
//!
//! The engine calls from its own threads and blocks; the requests run on one tokio runtime ([`Requests`]).
//!
//! Invariants
//! * Every wait has a deadline: the broker's own for requests that wait, [`ANSWER`] for the rest.
//! * No request is repeated here except ends of transactions. A connection that was lost is reported as unreachable;
//!   the engine returns to its last commit, which fences and aborts whatever was on its way.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tidemill_broker as broker;
use tidemill_broker::{Broker, BrokerError, PartitionError};
use tidemill_stream::io::{
    Cleanup, CommittedOffset, Fetched, Input, Log, LogError, NewTopic, PartitionEnds, Position, TopicId,
    TopicInfo, TopicUuid, Transactions,
};

use crate::decode;
use crate::input::PrefetchedInput;
use crate::transaction::LogTransactions;

/// How long an answer may take that waits for nothing but the broker. Longer than a fail-over to another owner, and
/// than [`broker::Access::OUTAGE_MAX`]: who is missing is told by name.
pub(crate) const ANSWER: Duration = Duration::from_secs(40);

/// How long the offsets of a group may be held by a transaction: longer than a transaction's timeout.
const STABLE_WAIT_MS: u32 = 30_000;

/// Segments of changelog topics: small, because only closed segments are compacted.
const CHANGELOG_SEGMENT_BYTES: u64 = 16 << 20;

/// Where requests run: a tokio runtime that the caller keeps alive.
#[derive(Clone, Debug)]
pub(crate) struct Requests(pub(crate) tokio::runtime::Handle);

impl Requests {
    /// Runs a request to its end, at most for [`ANSWER`].
    pub(crate) fn call<T>(
        &self,
        request: impl Future<Output = Result<T, BrokerError>>,
    ) -> Result<T, LogError> {
        self.call_for(ANSWER, request)
    }

    /// Runs a request to its end, at most for `wait`.
    pub(crate) fn call_for<T>(
        &self,
        wait: Duration,
        request: impl Future<Output = Result<T, BrokerError>>,
    ) -> Result<T, LogError> {
        self.0.block_on(async {
            match tokio::time::timeout(wait, request).await {
                Ok(answer) => answer.map_err(log_error),
                Err(_) => Err(LogError::Unreachable { source: format!("no answer within {wait:?}").into() }),
            }
        })
    }
}

/// The log of a job. Clones share the broker.
#[derive(Clone)]
pub struct BrokerLog<B> {
    broker: B,
    requests: Requests,
}

impl<B> std::fmt::Debug for BrokerLog<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BrokerLog")
    }
}

impl<B: Broker + Clone> BrokerLog<B> {
    /// Over `broker`, with requests running on `runtime`.
    pub fn new(broker: B, runtime: tokio::runtime::Handle) -> Self {
        Self { broker, requests: Requests(runtime) }
    }

    fn fetch_one(
        &self,
        topic: &TopicId,
        partition: u32,
        from: Position,
        bytes_max: usize,
    ) -> Result<Fetched, LogError> {
        let bytes_max = u32::try_from(bytes_max).unwrap_or(u32::MAX);
        let request = broker::Fetch {
            partitions: vec![broker::FetchPartition {
                partition: place(topic, partition),
                position: to_broker(from),
                bytes_max,
            }],
            bytes_max,
            wait_ms_max: 0,
            isolation: broker::Isolation::ReadCommitted,
        };
        let (fetched, bytes) = self.requests.call(self.broker.fetch(request))?;
        let mut parts = decode::split(fetched, bytes.into_bytes())?;
        let Some((part, bytes)) = parts.pop() else {
            return Err(refused("a fetch was answered without its partition"));
        };
        decode::partition(&topic.name, &part, &bytes, from.offset)
    }

    fn positions(&self, topic: &TopicId, partition: u32, at: broker::At) -> Result<Position, LogError> {
        let request = broker::ListOffsets { partitions: vec![place(topic, partition)], at };
        let listed = self.requests.call(self.broker.list_offsets(request))?;
        match listed.offsets.into_iter().next() {
            Some(broker::ListedOffset::Found(position) | broker::ListedOffset::AllOlder(position)) => {
                Ok(from_broker(position))
            }
            Some(broker::ListedOffset::Refused(error)) => {
                Err(partition_error(&topic.name, partition, 0, error))
            }
            None => Err(refused("a listing was answered without its partition")),
        }
    }
}

impl<B: Broker + Clone> Log for BrokerLog<B> {
    fn topic(&self, name: &str) -> Result<Option<TopicInfo>, LogError> {
        match self.requests.call(self.broker.describe(name.to_owned())) {
            Ok(found) => Ok(Some(topic_info(&found.topic))),
            Err(LogError::NoSuchTopic { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn create_topic(&self, new: &NewTopic) -> Result<TopicInfo, LogError> {
        let mut topic = broker::NewTopic::new(&new.name, new.partitions).keep_existing();
        if new.cleanup == Cleanup::Compact {
            topic.cleanup = broker::Cleanup::Compact;
            topic.segment_bytes_max = Some(CHANGELOG_SEGMENT_BYTES);
        }
        self.requests.call(self.broker.create_topic(topic)).map(|t| topic_info(&t))
    }

    fn ends(&self, topic: &TopicId, partition: u32) -> Result<PartitionEnds, LogError> {
        let end = self.positions(topic, partition, broker::At::Stable)?;
        let found = self.requests.call(self.broker.describe(topic.name.to_string()))?;
        let same = found.topic.id.0 == topic.uuid.0;
        let offsets = found.offsets.get(partition as usize).filter(|_| same);
        let offsets = offsets.ok_or_else(|| LogError::NoSuchTopic { topic: topic.name.to_string() })?;
        Ok(PartitionEnds {
            log_start: offsets.log_start,
            high_watermark: offsets.high_watermark,
            last_stable: end.offset,
            end,
        })
    }

    fn holds(&self, topic: &TopicId, partition: u32, position: Position) -> Result<bool, LogError> {
        let request = broker::Fetch {
            partitions: vec![broker::FetchPartition {
                partition: place(topic, partition),
                position: to_broker(position),
                bytes_max: 1,
            }],
            bytes_max: 1,
            wait_ms_max: 0,
            isolation: broker::Isolation::ReadCommitted,
        };
        let (fetched, _) = self.requests.call(self.broker.fetch(request))?;
        let Some(error) = fetched.partitions.into_iter().next().and_then(|p| p.error) else {
            return Ok(true);
        };
        match error.into_error() {
            BrokerError::PositionDoesNotHold { .. } => Ok(false),
            // Below the log start the position was a place once; that it is gone is not asked here.
            BrokerError::OutOfRange { offset, log_start, .. } => Ok(offset < log_start),
            error => Err(log_error(error)),
        }
    }

    fn read(
        &self,
        topic: &TopicId,
        partition: u32,
        from: Position,
        bytes_max: usize,
    ) -> Result<Fetched, LogError> {
        self.fetch_one(topic, partition, from, bytes_max)
    }

    fn input(&self, topic: &TopicId, partitions: &[(u32, Position)]) -> Result<Box<dyn Input>, LogError> {
        let input = PrefetchedInput::start(self.broker.clone(), &self.requests, topic.clone(), partitions);
        Ok(Box::new(input))
    }

    fn fence(&self, identity: &str) -> Result<Box<dyn Transactions>, LogError> {
        Ok(Box::new(LogTransactions::fence(self.broker.clone(), self.requests.clone(), identity)?))
    }

    fn committed(&self, group: &str) -> Result<Vec<CommittedOffset>, LogError> {
        let stable = broker::Stable::Wait(STABLE_WAIT_MS);
        let request = broker::FetchOffsets { group: group.to_owned(), stable };
        let wait = ANSWER + Duration::from_millis(STABLE_WAIT_MS.into());
        let found = self.requests.call_for(wait, self.broker.fetch_offsets(request))?;
        let topics = self.requests.call(self.broker.topics())?;
        let named = |o: broker::GroupOffset| {
            // Offsets of a topic that was deleted belong to nothing any more.
            let topic = topics.iter().find(|t| t.id == o.partition.topic)?;
            Some(CommittedOffset {
                topic: topic_info(topic).id,
                partition: o.partition.partition,
                position: from_broker(o.position),
                metadata: o.metadata.to_vec(),
            })
        };
        Ok(found.offsets.into_iter().filter_map(named).collect())
    }
}

fn topic_info(topic: &broker::Topic) -> TopicInfo {
    let id = TopicId { name: Arc::from(topic.name.as_str()), uuid: TopicUuid(topic.id.0) };
    TopicInfo { id, partitions: topic.partitions }
}

pub(crate) fn place(topic: &TopicId, partition: u32) -> broker::TopicPartition {
    broker::TopicPartition { topic: broker::TopicId(topic.uuid.0), partition }
}

pub(crate) fn to_broker(position: Position) -> broker::Position {
    broker::Position { leader_epoch: position.leader_epoch, offset: position.offset }
}

pub(crate) fn from_broker(position: broker::Position) -> Position {
    Position { leader_epoch: position.leader_epoch, offset: position.offset }
}

pub(crate) fn refused(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LogError {
    LogError::Refused { source: what.into() }
}

/// What the engine does about a broker's refusal.
pub(crate) fn log_error(error: BrokerError) -> LogError {
    match error {
        BrokerError::UnknownTopic { topic } => LogError::NoSuchTopic { topic },
        // The transport failed, or the owner is going: what was on its way is unknown, and is given up.
        BrokerError::Busy { .. }
        | BrokerError::OffsetsPending { .. }
        | BrokerError::Unavailable { .. }
        | BrokerError::OldConnection { .. }
        | BrokerError::OutOfOrder { .. }
        | BrokerError::Rpc(_) => LogError::Unreachable { source: Box::new(error) },
        error => LogError::Refused { source: Box::new(error) },
    }
}

/// The same for a request about one partition.
pub(crate) fn partition_error(topic: &str, partition: u32, offset: i64, error: PartitionError) -> LogError {
    match error.into_error() {
        BrokerError::PositionDoesNotHold { .. } | BrokerError::OutOfRange { .. } => {
            LogError::PositionLost { topic: topic.to_owned(), partition, offset }
        }
        error => log_error(error),
    }
}
