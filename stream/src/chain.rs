//! Chains: fused operators that hand whole batches to each other.
//!
//! ```text
//!   RecordBatch ─▶ Head (decode, event times, stamps) ─▶ map ─▶ filter ─▶ … ─▶ sink, or the edge of a keyed step
//! ```
//!
//! Rows travel as structs of arrays ([`Rows`]): times, stamps, index of the source record, values. Each operator is
//! boxed once per task and called once per batch; inside its loop the user's closure is a direct call. Every operator
//! owns the batch it fills and clears it for the next one, so a warm chain allocates nothing per row.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use hashbrown::HashMap;

use crate::codec::{Decoder, Encoder};
use crate::engine::{Message, OutBatch};
use crate::error::StepError;
use crate::hash::partition_of;
use crate::key::Key;
use crate::plan::SinkId;
use crate::record::{Header, OutRecord, RecordBatch};

/// Rows between two operators.
pub(crate) struct Rows<T> {
    pub(crate) times: Vec<i64>,
    /// The event-time watermark of the row's partition before the row. Empty behind a keyed step.
    pub(crate) stamps: Vec<i64>,
    /// The row's record in the fetched batch. Empty behind a keyed step.
    pub(crate) from: Vec<u32>,
    pub(crate) values: Vec<T>,
}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self { times: Vec::new(), stamps: Vec::new(), from: Vec::new(), values: Vec::new() }
    }
}

impl<T> Rows<T> {
    pub(crate) fn clear(&mut self) {
        self.times.clear();
        self.stamps.clear();
        self.from.clear();
        self.values.clear();
    }

    /// Takes over all but the values.
    fn take_places<U>(&mut self, of: &mut Rows<U>) {
        std::mem::swap(&mut self.times, &mut of.times);
        std::mem::swap(&mut self.stamps, &mut of.stamps);
        std::mem::swap(&mut self.from, &mut of.from);
    }

    /// Appends the place of row `i` of `of`.
    fn copy_place<U>(&mut self, of: &Rows<U>, i: usize) {
        self.times.push(of.times[i]);
        if let (Some(stamp), Some(from)) = (of.stamps.get(i), of.from.get(i)) {
            self.stamps.push(*stamp);
            self.from.push(*from);
        }
    }
}

/// What a chain's operators can reach while a batch passes.
pub(crate) struct Cx<'a> {
    /// The source batch; empty behind a keyed step.
    pub(crate) records: &'a RecordBatch,
    /// Its partition.
    pub(crate) partition: u32,
    /// The job value as the task last published it.
    pub(crate) published: i64,
    /// Whether its records are run one by one, because one of them may make the job panic.
    pub(crate) alone: bool,
    /// What leaves the task.
    pub(crate) emit: &'a mut Emit,
}

/// What leaves a task while it works: records for sinks, and messages for the tasks of the keyed step.
#[derive(Default)]
pub(crate) struct Emit {
    pub(crate) batches: Vec<OutBatch>,
    open: HashMap<(SinkId, u32), usize, foldhash::fast::FixedState>,
    /// (receiver, message)
    pub(crate) messages: Vec<(usize, Message)>,
    pub(crate) counters: Counters,
}

/// What a task counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records read from sources.
    pub rows_in: u64,
    /// Rows late for their window.
    pub late: u64,
    /// Records that could not be read.
    pub dead: u64,
    /// Rows sent to the keyed step after local combining.
    pub exchanged: u64,
    /// Records that left through sinks, late rows and dead letters included.
    pub rows_out: u64,
    /// Cells dropped from the overlay to stay within the state memory.
    pub evicted: u64,
    /// Cells that were read back from the store.
    pub store_hits: u64,
    /// Keys looked up in the store.
    pub store_reads: u64,
    /// Results of windows.
    pub fired: u64,
    /// Messages to the keyed step that found their queue full and waited with their sender.
    pub waited: u64,
}

impl Counters {
    /// Adds another task's.
    pub fn add(&mut self, other: &Self) {
        self.rows_in += other.rows_in;
        self.late += other.late;
        self.dead += other.dead;
        self.exchanged += other.exchanged;
        self.rows_out += other.rows_out;
        self.evicted += other.evicted;
        self.store_hits += other.store_hits;
        self.store_reads += other.store_reads;
        self.fired += other.fired;
        self.waited += other.waited;
    }
}

impl Emit {
    #[inline]
    pub(crate) fn record(&mut self, sink: SinkId, partition: u32, record: OutRecord) {
        let batches = &mut self.batches;
        let at = *self.open.entry((sink, partition)).or_insert_with(|| {
            batches.push(OutBatch { sink, partition, records: Vec::new() });
            batches.len() - 1
        });
        self.counters.rows_out += 1;
        batches[at].records.push(record);
    }

