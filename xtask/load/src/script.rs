//! What the load asks of the log, as a pure function of a seed, and what must be there after each step.
//!
//! ```text
//!   seed ──▶ Script ──next──▶ Op 0, Op 1, Op 2, ...        one journal entry each, asked in this order
//!                │
//!                └─apply──▶ Model(k)                        what a reader must find if exactly ops 0..k survived
//! ```
//!
//! The log promises that a crash keeps a prefix of what was sequenced, with everything acked in it. Since the load asks
//! from one thread, the order of asking is the order of sequencing, so the whole promise is one sentence: what is found
//! equals `Model(k)` for one k that is at least the number of acked ops. Nothing needs to be recorded for that but the
//! seed and the acks.
//!
//! Left out: requests that are refused or repeated; the crash test of the log has them. Here the disk is real.

use std::collections::BTreeMap;

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Transactional producers; each has at most one transaction open.
pub(crate) const SLOTS: usize = 3;
/// Topics that exist at the same time, at most.
const TOPICS_MAX: usize = 4;

/// A record's identity: run, op and place in it. Its bytes follow from it, see [`value`].
pub(crate) type Id = u64;

/// One request that makes one journal entry.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Op {
    Create { topic: String, partitions: u32 },
    Delete { topic: String },
    Append { topic: String, partition: u32, ids: Vec<Id>, slot: Option<usize> },
    Offsets { topic: String, partition: u32, offset: i64, slot: Option<usize> },
    End { slot: usize, commit: bool },
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Record {
    id: Id,
    /// The transaction it belongs to, by the number of its first op.
    txn: Option<u64>,
}

#[derive(Debug, Clone, Default)]
struct Open {
    txn: u64,
    offsets: BTreeMap<(String, u32), i64>,
}

/// What must be there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    topics: BTreeMap<String, Vec<Vec<Record>>>,
    open: [Option<Open>; SLOTS],
    committed: BTreeMap<u64, bool>,
    group: BTreeMap<(String, u32), i64>,
    topics_made: u32,
    txns_made: u64,
}

/// What was found in a directory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Found {
    pub(crate) topics: BTreeMap<String, Vec<Partition>>,
    pub(crate) group: BTreeMap<(String, u32), i64>,
}

/// The records of a partition, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Partition {
    /// All that were acknowledged or survived, aborted ones included.
    pub(crate) all: Vec<Id>,
    /// Those that a read-committed reader gets.
    pub(crate) committed: Vec<Id>,
}

impl Model {
    pub(crate) fn apply(&mut self, op: &Op) {
        match op {
            Op::Create { topic, partitions } => {
                self.topics.insert(topic.clone(), vec![Vec::new(); *partitions as usize]);
                self.topics_made += 1;
            }
            Op::Delete { topic } => {
                self.topics.remove(topic);
                self.group.retain(|(of, _), _| of != topic);
                for open in self.open.iter_mut().flatten() {
                    open.offsets.retain(|(of, _), _| of != topic);
                }
            }
            Op::Append { topic, partition, ids, slot } => {
                let txn = slot.map(|slot| self.opened(slot).txn);
                let records = ids.iter().map(|id| Record { id: *id, txn });
                self.partition(topic, *partition).extend(records);
            }
            Op::Offsets { topic, partition, offset, slot } => {
                let offsets = match slot {
                    Some(slot) => &mut self.opened(*slot).offsets,
                    None => &mut self.group,
                };
                offsets.insert((topic.clone(), *partition), *offset);
            }
            Op::End { slot, commit } => {
                if let Some(open) = self.open[*slot].take() {
                    self.committed.insert(open.txn, *commit);
                    if *commit {
                        self.group.extend(open.offsets);
                    }
                }
            }
        }
    }

    /// The process is gone: its open transactions are aborted at the next open.
    pub(crate) fn crash(&mut self) {
        self.open = Default::default();
    }

    fn opened(&mut self, slot: usize) -> &mut Open {
        let made = &mut self.txns_made;
        self.open[slot].get_or_insert_with(|| {
            *made += 1;
            Open { txn: *made, offsets: BTreeMap::new() }
        })
    }

