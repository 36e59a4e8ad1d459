//! A source task: reads partitions, stamps rows, runs the chain, sends.
//!
//! Per call: rows in, the partition's event-time watermark up, groups and output out. Between calls the runner asks it
//! to publish (BROADCAST, after FLUSH), and at a barrier it flushes, publishes, snapshots its partitions and passes the
//! barrier on. It never waits, and works the same with no partition at all: empty, idle and finished tasks inject
//! values and barriers too.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;

use super::place::joined;
use super::poison::{self, Care, Tried};
use super::{
    Join, Message, Mode, PartitionSnapshot, Place, SourceSnapshot, Start, StartPartition, TaskOutput,
};
use crate::chain::{Cx, Head};
use crate::error::StepError;
use crate::fault::{self, Fault};
use crate::guarantee::Guarantee;
use crate::io::{Fetched, Position};
use crate::plan::SinkId;
use crate::record::{Header, RecordBatch, RecordRef};
use crate::time::{END, MIN};

/// What a barrier ends beside the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// Nothing: the next epoch follows.
    No,
    /// The run: it was asked to stop. Windows stay open.
    Stop,
    /// The run: all partitions reached their captured ends. Every window closes.
    End,
}

struct Part {
    number: u32,
    next: Position,
    /// `next` at the last barrier, when nothing was held back.
    since: i64,
    /// Behind the batch that is being processed.
    reading: i64,
    watermark: i64,
    end: Option<i64>,
    /// At most once: behind what was fetched and waits to be processed.
    ahead: Position,
    idle: bool,
    /// Since when fetches have waited at the high watermark in vain.
    quiet_since: Option<i64>,
}

/// One source task. See the head of this file and the [protocol](crate::engine).
pub struct SourceTask {
    index: usize,
    receivers: usize,
    mode: Mode,
    place: Arc<Place>,
    head: Box<dyn Head>,
    parts: Vec<Part>,
    joins: Vec<Join>,
    /// The last value sent.
    sent: i64,
    /// With `Fault::FloorSetLater`: the value read and not yet sent.
    read_before: i64,
    idle_after: Option<i64>,
    epoch: u64,
    guarantee: Guarantee,
    care: Care,
    /// The sink of dead letters and its partitions.
    dead_letters: Option<(SinkId, u32)>,
}

impl SourceTask {
    /// Task `index` of the start's layout.
    pub fn new(start: &Start, index: usize, place: Arc<Place>) -> Self {
        let event_time = start.plan.source().event_time;
        let mut task = Self {
            index,
            receivers: start.layout.keyed,
            mode: start.mode,
            place,
            head: start.plan.head(&start.env()),
            parts: Vec::new(),
            joins: Vec::new(),
            sent: MIN,
            read_before: MIN,
            // BOUNDED: a run until the end ignores idleness.
            idle_after: event_time.and_then(|e| e.idle_after).filter(|_| start.mode == Mode::Unbounded),
            epoch: 1,
            guarantee: start.plan.guarantee(),
            care: start.care.clone(),
            dead_letters: start.plan.dead_letters().map(|sink| (sink, start.sinks[sink.index()].partitions)),
        };
        for p in &start.partitions {
            if p.partition as usize % start.layout.sources == index {
                task.add(p);
            }
        }
        task
    }

    fn add(&mut self, p: &StartPartition) {
        let own = p.watermark.unwrap_or(MIN);
        let watermark =
            if fault::active(Fault::JoinAlone) { own } else { self.place.value(p.partition, p.watermark) };
        if p.watermark.is_none() {
            joined(&mut self.joins, p.partition, p.position.offset, own, watermark);
        }
        self.parts.push(Part {
            number: p.partition,
            next: p.position,
            since: p.position.offset,
            reading: p.position.offset,
            watermark,
            end: p.end,
            ahead: p.position,
            idle: false,
            quiet_since: None,
        });
        self.finish_part(self.parts.len() - 1);
    }

    /// A partition that appeared while the job runs. It joins at the floor.
    pub fn assign(&mut self, partition: u32, position: Position) {
        let watermark = self.place.join(partition, MIN);
        joined(&mut self.joins, partition, position.offset, MIN, watermark);
        let part = Part {
            number: partition,
            next: position,
            since: position.offset,
            reading: position.offset,
            watermark,
            end: None,
            ahead: position,
            idle: false,
            quiet_since: None,
        };
        self.parts.push(part);
    }

    fn part(&self, partition: u32) -> usize {
        let at = self.parts.iter().position(|p| p.number == partition);
        at.unwrap_or_else(|| panic!("partition {partition} is not source task {}'s", self.index))
    }

    fn register_late(&mut self) {
        if fault::active(Fault::JoinAlone) {
            for part in self.parts.iter_mut().filter(|p| !p.idle) {
                let value = self.place.value(part.number, Some(part.watermark));
                part.watermark = part.watermark.max(value);
            }
        }
    }

