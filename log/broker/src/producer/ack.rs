//! The shared end of a batch: all of its records are acked or failed by one event.

use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;

use crate::api::Position;
use crate::error::BrokerError;

/// How a batch ended: its base offset and the position after it, or why it failed.
pub(super) type BatchEnd = Result<(i64, Position), BrokerError>;

/// Where the records of one batch wait for its end.
#[derive(Debug, Default)]
pub(super) struct BatchAck {
    end: OnceLock<BatchEnd>,
    ended: Notify,
}

impl BatchAck {
    pub(super) fn done(&self, end: BatchEnd) {
        // Set once: a batch that is acked stays acked, whatever comes later.
        let _ = self.end.set(end);
        self.ended.notify_waiters();
    }

    async fn wait(&self) -> &BatchEnd {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if let Some(end) = self.end.get() {
                return end;
            }
            ended.await;
        }
    }
}

/// One record's acknowledgement. Dropping it changes nothing for the record.
#[derive(Debug, Clone)]
#[must_use = "a record is durable only once its ack says so; `flush` waits for all of them"]
pub struct Ack {
    pub(super) batch: Arc<BatchAck>,
    pub(super) index: i32,
}

impl Ack {
    /// The record's offset once it is as durable as its topic's mode promises. Cancel safe.
    pub async fn offset(&self) -> Result<i64, BrokerError> {
        match self.batch.wait().await {
            Ok((base_offset, _)) => Ok(base_offset + i64::from(self.index)),
            Err(error) => Err(error.clone()),
        }
    }

    /// The position after the record's batch, once acked. Cancel safe.
    pub async fn next_position(&self) -> Result<Position, BrokerError> {
        match self.batch.wait().await {
            Ok((_, next)) => Ok(*next),
            Err(error) => Err(error.clone()),
        }
    }
}
