//! The broker of this process: the service over an open log.
//!
//! Each connection is served by a [`LocalBroker`] of its own, made by [`LocalBroker::session`], so that the log sees
//! which requests came on which connection and lets those of a producer count only on the newest.
//!
//! ```text
//!   produce   first poll: every batch is checked and sequenced, or refused ──▶ tickets ──released──▶ answer
//!   fetch     subscribe to releases ──▶ anything there? ──no──▶ wait for a release or the deadline ──▶ again
//!                                            └─yes─▶ read on a blocking thread ──▶ answer
//! ```
//!
//! Dropping the future of a request never takes back what its first poll sequenced. Reads touch files, so they run on
//! blocking threads, at most [`READS_MAX`] at a time in all sessions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tidemill_log::{self as log, Connection, Log};
use tidemill_rpc::{Attachment, Code, Fate, RpcError};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until};

use crate::api::*;
use crate::convert::{refused, unreadable};
use crate::error::{BrokerError, PartitionError};

/// Reads that run at one time: they block on files, and more of them would only queue at the disk.
const READS_MAX: usize = 8;
/// No request waits longer, whatever it asks for.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Bounds of one request's lists.
const PARTITIONS_MAX: usize = 16 << 10;
/// Bound of one fetch's answer.
const FETCH_BYTES_MAX: u32 = 16 << 20;

/// The service over the log of this process. Clones share the log and the session.
#[derive(Clone, Debug)]
pub struct LocalBroker {
    log: Log,
    shared: Arc<Shared>,
    connection: Connection,
}

#[derive(Debug)]
struct Shared {
    connections: AtomicU64,
    reads: Arc<Semaphore>,
    /// True once the owner closes: nobody waits for what will not come.
    closing: watch::Sender<bool>,
}

impl LocalBroker {
    /// Serves callers in this process: the transactions they leave open are aborted when the log is opened again.
    pub fn new(log: Log) -> Self {
        let shared = Shared {
            connections: AtomicU64::new(0),
            reads: Arc::new(Semaphore::new(READS_MAX)),
            closing: watch::Sender::new(false),
        };
        LocalBroker { log, shared: Arc::new(shared), connection: Connection::LOCAL }
    }

    /// The service for one new connection, newer than all before it.
    pub fn session(&self) -> Self {
        let number = self.shared.connections.fetch_add(1, Ordering::Relaxed) + 1;
        LocalBroker { connection: Connection(number), ..self.clone() }
    }

    /// The log behind it.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Ends the waits of fetches and stable offset fetches, of all sessions, now and later: the owner closes.
    pub(crate) fn stop_waiting(&self) {
        self.shared.closing.send_replace(true);
    }

    /// Waits for a release, the deadline or the close; says which.
    async fn wait(&self, released: &mut log::Released, until: Instant) -> Woken {
        let mut closing = self.shared.closing.subscribe();
        tokio::select! {
            () = released.changed() => Woken::Released,
            () = sleep_until(until) => Woken::Late,
            _ = closing.wait_for(|closing| *closing) => Woken::Closing,
        }
    }

    fn is_local(&self) -> bool {
        self.connection == Connection::LOCAL
    }

    /// One pass over the partitions of a fetch. Blocks on files.
    fn read(log: &Log, request: &Fetch) -> (Fetched, Vec<Bytes>) {
        let mut left = request.bytes_max.min(FETCH_BYTES_MAX) as usize;
        let mut parts = Vec::new();
        let mut partitions = Vec::with_capacity(request.partitions.len());
        for asked in &request.partitions {
            let tp = asked.partition.into();
            let empty = |error, offsets| FetchedPartition {
                partition: asked.partition,
                bytes: 0,
                next: asked.position,
                offsets,
                aborted: Vec::new(),
                error,
            };
            let nothing =
                PartitionOffsets { log_start: 0, high_watermark: 0, last_stable: 0, end: Position::START };
            let known = log.offsets(tp).map(PartitionOffsets::from);
            // The first partition with anything gives at least one batch; a spent budget leaves the rest as they are.
            if left == 0 {
                let offsets = known.unwrap_or(nothing);
                partitions.push(empty(None, offsets));
                continue;
            }
            let bytes_max = left.min(asked.bytes_max as usize);
            match log.read(tp, asked.position.into(), bytes_max, request.isolation.into()) {
                Ok(read) => {
                    left = left.saturating_sub(read.batches.len());
                    partitions.push(FetchedPartition {
                        partition: asked.partition,
                        bytes: u32::try_from(read.batches.len()).expect("a read is bounded"),
                        next: read.next.into(),
                        offsets: read.offsets.into(),
                        aborted: read.aborted.into_iter().map(Into::into).collect(),
                        error: None,
                    });
                    if !read.batches.is_empty() {
                        parts.push(read.batches);
                    }
                }
                Err(error) => {
                    let error = PartitionError::from(unreadable(error));
                    partitions.push(empty(Some(error), known.unwrap_or(nothing)));
                }
            }
        }
        (Fetched { partitions }, parts)
    }

