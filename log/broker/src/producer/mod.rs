//! Producers: idempotent, batching, with a bound on memory.
//!
//! ```text
//!   send ──memory──▶ lanes (lanes.rs) ◀──events── sender task ──produce──▶ Broker
//!     ◀── Ack                          ──requests─▶          ◀──outcomes──
//! ```
//!
//! Callers push records straight into the lanes under a short lock and wake the task; there is no queue of records.
//! The task makes requests of what may go, at most [`REQUESTS_MAX`] at a time, and feeds outcomes back.
//!
//! Invariants
//! * Every send ends in an ack or an error, at the latest after [`ProducerOptions::delivery_timeout`].
//! * Memory is charged before a record is taken and given back when its batch is settled: a slow broker slows senders.
//! * Dropping a producer drops what it has not sent; [`Producer::close`] sends it first.

mod ack;
mod lanes;
mod transaction;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tidemill_log::batch::{Compression, RecordParts};
use tidemill_rpc::Attachment;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

pub use self::ack::Ack;
use self::lanes::{Lanes, Request};
pub use self::transaction::{TransactionalOptions, TransactionalProducer};
use crate::api::{Broker, InitProducer, Produce, ProducePartition, ProducerIdentity, Topic};
use crate::error::{BrokerError, Reaction};

/// Requests in flight at one time; a partition's batches are bounded separately.
const REQUESTS_MAX: usize = 5;
/// Attempts of an init, which may be repeated freely.
const INITS_MAX: u32 = 5;
/// The pause between two attempts, times a random share.
const INIT_PAUSE: Duration = Duration::from_millis(200);
/// What a record costs beyond its bytes: lengths, deltas, its share of a batch.
const RECORD_OVERHEAD_BYTES: usize = 24;

/// How a producer batches.
#[derive(Clone, Debug)]
pub struct ProducerOptions {
    /// A batch that is not full goes after this long.
    pub linger: Duration,
    /// Most bytes of a batch before compression.
    pub batch_bytes_max: usize,
    /// Codec of batches.
    pub compression: Compression,
    /// Records that are not settled hold at most this much; further sends wait.
    pub memory_bytes_max: usize,
    /// A batch that is not acked after this long fails the producer.
    pub delivery_timeout: Duration,
}

impl Default for ProducerOptions {
    fn default() -> Self {
        ProducerOptions {
            linger: Duration::from_millis(5),
            batch_bytes_max: 256 << 10,
            compression: Compression::None,
            memory_bytes_max: 32 << 20,
            delivery_timeout: Duration::from_secs(120),
        }
    }
}

/// How far a producer got, counting records in the order of sending over all partitions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DurablePrefix {
    /// So many records, from the first on, are acked without a gap.
    pub durable: u64,
    /// At most so many more may be in the log.
    pub in_doubt: u64,
}

/// An idempotent producer. Shared by reference; its sender task ends with it.
#[derive(Debug)]
pub struct Producer<B: Broker + Clone> {
    sender: Sender<B>,
}

impl<B: Broker + Clone> Producer<B> {
    /// Takes a producer id. Must be called on a tokio runtime, which runs the sender task.
    pub async fn open(broker: B, options: ProducerOptions) -> Result<Self, BrokerError> {
        let init = InitProducer { transactional_id: None, timeout_ms: 0, carried: None };
        let identity = initialised(&broker, &init).await?;
        Ok(Producer { sender: Sender::start(broker, Lanes::new(identity, options.clone(), false), &options) })
    }

    /// Takes a record: to `partition`, or by its key's murmur2, or, without a key, batch-wise to one partition after
    /// another. Waits for memory. Dropped before it returns, it took nothing.
    pub async fn send(
        &self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
    ) -> Result<Ack, BrokerError> {
        self.sender.send(topic, partition, record).await
    }

    /// [`Producer::send`] where there is memory at once; `None` where there is not.
    pub fn try_send(
        &self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
    ) -> Result<Option<Ack>, BrokerError> {
        self.sender.try_send(topic, partition, record)
    }

    /// Sends everything taken so far without lingering, and waits until it is acked.
    pub async fn flush(&self) -> Result<(), BrokerError> {
        self.sender.flush().await
    }

    /// How many records, from the first, are durable. Meaningful at any time, after a failure too.
    pub fn durable_prefix(&self) -> DurablePrefix {
        self.sender.shared.lanes.lock().durable_prefix()
    }

    /// Flushes and ends the sender task.
    pub async fn close(self) -> Result<DurablePrefix, BrokerError> {
        self.sender.flush().await?;
        Ok(self.durable_prefix())
    }
}

/// Asks for an identity until there is an answer. Repeating an init is safe: at worst an identity is never used.
async fn initialised<B: Broker>(broker: &B, init: &InitProducer) -> Result<ProducerIdentity, BrokerError> {
    let mut attempt = 1;
    loop {
        match broker.init_producer(init.clone()).await {
            Err(error)
                if attempt < INITS_MAX && matches!(error.reaction(), Reaction::Retry | Reaction::Unknown) =>
            {
                attempt += 1;
                tokio::time::sleep(INIT_PAUSE.mul_f64(rand::random())).await;
            }
            answer => return answer,
        }
    }
}

/// Lanes with the task that empties them.
#[derive(Debug)]
pub(crate) struct Sender<B> {
    broker: B,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    lanes: Mutex<Lanes>,
    /// Something may go.
    wake: Notify,
    /// Something was settled, or everything failed.
    settled: Notify,
    memory: Semaphore,
    memory_bytes_max: usize,
}

