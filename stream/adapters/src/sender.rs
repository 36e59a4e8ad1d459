//! Records on their way into the log: a batch per partition being filled, and one request at a time with those that are full.
//!
//! ```text
//!   push ─▶ a batch per partition being filled ─▶ full, or nudged: ready ─▶ one produce request at a time, of all that is ready
//! ```
//!
//! A job has up to two: one whose batches belong to its open transaction, and, at least once, one whose batches do not.
//!
//! Invariants
//! * One produce request is in flight, so batches of a partition are appended in order without being resent.
//! * At most [`READY_BYTES_MAX`] wait behind the request in flight; then `push` waits for its ack.

use std::collections::HashMap;

use bytes::Bytes;
use tidemill_broker as broker;
use tidemill_broker::batch::{BatchBuilder, BatchOptions, Compression, ProducerStamp};
use tidemill_broker::{Attachment, Broker, ProduceOutcome};
use tidemill_stream::io::{LogError, Position, TopicId};
use tidemill_stream::record::RecordParts;
use tokio::task::JoinHandle;

use crate::log::{ANSWER, Requests, from_broker, log_error, partition_error, place, refused};

/// Bytes of a batch before it is sealed.
const BATCH_BYTES: usize = 128 << 10;

/// Largest record that is sent at all.
const RECORD_BYTES_MAX: usize = 16 << 20;

/// Ready bytes that are worth a request.
const REQUEST_BYTES: usize = 512 << 10;

/// Most bytes of one request: well below what a frame may have.
const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Ready bytes at which `send` waits.
const READY_BYTES_MAX: usize = 8 << 20;

/// A partition's batch being filled.
struct Lane {
    topic: TopicId,
    builder: BatchBuilder,
    sequence: i32,
    /// Position behind its last acked batch since the sender began.
    next: Option<Position>,
}

struct Ready {
    to: (TopicId, u32),
    batch: Bytes,
}

type Sent = Result<Vec<((TopicId, u32), Position)>, LogError>;

/// Whether batches belong to the producer's open transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Belongs {
    ToTheTransaction,
    ToNone,
}

/// One producer's records on their way.
pub(crate) struct Sender<B> {
    broker: B,
    requests: Requests,
    pub(crate) producer: broker::ProducerIdentity,
    belongs: Belongs,
    lanes: HashMap<(u128, u32), Lane>,
    ready: Vec<Ready>,
    ready_bytes: usize,
    in_flight: Option<JoinHandle<Sent>>,
    /// Whether a request left since the sender began.
    pub(crate) sent: bool,
}

impl<B: Broker + Clone> Sender<B> {
    pub(crate) fn new(
        broker: B,
        requests: Requests,
        producer: broker::ProducerIdentity,
        belongs: Belongs,
    ) -> Self {
        Self {
            broker,
            requests,
            producer,
            belongs,
            lanes: HashMap::new(),
            ready: Vec::new(),
            ready_bytes: 0,
            in_flight: None,
            sent: false,
        }
    }

    /// Takes records. May return before they leave.
    pub(crate) fn push(
        &mut self,
        topic: &TopicId,
        partition: u32,
        records: &mut dyn Iterator<Item = RecordParts<'_>>,
    ) -> Result<(), LogError> {
        let (producer, transactional) = (self.producer, self.belongs == Belongs::ToTheTransaction);
        // The lane is looked up once a call, not once a record.
        let lane = self.lanes.entry((topic.uuid.0, partition)).or_insert_with(|| Lane {
            topic: topic.clone(),
            builder: BatchBuilder::new(BatchOptions {
                compression: Compression::None,
                transactional,
                bytes_max: BATCH_BYTES,
            }),
            sequence: 0,
            next: None,
        });
        let before = self.ready.len();
        let mut pushed = Ok(());
        for record in records {
            pushed = lane.push(producer, partition, record, &mut self.ready);
            if pushed.is_err() {
                break;
            }
        }
        self.ready_bytes += self.ready[before..].iter().map(|r| r.batch.len()).sum::<usize>();
        pushed?;
        if (self.ready_bytes >= REQUEST_BYTES && self.is_free()) || self.ready_bytes >= READY_BYTES_MAX {
            self.request()?;
        }
        Ok(())
    }

    /// What waits for company leaves, unless a request is in flight.
    pub(crate) fn nudge(&mut self) -> Result<(), LogError> {
        if self.is_free() {
            self.seal_all();
            // Takes the acks of the request before it, and does nothing where nothing is ready.
            self.request()?;
        }
        Ok(())
    }

    /// Seals every batch and waits until all of it is acked.
    pub(crate) fn drain(&mut self) -> Result<(), LogError> {
        self.seal_all();
        while !self.ready.is_empty() {
            self.request()?;
        }
        self.acked()
    }

    /// Drops what is not acked: its transaction is aborted, and a late request of it can act on no other.
    pub(crate) fn discard(&mut self) {
        if let Some(sent) = self.in_flight.take() {
            sent.abort();
        }
        self.ready.clear();
        self.ready_bytes = 0;
        self.lanes.clear();
    }

    /// The position behind the last acked batch of each partition, since the sender began.
    pub(crate) fn positions(&self) -> Vec<(TopicId, u32, Position)> {
        let acked = |((_, partition), lane): (&(u128, u32), &Lane)| {
            Some((lane.topic.clone(), *partition, lane.next?))
        };
        self.lanes.iter().filter_map(acked).collect()
    }

    /// Begins as another producer, or another epoch of it, with nothing sent.
    pub(crate) fn begin(&mut self, producer: broker::ProducerIdentity) {
        self.producer = producer;
        self.lanes.retain(|_, lane| {
            // Lanes that were not used give their buffers back.
            let used = lane.sequence > 0;
            (lane.sequence, lane.next) = (0, None);
            used
        });
        self.sent = false;
    }

