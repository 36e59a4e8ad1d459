//! The coordinator's thread: feeds the commit state machine and carries out what it asks for.
//!
//! Everything that touches the transaction happens here, in order. The end of a transaction blocks this thread for one
//! sync of the log; tasks go on meanwhile, what they tell waits in the queue. Writes to the store have a thread of
//! their own, so that a large one never holds a commit.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use super::error::RunError;
use super::monitor::{Base, Monitor, Stop};
use super::wiring::{Command, Told, Wiring};
use super::{Clock, wall_clock};
use crate::engine::{Action, CommitStep, Coordinator, Counters, Event, Last, Payload, Place, Summary, Via};
use crate::io::{End, Ended, LogError, Transactions};
use crate::probe::Moment;
use crate::record::OutRecord;
use crate::state::{StateBackend, StateError, StoreBatch};

/// How often time is told to the coordinator where nothing else happens.
const TICK: Duration = Duration::from_millis(10);

/// How long output waits in a batch that is not full while there is always something else to do.
const NUDGE: Duration = Duration::from_millis(50);

/// How often the monitor is brought up to date.
const SHOW_MS: i64 = 50;

/// Wait between two questions for an outcome that is not known.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// How long an outcome is asked for before the run gives up: several fail-overs of the log's owner.
const OUTCOME_WAIT_MS: i64 = 60_000;

/// What the store's thread is asked to do.
pub(super) enum StoreWork {
    Write(StoreBatch),
    Flush,
}

/// Works for the coordinator until its sender is gone.
pub(super) fn store_thread(
    backend: &dyn StateBackend,
    work: &Receiver<StoreWork>,
    wiring: &Wiring,
    monitor: &Monitor,
) -> Result<(), StateError> {
    // Writes that are asked for are done even where everything ends: they hold committed bytes only.
    while let Ok(work) = work.recv() {
        let done = match work {
            StoreWork::Write(batch) => {
                monitor.probe().at(Moment::Commit(CommitStep::Write));
                backend.write(&batch)?;
                let bytes = backend.bytes();
                monitor.update(|p| p.state_bytes = bytes);
                Event::Written { epoch: batch.epoch }
            }
            StoreWork::Flush => {
                monitor.probe().at(Moment::Commit(CommitStep::Flush));
                backend.flush()?;
                monitor.update(|p| p.flushes += 1);
                Event::Flushed
            }
        };
        wiring.tell(done);
    }
    Ok(())
}

/// How a start ended.
pub(super) enum Outcome {
    Done(Summary),
    /// The transaction was aborted: start again.
    Aborted,
}

/// One start's coordinator, with what it acts on.
pub(super) struct Commits<'a> {
    pub(super) coordinator: Coordinator,
    pub(super) transactions: Box<dyn Transactions>,
    pub(super) group: &'a str,
    pub(super) sources: usize,
    pub(super) keyed: usize,
    pub(super) place: Arc<Place>,
    pub(super) store: SyncSender<StoreWork>,
    pub(super) wiring: Arc<Wiring>,
    pub(super) told: &'a Receiver<Told>,
    pub(super) monitor: &'a Monitor,
    pub(super) base: &'a Base,
    pub(super) clock: Clock,
    pub(super) stop_told: bool,
    pub(super) shown: i64,
    pub(super) pace: Pace,
    /// The last moment that was told, so that each comes once a commit.
    pub(super) at: Moment,
}

/// What the commit under way has taken so far.
#[derive(Default)]
pub(super) struct Pace {
    barrier: Option<Instant>,
    aligned: Option<Duration>,
    changelog_records: u64,
}

impl Pace {
    /// Notes an action as it is taken.
    fn note(&mut self, action: &Action) {
        match (action, action.step()) {
            (Action::Barrier { .. }, _) => {
                *self = Self { barrier: Some(Instant::now()), ..Self::default() };
            }
            (Action::Send { payload, .. }, Some(CommitStep::State)) => {
                self.aligned();
                self.changelog_records += match payload {
                    Payload::Records(records) => records.len() as u64,
                    Payload::Cells(cells, _) => cells.len() as u64,
                };
            }
            (Action::Offsets(_), _) => self.aligned(),
            _ => {}
        }
    }

    fn aligned(&mut self) {
        let barrier = self.barrier;
        self.aligned.get_or_insert_with(|| barrier.map_or(Duration::ZERO, |b| b.elapsed()));
    }
}