    pub(crate) fn take_batches(&mut self) -> Vec<OutBatch> {
        self.open.clear();
        std::mem::take(&mut self.batches)
    }
}

/// The end of a chain that holds rows back for a while.
pub(crate) trait Tail {
    /// Sends everything held back.
    ///
    /// # Errors
    ///
    /// [`StepError::KeyPanicked`], which does not know yet what was read.
    fn flush(&mut self, emit: &mut Emit) -> Result<(), StepError>;
    /// The smallest window end of what is held back.
    fn earliest_end(&self) -> Option<i64>;
}

/// One operator of a chain, with everything behind it.
pub(crate) trait Stage<T>: Send {
    /// Takes the rows and leaves `rows` in any state; the caller clears it.
    fn push(&mut self, rows: &mut Rows<T>, cx: &mut Cx<'_>) -> Result<(), StepError>;
    /// The end of the chain, if it holds rows back.
    fn tail(&mut self) -> Option<&mut dyn Tail>;
}

/// What a task's chain is made with.
#[derive(Clone, Debug)]
pub(crate) struct TaskEnv {
    /// `closed_through` as committed: rows of windows up to it are late.
    pub(crate) closed: i64,
    /// Number of tasks of the keyed step.
    pub(crate) receivers: usize,
    /// Number of shards.
    pub(crate) shards: u16,
    /// Groups the local table holds at most; 0: rows are not combined.
    pub(crate) combine_groups_max: usize,
    /// Partitions of each sink's topic.
    pub(crate) sink_partitions: Arc<[u32]>,
}

pub(crate) type StageFactory<T> = Arc<dyn Fn(&TaskEnv) -> Box<dyn Stage<T>> + Send + Sync>;
pub(crate) type HeadFactory = Arc<dyn Fn(&TaskEnv) -> Box<dyn Head> + Send + Sync>;

/// The start of a source task's chain.
pub(crate) trait Head: Send {
    /// Runs the records of one partition through the chain and raises the partition's event-time watermark.
    fn run(&mut self, watermark: &mut i64, cx: &mut Cx<'_>) -> Result<(), StepError>;
    /// The end of the chain, if it holds rows back.
    fn tail(&mut self) -> Option<&mut dyn Tail>;
}

/// Decodes a batch.
pub(crate) trait DecodeRows<T>: Send + Sync {
    /// Fills `from` and `values` with the records of `range`; reports each one that is malformed.
    fn decode(
        &self,
        records: &RecordBatch,
        range: Range<usize>,
        rows: &mut Rows<T>,
        bad: &mut dyn FnMut(usize, String),
    );
}

pub(crate) struct Decoding<D>(pub(crate) D);

impl<D: Decoder> DecodeRows<D::Item> for Decoding<D> {
    fn decode(
        &self,
        records: &RecordBatch,
        range: Range<usize>,
        rows: &mut Rows<D::Item>,
        bad: &mut dyn FnMut(usize, String),
    ) {
        for i in range {
            match self.0.decode(records.record(i)) {
                Ok(value) => {
                    rows.from.push(i as u32);
                    rows.values.push(value);
                }
                Err(reason) => bad(i, reason.0),
            }
        }
    }
}

/// Event times of a batch.
pub(crate) type TimesOf<T> = Arc<dyn Fn(&[T], &mut Vec<i64>) + Send + Sync>;

/// What becomes of a record that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnMalformed {
    /// The job stops.
    Stop,
    /// It is counted and dropped.
    Skip,
    /// It goes to the dead letters.
    DeadLetter(SinkId),
}

impl OnMalformed {
    fn handle(self, cx: &mut Cx<'_>, env: &TaskEnv, index: usize, reason: String) -> Result<(), StepError> {
        cx.emit.counters.dead += 1;
        match self {
            Self::Skip => Ok(()),
            Self::DeadLetter(sink) => {
                let mut record = cx.records.record(index).to_out();
                let reason = Header { name: Bytes::from_static(b"reason"), value: Some(reason.into()) };
                record.headers.push(reason);
                let partition = cx.partition % env.sink_partitions[sink.index()];
                cx.emit.record(sink, partition, record);
                Ok(())
            }
            Self::Stop => Err(StepError::Malformed {
                partition: cx.partition,
                offset: cx.records.offset(index),
                reason,
            }),
        }
    }
}

pub(crate) struct SourceHead<T> {
    pub(crate) decoder: Arc<dyn DecodeRows<T>>,
    pub(crate) times: Option<TimesOf<T>>,
    pub(crate) bound: i64,
    pub(crate) malformed: OnMalformed,
    pub(crate) env: TaskEnv,
    pub(crate) rows: Rows<T>,
    pub(crate) next: Box<dyn Stage<T>>,
}

/// Rows that go through a chain in one call. A fetched batch has some ten thousand: their columns, written by one
/// operator and read by the next, would leave the nearest caches in between.
const CHUNK_ROWS: usize = 1_024;

impl<T: Send + 'static> Head for SourceHead<T> {
    fn run(&mut self, watermark: &mut i64, cx: &mut Cx<'_>) -> Result<(), StepError> {
        let all = cx.records.len();
        for at in (0..all).step_by(CHUNK_ROWS) {
            self.run_range(at..all.min(at + CHUNK_ROWS), watermark, cx)?;
        }
        Ok(())
    }

