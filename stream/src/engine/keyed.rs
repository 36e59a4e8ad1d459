//! A keyed task: takes messages from every source task, keeps time, and lets its step aggregate, fire and snapshot.
//!
//! ```text
//!   sender 0 ── rows, time 4, barrier ▌ blocked until all have sent theirs
//!   sender 1 ── rows, time 3, rows      ─▶ acts on min(4, 3), completely, before it snapshots
//! ```
//!
//! Invariants: it acts on the smallest last value over its channels; at a snapshot every sender has sent its barrier and
//! nothing behind it was read, so all tasks of the step snapshot at one value of time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::poison;
use super::window::{At, KeyedStep, StepSetup};
use super::{KeyedSnapshot, Message, Start, TaskOutput};
use crate::error::StepError;
use crate::fault::{self, Fault};
use crate::state::StateBackend;
use crate::time::{END, MIN};

/// One keyed task. See the head of this file and the [protocol](crate::engine).
pub struct KeyedTask {
    index: usize,
    /// Last value of time per sender.
    last: Vec<i64>,
    blocked: Vec<bool>,
    barriers: usize,
    at: At,
    applied: u64,
    bytes_max: usize,
    /// Overlay size at which eviction is tried again: trying in vain for every message would be quadratic.
    evict_at: usize,
    closed_early: Vec<i64>,
    step: Box<dyn KeyedStep>,
}

impl KeyedTask {
    /// Task `index` of the start's layout. Looks up which windows the store holds.
    ///
    /// # Errors
    ///
    /// If the store fails.
    ///
    /// # Panics
    ///
    /// If the plan has no keyed step.
    pub fn new(start: &Start, index: usize, backend: Arc<dyn StateBackend>) -> Result<Self, StepError> {
        let spec = start.plan.step().expect("a plan with keyed tasks has a keyed step");
        let layout = start.layout;
        let mut marks = start.marks;
        if fault::active(Fault::ClosedNotRestored) {
            marks.closed = MIN;
        }
        let (tasks, shards, store) = (layout.keyed, layout.shards, spec.store);
        let care = start.care.groups;
        let setup = StepSetup { task: index, tasks, shards, store, marks, backend, care };
        Ok(Self {
            index,
            last: vec![MIN; layout.sources],
            blocked: vec![false; layout.sources],
            barriers: 0,
            at: At { epoch: 1, reached: MIN },
            applied: 0,
            bytes_max: layout.overlay_bytes_max,
            evict_at: layout.overlay_bytes_max,
            closed_early: Vec::new(),
            step: (spec.factory)(&start.env(), setup)?,
        })
    }

    /// True if nothing may be received from this sender now.
    pub fn is_blocked(&self, sender: usize) -> bool {
        self.blocked[sender]
    }

    /// The next message of a sender.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    ///
    /// # Panics
    ///
    /// If the sender is blocked.
    pub fn receive(
        &mut self,
        sender: usize,
        message: Message,
        out: &mut TaskOutput,
    ) -> Result<(), StepError> {
        catch_unwind(AssertUnwindSafe(|| self.take(sender, message, out))).unwrap_or_else(|panic| {
            Err(StepError::StepPanicked {
                step: self.step.name().to_owned(),
                group: self.step.at_work().map(Box::new),
                message: poison::message(&*panic),
            })
        })
    }

    fn take(&mut self, sender: usize, message: Message, out: &mut TaskOutput) -> Result<(), StepError> {
        assert!(
            !self.blocked[sender],
            "keyed task {} reads beyond the barrier of sender {sender}",
            self.index
        );
        out.epoch = self.at.epoch;
        match message {
            Message::Rows(groups) => {
                self.step.rows(groups, &self.at, &mut out.emit)?;
                self.keep_within(out);
            }
            Message::Time(value) => {
                self.last[sender] = self.last[sender].max(value);
                let reached = self.last.iter().copied().min().unwrap_or(MIN);
                if reached > self.at.reached {
                    self.act(reached, out)?;
                }
            }
            Message::Barrier(_) => self.barrier(sender, out),
        }
        Ok(())
    }

    fn act(&mut self, reached: i64, out: &mut TaskOutput) -> Result<(), StepError> {
        if reached == END {
            let early = |end: &i64| end - 1 > self.at.reached;
            self.closed_early.extend(self.step.open().into_iter().filter(early));
        }
        self.step.fire(reached, &mut out.emit)?;
        self.at.reached = reached;
        Ok(())
    }

    fn barrier(&mut self, sender: usize, out: &mut TaskOutput) {
        self.barriers += 1;
        let aligned = if fault::active(Fault::BarrierNotAligned) {
            self.barriers % self.last.len() == 1 % self.last.len()
        } else {
            self.blocked[sender] = true;
            self.blocked.iter().all(|b| *b)
        };
        if !aligned {
            return;
        }
        self.blocked.fill(false);
        out.keyed = Some(KeyedSnapshot {
            task: self.index,
            epoch: self.at.epoch,
            reached: self.at.reached,
            marks: self.step.marks(),
            cells: self.step.snapshot(self.at.epoch),
            closed_early: std::mem::take(&mut self.closed_early),
        });
        self.at.epoch += 1;
    }

    /// The epoch is committed: [`super::Action::Committed`].
    pub fn committed(&mut self, _epoch: u64) {
        if fault::active(Fault::CleanAll) {
            self.step.clean_all();
        }
    }

    /// The store holds everything up to this committed epoch: [`super::Action::Applied`]. Its cells may be evicted.
    pub fn applied(&mut self, epoch: u64, out: &mut TaskOutput) {
        self.applied = epoch;
        self.evict_at = self.bytes_max;
        self.keep_within(out);
    }

    fn keep_within(&mut self, out: &mut TaskOutput) {
        let bytes = self.step.bytes();
        if bytes > self.evict_at {
            out.emit.counters.evicted += self.step.evict(self.applied);
            self.evict_at = self.bytes_max.max(self.step.bytes() + self.bytes_max / 8);
        }
    }

    /// Drops every cell that the store holds as it is.
    pub fn evict(&mut self, out: &mut TaskOutput) {
        out.emit.counters.evicted += self.step.evict(self.applied);
    }

    /// About the memory of the overlay.
    pub fn bytes(&self) -> usize {
        self.step.bytes()
    }

    /// True while the overlay is larger than it should be, because too much of it is not in the store yet: the runner
    /// tells the coordinator ([`super::Event::Pressure`]).
    pub fn pressed(&self) -> bool {
        self.step.bytes() > self.bytes_max
    }

    /// The event-time watermark it has acted on.
    pub fn reached(&self) -> i64 {
        self.at.reached
    }

    /// Ends of its open windows.
    pub fn open_windows(&self) -> Vec<i64> {
        self.step.open()
    }

    #[cfg(feature = "faults")]
    pub(crate) fn peek(&self, window_end: i64, key: &[u8]) -> Option<Vec<u8>> {
        self.step.peek(window_end, key)
    }

    #[cfg(feature = "faults")]
    pub(crate) fn closed(&self) -> i64 {
        self.step.marks().closed
    }
}
