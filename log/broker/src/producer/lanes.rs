//! What a producer has to send, as a state machine: events in, requests out; no clock, no I/O, no tasks inside.
//!
//! One lane a partition. A batch's life:
//!
//! ```text
//!   filling ──full, linger over, flush──▶ waiting ──taken into a request──▶ in flight ──appended──▶ acked
//!                                            ▲                                │  │
//!                                            ├──────the connection died───────┘  └──refused──▶ refused
//!                                            └──────the first unacked batch is refused: all from there─┘
//! ```
//!
//! Invariants
//! * Batches of a lane have consecutive sequences; at most [`WINDOW`] of them, counted from the first unacked one,
//!   are on their way, because the log remembers the last five.
//! * A batch is never built twice: what is resent are the same bytes, so the log recognises them.
//! * Refused for its sequence again and again at the first unacked batch, a topic that is not durable lost acked
//!   batches. Then nothing new is sent until every batch whose fate is open is settled, and the producer goes on under
//!   a new epoch with sequences from 0. A producer of a transaction fails instead.
//! * The first failure is final: every batch that is not acked ends in that error.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tidemill_log::batch::{
    BatchBuilder, BatchOptions, ProducerStamp, RecordParts, advance_sequence, partition_for_key, set_producer,
};
use tokio::time::Instant;

use super::ack::BatchAck;
use super::{DurablePrefix, ProducerOptions};
use crate::api::{ProduceOutcome, ProducerIdentity, Topic, TopicId, TopicPartition};
use crate::error::{BrokerError, Reaction};

/// Unacked batches of a partition on their way, counted from the first: the log remembers as many.
const WINDOW: usize = 5;
/// Refusals for its sequence after which the first unacked batch's predecessors are taken for lost.
const LOST_AFTER: u32 = 4;
/// Deaths of a connection that one batch survives.
const DEATHS_MAX: u32 = 5;
/// Bytes of batches in one request; one batch may be larger.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// A larger record fits no entry of the smallest journal file that is in use.
const RECORD_BYTES_MAX: usize = 8 << 20;
/// The shortest and the longest pause before a refused batch is sent again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// A producer's lanes.
#[derive(Debug)]
pub(super) struct Lanes {
    options: ProducerOptions,
    transactional: bool,
    identity: ProducerIdentity,
    lanes: BTreeMap<TopicPartition, Lane>,
    sticky: HashMap<TopicId, u32>,
    /// Numbers records in the order of sending, over all partitions.
    next_record: u64,
    /// One past the largest record number that was ever in a request.
    requested_through: u64,
    /// Records below this are to go at once, whatever the linger.
    flush_through: u64,
    next_request: u64,
    in_flight: HashMap<u64, Vec<(TopicPartition, i32)>>,
    lost: bool,
    failed: Option<(BrokerError, DurablePrefix)>,
    /// Bytes of memory that settled batches gave back since the last look.
    freed: usize,
}

#[derive(Debug)]
struct Lane {
    filling: BatchBuilder,
    open: Option<Open>,
    sealed: VecDeque<Sealed>,
    next_sequence: i32,
    /// Times in a row that something did not go through: the pause grows with it.
    refusals: u32,
    /// Times in a row that the first unacked batch was refused for its sequence.
    out_of_order: u32,
    not_before: Option<Instant>,
}

/// The batch that takes records.
#[derive(Debug)]
struct Open {
    first_record: u64,
    last_record: u64,
    since: Instant,
    charged: usize,
    ack: Arc<BatchAck>,
}

impl Open {
    fn new(first_record: u64, now: Instant) -> Self {
        Open { first_record, last_record: first_record, since: now, charged: 0, ack: Arc::default() }
    }
}

#[derive(Debug)]
struct Sealed {
    batch: Bytes,
    sequence: i32,
    state: State,
    ever_sent: bool,
    deaths: u32,
    give_up: Instant,
    count: i32,
    first_record: u64,
    last_record: u64,
    charged: usize,
    ack: Arc<BatchAck>,
}

