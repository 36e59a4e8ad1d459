//! Partitioned log: record batches, segments, one journal, transactions, recovery.

pub mod batch;
mod checkpoint;
mod clock;
mod config;
mod core;
#[cfg(test)]
mod crash_test;
pub mod dump;
mod entry;
mod error;
pub mod fault;
pub mod fs;
mod journal;
mod live;
mod names;
mod notify;
mod open;
mod plan;
mod probe;
mod recovery;
mod segment;
mod segment_writer;
mod slot;
mod state;
mod ticket;
#[cfg(test)]
mod transactions_test;
mod types;
mod writer;

pub use clock::{Clock, SystemClock};
pub use config::{Config, Create};
pub use error::{Corruption, OpenError, ReadError, Refusal, WriteError};
pub use live::{Log, Released, Status};
pub use probe::{Moment, Probe};
pub use ticket::Ticket;
pub use types::*;
