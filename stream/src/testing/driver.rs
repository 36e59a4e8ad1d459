//! The test driver: a user's job with a virtual clock and no input or output, crashes included.
//!
//! Nothing happens between two calls. [`TestDriver::send`] puts records into the input topic; [`TestDriver::advance`],
//! [`TestDriver::idle`], [`TestDriver::commit`] and [`TestDriver::until_end`] let the job work until it has nothing left
//! to do. What can be read is what was committed.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde::de::DeserializeOwned;

use super::memory_log::{EndFate, MemoryLog, MemoryLogCopy};
use super::process::{Fate, Process, ProcessError};
use crate::codec::state as codec;
use crate::engine::poison::{TRIES, Triage, Verdict};
use crate::engine::recovery::Setup;
use crate::engine::{CommitPolicy, CommitStep, Counters, Event, Layout, Mode, Summary};
use crate::error::Result as PlanResult;
use crate::guarantee::Guarantee;
use crate::io::{Cleanup, Log, NewTopic};
use crate::names::Identity;
use crate::plan::{Job, Plan, Role};
use crate::record::{Header, OutRecord};
use crate::state::{Marks, MemoryState, mark_of_changelog_key, window_and_key};
use crate::time::{Timestamp, millis};

/// A committed record of one of the job's topics.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// Its topic.
    pub topic: String,
    /// Its partition.
    pub partition: u32,
    /// Its time, milliseconds since the epoch.
    pub timestamp: i64,
    /// Its key as text; bytes that are not UTF-8 are replaced.
    pub key: Option<String>,
    /// Its value as text; bytes that are not UTF-8 are replaced.
    pub value: String,
    /// Its headers as text.
    pub headers: Vec<(String, String)>,
}

/// A job's committed results differ between a run that crashed and one that did not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a crash before {step:?}, the {nth}. time, changes {what}: undisturbed {undisturbed:#?}, with the crash {crashed:#?}"
)]
pub struct CrashChanges {
    /// The step before which it crashed.
    pub step: CommitStep,
    /// Which time, from 1.
    pub nth: usize,
    /// Which rows.
    pub what: &'static str,
    /// Rows only of the undisturbed run.
    pub undisturbed: Vec<Row>,
    /// Rows only of the run that crashed.
    pub crashed: Vec<Row>,
}

/// What a test driver's calls fail with.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The job cannot start or go on.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The pipeline is wrong.
    #[error(transparent)]
    Plan(#[from] crate::error::PlanError),
    /// A crash changed the results.
    #[error(transparent)]
    Changes(Box<CrashChanges>),
    /// Nothing is left to do, and the run has not ended.
    #[error("the run does not end: nothing is left to do, and it was never done")]
    Unended,
}

