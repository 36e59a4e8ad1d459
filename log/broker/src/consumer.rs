//! A consumer: reads partitions from positions, ahead of its caller within a bound.
//!
//! ```text
//!   positions ─▶ fetcher task ──fetch──▶ Broker
//!                    │ events, charged to a budget
//!                    ▼
//!                Consumer::next ─▶ Batches | CaughtUp | Failed
//! ```
//!
//! Invariants
//! * Events of a partition come in order and without a gap: each continues where the one before said.
//! * Bytes that were fetched and not yet dropped by the caller stay within [`ConsumerOptions::prefetch_bytes_max`]
//!   (one fetch that holds a single larger batch excepted).
//! * A partition that fails is told once and read no further; the others go on.
//!
//! Offsets are not committed here: who processes exactly once commits them in the transaction of its outputs.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::api::{
    Broker, Fetch, FetchPartition, FetchedPartition, Isolation, PartitionOffsets, Position, TopicPartition,
};
use crate::error::{BrokerError, Reaction};
use crate::visible::{VisibleBatch, visible};

/// Events that wait for the caller; the budget bounds their bytes.
const EVENTS_MAX: usize = 256;
/// The pause before a fetch that failed is made again, doubled each time, and its bound.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Fetches in a row that may fail.
const FAILURES_MAX: u32 = 10;

/// How a consumer reads.
#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// Which records are seen.
    pub isolation: Isolation,
    /// Most bytes of one fetch.
    pub fetch_bytes_max: u32,
    /// Most bytes of one partition in one fetch.
    pub partition_bytes_max: u32,
    /// How long one fetch waits at the end; new records end the wait.
    pub wait: Duration,
    /// Bytes that are fetched and not yet dropped by the caller.
    pub prefetch_bytes_max: usize,
}

impl Default for ConsumerOptions {
    fn default() -> Self {
        ConsumerOptions {
            isolation: Isolation::ReadCommitted,
            fetch_bytes_max: 4 << 20,
            partition_bytes_max: 1 << 20,
            wait: Duration::from_secs(5),
            prefetch_bytes_max: 16 << 20,
        }
    }
}

/// What a consumer met.
#[derive(Debug)]
pub enum Event {
    /// A partition went on.
    Batches(Consumed),
    /// There was nothing more in any partition just now. Told once each time the end is reached.
    CaughtUp,
    /// A partition cannot be read any further.
    Failed {
        /// Which.
        partition: TopicPartition,
        /// Where it stopped.
        at: Position,
        /// Why.
        error: BrokerError,
    },
}

/// Progress in one partition.
#[derive(Debug)]
pub struct Consumed {
    /// The partition.
    pub partition: TopicPartition,
    /// What is visible, verified; empty where everything was left out.
    pub batches: Vec<VisibleBatch>,
    /// Records below this offset are not meant: the first batch may begin before it.
    pub from: i64,
    /// Where reading goes on; markers and aborted records count.
    pub next: Position,
    /// The partition's offsets at the time of the fetch.
    pub offsets: PartitionOffsets,
    // Given back when the caller drops the event.
    _charge: OwnedSemaphorePermit,
}

/// Reads partitions. Dropping it ends its task.
#[derive(Debug)]
pub struct Consumer {
    events: mpsc::Receiver<Result<Event, BrokerError>>,
    task: JoinHandle<()>,
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Consumer {
    /// Begins to read. Must be called on a tokio runtime, which runs the fetcher task.
    pub fn start<B: Broker>(
        broker: B,
        positions: Vec<(TopicPartition, Position)>,
        options: ConsumerOptions,
    ) -> Consumer {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let task = tokio::spawn(fetch(broker, positions, options, sender));
        Consumer { events, task }
    }

    /// The next event; none after an error, or once every partition failed. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, BrokerError>> {
        self.events.recv().await
    }

    /// [`Consumer::next`] where there is one at once.
    pub fn try_next(&mut self) -> Option<Result<Event, BrokerError>> {
        self.events.try_recv().ok()
    }
}

