//! The transactional producer: outputs and offsets that become visible together, or never.
//!
//! ```text
//!   open ──init: fences, aborts what the id had open──▶ ready ──send, add_offsets──▶ in a transaction
//!                                                         ▲                               │
//!                                                         └──next (producer id, epoch)── end
//! ```
//!
//! Each transaction has its own (producer id, epoch), so a request that is late, or that an earlier instance sent,
//! can never act on a later one. An end whose answer was lost is asked for again until it is told; the broker tells
//! every asker the same.
//!
//! Invariants
//! * Nothing is committed unless every record of the transaction was acked and its offsets were taken.
//! * An outcome is told, never guessed: where it cannot be learnt in time the producer is of no further use, and the
//!   next [`TransactionalProducer::open`] resolves it by fencing.

use std::time::Duration;

use tidemill_log::batch::RecordParts;
use tokio::time::Instant;

use super::lanes::Lanes;
use super::{Ack, ProducerOptions, Sender, initialised};
use crate::api::{
    Broker, CommitOffsets, End, EndTransaction, GroupOffset, InitProducer, Outcome, ProducerIdentity, Topic,
    TransactionalIdentity,
};
use crate::error::{BrokerError, Reaction};

/// The pause before a request is asked again, doubled each time, and its bound.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// How a transactional producer works.
#[derive(Clone, Debug)]
pub struct TransactionalOptions {
    /// Batching; [`ProducerOptions::linger`] matters little, since an end flushes.
    pub producer: ProducerOptions,
    /// The broker aborts a transaction that is open for longer.
    pub transaction_timeout: Duration,
    /// An end whose outcome is not known after this long is given up, with the producer.
    pub end_timeout: Duration,
}

impl Default for TransactionalOptions {
    fn default() -> Self {
        TransactionalOptions {
            producer: ProducerOptions::default(),
            transaction_timeout: Duration::from_secs(60),
            end_timeout: Duration::from_secs(120),
        }
    }
}

/// A producer whose records become visible by transaction. One transaction at a time; the first send or offset after
/// an end begins the next.
#[derive(Debug)]
pub struct TransactionalProducer<B: Broker + Clone> {
    sender: Sender<B>,
    transactional_id: String,
    options: TransactionalOptions,
    unusable: Option<BrokerError>,
}

impl<B: Broker + Clone> TransactionalProducer<B> {
    /// Takes over the transactional id: earlier instances are fenced, and what they had open is aborted and resolved
    /// when this returns.
    pub async fn open(
        broker: B,
        transactional_id: impl Into<String>,
        options: TransactionalOptions,
    ) -> Result<Self, BrokerError> {
        let transactional_id = transactional_id.into();
        let timeout_ms = u32::try_from(options.transaction_timeout.as_millis()).unwrap_or(u32::MAX);
        let init =
            InitProducer { transactional_id: Some(transactional_id.clone()), timeout_ms, carried: None };
        let identity = initialised(&broker, &init).await?;
        let sender =
            Sender::start(broker, Lanes::new(identity, options.producer.clone(), true), &options.producer);
        Ok(TransactionalProducer { sender, transactional_id, options, unusable: None })
    }

    /// The identity of the current transaction.
    pub fn identity(&self) -> ProducerIdentity {
        self.sender.shared.lanes.lock().identity()
    }

    /// Takes a record into the current transaction; see [`super::Producer::send`]. After an error the transaction can
    /// only be aborted.
    pub async fn send(
        &self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
    ) -> Result<Ack, BrokerError> {
        self.sender.send(topic, partition, record).await
    }

    /// [`TransactionalProducer::send`] where there is memory at once; `None` where there is not.
    pub fn try_send(
        &self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
    ) -> Result<Option<Ack>, BrokerError> {
        self.sender.try_send(topic, partition, record)
    }

    /// Sends everything taken so far, and waits until it is acked. It is visible to nobody who reads committed.
    pub async fn flush(&self) -> Result<(), BrokerError> {
        self.sender.flush().await
    }

    /// Adds a group's positions to the current transaction; they are pending until it ends.
    pub async fn add_offsets(&self, group: &str, offsets: Vec<GroupOffset>) -> Result<(), BrokerError> {
        let request = CommitOffsets { group: group.to_owned(), transaction: Some(self.who()), offsets };
        let until = Instant::now() + self.options.producer.delivery_timeout;
        // The same positions under the same epoch: taking them twice is taking them once.
        again(until, || self.sender.broker.commit_offsets(request.clone())).await
    }

    /// Commits: flushes, ends, and tells how it ended. [`Outcome::Aborted`] means that the broker aborted before,
    /// because the transaction timed out or the owner died; nothing of it is visible.
    ///
    /// Where a record was not acked the transaction is not committed, and that error is returned; then
    /// [`TransactionalProducer::abort`] makes the producer usable again.
    pub async fn commit(&mut self) -> Result<Outcome, BrokerError> {
        self.sender.flush().await?;
        self.end(End::Commit).await
    }

    /// Aborts. Nothing of the transaction becomes visible.
    pub async fn abort(&mut self) -> Result<Outcome, BrokerError> {
        self.end(End::Abort).await
    }

    async fn end(&mut self, end: End) -> Result<Outcome, BrokerError> {
        if let Some(error) = &self.unusable {
            return Err(error.clone());
        }
        let request = EndTransaction { who: self.who(), end };
        let until = Instant::now() + self.options.end_timeout;
        match again(until, || self.sender.broker.end_transaction(request.clone())).await {
            Ok(ended) => {
                let mut lanes = self.sender.shared.lanes.lock();
                lanes.restart(ended.next);
                let freed = lanes.take_freed();
                drop(lanes);
                self.sender.shared.tell(freed);
                Ok(ended.outcome)
            }
            Err(error) => {
                self.unusable = Some(error.clone());
                Err(error)
            }
        }
    }

    fn who(&self) -> TransactionalIdentity {
        TransactionalIdentity { transactional_id: self.transactional_id.clone(), producer: self.identity() }
    }
}

/// Asks again while there is no answer, until `until`.
async fn again<T, F>(until: Instant, mut ask: impl FnMut() -> F) -> Result<T, BrokerError>
where
    F: Future<Output = Result<T, BrokerError>>,
{
    let mut pause = PAUSE.0;
    loop {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if !matches!(error.reaction(), Reaction::Retry | Reaction::Resend | Reaction::Unknown)
            || Instant::now() >= until
        {
            return Err(error);
        }
        tokio::time::sleep(pause.mul_f64(rand::random())).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}