/// Runs a job step by step. See the head of this module.
///
/// ```
/// use std::time::Duration;
/// use tidemill_stream::testing::TestDriver;
/// use tidemill_stream::*;
///
/// struct PerWord;
/// impl Job for PerWord {
///     const NAME: &'static str = "per-word";
///     fn build(&self, flow: &Flow) -> Result<()> {
///         flow.source(topic("words"), Json::<(i64, String)>::new())
///             .skip_malformed()
///             .event_time(|row| row.0, EventTime::out_of_order(Duration::from_millis(2)))
///             .key_by(|row| row.1.clone())
///             .window(Tumbling::of(Duration::from_millis(10)))
///             .count("per-word")
///             .late_to(topic("late"))
///             .map(|w| w.value)
///             .to(topic("counts"), Text);
///         Ok(())
///     }
/// }
///
/// let mut driver = TestDriver::new(&PerWord)?.partitions(1);
/// driver.send(0, r#"[1,"a"]"#).send(0, r#"[3,"a"]"#).send(0, "nonsense").send(0, r#"[11,"b"]"#);
/// driver.commit()?;
/// assert!(driver.outputs().is_empty(), "11 - 2 - 1 is not yet the window's last millisecond");
/// assert_eq!(driver.state::<u64>()[&(Timestamp(10), "a".to_owned())], 2);
///
/// driver.send(0, r#"[13,"b"]"#).send(0, r#"[4,"a"]"#);
/// driver.crash()?;                                       // nothing of the two was committed: they are read again
/// driver.commit()?;
/// let row = &driver.outputs()[0];
/// assert_eq!((row.key.as_deref(), row.value.as_str(), row.timestamp), (Some("a"), "2", 9));
/// assert_eq!(driver.late()[0].value, r#"[4,"a"]"#);
///
/// let summary = driver.until_end()?;
/// assert_eq!(summary.closed_early.len(), 1, "the window of `b` closed before its time");
/// assert_eq!(driver.outputs().len(), 2);
/// # Ok::<(), tidemill_stream::testing::DriveError>(())
/// ```
pub struct TestDriver<J> {
    plan: Plan,
    identity: Identity,
    log: MemoryLog,
    state: Arc<MemoryState>,
    process: Option<Process>,
    partitions: u32,
    tasks: usize,
    mode: Mode,
    state_bytes_max: usize,
    policy: CommitPolicy,
    now: i64,
    rng: Option<SmallRng>,
    /// The step and the number of times it is still to be taken before the crash.
    crash_at: Option<(CommitStep, usize)>,
    taken: BTreeMap<CommitStep, usize>,
    crashes: usize,
    shards: u16,
    /// Records that are appended while the next commit ends.
    meanwhile: Vec<(u32, OutRecord)>,
    copies: (Option<MemoryLogCopy>, Option<MemoryState>),
    starts: (usize, u64, u32),
    triage: Triage,
    panics: usize,
    done: Option<Summary>,
    counters: Counters,
    replayed: u64,
    /// Messages that a channel holds before its source task waits.
    queue: usize,
    waits: u64,
    job: PhantomData<fn() -> J>,
}

impl<J: Job> TestDriver<J> {
    /// For this job: two tasks, two partitions, a clock at 0.
    ///
    /// # Errors
    ///
    /// If the pipeline is wrong.
    pub fn new(job: &J) -> PlanResult<Self> {
        let plan = Plan::of(job)?;
        let never = usize::MAX;
        Ok(Self {
            identity: Identity::new(plan.job())?,
            log: MemoryLog::default(),
            state: Arc::default(),
            process: None,
            partitions: 2,
            tasks: 2,
            mode: Mode::Unbounded,
            state_bytes_max: 1 << 20,
            // Commits come from `commit` and `until_end`; each is written and flushed at once.
            policy: CommitPolicy {
                interval: i64::MAX,
                write_bytes_max: 0,
                flush_bytes_max: 0,
                flush_records_max: never,
            },
            now: 0,
            rng: None,
            crash_at: None,
            taken: BTreeMap::new(),
            crashes: 0,
            shards: Layout::SHARDS,
            meanwhile: Vec::new(),
            copies: (None, None),
            starts: (0, 0, 0),
            triage: Triage::new(&plan, TRIES, Vec::new()),
            panics: 0,
            plan,
            done: None,
            counters: Counters::default(),
            replayed: 0,
            queue: usize::MAX,
            waits: 0,
            job: PhantomData,
        })
    }

    /// Partitions of the input topic. Before anything is sent.
    #[must_use]
    pub fn partitions(self, partitions: u32) -> Self {
        Self { partitions, ..self }
    }

    /// Tasks of each kind. Before anything is sent.
    #[must_use]
    pub fn tasks(self, tasks: usize) -> Self {
        Self { tasks, ..self }
    }

