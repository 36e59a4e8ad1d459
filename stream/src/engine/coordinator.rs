//! The coordinator: one job epoch after the other becomes one transaction each.
//!
//! ```text
//!   running N ──due──▶ Barrier N ──▶ aligning N ──all snapshots──▶ ending N, running N+1 ──committed──▶ running N+1
//!      output N ─▶ transaction      output N+1 is held               output N+1 is held        └aborted─▶ Restart
//! ```
//!
//! The numbered steps of a commit, and what a crash before each of them leaves behind, are [`COMMIT_STEPS`]: one table,
//! read by the tests and shown in `docs/semantics.md`.
//!
//! Invariants:
//!
//! * The end of the transaction is the only commit point. Everything of epoch N is in one transaction: output, late rows,
//!   dead letters, cells, marks, offsets with event-time watermarks and floor. (At least once: output is beside it. At
//!   most once: the offsets are further on. See [`crate::Guarantee`].)
//! * Depth one: while N ends, N + 1 is processed and its output held; its barrier waits for N's outcome; if N aborted,
//!   N + 1 dies with it.
//! * An unknown outcome is asked for until it is known.
//! * Only bytes of committed epochs are written to the store, in commit order.
//! * An epoch that changed nothing commits nothing, except the end of a bounded run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::source::Last;
use super::{Join, KeyedSnapshot, Mode, OutBatch, SourceSnapshot, Start};
use crate::error::StepError;
use crate::fault::{self, Fault};
use crate::guarantee::Guarantee;
use crate::io::{Ended, OffsetCommit, Position, TopicId};
use crate::key::Shard;
use crate::names::PartitionMark;
use crate::record::{OutRecord, RecordParts};
use crate::state::{CellBatch, Marks, ShardPosition, StoreBatch, StoreId, mark_changelog_key};
use crate::time::MIN;

/// A step of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CommitStep {
    /// Barriers leave for every source task.
    Barrier = 1,
    /// Changelog records and marks are put into the transaction.
    State = 2,
    /// Offsets, event-time watermarks and the floor are put into the transaction.
    Offsets = 3,
    /// The transaction is ended.
    End = 4,
    /// The outcome arrives.
    Outcome = 5,
    /// Committed bytes are written to the store.
    Write = 6,
    /// The store is flushed.
    Flush = 7,
}

/// One row of [`COMMIT_STEPS`].
#[derive(Clone, Copy, Debug)]
pub struct StepRow {
    /// The step.
    pub step: CommitStep,
    /// What it does.
    pub does: &'static str,
    /// What a crash just before it leaves behind.
    pub crash_before: &'static str,
}

/// The steps of a commit of epoch N, in order, each with the one outcome of a crash just before it.
pub const COMMIT_STEPS: [StepRow; 7] = [
    StepRow {
        step: CommitStep::Barrier,
        does: "every source task flushes its local table, snapshots its partitions and sends the barrier; keyed tasks align and encode their dirty cells",
        crash_before: "N is lost: its transaction is aborted by the next start, which continues from the commit of N - 1",
    },
    StepRow {
        step: CommitStep::State,
        does: "the encoded cells go to the changelogs, with marks on every shard if a window closed, inside the transaction",
        crash_before: "N is lost, as above; N + 1 may be running and dies with it",
    },
    StepRow {
        step: CommitStep::Offsets,
        does: "the next offset of every partition goes into the transaction, with its event-time watermark and the floor",
        crash_before: "N is lost, as above",
    },
    StepRow {
        step: CommitStep::End,
        does: "the transaction is ended: the only commit point",
        crash_before: "N is lost, as above",
    },
    StepRow {
        step: CommitStep::Outcome,
        does: "the coordinator learns the outcome and releases the held output of N + 1",
        crash_before: "N is committed; N + 1 is lost; the next start replays N's cells from the changelog",
    },
    StepRow {
        step: CommitStep::Write,
        does: "one write brings the store to N: cells of open windows, marks, positions",
        crash_before: "N is committed; the next start replays its cells from the changelog",
    },
    StepRow {
        step: CommitStep::Flush,
        does: "the store is flushed",
        crash_before: "N is committed; what the store had not flushed is gone, and its older position says so: the next start replays from there",
    },
];

