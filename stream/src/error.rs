//! The crate's errors, cut by what the caller does about them.

use std::ops::Range;

use crate::codec::BadState;
use crate::engine::poison::KeyAndWindow;
use crate::io::LogError;
use crate::key::NotAKey;
use crate::names::{BadName, Mismatch};
use crate::plan::SinkId;
use crate::state::StateError;

/// What [`crate::Job::build`] and the functions around it return.
pub type Result<T, E = PlanError> = std::result::Result<T, E>;

/// The job cannot be built: its author corrects it.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A name that cannot be a topic's.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A stream ends in nothing.
    #[error("the stream after {step} has no sink: end it with `.to(topic, codec)`")]
    NoSink {
        /// The last step of the stream.
        step: String,
    },
    /// The job reads nothing.
    #[error("the job has no source: start with `flow.source(topic(..), decoder)`")]
    NoSource,
    /// More than one source.
    #[error("the job has a second source `{topic}`: a job reads one topic for now")]
    SecondSource {
        /// The second source's topic.
        topic: String,
    },
    /// More than one keyed step.
    #[error(
        "`{step}` is a second keyed step: a job has one for now; write the first one's results to a topic and read that with a second job"
    )]
    SecondKeyedStep {
        /// The second step's name.
        step: String,
    },
    /// A window over a source without event time.
    #[error(
        "`{step}` windows rows of `{topic}`, which has no event time: call `.event_time(..)` on the source"
    )]
    NoEventTime {
        /// The keyed step.
        step: String,
        /// The source.
        topic: String,
    },
    /// A window of no size.
    #[error(
        "the windows of `{step}` have a size below one millisecond or an offset that is not below their size"
    )]
    BadWindow {
        /// The keyed step.
        step: String,
    },
    /// A topic is both read and written, or written in two roles.
    #[error("topic `{topic}` is used twice, {first} and {second}")]
    TopicUsedTwice {
        /// The topic.
        topic: String,
        /// One use.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// An argument or condition of the job's own.
    #[error("{0}")]
    Job(String),
}

/// A task cannot go on: nothing of its epoch is committed. The job stops (its author or its input is to be corrected);
/// after a panic it has a few tries more ([`crate::engine::poison`]).
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A record is not one of the source's rows, and the job says nothing about such records.
    #[error(
        "the record at offset {offset} of partition {partition} cannot be read: {reason}; send such records to a topic with `.dead_letter_to(..)` or drop them with `.skip_malformed()`"
    )]
    Malformed {
        /// The source's partition.
        partition: u32,
        /// The record's offset.
        offset: i64,
        /// Why.
        reason: String,
    },
    /// The job's code panicked in the chain behind the source.
    #[error(
        "the job panics at {}: {message}; send such records to a topic with `.dead_letter_to(..)`, or mend the job",
        records(*partition, offsets)
    )]
    RecordPanicked {
        /// The source's partition.
        partition: u32,
        /// The record's offset; of a batch, before it is known which record it was, all its offsets.
        offsets: Range<i64>,
        /// The panic's message.
        message: String,
    },
    /// A key's encoding panicked, of one of the rows that waited to be sent on together.
    #[error(
        "the encoding of a key panics, of a record read {}: {message}; mend `Key::encode`",
        read.iter().map(|(partition, offsets)| records(*partition, offsets)).collect::<Vec<_>>().join(" or ")
    )]
    KeyPanicked {
        /// Partitions and offsets that the source task read since its last barrier.
        read: Vec<(u32, Range<i64>)>,
        /// The panic's message.
        message: String,
    },
    /// The job's code panicked in the keyed step or in the chain behind it.
    #[error(
        "step `{step}` panics{}: {message}; mend the job, or keep such rows out with a filter before the step",
        group.as_ref().map(|g| format!(" at {g}")).unwrap_or_default()
    )]
    StepPanicked {
        /// The step.
        step: String,
        /// The group; `None` before it is known which it was, and where it was none.
        group: Option<Box<KeyAndWindow>>,
        /// The panic's message.
        message: String,
    },
    /// A row has no encoding.
    #[error("a row for sink {} has no encoding: {reason}", sink.index())]
    Unencodable {
        /// The sink.
        sink: SinkId,
        /// Why.
        reason: String,
    },
    /// A key in state is not of the job's key type.
    #[error("state of step `{step}`: {source}")]
    Key {
        /// The step.
        step: String,
        /// Which key.
        source: NotAKey,
    },
    /// A value in state is not of the job's accumulator type.
    #[error("state of step `{step}`: {source}")]
    Value {
        /// The step.
        step: String,
        /// What is wrong.
        source: BadState,
    },
    /// The state store failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// A row that is not late met a closed window: the engine broke its own promise.
    #[error(
        "step `{step}` task {task} at event time {reached}, closed through {closed}, got a row for the window that ends at {window_end}: an engine fault, please report it"
    )]
    ClosedWindow {
        /// The step.
        step: String,
        /// The task.
        task: usize,
        /// The event-time watermark it acted on.
        reached: i64,
        /// Its `closed_through`.
        closed: i64,
        /// The row's window.
        window_end: i64,
    },
    /// Tasks snapshot at different values of time: the engine broke its own promise.
    #[error(
        "at the end of epoch {epoch} one task is at event time {first}, task {task} at {second}: an engine fault, please report it"
    )]
    Unaligned {
        /// The epoch.
        epoch: u64,
        /// The first task's event-time watermark.
        first: i64,
        /// A task that differs.
        task: usize,
        /// Its event-time watermark.
        second: i64,
    },
}

fn records(partition: u32, offsets: &Range<i64>) -> String {
    match offsets.end - offsets.start {
        1 => format!("the record at offset {} of partition {partition}", offsets.start),
        _ => format!(
            "one of the records at offsets {} to {} of partition {partition}",
            offsets.start,
            offsets.end - 1
        ),
    }
}

/// The job cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A name is over-long.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The input topic is not there.
    #[error("input topic `{topic}` does not exist: make it with `streamctl topic create {topic}`")]
    NoInput {
        /// The topic.
        topic: String,
    },
    /// The identity was used for something else.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// A changelog has another number of partitions than the job has shards.
    #[error("changelog `{topic}` has {found} partitions, the job has {shards} shards: it is not this job's")]
    Changelog {
        /// The topic.
        topic: String,
        /// Its partitions.
        found: u32,
        /// The job's shards.
        shards: u16,
    },
    /// What was committed beside the offsets, or the job's record, is not the engine's.
    #[error("what `{identity}` committed cannot be read: {what}; run under another `--name`")]
    Corrupt {
        /// The identity.
        identity: String,
        /// Which part.
        what: String,
    },
    /// A reset of the identity was cut short: its state may be gone while its offsets are still there.
    #[error("a reset of `{identity}` began and did not end: `streamctl reset {identity}` completes it")]
    ResetBegan {
        /// The identity.
        identity: String,
    },
    /// The log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The state store failed.
    #[error(transparent)]
    State(#[from] StateError),
}