/// The fetcher task.
async fn fetch<B: Broker>(
    broker: B,
    mut positions: Vec<(TopicPartition, Position)>,
    options: ConsumerOptions,
    events: mpsc::Sender<Result<Event, BrokerError>>,
) {
    let budget = options.prefetch_bytes_max.clamp(1, u32::MAX as usize).min(Semaphore::MAX_PERMITS);
    let memory = Arc::new(Semaphore::new(budget));
    let fetch_bytes = options.fetch_bytes_max.clamp(1, u32::try_from(budget).unwrap_or(u32::MAX));
    let wait_ms = u32::try_from(options.wait.as_millis()).unwrap_or(u32::MAX);
    let mut at_end = false;
    let mut failures = 0;
    while !positions.is_empty() {
        // Taken before the fetch, so that nobody fetches what nobody has room for.
        let charge = memory.clone().acquire_many_owned(fetch_bytes).await;
        let mut charge = charge.expect("the semaphore is never closed");
        let partitions = positions.iter().map(|&(partition, position)| FetchPartition {
            partition,
            position,
            bytes_max: options.partition_bytes_max,
        });
        let request = Fetch {
            partitions: partitions.collect(),
            bytes_max: fetch_bytes,
            wait_ms_max: if at_end { wait_ms } else { 0 },
            isolation: options.isolation,
        };
        let (fetched, attachment) = match broker.fetch(request).await {
            Ok(answer) => answer,
            Err(error) => {
                failures += 1;
                let again = matches!(error.reaction(), Reaction::Retry | Reaction::Unknown);
                if !again || failures >= FAILURES_MAX {
                    let _ = events.send(Err(error)).await;
                    return;
                }
                let pause = (PAUSE.0 * 2u32.pow(failures.min(6))).min(PAUSE.1);
                tokio::time::sleep(pause.mul_f64(rand::random())).await;
                continue;
            }
        };
        failures = 0;
        let mut bytes = attachment.into_bytes();
        let mut moved = false;
        for got in fetched.partitions {
            let Some(index) = positions.iter().position(|(partition, _)| *partition == got.partition) else {
                continue;
            };
            let asked = positions[index].1;
            let event = match consumed(got, asked, &mut bytes, &options, &mut charge) {
                Ok(None) => continue,
                Ok(Some(consumed)) => {
                    positions[index].1 = consumed.next;
                    Event::Batches(consumed)
                }
                Err((partition, error)) => {
                    positions.remove(index);
                    Event::Failed { partition, at: asked, error }
                }
            };
            moved = true;
            if events.send(Ok(event)).await.is_err() {
                return;
            }
        }
        if !moved && !at_end && events.send(Ok(Event::CaughtUp)).await.is_err() {
            return;
        }
        at_end = !moved;
        // The partition that was first is last now: a full fetch would serve the same ones for ever.
        if !positions.is_empty() {
            positions.rotate_left(1);
        }
    }
}

/// One partition's part of an answer; none where it did not move.
fn consumed(
    got: FetchedPartition,
    asked: Position,
    bytes: &mut Bytes,
    options: &ConsumerOptions,
    charge: &mut OwnedSemaphorePermit,
) -> Result<Option<Consumed>, (TopicPartition, BrokerError)> {
    let partition = got.partition;
    if let Some(error) = got.error {
        return Err((partition, error.into_error()));
    }
    let corrupt = |what: String| (partition, BrokerError::Corrupt { what });
    let size = got.bytes as usize;
    if size > bytes.len() {
        return Err(corrupt(format!("{size} bytes of {partition} announced, {} received", bytes.len())));
    }
    let part = bytes.split_to(size);
    if got.next == asked {
        return Ok(None);
    }
    let batches = visible(part, &got.aborted, options.isolation)
        .map_err(|e| corrupt(format!("{partition} at offset {}: {e}", asked.offset)))?;
    // A single batch may be larger than what was taken; then all of it is charged.
    let mine = charge.split(size.min(charge.num_permits())).expect("no more than there is");
    Ok(Some(Consumed {
        partition,
        batches,
        from: asked.offset,
        next: got.next,
        offsets: got.offsets,
        _charge: mine,
    }))
}
