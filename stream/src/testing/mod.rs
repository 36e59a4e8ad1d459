//! Running jobs without threads, clocks, files or networks: for the tests of jobs and of the engine itself.

mod memory_log;
mod process;
pub mod random;

pub use memory_log::{EndFate, MemoryLog};
pub use process::ProcessError;
