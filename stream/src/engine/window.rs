//! Tumbling windows: the edge in front of the exchange, and the keyed step behind it.
//!
//! ```text
//!   source task                                              keyed task
//!   rows ─▶ window of the row ─▶ late? ─▶ local table ═══▶ overlay: window ─▶ key ─▶ cell ─▶ fire ─▶ results
//!                              by stamp    (key, window)              misses │ ▲ cells
//!                                                                      store ▼ │
//! ```
//!
//! Invariants:
//!
//! * LATE: a row is judged once, by its stamp, before anything combines it. A group that is sent is on time, and
//!   meets no closed window: the keyed step asserts it.
//! * FLUSH: no value of time that closes a window is sent while the local table holds a group of that window, and no
//!   barrier while it holds any.
//! * A cell knows the epoch that dirtied it last. It is dirty until that epoch committed, and stays in the overlay
//!   until the store holds it.
//! * A window of which nothing was evicted or left in the store is complete: a key that is not in it is new, and costs
//!   no read.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Slot;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::hash::BuildHasher as _;

use super::poison::{self, KeyAndWindow, key_text};
use super::{Groups, Message, shards_of};
use crate::chain::{Cx, Emit, Rows, Stage, Tail, TaskEnv};
use crate::codec::state as codec;
use crate::error::StepError;
use crate::fault::{self, Fault};
use crate::hash::murmur2;
use crate::key::{Key, KeyBytes, Shard};
use crate::plan::SinkId;
use crate::record::RecordBatch;
use crate::state::{
    CellBatch, CellBatchBuilder, KeyList, Marks, StateBackend, StoreId, scan_window, stored_windows,
};
use crate::time::{END, MIN, Timestamp, Tumbling, Window};

/// What a window does with its rows.
pub(crate) trait Aggregation<T>: Send + Sync + 'static {
    /// What crosses the exchange: a row, or several combined.
    type Part: Send + 'static;
    /// What state holds.
    type Acc: Serialize + DeserializeOwned + Clone + Send + Sync + 'static;
    /// Whether parts of the same key and window can be combined before they are applied.
    const COMBINES: bool;

    fn part(&self, row: T) -> Self::Part;
    /// Adds `part` to `to`, where the aggregation combines.
    fn combine(&self, to: &mut Self::Part, part: Self::Part);
    fn init(&self) -> Self::Acc;
    fn apply(&self, to: &mut Self::Acc, part: Self::Part);
}

pub(crate) struct Counting;

impl<T: Send + 'static> Aggregation<T> for Counting {
    type Part = u64;
    type Acc = u64;
    const COMBINES: bool = true;
    fn part(&self, _: T) -> u64 {
        1
    }
    fn combine(&self, to: &mut u64, part: u64) {
        *to += part;
    }
    fn init(&self) -> u64 {
        0
    }
    fn apply(&self, to: &mut u64, part: u64) {
        *to += part;
    }
}

pub(crate) struct Folding<A, F, T> {
    pub(crate) init: A,
    pub(crate) f: F,
    pub(crate) row: PhantomData<fn(T)>,
}

impl<T, A, F> Aggregation<T> for Folding<A, F, T>
where
    T: Send + 'static,
    A: Serialize + DeserializeOwned + Clone + Send + Sync + 'static,
    F: Fn(&mut A, T) + Send + Sync + 'static,
{
    type Part = T;
    type Acc = A;
    const COMBINES: bool = false;
    fn part(&self, row: T) -> T {
        row
    }
    fn combine(&self, _: &mut T, _: T) {
        unreachable!("a fold's rows are applied one by one")
    }
    fn init(&self) -> A {
        self.init.clone()
    }
    fn apply(&self, to: &mut A, part: T) {
        (self.f)(to, part);
    }
}

/// Groups on their way, in columns.
struct Columns<P> {
    ends: Vec<i64>,
    /// murmur2 of the key.
    hashes: Vec<u32>,
    keys: Vec<u8>,
    key_ends: Vec<u32>,
    parts: Vec<P>,
}

