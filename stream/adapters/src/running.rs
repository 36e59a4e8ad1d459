//! That a job runs, and what it is at: a locked file beside its state, for commands that look from outside.
//!
//! ```text
//!   <home>/<identity>~run      locked while the job runs; one JSON object, written anew about once a second
//!     home: `state` in the data directory, wherever --state has the state; the state root where the log is reached by
//!     its address
//!   <state root>/<identity>~run      locked too, where that is another file: two logs do not share one state
//! ```
//!
//! So whoever looks at the data directory finds the run and, in what it wrote, the root it keeps its state in
//! ([`state_of`]). That stays when the run is over: a later command finds the state of a job that stopped or was killed.
//! A start that is refused leaves it as it was: what it names is the state of the last run that ran.
//!
//! No identity has a `~` in it, so the name is never another job's folder. The lock is the truth: a process that is
//! killed loses it. What is written is for people and may be a second old; nothing that must be right rests on it, so
//! it is not synced, and a full disk only makes it older.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tidemill_stream::names::Identity;
use tidemill_stream::runtime::{Monitor, Progress};

/// How long a start waits for the process that held the lock before it to be gone.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// The pace at which what a run is at is written; before it runs, so that a short one is not missed.
const PACE: Duration = Duration::from_secs(1);
const START_PACE: Duration = Duration::from_millis(50);

/// What a run says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Its process.
    pub pid: u32,
    /// The state root it was given, absolute; `None` is the home itself, so that a data directory may be moved.
    #[serde(default)]
    pub state: Option<PathBuf>,
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
    fn now(progress: &Progress, idle_after_ms: Option<i64>, state: Option<PathBuf>) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            pid: std::process::id(),
            state,
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
    /// The locks beside states that are kept elsewhere.
    elsewhere: Vec<File>,
    /// The state root, where that is elsewhere.
    state: Option<PathBuf>,
    /// What the run before said of its own; `None` if none said anything.
    before: Option<Option<PathBuf>>,
}

fn path(home: &Path, identity: &Identity) -> PathBuf {
    home.join(format!("{identity}~run"))
}

/// Makes the file that is locked, and its folder.
fn make(folder: &Path, identity: &Identity) -> io::Result<File> {
    std::fs::create_dir_all(folder)?;
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path(folder, identity))
}

