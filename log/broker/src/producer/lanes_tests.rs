//! Seeded schedules of a producer's lanes against a naive log: answers that are lost, requests that die before or
//! after they were executed, refusals, and a topic that forgets acked batches.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tidemill_log::batch::{OpenBatch, verify};

use super::*;
use crate::api::{Cleanup, Mode, Position};
use tidemill_rpc::{Code, Fate, RpcError};

/// What a partition keeps: the rules of the log's sequence check, as plainly as they can be said.
#[derive(Default)]
struct Partition {
    values: Vec<u64>,
    producer: Option<ProducerIdentity>,
    next: i32,
    last: VecDeque<(i32, i64)>,
}

impl Partition {
    fn append(&mut self, batch: &Bytes) -> ProduceOutcome {
        let header = verify(batch).expect("a batch");
        let who = ProducerIdentity { id: header.producer_id, epoch: header.producer_epoch };
        if self.producer != Some(who) {
            (self.producer, self.next) = (Some(who), 0);
            self.last.clear();
        }
        if let Some((_, base)) = self.last.iter().find(|(sequence, _)| *sequence == header.base_sequence) {
            return appended(*base, true);
        }
        if header.base_sequence != self.next {
            let error = BrokerError::OutOfOrder {
                partition: String::new(),
                expected: self.next,
                found: header.base_sequence,
            };
            return ProduceOutcome::Refused(error.into());
        }
        let base = self.values.len() as i64;
        for record in &OpenBatch::open(batch, 1 << 20).expect("opens") {
            let value = record.expect("a record").value.expect("a value");
            self.values.push(u64::from_be_bytes(value.try_into().expect("eight bytes")));
        }
        self.next = advance_sequence(self.next, header.record_count);
        self.last.push_back((header.base_sequence, base));
        if self.last.len() > 5 {
            self.last.pop_front();
        }
        appended(base, false)
    }
}

fn appended(base_offset: i64, duplicate: bool) -> ProduceOutcome {
    ProduceOutcome::Appended { base_offset, next: Position::START, duplicate }
}

fn dead() -> BrokerError {
    RpcError::new(Code::Unavailable, Fate::Unknown, "the connection died").into()
}

struct World {
    rng: StdRng,
    lanes: Lanes,
    log: BTreeMap<TopicPartition, Partition>,
    topic: Topic,
    now: Instant,
    requests: VecDeque<Request>,
    acks: Vec<(u64, Arc<BatchAck>)>,
    epochs: i16,
    faults: f64,
}

impl World {
    fn new(seed: u64, transactional: bool) -> Self {
        let options = ProducerOptions {
            batch_bytes_max: 100,
            linger: Duration::from_millis(2),
            ..ProducerOptions::default()
        };
        let identity = ProducerIdentity { id: 1, epoch: 0 };
        let topic = Topic {
            name: "t".into(),
            id: TopicId(7),
            partitions: 3,
            segment_bytes_max: 1,
            mode: Mode::Durable,
            cleanup: Cleanup::Delete,
        };
        World {
            rng: StdRng::seed_from_u64(seed),
            lanes: Lanes::new(identity, options, transactional),
            log: BTreeMap::new(),
            topic,
            now: Instant::now(),
            requests: VecDeque::new(),
            acks: Vec::new(),
            epochs: 0,
            faults: 0.2,
        }
    }

    fn push(&mut self, value: u64) {
        let partition = self.rng.random_bool(0.5).then(|| self.rng.random_range(0..3));
        let bytes = value.to_be_bytes();
        let key = self.rng.random_bool(0.5).then_some(&bytes[4..]);
        let record = RecordParts { key, value: Some(&bytes), ..RecordParts::default() };
        let (ack, ..) = self.lanes.push(&self.topic, partition, record, 1, self.now).expect("takes it");
        self.acks.push((value, ack));
    }

    fn execute(&mut self, request: &Request) -> Vec<ProduceOutcome> {
        let mut outcomes = Vec::new();
        for (tp, batch) in &request.batches {
            outcomes.push(if self.rng.random_bool(self.faults * 0.2) {
                ProduceOutcome::Refused(BrokerError::Busy { what: String::new() }.into())
            } else {
                self.log.entry(*tp).or_default().append(batch)
            });
        }
        outcomes
    }

