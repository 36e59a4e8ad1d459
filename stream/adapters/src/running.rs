//! That a job runs, and what it is at: a locked file beside its state, for commands that look from outside.
//!
//! ```text
//!   <state root>/<identity>~run      locked while the job runs; one JSON object, written anew about once a second
//! ```
//!
//! No identity has a `~` in it, so the name is never another job's folder. The lock is the truth: a process that is
//! killed loses it. What is written is for people and may be a second old; nothing that must be right rests on it, so
//! it is not synced, and a full disk only makes it older.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tidemill_stream::names::Identity;
use tidemill_stream::runtime::{Monitor, Progress};

/// How long a start waits for the process that held the lock before it to be gone.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// The pace at which what a run is at is written.
const PACE: Duration = Duration::from_secs(1);

/// What a run says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Its process.
    pub pid: u32,
    /// When this was written, in milliseconds since the epoch.
    pub at_ms: i64,
    /// `starting`, `running`, `aligning`, `ending` or `over`.
    pub phase: String,
    /// Records read since the run began.
    pub rows_in: u64,
    /// Records whose epoch is committed.
    pub rows_committed: u64,
    /// Commits.
    pub commits: u64,
    /// Output records in the open transaction.
    pub open_rows: u64,
    /// The event-time watermark of the last commit.
    pub event_time: Option<i64>,
    /// Event-time watermarks by input partition; `None` does not take part: it is idle.
    pub partitions: Vec<Option<i64>>,
    /// After how many milliseconds a quiet partition is idle, if ever.
    pub idle_after_ms: Option<i64>,
}

impl Running {
    fn now(progress: &Progress, idle_after_ms: Option<i64>) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            pid: std::process::id(),
            at_ms: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
            phase: progress.phase.to_owned(),
            rows_in: progress.counters.rows_in,
            rows_committed: progress.rows_committed,
            commits: progress.commits,
            open_rows: progress.open_rows,
            event_time: progress.event_time,
            partitions: progress.partitions.clone(),
            idle_after_ms,
        }
    }
}

/// The lock of a job that runs. Dropped with the run.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

fn path(root: &Path, identity: &Identity) -> PathBuf {
    root.join(format!("{identity}~run"))
}

impl RunLock {
    /// Takes the lock of a job that is to run, in the folder of the states of jobs; waits a few seconds for a process that is just ending.
    ///
    /// # Errors
    ///
    /// If the file cannot be made or locked. `Ok(Err(..))` is what the process says that holds it.
    pub fn take(root: &Path, identity: &Identity) -> io::Result<Result<Self, Option<Running>>> {
        Self::take_within(root, identity, LOCK_WAIT)
    }

    /// The same without waiting, for a command that wants the job not to run.
    ///
    /// # Errors
    ///
    /// As [`Self::take`].
    pub fn try_take(root: &Path, identity: &Identity) -> io::Result<Result<Self, Option<Running>>> {
        Self::take_within(root, identity, Duration::ZERO)
    }

    fn take_within(
        root: &Path,
        identity: &Identity,
        wait: Duration,
    ) -> io::Result<Result<Self, Option<Running>>> {
        let path = path(root, identity);
        std::fs::create_dir_all(root)?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let deadline = Instant::now() + wait;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Ok(Self { file })),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(TryLockError::WouldBlock) => return Ok(Err(read(&file))),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }

    /// Writes what the run is at until the other end of `ended` is dropped.
    pub(crate) fn tell(&self, monitor: &Monitor, idle_after_ms: Option<i64>, ended: &Receiver<()>) {
        let mut last = Vec::new();
        loop {
            let now = Running::now(&monitor.progress(), idle_after_ms);
            let mut text = serde_json::to_vec(&Running { at_ms: 0, ..now.clone() }).unwrap_or_default();
            // A run that stands still is written once.
            if text != last {
                last.clone_from(&text);
                text = serde_json::to_vec(&now).unwrap_or_default();
                text.push(b'\n');
                if let Err(error) = self.write(&text) {
                    tracing::debug!(%error, "what the run is at cannot be written");
                }
            }
            if ended.recv_timeout(PACE) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }

    fn write(&self, text: &[u8]) -> io::Result<()> {
        self.file.write_all_at(text, 0)?;
        self.file.set_len(text.len() as u64)
    }
}

/// What the holder wrote; `None` where it is being written, or nothing is there.
fn read(file: &File) -> Option<Running> {
    // A reader may meet a write: the next look is whole.
    (0..5).find_map(|_| {
        let mut text = vec![0; usize::try_from(file.metadata().ok()?.len()).ok()?];
        file.read_exact_at(&mut text, 0).ok()?;
        serde_json::from_slice(&text).ok()
    })
}

/// Whether the job runs on this machine with this folder of states: `None` no, `Some(None)` yes, and it said nothing yet.
///
/// # Errors
///
/// If the file is there and cannot be looked at.
pub fn running(root: &Path, identity: &Identity) -> io::Result<Option<Option<Running>>> {
    let file = match File::open(path(root, identity)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(read(&file))),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_runs_is_seen_and_keeps_others_out() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::new("job").unwrap();
        assert_eq!(running(dir.path(), &identity).unwrap(), None, "nothing ran here");
        let lock = RunLock::take(dir.path(), &identity).unwrap().unwrap();
        assert_eq!(running(dir.path(), &identity).unwrap(), Some(None));
        let (done, ended) = std::sync::mpsc::channel();
        drop(done);
        lock.tell(&Monitor::new(), Some(7), &ended);
        let seen = running(dir.path(), &identity).unwrap().flatten().unwrap();
        assert_eq!((seen.pid, seen.idle_after_ms), (std::process::id(), Some(7)));
        assert_eq!(RunLock::try_take(dir.path(), &identity).unwrap().unwrap_err(), Some(seen));
        drop(lock);
        assert_eq!(running(dir.path(), &identity).unwrap(), None);
        assert!(RunLock::try_take(dir.path(), &identity).unwrap().is_ok());
    }
}
