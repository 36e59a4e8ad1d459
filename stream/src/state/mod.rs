//! State behind the overlay: an ordered key-value store per process, written only with committed bytes.
//!
//! ```text
//!   store u16 | shard u16 | window end, 8 bytes | key      a cell of a window store (layout T)
//!   0         | shard u16 | 'm' | store u16                fired_through and closed_through of a store
//!   0         | shard u16 | 'p' | topic uuid, 16 bytes     where replay of that changelog topic's partition goes on
//! ```
//!
//! All numbers are big-endian; the window end has its sign bit flipped, so keys sort by time. A value is the
//! changelog record's value, byte for byte. The changelog partition is the shard; the changelog key is the store key
//! without shard, and in a window store's own topic also without store.
//!
//! Invariants:
//!
//! * The store never holds a byte that was not committed. A task encodes its dirty cells once ([`CellBatch`]); the
//!   same bytes are sent to the changelog and, after the commit, written here.
//! * One write holds data and the position that it brings the shard to. A store that lost its newest writes is an
//!   older one, complete up to the position it names.
//! * A cell of a window at or below `closed_through` is dead wherever it is met.

mod memory;

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;

use crate::io::{Position, TopicUuid};
use crate::key::Shard;
use crate::time::MIN;

pub use memory::MemoryState;

/// Number of a store within its job; 0 is the engine's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreId(pub u16);

/// An error of the state store. The job stops: what the store holds is rebuilt from the changelog.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The store failed.
    #[error("the state store failed: {source}")]
    Store {
        /// Its own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What the store or the changelog holds is nothing the engine writes.
    #[error("the {place} of store {store} shard {shard} holds what the engine does not write: {what}")]
    Corrupt {
        /// Store or changelog.
        place: &'static str,
        /// The store's number.
        store: u16,
        /// The shard's number.
        shard: u16,
        /// What is wrong.
        what: String,
    },
}

/// An ordered key-value store, shared by the tasks of a process. RocksDB in production, a map in tests.
pub trait StateBackend: Send + Sync + 'static {
    /// Looks up keys in one go; calls `found` with the index and value of each that is there, in any order.
    fn get_many(&self, keys: &KeyList, found: &mut dyn FnMut(usize, &[u8])) -> Result<(), StateError>;

    /// Applies a batch, all of it or none of it. It need not be durable when the call returns, but what survives a
    /// crash is a prefix of the writes.
    fn write(&self, batch: &StoreBatch) -> Result<(), StateError>;

    /// Visits the entries of `[from, to)` in key order until `each` breaks.
    #[allow(clippy::type_complexity, reason = "one callback, named by its parameter")]
    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StateError>;

    /// Makes every write so far durable.
    fn flush(&self) -> Result<(), StateError>;

    /// About how many bytes it holds, in memory and on disk: for display only.
    fn bytes(&self) -> u64 {
        0
    }
}

/// One operation of a [`StoreBatch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreOp<'a> {
    /// Sets a key.
    Put(&'a [u8], &'a [u8]),
    /// Deletes the keys of `[from, to)`.
    DeleteRange(&'a [u8], &'a [u8]),
}

/// Keys for [`StateBackend::get_many`], in one buffer.
#[derive(Clone, Debug, Default)]
pub struct KeyList {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl KeyList {
    /// Number of keys.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The key at `index`.
    pub fn get(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        &self.bytes[start..self.ends[index] as usize]
    }

