//! What every state store must do, as one test that each of them runs: random writes against a sorted map.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::io::{Position, TopicUuid};
use crate::key::Shard;
use crate::state::{
    CellBatchBuilder, KeyList, Marks, ShardPosition, StateBackend, StoreBatch, StoreId, StoreOp,
    stored_marks, stored_position, stored_windows,
};

const STORE: StoreId = StoreId(1);
const SHARDS: u16 = 3;

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// Writes random batches (cells, marks, positions, closed windows, wiped shards) to a store that is empty, comparing
/// batched reads and scans with a sorted map after each. `reopen` closes and opens the store; called after a flush, it
/// must give back everything.
///
/// # Panics
///
/// If the store and the map differ.
pub fn backend_suite(
    seed: u64,
    mut backend: Arc<dyn StateBackend>,
    mut reopen: impl FnMut(Arc<dyn StateBackend>) -> Arc<dyn StateBackend>,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut model = Model::new();
    let mut closed = 0;
    for round in 0..120u64 {
        let batch = random_batch(&mut rng, round, &mut closed);
        batch.for_each(|op| match op {
            StoreOp::Put(key, value) => drop(model.insert(key.to_vec(), value.to_vec())),
            StoreOp::DeleteRange(from, to) => {
                model.retain(|key, _| !(from..to).contains(&key.as_slice()));
            }
        });
        backend.write(&batch).expect("a write succeeds");
        if round % 10 == 9 {
            backend.flush().expect("a flush succeeds");
        }
        if round % 30 == 29 {
            backend = reopen(backend);
        }
        same(&*backend, &model, &mut rng);
        for p in &batch.positions {
            let stored = stored_position(&*backend, p.shard, p.topic).expect("a read succeeds");
            assert_eq!(stored, Some(p.position), "round {round}");
        }
        for (store, shard, marks) in &batch.marks {
            assert_eq!(stored_marks(&*backend, *shard, *store).expect("a read succeeds"), *marks);
        }
    }
    assert!(!model.is_empty() && closed > 0);
}

fn random_batch(rng: &mut ChaCha8Rng, round: u64, closed: &mut i64) -> StoreBatch {
    let mut batch = StoreBatch { epoch: round, ..StoreBatch::default() };
    if rng.random_ratio(1, 12) {
        batch.wipe.push((STORE, Shard(rng.random_range(0..SHARDS))));
    }
    if rng.random_ratio(1, 4) {
        *closed += 5 * rng.random_range(1..3i64);
        batch.closed.push((STORE, *closed));
        batch.purge.extend((0..SHARDS).map(|s| (STORE, Shard(s))));
        let marks = Marks { fired: *closed, closed: *closed };
        batch.marks.extend((0..SHARDS).map(|s| (STORE, Shard(s), marks)));
    }
    for shard in (0..SHARDS).map(Shard) {
        let mut cells = CellBatchBuilder::default();
        for _ in 0..rng.random_range(0..40) {
            // Before and after the epoch's zero: window ends sort by sign.
            let end = *closed + 5 * rng.random_range(-6..8i64);
            let key = rng.random_range(0..60u8);
            let value = rng.random_range(0..300usize);
            cells.push(end, &[key; 5][..usize::from(key % 6)], |to| to.resize(to.len() + value, key));
        }
        batch.cells.extend(cells.finish(STORE, shard).map(Arc::new));
        let position = Position { leader_epoch: 1, offset: i64::try_from(round).unwrap_or(0) };
        batch.positions.push(ShardPosition { shard, topic: TopicUuid(7), position });
    }
    batch
}

fn same(backend: &dyn StateBackend, model: &Model, rng: &mut ChaCha8Rng) {
    let mut found = Model::new();
    let mut each = |key: &[u8], value: &[u8]| {
        found.insert(key.to_vec(), value.to_vec());
        ControlFlow::Continue(())
    };
    backend.scan(&[], &[0xff; 32], &mut each).expect("a scan succeeds");
    assert!(found == *model, "{} entries, {} expected", found.len(), model.len());

    // A part of it, and a break in the middle.
    let keys: Vec<_> = model.keys().cloned().collect();
    let (a, b) = (rng.random_range(0..keys.len()), rng.random_range(0..keys.len()));
    let (from, to) = (&keys[a.min(b)], &keys[a.max(b)]);
    let mut seen = Vec::new();
    let mut each = |key: &[u8], _: &[u8]| {
        seen.push(key.to_vec());
        if seen.len() == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    backend.scan(from, to, &mut each).expect("a scan succeeds");
    assert_eq!(seen, keys[a.min(b)..a.max(b)].iter().take(5).cloned().collect::<Vec<_>>());

    let mut list = KeyList::default();
    let mut wanted = Vec::new();
    for _ in 0..50 {
        let (shard, end) = (Shard(rng.random_range(0..SHARDS)), 5 * rng.random_range(-10..200i64));
        let key = rng.random_range(0..60u8);
        let key = &[key; 5][..usize::from(key % 6)];
        list.push_cell(STORE, shard, end, key);
        wanted.push(model.get(list.get(list.len() - 1)).cloned());
    }
    let mut got = vec![None; wanted.len()];
    backend.get_many(&list, &mut |i, value| got[i] = Some(value.to_vec())).expect("a read succeeds");
    assert!(got == wanted, "batched reads differ");

    for shard in (0..SHARDS).map(Shard) {
        let windows = stored_windows(backend, STORE, shard, 0).expect("a scan succeeds");
        let mut expected: Vec<i64> = Vec::new();
        let prefix = [&STORE.0.to_be_bytes()[..], &shard.0.to_be_bytes()].concat();
        for key in model.keys().filter(|key| key.starts_with(&prefix)) {
            let end = crate::state::window_and_key(&key[4..]).map_or(0, |(end, _)| end);
            if end > 0 && expected.last() != Some(&end) {
                expected.push(end);
            }
        }
        assert_eq!(windows, expected);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::MemoryState;

    #[test]
    fn the_store_in_memory_passes() {
        for seed in 0..5 {
            backend_suite(seed, Arc::new(MemoryState::default()), |backend| backend);
        }
    }
}