#[derive(Debug, PartialEq)]
enum State {
    Waiting,
    InFlight(u64),
    Refused(BrokerError),
    Acked,
}

/// A request to make.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) number: u64,
    pub(super) producer: ProducerIdentity,
    pub(super) batches: Vec<(TopicPartition, Bytes)>,
}

impl Lanes {
    pub(super) fn new(identity: ProducerIdentity, options: ProducerOptions, transactional: bool) -> Self {
        Lanes {
            options,
            transactional,
            identity,
            lanes: BTreeMap::new(),
            sticky: HashMap::new(),
            next_record: 0,
            requested_through: 0,
            flush_through: 0,
            next_request: 0,
            in_flight: HashMap::new(),
            lost: false,
            failed: None,
            freed: 0,
        }
    }

    pub(super) fn identity(&self) -> ProducerIdentity {
        self.identity
    }

    pub(super) fn failure(&self) -> Option<BrokerError> {
        self.failed.as_ref().map(|(error, _)| error.clone())
    }

    /// Everything that was sent is acked.
    pub(super) fn is_settled(&self) -> bool {
        self.lanes.values().all(|lane| lane.open.is_none() && lane.sealed.is_empty())
    }

    /// Takes a record. Gives its batch's ack, its index in the batch, and whether something became ready to go.
    pub(super) fn push(
        &mut self,
        topic: &Topic,
        partition: Option<u32>,
        record: RecordParts<'_>,
        charged: usize,
        now: Instant,
    ) -> Result<(Arc<BatchAck>, i32, bool), BrokerError> {
        if let Some((error, _)) = &self.failed {
            return Err(error.clone());
        }
        if partition.is_some_and(|p| p >= topic.partitions) || topic.partitions == 0 {
            let partition = partition.unwrap_or(0);
            return Err(BrokerError::UnknownPartition { topic: topic.name.clone(), partition });
        }
        let sticky = partition.is_none() && record.key.is_none();
        let mut number = match (partition, record.key) {
            (Some(partition), _) => partition,
            (None, Some(key)) => partition_for_key(key, topic.partitions),
            // Whole batches go to one partition after another: spread evenly, in as few batches as can be.
            (None, None) => *self.sticky.entry(topic.id).or_insert(0),
        };
        let (identity, timeout) = (self.identity, self.options.delivery_timeout);
        let mut ready = false;
        if !self.lane(topic.partition(number)).filling.push(record) {
            ready = self.lane(topic.partition(number)).seal(identity, now, timeout);
            if sticky {
                number = (number + 1) % topic.partitions;
                self.sticky.insert(topic.id, number);
            }
            let lane = self.lane(topic.partition(number));
            if !lane.filling.push(record) {
                // The next partition's batch may be half full.
                lane.seal(identity, now, timeout);
                if !lane.filling.push(record) {
                    return self.push_alone(topic.partition(number), record, charged, now);
                }
            }
        }
        let number_of_record = self.next_record;
        self.next_record += 1;
        let lane = self.lane(topic.partition(number));
        let index = i32::try_from(lane.filling.count()).expect("a batch counts its records in an i32") - 1;
        let open = lane.open.get_or_insert_with(|| Open::new(number_of_record, now));
        open.last_record = number_of_record;
        open.charged += charged;
        // The first record of a batch wakes the sender too: it sets the linger's alarm.
        Ok((open.ack.clone(), index, ready || index == 0))
    }

    fn lane(&mut self, tp: TopicPartition) -> &mut Lane {
        let (options, transactional) = (&self.options, self.transactional);
        self.lanes.entry(tp).or_insert_with(|| Lane::new(options, transactional))
    }