/// Committed epochs that may wait for a store write, however small they are.
const UNWRITTEN_EPOCHS_MAX: usize = 1_024;

/// When commits and store writes are due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitPolicy {
    /// Milliseconds between commits; stretched, up to tenfold, so that alignment takes at most a tenth of the time. The
    /// first one of a start comes after its first output, if that is sooner.
    pub interval: i64,
    /// Unwritten committed bytes at which the store is written; half of `flush_records_max` does it too. The later it
    /// is written, the more windows closed meanwhile, and the more cells changed again: neither is written at all.
    pub write_bytes_max: usize,
    /// Bytes committed and not flushed: bounds recovery. A write that leaves half of it unflushed is flushed.
    pub flush_bytes_max: usize,
    /// The same for changelog records.
    pub flush_records_max: usize,
}

impl Default for CommitPolicy {
    fn default() -> Self {
        Self {
            interval: 200,
            write_bytes_max: 16 << 20,
            flush_bytes_max: 32 << 20,
            flush_records_max: 250_000,
        }
    }
}

/// What the coordinator is told.
#[derive(Clone, Debug)]
pub enum Event {
    /// A task produced output in `epoch`.
    Output {
        /// The task's epoch.
        epoch: u64,
        /// The output.
        batches: Vec<OutBatch>,
    },
    /// A source task's snapshot.
    Source(SourceSnapshot),
    /// A keyed task's snapshot.
    Keyed(KeyedSnapshot),
    /// Time has passed: a commit may be due.
    Tick,
    /// A commit is due now, whatever the time.
    Commit,
    /// A task holds more than it should: commit and write to the store now.
    Pressure,
    /// A source task of a run until the end has [finished](super::SourceTask::finished). Told once per task.
    Finished {
        /// The task.
        task: usize,
    },
    /// The run is to stop after one more commit.
    Stop,
    /// The answer to [`Action::End`].
    Ended(Ended),
    /// [`Action::Write`] is done.
    Written {
        /// The batch's epoch.
        epoch: u64,
    },
    /// [`Action::Flush`] is done.
    Flushed,
    /// Write to the store now what may be written.
    WriteNow,
    /// Flush the store now.
    FlushNow,
}

/// What is to be sent into the transaction.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Records.
    Records(Vec<OutRecord>),
    /// Cells: changelog key and value each, with this timestamp.
    Cells(Arc<CellBatch>, i64),
}

impl Payload {
    /// The records, borrowed, in order.
    pub fn records(&self) -> Box<dyn Iterator<Item = RecordParts<'_>> + '_> {
        match self {
            Self::Records(records) => Box::new(records.iter().map(OutRecord::parts)),
            Self::Cells(cells, timestamp) => Box::new(cells.iter().map(|(key, value)| RecordParts {
                timestamp: *timestamp,
                key: Some(key),
                value: Some(value),
                headers: &[],
            })),
        }
    }
}

/// How records reach the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// In the open transaction.
    Transaction,
    /// Beside it: visible at once, and acked before it ends.
    Outside,
}

/// What the coordinator wants done, strictly in order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Call [`super::SourceTask::barrier`] on every source task.
    Barrier {
        /// The epoch that ends.
        epoch: u64,
        /// Whether the run ends with it.
        last: Last,
    },
    /// Send records.
    Send {
        /// Into the open transaction, or beside it.
        via: Via,
        /// The topic.
        topic: TopicId,
        /// The partition.
        partition: u32,
        /// What.
        payload: Payload,
        /// Whether this is output (`None`) or a step of a commit.
        step: Option<CommitStep>,
    },
    /// Put offsets of the job's group into the open transaction.
    Offsets(Vec<OffsetCommit>),
    /// End the transaction; answer with [`Event::Ended`]. Tasks go on meanwhile. Repeated after an unknown outcome.
    End,
    /// Tell every keyed task that the epoch is committed.
    Committed {
        /// The epoch.
        epoch: u64,
    },
    /// Write to the store, then answer with [`Event::Written`].
    Write(StoreBatch),
    /// Flush the store, then answer with [`Event::Flushed`].
    Flush,
    /// Tell every keyed task that the store holds everything up to this epoch.
    Applied {
        /// The epoch.
        epoch: u64,
    },
    /// The epoch was aborted: throw everything away and start again.
    Restart,
    /// The run has ended.
    Done(Summary),
}

