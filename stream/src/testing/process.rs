//! One process of a job, step by step: the engine's machines, their queues, and the coordinator's actions.
//!
//! The threads runtime runs the same machines on threads; here every step is a call, so that whoever drives it decides
//! the order: the [`super::TestDriver`] goes round, the random test draws.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::memory_log::MemoryLog;
use crate::engine::poison::Triage;
use crate::engine::recovery::{self, Setup, Started};
use crate::engine::{
    Action, CommitPolicy, CommitStep, Coordinator, Counters, Event, KeyedTask, Last, Message, Place,
    SourceTask, Start, Summary, TaskOutput, Via,
};
use crate::error::{StartError, StepError};
use crate::guarantee::Guarantee;
use crate::io::{End, Ended, Log, LogError, Position, Transactions};
use crate::state::{MemoryState, StateBackend, StoreBatch};

/// What went wrong in a process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A task could not go on.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The log failed.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Where a process stands after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Lives,
    /// Its epoch was aborted: it is to be thrown away and started again.
    Restart,
    Done(Summary),
}

pub(crate) struct Process {
    pub(crate) start: Start,
    pub(crate) place: Arc<Place>,
    pub(crate) sources: Vec<SourceTask>,
    pub(crate) keyed: Vec<KeyedTask>,
    pub(crate) coordinator: Coordinator,
    log: MemoryLog,
    state: Arc<MemoryState>,
    transactions: Box<dyn Transactions>,
    source_out: Vec<TaskOutput>,
    keyed_out: Vec<TaskOutput>,
    /// By sender and receiver.
    channels: Vec<VecDeque<Message>>,
    /// The barrier that a source task has not sent yet.
    due: Vec<Option<Last>>,
    finished: Vec<bool>,
    /// At most once: the offset up to which the last barrier had fetched each partition.
    fetched: BTreeMap<u32, i64>,
    next: Option<Action>,
    /// The outcome that the coordinator has not been told.
    outcome: Option<Ended>,
    now: i64,
}

impl Process {
    pub(crate) fn start(
        setup: &Setup,
        policy: CommitPolicy,
        log: &MemoryLog,
        state: &Arc<MemoryState>,
        now: i64,
        triage: &mut Triage,
    ) -> Result<Self, ProcessError> {
        let Started { mut start, transactions } = recovery::start(setup, log, &**state)?;
        start.care = triage.begin(&start);
        let start = start;
        let place = start.place();
        let layout = start.layout;
        let backend = || Arc::clone(state) as Arc<dyn StateBackend>;
        let keyed =
            (0..layout.keyed).map(|i| KeyedTask::new(&start, i, backend())).collect::<Result<_, _>>()?;
        Ok(Self {
            sources: (0..layout.sources).map(|i| SourceTask::new(&start, i, Arc::clone(&place))).collect(),
            keyed,
            coordinator: Coordinator::new(start.clone(), policy),
            place,
            log: log.clone(),
            state: Arc::clone(state),
            transactions,
            source_out: (0..layout.sources).map(|_| TaskOutput::default()).collect(),
            keyed_out: (0..layout.keyed).map(|_| TaskOutput::default()).collect(),
            channels: (0..layout.sources * layout.keyed).map(|_| VecDeque::new()).collect(),
            due: vec![None; layout.sources],
            finished: vec![false; layout.sources],
            fetched: BTreeMap::new(),
            next: None,
            outcome: None,
            now,
            start,
        })
    }

    pub(crate) fn set_now(&mut self, now: i64) {
        self.now = now;
    }

    pub(crate) fn event(&mut self, event: Event) -> Result<(), ProcessError> {
        Ok(self.coordinator.handle(event, self.now)?)
    }

    fn after_source(&mut self, source: usize) -> Result<(), ProcessError> {
        let out = &mut self.source_out[source];
        for (receiver, message) in out.messages() {
            self.channels[source * self.start.layout.keyed + receiver].push_back(message);
        }
        for event in out.events() {
            self.coordinator.handle(event, self.now)?;
        }
        if self.sources[source].finished() && !std::mem::replace(&mut self.finished[source], true) {
            self.coordinator.handle(Event::Finished { task: source }, self.now)?;
        }
        Ok(())
    }

    fn after_keyed(&mut self, keyed: usize) -> Result<(), ProcessError> {
        for event in self.keyed_out[keyed].events() {
            self.coordinator.handle(event, self.now)?;
        }
        Ok(())
    }

    pub(crate) fn source_of(&self, partition: u32) -> usize {
        partition as usize % self.sources.len()
    }

    /// Tells the coordinator of source tasks that have nothing to read from the beginning.
    pub(crate) fn begin(&mut self) -> Result<(), ProcessError> {
        (0..self.sources.len()).try_for_each(|i| self.after_source(i))
    }

