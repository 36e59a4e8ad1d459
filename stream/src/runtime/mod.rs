//! The threads runtime: runs the engine's machines on threads, over any [`Log`] and [`StateBackend`].
//!
//! ```text
//!   feeder ─▶ task 0 ═╤═ task 1 ═╤═ …        a dedicated thread per task: source chain and keyed chain of its number
//!      ▲          └───┴─ events ─┴──▶ coordinator (the caller's thread) ──▶ log: transactions
//!     log: input                         └──▶ store thread ──▶ StateBackend
//! ```
//!
//! One *start* is: recover ([`recovery::start`]), make the machines, run the threads until the run ends, something
//! fails, or a transaction is aborted. Everything made for a start is thrown away at its end; where the failure may pass
//! (the log was out of reach, the transaction was aborted) another start follows from the last commit.
//!
//! Invariants
//! * A step never waits: see `wiring`. The coordinator never waits for a task.
//! * The first failure is reported, with its step; every thread is joined before the run returns.
//! * A stop ends after a commit, so that the next run continues exactly there; a second stop ends at once.
//!
//! Left out: more than one keyed step, partitions added to a topic while the job runs.

mod commit;
mod error;
mod feed;
mod monitor;
mod task;
mod wiring;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant, SystemTime};

pub use error::RunError;
pub use monitor::{Monitor, Progress, Stop};

use self::commit::{Commits, Outcome, StoreWork};
use self::monitor::Base;
use self::task::{Failed, TaskThread};
use self::wiring::{Wiring, channel};
use crate::engine::poison::{self, Care, PoisonPolicy, Triage, Verdict};
use crate::engine::recovery::{self, Setup, Started};
use crate::engine::{
    CommitPolicy, Coordinator, Counters, KeyedTask, Layout, Mode, SourceTask, Start, Summary, TaskOutput,
};
use crate::io::{Input, Log};
use crate::names::Identity;
use crate::plan::Plan;
use crate::probe::Moment;
use crate::state::StateBackend;

/// Events that wait for the coordinator.
const EVENTS: usize = 1_024;

/// Bytes of output that are not in the log yet at which tasks read no further input.
const HELD_BYTES_MAX: usize = 16 << 20;

/// Starts in a row without a commit after which a run gives up.
const RESTARTS_MAX: u32 = 5;

/// First wait between two starts; doubled each time.
const RESTART_WAIT: Duration = Duration::from_millis(100);

/// What a run is asked to be.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// Consumer group, transactional id, prefix of the changelogs.
    pub identity: Identity,
    /// How it ends.
    pub mode: Mode,
    /// Threads.
    pub tasks: usize,
    /// Memory of the overlays of all tasks.
    pub overlay_bytes_max: usize,
    /// When commits and store writes are due.
    pub policy: CommitPolicy,
    /// What happens to input that makes the job panic.
    pub poison: PoisonPolicy,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// Commits, output rows, and windows closed before their time.
    pub summary: Summary,
    /// What the tasks counted.
    pub counters: Counters,
    /// Changelog records replayed by the first start.
    pub replayed: u64,
    /// Shards rebuilt by the first start.
    pub rebuilt: u32,
    /// How long the first start took.
    pub recovery: Duration,
    /// Times the run returned to its last commit.
    pub restarts: u32,
    /// From the first start to the end.
    pub took: Duration,
    /// True if it was asked to stop before its end.
    pub stopped: bool,
}

impl RunReport {
    /// Whether the run found no input behind the last commit.
    pub fn found_nothing(&self) -> bool {
        self.counters.rows_in == 0
    }
}