impl Action {
    /// The commit step that this action takes.
    pub fn step(&self) -> Option<CommitStep> {
        match self {
            Self::Barrier { .. } => Some(CommitStep::Barrier),
            Self::Send { step, .. } => *step,
            Self::Offsets(_) => Some(CommitStep::Offsets),
            Self::End => Some(CommitStep::End),
            Self::Write(_) => Some(CommitStep::Write),
            Self::Flush => Some(CommitStep::Flush),
            Self::Committed { .. } | Self::Applied { .. } | Self::Restart | Self::Done(_) => None,
        }
    }
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Epochs committed.
    pub epochs: u64,
    /// Ends of the windows that the end of a bounded run closed before their time.
    pub closed_early: BTreeSet<i64>,
    /// Output records committed, late rows and dead letters included.
    pub committed_rows: u64,
}

/// What the coordinator is at, for status lines and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outlook {
    /// The running epoch.
    pub epoch: u64,
    /// `running`, `aligning`, `ending` or `over`.
    pub phase: &'static str,
    /// Output records in the open transaction.
    pub open_rows: u64,
    /// Bytes of output held back.
    pub held_bytes: usize,
    /// Committed bytes that the store does not hold yet.
    pub unwritten_bytes: usize,
    /// Offsets committed so far, by partition.
    pub committed: BTreeMap<u32, i64>,
    /// Joins that the epoch records which is ending, or ended last.
    pub joins: Vec<Join>,
    /// The event-time watermark on which it ended.
    pub reached: i64,
    /// What the run came to so far.
    pub summary: Summary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Waiting for the snapshots of this epoch.
    Aligning(u64, Last),
    /// Waiting for the outcome of this epoch.
    Ending(u64, Last),
    Over,
}

/// A committed epoch that the store does not hold yet, or one that is being committed.
#[derive(Default)]
struct Epoch {
    epoch: u64,
    cells: Vec<Arc<CellBatch>>,
    marks: Option<Marks>,
    offsets: Vec<OffsetCommit>,
    joins: Vec<Join>,
    reached: Option<i64>,
    closed_early: Vec<i64>,
    rows: u64,
}

/// See the head of this file and the [protocol](super).
pub struct Coordinator {
    start: Start,
    policy: CommitPolicy,
    actions: VecDeque<Action>,
    phase: Phase,
    epoch: u64,
    sources: Vec<SourceSnapshot>,
    keyed: Vec<KeyedSnapshot>,
    held: Vec<OutBatch>,
    held_bytes: usize,
    open_rows: u64,
    ending: Option<Epoch>,
    offsets: BTreeMap<u32, Position>,
    floor: i64,
    marks: Marks,
    barrier_at: Option<i64>,
    align_took: i64,
    /// A barrier is asked for by a task short of memory.
    pressed: bool,
    /// The epoch that such a task waits for: it is written as soon as it is committed.
    write_through: Option<u64>,
    stop: bool,
    finished: BTreeSet<usize>,
    unwritten: Vec<Epoch>,
    unwritten_bytes: usize,
    unwritten_records: usize,
    positions: BTreeMap<(u32, bool), Position>,
    writing: bool,
    flushing: bool,
    unflushed: (usize, usize),
    /// No cell of a window that ends below this is in the store.
    oldest_stored: i64,
    joins: Vec<Join>,
    reached: i64,
    done: Option<Summary>,
    summary: Summary,
}