    /// Reads up to `records_max` records of a partition. Says whether there were any.
    pub(crate) fn read(&mut self, partition: u32, records_max: usize) -> Result<bool, ProcessError> {
        let source = self.source_of(partition);
        let Some((_, at, true)) = self.sources[source].partitions().find(|p| p.0 == partition) else {
            return Ok(false);
        };
        // Every record is at least one byte: this many bytes are never too few records.
        let mut fetched = self.log.read(&self.start.input.id, partition, at, usize::MAX)?;
        let limit = self.readable(partition);
        fetched.batches.iter_mut().for_each(|batch| batch.cut(0, limit));
        fetched.next.offset = fetched.next.offset.min(limit).max(at.offset);
        let mut left = records_max;
        let mut last = None;
        for batch in &mut fetched.batches {
            if batch.len() > left {
                batch.cut(0, batch.offset(left));
            }
            left -= batch.len();
            last = (!batch.is_empty()).then(|| batch.offset(batch.len() - 1)).or(last);
        }
        if left == 0
            && let Some(last) = last
        {
            fetched.next = Position { offset: last + 1, ..fetched.next };
        }
        if fetched.next.offset == at.offset {
            return Ok(false);
        }
        self.sources[source].fetched(fetched, &mut self.source_out[source])?;
        self.after_source(source)?;
        Ok(true)
    }

    /// At most once is run with the most to lose: a record is processed only after a barrier had it fetched, so that its
    /// offset is committed by the epoch before the one it belongs to.
    fn readable(&self, partition: u32) -> i64 {
        match self.start.plan.guarantee() {
            Guarantee::AtMostOnce => self.fetched.get(&partition).copied().unwrap_or(0),
            Guarantee::ExactlyOnce | Guarantee::AtLeastOnce => i64::MAX,
        }
    }

    fn fetch_ahead(&mut self, source: usize) -> Result<(), ProcessError> {
        let partitions: Vec<_> = self.sources[source].partitions().map(|(p, _, _)| p).collect();
        for partition in partitions {
            let end = self.log.ends(&self.start.input.id, partition)?.end;
            self.sources[source].fetched_ahead(partition, end);
            self.fetched.insert(partition, end.offset);
        }
        Ok(())
    }