    /// A record that fits no batch of the usual size gets one of its own.
    fn push_alone(
        &mut self,
        tp: TopicPartition,
        record: RecordParts<'_>,
        charged: usize,
        now: Instant,
    ) -> Result<(Arc<BatchAck>, i32, bool), BrokerError> {
        let (identity, timeout) = (self.identity, self.options.delivery_timeout);
        let number = self.next_record;
        let lane = self.lane(tp);
        let options = BatchOptions { bytes_max: RECORD_BYTES_MAX, ..lane.filling.options() };
        let usual = std::mem::replace(&mut lane.filling, BatchBuilder::new(options));
        if !lane.filling.push(record) {
            lane.filling = usual;
            let what = format!("a record of about {charged} bytes; at most {RECORD_BYTES_MAX} fit");
            return Err(BrokerError::Invalid { what });
        }
        let open = lane.open.insert(Open { charged, ..Open::new(number, now) });
        let ack = open.ack.clone();
        lane.seal(identity, now, timeout);
        lane.filling = usual;
        self.next_record += 1;
        Ok((ack, 0, true))
    }

    /// Everything taken so far goes without lingering.
    pub(super) fn flush(&mut self) -> u64 {
        self.flush_through = self.next_record;
        self.next_record
    }

    /// The next request, if anything may go now.
    pub(super) fn take(&mut self, now: Instant) -> Option<Request> {
        let number = self.next_request;
        let mut batches: Vec<(TopicPartition, Bytes)> = Vec::new();
        let mut sequences = Vec::new();
        let mut bytes = 0;
        'lanes: for (&tp, lane) in &mut self.lanes {
            if !self.lost
                && lane.open.as_ref().is_some_and(|open| {
                    open.first_record < self.flush_through || now >= open.since + self.options.linger
                })
            {
                lane.seal(self.identity, now, self.options.delivery_timeout);
            }
            if lane.not_before.is_some_and(|at| now < at) {
                continue;
            }
            for sealed in lane.sealed.iter_mut().take(WINDOW) {
                if sealed.state != State::Waiting || (self.lost && !sealed.ever_sent) {
                    continue;
                }
                if !batches.is_empty() && bytes + sealed.batch.len() > REQUEST_BYTES_MAX {
                    break 'lanes;
                }
                sealed.state = State::InFlight(number);
                sealed.ever_sent = true;
                bytes += sealed.batch.len();
                self.requested_through = self.requested_through.max(sealed.last_record + 1);
                batches.push((tp, sealed.batch.clone()));
                sequences.push((tp, sealed.sequence));
            }
        }
        if batches.is_empty() {
            return None;
        }
        self.next_request += 1;
        self.in_flight.insert(number, sequences);
        Some(Request { number, producer: self.identity, batches })
    }

    /// When to look again if nothing else happens.
    pub(super) fn next_look(&self, now: Instant) -> Option<Instant> {
        let of_lane = |lane: &Lane| {
            let linger = lane.open.as_ref().map(|open| open.since + self.options.linger);
            let pause = lane.not_before.filter(|&at| at > now);
            let give_up = lane.sealed.front().map(|sealed| sealed.give_up);
            [linger, pause, give_up].into_iter().flatten().min()
        };
        self.lanes.values().filter_map(of_lane).min()
    }

    /// Batches past their time fail the producer.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.lanes.values().any(|lane| lane.sealed.front().is_some_and(|sealed| now >= sealed.give_up)) {
            let what = format!("a batch was not acked within {:?}", self.options.delivery_timeout);
            self.fail(BrokerError::Unavailable { what });
        }
    }

    /// The answer to a request, one outcome a batch.
    pub(super) fn answered(
        &mut self,
        request: u64,
        outcomes: Vec<ProduceOutcome>,
        now: Instant,
        jitter: f64,
    ) {
        let Some(sent) = self.in_flight.remove(&request) else { return };
        if sent.len() != outcomes.len() {
            let what = format!("{} outcomes for {} batches", outcomes.len(), sent.len());
            return self.fail(BrokerError::Stopped { what });
        }
        let mut fatal = None;
        for ((tp, sequence), outcome) in sent.into_iter().zip(outcomes) {
            let Some(lane) = self.lanes.get_mut(&tp) else { continue };
            let of = |s: &&mut Sealed| s.sequence == sequence && s.state == State::InFlight(request);
            let Some(sealed) = lane.sealed.iter_mut().find(of) else { continue };
            match outcome {
                ProduceOutcome::Appended { base_offset, next, .. } => {
                    sealed.state = State::Acked;
                    sealed.ack.done(Ok((base_offset, next)));
                }
                ProduceOutcome::Refused(error) => {
                    let error = error.into_error();
                    match error.reaction() {
                        Reaction::Retry | Reaction::Resend | Reaction::Unknown => {
                            sealed.state = State::Refused(error);
                            // Whoever answered is alive.
                            sealed.deaths = 0;
                        }
                        Reaction::Correct | Reaction::Stop | Reaction::Report => {
                            fatal.get_or_insert(error);
                        }
                    }
                }
            }
        }
        if let Some(error) = fatal {
            return self.fail(error);
        }
        self.settle(now, jitter);
    }

    /// A request that brought no answer: it is sent again by sequence, whatever became of it.
    pub(super) fn unanswered(&mut self, request: u64, error: BrokerError, now: Instant, jitter: f64) {
        let Some(sent) = self.in_flight.remove(&request) else { return };
        if !matches!(error.reaction(), Reaction::Retry | Reaction::Resend | Reaction::Unknown) {
            return self.fail(error);
        }
        let died = error.is_dead_connection();
        let mut hopeless = false;
        for (tp, sequence) in sent {
            let Some(lane) = self.lanes.get_mut(&tp) else { continue };
            lane.refusals += 1;
            lane.pause(now, jitter);
            let of = |s: &&mut Sealed| s.sequence == sequence && s.state == State::InFlight(request);
            let Some(sealed) = lane.sealed.iter_mut().find(of) else { continue };
            sealed.state = State::Waiting;
            sealed.deaths += u32::from(died);
            hopeless |= sealed.deaths >= DEATHS_MAX;
        }
        if hopeless {
            self.fail(error);
        }
    }

    /// Drops what is acked from the front of every lane, and resends from a refused front.
    fn settle(&mut self, now: Instant, jitter: f64) {
        let mut lost_forever = None;
        for lane in self.lanes.values_mut() {
            while lane.sealed.front().is_some_and(|sealed| sealed.state == State::Acked) {
                let sealed = lane.sealed.pop_front().expect("just seen");
                self.freed += sealed.charged;
                lane.refusals = 0;
                lane.out_of_order = 0;
                lane.not_before = None;
            }
            let Some(Sealed { state: State::Refused(why), .. }) = lane.sealed.front() else { continue };
            let why = why.clone();
            lane.refusals += 1;
            lane.out_of_order += u32::from(matches!(why, BrokerError::OutOfOrder { .. }));
            if lane.out_of_order >= LOST_AFTER {
                if self.transactional {
                    lost_forever.get_or_insert(why);
                }
                self.lost = true;
            }
            lane.pause(now, jitter);
            for sealed in &mut lane.sealed {
                if sealed.state != State::Acked {
                    sealed.state = State::Waiting;
                }
            }
        }
        if let Some(error) = lost_forever {
            self.fail(error);
        }
    }

    /// Whether a new epoch is to be asked for now, carrying [`Lanes::identity`].
    pub(super) fn wants_new_epoch(&self) -> bool {
        // A lane whose front was refused for its sequence has nothing in doubt: what follows was refused as well.
        let in_doubt = |lane: &Lane| {
            lane.out_of_order < LOST_AFTER
                && lane.sealed.iter().any(|s| s.ever_sent && s.state != State::Acked)
        };
        self.lost && self.failed.is_none() && self.in_flight.is_empty() && !self.lanes.values().any(in_doubt)
    }

    /// Goes on under `identity`: what is not acked goes out again from sequence 0.
    pub(super) fn renew(&mut self, identity: ProducerIdentity) {
        self.identity = identity;
        self.lost = false;
        for lane in self.lanes.values_mut() {
            lane.sealed.retain(|sealed| sealed.state != State::Acked);
            lane.next_sequence = 0;
            lane.refusals = 0;
            lane.out_of_order = 0;
            lane.not_before = None;
            for sealed in &mut lane.sealed {
                let mut bytes = Vec::from(std::mem::take(&mut sealed.batch));
                let stamp =
                    ProducerStamp { id: identity.id, epoch: identity.epoch, sequence: lane.next_sequence };
                set_producer(&mut bytes, stamp);
                sealed.batch = bytes.into();
                sealed.sequence = lane.next_sequence;
                sealed.state = State::Waiting;
                sealed.ever_sent = false;
                lane.next_sequence = advance_sequence(lane.next_sequence, sealed.count);
            }
        }
    }

    /// Ends every batch that is not acked in `error`, and refuses records from now on.
    pub(super) fn fail(&mut self, error: BrokerError) {
        if self.failed.is_none() {
            let prefix = self.durable_prefix();
            self.failed = Some((error.clone(), prefix));
        }
        for lane in self.lanes.values_mut() {
            let open = lane.open.take().map(|open| (open.charged, open.ack));
            let sealed = lane.sealed.drain(..).map(|sealed| (sealed.charged, sealed.ack));
            for (charged, ack) in open.into_iter().chain(sealed) {
                self.freed += charged;
                ack.done(Err(error.clone()));
            }
        }
        self.lanes.clear();
        self.in_flight.clear();
    }

    /// Begins the next transaction under `identity`; what the last one did not send is gone.
    pub(super) fn restart(&mut self, identity: ProducerIdentity) {
        if !self.is_settled() {
            let what = "its transaction ended before it was sent".to_owned();
            self.fail(BrokerError::Unavailable { what });
        }
        self.lanes.clear();
        self.in_flight.clear();
        self.failed = None;
        self.lost = false;
        self.identity = identity;
    }

    /// How many records, from the first on, are durable; and how many more may be.
    pub(super) fn durable_prefix(&self) -> DurablePrefix {
        if let Some((_, prefix)) = &self.failed {
            return *prefix;
        }
        let of_lane = |lane: &Lane| {
            let sealed = lane.sealed.iter().find(|s| s.state != State::Acked).map(|s| s.first_record);
            sealed.into_iter().chain(lane.open.as_ref().map(|open| open.first_record)).min()
        };
        let durable = self.lanes.values().filter_map(of_lane).min().unwrap_or(self.next_record);
        DurablePrefix { durable, in_doubt: self.requested_through.saturating_sub(durable) }
    }

    /// Bytes that settled batches gave back since the last call.
    pub(super) fn take_freed(&mut self) -> usize {
        std::mem::take(&mut self.freed)
    }
}