    /// Something happens to one of the requests, or time passes.
    fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.random_range(0..20));
        if self.requests.len() < 5 {
            self.requests.extend(self.lanes.take(self.now));
        }
        if self.lanes.wants_new_epoch() {
            self.epochs += 1;
            self.lanes.renew(ProducerIdentity { id: 1, epoch: self.epochs });
        }
        if self.requests.is_empty() {
            return;
        }
        let jitter = self.rng.random();
        let executed = !self.rng.random_bool(self.faults);
        let answered = executed && !self.rng.random_bool(self.faults);
        // Requests are executed in order; it is answers that may overtake.
        let request = self.requests.pop_front().expect("not empty");
        let outcomes = if executed { self.execute(&request) } else { Vec::new() };
        if answered {
            self.lanes.answered(request.number, outcomes, self.now, jitter);
        } else {
            self.lanes.unanswered(request.number, dead(), self.now, jitter);
        }
    }

    fn finish(&mut self) {
        self.faults = 0.0;
        self.lanes.flush();
        for _ in 0..10_000 {
            if self.lanes.is_settled() {
                return;
            }
            self.step();
        }
        panic!("does not end: {:?}", self.lanes);
    }
}

#[test]
fn whatever_is_lost_every_record_is_there_once_and_in_order() {
    for seed in 0..400 {
        let mut world = World::new(seed, false);
        let mut value = 0;
        for _ in 0..300 {
            if world.rng.random_bool(0.5) && world.lanes.failure().is_none() {
                world.push(value);
                value += 1;
            }
            world.step();
            let prefix = world.lanes.durable_prefix();
            let all: Vec<u64> = world.log.values().flat_map(|p| p.values.iter().copied()).collect();
            let holds = |n: u64| all.contains(&n);
            if let Some(missing) = (0..prefix.durable).find(|&n| !holds(n)) {
                panic!("seed {seed}: {missing} is said to be durable: {prefix:?}");
            }
            if let Some(beyond) = all.iter().find(|&&n| n >= prefix.durable + prefix.in_doubt) {
                panic!("seed {seed}: {beyond} is there and not even in doubt: {prefix:?}");
            }
        }
        if world.lanes.failure().is_some() {
            // Five connections died under one batch: what was acked is there, nothing twice.
            let all: Vec<u64> = world.log.values().flat_map(|p| p.values.iter().copied()).collect();
            let unique: std::collections::BTreeSet<u64> = all.iter().copied().collect();
            assert_eq!(unique.len(), all.len(), "seed {seed}");
            continue;
        }
        world.finish();
        assert_eq!(
            world.lanes.durable_prefix(),
            DurablePrefix { durable: value, in_doubt: 0 },
            "seed {seed}"
        );
        let mut all: Vec<u64> = Vec::new();
        for partition in world.log.values() {
            assert!(partition.values.is_sorted(), "seed {seed}: {:?}", partition.values);
            all.extend(&partition.values);
        }
        all.sort_unstable();
        assert_eq!(all, (0..value).collect::<Vec<_>>(), "seed {seed}");
    }
}

#[test]
fn a_topic_that_forgot_acked_batches_gets_the_rest_under_a_new_epoch() {
    for seed in 0..200 {
        let mut world = World::new(seed, false);
        world.faults = 0.0;
        for value in 0..40 {
            world.push(value);
        }
        world.finish();
        // A power cut takes a suffix of one partition, and the sequence state with it.
        let tp = world.topic.partition(world.rng.random_range(0..3));
        let lost = world.log.remove(&tp).map(|p| p.values).unwrap_or_default();
        world.faults = 0.1;
        for value in 40..80 {
            world.push(value);
            world.step();
        }
        world.finish();
        let mut all: Vec<u64> = world.log.values().flat_map(|p| p.values.iter().copied()).collect();
        all.extend(lost);
        all.sort_unstable();
        assert_eq!(all, (0..80).collect::<Vec<_>>(), "seed {seed}: each once, the lost ones aside");
    }
}

#[test]
fn a_transaction_that_lost_batches_fails_and_the_next_one_works() {
    let mut world = World::new(1, true);
    world.faults = 0.0;
    for value in 0..10 {
        world.push(value);
    }
    world.finish();
    world.log.clear();
    for value in 10..20 {
        world.push(value);
    }
    world.lanes.flush();
    for _ in 0..1000 {
        world.step();
    }
    let failure = world.lanes.failure().expect("failed");
    assert!(matches!(failure, BrokerError::OutOfOrder { .. }), "{failure}");
    world.lanes.restart(ProducerIdentity { id: 1, epoch: 1 });
    world.requests.clear();
    for value in 20..30 {
        world.push(value);
    }
    world.finish();
    let all: usize = world.log.values().map(|p| p.values.len()).sum();
    assert_eq!(all, 10);
}