impl<P> Columns<P> {
    fn with_capacity(groups: usize) -> Self {
        Self {
            ends: Vec::with_capacity(groups),
            hashes: Vec::with_capacity(groups),
            keys: Vec::with_capacity(groups * 16),
            key_ends: Vec::with_capacity(groups),
            parts: Vec::with_capacity(groups),
        }
    }

    fn key(&self, i: usize) -> &[u8] {
        let at = if i == 0 { 0 } else { self.key_ends[i - 1] as usize };
        &self.keys[at..self.key_ends[i] as usize]
    }
}

/// Settings of an [`Edge`].
#[derive(Clone, Copy)]
pub(crate) struct EdgeSpec {
    pub(crate) windows: Tumbling,
    pub(crate) late: Option<SinkId>,
}

struct Group<K, P> {
    key: K,
    end: i64,
    hash: u64,
    part: P,
}

/// The end of a source task's chain: assigns windows, judges lateness, combines, sends.
pub(crate) struct Edge<K, T, G: Aggregation<T>> {
    aggregation: Arc<G>,
    spec: EdgeSpec,
    env: TaskEnv,
    /// The window of the last row: most rows fall into the window of the one before.
    window: (i64, i64),
    hasher: FixedState,
    index: HashTable<u32>,
    groups: Vec<Group<K, G::Part>>,
    earliest: i64,
    /// Rows combined since the table was last flushed for being full.
    combined: usize,
    /// Chunks to send row by row, because combining reduced less than twofold.
    bypass: u32,
    key: Vec<u8>,
    row: PhantomData<fn(T)>,
}

/// Chunks sent row by row before combining is tried again: some million rows, a few times the table.
const BYPASS_CHUNKS: u32 = 1_024;

/// Rows that are sent at once where they are not combined. Fewer would cost a message for little.
const SEND_ROWS: usize = 4_096;

impl<K: Key, T, G: Aggregation<T>> Edge<K, T, G> {
    pub(crate) fn new(aggregation: Arc<G>, spec: EdgeSpec, env: &TaskEnv) -> Self {
        Self {
            aggregation,
            spec,
            env: env.clone(),
            window: (END, MIN),
            hasher: FixedState::with_seed(0x7469_6465),
            index: HashTable::new(),
            groups: Vec::new(),
            earliest: END,
            combined: 0,
            bypass: 0,
            key: Vec::new(),
            row: PhantomData,
        }
    }

    fn end_of(&mut self, t: i64) -> i64 {
        let (start, end) = self.window;
        if start <= t && t < end {
            return end;
        }
        let end = self.spec.windows.end_of(t);
        self.window = (self.spec.windows.start_of(end).max(MIN + 1), end);
        end
    }

    fn late(&self, cx: &mut Cx<'_>, row: u32, last: &mut Option<u32>) {
        cx.emit.counters.late += 1;
        // Several rows made of one record write its bytes once.
        if let Some(sink) = self.spec.late.filter(|_| *last != Some(row)) {
            *last = Some(row);
            let partition = cx.partition % self.env.sink_partitions[sink.index()];
            cx.emit.record(sink, partition, cx.records.record(row as usize).to_out());
        }
    }

    fn add(&mut self, key: K, end: i64, part: G::Part) {
        self.earliest = self.earliest.min(end);
        if self.bypass > 0 || !G::COMBINES || self.env.combine_groups_max == 0 {
            self.groups.push(Group { key, end, hash: 0, part });
            return;
        }
        let hash = self.hasher.hash_one(&key) ^ end.cast_unsigned().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let groups = &mut self.groups;
        self.combined += 1;
        let same = |i: &u32| {
            let group = &groups[*i as usize];
            group.end == end && group.key == key
        };
        match self.index.find(hash, same) {
            Some(i) => self.aggregation.combine(&mut groups[*i as usize].part, part),
            None => {
                let at = groups.len() as u32;
                groups.push(Group { key, end, hash, part });
                let groups = &*groups;
                self.index.insert_unique(hash, at, |i| groups[*i as usize].hash);
            }
        }
    }