/// Locks it; `false` if somebody else holds it until the deadline.
fn lock(file: &File, deadline: Instant) -> io::Result<bool> {
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

impl RunLock {
    /// Takes the lock of a job that is to run, in its home and beside its state; waits a few seconds for a process that is
    /// just ending.
    ///
    /// # Errors
    ///
    /// If a file cannot be made or locked. `Ok(Err(..))` is what the process says that holds it.
    pub fn take(
        home: &Path,
        state_root: &Path,
        identity: &Identity,
    ) -> io::Result<Result<Self, Option<Running>>> {
        Self::take_within(home, &[state_root.to_owned()], identity, LOCK_WAIT)
    }

    /// The same without waiting, for a command that wants the job not to run, with any of these state roots.
    ///
    /// # Errors
    ///
    /// As [`Self::take`].
    pub fn try_take(
        home: &Path,
        state_roots: &[PathBuf],
        identity: &Identity,
    ) -> io::Result<Result<Self, Option<Running>>> {
        Self::take_within(home, state_roots, identity, Duration::ZERO)
    }

    fn take_within(
        home: &Path,
        state_roots: &[PathBuf],
        identity: &Identity,
        wait: Duration,
    ) -> io::Result<Result<Self, Option<Running>>> {
        let deadline = Instant::now() + wait;
        let file = make(home, identity)?;
        if !lock(&file, deadline)? {
            return Ok(Err(read(&file)));
        }
        let same = |a: &File, b: &File| -> io::Result<bool> {
            let (a, b) = (a.metadata()?, b.metadata()?);
            Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
        };
        let before = read(&file).map(|last| last.state);
        let mut taken = Self { file, elsewhere: Vec::new(), state: None, before };
        for root in state_roots {
            let other = make(root, identity)?;
            // However the folders were spelled: a second lock of the same file would wait for the first one.
            let mut held = std::iter::once(&taken.file).chain(&taken.elsewhere);
            if held.try_fold(false, |held, file| Ok::<_, io::Error>(held || same(file, &other)?))? {
                continue;
            }
            if !lock(&other, deadline)? {
                return Ok(Err(read(&other)));
            }
            taken.elsewhere.push(other);
            taken.state = Some(std::path::absolute(root)?);
        }
        Ok(Ok(taken))
    }

    /// Writes that the run starts, over what the one before wrote, but for where that one has its state.
    pub(crate) fn begin(&self, idle_after_ms: Option<i64>) {
        self.write_if_new(&Monitor::new().progress(), false, idle_after_ms, &mut Vec::new());
    }

    /// Writes what the run is at until the other end of `ended` is dropped.
    pub(crate) fn tell(&self, monitor: &Monitor, idle_after_ms: Option<i64>, ended: &Receiver<()>) {
        let (mut last, mut ran) = (Vec::new(), false);
        loop {
            let over = ended.recv_timeout(if ran { PACE } else { START_PACE });
            let progress = monitor.progress();
            ran |= progress.running || progress.commits > 0;
            self.write_if_new(&progress, ran, idle_after_ms, &mut last);
            if over != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }

    /// A run that stands still is written once. Its state is named from when it ran: a start may still be refused.
    fn write_if_new(&self, progress: &Progress, ran: bool, idle_after_ms: Option<i64>, last: &mut Vec<u8>) {
        let state = self.before.as_ref().filter(|_| !ran).unwrap_or(&self.state);
        let now = Running::now(progress, idle_after_ms, state.clone());
        let mut text = serde_json::to_vec(&Running { at_ms: 0, ..now.clone() }).unwrap_or_default();
        if text == *last {
            return;
        }
        last.clone_from(&text);
        text = serde_json::to_vec(&now).unwrap_or_default();
        text.push(b'\n');
        if let Err(error) = self.write(&text) {
            tracing::debug!(%error, "what the run is at cannot be written");
        }
    }

    fn write(&self, text: &[u8]) -> io::Result<()> {
        // Beside the state for whoever finds that one locked.
        for file in std::iter::once(&self.file).chain(&self.elsewhere) {
            file.write_all_at(text, 0)?;
            file.set_len(text.len() as u64)?;
        }
        Ok(())
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

/// Whether the job runs on this machine with this home: `None` no, `Some(None)` yes, and it said nothing yet.
///
/// # Errors
///
/// If the file is there and cannot be looked at.
pub fn running(home: &Path, identity: &Identity) -> io::Result<Option<Option<Running>>> {
    let file = match File::open(path(home, identity)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(read(&file))),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The state root of the run that lives or, if none does, of the last one that told: what it was given, else its home.
///
/// # Errors
///
/// If the file is there and cannot be looked at.
pub fn state_of(home: &Path, identity: &Identity) -> io::Result<PathBuf> {
    let last = match File::open(path(home, identity)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        opened => read(&opened?),
    };
    Ok(last.and_then(|last| last.state).unwrap_or_else(|| home.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_runs_is_seen_and_keeps_others_out() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::new("job").unwrap();
        assert_eq!(running(dir.path(), &identity).unwrap(), None, "nothing ran here");
        let lock = RunLock::take(dir.path(), dir.path(), &identity).unwrap().unwrap();
        assert_eq!(running(dir.path(), &identity).unwrap(), Some(None));
        let (done, ended) = std::sync::mpsc::channel();
        drop(done);
        lock.tell(&Monitor::new(), Some(7), &ended);
        let seen = running(dir.path(), &identity).unwrap().flatten().unwrap();
        assert_eq!((seen.pid, seen.idle_after_ms), (std::process::id(), Some(7)));
        assert_eq!(RunLock::try_take(dir.path(), &[], &identity).unwrap().unwrap_err(), Some(seen));
        drop(lock);
        assert_eq!(running(dir.path(), &identity).unwrap(), None);
        assert!(RunLock::try_take(dir.path(), &[], &identity).unwrap().is_ok());
    }

    #[test]
    fn a_state_elsewhere_is_found_from_the_home_and_shared_by_no_two_homes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let identity = Identity::new("job").unwrap();
        assert_eq!(state_of(&at("home"), &identity).unwrap(), at("home"), "nothing ran here");
        let lock = RunLock::take(&at("home"), &at("x"), &identity).unwrap().unwrap();
        lock.begin(None);
        assert_eq!(state_of(&at("home"), &identity).unwrap(), at("x"));
        let pid = Some(std::process::id());
        for (home, root) in [("home", "y"), ("home", "home"), ("another", "x")] {
            let held = RunLock::try_take(&at(home), &[at(root)], &identity).unwrap().unwrap_err();
            assert_eq!(held.map(|by| by.pid), pid, "{home} {root}");
        }
        drop(lock);
        assert_eq!(state_of(&at("home"), &identity).unwrap(), at("x"), "it outlives the run");
        // The same folder under another name is no second lock.
        let lock = RunLock::take(&at("home"), &at("x/../home"), &identity).unwrap().unwrap();
        lock.begin(None);
        assert_eq!(state_of(&at("home"), &identity).unwrap(), at("x"), "this start may still be refused");
        lock.write_if_new(&Progress::default(), true, None, &mut Vec::new());
        assert_eq!(state_of(&at("home"), &identity).unwrap(), at("home"));
    }
}