    fn partition(&mut self, topic: &str, partition: u32) -> &mut Vec<Record> {
        let partitions = self.topics.get_mut(topic).expect("the script names topics that exist");
        &mut partitions[partition as usize]
    }

    /// What a reader must find once every open transaction is aborted.
    pub(crate) fn visible(&self) -> Found {
        let counts = |r: &&Record| r.txn.is_none_or(|txn| self.committed.get(&txn) == Some(&true));
        let partition = |records: &Vec<Record>| Partition {
            all: records.iter().map(|r| r.id).collect(),
            committed: records.iter().filter(counts).map(|r| r.id).collect(),
        };
        let topics = self.topics.iter().map(|(t, ps)| (t.clone(), ps.iter().map(partition).collect()));
        Found { topics: topics.collect(), group: self.group.clone() }
    }
}

impl Found {
    /// The first difference, as a sentence; none if they are equal.
    pub(crate) fn differs_from(&self, expected: &Self) -> Option<String> {
        let names = |f: &Self| f.topics.keys().cloned().collect::<Vec<_>>();
        if names(self) != names(expected) {
            return Some(format!("topics {:?}, expected {:?}", names(self), names(expected)));
        }
        for ((name, found), expected) in self.topics.iter().zip(expected.topics.values()) {
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let kinds = [
                    ("records", &found.all, &expected.all),
                    ("committed records", &found.committed, &expected.committed),
                ];
                if let Some((kind, found, expected)) = kinds.into_iter().find(|(_, f, e)| f != e) {
                    let same = found.iter().zip(expected).take_while(|(f, e)| f == e).count();
                    let at = |ids: &[Id]| ids.get(same).map_or("none".into(), |id| format!("{id:#x}"));
                    let (found_at, expected_at) = (at(found), at(expected));
                    let (found, expected) = (found.len(), expected.len());
                    return Some(format!(
                        "{name}/{i} has {found} {kind}, expected {expected}; the first that differs is number \
                         {same}: {found_at}, expected {expected_at}"
                    ));
                }
            }
        }
        let group = |f: &Self| format!("{:?}", f.group);
        (self.group != expected.group)
            .then(|| format!("offsets {}, expected {}", group(self), group(expected)))
    }
}

/// The ops of one run, one after the other.
#[derive(Debug)]
pub(crate) struct Script {
    rng: ChaCha8Rng,
    run: u64,
    asked: u64,
    pub(crate) model: Model,
}

impl Script {
    /// The ops of a run with this seed, on what the runs before it left.
    pub(crate) fn new(seed: u64, run: u64, model: Model) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), run, asked: 0, model }
    }

    /// The next op; it is in the model already.
    pub(crate) fn next(&mut self) -> Op {
        let op = self.choose();
        self.model.apply(&op);
        self.asked += 1;
        op
    }

    fn choose(&mut self) -> Op {
        let names: Vec<String> = self.model.topics.keys().cloned().collect();
        let dice = self.rng.random_range(0..1000);
        if names.is_empty() || dice < 4 && names.len() < TOPICS_MAX {
            let partitions = self.rng.random_range(1..=3);
            return Op::Create { topic: format!("t{}", self.model.topics_made), partitions };
        }
        if dice < 8 && names.len() > 2 {
            return Op::Delete { topic: names.choose(&mut self.rng).expect("not empty").clone() };
        }
        let slot = self.rng.random_bool(0.7).then(|| self.rng.random_range(0..SLOTS));
        if let Some(slot) = slot.filter(|slot| self.model.open[*slot].is_some())
            && self.rng.random_bool(0.25)
        {
            return Op::End { slot, commit: self.rng.random_bool(0.7) };
        }
        let topic = names.choose(&mut self.rng).expect("not empty").clone();
        let partitions = &self.model.topics[&topic];
        let partition = self.rng.random_range(0..partitions.len());
        if self.rng.random_bool(0.15) {
            // Markers only add to what the model counts, so every offset up to there exists.
            let offset = self.rng.random_range(0..=partitions[partition].len()) as i64;
            return Op::Offsets { topic, partition: partition as u32, offset, slot };
        }
        let records = if self.rng.random_bool(0.02) { 200 } else { self.rng.random_range(1..=12) };
        let first = self.run << 40 | self.asked << 8;
        Op::Append { topic, partition: partition as u32, ids: (first..first + records).collect(), slot }
    }
}

