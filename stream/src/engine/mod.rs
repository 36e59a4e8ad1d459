//! The engine's machines: no threads, no clock, no randomness, no input or output inside.
//!
//! ```text
//!                       Fetched                    Message (rows, time, barrier)
//!   [Input] ───────────────▶ SourceTask × n ═══════════════════════════════▶ KeyedTask × m
//!                              │    ▲ Place                                     │     ▲
//!            outputs, snapshot ▼    │ Barrier          outputs, KeyedSnapshot   ▼     │ Committed, Applied
//!                            ┌──────┴──────────── Coordinator ──────────────────┴─────┴──┐
//!                            └── Action: send, add offsets, end, write to the store … ───┘
//! ```
//!
//! Whoever runs them (the threads runtime, the test driver) keeps this protocol:
//!
//! 1. [`recovery::start`] fences older processes, restores the store and answers with a [`Start`]. From it come one
//!    [`Place`], the [`SourceTask`]s (partition p belongs to task p modulo n), the [`KeyedTask`]s and the
//!    [`Coordinator`]. All of them exist before any of them works.
//! 2. A source task is given what was fetched ([`SourceTask::fetched`]), or that a fetch waited in vain
//!    ([`SourceTask::nothing`]); then, once per batch or so, [`SourceTask::publish`]. A keyed task is given messages in
//!    the order in which each sender sent them ([`KeyedTask::receive`]), but none of a sender that
//!    [is blocked](KeyedTask::is_blocked): it has sent its barrier and others have not.
//!    Before a barrier a runner that has fetched more than it gave says so ([`SourceTask::fetched_ahead`]).
//! 3. After every call the runner takes what the task produced ([`TaskOutput`]): messages to queue, output to
//!    hand to the coordinator ([`Event::Output`]), possibly a snapshot ([`Event::Source`], [`Event::Keyed`]). Output goes
//!    to the coordinator before the snapshot of the same call.
//! 4. The coordinator answers with [`Action`]s, to be carried out strictly in order; those that ask for an answer get it
//!    as an event. While [`Action::End`] is under way tasks go on with the next epoch.
//! 5. After [`Action::Restart`], or if an action fails because the log is not reachable, or if the job's code panicked and
//!    [`poison::Triage`] gives it another try, everything made from the `Start` is thrown away, and 1. follows. After [`Action::Done`] the job has ended.

pub(crate) mod coordinator;
pub(crate) mod keyed;
mod place;
pub mod poison;
pub mod recovery;
pub(crate) mod source;
pub(crate) mod window;

use std::any::Any;
use std::sync::Arc;

use crate::chain::{Emit, TaskEnv};
use crate::io::{Position, TopicId, TopicInfo};
use crate::key::Shard;
use crate::plan::{Plan, SinkId};
use crate::record::OutRecord;
use crate::state::{CellBatch, Marks};

pub use crate::chain::Counters;
pub use coordinator::{
    Action, COMMIT_STEPS, CommitPolicy, CommitStep, Coordinator, Event, Outlook, Payload, Summary, Via,
};
pub use keyed::KeyedTask;
pub use place::Place;
pub use source::{Last, SourceTask};

/// How many tasks a run has, and how much they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Source tasks.
    pub sources: usize,
    /// Tasks of the keyed step; 0 where the plan has none.
    pub keyed: usize,
    /// Shards: fixed when the job first runs.
    pub shards: u16,
    /// Groups a source task combines before it sends them; 0: rows are sent one by one.
    pub combine_groups_max: usize,
    /// Memory of the overlay of each keyed task.
    pub overlay_bytes_max: usize,
}

impl Layout {
    /// Shards of a new job.
    pub const SHARDS: u16 = 64;

    /// For this many tasks of each kind, sharing `state_bytes_max` of memory.
    pub fn new(plan: &Plan, tasks: usize, state_bytes_max: usize) -> Self {
        let tasks = tasks.max(1);
        Self {
            sources: tasks,
            keyed: if plan.step().is_some() { tasks } else { 0 },
            shards: Self::SHARDS,
            // With a key, a window end, a hash and a count some 50 bytes each: 6 MB, which a shared L3 holds. Sized for
            // L2 it held too few of the addresses of a window to halve the rows, and was switched off.
            combine_groups_max: 131_072,
            overlay_bytes_max: state_bytes_max / tasks,
        }
    }
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It goes on until it is stopped.
    Unbounded,
    /// It reads to the stable offsets found at its start, closes every window and ends. Ignores idleness.
    UntilEnd,
}

/// A partition as a run starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartPartition {
    /// Its number.
    pub partition: u32,
    /// Where to read.
    pub position: Position,
    /// Its committed event-time watermark; `None` if nothing was committed for it.
    pub watermark: Option<i64>,
    /// In a run until the end: where it ends.
    pub end: Option<i64>,
}