impl<B> Drop for Sender<B> {
    fn drop(&mut self) {
        self.task.abort();
        let what = "the producer was dropped before this was acked".to_owned();
        self.shared.lanes.lock().fail(BrokerError::Unavailable { what });
    }
}

impl<B: Broker + Clone> Sender<B> {
    fn start(broker: B, lanes: Lanes, options: &ProducerOptions) -> Self {
        let memory_bytes_max = options.memory_bytes_max.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        let shared = Arc::new(Shared {
            lanes: Mutex::new(lanes),
            wake: Notify::new(),
            settled: Notify::new(),
            memory: Semaphore::new(memory_bytes_max),
            memory_bytes_max,
        });
        let task = tokio::spawn(run(broker.clone(), shared.clone()));
        Sender { broker, shared, task }
    }

    /// What a record is charged; a huge one takes all the memory there is.
    fn charge(&self, record: &RecordParts<'_>) -> u32 {
        let of = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        let headers: usize = record.headers.iter().map(|(name, value)| name.len() + of(*value)).sum();
        let bytes = of(record.key) + of(record.value) + headers + RECORD_OVERHEAD_BYTES;
        u32::try_from(bytes.min(self.shared.memory_bytes_max)).expect("the bound fits a u32")
    }

    pub(crate) async fn send(
        &self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
    ) -> Result<Ack, BrokerError> {
        let charge = self.charge(&record);
        let memory = match self.shared.memory.try_acquire_many(charge) {
            Ok(memory) => memory,
            Err(_) => {
                // Whoever waits for memory has nothing to linger for.
                self.shared.lanes.lock().flush();
                self.shared.wake.notify_one();
                self.shared.memory.acquire_many(charge).await.expect("the semaphore is never closed")
            }
        };
        let ack = self.push(topic, partition, record, charge)?;
        memory.forget();
        Ok(ack)
    }

    fn try_send(
        &self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
    ) -> Result<Option<Ack>, BrokerError> {
        let charge = self.charge(&record);
        let Ok(memory) = self.shared.memory.try_acquire_many(charge) else {
            self.shared.lanes.lock().flush();
            self.shared.wake.notify_one();
            return Ok(None);
        };
        let ack = self.push(topic, partition, record, charge)?;
        memory.forget();
        Ok(Some(ack))
    }

    fn push(
        &self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
        charge: u32,
    ) -> Result<Ack, BrokerError> {
        let pushed = self.shared.lanes.lock().push(topic, partition, record, charge as usize, Instant::now());
        let (batch, index, wake) = pushed?;
        if wake {
            self.shared.wake.notify_one();
        }
        Ok(Ack { batch, index })
    }

    pub(crate) async fn flush(&self) -> Result<(), BrokerError> {
        let through = self.shared.lanes.lock().flush();
        self.shared.wake.notify_one();
        loop {
            let settled = self.shared.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            {
                let lanes = self.shared.lanes.lock();
                if let Some(error) = lanes.failure() {
                    return Err(error);
                }
                if lanes.durable_prefix().durable >= through {
                    return Ok(());
                }
            }
            settled.await;
        }
    }
}

impl Shared {
    /// Gives back memory and wakes who waits for a flush.
    fn tell(&self, freed: usize) {
        self.memory.add_permits(freed);
        self.settled.notify_waiters();
    }
}

/// The sender task.
async fn run<B: Broker + Clone>(broker: B, shared: Arc<Shared>) {
    let mut requests = FuturesUnordered::new();
    loop {
        let now = Instant::now();
        let (next_look, freed, renew) = {
            let mut lanes = shared.lanes.lock();
            lanes.expire(now);
            while requests.len() < REQUESTS_MAX {
                let Some(request) = lanes.take(now) else { break };
                requests.push(produce(&broker, request));
            }
            let renew = (lanes.wants_new_epoch() && requests.is_empty()).then(|| lanes.identity());
            (lanes.next_look(now), lanes.take_freed(), renew)
        };
        shared.tell(freed);
        if let Some(carried) = renew {
            tracing::warn!(
                id = carried.id,
                epoch = carried.epoch,
                "acked batches were lost; goes on under a new epoch"
            );
            let init = InitProducer { transactional_id: None, timeout_ms: 0, carried: Some(carried) };
            let renewed = initialised(&broker, &init).await;
            let mut lanes = shared.lanes.lock();
            match renewed {
                Ok(identity) => lanes.renew(identity),
                Err(error) => lanes.fail(error),
            }
            continue;
        }
        let alarm = async {
            match next_look {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Answers first: they make room and keep resends in order.
            biased;
            Some((number, answer)) = requests.next(), if !requests.is_empty() => {
                let (now, jitter) = (Instant::now(), rand::random::<f64>());
                let mut lanes = shared.lanes.lock();
                match answer {
                    Ok(outcomes) => lanes.answered(number, outcomes, now, jitter),
                    Err(error) => lanes.unanswered(number, error, now, jitter),
                }
            }
            () = shared.wake.notified() => {}
            () = alarm => {}
        }
    }
}

type Answer = (u64, Result<Vec<crate::api::ProduceOutcome>, BrokerError>);

async fn produce<B: Broker>(broker: &B, request: Request) -> Answer {
    let mut body = Vec::with_capacity(request.batches.len());
    let mut attachment = Attachment::default();
    for (partition, batch) in request.batches {
        body.push(ProducePartition {
            partition,
            bytes: u32::try_from(batch.len()).expect("a batch is below 2 GiB"),
        });
        attachment.push(batch);
    }
    let body = Produce { producer: request.producer, batches: body };
    (request.number, broker.produce(body, attachment).await.map(|produced| produced.outcomes))
}
