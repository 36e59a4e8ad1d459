//! Runs a job on a data directory: what `streamctl run` and `tidemill::main` call.
//!
//! Layout: the job's state is in `state/<identity>/` of the data directory, whichever process owns the log there. A job
//! whose broker is reached by its address keeps it in [`STATE_DIR`] of the folder it runs in. [`RunOptions::state`]
//! names another place; that the job runs, and with what place, is told in the data directory all the same ([`run_home`]). A
//! state directory that belongs to another log, or to none, costs a rebuild from the changelog:
//! the positions in it name topics by their identity.
//! Half of the state memory goes to the overlays of the tasks, half to RocksDB.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tidemill_broker::Access;
use tidemill_stream::Guarantee;
use tidemill_stream::args::ByteSize;
use tidemill_stream::engine::poison::{self, PoisonPolicy};
use tidemill_stream::engine::{CommitPolicy, Mode};
use tidemill_stream::names::{BadName, Identity};
use tidemill_stream::runtime::{self, Monitor, RunConfig, RunError, RunReport};
use tidemill_stream::state::{StateBackend, StateError};

use crate::job::{JobError, JobPlan, JobSpec};
use crate::running::RunLock;
use crate::tries::FileBook;
use crate::{BrokerLog, RocksState};

/// Least memory that is of any use: below it RocksDB flushes for every few rows.
const STATE_MEMORY_MIN: u64 = 512 << 10;

/// Where the state of jobs is kept if nothing else is said and the log is elsewhere.
pub const STATE_DIR: &str = "./tidemill-state";

/// How a job is run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Its identity; the job's name if none is given.
    pub name: Option<String>,
    /// How it ends.
    pub mode: Mode,
    /// `key=value` arguments.
    pub sets: Vec<String>,
    /// Threads; the cores if none is given.
    pub tasks: Option<usize>,
    /// Time between commits.
    pub commit_interval: Duration,
    /// Memory for state, RocksDB included.
    pub state_memory: ByteSize,
    /// The folder that holds the state directories of jobs; see [`state_root`] for the default.
    pub state: Option<PathBuf>,
    /// What a crash may do to output; the job's own guarantee if none is given.
    pub guarantee: Option<Guarantee>,
    /// How often a record may make the job panic before it goes to the dead letters.
    pub poison_tries: u32,
    /// When the store is written and flushed; for tests. The commit interval above counts.
    pub policy: CommitPolicy,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            name: None,
            mode: Mode::Unbounded,
            sets: Vec::new(),
            tasks: None,
            commit_interval: Duration::from_millis(200),
            state_memory: ByteSize(256 << 20),
            state: None,
            guarantee: None,
            poison_tries: poison::TRIES,
            policy: CommitPolicy::default(),
        }
    }
}

/// Why a job did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum JobRunError {
    /// Its arguments.
    #[error(transparent)]
    Job(#[from] JobError),
    /// Its name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// Too little memory.
    #[error("a state memory of {given} is too small: give at least {}", ByteSize(STATE_MEMORY_MIN))]
    Memory {
        /// What was asked for.
        given: ByteSize,
    },
    /// It runs already.
    #[error("`{identity}` runs already{}: end it first, or run this one under another `--name`", held_by(*pid))]
    Running {
        /// Its identity.
        identity: Identity,
        /// The process that runs it, where it said so.
        pid: Option<u32>,
    },
    /// The file that says that it runs.
    #[error("the files that say that `{identity}` runs cannot be made or locked in {} and beside its state", path.display())]
    Lock {
        /// Its identity.
        identity: Identity,
        /// The folder of the one that is looked for from outside.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its state directory.
    #[error("the state in {} cannot be opened: another process uses it, or this one may not", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: StateError,
    },
    /// The run itself.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl JobRunError {
    /// Whether the command line is to be corrected (exit code 2), rather than something outside (1).
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Job(_) | Self::Name(_) | Self::Memory { .. } => true,
            Self::Run(error) => error.is_usage(),
            Self::Running { .. } | Self::Lock { .. } | Self::State { .. } => false,
        }
    }

    /// The error and its causes, outermost first, each once.
    pub fn chain(&self) -> Vec<String> {
        if let Self::Run(error) = self {
            return error.chain();
        }
        let mut all = vec![self.to_string()];
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let text = error.to_string();
            // Some say their cause themselves.
            if !all.last().is_some_and(|said| said.ends_with(&text)) {
                all.push(text);
            }
            cause = error.source();
        }
        all
    }
}