/// What a run starts from: the result of [`recovery::start`].
#[derive(Clone, Debug)]
pub struct Start {
    /// The plan.
    pub plan: Plan,
    /// Tasks and limits.
    pub layout: Layout,
    /// How it ends.
    pub mode: Mode,
    /// The group: where offsets are committed.
    pub group: String,
    /// The input topic.
    pub input: TopicInfo,
    /// Its partitions.
    pub partitions: Vec<StartPartition>,
    /// The committed floor.
    pub floor: i64,
    /// The committed marks of the keyed step's store.
    pub marks: Marks,
    /// The sinks' topics, by [`SinkId::index`].
    pub sinks: Vec<TopicInfo>,
    /// The keyed changelog and the window store's own, where the plan has a keyed step.
    pub changelogs: Option<Changelogs>,
    /// The record to write into `_jobs` with the first commit, if it is not there just so.
    pub job_record: Option<(TopicId, OutRecord)>,
    /// Changelog records replayed into the store.
    pub replayed: u64,
    /// Shards rebuilt because their position did not hold.
    pub rebuilt: u32,
    /// What made the job panic before, and is run with care.
    pub care: poison::Care,
    /// Whether the store may hold cells of windows.
    pub(crate) stored: bool,
}

/// The changelog topics of a keyed step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changelogs {
    /// Marks (and keyed state).
    pub keyed: TopicId,
    /// Cells of the window store.
    pub windows: TopicId,
}

impl Start {
    /// The one place of the partitions that take part.
    pub fn place(&self) -> Arc<Place> {
        Arc::new(Place::new(self))
    }

    pub(crate) fn env(&self) -> TaskEnv {
        let closed = if crate::fault::active(crate::fault::Fault::ClosedNotRestored) {
            crate::time::MIN
        } else {
            self.marks.closed
        };
        TaskEnv {
            closed,
            receivers: self.layout.keyed,
            shards: self.layout.shards,
            combine_groups_max: self.layout.combine_groups_max,
            sink_partitions: self.sinks.iter().map(|t| t.partitions).collect(),
        }
    }
}

/// Records of one sink and partition, on their way into the transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutBatch {
    /// The sink.
    pub sink: SinkId,
    /// The partition.
    pub partition: u32,
    /// The records, in order.
    pub records: Vec<OutRecord>,
}

impl OutBatch {
    /// About the memory it holds.
    pub fn bytes(&self) -> usize {
        self.records.iter().map(OutRecord::bytes).sum()
    }
}

/// What travels from source tasks to keyed tasks.
#[derive(Debug)]
pub enum Message {
    /// Rows or combined groups of the receiver's shards.
    Rows(Groups),
    /// The job value: no row of a window that ends at or before this (plus 1 ms) follows.
    Time(i64),
    /// The epoch's rows end here.
    Barrier(u64),
}

/// Groups of one batch; the type inside is known to sender and receiver.
pub struct Groups {
    pub(crate) groups: Box<dyn Any + Send>,
    pub(crate) len: usize,
    pub(crate) bytes: usize,
}

impl Groups {
    /// Number of groups.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// About the memory they hold, for the bound of a queue.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl std::fmt::Debug for Groups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Groups({})", self.len)
    }
}

/// What one call of a task produced. The runner keeps one per task and takes its parts after every call.
#[derive(Default)]
pub struct TaskOutput {
    pub(crate) emit: Emit,
    /// The epoch to which the output belongs.
    pub(crate) epoch: u64,
    pub(crate) source: Option<SourceSnapshot>,
    pub(crate) keyed: Option<KeyedSnapshot>,
}

impl TaskOutput {
    /// The messages to queue, in order: receiver's index and message.
    pub fn messages(&mut self) -> std::vec::Drain<'_, (usize, Message)> {
        self.emit.messages.drain(..)
    }

    /// What the coordinator is to be told, in order.
    pub fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        let batches = self.emit.take_batches();
        if !batches.is_empty() {
            events.push(Event::Output { epoch: self.epoch, batches });
        }
        events.extend(self.source.take().map(Event::Source));
        events.extend(self.keyed.take().map(Event::Keyed));
        events
    }

    /// What the task has counted so far.
    pub fn counters(&self) -> Counters {
        self.emit.counters
    }
}

/// What a source task hands in at a barrier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSnapshot {
    /// The task.
    pub task: usize,
    /// The epoch that ends.
    pub epoch: u64,
    /// Its partitions.
    pub partitions: Vec<PartitionSnapshot>,
    /// The floor as the task sees it after its last publication.
    pub floor: i64,
    /// Partitions that joined since the last snapshot, in order: decisions the output depends on.
    pub joins: Vec<Join>,
}

/// A partition at a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartitionSnapshot {
    /// Its number.
    pub partition: u32,
    /// The next offset to read; at most once: behind what is already fetched.
    pub position: Position,
    /// Its effective event-time watermark: max(own, floor) if it is idle.
    pub watermark: i64,
}

/// A partition joined at an event-time watermark above its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Join {
    /// The partition.
    pub partition: u32,
    /// Its next offset.
    pub offset: i64,
    /// The value it took.
    pub value: i64,
}

/// What a keyed task hands in at a barrier.
#[derive(Clone, Debug)]
pub struct KeyedSnapshot {
    /// The task.
    pub task: usize,
    /// The epoch that ends.
    pub epoch: u64,
    /// The event-time watermark it has acted on.
    pub reached: i64,
    /// Its marks.
    pub marks: Marks,
    /// The cells that the epoch changed.
    pub cells: Vec<Arc<CellBatch>>,
    /// Ends of the windows that the end of a bounded run closed before their time.
    pub closed_early: Vec<i64>,
}

/// The shards of one of `tasks` keyed tasks.
pub(crate) fn shards_of(task: usize, tasks: usize, shards: u16) -> impl Iterator<Item = Shard> {
    (0..shards).map(Shard).filter(move |s| s.task(tasks) == task)
}
