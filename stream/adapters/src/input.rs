//! Reads ahead of the engine: fetches run on the requests' runtime, the engine takes what is there.
//!
//! ```text
//!   fetch ─▶ fetch ─▶ ...      one at a time, from the position behind the last answer
//!     └──▶ queue of [`AHEAD`] answers ──▶ poll: decode, hand over
//! ```
//!
//! Invariants
//! * At most [`AHEAD`] + 2 answers of [`ANSWER_BYTES_MAX`] each are in memory; a full queue stops fetching.
//! * A paused partition is left out of the next fetch; answers that were on their way are still handed over.
//! * Dropping the input ends the task: its queue is gone.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tidemill_broker as broker;
use tidemill_broker::{Broker, BrokerError};
use tidemill_stream::io::{Fetched, Fetching, Input, LogError, Position, TopicId};
use tokio::sync::{Notify, mpsc};

use crate::decode;
use crate::log::{Requests, log_error, place, to_broker};

/// Answers that wait for the engine.
const AHEAD: usize = 2;

/// Bytes of one answer, over all partitions.
const ANSWER_BYTES_MAX: u32 = 2 << 20;

/// Bytes of one partition in an answer: so that several partitions share one.
const PARTITION_BYTES_MAX: u32 = 512 << 10;

/// How long the broker waits where there is nothing: the pace at which idleness is noticed.
const WAIT_MS: u32 = 100;

/// How long an answer may take beyond that.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// What was asked of one partition, and what came.
struct Answer {
    asked: i64,
    part: broker::FetchedPartition,
    bytes: Bytes,
}

type Answers = Result<Vec<Answer>, LogError>;

/// What the engine changes while a fetch is under way.
struct Shared {
    paused: Mutex<Vec<bool>>,
    changed: Notify,
}

/// An [`Input`] over a broker.
pub(crate) struct PrefetchedInput {
    topic: TopicId,
    numbers: Vec<u32>,
    shared: Arc<Shared>,
    answers: mpsc::Receiver<Answers>,
    requests: Requests,
}

impl PrefetchedInput {
    /// Starts to fetch.
    pub(crate) fn start<B: Broker + Clone>(
        broker: B,
        requests: &Requests,
        topic: TopicId,
        partitions: &[(u32, Position)],
    ) -> Self {
        let (queue, answers) = mpsc::channel(AHEAD);
        let paused = Mutex::new(vec![false; partitions.len()]);
        let shared = Arc::new(Shared { paused, changed: Notify::new() });
        let numbers = partitions.iter().map(|(p, _)| *p).collect();
        let next = partitions.iter().map(|(p, at)| (place(&topic, *p), to_broker(*at))).collect();
        requests.0.spawn(fetch_ahead(broker, next, Arc::clone(&shared), queue));
        Self { topic, numbers, shared, answers, requests: requests.clone() }
    }
}

async fn fetch_ahead<B: Broker>(
    broker: B,
    mut next: Vec<(broker::TopicPartition, broker::Position)>,
    shared: Arc<Shared>,
    queue: mpsc::Sender<Answers>,
) {
    let mut first = 0;
    loop {
        // Room first: nothing is fetched that has no place to wait in.
        let Ok(room) = queue.reserve().await else { return };
        let partitions: Vec<_> = {
            let paused = shared.paused.lock();
            let n = next.len();
            (0..n).map(|i| (first + i) % n).filter(|i| !paused[*i]).collect()
        };
        if partitions.is_empty() {
            drop(room);
            tokio::select! {
                () = shared.changed.notified() => {}
                () = queue.closed() => return,
            }
            continue;
        }
        // Answers fill up from the front: the next fetch begins with another partition.
        first += 1;
        let request = broker::Fetch {
            partitions: partitions
                .iter()
                .map(|i| broker::FetchPartition {
                    partition: next[*i].0,
                    position: next[*i].1,
                    bytes_max: PARTITION_BYTES_MAX,
                })
                .collect(),
            bytes_max: ANSWER_BYTES_MAX,
            wait_ms_max: WAIT_MS,
            isolation: broker::Isolation::ReadCommitted,
        };
        let limit = ANSWER_WAIT + Duration::from_millis(WAIT_MS.into());
        let answer = tokio::select! {
            answer = tokio::time::timeout(limit, broker.fetch(request)) => answer,
            () = queue.closed() => return,
        };
        let answers = match answer {
            Ok(Ok((fetched, bytes))) => decode::split(fetched, bytes.into_bytes()),
            Ok(Err(error)) => Err(log_error(error)),
            Err(_) => {
                let what = format!("no answer to a fetch within {limit:?}");
                Err(log_error(BrokerError::Unavailable { what }))
            }
        };
        let answers = answers.map(|parts| {
            let mut answers = Vec::with_capacity(parts.len());
            for (i, (part, bytes)) in partitions.iter().zip(parts) {
                let asked = next[*i].1.offset;
                next[*i].1 = part.next;
                answers.push(Answer { asked, part, bytes });
            }
            answers
        });
        // After an error there is no position to go on from: the engine starts again from its last commit.
        let failed = answers.is_err() || answers.iter().flatten().any(|a| a.part.error.is_some());
        room.send(answers);
        if failed {
            return;
        }
    }
}

impl Input for PrefetchedInput {
    fn poll(&mut self, wait: Duration, _bytes_max: usize) -> Result<Vec<Fetched>, LogError> {
        let answers = &mut self.answers;
        let answer = match answers.try_recv() {
            Ok(answer) => Some(answer),
            Err(_) => self.requests.0.block_on(async {
                match tokio::time::timeout(wait, answers.recv()).await {
                    Ok(answer) => answer,
                    Err(_) => Some(Ok(Vec::new())),
                }
            }),
        };
        let Some(answer) = answer else {
            return Err(LogError::Unreachable { source: "the reader has ended".into() });
        };
        let decoded = answer?.into_iter();
        decoded.map(|a| decode::partition(&self.topic.name, &a.part, &a.bytes, a.asked)).collect()
    }

    fn pause(&mut self, partition: u32, fetching: Fetching) {
        if let Some(i) = self.numbers.iter().position(|p| *p == partition) {
            self.shared.paused.lock()[i] = fetching == Fetching::Paused;
            self.shared.changed.notify_one();
        }
    }
}
