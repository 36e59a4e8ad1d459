//! Partitioned log: record batches, segments, one journal, transactions, recovery.

pub mod batch;
mod clock;
mod config;
mod error;
pub mod fault;
pub mod fs;
mod live;
pub mod sidecar;
mod ticket;
mod types;

pub use clock::{Clock, SystemClock};
pub use config::{Config, Create};
pub use error::{Corruption, OpenError, ReadError, Refusal, WriteError};
pub use live::{Log, Released, Status};
pub use ticket::Ticket;
pub use types::*;
