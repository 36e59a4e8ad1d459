//! A job's transactions: records and offsets on their way into the log, and the ends.
//!
//! ```text
//!   send         ─▶ sender of the transaction ─┐
//!   send_outside ─▶ sender of its own ─────────┴▶ end: what is left ─▶ every ack ─▶ end of transaction, asked until known
//!                                                                                     └▶ next epoch
//! ```
//!
//! The 64 partitions of a changelog get a few hundred bytes each per commit: they leave together in one request.
//!
//! Invariants
//! * Every transaction has its own (producer id, epoch), so sequences begin at 0 in each, and a request that was
//!   delayed can never act on a later one. What leaves outside has a producer of its own, made when it is first needed.
//! * A request that fails is the transaction's failure, whichever sender's it was: the engine starts again from its last
//!   commit.

use std::time::Duration;

use bytes::Bytes;
use tidemill_broker as broker;
use tidemill_broker::{Broker, BrokerError};
use tidemill_stream::io::{End, Ended, LogError, OffsetCommit, TopicId, Transactions};
use tidemill_stream::record::RecordParts;

use crate::log::{Requests, place, refused, to_broker};
use crate::sender::{Belongs, Sender};

/// How long the log keeps a transaction open that nobody ends.
const TIMEOUT_MS: u32 = 60_000;

/// How long one answer to an end is waited for before it is asked again.
const END_WAIT: Duration = Duration::from_secs(10);

/// The transactional producer of one process.
pub(crate) struct LogTransactions<B> {
    broker: B,
    requests: Requests,
    identity: String,
    inside: Sender<B>,
    /// At least once: what leaves beside the transaction.
    outside: Option<Sender<B>>,
    /// Whether offsets of the current epoch were sent.
    offsets_sent: bool,
    /// The first failure of this transaction; it never ends by a commit.
    failed: bool,
}

impl<B: Broker + Clone> LogTransactions<B> {
    /// Takes the identity: older processes that use it are fenced.
    pub(crate) fn fence(broker: B, requests: Requests, identity: &str) -> Result<Self, LogError> {
        let producer = producer(&broker, &requests, Some(identity.to_owned()))?;
        tracing::debug!(identity, producer = producer.id, epoch = producer.epoch, "fenced");
        Ok(Self {
            inside: Sender::new(broker.clone(), requests.clone(), producer, Belongs::ToTheTransaction),
            broker,
            requests,
            identity: identity.to_owned(),
            outside: None,
            offsets_sent: false,
            failed: false,
        })
    }

    /// Notes that the transaction can no longer commit.
    fn checked<T>(&mut self, result: Result<T, LogError>) -> Result<T, LogError> {
        result.map_err(|e| {
            self.failed = true;
            self.fenced(e)
        })
    }

    fn fenced(&self, error: LogError) -> LogError {
        let fenced = matches!(&error, LogError::Refused { source }
            if matches!(source.downcast_ref(), Some(BrokerError::Fenced { .. } | BrokerError::UnknownProducer { .. })));
        if fenced { LogError::Fenced { identity: self.identity.clone() } } else { error }
    }

    fn who(&self) -> broker::TransactionalIdentity {
        let producer = self.inside.producer;
        broker::TransactionalIdentity { transactional_id: self.identity.clone(), producer }
    }

    fn outside(&mut self) -> Result<&mut Sender<B>, LogError> {
        let made = match self.outside.take() {
            Some(sender) => sender,
            None => {
                let producer = producer(&self.broker, &self.requests, None)?;
                Sender::new(self.broker.clone(), self.requests.clone(), producer, Belongs::ToNone)
            }
        };
        Ok(self.outside.insert(made))
    }
}

fn producer<B: Broker>(
    broker: &B,
    requests: &Requests,
    transactional_id: Option<String>,
) -> Result<broker::ProducerIdentity, LogError> {
    let request = broker::InitProducer { transactional_id, timeout_ms: TIMEOUT_MS, carried: None };
    requests.call(broker.init_producer(request))
}

impl<B: Broker + Clone> Transactions for LogTransactions<B> {
    fn send(
        &mut self,
        topic: &TopicId,
        partition: u32,
        records: &mut dyn Iterator<Item = RecordParts<'_>>,
    ) -> Result<(), LogError> {
        let pushed = self.inside.push(topic, partition, records);
        self.checked(pushed)
    }

    fn send_outside(
        &mut self,
        topic: &TopicId,
        partition: u32,
        records: &mut dyn Iterator<Item = RecordParts<'_>>,
    ) -> Result<(), LogError> {
        let pushed = self.outside().and_then(|sender| sender.push(topic, partition, records));
        self.checked(pushed)
    }

    fn nudge(&mut self) -> Result<(), LogError> {
        let mut nudged = self.inside.nudge();
        if let Some(outside) = &mut self.outside {
            nudged = nudged.and(outside.nudge());
        }
        self.checked(nudged)
    }

    fn offsets(&mut self, group: &str, offsets: &[OffsetCommit]) -> Result<(), LogError> {
        let offsets = offsets.iter().map(|o| broker::GroupOffset {
            partition: place(&o.topic, o.partition),
            position: to_broker(o.position),
            metadata: Bytes::copy_from_slice(&o.metadata),
        });
        let request = broker::CommitOffsets {
            group: group.to_owned(),
            transaction: Some(self.who()),
            offsets: offsets.collect(),
        };
        self.offsets_sent = true;
        let committed = self.requests.call(self.broker.commit_offsets(request));
        self.checked(committed)
    }

    fn end(&mut self, how: End) -> Result<Ended, LogError> {
        match how {
            End::Commit if self.failed => {
                return Err(refused("a transaction that failed to send cannot commit"));
            }
            End::Commit => {
                // Output beside the transaction is durable before the offsets that stand for its input are.
                let mut drained = self.outside.as_mut().map_or(Ok(()), Sender::drain);
                drained = drained.and_then(|()| self.inside.drain());
                self.checked(drained)?;
            }
            // What is in flight may still arrive; its epoch ends with this transaction.
            End::Abort => self.inside.discard(),
        }
        if !self.inside.sent && !self.offsets_sent {
            return Ok(if how == End::Commit { Ended::Committed(Vec::new()) } else { Ended::Aborted });
        }
        let end = if how == End::Commit { broker::End::Commit } else { broker::End::Abort };
        let request = broker::EndTransaction { who: self.who(), end };
        let ended = match self.requests.call_for(END_WAIT, self.broker.end_transaction(request)) {
            Ok(ended) => ended,
            // Whether it was executed is not known: the same end is asked again, and told as it was decided.
            Err(LogError::Unreachable { source }) => {
                tracing::debug!(error = %source, "the end of a transaction has no answer yet");
                return Ok(Ended::Unknown);
            }
            Err(error) => return Err(self.fenced(error)),
        };
        let mut positions = self.inside.positions();
        // Behind the batches comes the marker.
        positions.iter_mut().for_each(|(_, _, next)| next.offset += 1);
        self.inside.begin(ended.next);
        (self.offsets_sent, self.failed) = (false, false);
        Ok(match ended.outcome {
            broker::Outcome::Committed => Ended::Committed(positions),
            broker::Outcome::Aborted => Ended::Aborted,
        })
    }
}