    /// All keys in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i))
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    pub(crate) fn push_cell(&mut self, store: StoreId, shard: Shard, window_end: i64, key: &[u8]) {
        cell_key(store, shard, window_end, key, &mut self.bytes);
        self.ends.push(u32::try_from(self.bytes.len()).expect("a batch of misses is smaller than 4 GiB"));
    }
}

/// Appends the store key of a cell.
pub(crate) fn cell_key(store: StoreId, shard: Shard, window_end: i64, key: &[u8], to: &mut Vec<u8>) {
    to.extend_from_slice(&store.0.to_be_bytes());
    to.extend_from_slice(&shard.0.to_be_bytes());
    to.extend_from_slice(&flipped(window_end));
    to.extend_from_slice(key);
}

/// A window end as it is sorted by.
pub(crate) fn flipped(window_end: i64) -> [u8; 8] {
    (window_end.cast_unsigned() ^ (1 << 63)).to_be_bytes()
}

/// The window end and the key of a cell's changelog key, or of a store key without its first four bytes.
pub(crate) fn window_and_key(from: &[u8]) -> Option<(i64, &[u8])> {
    let (end, key) = from.split_first_chunk::<8>()?;
    Some(((u64::from_be_bytes(*end) ^ (1 << 63)).cast_signed(), key))
}

fn mark_key(shard: Shard, store: StoreId) -> [u8; 7] {
    let (s, o) = (shard.0.to_be_bytes(), store.0.to_be_bytes());
    [0, 0, s[0], s[1], b'm', o[0], o[1]]
}

/// The keyed changelog's key of a store's marks.
pub(crate) fn mark_changelog_key(store: StoreId) -> [u8; 5] {
    let o = store.0.to_be_bytes();
    [0, 0, b'm', o[0], o[1]]
}

/// The store whose marks a record of the keyed changelog carries, if it carries marks.
pub(crate) fn mark_of_changelog_key(key: &[u8]) -> Option<StoreId> {
    match key {
        [0, 0, b'm', a, b] => Some(StoreId(u16::from_be_bytes([*a, *b]))),
        _ => None,
    }
}

fn position_key(shard: Shard, topic: TopicUuid) -> [u8; 21] {
    let mut key = [0; 21];
    key[2..4].copy_from_slice(&shard.0.to_be_bytes());
    key[4] = b'p';
    key[5..].copy_from_slice(&topic.0.to_be_bytes());
    key
}

/// The key range of one store's shard.
pub(crate) fn shard_range(store: StoreId, shard: Shard) -> (Vec<u8>, Vec<u8>) {
    let from = (u32::from(store.0) << 16) | u32::from(shard.0);
    (from.to_be_bytes().to_vec(), (from + 1).to_be_bytes().to_vec())
}

/// `fired_through` and `closed_through` of one store: the largest window end whose result was emitted, and the
/// largest whose state is dead. The same on every shard; they only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Largest window end emitted.
    pub fired: i64,
    /// Largest window end whose state is dead.
    pub closed: i64,
}

impl Marks {
    /// Before anything fired.
    pub const NONE: Self = Self { fired: MIN, closed: MIN };

    pub(crate) fn encode(self) -> [u8; 17] {
        let mut bytes = [1; 17];
        bytes[1..9].copy_from_slice(&self.fired.to_be_bytes());
        bytes[9..].copy_from_slice(&self.closed.to_be_bytes());
        bytes
    }

    pub(crate) fn decode(from: &[u8]) -> Option<Self> {
        let [1, rest @ ..] = from else { return None };
        let (fired, closed) = rest.split_first_chunk::<8>()?;
        Some(Self { fired: i64::from_be_bytes(*fired), closed: i64::from_be_bytes(closed.try_into().ok()?) })
    }

    pub(crate) fn raise(&mut self, to: Self) {
        self.fired = self.fired.max(to.fired);
        self.closed = self.closed.max(to.closed);
    }
}

/// The cells of one shard that one job epoch changed: encoded once, for changelog and store alike.
#[derive(Clone, Debug)]
pub struct CellBatch {
    /// The store.
    pub store: StoreId,
    /// The shard: the partition of the changelog topic.
    pub shard: Shard,
    bytes: Bytes,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    at: u32,
    key: u32,
    value: u32,
}

impl CellBatch {
    /// Number of cells.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if it has no cells.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// About the memory it holds.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + self.entries.len() * size_of::<Entry>()
    }

    /// The smallest window end among its cells.
    pub(crate) fn oldest_window(&self) -> Option<i64> {
        self.iter().filter_map(|(key, _)| window_and_key(key)).map(|(end, _)| end).min()
    }

    /// Changelog key and value of every cell.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries.iter().map(|e| {
            let (at, key, value) = (e.at as usize, e.key as usize, e.value as usize);
            (&self.bytes[at..at + key], &self.bytes[at + key..at + key + value])
        })
    }
}