impl Commits<'_> {
    /// Runs until the run has ended, a transaction was aborted, or something failed.
    pub(super) fn run(&mut self) -> Result<Outcome, RunError> {
        let mut nudged = Some(Instant::now());
        loop {
            if let Some(outcome) = self.act()? {
                self.show(true);
                return Ok(outcome);
            }
            self.show(false);
            match self.told.recv_timeout(TICK) {
                Ok(Told::Event(event)) => {
                    self.handle(event)?;
                    // What else has arrived is taken before the next look at the clock.
                    for _ in 0..64 {
                        match self.told.try_recv() {
                            Ok(Told::Event(event)) => self.handle(event)?,
                            Ok(Told::Look) => {}
                            Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                        }
                        if let Some(outcome) = self.act()? {
                            self.show(true);
                            return Ok(outcome);
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => nudged = None,
                Ok(Told::Look) | Err(RecvTimeoutError::Disconnected) => {}
            }
            // A careless reader sees output as it arises, not at the commit.
            if nudged.is_none_or(|nudged| nudged.elapsed() >= NUDGE) {
                self.transactions.nudge()?;
                nudged = Some(Instant::now());
            }
            if self.wiring.is_down() {
                return Err(self.wiring.failure().unwrap_or(RunError::StoppedAtOnce));
            }
            match self.monitor.asked() {
                Stop::No => {}
                Stop::AfterCommit if self.stop_told => {}
                Stop::AfterCommit => {
                    self.stop_told = true;
                    self.tell(Moment::Closing);
                    self.handle(Event::Stop)?;
                }
                Stop::AtOnce => return Err(RunError::StoppedAtOnce),
            }
            self.handle(Event::Tick)?;
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), RunError> {
        // Records carry wall time, and intervals are taken from it, too: a clock that jumps costs one early commit.
        self.coordinator.handle(event, wall_clock()).map_err(RunError::Commit)
    }

    /// Carries out what the coordinator wants, in order.
    fn act(&mut self) -> Result<Option<Outcome>, RunError> {
        while let Some(action) = self.coordinator.next_action() {
            self.pace.note(&action);
            self.announce(&action);
            match action {
                Action::Barrier { last, .. } => {
                    for task in 0..self.sources {
                        self.wiring.command(task, Command::Barrier(last));
                    }
                }
                Action::Send { via, topic, partition, payload, step } => {
                    if step.is_none()
                        && let Payload::Records(records) = &payload
                    {
                        let bytes: usize = records.iter().map(OutRecord::bytes).sum();
                        self.wiring.held_bytes.fetch_sub(bytes, Ordering::Relaxed);
                    }
                    let (records, to) = (&mut payload.records(), &mut self.transactions);
                    match via {
                        Via::Transaction => to.send(&topic, partition, records)?,
                        Via::Outside => to.send_outside(&topic, partition, records)?,
                    }
                }
                Action::Offsets(offsets) => self.transactions.offsets(self.group, &offsets)?,
                // Nothing is committed after a stop at once, however much was waiting here when it was asked for.
                Action::End if self.monitor.asked() == Stop::AtOnce => return Err(RunError::StoppedAtOnce),
                Action::End => {
                    let ended = self.end()?;
                    self.tell(Moment::Commit(CommitStep::Outcome));
                    self.handle(Event::Ended(ended))?;
                }
                Action::Committed { epoch } => {
                    for task in 0..self.keyed {
                        self.wiring.command(task, Command::Committed(epoch));
                    }
                    let pace = std::mem::take(&mut self.pace);
                    self.monitor.update(|p| {
                        p.changelog_records += pace.changelog_records;
                        p.aligned_in = pace.aligned.unwrap_or_default();
                        p.committed_in = pace.barrier.map_or(Duration::ZERO, |b| b.elapsed());
                    });
                    self.show(true);
                }
                Action::Applied { epoch } => {
                    for task in 0..self.keyed {
                        self.wiring.command(task, Command::Applied(epoch));
                    }
                }
                Action::Write(batch) => self.work(StoreWork::Write(batch))?,
                Action::Flush => self.work(StoreWork::Flush)?,
                Action::Restart => return Ok(Some(Outcome::Aborted)),
                Action::Done(summary) => return Ok(Some(Outcome::Done(summary))),
            }
        }
        if self.at == Moment::Commit(CommitStep::Barrier) && !self.coordinator.is_aligning() {
            // The epoch was empty.
            self.tell(Moment::Released);
        }
        Ok(None)
    }

    /// Says what an action is about to do, where that is not what was said last.
    fn announce(&mut self, action: &Action) {
        let moment = match action {
            Action::Barrier { last, .. } => {
                if *last == Last::End {
                    self.tell(Moment::Closing);
                }
                return self.tell(Moment::Commit(CommitStep::Barrier));
            }
            // Of the epoch whose commit is under way already.
            Action::Send { step: None, .. } if self.coordinator.is_aligning() => return,
            Action::Send { step: None, .. } => Moment::Output,
            Action::Committed { .. } => Moment::Released,
            Action::Done(_) => Moment::Closed,
            // The store's thread says it when it gets there.
            Action::Write(_) | Action::Flush | Action::Applied { .. } | Action::Restart => return,
            other => match other.step() {
                Some(step) => Moment::Commit(step),
                None => return,
            },
        };
        if moment != self.at {
            self.tell(moment);
        }
    }

    fn tell(&mut self, moment: Moment) {
        self.at = moment;
        self.monitor.probe().at(moment);
    }

    /// One write and one flush are under way at most, so the queue has room; where the thread failed it is gone.
    fn work(&mut self, work: StoreWork) -> Result<(), RunError> {
        let gone = || RunError::State(StateError::Store { source: "its thread has ended".into() });
        self.store.send(work).map_err(|_| self.wiring.failure().unwrap_or_else(gone))
    }

    /// Ends the transaction, asking until the outcome is known.
    fn end(&mut self) -> Result<Ended, RunError> {
        let began = self.clock.now();
        loop {
            match self.transactions.end(End::Commit)? {
                Ended::Unknown if self.monitor.asked() == Stop::AtOnce => {
                    return Err(RunError::StoppedAtOnce);
                }
                Ended::Unknown if self.clock.now() - began > OUTCOME_WAIT_MS => {
                    let source = "no outcome of a transaction's end within a minute".into();
                    return Err(LogError::Unreachable { source }.into());
                }
                Ended::Unknown => self.monitor.pause(ASK_AGAIN),
                known => return Ok(known),
            }
        }
    }

    fn show(&mut self, now: bool) {
        let clock = self.clock.now();
        if !now && clock - self.shown < SHOW_MS {
            return;
        }
        self.shown = clock;
        let mut sum = Counters::default();
        for port in &self.wiring.ports {
            sum.add(&port.counters.lock());
        }
        self.monitor.counted(&sum);
        self.monitor.outlook(&self.coordinator.outlook(), self.base);
        let partitions = self.place.partitions();
        self.monitor.update(|p| p.partitions = partitions);
    }
}
