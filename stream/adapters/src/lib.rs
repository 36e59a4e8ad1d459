//! Joins the engine to the log and to RocksDB.
//!
//! ```text
//!   tidemill-stream  io::Log ◀── BrokerLog ──▶ Broker   tidemill-broker (this process, its owner's socket, or TCP)
//!              StateBackend ◀── RocksState ──▶ RocksDB  state/<identity>/
//! ```
//!
//! `run` puts them together for one job on one data directory. Without the feature `rocksdb` there is neither `run`
//! nor any C++; the test driver of tidemill-stream needs neither.

mod decode;
mod input;
mod job;
mod log;
#[cfg(feature = "rocksdb")]
mod main_of;
#[cfg(feature = "rocksdb")]
mod rocks;
#[cfg(feature = "rocksdb")]
mod run;
#[cfg(feature = "rocksdb")]
mod running;
mod sender;
mod transaction;
#[cfg(feature = "rocksdb")]
mod tries;

/// What carries a job's records.
pub use tidemill_broker as broker;

pub use job::{JobError, JobPlan, JobSpec};
pub use log::BrokerLog;
#[cfg(feature = "rocksdb")]
pub use main_of::main;
#[cfg(feature = "rocksdb")]
pub use rocks::{RocksState, StoreEntry, dump_state};
#[cfg(feature = "rocksdb")]
pub use run::{JobRunError, RunOptions, STATE_DIR, identity, run, run_home, state_dir, state_root};
#[cfg(feature = "rocksdb")]
pub use running::{RunLock, Running, running, state_of};