/// Builds a [`CellBatch`]; reused from epoch to epoch.
#[derive(Debug, Default)]
pub(crate) struct CellBatchBuilder {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl CellBatchBuilder {
    pub(crate) fn push(&mut self, window_end: i64, key: &[u8], value: impl FnOnce(&mut Vec<u8>)) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&flipped(window_end));
        self.bytes.extend_from_slice(key);
        let end = self.bytes.len();
        value(&mut self.bytes);
        let width = |n: usize| u32::try_from(n).expect("an epoch's cells of one shard are under 4 GiB");
        self.entries.push(Entry {
            at: width(at),
            key: width(end - at),
            value: width(self.bytes.len() - end),
        });
    }

    pub(crate) fn finish(&mut self, store: StoreId, shard: Shard) -> Option<CellBatch> {
        if self.entries.is_empty() {
            return None;
        }
        let (capacity, entries) = (self.bytes.len(), self.entries.len());
        let bytes = std::mem::replace(&mut self.bytes, Vec::with_capacity(capacity));
        let entries = std::mem::replace(&mut self.entries, Vec::with_capacity(entries));
        Some(CellBatch { store, shard, bytes: bytes.into(), entries })
    }
}

/// Where replay of one changelog partition goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardPosition {
    /// The shard: the partition.
    pub shard: Shard,
    /// The changelog topic's incarnation.
    pub topic: TopicUuid,
    /// The next offset to replay.
    pub position: Position,
}

/// One atomic write: cells of committed epochs, marks, deletions, and the positions they bring the shards to.
#[derive(Clone, Debug, Default)]
pub struct StoreBatch {
    /// The newest committed epoch it covers.
    pub epoch: u64,
    /// Shards to empty first, in these stores.
    pub wipe: Vec<(StoreId, Shard)>,
    /// Cells in the order they were committed.
    pub cells: Vec<Arc<CellBatch>>,
    /// Marks to write on every one of `shards` shards, and whether windows at or below `closed` are to be deleted.
    pub marks: Vec<(StoreId, Shard, Marks)>,
    /// Stores whose closed windows are dropped here: cells of them are skipped, stored ones deleted.
    pub closed: Vec<(StoreId, i64)>,
    /// Of which shards stored cells of closed windows are deleted.
    pub purge: Vec<(StoreId, Shard)>,
    /// New positions.
    pub positions: Vec<ShardPosition>,
}

