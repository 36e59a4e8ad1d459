//! Stream processing over a message log: exactly-once jobs as Rust pipelines.
//!
//! A job is a struct of arguments and a pipeline; see [`prelude`] for what one needs. `tidemill::main` makes a
//! program of one job; a program of its own opens a [`Directory`], appends, reads, and starts jobs on it.
//!
//! ```
//! use std::time::Duration;
//! use tidemill::prelude::*;
//!
//! /// Words per five seconds.
//! #[derive(JobArgs)]
//! struct Words {
//!     /// Topic to read: lines of text.
//!     #[arg(default = "lines")]
//!     input: String,
//!     /// Topic to write.
//!     #[arg(default = "words")]
//!     output: String,
//! }
//!
//! impl Job for Words {
//!     const NAME: &'static str = "words";
//!     fn build(&self, flow: &Flow) -> Result<()> {
//!         flow.source(topic(&self.input), Text)
//!             .event_time(|_| 0, EventTime::out_of_order(Duration::from_secs(1)))
//!             .flat_map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>())
//!             .key_by(|word| word.clone())
//!             .window(Tumbling::of(Duration::from_secs(5)))
//!             .count("per-word")
//!             .drop_late()
//!             .map(|w| format!("{} {}", w.key, w.value))
//!             .to(topic(&self.output), Text);
//!         Ok(())
//!     }
//! }
//!
//! let job = JobSpec::of::<Words>("words per five seconds");
//! assert!(job.build(&["input=text".to_owned()]).is_ok());
//! ```

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

/// What a job needs.
///
/// A program that makes topics, appends, reads and runs jobs itself also takes [`Directory`].
pub mod prelude {
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
