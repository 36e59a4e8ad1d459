//! Stream processing over a message log: exactly-once jobs as Rust pipelines.
//!
//! A job is a struct of arguments and a pipeline: a source, event time, operators, a keyed window, sinks. It reads a topic
//! of the log, and its output, its state and the offsets it has read are committed together, in one transaction: it may be
//! killed at any moment, and every record counts once.
//!
//! ```
//! use std::time::Duration;
//! use tidemill::prelude::*;
//!
//! /// Words per window, of lines such as `1431857103000 word`.
//! #[derive(JobArgs)]
//! struct Words {
//!     /// Topic to read: lines of text.
//!     #[arg(default = "lines", guarded)]
//!     input: String,
//!     /// Length of a window.
//!     #[arg(default = "10s", guarded)]
//!     window: Duration,
//! }
//!
//! impl Job for Words {
//!     const NAME: &'static str = "words";
//!     fn build(&self, flow: &Flow) -> Result<()> {
//!         flow.source(topic(&self.input), Text)
//!             .event_time(
//!                 |line| Timestamp(line.split(' ').next().and_then(|t| t.parse().ok()).unwrap_or(0)),
//!                 EventTime::out_of_order(Duration::from_secs(2)),
//!             )
//!             .key_by(|line| line.split(' ').nth(1).unwrap_or_default().to_owned())
//!             .window(Tumbling::of(self.window))
//!             .count("per-word")
//!             .late_to(topic("words-late"))
//!             .map(|w| format!("{} {}", w.key, w.value))
//!             .to(topic("word-counts"), Text);
//!         Ok(())
//!     }
//! }
//!
//! // With a clock of one's own, and crashed at every step of every commit.
//! use tidemill::testing::{DriveError, TestDriver};
//!
//! let words = || TestDriver::new(&Words { input: "lines".into(), window: Duration::from_secs(10) });
//! let script = |driver: &mut TestDriver<Words>| {
//!     driver.send(0, "1000 apple").send(1, "2000 pear").send(0, "9000 apple");
//!     driver.commit()?;
//!     driver.send(1, "13000 pear");
//!     driver.until_end().map(|_| ())
//! };
//! let mut driver = words()?;
//! script(&mut driver)?;
//! let mut counts: Vec<String> = driver.outputs().into_iter().map(|row| row.value).collect();
//! counts.sort();
//! assert_eq!(counts, ["apple 2", "pear 1", "pear 1"]);
//!
//! let crashes = TestDriver::crash_at_every_step(words, script)?;
//! assert!(crashes > 0, "and none of them changed a row");
//! # Ok::<(), DriveError>(())
//! ```
//!
//! # A crate of one's own
//!
//! `streamctl new words` writes one, with a job, its program and such a test; `streamctl run ./words` builds and runs it,
//! with all the options of `streamctl run`. The crate depends on this one, and its program on `streamctl`, behind a feature:
//! so its tests compile no C++ (RocksDB).
//!
//! # A program of one's own
//!
//! `streamctl::main` is all of `streamctl` with jobs of one's own; `tidemill::main` (feature `rocksdb`) runs one job and does
//! nothing else. A program that makes topics, appends, reads and runs jobs itself opens a [`Directory`].
//!
//! # Where to look
//!
//! | | |
//! |---|---|
//! | [`prelude`] | everything a job is written with |
//! | [`Flow`](prelude::Flow) | the operators, from source to sink |
//! | [`Directory`] | a data directory from inside a program: topics, producers, readers, jobs |
//! | [`args`] | arguments of a job, and what their text may be |
//! | [`testing`] | running a job without threads, clock, files or network |
//! | [`io`], [`state`] | what the engine asks of a log and of a state store |
//! | [`adapters`] | the log over a broker, the state in RocksDB, and running a job on a data directory |
//!
//! What a job's output is a function of, and what is promised when, is `docs/semantics.md`.

mod directory;

#[cfg(feature = "rocksdb")]
pub use directory::RunningJob;
pub use directory::{
    AccessEvent, Directory, DirectoryError, Isolation, NewRecord, Outcome, Producer, Reader, Record, Sent,
    StartAt, Transaction,
};
pub use tidemill_adapters as adapters;
/// Topics, producers and consumers as futures: what [`Directory`] is a thin layer over.
pub use tidemill_adapters::broker;
pub use tidemill_adapters::{JobError, JobPlan, JobSpec};
#[cfg(feature = "rocksdb")]
pub use tidemill_adapters::{JobRunError, RunOptions, main};
pub use tidemill_stream as stream;
pub use tidemill_stream::{Guarantee, args, engine, io, names, record, runtime, state, testing};

pub mod prelude {
    //! What a job is written with: `use tidemill::prelude::*;`.
    //!
    //! | | |
    //! |---|---|
    //! | [`Job`], [`Plan`], [`JobSpec`] | a job: its name and pipeline; the pipeline, checked; a job by name, as a registry lists it |
    //! | [`JobArgs`], [`ByteSize`] | its arguments, derived from its fields; a number of bytes such as `64KiB` |
    //! | [`Flow`], [`topic`] | where a pipeline begins; a topic by name |
    //! | [`Decoder`], [`decode_with`], [`Text`], [`Json`], [`RecordRef`], [`Malformed`] | reading records: the trait, a function as one, lines, JSON; a record; why it cannot be read |
    //! | [`Encoder`] | writing records; [`Text`] and [`Json`] do |
    //! | [`EventTime`], [`Timestamp`] | how event time advances; a moment of it |
    //! | [`Key`] | what rows can be grouped by: integers, strings, bytes, IP addresses |
    //! | [`Tumbling`], [`Window`] | windows of one size; the result of one |
    //! | [`Guarantee`] | how often a record counts when a run is killed |
    //! | [`Result`] | of building a pipeline; a second type makes it the ordinary one |
    //!
    //! ```
    //! use tidemill::prelude::*;
    //!
    //! /// Copies the lines that hold a word.
    //! #[derive(JobArgs)]
    //! struct Grep {
    //!     /// The word.
    //!     word: String,
    //! }
    //!
    //! impl Job for Grep {
    //!     const NAME: &'static str = "grep";
    //!     fn build(&self, flow: &Flow) -> Result<()> {
    //!         let word = self.word.clone();
    //!         flow.source(topic("lines"), Text).filter(move |line| line.contains(&word)).to(topic("found"), Text);
    //!         Ok(())
    //!     }
    //! }
    //!
    //! let grep = JobSpec::of::<Grep>("lines that hold a word");
    //! assert_eq!(grep.build(&["word=tide".to_owned()])?.plan.sinks().len(), 1);
    //! assert_eq!(grep.build(&[]).unwrap_err().to_string(), "argument `word` is required: give it as word=...");
    //! # Ok::<(), tidemill::JobError>(())
    //! ```

    pub use tidemill_adapters::JobSpec;
    pub use tidemill_stream::args::{ByteSize, JobArgs};
    pub use tidemill_stream::{
        Decoder, Encoder, EventTime, Flow, Guarantee, Job, Json, Key, Malformed, Plan, RecordRef, Result,
        Text, Timestamp, Tumbling, Window, decode_with, topic,
    };
}

/// The README's code compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