fn held_by(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" in process {pid}"))
}

/// The identity of a run: `--name`, else the job's name.
///
/// # Errors
///
/// If it breaks the rules of topic names.
pub fn identity(job: &JobSpec, name: Option<&str>) -> Result<Identity, BadName> {
    Identity::new(name.unwrap_or(job.name))
}

/// The folder that holds the state directories of jobs: the one that is given, else `state` in the data directory, else
/// [`STATE_DIR`].
pub fn state_root(data: Option<&Path>, given: Option<&Path>) -> PathBuf {
    match (given, data) {
        (Some(given), _) => given.to_owned(),
        (None, Some(data)) => data.join("state"),
        (None, None) => PathBuf::from(STATE_DIR),
    }
}

/// The folder that says which jobs run: `state` in the data directory, wherever they keep their state, so that whoever
/// looks at the directory finds them; the state root where the log is reached by its address.
pub fn run_home(data: Option<&Path>, given: Option<&Path>) -> PathBuf {
    state_root(data, given.filter(|_| data.is_none()))
}

/// Where a job keeps its state in a data directory, if nothing else is said.
pub fn state_dir(data: &Path, identity: &Identity) -> PathBuf {
    state_root(Some(data), None).join(identity.as_str())
}

/// Runs a job until its end or until `monitor` stops it. Blocks, so call it from a thread of its own (or
/// `spawn_blocking`), never from a future; requests run on `runtime`, which is to outlive the call.
///
/// # Errors
///
/// If the arguments are wrong, the state cannot be opened, or the run cannot start or go on. What was committed stays.
pub fn run(
    job: &JobSpec,
    access: &Access,
    options: &RunOptions,
    runtime: &tokio::runtime::Handle,
    monitor: &Monitor,
) -> Result<RunReport, JobRunError> {
    let JobPlan { plan, .. } = job.build(&options.sets)?;
    let guarantee = options.guarantee.unwrap_or(plan.guarantee());
    let plan = plan.with_guarantee(guarantee);
    let identity = identity(job, options.name.as_deref())?;
    if options.state_memory.0 < STATE_MEMORY_MIN {
        return Err(JobRunError::Memory { given: options.state_memory });
    }
    let memory = usize::try_from(options.state_memory.0).unwrap_or(usize::MAX);
    let root = state_root(access.path(), options.state.as_deref());
    let path = root.join(identity.as_str());
    let home = run_home(access.path(), options.state.as_deref());
    let lock = match RunLock::take(&home, &root, &identity) {
        Ok(Ok(lock)) => lock,
        Ok(Err(by)) => return Err(JobRunError::Running { identity, pid: by.map(|by| by.pid) }),
        Err(source) => return Err(JobRunError::Lock { identity, path: home, source }),
    };
    let idle_after_ms = plan.source().event_time.and_then(|time| time.idle_after_ms());
    lock.begin(idle_after_ms);
    let backend: Arc<dyn StateBackend> = match plan.step() {
        Some(_) => {
            let opened = RocksState::open(&path, memory / 2);
            Arc::new(opened.map_err(|source| JobRunError::State { path: path.clone(), source })?)
        }
        // Nothing is ever written to it.
        None => Arc::new(tidemill_stream::state::MemoryState::default()),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let interval = i64::try_from(options.commit_interval.as_millis()).unwrap_or(i64::MAX).max(1);
    let config = RunConfig {
        identity,
        mode: options.mode,
        tasks: options.tasks.unwrap_or(cores).max(1),
        overlay_bytes_max: memory / 2,
        policy: CommitPolicy { interval, ..options.policy },
        poison: PoisonPolicy { tries: options.poison_tries, book: Arc::new(FileBook::new(&path)) },
    };
    let log = BrokerLog::new(access.clone(), runtime.clone());
    std::thread::scope(|scope| {
        // Dropped with the run, however it ends: then the other end returns.
        let (_running, ended) = mpsc::channel();
        let (name, lock) = ("run-status".to_owned(), &lock);
        // Without it the run is only not seen from outside.
        let told = std::thread::Builder::new()
            .name(name)
            .spawn_scoped(scope, move || lock.tell(monitor, idle_after_ms, &ended));
        if let Err(error) = told {
            tracing::debug!(%error, "no thread to tell what the run is at");
        }
        Ok(runtime::run(&plan, &config, &log, &backend, monitor)?)
    })
}