    /// With `Fault::CombineBeforeLate`: the newest stamp of each row's key in this batch.
    fn newest_stamps(rows: &Rows<(K, T)>) -> Vec<i64> {
        let newest = |(key, _): &(K, T)| {
            let same = rows.values.iter().zip(&rows.stamps).filter(|((k, _), _)| k == key);
            same.map(|(_, stamp)| *stamp).max().unwrap_or(MIN)
        };
        rows.values.iter().map(newest).collect()
    }
}

impl<K: Key, T: Send, G: Aggregation<T>> Stage<(K, T)> for Edge<K, T, G> {
    fn push(&mut self, rows: &mut Rows<(K, T)>, cx: &mut Cx<'_>) -> Result<(), StepError> {
        if fault::active(Fault::CombineBeforeLate) {
            rows.stamps = Self::newest_stamps(rows);
        } else if fault::active(Fault::LateByChannel) {
            rows.stamps.fill(cx.published);
        }
        let mut last_late = None;
        let mut values = std::mem::take(&mut rows.values);
        for (i, (key, value)) in values.drain(..).enumerate() {
            let end = self.end_of(rows.times[i]);
            if end - 1 <= rows.stamps[i] || end <= self.env.closed {
                self.late(cx, rows.from[i], &mut last_late);
                continue;
            }
            let part = self.aggregation.part(value);
            if cx.alone {
                // A panic in it is this record's, and not that of whoever fills the table.
                self.key.clear();
                key.encode(&mut self.key);
            }
            self.add(key, end, part);
            // At the limit, not above it: one group more would double the room of the table.
            if self.groups.len() >= self.env.combine_groups_max && self.env.combine_groups_max > 0 {
                if self.bypass == 0 && G::COMBINES && self.combined < 2 * self.groups.len() {
                    self.bypass = BYPASS_CHUNKS;
                }
                self.flush(cx.emit)?;
            }
        }
        rows.values = values;
        if self.bypass > 0 || !G::COMBINES || self.env.combine_groups_max == 0 {
            self.bypass = self.bypass.saturating_sub(1);
            if self.groups.len() >= SEND_ROWS || (self.bypass == 0 && G::COMBINES) {
                self.flush(cx.emit)?;
            }
        }
        Ok(())
    }

    fn tail(&mut self) -> Option<&mut dyn Tail> {
        Some(self)
    }
}

impl<K: Key, T: Send, G: Aggregation<T>> Tail for Edge<K, T, G> {
    fn flush(&mut self, emit: &mut Emit) -> Result<(), StepError> {
        if self.groups.is_empty() {
            return Ok(());
        }
        catch_unwind(AssertUnwindSafe(|| self.send(emit)))
            .map_err(|panic| StepError::KeyPanicked { read: Vec::new(), message: poison::message(&*panic) })
    }

    fn earliest_end(&self) -> Option<i64> {
        (!self.groups.is_empty()).then_some(self.earliest)
    }
}

impl<K: Key, T: Send, G: Aggregation<T>> Edge<K, T, G> {
    /// Sends the groups, each to the task of its key. The one place where keys are encoded, which is the job's code.
    fn send(&mut self, emit: &mut Emit) {
        let each = self.groups.len() / self.env.receivers + 1;
        emit.counters.exchanged += self.groups.len() as u64;
        let mut columns: Vec<Option<Columns<G::Part>>> = (0..self.env.receivers).map(|_| None).collect();
        for Group { key, end, part, .. } in self.groups.drain(..) {
            self.key.clear();
            key.encode(&mut self.key);
            let hash = murmur2(&self.key);
            let receiver = shard(hash, self.env.shards).task(self.env.receivers);
            let to = columns[receiver].get_or_insert_with(|| Columns::with_capacity(each));
            to.ends.push(end);
            to.hashes.push(hash);
            to.keys.extend_from_slice(&self.key);
            to.key_ends.push(to.keys.len() as u32);
            to.parts.push(part);
        }
        self.index.clear();
        (self.earliest, self.combined) = (END, 0);
        for (receiver, columns) in columns.into_iter().enumerate() {
            if let Some(columns) = columns {
                let len = columns.ends.len();
                let bytes = columns.keys.len() + len * (16 + size_of::<G::Part>());
                emit.messages
                    .push((receiver, Message::Rows(Groups { groups: Box::new(columns), len, bytes })));
            }
        }
    }
}