    /// Sends what is ready once the request before it is acked.
    fn request(&mut self) -> Result<(), LogError> {
        self.acked()?;
        let mut batches = Vec::new();
        let (mut bytes, mut count) = (0, 0);
        for ready in &self.ready {
            if count > 0 && bytes + ready.batch.len() > REQUEST_BYTES_MAX {
                break;
            }
            bytes += ready.batch.len();
            count += 1;
            batches.push(broker::ProducePartition {
                partition: place(&ready.to.0, ready.to.1),
                bytes: u32::try_from(ready.batch.len()).expect("a batch is far below 4 GiB"),
            });
        }
        if count == 0 {
            return Ok(());
        }
        self.ready_bytes -= bytes;
        let (places, attachment): (Vec<_>, Attachment) =
            self.ready.drain(..count).map(|r| (r.to, r.batch)).unzip_into();
        let request = broker::Produce { producer: self.producer, batches };
        let broker = self.broker.clone();
        self.sent = true;
        self.in_flight = Some(self.requests.0.spawn(async move {
            let produced = broker.produce(request, attachment).await.map_err(log_error)?;
            if produced.outcomes.len() != places.len() {
                return Err(refused("a produce was answered for other batches than were sent"));
            }
            let mut acks = Vec::with_capacity(places.len());
            for (to, outcome) in places.into_iter().zip(produced.outcomes) {
                match outcome {
                    ProduceOutcome::Appended { next, .. } => acks.push((to, from_broker(next))),
                    ProduceOutcome::Refused(error) => {
                        return Err(partition_error(&to.0.name, to.1, 0, error));
                    }
                }
            }
            Ok(acks)
        }));
        Ok(())
    }

    /// Waits for the request in flight.
    fn acked(&mut self) -> Result<(), LogError> {
        let Some(sent) = self.in_flight.take() else { return Ok(()) };
        let sent = self.requests.0.block_on(async { tokio::time::timeout(ANSWER, sent).await });
        let acks = match sent {
            Ok(Ok(sent)) => sent?,
            Ok(Err(panicked)) => return Err(refused(panicked)),
            Err(_) => return Err(LogError::Unreachable { source: "no ack of a produce in time".into() }),
        };
        for ((topic, partition), next) in acks {
            if let Some(lane) = self.lanes.get_mut(&(topic.uuid.0, partition)) {
                lane.next = Some(next);
            }
        }
        Ok(())
    }

    /// Every batch that is being filled becomes ready.
    fn seal_all(&mut self) {
        let producer = self.producer;
        for ((_, partition), lane) in &mut self.lanes {
            if let Some(batch) = lane.seal(producer) {
                self.ready_bytes += batch.len();
                self.ready.push(Ready { to: (lane.topic.clone(), *partition), batch });
            }
        }
    }

    fn is_free(&self) -> bool {
        self.in_flight.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Lane {
    /// Adds a record; batches that are full become ready.
    fn push(
        &mut self,
        producer: broker::ProducerIdentity,
        partition: u32,
        record: RecordParts<'_>,
        ready: &mut Vec<Ready>,
    ) -> Result<(), LogError> {
        let names: Vec<_> = record.headers.iter().map(|h| String::from_utf8_lossy(&h.name)).collect();
        let headers: Vec<_> =
            names.iter().zip(record.headers).map(|(n, h)| (n.as_ref(), h.value.as_deref())).collect();
        let parts = broker::batch::RecordParts {
            timestamp: record.timestamp,
            key: record.key,
            value: record.value,
            headers: &headers,
        };
        if self.builder.push(parts) {
            return Ok(());
        }
        let to = (self.topic.clone(), partition);
        ready.extend(self.seal(producer).map(|batch| Ready { to: to.clone(), batch }));
        if !self.builder.push(parts) {
            // Larger than a batch: it gets one of its own.
            let options = BatchOptions { bytes_max: RECORD_BYTES_MAX, ..self.builder.options() };
            let mut own = BatchBuilder::new(options);
            if !own.push(parts) {
                let (bytes, topic) = (record.value.map_or(0, <[u8]>::len), &self.topic.name);
                return Err(refused(format!(
                    "a record of {bytes} bytes for {topic}-{partition} is larger than {RECORD_BYTES_MAX}"
                )));
            }
            let batch = own.build(self.stamp(producer, 1));
            ready.push(Ready { to, batch });
        }
        Ok(())
    }

    fn stamp(&mut self, producer: broker::ProducerIdentity, records: i32) -> ProducerStamp {
        let sequence = self.sequence;
        self.sequence = tidemill_broker::batch::advance_sequence(sequence, records);
        ProducerStamp { id: producer.id, epoch: producer.epoch, sequence }
    }

    fn seal(&mut self, producer: broker::ProducerIdentity) -> Option<Bytes> {
        if self.builder.is_empty() {
            return None;
        }
        let records = i32::try_from(self.builder.count()).expect("a batch counts its records in an i32");
        let stamp = self.stamp(producer, records);
        Some(self.builder.build(stamp))
    }
}

/// Places and batches of a request.
trait UnzipInto {
    fn unzip_into(self) -> (Vec<(TopicId, u32)>, Attachment);
}

impl<I: Iterator<Item = ((TopicId, u32), Bytes)>> UnzipInto for I {
    fn unzip_into(self) -> (Vec<(TopicId, u32)>, Attachment) {
        let (places, batches): (Vec<_>, Vec<_>) = self.unzip();
        (places, batches.into_iter().collect())
    }
}