    /// Whether a read would return anything at once: records, progress or an error.
    fn is_readable(&self, request: &Fetch) -> bool {
        request.partitions.iter().any(|asked| match self.log.offsets(asked.partition.into()) {
            Ok(offsets) => {
                let end = match request.isolation {
                    Isolation::ReadCommitted => offsets.last_stable,
                    Isolation::ReadUncommitted => offsets.high_watermark,
                };
                // A position beyond the high watermark is an error that the read reports.
                asked.position.offset < end || asked.position.offset > offsets.high_watermark
            }
            Err(_) => true,
        })
    }

    /// Runs `read`, which touches files, on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Log) -> T + Send + 'static,
    ) -> Result<T, BrokerError> {
        let permit = self.shared.reads.clone().acquire_owned().await.expect("the semaphore is never closed");
        let log = self.log.clone();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            read(&log)
        })
        .await
        .map_err(|e| BrokerError::Stopped { what: format!("a read panicked: {e}") })
    }

    fn topic(&self, name: &str) -> Result<log::TopicInfo, BrokerError> {
        self.log.topic(name).ok_or_else(|| BrokerError::UnknownTopic { topic: name.to_owned() })
    }

    fn position(&self, of: TopicPartition, at: At) -> Result<Position, BrokerError> {
        let offsets = self.log.offsets(of.into()).map_err(unreadable)?;
        Ok(match at {
            At::Latest => offsets.end.into(),
            // Inside the log the epoch of the record before is not kept by offset; the range is what is checked then.
            At::Stable if offsets.last_stable == offsets.high_watermark => offsets.end.into(),
            At::Stable => Position::unchecked(offsets.last_stable),
            At::Earliest if offsets.log_start == 0 => Position::START,
            At::Earliest => Position::unchecked(offsets.log_start),
            At::Time(_) => unreachable!("a time is looked up in files"),
        })
    }
}

impl From<Result<Position, BrokerError>> for ListedOffset {
    fn from(found: Result<Position, BrokerError>) -> Self {
        match found {
            Ok(position) => ListedOffset::Found(position),
            Err(error) => ListedOffset::Refused(error.into()),
        }
    }
}

/// The place of a time. Blocks on files.
fn at_time(log: &Log, of: TopicPartition, timestamp: i64) -> ListedOffset {
    let found = log.position_at(of.into(), timestamp).map_err(unreadable);
    match found {
        Ok(Some(position)) => ListedOffset::Found(position.into()),
        Ok(None) => match log.offsets(of.into()).map_err(unreadable) {
            Ok(offsets) => ListedOffset::AllOlder(offsets.end.into()),
            Err(error) => ListedOffset::Refused(error.into()),
        },
        Err(error) => ListedOffset::Refused(error.into()),
    }
}

#[derive(PartialEq, Eq)]
enum Woken {
    Released,
    Late,
    Closing,
}

fn bounded(count: usize) -> Result<(), BrokerError> {
    if count > PARTITIONS_MAX {
        let what = format!("{count} entries in one request; at most {PARTITIONS_MAX}");
        return Err(BrokerError::Invalid { what });
    }
    Ok(())
}

/// `wait_ms` from now, within the bound.
fn deadline(wait_ms: u32) -> Instant {
    Instant::now() + Duration::from_millis(wait_ms.into()).min(WAIT_MAX)
}

impl Broker for LocalBroker {
    async fn create_topic(&self, topic: NewTopic) -> Result<Topic, BrokerError> {
        let (name, if_exists) = (topic.name.clone(), topic.if_exists);
        match self.log.create_topic(topic.into()).await {
            Ok(info) => Ok(info.into()),
            Err(log::WriteError::Refused(log::Refusal::TopicExists(_))) if if_exists == IfExists::Keep => {
                Ok(self.topic(&name)?.into())
            }
            Err(error) => Err(refused(error, None)),
        }
    }

    async fn delete_topic(&self, request: DeleteTopic) -> Result<(), BrokerError> {
        let deleted = self.log.delete_topic(request.topic.into(), request.if_used.into());
        deleted.await.map_err(|e| refused(e, None))
    }

    async fn alter_topic(&self, request: AlterTopic) -> Result<Topic, BrokerError> {
        let AlterTopic { topic, partitions, segment_bytes_max, cleanup } = request;
        let change = log::TopicChange { partitions, segment_bytes_max, cleanup: cleanup.map(Into::into) };
        self.log.alter_topic(topic.into(), change).await.map(Into::into).map_err(|e| match e {
            log::WriteError::Refused(log::Refusal::UnknownPartition(_)) => {
                BrokerError::UnknownTopic { topic: topic.to_string() }
            }
            e => refused(e, None),
        })
    }

    async fn topics(&self) -> Result<Vec<Topic>, BrokerError> {
        Ok(self.log.topics().into_iter().map(Into::into).collect())
    }

    async fn describe(&self, name: String) -> Result<TopicDescription, BrokerError> {
        let info = self.topic(&name)?;
        let offsets = info
            .topic_partitions()
            .map(|tp| self.log.offsets(tp).map(Into::into).map_err(unreadable))
            .collect::<Result<_, _>>()?;
        Ok(TopicDescription { topic: info.into(), offsets })
    }