fn shard(hash: u32, shards: u16) -> Shard {
    Shard(((hash & 0x7fff_ffff) % u32::from(shards)) as u16)
}

/// murmur2 has 32 bits, of which a task sees one residue: spread them for the table.
fn spread(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The state and the results of one keyed task.
pub(crate) trait KeyedStep: Send {
    fn rows(&mut self, groups: Groups, at: &At, emit: &mut Emit) -> Result<(), StepError>;
    /// Fires and closes every window that ends at or before `now` + 1 ms, or all of them.
    fn fire(&mut self, now: i64, emit: &mut Emit) -> Result<(), StepError>;
    fn snapshot(&mut self, epoch: u64) -> Vec<Arc<CellBatch>>;
    fn marks(&self) -> Marks;
    /// The name its state keeps.
    fn name(&self) -> &str;
    /// With care: the group it works on, or worked on last.
    fn at_work(&self) -> Option<KeyAndWindow>;
    /// Ends of the windows that are open.
    fn open(&self) -> Vec<i64>;
    fn bytes(&self) -> usize;
    /// Drops cells dirtied by `applied` or earlier; returns how many.
    fn evict(&mut self, applied: u64) -> u64;
    /// With `Fault::CleanAll`.
    fn clean_all(&mut self);
    /// With `Fault::BatchFromOverlay`: what the overlay holds for a cell.
    #[cfg_attr(not(feature = "faults"), expect(dead_code, reason = "only a fault looks"))]
    fn peek(&self, window_end: i64, key: &[u8]) -> Option<Vec<u8>>;
}

/// Where a keyed task stands.
#[derive(Clone, Copy)]
pub(crate) struct At {
    pub(crate) epoch: u64,
    pub(crate) reached: i64,
}

/// What a keyed step is made with.
#[derive(Clone)]
pub(crate) struct StepSetup {
    pub(crate) task: usize,
    pub(crate) tasks: usize,
    pub(crate) shards: u16,
    pub(crate) store: StoreId,
    pub(crate) marks: Marks,
    pub(crate) backend: Arc<dyn StateBackend>,
    /// Groups and results are run one by one: one of them made the job panic.
    pub(crate) care: bool,
}

pub(crate) type StepFactory =
    Arc<dyn Fn(&TaskEnv, StepSetup) -> Result<Box<dyn KeyedStep>, StepError> + Send + Sync>;

struct Cell<A> {
    key: KeyBytes,
    acc: A,
    /// The epoch that dirtied it last; 0: as the store holds it.
    epoch: u64,
    hash: u32,
}

/// The overlay of one open window.
struct Open<A> {
    index: HashTable<u32>,
    cells: Vec<Cell<A>>,
    /// Cells dirtied by the running epoch.
    dirty: Vec<u32>,
    complete: bool,
    heap: usize,
}

impl<A> Open<A> {
    fn new(complete: bool) -> Self {
        Self { index: HashTable::new(), cells: Vec::new(), dirty: Vec::new(), complete, heap: 0 }
    }

    fn find(&self, hash: u32, key: &[u8]) -> Option<usize> {
        let same = |i: &u32| *self.cells[*i as usize].key == *key;
        self.index.find(spread(hash), same).map(|i| *i as usize)
    }

    /// The cell of a key, made by `init` if there is none.
    fn cell(&mut self, hash: u32, key: &[u8], init: impl FnOnce() -> A) -> usize {
        let cells = &self.cells;
        let same = |i: &u32| *cells[*i as usize].key == *key;
        match self.index.entry(spread(hash), same, |i| spread(cells[*i as usize].hash)) {
            Slot::Occupied(slot) => *slot.get() as usize,
            Slot::Vacant(slot) => {
                let at = self.cells.len();
                slot.insert(at as u32);
                let key = KeyBytes::new(key);
                self.heap += key.heap_bytes();
                self.cells.push(Cell { key, acc: init(), epoch: 0, hash });
                at
            }
        }
    }

    fn bytes(&self) -> usize {
        // A slot of the index is 4 bytes and its tag, at a load of 7/16 to 7/8.
        self.cells.len() * (size_of::<Cell<A>>() + 8) + self.dirty.len() * 4 + self.heap
    }

    /// Drops the cells that the store holds as they are.
    fn evict(&mut self, applied: u64) -> u64 {
        let before = self.cells.len();
        let dirty: Vec<bool> = {
            let mut of = vec![false; before];
            self.dirty.iter().for_each(|i| of[*i as usize] = true);
            of
        };
        let mut at = 0;
        self.dirty.clear();
        let mut kept = 0;
        let (dirty_list, heap) = (&mut self.dirty, &mut self.heap);
        self.cells.retain(|cell| {
            let keep = dirty[at] || cell.epoch > applied;
            if keep {
                if dirty[at] {
                    dirty_list.push(kept);
                }
                kept += 1;
            } else {
                *heap -= cell.key.heap_bytes();
            }
            at += 1;
            keep
        });
        let evicted = before - self.cells.len();
        if evicted > 0 {
            self.complete = self.complete && fault::active(Fault::EvictedIsComplete);
            self.cells.shrink_to_fit();
            self.index = HashTable::with_capacity(self.cells.len());
            for (i, cell) in self.cells.iter().enumerate() {
                self.index
                    .insert_unique(spread(cell.hash), i as u32, |i| spread(self.cells[*i as usize].hash));
            }
        }
        evicted as u64
    }
}

/// A window's result with its key, as the chain behind the step takes it.
type Fired<K, A> = (K, Window<K, A>);

/// Results are handed on in batches of this many.
const FIRE_ROWS: usize = 4096;

pub(crate) struct TumblingStep<K, T, G: Aggregation<T>> {
    name: String,
    windows: Tumbling,
    aggregation: Arc<G>,
    setup: StepSetup,
    open: BTreeMap<i64, Open<G::Acc>>,
    marks: Marks,
    next: Box<dyn Stage<Fired<K, G::Acc>>>,
    results: Rows<Fired<K, G::Acc>>,
    misses: KeyList,
    missed: Vec<(i64, u32)>,
    builders: Vec<CellBatchBuilder>,
    /// With care: end and key of the group it works on.
    at_work: Option<(i64, Vec<u8>)>,
    row: PhantomData<fn(T)>,
}

impl<K: Key, T: Send + 'static, G: Aggregation<T>> TumblingStep<K, T, G> {
    pub(crate) fn new(
        name: String,
        windows: Tumbling,
        aggregation: Arc<G>,
        next: Box<dyn Stage<Fired<K, G::Acc>>>,
        setup: StepSetup,
    ) -> Result<Self, StepError> {
        let mut step = Self {
            name,
            windows,
            aggregation,
            open: BTreeMap::new(),
            marks: setup.marks,
            next,
            results: Rows::default(),
            misses: KeyList::default(),
            missed: Vec::new(),
            builders: (0..setup.shards).map(|_| CellBatchBuilder::default()).collect(),
            setup,
            at_work: None,
            row: PhantomData,
        };
        step.load()?;
        Ok(step)
    }

    fn shards(&self) -> impl Iterator<Item = Shard> + use<K, T, G> {
        shards_of(self.setup.task, self.setup.tasks, self.setup.shards)
    }

    /// Finds the windows that the store holds: none of them is complete.
    fn load(&mut self) -> Result<(), StepError> {
        for shard in self.shards() {
            let backend = &*self.setup.backend;
            for end in stored_windows(backend, self.setup.store, shard, self.marks.closed)? {
                let complete = fault::active(Fault::LoadedIsComplete);
                self.open.entry(end).or_insert_with(|| Open::new(complete));
            }
        }
        Ok(())
    }

    fn bad_value(&self, source: crate::codec::BadState) -> StepError {
        StepError::Value { step: self.name.clone(), source }
    }

    /// Reads the cells of a batch that incomplete windows do not hold.
    fn read_misses(&mut self, columns: &Columns<G::Part>, emit: &mut Emit) -> Result<(), StepError> {
        self.misses.clear();
        self.missed.clear();
        for (i, end) in columns.ends.iter().enumerate() {
            let hash = columns.hashes[i];
            let Some(open) = self.open.get(end).filter(|o| !o.complete) else { continue };
            if open.find(hash, columns.key(i)).is_none() {
                let shard = shard(hash, self.setup.shards);
                self.misses.push_cell(self.setup.store, shard, *end, columns.key(i));
                self.missed.push((*end, i as u32));
            }
        }
        if self.misses.is_empty() {
            return Ok(());
        }
        emit.counters.store_reads += self.misses.len() as u64;
        let (open, missed, mut bad) = (&mut self.open, &self.missed, None);
        self.setup.backend.get_many(&self.misses, &mut |at, value| {
            let (end, i) = missed[at];
            match codec::decode(value) {
                Ok(acc) => {
                    emit.counters.store_hits += 1;
                    let window = open.get_mut(&end).expect("the window of a miss is open");
                    window.cell(columns.hashes[i as usize], columns.key(i as usize), || acc);
                }
                Err(e) => bad = Some(e),
            }
        })?;
        bad.map_or(Ok(()), |e| Err(self.bad_value(e)))
    }

    fn result(
        &mut self,
        end: i64,
        key_bytes: &[u8],
        value: G::Acc,
        emit: &mut Emit,
    ) -> Result<(), StepError> {
        let key =
            K::decode(key_bytes).map_err(|source| StepError::Key { step: self.name.clone(), source })?;
        if self.setup.care {
            self.at_work = Some((end, key_bytes.to_vec()));
        }
        let start = Timestamp(self.windows.start_of(end));
        let window = Window { key: key.clone(), start, end: Timestamp(end), value };
        emit.counters.fired += 1;
        self.results.times.push(end - 1);
        self.results.values.push((key, window));
        let full = if self.setup.care { 1 } else { FIRE_ROWS };
        if self.results.values.len() >= full { self.hand_on(emit) } else { Ok(()) }
    }

    fn hand_on(&mut self, emit: &mut Emit) -> Result<(), StepError> {
        let records = RecordBatch::default();
        let mut cx = Cx { records: &records, partition: 0, published: MIN, alone: false, emit };
        let result = self.next.push(&mut self.results, &mut cx);
        self.results.clear();
        result
    }

    fn fire_window(&mut self, end: i64, open: Open<G::Acc>, emit: &mut Emit) -> Result<(), StepError> {
        if !open.complete {
            let mut stored = Vec::new();
            for shard in self.shards() {
                scan_window(&*self.setup.backend, self.setup.store, shard, end, &mut |key, value| {
                    if open.find(murmur2(key), key).is_none() {
                        stored.push((key.to_vec(), codec::decode::<G::Acc>(value)));
                    }
                })?;
            }
            for (key, value) in stored {
                let value = value.map_err(|e| self.bad_value(e))?;
                self.result(end, &key, value, emit)?;
            }
        }
        for cell in open.cells {
            self.result(end, &cell.key, cell.acc, emit)?;
        }
        self.hand_on(emit)
    }
}