    fn finish_part(&self, at: usize) {
        let part = &self.parts[at];
        if fault::active(Fault::FinishedLeaves) && part.end.is_some_and(|end| part.next.offset >= end) {
            self.place.leave(part.number);
        }
    }

    /// Its partitions: number, where to read on, and whether a run until the end still reads it.
    pub fn partitions(&self) -> impl Iterator<Item = (u32, Position, bool)> {
        self.parts.iter().map(|p| (p.number, p.next, p.end.is_none_or(|end| p.next.offset < end)))
    }

    /// The partition's event-time watermark. A runner with data of several partitions gives the lowest first.
    pub fn watermark(&self, partition: u32) -> i64 {
        self.parts[self.part(partition)].watermark
    }

    /// Whether every partition of a run until the end has reached its captured end.
    pub fn finished(&self) -> bool {
        self.mode == Mode::UntilEnd && self.partitions().all(|(_, _, reads)| !reads)
    }

    /// Records of one partition, read from where the task stands.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    ///
    /// # Panics
    ///
    /// If the partition is not the task's.
    pub fn fetched(&mut self, fetched: Fetched, out: &mut TaskOutput) -> Result<(), StepError> {
        self.register_late();
        let at = self.part(fetched.partition);
        let part = &mut self.parts[at];
        let (end, from) = (part.end.unwrap_or(i64::MAX), part.next.offset);
        let records = |batch: &RecordBatch| !batch.is_empty() && batch.offset(0) < end;
        if part.idle && fetched.batches.iter().any(records) {
            // JOIN: it returns at max(own, floor), before its rows are stamped.
            part.idle = false;
            let value = self.place.join(part.number, part.watermark);
            joined(&mut self.joins, part.number, part.next.offset, part.watermark, value);
            part.watermark = value;
        }
        part.quiet_since = None;
        out.epoch = self.epoch;
        for mut batch in fetched.batches {
            batch.cut(from, end);
            if !batch.is_empty() {
                self.batch(at, &batch, out)?;
            }
        }
        let part = &mut self.parts[at];
        if fetched.next.offset > part.next.offset {
            part.next = Position { offset: fetched.next.offset.min(end), ..fetched.next };
        }
        let part = &self.parts[at];
        if !part.idle {
            self.place.raise(part.number, part.watermark);
        }
        self.finish_part(at);
        Ok(())
    }

    /// Runs a batch; record by record where a record of it made the job panic before.
    fn batch(&mut self, at: usize, batch: &RecordBatch, out: &mut TaskOutput) -> Result<(), StepError> {
        let partition = self.parts[at].number;
        let offsets = batch.offset(0)..batch.offset(batch.len() - 1) + 1;
        self.parts[at].reading = offsets.end;
        if !self.care.concerns(partition, &offsets) {
            return self.caught(at, batch, offsets, false, out);
        }
        for one in (0..batch.len()).map(|i| batch.only(i)) {
            let offset = one.offset(0);
            match self.care.buried(partition, offset) {
                Some(tried) => self.bury(tried, one.record(0), out),
                None => self.caught(at, &one, offset..offset + 1, true, out)?,
            }
        }
        Ok(())
    }

    /// Runs records through the chain. Where the job's code panics the task is of no more use.
    fn caught(
        &mut self,
        at: usize,
        records: &RecordBatch,
        offsets: Range<i64>,
        alone: bool,
        out: &mut TaskOutput,
    ) -> Result<(), StepError> {
        let (part, head) = (&mut self.parts[at], &mut self.head);
        let (partition, published) = (part.number, self.sent);
        let mut cx = Cx { records, partition, published, alone, emit: &mut out.emit };
        let ran = catch_unwind(AssertUnwindSafe(|| head.run(&mut part.watermark, &mut cx)));
        let ran = ran.unwrap_or_else(|panic| {
            Err(StepError::RecordPanicked { partition, offsets, message: poison::message(&*panic) })
        });
        ran.map_err(|error| self.blame(error))
    }

    /// Which records a key may be of whose encoding panicked: rows wait for others from barrier to barrier.
    fn blame(&self, error: StepError) -> StepError {
        match error {
            StepError::KeyPanicked { message, .. } => {
                let read = self.parts.iter().map(|p| (p.number, p.since..p.reading.max(p.next.offset)));
                StepError::KeyPanicked { read: read.filter(|(_, r)| !r.is_empty()).collect(), message }
            }
            error => error,
        }
    }

    /// Sends what was combined.
    fn flush_tail(&mut self, out: &mut TaskOutput) -> Result<(), StepError> {
        let flushed = self.head.tail().map_or(Ok(()), |tail| tail.flush(&mut out.emit));
        flushed.map_err(|error| self.blame(error))
    }