    async fn init_producer(&self, request: InitProducer) -> Result<ProducerIdentity, BrokerError> {
        let carried = request.carried;
        let init = log::InitProducer {
            transactional_id: request.transactional_id,
            local: self.is_local(),
            timeout_ms: request.timeout_ms,
            carried: carried.map(Into::into),
        };
        self.log.init_producer(init).await.map(Into::into).map_err(|e| refused(e, carried))
    }

    async fn produce(&self, request: Produce, batches: Attachment) -> Result<Produced, BrokerError> {
        bounded(request.batches.len())?;
        let mut rest: Bytes = batches.into_bytes();
        let total: u64 = request.batches.iter().map(|b| u64::from(b.bytes)).sum();
        if total != rest.len() as u64 {
            let what = format!("batches of {total} bytes in an attachment of {}", rest.len());
            return Err(BrokerError::Invalid { what });
        }
        // All of them are sequenced in this first poll, in order; nothing below awaits before.
        let tickets: Vec<_> = request
            .batches
            .iter()
            .map(|b| self.log.append(b.partition.into(), rest.split_to(b.bytes as usize), self.connection))
            .collect();
        let mut outcomes = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            outcomes.push(match ticket.await {
                Ok(done) => ProduceOutcome::Appended {
                    base_offset: done.base_offset,
                    next: done.next.into(),
                    duplicate: done.duplicate,
                },
                Err(error) => ProduceOutcome::Refused(refused(error, Some(request.producer)).into()),
            });
        }
        Ok(Produced { outcomes })
    }

    async fn fetch(&self, request: Fetch) -> Result<(Fetched, Attachment), BrokerError> {
        bounded(request.partitions.len())?;
        let until = deadline(request.wait_ms_max);
        let request = Arc::new(request);
        // Subscribed before the first look: what is released between the look and the wait still wakes it.
        let mut released = self.log.released();
        let mut late = request.wait_ms_max == 0;
        loop {
            if late || self.is_readable(&request) {
                let (fetched, parts) = {
                    let request = request.clone();
                    self.blocking(move |log| Self::read(log, &request)).await?
                };
                let moved = |(got, asked): (&FetchedPartition, &FetchPartition)| {
                    got.bytes > 0 || got.error.is_some() || got.next != asked.position
                };
                if late || fetched.partitions.iter().zip(&request.partitions).any(moved) {
                    return Ok((fetched, parts.into_iter().collect()));
                }
            }
            late = self.wait(&mut released, until).await != Woken::Released;
        }
    }

    async fn list_offsets(&self, request: ListOffsets) -> Result<ListedOffsets, BrokerError> {
        bounded(request.partitions.len())?;
        let ListOffsets { partitions, at } = request;
        if let At::Time(timestamp) = at {
            let listed =
                self.blocking(move |log| partitions.iter().map(|&of| at_time(log, of, timestamp)).collect());
            return Ok(ListedOffsets { offsets: listed.await? });
        }
        let offsets = partitions.iter().map(|&of| self.position(of, at).into()).collect();
        Ok(ListedOffsets { offsets })
    }

    async fn commit_offsets(&self, request: CommitOffsets) -> Result<(), BrokerError> {
        bounded(request.offsets.len())?;
        let (group, offsets) = (request.group, request.offsets.into_iter().map(Into::into).collect());
        match request.transaction {
            None => {
                let commit = log::CommitOffsets { group, offsets, guard: None };
                self.log.commit_offsets(commit).await.map_err(|e| refused(e, None))
            }
            Some(who) => {
                let producer = who.producer;
                let add = log::AddOffsets {
                    producer: producer.into(),
                    group,
                    offsets,
                    guard: None,
                    connection: self.connection,
                };
                self.log.add_offsets(add).await.map_err(|e| refused(e, Some(producer)))
            }
        }
    }

    async fn fetch_offsets(&self, request: FetchOffsets) -> Result<FetchedOffsets, BrokerError> {
        let until = match request.stable {
            Stable::Wait(ms) => Some(deadline(ms)),
            Stable::Released => None,
        };
        let mut released = self.log.released();
        loop {
            let found = self.log.group_offsets(&request.group, None);
            let Some(until) = until.filter(|_| !found.pending.is_empty()) else {
                return Ok(FetchedOffsets { offsets: found.committed.into_iter().map(Into::into).collect() });
            };
            match self.wait(&mut released, until).await {
                Woken::Released => {}
                Woken::Late => return Err(BrokerError::OffsetsPending { group: request.group }),
                Woken::Closing => {
                    let draining = RpcError::new(Code::Draining, Fate::Rejected, "the owner is closing");
                    return Err(draining.into());
                }
            }
        }
    }

    async fn end_transaction(&self, request: EndTransaction) -> Result<Ended, BrokerError> {
        let producer = request.who.producer;
        let end = log::EndTxn {
            transactional_id: request.who.transactional_id,
            producer: producer.into(),
            outcome: request.end.into(),
            connection: self.connection,
        };
        self.log.end_transaction(end).await.map(Into::into).map_err(|e| refused(e, Some(producer)))
    }
}