/// Runs a plan until its end or a stop. Blocks; `monitor` shows and stops it from other threads.
///
/// # Errors
///
/// If the job cannot start or go on: see [`RunError`]. What was committed stays.
pub fn run(
    plan: &Plan,
    config: &RunConfig,
    log: &dyn Log,
    backend: &Arc<dyn StateBackend>,
    monitor: &Monitor,
) -> Result<RunReport, RunError> {
    let began = Instant::now();
    let mut layout = Layout::new(plan, config.tasks, config.overlay_bytes_max);
    // What a source task combines is memory too: with a small budget the table is small.
    layout.combine_groups_max = layout.combine_groups_max.min(layout.overlay_bytes_max / 256).max(64);
    let setup = Setup { plan: plan.clone(), identity: config.identity.clone(), layout, mode: config.mode };
    let mut patient = Patient::admit(plan, &config.poison)?;
    let mut base = Base::default();
    let mut report = RunReport::default();
    let mut failures = 0;
    loop {
        monitor.starting();
        let commits = monitor.progress().commits;
        let ended = one_start(&setup, config, log, backend, monitor, &mut patient, &mut base, &mut report);
        let after = monitor.progress();
        (base.commits, base.output) = (after.commits, after.output_committed);
        report.counters = after.counters;
        let error = match ended {
            Ok(Outcome::Done(summary)) => {
                patient.leave(&after.committed)?;
                report.summary.closed_early = summary.closed_early;
                (report.summary.epochs, report.summary.committed_rows) =
                    (after.commits, after.output_committed);
                report.stopped = monitor.asked() != Stop::No;
                report.took = began.elapsed();
                return Ok(report);
            }
            Ok(Outcome::Aborted) => RunError::Aborted,
            Err(error) if error.is_passing() => error,
            Err(error) => match patient.failed(&error).map_err(|tries| tries.after(&error))? {
                Some(Verdict::Again) if monitor.asked() == Stop::No => {
                    // The record, or what names it, is known by now: there is nothing to wait for.
                    returns(config, monitor, &error, &mut report);
                    continue;
                }
                _ => return Err(error),
            },
        };
        // A stop after a commit gets one: who asked for it may ask again, and then nobody waits for another try.
        if monitor.asked() == Stop::AtOnce {
            return Err(error);
        }
        failures = if after.commits > commits { 1 } else { failures + 1 };
        if failures > RESTARTS_MAX {
            return Err(RunError::Unreachable { restarts: failures - 1, source: Box::new(error) });
        }
        returns(config, monitor, &error, &mut report);
        monitor.pause(RESTART_WAIT * 2u32.pow(failures.min(5)));
    }
}

/// Tells that the run starts again.
fn returns(config: &RunConfig, monitor: &Monitor, error: &RunError, report: &mut RunReport) {
    let cause = error.chain().join(": ");
    tracing::warn!(identity = %config.identity, cause, "the job returns to its last commit");
    report.restarts += 1;
    monitor.update(|p| {
        p.restarts += 1;
        p.returned_because = Some(cause);
    });
}

/// What a run knows of panics, and where it is kept. Saved before every restart: a kill then changes no count.
struct Patient<'a> {
    triage: Triage,
    policy: &'a PoisonPolicy,
    saved: Vec<poison::Tried>,
}

impl<'a> Patient<'a> {
    fn admit(plan: &Plan, policy: &'a PoisonPolicy) -> Result<Self, RunError> {
        let saved = policy.book.load().map_err(|source| RunError::Tries { after: None, source })?;
        Ok(Self { triage: Triage::new(plan, policy.tries, saved.clone()), policy, saved })
    }

    fn save(&mut self) -> Result<(), RunError> {
        if self.saved != self.triage.tried() {
            self.saved = self.triage.tried().to_vec();
            self.policy.book.save(&self.saved).map_err(|source| RunError::Tries { after: None, source })?;
        }
        Ok(())
    }

    fn begin(&mut self, start: &Start) -> Result<Care, RunError> {
        let care = self.triage.begin(start);
        self.save().map(|()| care)
    }

    /// `None` if the error is no panic.
    fn failed(&mut self, error: &RunError) -> Result<Option<Verdict>, RunError> {
        let verdict = match error {
            RunError::Step { source, .. } => self.triage.failed(source),
            RunError::Panicked { .. } => Some(self.triage.panicked_elsewhere()),
            _ => None,
        };
        self.save().map(|()| verdict)
    }

    fn leave(&mut self, committed: &BTreeMap<u32, i64>) -> Result<(), RunError> {
        self.triage.committed(committed);
        self.save()
    }
}