    /// Writes a record to the dead letters, with the error and the number of tries in headers.
    fn bury(&self, tried: &Tried, record: RecordRef<'_>, out: &mut TaskOutput) {
        let (sink, partitions) = self.dead_letters.expect("only a job with dead letters buries records");
        let header = |name: &'static str, value: String| Header {
            name: Bytes::from_static(name.as_bytes()),
            value: Some(value.into()),
        };
        let mut letter = record.to_out();
        letter.headers.push(header("reason", format!("the job panics: {}", tried.error)));
        letter.headers.push(header("tries", tried.tries.to_string()));
        out.emit.counters.rows_in += 1;
        out.emit.counters.dead += 1;
        out.emit.record(sink, tried.partition % partitions, letter);
    }

    /// Records of this partition up to `next` have been fetched and wait to be given to [`Self::fetched`]. With at most
    /// once the next barrier commits them as read, before any of them is; otherwise this means nothing.
    ///
    /// # Panics
    ///
    /// If the partition is not the task's.
    pub fn fetched_ahead(&mut self, partition: u32, next: Position) {
        let at = self.part(partition);
        let part = &mut self.parts[at];
        if next.offset > part.ahead.offset {
            part.ahead = Position { offset: next.offset.min(part.end.unwrap_or(i64::MAX)), ..next };
        }
    }

    /// A fetch of this partition has waited in vain. `caught_up` as in [`Fetched::caught_up`]; `now` in milliseconds of
    /// any clock that does not go back.
    pub fn nothing(&mut self, partition: u32, caught_up: bool, now: i64) {
        let at = self.part(partition);
        let part = &mut self.parts[at];
        // An open transaction is not idleness: its records are there, only not readable yet.
        let since = if caught_up { *part.quiet_since.get_or_insert(now) } else { now };
        part.quiet_since = caught_up.then_some(since);
        if !part.idle && self.idle_after.is_some_and(|after| caught_up && now - since >= after) {
            part.idle = true;
            self.place.leave(part.number);
        }
    }

    /// The partition is no longer waited for (it was paused): time does not count towards idleness.
    pub fn paused(&mut self, partition: u32) {
        let at = self.part(partition);
        self.parts[at].quiet_since = None;
    }

    /// Whether the partition is idle.
    pub fn is_idle(&self, partition: u32) -> bool {
        self.parts[self.part(partition)].idle
    }

    /// Reads the job value and sends it on if it rose. Called once per batch or so, and when a fetch came back empty.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn publish(&mut self, out: &mut TaskOutput) -> Result<(), StepError> {
        self.register_late();
        self.send_time(false, out)
    }

    fn send_time(&mut self, last: bool, out: &mut TaskOutput) -> Result<(), StepError> {
        let mut value = self.place.publish();
        if fault::active(Fault::FloorSetLater) {
            (value, self.read_before) = (if last { value } else { self.read_before }, value);
            self.place.note(value);
        }
        self.send(value, out)
    }

    fn send(&mut self, value: i64, out: &mut TaskOutput) -> Result<(), StepError> {
        if value <= self.sent {
            return Ok(());
        }
        out.epoch = self.epoch;
        let earliest = self.head.tail().and_then(|tail| tail.earliest_end());
        if earliest.is_some_and(|end| end - 1 <= value) && !fault::active(Fault::TimeBeforeFlush) {
            self.flush_tail(out)?;
        }
        self.sent = value;
        for receiver in 0..self.receivers {
            out.emit.messages.push((receiver, Message::Time(value)));
        }
        Ok(())
    }

    /// The epoch ends here.
    ///
    /// # Errors
    ///
    /// If the job cannot go on.
    pub fn barrier(&mut self, last: Last, out: &mut TaskOutput) -> Result<(), StepError> {
        self.register_late();
        out.epoch = self.epoch;
        // The runner may have been late with it, and a snapshot must not depend on that where the run ends.
        self.send_time(last != Last::No, out)?;
        if last == Last::End {
            self.send(END, out)?;
        }
        if !fault::active(Fault::CombineOverBarrier) || last != Last::No {
            self.flush_tail(out)?;
        }
        for part in &mut self.parts {
            part.since = part.next.offset;
        }
        let floor = self.place.floor();
        let mut partitions = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let mut watermark = part.watermark;
            if part.idle && floor > watermark && !fault::active(Fault::IdleCommitsOwn) {
                // IDLE: it left the minimum, so windows newer than its own value may be closed.
                watermark = floor;
                joined(&mut self.joins, part.number, part.next.offset, part.watermark, floor);
            }
            // A run that ends gives back what it has not processed: a clean stop loses nothing in any mode.
            let ahead = self.guarantee == Guarantee::AtMostOnce && last == Last::No;
            let position = if ahead && part.ahead.offset > part.next.offset { part.ahead } else { part.next };
            partitions.push(PartitionSnapshot { partition: part.number, position, watermark });
        }
        let joins = std::mem::take(&mut self.joins);
        out.source = Some(SourceSnapshot { task: self.index, epoch: self.epoch, partitions, floor, joins });
        for receiver in 0..self.receivers {
            out.emit.messages.push((receiver, Message::Barrier(self.epoch)));
        }
        self.epoch += 1;
        Ok(())
    }

    /// The running epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
}