impl Lane {
    fn new(options: &ProducerOptions, transactional: bool) -> Self {
        let filling = BatchBuilder::new(BatchOptions {
            compression: options.compression,
            transactional,
            bytes_max: options.batch_bytes_max,
        });
        Lane {
            filling,
            open: None,
            sealed: VecDeque::new(),
            next_sequence: 0,
            refusals: 0,
            out_of_order: 0,
            not_before: None,
        }
    }

    /// Closes the filling batch; false where it is empty.
    fn seal(&mut self, producer: ProducerIdentity, now: Instant, timeout: Duration) -> bool {
        let Some(open) = self.open.take() else { return false };
        let count = i32::try_from(self.filling.count()).expect("a batch counts its records in an i32");
        let sequence = self.next_sequence;
        let batch = self.filling.build(ProducerStamp { id: producer.id, epoch: producer.epoch, sequence });
        self.next_sequence = advance_sequence(sequence, count);
        self.sealed.push_back(Sealed {
            batch,
            sequence,
            state: State::Waiting,
            ever_sent: false,
            deaths: 0,
            give_up: now + timeout,
            count,
            first_record: open.first_record,
            last_record: open.last_record,
            charged: open.charged,
            ack: open.ack,
        });
        true
    }

    /// Full jitter over a doubling pause.
    fn pause(&mut self, now: Instant, jitter: f64) {
        let doublings = self.refusals.min(10);
        let most = (PAUSE.0 * 2u32.pow(doublings)).min(PAUSE.1);
        self.not_before = Some(now + PAUSE.0 + most.mul_f64(jitter));
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