    /// Whether a partition has records that no task has processed yet.
    pub(crate) fn is_behind(&self) -> Result<bool, ProcessError> {
        for partition in self.sources.iter().flat_map(SourceTask::partitions).map(|(p, _, _)| p) {
            if self.has_input(partition)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether this partition has records that its task has not processed yet.
    pub(crate) fn has_input(&self, partition: u32) -> Result<bool, ProcessError> {
        let mut parts = self.sources[self.source_of(partition)].partitions();
        let Some((_, at, true)) = parts.find(|p| p.0 == partition) else { return Ok(false) };
        Ok(at.offset < self.log.ends(&self.start.input.id, partition)?.end.offset)
    }

    /// Whether a channel of the partition's task holds this many messages.
    pub(crate) fn is_full(&self, partition: u32, messages: usize) -> bool {
        let (source, keyed) = (self.source_of(partition), self.start.layout.keyed);
        self.channels[source * keyed..][..keyed].iter().any(|channel| channel.len() >= messages)
    }

    pub(crate) fn nothing(&mut self, partition: u32, caught_up: bool, now: i64) {
        let source = self.source_of(partition);
        if self.sources[source].partitions().any(|p| p.0 == partition) {
            self.sources[source].nothing(partition, caught_up, now);
        }
    }

    pub(crate) fn publish(&mut self, source: usize) -> Result<(), ProcessError> {
        self.sources[source].publish(&mut self.source_out[source])?;
        self.after_source(source)
    }

    /// Sends a source task's barrier if one is due.
    pub(crate) fn barrier(&mut self, source: usize) -> Result<bool, ProcessError> {
        let Some(last) = self.due[source].take() else { return Ok(false) };
        self.fetch_ahead(source)?;
        self.sources[source].barrier(last, &mut self.source_out[source])?;
        self.after_source(source)?;
        Ok(true)
    }

    /// Delivers the next message of a channel, starting to look at `from`.
    pub(crate) fn deliver(&mut self, from: usize) -> Result<bool, ProcessError> {
        let (n, keyed) = (self.channels.len(), self.start.layout.keyed);
        for channel in (from..n).chain(0..from.min(n)) {
            let (sender, receiver) = (channel / keyed, channel % keyed);
            if self.keyed[receiver].is_blocked(sender) {
                continue;
            }
            if let Some(message) = self.channels[channel].pop_front() {
                self.keyed[receiver].receive(sender, message, &mut self.keyed_out[receiver])?;
                self.after_keyed(receiver)?;
                if self.keyed[receiver].pressed() {
                    self.event(Event::Pressure)?;
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(crate) fn channels(&self) -> usize {
        self.channels.len()
    }

    /// The step that [`Self::act`] would take next.
    pub(crate) fn next_step(&mut self) -> Option<CommitStep> {
        if self.outcome.is_some() {
            return Some(CommitStep::Outcome);
        }
        self.next = self.next.take().or_else(|| self.coordinator.next_action());
        self.next.as_ref().and_then(Action::step)
    }

    /// What [`Self::act`] would do next, in words.
    pub(crate) fn describe_next(&mut self) -> String {
        let step = self.next_step();
        match (&self.outcome, &self.next) {
            (Some(outcome), _) => format!("outcome {outcome:?}"),
            (None, Some(Action::Write(batch))) => {
                let mut ops = Vec::new();
                batch.for_each(|op| ops.push(format!("{op:02x?}")));
                format!("write {}", ops.join(" "))
            }
            (None, Some(action)) => format!("{step:?} {action:?}"),
            (None, None) => String::new(),
        }
    }

    /// Tells the outcome of an end, or carries out the coordinator's next action. `None` if there is nothing to do.
    pub(crate) fn act(&mut self) -> Result<Option<Fate>, ProcessError> {
        if let Some(outcome) = self.outcome.take() {
            self.event(Event::Ended(outcome))?;
            return Ok(Some(Fate::Lives));
        }
        let Some(action) = self.next.take().or_else(|| self.coordinator.next_action()) else {
            return Ok(None);
        };
        match action {
            Action::Barrier { last, .. } => self.due.fill(Some(last)),
            Action::Send { via, topic, partition, payload, .. } => {
                let records = &mut payload.records();
                match via {
                    Via::Transaction => self.transactions.send(&topic, partition, records)?,
                    Via::Outside => self.transactions.send_outside(&topic, partition, records)?,
                }
            }
            Action::Offsets(offsets) => self.transactions.offsets(&self.start.group, &offsets)?,
            Action::End => self.outcome = Some(self.transactions.end(End::Commit)?),
            Action::Committed { epoch } => self.keyed.iter_mut().for_each(|k| k.committed(epoch)),
            Action::Write(batch) => {
                let epoch = batch.epoch;
                self.state.write(&self.as_broken(batch)).map_err(StepError::from)?;
                self.event(Event::Written { epoch })?;
            }
            Action::Flush => {
                self.state.flush().map_err(StepError::from)?;
                self.event(Event::Flushed)?;
            }
            Action::Applied { epoch } => {
                for (task, out) in self.keyed.iter_mut().zip(&mut self.keyed_out) {
                    task.applied(epoch, out);
                }
            }
            Action::Restart => return Ok(Some(Fate::Restart)),
            Action::Done(summary) => return Ok(Some(Fate::Done(summary))),
        }
        Ok(Some(Fate::Lives))
    }

    #[cfg(not(feature = "faults"))]
    #[allow(clippy::unused_self, reason = "with faults it looks into the tasks")]
    fn as_broken(&self, batch: StoreBatch) -> StoreBatch {
        batch
    }

    /// What a store write holds with a fault that looks into the running epoch.
    #[cfg(feature = "faults")]
    fn as_broken(&self, mut batch: StoreBatch) -> StoreBatch {
        use crate::fault::{Fault, active};
        use crate::state::{CellBatchBuilder, window_and_key};
        if active(Fault::BatchSkipsOpenEpoch) {
            for (_, closed) in &mut batch.closed {
                *closed = self.keyed.iter().map(KeyedTask::closed).fold(*closed, i64::max);
            }
        }
        if active(Fault::BatchFromOverlay) {
            for cells in &mut batch.cells {
                let mut builder = CellBatchBuilder::default();
                for (key, value) in cells.iter() {
                    let (end, key) = window_and_key(key).expect("a cell's key");
                    let seen = self.keyed.iter().find_map(|t| t.peek(end, key));
                    builder.push(end, key, |to| to.extend_from_slice(seen.as_deref().unwrap_or(value)));
                }
                let (store, shard) = (cells.store, cells.shard);
                *cells = builder.finish(store, shard).map(Arc::new).expect("as many cells as before");
            }
        }
        batch
    }

    /// Drops what may be dropped from a keyed task's overlay.
    pub(crate) fn evict(&mut self, keyed: usize) {
        self.keyed[keyed].evict(&mut self.keyed_out[keyed]);
    }

    /// A partition was added to the input.
    pub(crate) fn assign(&mut self, partition: u32) {
        let source = self.source_of(partition);
        self.sources[source].assign(partition, Position::default());
    }

    pub(crate) fn counters(&self) -> Counters {
        let mut all = Counters::default();
        self.source_out.iter().chain(&self.keyed_out).for_each(|out| all.add(&out.counters()));
        all
    }
}