    fn tail(&mut self) -> Option<&mut dyn Tail> {
        self.next.tail()
    }
}

impl<T: Send + 'static> SourceHead<T> {
    fn run_range(
        &mut self,
        range: Range<usize>,
        watermark: &mut i64,
        cx: &mut Cx<'_>,
    ) -> Result<(), StepError> {
        cx.emit.counters.rows_in += range.len() as u64;
        self.rows.clear();
        let mut bad = Vec::new();
        self.decoder.decode(cx.records, range, &mut self.rows, &mut |i, reason| bad.push((i, reason)));
        for (index, reason) in bad {
            self.malformed.handle(cx, &self.env, index, reason)?;
        }
        let rows = &mut self.rows;
        match &self.times {
            Some(times) => times(&rows.values, &mut rows.times),
            None => rows.times.extend(rows.from.iter().map(|i| cx.records.record(*i as usize).timestamp())),
        }
        for t in &rows.times {
            // STAMP: the partition's value before the row; then WATERMARK.
            rows.stamps.push(*watermark);
            *watermark = (*watermark).max(t.saturating_sub(self.bound).saturating_sub(1));
        }
        self.next.push(rows, cx)
    }
}

macro_rules! tail_of_next {
    () => {
        fn tail(&mut self) -> Option<&mut dyn Tail> {
            self.next.tail()
        }
    };
}

pub(crate) struct Map<U, F> {
    pub(crate) f: Arc<F>,
    pub(crate) out: Rows<U>,
    pub(crate) next: Box<dyn Stage<U>>,
}

impl<T, U: Send, F: Fn(T) -> U + Send + Sync> Stage<T> for Map<U, F> {
    fn push(&mut self, rows: &mut Rows<T>, cx: &mut Cx<'_>) -> Result<(), StepError> {
        self.out.clear();
        self.out.take_places(rows);
        self.out.values.extend(rows.values.drain(..).map(|v| (self.f)(v)));
        self.next.push(&mut self.out, cx)
    }
    tail_of_next!();
}

pub(crate) struct TryMap<U, F> {
    pub(crate) f: Arc<F>,
    pub(crate) malformed: OnMalformed,
    pub(crate) env: TaskEnv,
    pub(crate) out: Rows<U>,
    pub(crate) next: Box<dyn Stage<U>>,
}

impl<T, U, E, F> Stage<T> for TryMap<U, F>
where
    U: Send,
    E: std::fmt::Display,
    F: Fn(T) -> Result<U, E> + Send + Sync,
{
    fn push(&mut self, rows: &mut Rows<T>, cx: &mut Cx<'_>) -> Result<(), StepError> {
        self.out.clear();
        let values = std::mem::take(&mut rows.values);
        for (i, value) in values.into_iter().enumerate() {
            match (self.f)(value) {
                Ok(value) => {
                    self.out.copy_place(rows, i);
                    self.out.values.push(value);
                }
                Err(e) => self.malformed.handle(cx, &self.env, rows.from[i] as usize, e.to_string())?,
            }
        }
        self.next.push(&mut self.out, cx)
    }
    tail_of_next!();
}

pub(crate) struct Filter<T, F> {
    pub(crate) f: Arc<F>,
    pub(crate) out: Rows<T>,
    pub(crate) next: Box<dyn Stage<T>>,
}

impl<T: Send, F: Fn(&T) -> bool + Send + Sync> Stage<T> for Filter<T, F> {
    fn push(&mut self, rows: &mut Rows<T>, cx: &mut Cx<'_>) -> Result<(), StepError> {
        self.out.clear();
        let mut values = std::mem::take(&mut rows.values);
        for (i, value) in values.drain(..).enumerate() {
            if (self.f)(&value) {
                self.out.copy_place(rows, i);
                self.out.values.push(value);
            }
        }
        rows.values = values;
        self.next.push(&mut self.out, cx)
    }
    tail_of_next!();
}

