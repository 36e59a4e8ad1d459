//! Tidemill's dataflow engine: pipelines over a message log whose counts are exact however often they are killed.
//!
//! A [`Job`] builds a pipeline from the [DSL](Flow): a source, event time, operators, a keyed window, sinks. The
//! [`Plan`] checks it. The [`engine`] runs it as state machines that know no threads and no clock; the threads runtime
//! drives them in production and the test driver in tests, crashes included. The crate knows neither log
//! nor network nor RocksDB, only the traits in [`io`] and [`state`].
//!
//! ```
//! use std::time::Duration;
//! use tidemill_stream::*;
//!
//! struct Words;
//!
//! impl Job for Words {
//!     const NAME: &'static str = "words";
//!     fn build(&self, flow: &Flow) -> Result<()> {
//!         flow.source(topic("lines"), Text)
//!             .event_time(|line| line.len() as i64, EventTime::out_of_order(Duration::ZERO))
//!             .flat_map(|line: String| line.split(' ').map(str::to_owned).collect::<Vec<_>>())
//!             .key_by(|word| word.clone())
//!             .window(Tumbling::of(Duration::from_secs(5)))
//!             .count("words")
//!             .drop_late()
//!             .map(|w| format!("{} {} {}", w.start, w.key, w.value))
//!             .to(topic("counts"), Text);
//!         Ok(())
//!     }
//! }
//!
//! let plan = Plan::of(&Words)?;
//! assert_eq!(plan.sinks().len(), 1);
//! # Ok::<(), PlanError>(())
//! ```

pub mod args;
mod chain;
mod codec;
mod dsl;
pub mod engine;
mod error;
pub mod fault;
mod guarantee;
mod hash;
pub mod inspect;
pub mod io;
mod key;
pub mod names;
mod plan;
mod probe;
pub mod record;
pub mod runtime;
pub mod state;
pub mod testing;
mod time;

pub use codec::{BadState, Decoder, Encoder, Json, Malformed, Text, decode_with};
pub use dsl::{Flow, IsKeyed, Keyed, LateSettled, Source, Stream, Topic, Windowed, Windows, topic};
pub use error::{PlanError, Result, StartError, StepError};
pub use guarantee::{Guarantee, NotAGuarantee};
pub use hash::{murmur2, partition_of, shard_of};
pub use key::{Key, NotAKey, Shard};
pub use plan::{Job, Plan, Role, SinkId, SinkSpec, SourceSpec, StepSpec};
pub use probe::{Moment, Phase, Probe};
pub use record::{Header, OutRecord, RecordBatch, RecordParts, RecordRef};
pub use time::{END, EventTime, MIN, Timestamp, Tumbling, Window};