/// Recovers, runs the threads, joins them.
#[expect(clippy::too_many_arguments, reason = "what a run has, for one start of it")]
fn one_start(
    setup: &Setup,
    config: &RunConfig,
    log: &dyn Log,
    backend: &Arc<dyn StateBackend>,
    monitor: &Monitor,
    patient: &mut Patient<'_>,
    base: &mut Base,
    report: &mut RunReport,
) -> Result<Outcome, RunError> {
    let began = Instant::now();
    let started = recovery::start_watched(setup, log, &**backend, monitor.probe())?;
    let Started { mut start, transactions } = started;
    start.care = patient.begin(&start)?;
    let start = start;
    let recovery = began.elapsed();
    tracing::info!(
        identity = %setup.identity, replayed = start.replayed, rebuilt = start.rebuilt,
        millis = recovery.as_millis() as u64, "started from the last commit"
    );
    if base.offsets.is_empty() {
        base.offsets = start.partitions.iter().map(|p| (p.partition, p.position.offset)).collect();
        (report.replayed, report.rebuilt, report.recovery) = (start.replayed, start.rebuilt, recovery);
    }
    monitor.update(|p| {
        (p.replayed, p.rebuilt, p.recovery) = (start.replayed, start.rebuilt, recovery);
        // As the coordinator: without a watermark it was never committed, and its offset is the log's start.
        let committed = start.partitions.iter().filter(|at| at.watermark.is_some());
        p.began = committed.map(|at| (at.partition, at.position.offset)).collect();
        p.committed.clone_from(&p.began);
        (p.running, p.phase) = (true, "running");
    });
    monitor.probe().at(Moment::Running);
    let positions: Vec<_> = start.partitions.iter().map(|p| (p.partition, p.position)).collect();
    let input = log.input(&start.input.id, &positions)?;
    let machines = Machines::new(&start, backend)?;

    let (events, told) = mpsc::sync_channel(EVENTS);
    let numbers: Vec<u32> = positions.iter().map(|(p, _)| *p).collect();
    let clock = Clock::start();
    let (wiring, parkers, feeder) = Wiring::new(start.layout.sources, &numbers, events);
    let (store, work) = mpsc::sync_channel(4);
    let threads = machines.threads(&wiring, parkers, clock);
    let mut commits = Commits {
        coordinator: Coordinator::new(start.clone(), config.policy),
        transactions,
        group: &start.group,
        sources: start.layout.sources,
        keyed: start.layout.keyed,
        place: threads.place,
        store,
        wiring: Arc::clone(&wiring),
        told: &told,
        monitor,
        base,
        clock,
        stop_told: false,
        shown: clock.now(),
        pace: commit::Pace::default(),
        at: Moment::Running,
    };
    thread::scope(|scope| {
        let mut handles = Vec::new();
        let made = spawn_all(
            scope,
            &mut handles,
            Spawn {
                start: &start,
                tasks: threads.tasks,
                feeder,
                input,
                work,
                backend: &**backend,
                wiring: &wiring,
                monitor,
                clock,
            },
        );
        let outcome = match made {
            Ok(()) => commits.run(),
            Err(e) => Err(RunError::Thread(e)),
        };
        // The store's thread ends with its sender; the others with the flag.
        drop(commits);
        wiring.shut_down();
        for handle in handles {
            // A panic inside was caught and reported there.
            let _ = handle.join();
        }
        // A failure of a thread explains the coordinator's, which only saw the flag.
        match (outcome, wiring.failure()) {
            (Ok(Outcome::Done(summary)), _) => Ok(Outcome::Done(summary)),
            (Err(error), None) => Err(error),
            (Err(RunError::StoppedAtOnce) | Ok(Outcome::Aborted), Some(failure)) => Err(failure),
            (outcome, _) => outcome,
        }
    })
}

/// The machines of one start, before they have threads.
struct Machines {
    place: Arc<crate::engine::Place>,
    sources: Vec<SourceTask>,
    keyed: Vec<KeyedTask>,
}

struct Threads {
    place: Arc<crate::engine::Place>,
    tasks: Vec<TaskThread>,
}

impl Machines {
    fn new(start: &Start, backend: &Arc<dyn StateBackend>) -> Result<Self, RunError> {
        let place = start.place();
        let sources =
            (0..start.layout.sources).map(|i| SourceTask::new(start, i, Arc::clone(&place))).collect();
        let keyed = (0..start.layout.keyed).map(|i| {
            KeyedTask::new(start, i, Arc::clone(backend))
                .map_err(|error| task::failed(&start.plan, i, Failed { part: task::AT_KEYED, error }))
        });
        let keyed = keyed.collect::<Result<_, _>>()?;
        Ok(Self { place, sources, keyed })
    }

