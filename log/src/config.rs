//! What an opener of a directory chooses.

use crate::clock::{Clock, SystemClock};
use crate::probe::Probe;
use std::sync::Arc;

/// May the open create the directory's files?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Create {
    /// Yes, where there are none.
    IfMissing,
    /// No: [`OpenError::Missing`](crate::OpenError::Missing) instead.
    #[default]
    Never,
}

/// Settings of a [`Log`](crate::Log).
#[derive(Clone, Debug)]
pub struct Config {
    /// See [`Create`].
    pub create: Create,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Seed of topic uuids and of the directory id; `None` takes them from the system.
    pub seed: Option<u64>,
    /// Size of a journal file, for a directory that is created; an existing one keeps its own.
    pub journal_file_bytes: u64,
    /// Most journal files.
    pub journal_files_max: usize,
    /// Requests that may wait for room in the journal; more are answered with [`WriteError::Busy`](crate::WriteError::Busy).
    pub backlog_max: usize,
    /// Files kept open.
    pub open_files_max: usize,
    /// The last producer epoch before the next producer id is taken; `None` is Kafka's. Tests make it small.
    pub last_epoch: Option<i16>,
    /// Told where the log is.
    pub probe: Probe,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            create: Create::Never,
            clock: Arc::new(SystemClock::default()),
            seed: None,
            journal_file_bytes: 16 << 20,
            // 16 files of 16 MiB: a checkpoint every 128 MiB. More would be zero-filled before any is used twice,
            // and replayed after a crash.
            journal_files_max: 16,
            backlog_max: 4096,
            open_files_max: 256,
            last_epoch: None,
            probe: Probe::default(),
        }
    }
}