#[test]
fn five_dead_connections_under_one_batch_fail_it() {
    let mut world = World::new(1, false);
    world.push(1);
    world.lanes.flush();
    for death in 1..=DEATHS_MAX {
        assert_eq!(world.lanes.failure(), None, "after {} deaths", death - 1);
        world.now += Duration::from_secs(1);
        let request = world.lanes.take(world.now).expect("resent");
        world.lanes.unanswered(request.number, dead(), world.now, 0.0);
    }
    assert!(world.lanes.failure().is_some());
    assert_eq!(world.lanes.durable_prefix(), DurablePrefix { durable: 0, in_doubt: 1 });
}

#[test]
fn the_window_counts_from_the_first_unacked_batch() {
    let mut world = World::new(1, false);
    let bytes = [0; 90];
    // Records that fill a batch each.
    for _ in 0..12 {
        let record = RecordParts { value: Some(&bytes[..20]), ..RecordParts::default() };
        world.lanes.push(&world.topic, Some(0), record, 1, world.now).expect("takes it");
    }
    world.lanes.flush();
    let first = world.lanes.take(world.now).expect("some may go");
    assert_eq!(first.batches.len(), WINDOW);
    assert!(world.lanes.take(world.now).is_none(), "five are on their way");
    // All but the first are acked: still nothing may go.
    let mut outcomes: Vec<ProduceOutcome> = (0..5).map(|n| appended(n, false)).collect();
    outcomes[0] = ProduceOutcome::Refused(BrokerError::Busy { what: String::new() }.into());
    world.lanes.answered(first.number, outcomes, world.now, 0.0);
    let again = world.lanes.take(world.now + Duration::from_secs(1)).expect("the first again");
    assert_eq!(again.batches.len(), 1);
    world.lanes.answered(again.number, vec![appended(0, false)], world.now, 0.0);
    assert_eq!(world.lanes.take(world.now).expect("five more").batches.len(), WINDOW);
}

#[test]
fn a_large_record_goes_alone_and_in_its_place() {
    let mut world = World::new(1, false);
    world.faults = 0.0;
    let large = vec![b'x'; 5000];
    let push = |world: &mut World, value: &[u8]| {
        let record = RecordParts { value: Some(value), ..RecordParts::default() };
        world.lanes.push(&world.topic, Some(0), record, value.len(), world.now).map(|(_, index, _)| index)
    };
    assert_eq!(push(&mut world, b"before"), Ok(0));
    assert_eq!(push(&mut world, &large), Ok(0));
    assert_eq!(push(&mut world, b"after"), Ok(0));
    assert_eq!(push(&mut world, b"beside"), Ok(1));
    let huge = vec![b'x'; RECORD_BYTES_MAX];
    assert!(matches!(push(&mut world, &huge), Err(BrokerError::Invalid { .. })));
    world.lanes.flush();
    let request = world.lanes.take(world.now).expect("all of it");
    let counts: Vec<i32> =
        request.batches.iter().map(|(_, b)| verify(b).expect("a batch").record_count).collect();
    assert_eq!(counts, [1, 1, 2]);
    world.lanes.answered(request.number, (0..3).map(|n| appended(n, false)).collect(), world.now, 0.0);
    assert_eq!(world.lanes.durable_prefix(), DurablePrefix { durable: 4, in_doubt: 0 });
}

#[test]
fn records_without_a_key_fill_one_batch_after_another() {
    let mut world = World::new(1, false);
    let mut batches = BTreeMap::new();
    for _ in 0..60 {
        let record = RecordParts { value: Some(&[0; 8]), ..RecordParts::default() };
        world.lanes.push(&world.topic, None, record, 1, world.now).expect("takes it");
    }
    world.lanes.flush();
    let request = world.lanes.take(world.now).expect("all of it");
    for (tp, batch) in &request.batches {
        let counts: &mut Vec<i32> = batches.entry(tp.partition).or_default();
        counts.push(verify(batch).expect("a batch").record_count);
    }
    assert_eq!(batches.len(), 3, "{batches:?}");
    let single = batches.values().flatten().filter(|&&count| count == 1).count();
    assert!(single <= 1, "only the last batch may be small: {batches:?}");
}
