//! One task's thread: it runs the source chain and the keyed chain of its number, and never waits inside either.
//!
//! ```text
//!   loop: commands ─▶ keyed: messages of senders that are not blocked ─▶ outlets ─▶ source: one batch, if nothing waits
//!         nothing to do: park, at most [`PARK`]
//! ```
//!
//! Input is read only where everything sent before has left, the coordinator is not behind, and no overlay is over its
//! limit; receiving goes on in all these cases. Of several partitions the one with the lowest event-time watermark is
//! read first.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_utils::sync::Parker;

use super::error::RunError;
use super::wiring::{Command, Fed, Inlet, Outlet, Wiring};
use super::{Clock, HELD_BYTES_MAX};
use crate::engine::{Event, KeyedTask, SourceTask, TaskOutput};
use crate::error::StepError;

/// Longest sleep: a lost wake-up costs this much and no more.
const PARK: Duration = Duration::from_millis(100);

/// Messages received before commands and input get their turn.
const RECEIVE_MAX: usize = 64;

/// How long a task waits for the store to take what it holds too much of. An epoch that turns out empty is applied by
/// nobody, so the wait has an end.
const PRESSURE_WAIT_MS: i64 = 1_000;

/// One thread's machines and ends of channels.
pub(super) struct TaskThread {
    pub(super) index: usize,
    pub(super) source: Option<SourceTask>,
    pub(super) keyed: Option<KeyedTask>,
    pub(super) inlets: Vec<Inlet>,
    pub(super) outlets: Vec<Outlet>,
    pub(super) wiring: Arc<Wiring>,
    pub(super) parker: Parker,
    pub(super) clock: Clock,
    pub(super) out: TaskOutput,
    pub(super) keyed_out: TaskOutput,
    pub(super) finished: bool,
    /// Which part is at work, for the message of a panic.
    pub(super) at: Arc<std::sync::atomic::AtomicU8>,
}

/// Parts of a thread that may panic.
pub(super) const AT_SOURCE: u8 = 1;
pub(super) const AT_KEYED: u8 = 2;

/// A step failed, in which part.
pub(super) struct Failed {
    pub(super) part: u8,
    pub(super) error: StepError,
}

impl TaskThread {
    /// Runs until everything ends.
    pub(super) fn run(&mut self) -> Result<(), Failed> {
        self.check_finished();
        while !self.wiring.is_down() {
            let mut busy = self.commands().map_err(|error| Failed { part: AT_SOURCE, error })?;
            busy |= self.receive().map_err(|error| Failed { part: AT_KEYED, error })?;
            let sent = self.flush();
            if sent && self.may_read() {
                busy |= self.read().map_err(|error| Failed { part: AT_SOURCE, error })?;
            }
            if !busy {
                self.parker.park_timeout(PARK);
            }
        }
        Ok(())
    }

    /// What the coordinator asks for comes first.
    fn commands(&mut self) -> Result<bool, StepError> {
        let commands = std::mem::take(&mut *self.wiring.ports[self.index].commands.lock());
        let any = !commands.is_empty();
        for command in commands {
            match command {
                Command::Barrier(last) => {
                    if let Some(source) = &mut self.source {
                        self.at.store(AT_SOURCE, Ordering::Relaxed);
                        for (partition, queue) in &self.wiring.ports[self.index].inbox.lock().parts {
                            let next = queue.iter().rev().find_map(Fed::next);
                            next.into_iter().for_each(|next| source.fetched_ahead(*partition, next));
                        }
                        source.barrier(last, &mut self.out)?;
                        self.hand_on();
                    }
                }
                Command::Committed(epoch) => {
                    if let Some(keyed) = &mut self.keyed {
                        keyed.committed(epoch);
                    }
                }
                Command::Applied(epoch) => {
                    if let Some(keyed) = &mut self.keyed {
                        keyed.applied(epoch, &mut self.keyed_out);
                        self.wiring.pressed_until.store(0, Ordering::Relaxed);
                    }
                }
            }
        }
        Ok(any)
    }