impl StoreBatch {
    /// Calls `each` with every operation, in the order in which they apply. Of a cell that several epochs changed only
    /// the newest value is there, and the cells of a shard come in key order: a store that keeps its keys sorted takes
    /// them for a fraction of what keys in any order cost it.
    pub fn for_each(&self, mut each: impl FnMut(StoreOp<'_>)) {
        for (store, shard) in &self.wipe {
            let (from, to) = shard_range(*store, *shard);
            each(StoreOp::DeleteRange(&from, &to));
        }
        for (store, shard) in &self.purge {
            if let Some((_, closed)) = self.closed.iter().find(|(s, c)| s == store && *c > MIN) {
                let (mut from, mut to) = (Vec::new(), Vec::new());
                cell_key(*store, *shard, MIN, &[], &mut from);
                // The first key of the first window that lives; END - 1 is the largest window end there is.
                cell_key(*store, *shard, closed.saturating_add(1), &[], &mut to);
                each(StoreOp::DeleteRange(&from, &to));
            }
        }
        self.each_cell(&mut each);
        for (store, shard, marks) in &self.marks {
            each(StoreOp::Put(&mark_key(*shard, *store), &marks.encode()));
        }
        for p in &self.positions {
            let mut value = [1; 13];
            value[1..5].copy_from_slice(&p.position.leader_epoch.to_be_bytes());
            value[5..].copy_from_slice(&p.position.offset.to_be_bytes());
            each(StoreOp::Put(&position_key(p.shard, p.topic), &value));
        }
    }

    fn each_cell(&self, each: &mut impl FnMut(StoreOp<'_>)) {
        // Sorting is stable: the epochs of a shard stay in their order.
        let mut batches: Vec<&CellBatch> = self.cells.iter().map(|c| &**c).collect();
        batches.sort_by_key(|batch| (batch.store, batch.shard));
        let (mut key, mut cells) = (Vec::new(), Vec::new());
        for shard in batches.chunk_by(|a, b| (a.store, a.shard) == (b.store, b.shard)) {
            let (store, number) = (shard[0].store, shard[0].shard);
            let closed = self.closed.iter().find(|(s, _)| *s == store).map_or(MIN, |(_, c)| *c);
            cells.clear();
            let all = shard.iter().flat_map(|batch| batch.iter()).zip(0u32..);
            let live = |key: &[u8]| window_and_key(key).is_some_and(|(end, _)| end > closed);
            cells.extend(all.filter(|((key, _), _)| live(key)).map(|((key, value), at)| (key, at, value)));
            cells.sort_unstable_by_key(|(key, at, _)| (*key, *at));
            for same in cells.chunk_by(|a, b| a.0 == b.0) {
                let (changelog_key, _, value) = same[same.len() - 1];
                key.clear();
                key.extend_from_slice(&store.0.to_be_bytes());
                key.extend_from_slice(&number.0.to_be_bytes());
                key.extend_from_slice(changelog_key);
                each(StoreOp::Put(&key, value));
            }
        }
    }

    /// About the memory of its cells.
    pub fn bytes(&self) -> usize {
        self.cells.iter().map(|c| c.bytes()).sum()
    }
}

fn one(backend: &dyn StateBackend, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
    let mut found = None;
    let mut to = key.to_vec();
    to.push(0);
    backend.scan(key, &to, &mut |_, value| {
        found = Some(value.to_vec());
        ControlFlow::Break(())
    })?;
    Ok(found)
}

/// The stored position of a shard in one changelog topic.
pub(crate) fn stored_position(
    backend: &dyn StateBackend,
    shard: Shard,
    topic: TopicUuid,
) -> Result<Option<Position>, StateError> {
    let Some(value) = one(backend, &position_key(shard, topic))? else { return Ok(None) };
    let parsed = match &value[..] {
        [1, rest @ ..] => rest.split_first_chunk::<4>().and_then(|(epoch, offset)| {
            let leader_epoch = i32::from_be_bytes(*epoch);
            Some(Position { leader_epoch, offset: i64::from_be_bytes(offset.try_into().ok()?) })
        }),
        _ => None,
    };
    // A position that cannot be read does not hold: the shard is rebuilt from the changelog.
    Ok(parsed)
}

/// The stored marks of a store, as one shard knows them.
pub(crate) fn stored_marks(
    backend: &dyn StateBackend,
    shard: Shard,
    store: StoreId,
) -> Result<Marks, StateError> {
    match one(backend, &mark_key(shard, store))? {
        None => Ok(Marks::NONE),
        Some(value) => Marks::decode(&value).ok_or_else(|| StateError::Corrupt {
            place: "store",
            store: store.0,
            shard: shard.0,
            what: format!("marks {value:02x?}"),
        }),
    }
}

/// The ends of the live windows that a shard holds, in order.
pub(crate) fn stored_windows(
    backend: &dyn StateBackend,
    store: StoreId,
    shard: Shard,
    closed: i64,
) -> Result<Vec<i64>, StateError> {
    let (_, to) = shard_range(store, shard);
    let mut windows = Vec::new();
    let mut above = closed;
    loop {
        let (mut from, mut next) = (Vec::new(), None);
        // One seek per window: the first key of the next possible one.
        cell_key(store, shard, above.saturating_add(1), &[], &mut from);
        backend.scan(&from, &to, &mut |key, _| {
            next = key.get(4..).and_then(window_and_key).map(|(end, _)| end);
            ControlFlow::Break(())
        })?;
        match next {
            Some(end) if end > above || windows.is_empty() => windows.push(end),
            _ => return Ok(windows),
        }
        above = windows[windows.len() - 1];
    }
}

/// Visits the cells of one window of a shard: key and value.
pub(crate) fn scan_window(
    backend: &dyn StateBackend,
    store: StoreId,
    shard: Shard,
    window_end: i64,
    each: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(), StateError> {
    let (mut from, mut to) = (Vec::new(), Vec::new());
    cell_key(store, shard, window_end, &[], &mut from);
    cell_key(store, shard, window_end.saturating_add(1), &[], &mut to);
    backend.scan(&from, &to, &mut |key, value| {
        each(&key[12..], value);
        ControlFlow::Continue(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_window_end_and_parse() {
        let key = |end| {
            let mut to = Vec::new();
            cell_key(StoreId(1), Shard(2), end, b"k", &mut to);
            to
        };
        assert!(key(-5) < key(-1) && key(-1) < key(0) && key(0) < key(5));
        assert_eq!(key(0), [0, 1, 0, 2, 0x80, 0, 0, 0, 0, 0, 0, 0, b'k']);
        assert_eq!(window_and_key(&key(-5)[4..]), Some((-5, &b"k"[..])));
        assert_eq!(window_and_key(b"short"), None);
        assert_eq!(
            Marks::decode(&Marks { fired: -3, closed: 9 }.encode()),
            Some(Marks { fired: -3, closed: 9 })
        );
    }

    #[test]
    fn of_a_cell_changed_twice_the_newest_value_is_written_and_cells_come_sorted() {
        let mut builder = CellBatchBuilder::default();
        let mut epoch = |shard: u16, cells: &[(i64, &[u8], u8)]| {
            cells.iter().for_each(|(end, key, value)| builder.push(*end, key, |to| to.push(*value)));
            Arc::new(builder.finish(StoreId(1), Shard(shard)).unwrap())
        };
        // A later epoch's cell may come before an earlier one's in its batch, and shards in any order.
        let cells = vec![
            epoch(1, &[(20, b"b", 1), (10, b"z", 2), (20, b"a", 3)]),
            epoch(0, &[(20, b"b", 4)]),
            epoch(1, &[(20, b"a", 5), (5, b"a", 6)]),
            epoch(1, &[(20, b"b", 7), (20, b"b", 8)]),
        ];
        let batch = StoreBatch { cells, closed: vec![(StoreId(1), 5)], ..StoreBatch::default() };
        let mut puts = Vec::new();
        batch.for_each(|op| match op {
            StoreOp::Put(key, value) => puts.push((key.to_vec(), value[0])),
            StoreOp::DeleteRange(..) => unreachable!(),
        });
        let key = |shard, end, key: &[u8]| {
            let mut to = Vec::new();
            cell_key(StoreId(1), Shard(shard), end, key, &mut to);
            to
        };
        let expected =
            [(key(0, 20, b"b"), 4), (key(1, 10, b"z"), 2), (key(1, 20, b"a"), 5), (key(1, 20, b"b"), 8)];
        assert_eq!(puts, expected);
    }

    #[test]
    fn a_batch_skips_and_purges_closed_windows() {
        let state = MemoryState::default();
        let mut builder = CellBatchBuilder::default();
        for end in [5, 10, 15] {
            builder.push(end, b"k", |v| v.push(end as u8));
        }
        let cells = vec![Arc::new(builder.finish(StoreId(1), Shard(0)).unwrap())];
        let closed = vec![(StoreId(1), 5)];
        state.write(&StoreBatch { cells, closed, ..StoreBatch::default() }).unwrap();
        assert_eq!(stored_windows(&state, StoreId(1), Shard(0), MIN).unwrap(), [10, 15]);
        let closed = vec![(StoreId(1), 10)];
        let purge = vec![(StoreId(1), Shard(0))];
        state.write(&StoreBatch { closed, purge, ..StoreBatch::default() }).unwrap();
        assert_eq!(stored_windows(&state, StoreId(1), Shard(0), MIN).unwrap(), [15]);
        assert!(stored_windows(&state, StoreId(1), Shard(0), 15).unwrap().is_empty());
    }
}