    /// A thread per number, with a channel from every source to every keyed task.
    fn threads(
        self,
        wiring: &Arc<Wiring>,
        parkers: Vec<crossbeam_utils::sync::Parker>,
        clock: Clock,
    ) -> Threads {
        let n = parkers.len();
        let mut outlets: Vec<Vec<_>> = (0..n).map(|_| Vec::new()).collect();
        let mut inlets: Vec<Vec<_>> = (0..n).map(|_| Vec::new()).collect();
        for (sender, outlets) in outlets.iter_mut().enumerate().take(self.sources.len()) {
            for (receiver, inlets) in inlets.iter_mut().enumerate().take(self.keyed.len()) {
                let (outlet, inlet) = channel(&wiring.ports[sender].waker, &wiring.ports[receiver].waker);
                outlets.push(outlet);
                inlets.push(inlet);
            }
        }
        let mut sources = self.sources.into_iter();
        let mut keyed = self.keyed.into_iter();
        let tasks = parkers.into_iter().enumerate().zip(inlets.into_iter().zip(outlets));
        let tasks = tasks.map(|((index, parker), (inlets, outlets))| TaskThread {
            index,
            source: sources.next(),
            keyed: keyed.next(),
            inlets,
            outlets,
            wiring: Arc::clone(wiring),
            parker,
            clock,
            out: TaskOutput::default(),
            keyed_out: TaskOutput::default(),
            finished: false,
            at: Arc::new(AtomicU8::new(task::AT_SOURCE)),
        });
        Threads { place: self.place, tasks: tasks.collect() }
    }
}

struct Spawn<'a> {
    start: &'a Start,
    tasks: Vec<TaskThread>,
    feeder: crossbeam_utils::sync::Parker,
    input: Box<dyn Input>,
    work: Receiver<StoreWork>,
    backend: &'a dyn StateBackend,
    wiring: &'a Arc<Wiring>,
    monitor: &'a Monitor,
    clock: Clock,
}

/// Makes all threads of a start. After an error those that were made end with the flag.
fn spawn_all<'scope, 'env>(
    scope: &'scope thread::Scope<'scope, 'env>,
    handles: &mut Vec<ScopedJoinHandle<'scope, ()>>,
    spawn: Spawn<'env>,
) -> std::io::Result<()> {
    let Spawn { start, tasks, feeder, input, work, backend, wiring, monitor, clock } = spawn;
    let named = |name: String| thread::Builder::new().name(name);
    for mut task in tasks {
        let (index, at) = (task.index, Arc::clone(&task.at));
        handles.push(named(format!("task-{index}")).spawn_scoped(scope, move || {
            let ran = std::panic::catch_unwind(AssertUnwindSafe(|| task.run()));
            let step = || task::step_name(&start.plan, at.load(Ordering::Relaxed));
            match ran {
                Ok(Ok(())) => {}
                Ok(Err(failed)) => wiring.fail(task::failed(&start.plan, index, failed)),
                Err(panic) => wiring.fail(panicked(format!("task {index}"), step(), &*panic)),
            }
        })?);
    }
    handles.push(named("feeder".to_owned()).spawn_scoped(scope, move || {
        let ran = AssertUnwindSafe(|| feed::run(start, input, wiring, &feeder, clock));
        match std::panic::catch_unwind(ran) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => wiring.fail(error.into()),
            Err(panic) => {
                wiring.fail(panicked("the feeder".to_owned(), "reading the input".to_owned(), &*panic))
            }
        }
    })?);
    handles.push(named("store".to_owned()).spawn_scoped(scope, move || {
        let ran = AssertUnwindSafe(|| commit::store_thread(backend, &work, wiring, monitor));
        match std::panic::catch_unwind(ran) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => wiring.fail(error.into()),
            Err(panic) => {
                wiring.fail(panicked("the store's thread".to_owned(), "writing state".to_owned(), &*panic));
            }
        }
    })?);
    Ok(())
}

fn panicked(task: String, step: String, panic: &(dyn std::any::Any + Send)) -> RunError {
    RunError::Panicked { task, step, message: poison::message(panic) }
}

/// Milliseconds since a start; does not go back.
#[derive(Clone, Copy, Debug)]
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn now(self) -> i64 {
        // One, so that "until 0" is over at once.
        i64::try_from(self.0.elapsed().as_millis()).unwrap_or(i64::MAX).saturating_add(1)
    }
}

/// Milliseconds since the epoch.
fn wall_clock() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