    /// Lets the keyed task work on what has arrived.
    fn receive(&mut self) -> Result<bool, StepError> {
        let Some(keyed) = &mut self.keyed else { return Ok(false) };
        self.at.store(AT_KEYED, Ordering::Relaxed);
        let mut received = 0;
        let mut any = true;
        while any && received < RECEIVE_MAX {
            any = false;
            for (sender, inlet) in self.inlets.iter_mut().enumerate() {
                if keyed.is_blocked(sender) {
                    continue;
                }
                let Some(message) = inlet.receive() else { continue };
                any = true;
                received += 1;
                keyed.receive(sender, message, &mut self.keyed_out)?;
                for event in self.keyed_out.events() {
                    tell(&self.wiring, event);
                }
            }
        }
        if received > 0 {
            if keyed.pressed() {
                self.press();
            }
            self.count();
        }
        Ok(received > 0)
    }

    /// The overlay is over its limit and its cells are not applied yet: commit, write, and read nothing meanwhile.
    fn press(&self) {
        let until = &self.wiring.pressed_until;
        let now = self.clock.now();
        if until.load(Ordering::Relaxed) <= now {
            until.store(now + PRESSURE_WAIT_MS, Ordering::Relaxed);
            self.wiring.tell(Event::Pressure);
        }
    }

    fn may_read(&self) -> bool {
        let wiring = &self.wiring;
        wiring.held_bytes.load(Ordering::Relaxed) < HELD_BYTES_MAX
            && wiring.pressed_until.load(Ordering::Relaxed) <= self.clock.now()
    }

    /// Lets the source task work on one batch.
    fn read(&mut self) -> Result<bool, StepError> {
        let Some(source) = &mut self.source else { return Ok(false) };
        let fed = {
            let mut inbox = self.wiring.ports[self.index].inbox.lock();
            let filled = inbox.parts.iter_mut().filter(|(_, queue)| !queue.is_empty());
            let lowest = filled.min_by_key(|(partition, _)| source.watermark(*partition));
            lowest.and_then(|(_, queue)| queue.pop_front())
        };
        let Some(fed) = fed else { return Ok(false) };
        self.at.store(AT_SOURCE, Ordering::Relaxed);
        match fed {
            Fed::Fetched(fetched) => {
                let bytes: usize = fetched.batches.iter().map(crate::record::RecordBatch::bytes).sum();
                let left = &self.wiring.fed_bytes[fetched.partition as usize];
                left.fetch_sub(bytes, Ordering::Relaxed);
                self.wiring.feeder.unpark();
                source.fetched(fetched, &mut self.out)?;
            }
            Fed::Nothing { partition, caught_up, now } => source.nothing(partition, caught_up, now),
        }
        source.publish(&mut self.out)?;
        self.hand_on();
        self.count();
        self.check_finished();
        Ok(true)
    }

    /// What the source produced goes on its way.
    fn hand_on(&mut self) {
        for (receiver, message) in self.out.messages() {
            self.outlets[receiver].send(message);
        }
        for event in self.out.events() {
            tell(&self.wiring, event);
        }
    }

    fn flush(&mut self) -> bool {
        let mut all = true;
        for outlet in &mut self.outlets {
            all &= outlet.flush();
        }
        all
    }

    fn count(&self) {
        let mut counters = self.out.counters();
        counters.add(&self.keyed_out.counters());
        counters.waited = self.outlets.iter().map(|outlet| outlet.waited).sum();
        *self.wiring.ports[self.index].counters.lock() = counters;
    }

    fn check_finished(&mut self) {
        if !self.finished && self.source.as_ref().is_some_and(SourceTask::finished) {
            self.finished = true;
            self.wiring.tell(Event::Finished { task: self.index });
        }
    }
}

/// Output on its way to the coordinator counts as held until it is in the log.
fn tell(wiring: &Wiring, event: Event) {
    if let Event::Output { batches, .. } = &event {
        let bytes: usize = batches.iter().map(crate::engine::OutBatch::bytes).sum();
        wiring.held_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    wiring.tell(event);
}

/// The step of a plan that a part of a thread runs.
pub(super) fn step_name(plan: &crate::plan::Plan, part: u8) -> String {
    match plan.step() {
        Some(step) if part == AT_KEYED => format!("step `{}`", step.name),
        _ => format!("source `{}`", plan.source().topic),
    }
}

/// What a run says of a thread that failed.
pub(super) fn failed(plan: &crate::plan::Plan, index: usize, failed: Failed) -> RunError {
    RunError::Step { task: format!("task {index}"), step: step_name(plan, failed.part), source: failed.error }
}
