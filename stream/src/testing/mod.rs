//! Running jobs without threads, clocks, files or networks: for the tests of jobs and of the engine itself.

mod backend_suite;
mod driver;
mod memory_log;
mod process;
pub mod random;

pub use backend_suite::backend_suite;
pub use driver::{CrashChanges, DriveError, Row, TestDriver};
pub use memory_log::{EndFate, MemoryLog, MemoryLogCopy};
pub use process::ProcessError;