impl Coordinator {
    /// For a run that begins now.
    pub fn new(start: Start, policy: CommitPolicy) -> Self {
        let committed = start.partitions.iter().filter(|p| p.watermark.is_some());
        Self {
            offsets: committed.map(|p| (p.partition, p.position)).collect(),
            floor: start.floor,
            marks: start.marks,
            oldest_stored: if start.stored { MIN } else { i64::MAX },
            policy,
            actions: VecDeque::new(),
            phase: Phase::Running,
            epoch: 1,
            sources: Vec::new(),
            keyed: Vec::new(),
            held: Vec::new(),
            held_bytes: 0,
            open_rows: 0,
            ending: None,
            barrier_at: None,
            align_took: 0,
            pressed: false,
            write_through: None,
            stop: false,
            finished: BTreeSet::new(),
            unwritten: Vec::new(),
            unwritten_bytes: 0,
            unwritten_records: 0,
            positions: BTreeMap::new(),
            writing: false,
            flushing: false,
            unflushed: (0, 0),
            joins: Vec::new(),
            reached: MIN,
            done: None,
            summary: Summary::default(),
            start,
        }
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// What it is at.
    pub fn outlook(&self) -> Outlook {
        Outlook {
            epoch: self.epoch,
            phase: match self.phase {
                Phase::Running => "running",
                Phase::Aligning(..) => "aligning",
                Phase::Ending(..) => "ending",
                Phase::Over => "over",
            },
            open_rows: self.open_rows,
            held_bytes: self.held_bytes,
            unwritten_bytes: self.unwritten_bytes,
            committed: self.offsets.iter().map(|(p, at)| (*p, at.offset)).collect(),
            joins: self.joins.clone(),
            reached: self.reached,
            summary: self.summary.clone(),
        }
    }

    /// Whether it waits for snapshots.
    pub(crate) fn is_aligning(&self) -> bool {
        matches!(self.phase, Phase::Aligning(..))
    }

    /// Bytes of output held back; a runner that sees this grow beyond its limit lets tasks wait.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Takes an event. `now` is wall time in milliseconds.
    ///
    /// # Errors
    ///
    /// If the engine broke its own rules.
    ///
    /// # Panics
    ///
    /// If the event answers no action.
    pub fn handle(&mut self, event: Event, now: i64) -> Result<(), StepError> {
        match event {
            Event::Output { epoch, batches } => self.output(epoch, batches),
            Event::Source(snapshot) => {
                self.sources.push(snapshot);
                self.aligned(now)?;
            }
            Event::Keyed(snapshot) => {
                self.keyed.push(snapshot);
                self.aligned(now)?;
            }
            Event::Tick => self.tick(now),
            Event::Commit => self.barrier(now),
            Event::Pressure => {
                self.pressed = true;
                self.write();
                // What weighs on the overlay is of the epoch that runs, or of the next where a barrier is on its way.
                self.write_through = Some(self.epoch + u64::from(self.is_aligning()));
                self.tick(now);
            }
            Event::Finished { task } => {
                self.finished.insert(task);
                self.tick(now);
            }
            Event::Stop => {
                self.stop = true;
                self.barrier(now);
            }
            Event::Ended(outcome) => self.ended(outcome, now),
            Event::Written { epoch } => {
                self.writing = false;
                self.actions.push_back(Action::Applied { epoch });
                self.write_if_pressed();
                self.flush_if_due();
                self.finish();
            }
            Event::Flushed => {
                self.flushing = false;
                self.finish();
            }
            Event::WriteNow => self.write(),
            Event::FlushNow => self.flush(),
        }
        Ok(())
    }

    fn output(&mut self, epoch: u64, batches: Vec<OutBatch>) {
        assert!(epoch <= self.epoch + 1, "output of epoch {epoch} while {} runs", self.epoch);
        // The epoch whose transaction is open, or will be once the one that ends has ended.
        let open = match self.phase {
            Phase::Aligning(open, _) => epoch == open,
            Phase::Running => true,
            Phase::Ending(..) | Phase::Over => false,
        };
        if open {
            self.send_output(batches);
        } else if fault::active(Fault::OutputNotHeld) {
            let before = std::mem::take(&mut self.actions);
            self.send_output(batches);
            self.actions.extend(before);
        } else {
            self.held_bytes += batches.iter().map(OutBatch::bytes).sum::<usize>();
            self.held.extend(batches);
        }
    }

    fn send_output(&mut self, batches: Vec<OutBatch>) {
        let outside = self.start.plan.guarantee() == Guarantee::AtLeastOnce;
        let via = if outside { Via::Outside } else { Via::Transaction };
        for OutBatch { sink, partition, records } in batches {
            self.open_rows += records.len() as u64;
            let topic = self.start.sinks[sink.index()].id.clone();
            self.actions.push_back(Action::Send {
                via,
                topic,
                partition,
                payload: Payload::Records(records),
                step: None,
            });
        }
    }

    fn last(&self) -> Last {
        if self.start.mode == Mode::UntilEnd && self.finished.len() == self.start.layout.sources {
            Last::End
        } else if self.stop {
            Last::Stop
        } else {
            Last::No
        }
    }

    fn tick(&mut self, now: i64) {
        let since = now.abs_diff(*self.barrier_at.get_or_insert(now));
        // Ten times the alignment: so that tasks wait at barriers for at most a tenth of the time. Not more than ten
        // intervals: under load most of an alignment is a barrier's way through full queues, in which nobody waits.
        let stretched = self.align_took.saturating_mul(10).min(self.policy.interval.saturating_mul(10));
        let interval = self.policy.interval.max(stretched);
        // Before the first commit of a start its first output is a reason for one. Who reads that has waited for the whole
        // recovery, and the input that piled up meanwhile is only beginning to fill the queues that the barrier has to pass.
        let first = self.summary.epochs == 0 && self.open_rows > 0;
        if first || self.pressed || self.last() != Last::No || since >= interval.unsigned_abs() {
            self.barrier(now);
        }
        if self.write_is_due() {
            self.write();
        }
    }

    fn write_is_due(&self) -> bool {
        self.unwritten_bytes >= self.policy.write_bytes_max
            || self.unwritten_records >= self.policy.flush_records_max / 2
            || self.unwritten.len() >= UNWRITTEN_EPOCHS_MAX
    }

    fn barrier(&mut self, now: i64) {
        if self.phase != Phase::Running {
            return;
        }
        let last = self.last();
        self.pressed = false;
        self.barrier_at = Some(now);
        self.phase = Phase::Aligning(self.epoch, last);
        self.actions.push_back(Action::Barrier { epoch: self.epoch, last });
    }

    /// All snapshots are in: the epoch is put together and ended.
    fn aligned(&mut self, now: i64) -> Result<(), StepError> {
        let layout = self.start.layout;
        let Phase::Aligning(epoch, last) = self.phase else { unreachable!("a snapshot without a barrier") };
        if self.sources.len() < layout.sources || self.keyed.len() < layout.keyed {
            return Ok(());
        }
        self.align_took = now.saturating_sub(self.barrier_at.unwrap_or(now)).max(0);
        let (sources, keyed) = (std::mem::take(&mut self.sources), std::mem::take(&mut self.keyed));
        if let Some(other) = keyed.iter().find(|s| s.reached != keyed[0].reached || s.epoch != epoch) {
            return Err(StepError::Unaligned {
                epoch,
                first: keyed[0].reached,
                task: other.task,
                second: other.reached,
            });
        }
        let ending = self.put_together(epoch, sources, keyed);
        self.joins.clone_from(&ending.joins);
        self.reached = ending.reached.unwrap_or(MIN);
        self.epoch += 1;
        let offsets_moved =
            ending.offsets.iter().any(|o| self.offsets.get(&o.partition) != Some(&o.position));
        let changed = offsets_moved || !ending.cells.is_empty() || ending.marks.is_some() || ending.rows > 0;
        if !changed && last != Last::End {
            self.phase = Phase::Running;
            self.ended_empty(last);
            return Ok(());
        }
        self.phase = Phase::Ending(epoch, last);
        self.send_commit(ending, now);
        Ok(())
    }

    fn put_together(&mut self, epoch: u64, sources: Vec<SourceSnapshot>, keyed: Vec<KeyedSnapshot>) -> Epoch {
        let floor = sources.iter().map(|s| s.floor).fold(self.floor, i64::max);
        let mut ending = Epoch { epoch, rows: std::mem::take(&mut self.open_rows), ..Epoch::default() };
        let topic = &self.start.input.id;
        for snapshot in sources {
            ending.joins.extend(snapshot.joins);
            ending.offsets.extend(snapshot.partitions.into_iter().map(|p| OffsetCommit {
                topic: topic.clone(),
                partition: p.partition,
                position: p.position,
                metadata: PartitionMark { watermark: p.watermark, floor }.encode(),
            }));
        }
        ending.offsets.sort_by_key(|o| o.partition);
        ending.reached = keyed.first().map(|k| k.reached);
        let mut marks = self.marks;
        for snapshot in &keyed {
            marks.raise(snapshot.marks);
        }
        if fault::active(Fault::ClosedPerTask) {
            let least = keyed.iter().map(|k| k.marks.closed).min().unwrap_or(MIN);
            let fired = keyed.iter().map(|k| k.marks.fired).min().unwrap_or(MIN);
            marks = self.marks;
            marks.raise(Marks { fired, closed: least });
        }
        ending.marks = (marks != self.marks).then_some(marks);
        for snapshot in keyed {
            ending.cells.extend(snapshot.cells);
            ending.closed_early.extend(snapshot.closed_early);
        }
        ending
    }

    fn send_commit(&mut self, ending: Epoch, now: i64) {
        let (via, step) = (Via::Transaction, Some(CommitStep::State));
        if let Some(changelogs) = &self.start.changelogs {
            for cells in &ending.cells {
                self.actions.push_back(Action::Send {
                    via,
                    topic: changelogs.windows.clone(),
                    partition: u32::from(cells.shard.0),
                    payload: Payload::Cells(Arc::clone(cells), now),
                    step,
                });
            }
            if let Some((marks, spec)) = ending.marks.zip(self.start.plan.step()) {
                let record = OutRecord {
                    timestamp: now,
                    key: Some(mark_changelog_key(spec.store).to_vec().into()),
                    value: Some(marks.encode().to_vec().into()),
                    headers: Vec::new(),
                };
                for shard in 0..self.start.layout.shards {
                    self.actions.push_back(Action::Send {
                        via,
                        topic: changelogs.keyed.clone(),
                        partition: u32::from(shard),
                        payload: Payload::Records(vec![record.clone()]),
                        step,
                    });
                }
            }
        }
        if let Some((topic, record)) = &self.start.job_record {
            let payload = Payload::Records(vec![OutRecord { timestamp: now, ..record.clone() }]);
            self.actions.push_back(Action::Send { via, topic: topic.clone(), partition: 0, payload, step });
        }
        if fault::active(Fault::StoreBeforeCommit) {
            let cells = ending.cells.clone();
            self.actions.push_back(Action::Write(StoreBatch { cells, ..StoreBatch::default() }));
        }
        self.actions.push_back(Action::Offsets(ending.offsets.clone()));
        self.actions.push_back(Action::End);
        self.ending = Some(ending);
    }

    fn release(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.held_bytes = 0;
        self.send_output(held);
    }

    fn ended_empty(&mut self, last: Last) {
        if last == Last::No {
            self.release();
        } else {
            self.over();
        }
    }

    fn ended(&mut self, outcome: Ended, now: i64) {
        let Phase::Ending(epoch, last) = self.phase else { unreachable!("an outcome without an end") };
        let positions = match outcome {
            Ended::Committed(positions) => positions,
            Ended::Unknown if fault::active(Fault::UnknownIsCommitted) => Vec::new(),
            Ended::Unknown => {
                self.actions.push_back(Action::End);
                return;
            }
            Ended::Aborted => {
                // What is committed and not applied is applied; then everything else dies.
                self.write();
                self.actions.push_back(Action::Restart);
                self.phase = Phase::Over;
                return;
            }
        };
        let ending = self.ending.take().expect("an epoch is ending");
        for offset in &ending.offsets {
            self.offsets.insert(offset.partition, offset.position);
            let mark = PartitionMark::decode(&offset.metadata).map_or(MIN, |m| m.floor);
            self.floor = self.floor.max(mark);
        }
        self.marks = ending.marks.unwrap_or(self.marks);
        self.start.job_record = None;
        self.summary.epochs += 1;
        self.summary.committed_rows += ending.rows;
        self.summary.closed_early.extend(&ending.closed_early);
        self.note_positions(positions);
        // Without a keyed step there is no store.
        if self.start.changelogs.is_some() {
            self.unwritten_bytes += ending.cells.iter().map(|c| c.bytes()).sum::<usize>();
            self.unwritten_records += self.records_of(&ending);
            self.unwritten.push(Epoch { offsets: Vec::new(), joins: Vec::new(), ..ending });
        }
        self.actions.push_back(Action::Committed { epoch });
        self.phase = Phase::Running;
        if last == Last::No {
            self.release();
            self.write_if_pressed();
            self.tick(now);
        } else {
            self.over();
        }
    }

    /// Changelog records of an epoch: what a start would replay.
    fn records_of(&self, epoch: &Epoch) -> usize {
        let marks = epoch.marks.map_or(0, |_| usize::from(self.start.layout.shards));
        epoch.cells.iter().map(|c| c.len()).sum::<usize>() + marks
    }

    fn note_positions(&mut self, positions: Vec<(TopicId, u32, Position)>) {
        let Some(changelogs) = &self.start.changelogs else { return };
        for (topic, partition, position) in positions {
            if topic.uuid == changelogs.keyed.uuid {
                self.positions.insert((partition, true), position);
            } else if topic.uuid == changelogs.windows.uuid {
                self.positions.insert((partition, false), position);
            }
        }
    }

    /// The run ends: the store is brought up to date, then it is done.
    fn over(&mut self) {
        self.phase = Phase::Over;
        self.done = Some(self.summary.clone());
        self.finish();
    }

    fn finish(&mut self) {
        if self.done.is_none() || self.writing || self.flushing {
            return;
        }
        if self.unwritten.is_empty() && self.unflushed == (0, 0) {
            self.actions.extend(self.done.take().map(Action::Done));
        } else if self.unwritten.is_empty() {
            self.flush();
        } else {
            self.write();
        }
    }

    /// Writes what is committed and unwritten, unless a write is under way.
    fn write(&mut self) {
        let Some(changelogs) = &self.start.changelogs else { return };
        if self.writing || self.unwritten.is_empty() {
            return;
        }
        let store = self.start.plan.step().map_or(StoreId(1), |s| s.store);
        let shards = (0..self.start.layout.shards).map(Shard);
        let mut batch = StoreBatch { closed: vec![(store, self.marks.closed)], ..StoreBatch::default() };
        // Only what commits covered by this write have closed: the running epoch's closings may still die.
        for epoch in self.unwritten.drain(..) {
            batch.epoch = epoch.epoch;
            self.unflushed.0 += epoch.cells.iter().map(|c| c.bytes()).sum::<usize>();
            if epoch.marks.is_some() {
                batch.marks = shards.clone().map(|s| (store, s, self.marks)).collect();
            }
            batch.cells.extend(epoch.cells);
        }
        self.unflushed.1 += std::mem::take(&mut self.unwritten_records);
        self.unwritten_bytes = 0;
        if self.oldest_stored <= self.marks.closed {
            batch.purge = shards.map(|s| (store, s)).collect();
            self.oldest_stored = self.marks.closed + 1;
        }
        let oldest = batch.cells.iter().filter_map(|c| c.oldest_window());
        self.oldest_stored = oldest.filter(|end| *end > self.marks.closed).fold(self.oldest_stored, i64::min);
        for ((partition, keyed), position) in std::mem::take(&mut self.positions) {
            let topic = if keyed { changelogs.keyed.uuid } else { changelogs.windows.uuid };
            batch.positions.push(ShardPosition { shard: Shard(partition as u16), topic, position });
        }
        self.write_through = self.write_through.filter(|through| batch.epoch < *through);
        self.writing = true;
        self.actions.push_back(Action::Write(batch));
    }

    /// Writes what is committed while a task is short of memory; it reads nothing until its epoch is written. An earlier
    /// epoch does not wait for that one, which may be empty and then is never committed.
    fn write_if_pressed(&mut self) {
        if self.write_through.is_some() {
            self.write();
        }
    }

    fn flush_if_due(&mut self) {
        // As much again may be unwritten when the next flush is due.
        if self.unflushed.0 >= self.policy.flush_bytes_max / 2
            || self.unflushed.1 >= self.policy.flush_records_max / 2
        {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if !self.flushing {
            self.flushing = true;
            self.unflushed = (0, 0);
            self.actions.push_back(Action::Flush);
        }
    }
}

#[cfg(test)]
mod tests;