/// The bytes of a record: its identity, then up to 500 bytes that follow from it.
pub(crate) fn value(id: Id) -> Vec<u8> {
    let mut state = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = state >> 58;
    let mut value = id.to_be_bytes().to_vec();
    for _ in 0..words {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        value.extend(state.to_be_bytes());
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_asks_the_same() {
        let ops = |seed| {
            let mut script = Script::new(seed, 3, Model::default());
            let ops: Vec<Op> = (0..3000).map(|_| script.next()).collect();
            (ops, script.model.visible())
        };
        let ((ops, end), (again, end_again)) = (ops(1), ops(1));
        assert!(ops == again && end == end_again);
        assert!(ops != self::ops_of(2));
        let kinds = |f: fn(&Op) -> bool| ops.iter().filter(|op| f(op)).count();
        assert!(kinds(|op| matches!(op, Op::Create { .. })) > 2);
        assert!(kinds(|op| matches!(op, Op::Delete { .. })) > 0);
        assert!(kinds(|op| matches!(op, Op::End { commit: true, .. })) > 100);
        assert!(kinds(|op| matches!(op, Op::End { commit: false, .. })) > 50);
        assert!(kinds(|op| matches!(op, Op::Append { slot: Some(_), .. })) > 1000);
    }

    fn ops_of(seed: u64) -> Vec<Op> {
        let mut script = Script::new(seed, 3, Model::default());
        (0..3000).map(|_| script.next()).collect()
    }

    #[test]
    fn each_kind_of_difference_has_its_sentence() {
        let mut script = Script::new(1, 0, Model::default());
        for _ in 0..500 {
            script.next();
        }
        script.model.crash();
        let good = script.model.visible();
        assert_eq!(good.differs_from(&good), None);
        let says = |change: fn(&mut Found), what: &str| {
            let mut bad = good.clone();
            change(&mut bad);
            let said = bad.differs_from(&good).unwrap_or_default();
            assert!(said.contains(what), "{said:?} does not say {what:?}");
        };
        fn first(f: &mut Found) -> &mut Partition {
            &mut f.topics.values_mut().next().unwrap()[0]
        }
        says(|f| f.topics.clear(), "topics");
        says(|f| first(f).all.truncate(1), "records, expected");
        says(|f| first(f).all.swap(0, 1), "is number 0");
        says(|f| first(f).committed.truncate(1), "committed records");
        says(|f| f.group.clear(), "offsets");
    }

    #[test]
    fn an_open_transaction_does_not_count_and_an_ended_one_does() {
        let mut model = Model::default();
        let topic = || "t".to_owned();
        model.apply(&Op::Create { topic: topic(), partitions: 1 });
        model.apply(&Op::Append { topic: topic(), partition: 0, ids: vec![1, 2], slot: Some(0) });
        model.apply(&Op::Offsets { topic: topic(), partition: 0, offset: 2, slot: Some(0) });
        let mut crashed = model.clone();
        crashed.crash();
        crashed.apply(&Op::End { slot: 0, commit: true });
        let gone = Found {
            topics: [(topic(), vec![Partition { all: vec![1, 2], committed: vec![] }])].into(),
            group: BTreeMap::new(),
        };
        assert_eq!(crashed.visible(), gone);
        model.apply(&Op::End { slot: 0, commit: true });
        let there = Found {
            topics: [(topic(), vec![Partition { all: vec![1, 2], committed: vec![1, 2] }])].into(),
            group: [((topic(), 0), 2)].into(),
        };
        assert_eq!(model.visible(), there);
    }
}