    /// Draws the order in which tasks work and messages arrive. Without it they take turns.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        Self { rng: Some(SmallRng::seed_from_u64(seed)), ..self }
    }

    /// Memory of the overlay of all tasks.
    #[must_use]
    pub fn state_memory(self, bytes: usize) -> Self {
        Self { state_bytes_max: bytes, ..self }
    }

    /// Shards; fewer make a test faster. Before anything is sent.
    #[must_use]
    pub fn shards(self, shards: u16) -> Self {
        Self { shards, ..self }
    }

    /// Messages that a channel between two tasks holds: a source task with a full channel reads nothing, and otherwise one
    /// record at a turn.
    #[must_use]
    pub fn queue(self, messages: usize) -> Self {
        Self { queue: messages.max(1), ..self }
    }

    /// How often a source task with input did not read because a channel was full.
    pub fn waits(&self) -> u64 {
        self.waits
    }

    /// The store is written and flushed by [`Self::write_store`], [`Self::flush_store`] and the end of a run only, as if
    /// it lagged behind the commits.
    #[must_use]
    pub fn lagging_store(mut self) -> Self {
        (self.policy.write_bytes_max, self.policy.flush_bytes_max) = (usize::MAX, usize::MAX);
        self
    }

    /// Another guarantee than the job's own. With [`Guarantee::AtMostOnce`] a record is processed in the epoch after the
    /// one whose commit took its offset, so a crash between the two loses it; [`Self::commit`] ends both.
    #[must_use]
    pub fn guarantee(self, guarantee: Guarantee) -> Self {
        Self { plan: self.plan.with_guarantee(guarantee), ..self }
    }

    /// Another name for the job than its own.
    ///
    /// # Errors
    ///
    /// If it cannot be a topic's.
    pub fn named(self, name: &str) -> PlanResult<Self> {
        Ok(Self { identity: Identity::new(name)?, ..self })
    }

    /// The same log and store, after a stop, with another job: what a changed argument or a new version meets.
    ///
    /// # Errors
    ///
    /// If the pipeline is wrong, or the first job cannot stop.
    pub fn with_job<L: Job>(mut self, job: &L) -> Result<TestDriver<L>, DriveError> {
        self.stop()?;
        let fresh = TestDriver::new(job)?;
        let (log, state, partitions, now) = (self.log, self.state, self.partitions, self.now);
        Ok(TestDriver { log, state, partitions, now, ..fresh })
    }

    fn make_input(&self) {
        let name = self.plan.source().topic.clone();
        let new = NewTopic { name, partitions: self.partitions, cleanup: Cleanup::Delete };
        self.log.create_topic(&new).expect("a log in memory makes topics");
    }

    /// Appends a record without a key to a partition of the input, dated by the virtual clock.
    pub fn send(&mut self, partition: u32, value: impl Into<Bytes>) -> &mut Self {
        let (timestamp, value) = (self.now, Some(value.into()));
        self.send_record(partition, OutRecord { timestamp, key: None, value, headers: Vec::new() })
    }

    /// Appends a record to a partition of the input.
    ///
    /// # Panics
    ///
    /// If there is no such partition.
    pub fn send_record(&mut self, partition: u32, record: OutRecord) -> &mut Self {
        self.make_input();
        self.log.append(&self.plan.source().topic, partition, record);
        self
    }

    /// Time passes. A partition that had nothing before and after may turn idle.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn advance(&mut self, by: Duration) -> Result<(), DriveError> {
        self.settle()?;
        self.quiet();
        self.now = self.now.saturating_add(millis(by));
        self.quiet();
        self.settle()
    }

    fn quiet(&mut self) {
        let now = self.now;
        for partition in 0..self.partitions {
            if let Some(process) = &mut self.process {
                process.nothing(partition, true, now);
            }
        }
    }

    /// Makes one partition idle, once it has been read to its end, as if only its clock went on. Without
    /// `idle_after` in the job's event time nothing turns idle.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn idle(&mut self, partition: u32) -> Result<(), DriveError> {
        self.settle()?;
        let idle = self.plan.source().event_time.and_then(|e| e.idle_after).unwrap_or(0);
        let now = self.now;
        if let Some(process) = &mut self.process {
            process.nothing(partition, true, now);
            process.nothing(partition, true, now.saturating_add(idle));
        }
        self.settle()
    }

    /// Everything sent so far is read, processed and committed.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn commit(&mut self) -> Result<(), DriveError> {
        loop {
            self.settle()?;
            let (undone, behind) = ((self.crashes, self.panics), self.process()?.is_behind()?);
            self.process()?.event(Event::Commit)?;
            self.settle()?;
            // The work that was to be committed may have been undone; at most once reads one epoch behind.
            if (self.crashes, self.panics) == undone && !behind {
                return Ok(());
            }
        }
    }

    /// Runs to the end of what was sent, as `--until-end` does: every window closes, and the run ends. A later call
    /// starts the job again.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn until_end(&mut self) -> Result<Summary, DriveError> {
        self.stop()?;
        self.mode = Mode::UntilEnd;
        self.done = None;
        let ended = self.run_to_the_end();
        self.mode = Mode::Unbounded;
        self.process = None;
        ended?;
        self.done.take().ok_or(DriveError::Unended)
    }

    fn run_to_the_end(&mut self) -> Result<(), DriveError> {
        self.settle()?;
        // At most once: the rest becomes readable with a commit.
        while let Some(process) = &mut self.process {
            if !process.is_behind()? {
                break;
            }
            process.event(Event::Commit)?;
            self.settle()?;
        }
        Ok(())
    }

    /// The run ends after one more commit, as with Ctrl-C. Windows stay open. The next call starts the job again.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn stop(&mut self) -> Result<(), DriveError> {
        while self.process.is_some() {
            self.settle()?;
            if let Some(process) = &mut self.process {
                process.event(Event::Stop)?;
            }
            self.settle()?;
        }
        Ok(())
    }

    /// Stops and starts again with another number of tasks.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn restart_with(&mut self, tasks: usize) -> Result<(), DriveError> {
        self.stop()?;
        self.tasks = tasks;
        self.process()?;
        Ok(())
    }

    /// The machine loses power now: what was neither committed nor flushed is gone. The job starts again.
    ///
    /// # Errors
    ///
    /// If it cannot.
    pub fn crash(&mut self) -> Result<(), DriveError> {
        self.settle()?;
        self.lose_power();
        self.process()?;
        Ok(())
    }

    /// The machine will lose power just before the next commit takes this step. The job starts again by itself.
    pub fn crash_at(&mut self, step: CommitStep) {
        self.crash_at = Some((step, 0));
    }

    /// The machine loses power, and the job starts again with another number of tasks.
    ///
    /// # Errors
    ///
    /// If it cannot.
    pub fn crash_into(&mut self, tasks: usize) -> Result<(), DriveError> {
        self.settle()?;
        self.lose_power();
        self.tasks = tasks;
        self.process()?;
        Ok(())
    }

    /// Appends a record as [`Self::send`] does, while the next commit ends: the epoch behind it is running by then.
    pub fn send_meanwhile(&mut self, partition: u32, value: impl Into<Bytes>) -> &mut Self {
        let (timestamp, value) = (self.now, Some(value.into()));
        self.meanwhile.push((partition, OutRecord { timestamp, key: None, value, headers: Vec::new() }));
        self
    }

    /// Writes to the store what is committed.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn write_store(&mut self) -> Result<(), DriveError> {
        self.process()?.event(Event::WriteNow)?;
        self.settle()
    }

    /// Flushes the store: what was written survives a crash.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn flush_store(&mut self) -> Result<(), DriveError> {
        self.process()?.event(Event::FlushNow)?;
        self.settle()
    }

    /// Keeps a copy of the state store for [`Self::restore_store`].
    pub fn copy_store(&mut self) {
        self.copies.1 = Some(self.state.copy());
    }

    /// The state store is replaced by the copy, which is stale by now, and the job starts again.
    ///
    /// # Errors
    ///
    /// If it cannot.
    ///
    /// # Panics
    ///
    /// If there is no copy.
    pub fn restore_store(&mut self) -> Result<(), DriveError> {
        self.stop()?;
        self.state.replace_by(self.copies.1.as_ref().expect("a copy of the store"));
        self.process()?;
        Ok(())
    }

    /// Keeps a copy of the log for [`Self::lose_log_suffix`].
    pub fn copy_log(&mut self) {
        self.copies.0 = Some(self.log.copy());
    }

    /// The machine loses power, and with it everything that was appended to the log since [`Self::copy_log`]; the store
    /// keeps what it had flushed. The job is down until the next call that needs it.
    ///
    /// # Panics
    ///
    /// If there is no copy.
    pub fn lose_log_suffix(&mut self) {
        self.lose_power();
        self.log.lose_since(self.copies.0.as_ref().expect("a copy of the log"));
    }

    /// Records and markers in the log, over all topics.
    pub fn log_size(&self) -> usize {
        self.log.size()
    }

    /// How often the job was started, changelog records it replayed and shards it rebuilt, over all starts.
    pub fn starts(&self) -> (usize, u64, u32) {
        self.starts
    }

    /// The next commit's end is answered like this.
    pub fn next_end(&mut self, fate: EndFate) {
        self.log.next_end(fate);
    }

    /// The directory of the state store is deleted, and the job starts again without it.
    ///
    /// # Errors
    ///
    /// If it cannot.
    pub fn lose_store(&mut self) -> Result<(), DriveError> {
        self.stop()?;
        self.state.wipe();
        self.process()?;
        Ok(())
    }

    fn lose_power(&mut self) {
        self.retire();
        self.log.next_end(EndFate::Commit);
        self.state.crash();
        self.crashes += 1;
    }

    fn retire(&mut self) {
        if let Some(process) = self.process.take() {
            self.counters.add(&process.counters());
        }
    }

    /// The running process; a new one if there is none.
    fn process(&mut self) -> Result<&mut Process, DriveError> {
        if self.process.is_none() {
            self.make_input();
            let layout = Layout::new(&self.plan, self.tasks, self.state_bytes_max);
            let layout = Layout { shards: self.shards, ..layout };
            let (plan, identity, mode) = (self.plan.clone(), self.identity.clone(), self.mode);
            let setup = Setup { plan, identity, layout, mode };
            let triage = &mut self.triage;
            let mut process = Process::start(&setup, self.policy, &self.log, &self.state, self.now, triage)?;
            self.replayed += process.start.replayed;
            let (starts, replayed, rebuilt) = self.starts;
            self.starts = (starts + 1, replayed + process.start.replayed, rebuilt + process.start.rebuilt);
            process.begin()?;
            self.process = Some(process);
        }
        Ok(self.process.as_mut().expect("made just now"))
    }

    /// Lets everything work until nobody has anything to do.
    fn settle(&mut self) -> Result<(), DriveError> {
        self.process()?;
        while self.process.is_some() {
            match self.round() {
                Ok(true) => {}
                Ok(false) => break,
                Err(DriveError::Process(ProcessError::Step(error))) => {
                    // A machine in which something failed is of no more use.
                    self.retire();
                    if self.triage.failed(&error) != Some(Verdict::Again) {
                        return Err(ProcessError::Step(error).into());
                    }
                    self.panics += 1;
                    self.process()?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Everybody has one turn. Says whether anybody did anything.
    fn round(&mut self) -> Result<bool, DriveError> {
        let (partitions, now) = (self.partitions, self.now);
        let process = self.process()?;
        process.set_now(now);
        let (sources, channels) = (process.sources.len() as u32, process.channels() as u32);
        let mut turns: Vec<Turn> = (0..partitions).map(Turn::Read).collect();
        turns.extend((0..sources).flat_map(|s| [Turn::Publish(s), Turn::Barrier(s)]));
        turns.extend((0..channels).map(Turn::Deliver));
        turns.push(Turn::Act);
        let mut rows = if self.queue == usize::MAX { usize::MAX } else { 1 };
        if let Some(rng) = &mut self.rng {
            turns.shuffle(rng);
            rows = rng.random_range(1..=16);
        }
        let mut worked = false;
        for turn in turns {
            let Some(process) = &mut self.process else { return Ok(true) };
            worked |= match turn {
                // Whoever waits for room does no work: if everybody does, nothing goes on, and the run does not end.
                Turn::Read(p) if process.is_full(p, self.queue) => {
                    self.waits += u64::from(process.has_input(p)?);
                    false
                }
                Turn::Read(p) => process.read(p, rows)?,
                Turn::Barrier(s) => process.barrier(s as usize)?,
                Turn::Deliver(c) => process.deliver(c as usize)?,
                Turn::Publish(s) => {
                    // A value that rose is work: it travels on.
                    let before = process.place.floor();
                    process.publish(s as usize)?;
                    process.place.floor() != before
                }
                Turn::Act => self.act()?,
            };
        }
        Ok(worked)
    }

    fn act(&mut self) -> Result<bool, DriveError> {
        let mut acted = false;
        loop {
            let Some(process) = &mut self.process else { return Ok(true) };
            if let Some(step) = process.next_step() {
                if step == CommitStep::End && !self.meanwhile.is_empty() {
                    for (partition, record) in std::mem::take(&mut self.meanwhile) {
                        self.send_record(partition, record);
                    }
                    // The next epoch has a turn before the transaction ends.
                    return Ok(true);
                }
                *self.taken.entry(step).or_default() += 1;
                if self.crashes_before(step) {
                    self.lose_power();
                    self.process()?;
                    return Ok(true);
                }
            }
            let Some(process) = &mut self.process else { return Ok(true) };
            match process.act()? {
                None => return Ok(acted),
                Some(Fate::Lives) => acted = true,
                Some(Fate::Restart) => {
                    self.retire();
                    self.process()?;
                    return Ok(true);
                }
                Some(Fate::Done(summary)) => {
                    self.done = Some(summary);
                    self.retire();
                    return Ok(true);
                }
            }
        }
    }

    fn crashes_before(&mut self, step: CommitStep) -> bool {
        match &mut self.crash_at {
            Some((at, 0)) if *at == step => {
                self.crash_at = None;
                true
            }
            Some((at, times)) if *at == step => {
                *times -= 1;
                false
            }
            _ => false,
        }
    }

    fn rows(&self, role: Role) -> Vec<Row> {
        let topics: BTreeSet<_> =
            self.plan.sinks().iter().filter(|s| s.role == role).map(|s| &s.topic).collect();
        let text = |b: &Bytes| String::from_utf8_lossy(b).into_owned();
        let header = |h: &Header| (text(&h.name), h.value.as_ref().map(text).unwrap_or_default());
        let mut rows = Vec::new();
        for topic in topics {
            rows.extend(self.log.records(topic).into_iter().map(|(partition, _, record)| Row {
                topic: topic.clone(),
                partition,
                timestamp: record.timestamp,
                key: record.key.as_ref().map(text),
                value: record.value.as_ref().map(text).unwrap_or_default(),
                headers: record.headers.iter().map(header).collect(),
            }));
        }
        rows
    }

    /// Committed output, by topic and partition, each in its order.
    pub fn outputs(&self) -> Vec<Row> {
        self.rows(Role::Output)
    }

    /// Committed late records.
    pub fn late(&self) -> Vec<Row> {
        self.rows(Role::Late)
    }

    /// Committed dead letters.
    pub fn dead_letters(&self) -> Vec<Row> {
        self.rows(Role::DeadLetter)
    }

    /// Committed state of the open windows, by window end and key (as text): what the changelog folds to.
    ///
    /// # Panics
    ///
    /// If `A` is not the type of the job's accumulator.
    pub fn state<A: DeserializeOwned>(&self) -> BTreeMap<(Timestamp, String), A> {
        let mut state = BTreeMap::new();
        let Some(step) = self.plan.step() else { return state };
        let name = |n: Result<String, _>| n.unwrap_or_default();
        let mut marks = Marks::NONE;
        for (_, _, record) in self.log.records(&name(self.identity.keyed_changelog())) {
            let key = record.key.unwrap_or_default();
            if mark_of_changelog_key(&key) == Some(step.store) {
                marks.raise(Marks::decode(&record.value.unwrap_or_default()).expect("marks of the engine"));
            }
        }
        for (_, _, record) in self.log.records(&name(self.identity.changelog(&step.name))) {
            let key = record.key.unwrap_or_default();
            if let Some((end, key)) = window_and_key(&key).filter(|(end, _)| *end > marks.closed) {
                let value = codec::decode(&record.value.unwrap_or_default()).expect("the accumulator's type");
                state.insert((Timestamp(end), String::from_utf8_lossy(key).into_owned()), value);
            }
        }
        state
    }

    /// What the tasks counted, over all starts.
    pub fn counters(&self) -> Counters {
        let mut all = self.counters;
        if let Some(process) = &self.process {
            all.add(&process.counters());
        }
        all
    }

    /// Changelog records replayed, over all starts.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// How often the job's code panicked and was given another try. A record that does it three times goes to the dead
    /// letters; where there are none, and in the keyed step, the driver's call fails.
    pub fn panics(&self) -> usize {
        self.panics
    }

    /// How often the machine lost power.
    pub fn crashes(&self) -> usize {
        self.crashes
    }

    /// Runs `script` undisturbed, then once for every commit step that it takes, with a crash just before that step, and
    /// compares output, late records and dead letters. Returns the number of crashes.
    ///
    /// A partition that the script makes idle takes part again after a crash: make it idle again where that matters.
    ///
    /// # Errors
    ///
    /// If a crash changes the results, or the script fails.
    pub fn crash_at_every_step(
        make: impl Fn() -> PlanResult<Self>,
        script: impl Fn(&mut Self) -> Result<(), DriveError>,
    ) -> Result<usize, DriveError> {
        let mut crashes = 0;
        Self::each_crash(make, script, |undisturbed, crashed, (step, nth)| {
            crashes += crashed.crashes - undisturbed.crashes;
            let all = |d: &Self| [d.outputs(), d.late(), d.dead_letters()];
            let both = all(undisturbed).into_iter().zip(all(crashed));
            for ((a, b), what) in both.zip(["the output", "the late records", "the dead letters"]) {
                // Between two keys and two source tasks there is no order.
                if sorted(&a) != sorted(&b) {
                    let only = |a: &[Row], b: &[Row]| a.iter().filter(|r| !b.contains(r)).cloned().collect();
                    let (undisturbed, crashed) = (only(&a, &b), only(&b, &a));
                    let changes = CrashChanges { step, nth, what, undisturbed, crashed };
                    return Err(DriveError::Changes(Box::new(changes)));
                }
            }
            Ok(())
        })?;
        Ok(crashes)
    }

    /// Runs `script` undisturbed, then once for every commit step that it takes, with a crash just before that step.
    /// `judge` is given both drivers, the step, and which time it was, from 1.
    ///
    /// # Errors
    ///
    /// If the script fails, or `judge` does.
    pub fn each_crash(
        make: impl Fn() -> PlanResult<Self>,
        script: impl Fn(&mut Self) -> Result<(), DriveError>,
        mut judge: impl FnMut(&Self, &Self, (CommitStep, usize)) -> Result<(), DriveError>,
    ) -> Result<(), DriveError> {
        let mut undisturbed = make()?;
        script(&mut undisturbed)?;
        for (step, times) in undisturbed.taken.clone() {
            for nth in 0..times {
                let mut crashed = make()?;
                crashed.crash_at = Some((step, nth));
                script(&mut crashed)?;
                judge(&undisturbed, &crashed, (step, nth + 1))?;
            }
        }
        Ok(())
    }
}

fn sorted(rows: &[Row]) -> Vec<&Row> {
    let mut rows: Vec<_> = rows.iter().collect();
    rows.sort();
    rows
}

enum Turn {
    Read(u32),
    Publish(u32),
    Barrier(u32),
    Deliver(u32),
    Act,
}