impl<K: Key, T: Send + 'static, G: Aggregation<T>> KeyedStep for TumblingStep<K, T, G> {
    fn rows(&mut self, groups: Groups, at: &At, emit: &mut Emit) -> Result<(), StepError> {
        self.at_work = None;
        let columns = groups.groups.downcast::<Columns<G::Part>>();
        let columns =
            *columns.unwrap_or_else(|_| panic!("the rows of step `{}` are of another step", self.name));
        if self.open.values().any(|o| !o.complete) {
            self.read_misses(&columns, emit)?;
        }
        let mut current: Option<(i64, &mut Open<G::Acc>)> = None;
        let Columns { ends, hashes, keys, key_ends, parts } = columns;
        let mut key_start = 0;
        for (((end, hash), key_end), part) in ends.into_iter().zip(hashes).zip(key_ends).zip(parts) {
            let key = &keys[key_start..key_end as usize];
            key_start = key_end as usize;
            let window = match current.take() {
                Some((e, window)) if e == end => window,
                _ => {
                    if end <= self.marks.closed || end - 1 <= at.reached {
                        return Err(StepError::ClosedWindow {
                            step: self.name.clone(),
                            task: self.setup.task,
                            reached: at.reached,
                            closed: self.marks.closed,
                            window_end: end,
                        });
                    }
                    self.open.entry(end).or_insert_with(|| Open::new(true))
                }
            };
            if self.setup.care {
                self.at_work = Some((end, key.to_vec()));
            }
            let i = window.cell(hash, key, || self.aggregation.init());
            let cell = &mut window.cells[i];
            self.aggregation.apply(&mut cell.acc, part);
            if cell.epoch != at.epoch {
                cell.epoch = at.epoch;
                window.dirty.push(i as u32);
            }
            current = Some((end, window));
        }
        Ok(())
    }

    fn fire(&mut self, now: i64, emit: &mut Emit) -> Result<(), StepError> {
        self.at_work = None;
        while let Some(first) = self.open.first_entry().filter(|w| w.key() - 1 <= now) {
            let (end, open) = first.remove_entry();
            self.fire_window(end, open, emit)?;
            self.marks.raise(Marks { fired: end, closed: end });
        }
        Ok(())
    }

    fn snapshot(&mut self, epoch: u64) -> Vec<Arc<CellBatch>> {
        for (end, open) in &mut self.open {
            for i in open.dirty.drain(..) {
                let cell = &open.cells[i as usize];
                if cell.epoch == epoch {
                    if self.setup.care {
                        self.at_work = Some((*end, cell.key.to_vec()));
                    }
                    let shard = shard(cell.hash, self.setup.shards);
                    let builder = &mut self.builders[usize::from(shard.0)];
                    builder.push(*end, &cell.key, |to| codec::encode(&cell.acc, to));
                }
            }
        }
        let store = self.setup.store;
        let shards = shards_of(self.setup.task, self.setup.tasks, self.setup.shards);
        shards.filter_map(|s| self.builders[usize::from(s.0)].finish(store, s)).map(Arc::new).collect()
    }

    fn marks(&self) -> Marks {
        self.marks
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn at_work(&self) -> Option<KeyAndWindow> {
        let (end, key) = self.at_work.as_ref()?;
        let start = Timestamp(self.windows.start_of(*end));
        Some(KeyAndWindow { key: key_text(key), start, end: Timestamp(*end) })
    }

    fn open(&self) -> Vec<i64> {
        self.open.keys().copied().collect()
    }

    fn bytes(&self) -> usize {
        self.open.values().map(Open::bytes).sum()
    }

    fn evict(&mut self, applied: u64) -> u64 {
        self.open.values_mut().map(|o| o.evict(applied)).sum()
    }

    fn clean_all(&mut self) {
        for cell in self.open.values_mut().flat_map(|o| &mut o.cells) {
            cell.epoch = 0;
        }
        self.open.values_mut().for_each(|o| o.dirty.clear());
    }

    fn peek(&self, window_end: i64, key: &[u8]) -> Option<Vec<u8>> {
        let open = self.open.get(&window_end)?;
        let cell = &open.cells[open.find(murmur2(key), key)?];
        let mut value = Vec::new();
        codec::encode(&cell.acc, &mut value);
        Some(value)
    }
}