pub(crate) struct FlatMap<U, F> {
    pub(crate) f: Arc<F>,
    pub(crate) out: Rows<U>,
    pub(crate) next: Box<dyn Stage<U>>,
}

impl<T, U, I, F> Stage<T> for FlatMap<U, F>
where
    U: Send,
    I: IntoIterator<Item = U>,
    F: Fn(T) -> I + Send + Sync,
{
    fn push(&mut self, rows: &mut Rows<T>, cx: &mut Cx<'_>) -> Result<(), StepError> {
        self.out.clear();
        let mut values = std::mem::take(&mut rows.values);
        for (i, value) in values.drain(..).enumerate() {
            for made in (self.f)(value) {
                self.out.copy_place(rows, i);
                self.out.values.push(made);
            }
        }
        rows.values = values;
        self.next.push(&mut self.out, cx)
    }
    tail_of_next!();
}

/// Marks a sink whose rows have no key.
pub(crate) struct Keyless;

/// Marks a sink whose rows have a key.
pub(crate) struct ByKey;

/// Writes rows to a topic: keyed ones by the key's murmur2, others to the source partition modulo the count.
pub(crate) struct Sink<E, R> {
    pub(crate) sink: SinkId,
    pub(crate) partitions: u32,
    pub(crate) encoder: Arc<E>,
    pub(crate) bytes: Vec<u8>,
    /// Per record: end of its key, end of its value, whether it has a key, its partition.
    pub(crate) ends: Vec<(usize, usize, bool, u32)>,
    pub(crate) routing: std::marker::PhantomData<fn() -> R>,
}

impl<E, R> Sink<E, R> {
    pub(crate) fn new(sink: SinkId, encoder: Arc<E>, env: &TaskEnv) -> Self {
        Self {
            sink,
            partitions: env.sink_partitions[sink.index()],
            encoder,
            bytes: Vec::new(),
            ends: Vec::new(),
            routing: std::marker::PhantomData,
        }
    }

    fn write<'a, T: 'a>(
        &mut self,
        rows: impl Iterator<Item = &'a T>,
        times: &[i64],
        key: impl Fn(&T, &mut Vec<u8>) -> bool,
        encode: impl Fn(&E, &T, &mut Vec<u8>) -> Result<(), crate::codec::Malformed>,
        cx: &mut Cx<'_>,
    ) -> Result<(), StepError> {
        self.ends.clear();
        for item in rows {
            let at = self.bytes.len();
            let keyed = key(item, &mut self.bytes);
            let key_end = self.bytes.len();
            let partition = match keyed {
                true => partition_of(&self.bytes[at..key_end], self.partitions),
                false => cx.partition % self.partitions,
            };
            encode(&self.encoder, item, &mut self.bytes)
                .map_err(|e| StepError::Unencodable { sink: self.sink, reason: e.0 })?;
            self.ends.push((key_end, self.bytes.len(), keyed, partition));
        }
        // One buffer for the whole batch; the records are counted slices of it.
        let capacity = self.bytes.len();
        let bytes = Bytes::from(std::mem::replace(&mut self.bytes, Vec::with_capacity(capacity)));
        let mut at = 0;
        for ((key_end, value_end, keyed, partition), timestamp) in self.ends.iter().zip(times) {
            let record = OutRecord {
                timestamp: *timestamp,
                key: keyed.then(|| bytes.slice(at..*key_end)),
                value: Some(bytes.slice(*key_end..*value_end)),
                headers: Vec::new(),
            };
            cx.emit.record(self.sink, *partition, record);
            at = *value_end;
        }
        Ok(())
    }
}

impl<T: Send, E: Encoder<T>> Stage<T> for Sink<E, Keyless> {
    fn push(&mut self, rows: &mut Rows<T>, cx: &mut Cx<'_>) -> Result<(), StepError> {
        self.write(rows.values.iter(), &rows.times, |_, _| false, |e, v, to| e.encode(v, to), cx)
    }
    fn tail(&mut self) -> Option<&mut dyn Tail> {
        None
    }
}

impl<K: Key, T: Send, E: Encoder<T>> Stage<(K, T)> for Sink<E, ByKey> {
    fn push(&mut self, rows: &mut Rows<(K, T)>, cx: &mut Cx<'_>) -> Result<(), StepError> {
        let key = |(k, _): &(K, T), to: &mut Vec<u8>| {
            k.encode(to);
            true
        };
        self.write(rows.values.iter(), &rows.times, key, |e, (_, v), to| e.encode(v, to), cx)
    }
    fn tail(&mut self) -> Option<&mut dyn Tail> {
        None
    }
}
