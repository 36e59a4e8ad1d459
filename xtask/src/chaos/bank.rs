//! The supervisor: real processes under load, hit again and again, then stopped cleanly and checked.
//!
//! ```text
//!   feeder ─lines─▶ produce ──▶ [ owner of the log: the job, or serve ] ◀── run ip-count      status lines ─▶ supervisor
//!                      ╳ SIGKILL         ╳ SIGKILL, crash point, SIGSTOP        ╳ the same, tasks and state dir changed
//!   at the end: input ends, the job stops, a bounded run closes every window, the owner stops ─▶ verifier
//! ```
//!
//! A *leg* is one data directory in one layout; a bank is some legs. Everything it does is drawn from its seed, though
//! not the moments at which processes get somewhere: a violation is repeated by its seed more often than not.
//!
//! Rules of the supervisor:
//!
//! * A process that ends by itself, unless at its crash point, is a failure of the bank. There are two excuses
//!   (`Excuse`): it lived when the owner it needs was stopped for longer than it waits, and says of that owner that it
//!   is silent; or it had just been started when the owner that is served was killed, and says that nobody listens.
//!   Such ends are counted.
//! * A kill counts as one that hit an open transaction only if the job had said a while ago that output goes into it, and
//!   not yet that it is about to end. Where the job died of it the files have the last word: their aborted transactions are
//!   counted, too. One that only the owner died of goes on, and usually commits.
//! * When a kill comes is drawn, counted from the start of the cycle or from the job's first output behind its first
//!   commit, and nothing that was seen later moves it. Only where fewer than half hit are some more added that wait for
//!   an open transaction: at most half as many as were asked for, and they are counted by themselves.
//! * Lines are never produced twice: after a producer died the next one goes on with lines nobody was given.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::check::{Expected, Produced, Topics, Verdict, check};
use super::history::Files;
use super::load::Load;
use super::plan::{Blow, CrashPoint, Cycle, Layout, Plan, StateDir, Victim};
use super::process::{Process, Producer, Seen};
use super::random::mix;
use crate::recount::Settings;

const TOPICS: Topics<'static> =
    Topics { input: "access-log", output: "ip-counts", late: "ip-counts-late", dead: "ip-count-dead-letter" };
const SETTINGS: Settings = Settings { partitions: 4, window_ms: 1_000, bound_ms: 3_000 };
/// Lines a second. Few, so that a cycle costs what starts and recoveries cost, not what counting does.
const RATE: u64 = 8_000;
/// Lines per second of event time: twenty windows close a second, so output is nearly always in the transaction.
const EVENT_RATE: u64 = 400;
const ADDRESSES: u64 = 100;
/// The longest anything may take that has no reason to take long; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a process runs, and at least until the job has committed something, before it is asked to end because its
/// crash point was not reached; and how long where the job commits nothing.
const CRASH_WITHIN: Duration = Duration::from_millis(1500);
const CRASH_AT_LAST: Duration = Duration::from_secs(15);
/// How long a kill that is to hit an open transaction waits for one.
const PUT_OFF: Duration = Duration::from_secs(20);
/// Of a hundred kills so many are to hit an open transaction, or some are added that wait for one. More than half: some
/// turn out in the files to have missed it.
const HITS_IN_HUNDRED: u32 = 54;
/// How often the processes are looked after meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// A client of the same directory gives an owner up that is silent for 5 s, and may take a while to end then. Over TCP
/// it waits for longer than anybody is stopped.
const SILENCE: Duration = Duration::from_millis(4_500);
const EXCUSED: Duration = Duration::from_secs(15);

/// What a leg is to do.
#[derive(Debug, Clone)]
pub struct Leg {
    /// The binary.
    pub streamctl: PathBuf,
    /// A new folder for it, which the caller keeps or removes.
    pub dir: PathBuf,
    /// Who owns the log.
    pub layout: Layout,
    /// Chooses everything.
    pub seed: u64,
    /// How many kills.
    pub kills: u32,
    /// Passed to `run`; none: exactly once.
    pub guarantee: Option<String>,
    /// Crash points to be hit.
    pub crash_points: Vec<(Victim, CrashPoint)>,
}

/// What was done and found.
#[derive(Debug, Default)]
pub struct Report {
    /// Kills of job and owner; a crash at a point is one.
    pub kills: u32,
    /// Of them those that hit an open transaction with uncommitted input, as the job said.
    pub hits: u32,
    /// Of the hits those that only the log's owner died of: the job finds the next owner and goes on with its transaction.
    pub outlived: u32,
    /// Of the kills those that waited for an open transaction, and how many of them hit one.
    pub aimed: (u32, u32),
    /// Kills by phase of the job, then by how it was done.
    pub phases: BTreeMap<String, BTreeMap<&'static str, u32>>,
    /// Kills by the step that was about to be taken.
    pub steps: BTreeMap<String, u32>,
    /// Crash points that were reached.
    pub crash_points: BTreeMap<String, u32>,
    /// SIGSTOPs that stopped somebody.
    pub stops: u32,
    /// SIGSTOPs there must have been: every tenth cycle is one.
    pub stops_due: u32,
    /// Clients that ended because the owner they needed was stopped or not there, and said so.
    pub excused: u32,
    /// SIGKILLs of producers.
    pub producers_killed: u32,
    /// State directories deleted and replaced by a stale copy.
    pub states: (u32, u32),
    /// What the verifier found, summed up.
    pub verdict: Verdict,
}

impl Report {
    /// Adds what another leg did.
    pub fn add(&mut self, other: Report) {
        self.kills += other.kills;
        self.hits += other.hits;
        self.outlived += other.outlived;
        self.aimed = (self.aimed.0 + other.aimed.0, self.aimed.1 + other.aimed.1);
        for (phase, kinds) in other.phases {
            let mine = self.phases.entry(phase).or_default();
            kinds.into_iter().for_each(|(kind, n)| *mine.entry(kind).or_default() += n);
        }
        other.steps.into_iter().for_each(|(step, n)| *self.steps.entry(step).or_default() += n);
        other.crash_points.into_iter().for_each(|(step, n)| *self.crash_points.entry(step).or_default() += n);
        self.stops += other.stops;
        self.stops_due += other.stops_due;
        self.excused += other.excused;
        self.producers_killed += other.producers_killed;
        self.states = (self.states.0 + other.states.0, self.states.1 + other.states.1);
        self.verdict.add(other.verdict);
    }
}

/// Told after each cycle; and whether somebody wants it all to stop.
pub struct Watch<'a> {
    /// Kills so far in this leg.
    pub told: &'a dyn Fn(&Report),
    /// Set by Ctrl-C.
    pub interrupted: Arc<AtomicBool>,
}

/// Runs a leg to its end and checks what it left.
///
/// # Errors
///
/// If a process ends that should not, a crash point is not reached, or somebody interrupts. What the verifier finds
/// wrong is in the report, data that cannot be read included.
pub fn run(leg: Leg, watch: &Watch<'_>) -> Result<Report> {
    let mut supervisor = Supervisor::new(leg, watch)?;
    if let Err(error) = supervisor.cycles() {
        supervisor.end_all();
        return Err(error);
    }
    supervisor.stop_cleanly()?;
    supervisor.verify();
    Ok(supervisor.report)
}

struct Supervisor<'a> {
    leg: Leg,
    watch: &'a Watch<'a>,
    plan: Plan,
    load: Load,
    broker: Option<String>,
    owner: Option<Process>,
    job: Option<Process>,
    producer: Option<Producer>,
    /// The producer took the log over when the job died.
    producer_owns: bool,
    /// Somebody is stopped: nothing is started that would wait for it.
    stopped: bool,
    /// For the ends of processes.
    excuses: Vec<Excuse>,
    produced: Vec<Produced>,
    report: Report,
    tries: BTreeMap<String, u32>,
}

impl<'a> Supervisor<'a> {
    fn new(leg: Leg, watch: &'a Watch<'a>) -> Result<Self> {
        std::fs::create_dir_all(leg.dir.join("data"))
            .with_context(|| format!("cannot make {}", leg.dir.display()))?;
        let load = Load {
            seed: leg.seed,
            addresses: ADDRESSES,
            event_rate: EVENT_RATE,
            bound_ms: SETTINGS.bound_ms,
        };
        let plan = Plan::new(mix(leg.seed), leg.layout, leg.crash_points.clone());
        let broker = match leg.layout {
            Layout::Job => None,
            Layout::Serve => Some(format!("127.0.0.1:{}", free_port()?)),
        };
        let supervisor = Supervisor {
            leg,
            watch,
            plan,
            load,
            broker,
            owner: None,
            job: None,
            producer: None,
            producer_owns: false,
            stopped: false,
            excuses: Vec::new(),
            produced: Vec::new(),
            report: Report::default(),
            tries: BTreeMap::new(),
        };
        let partitions = SETTINGS.partitions.to_string();
        let mut create =
            supervisor.on_directory(&["topic", "create", TOPICS.input, "--partitions", &partitions]);
        Process::start("topic create", &mut create)?.ends_well(PATIENCE)?;
        Ok(supervisor)
    }

    fn cycles(&mut self) -> Result<()> {
        while self.report.kills < self.leg.kills || self.plan.left() > 0 {
            let cycle = self.plan.next(self.leg.kills.saturating_sub(self.report.kills).max(1));
            self.cycle(&cycle)
                .with_context(|| format!("after {} kills, in the cycle {cycle:?}", self.report.kills))?;
            (self.watch.told)(&self.report);
        }
        // Where too many missed some are added, until enough of all have hit. A weaker guarantee has no transactions.
        let most = if self.leg.guarantee.is_none() { self.leg.kills / 2 } else { 0 };
        while self.report.hits * 100 < self.report.kills * HITS_IN_HUNDRED && self.report.aimed.0 < most {
            let cycle = self.plan.retry();
            self.cycle(&cycle)
                .with_context(|| format!("after {} kills, in the retry {cycle:?}", self.report.kills))?;
            (self.watch.told)(&self.report);
        }
        self.report.stops_due = self.plan.stops_due();
        Ok(())
    }

    // --- one cycle ----------------------------------------------------------------------------------------------

    fn cycle(&mut self, cycle: &Cycle) -> Result<()> {
        let crash = match &cycle.blow {
            Blow::Crash(point) => Some((cycle.victim, point)),
            _ => None,
        };
        let crash_of = |victim| crash.filter(|(whose, _)| *whose == victim).map(|(_, point)| point);
        if let Some(point) = crash_of(Victim::Job) {
            self.settle()?;
            self.stop_job()?;
            if self.leg.layout == Layout::Job && point.step.starts_with("log-") {
                // It reaches that step only as the owner.
                self.kill_producer()?;
            }
        }
        if crash_of(Victim::Owner).is_some() {
            self.settle()?;
            self.stop_owner()?;
        }
        if self.producer_owns && !cycle.orphaned {
            self.kill_producer()?;
        }
        self.producer_owns &= self.producer.is_some();
        if self.job.is_none() {
            self.treat_state(cycle.state)?;
        }
        let began = Instant::now();
        if self.start_owner(crash_of(Victim::Owner))? {
            self.start_job(cycle, crash_of(Victim::Job))?;
        }
        let victim = self.victim(cycle.victim);
        match &cycle.blow {
            Blow::Kill(after) => {
                let began = self.counted_from(cycle, began)?;
                self.wait(began, *after)?;
                if cycle.aimed {
                    self.put_off()?;
                }
                self.kill(victim, if cycle.aimed { "aimed" } else { "random" })?;
            }
            Blow::WhileClosing(after, then) => {
                let began = self.counted_from(cycle, began)?;
                self.wait(began, *after)?;
                if let Some(job) = &mut self.job {
                    job.signal(Signal::TERM)?;
                    std::thread::sleep(*then);
                }
                self.kill(Victim::Job, "closing")?;
            }
            Blow::Stop(after, length, go_on) => {
                let began = self.counted_from(cycle, began)?;
                self.wait(began, *after)?;
                self.stop_and_kill(victim, *length, *go_on)?;
            }
            Blow::Crash(point) => self.crash(victim, point)?,
        }
        if cycle.producer_too && !cycle.orphaned {
            self.kill_producer()?;
        }
        // With the job gone a producer that lives on owns the log, from its next request on.
        self.producer_owns = self.leg.layout == Layout::Job && self.job.is_none() && self.producer.is_some();
        Ok(())
    }

    /// Who is there to be hit.
    fn victim(&self, wanted: Victim) -> Victim {
        let other = self.leg.layout == Layout::Serve || self.producer_owns;
        if other { wanted } else { Victim::Job }
    }

    /// From when the drawn time of a blow counts: the start of the cycle, or the job's first output behind its
    /// first commit.
    fn counted_from(&mut self, cycle: &Cycle, began: Instant) -> Result<Instant> {
        if !cycle.from_output {
            return Ok(began);
        }
        while began.elapsed() < PUT_OFF && self.job.as_ref().is_some_and(|job| !job.seen().has_output) {
            self.tend()?;
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(Instant::now())
    }

    /// Waits until this long after `began`; a process that ends meanwhile is a failure.
    fn wait(&mut self, began: Instant, after: Duration) -> Result<()> {
        while let Some(left) = after.checked_sub(began.elapsed()) {
            self.tend()?;
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
        self.tend()
    }

    /// Looks after the processes: they must be alive, and the load must go on.
    fn tend(&mut self) -> Result<()> {
        self.check_alive()?;
        if !self.stopped {
            self.start_producer()?;
        }
        Ok(())
    }

    fn check_alive(&mut self) -> Result<()> {
        ensure!(!self.watch.interrupted.load(Ordering::Relaxed), Interrupted);
        if let Some(owner) = &mut self.owner {
            self.report.excused += alive(owner, &self.excuses)?;
        }
        if let Some(job) = &mut self.job {
            let excused = alive(job, &self.excuses)?;
            self.report.excused += excused;
            if excused > 0 {
                self.job = None;
            }
        }
        if let Some(producer) = &mut self.producer {
            let excused = alive(&mut producer.process, &self.excuses)?;
            self.report.excused += excused;
            if excused > 0 {
                self.produced.extend(self.producer.take().map(Producer::produced));
            }
        }
        Ok(())
    }

    /// Waits until output is in the transaction.
    fn put_off(&mut self) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < PUT_OFF {
            self.tend()?;
            let Some(job) = &self.job else { break };
            if job.seen().in_transaction() {
                break;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        self.check_alive()
    }

    fn kill(&mut self, victim: Victim, how: &'static str) -> Result<()> {
        let mut last = self.job.as_ref().map(Process::seen);
        let hit = last.as_ref().is_some_and(Seen::in_transaction);
        let mut killed = false;
        if victim != Victim::Job {
            killed |= self.kill_owner()?;
        }
        if victim != Victim::Owner
            && let Some(mut job) = self.job.take()
        {
            last = Some(job.kill()?);
            // One that was asked to end may be faster.
            let fell = fell(&mut job, how == "closing", &self.excuses)?;
            self.report.excused += u32::from(fell == Fell::Excused);
            killed |= fell == Fell::Killed;
        }
        // Whoever was to be hit may be gone: that is no kill.
        if killed {
            let how = match (victim, how) {
                (Victim::Job, how) => how,
                (_, "random") => "owner",
                (_, how) => how,
            };
            self.report.outlived += u32::from(hit && victim == Victim::Owner);
            self.count(last.as_ref(), how, hit);
        }
        Ok(())
    }

    /// A kill, at what the job said last; none: there was no job.
    fn count(&mut self, last: Option<&Seen>, how: &'static str, hit: bool) {
        let said = |word: &'_ str| if word.is_empty() { "start" } else { word }.to_owned();
        let phase = last.map_or_else(|| NO_JOB.to_owned(), |last| said(&last.phase));
        let step = last.map_or_else(|| NO_JOB.to_owned(), |last| said(&last.step));
        *self.report.phases.entry(phase).or_default().entry(how).or_default() += 1;
        *self.report.steps.entry(step).or_default() += 1;
        self.report.kills += 1;
        self.report.hits += u32::from(hit);
        if how == "aimed" {
            self.report.aimed = (self.report.aimed.0 + 1, self.report.aimed.1 + u32::from(hit));
        }
    }

    fn stop_and_kill(&mut self, victim: Victim, length: Duration, go_on: Option<Duration>) -> Result<()> {
        let stopped = self.signal(victim, Signal::STOP)?;
        if stopped.is_empty() {
            // It gave its owner up before.
            self.plan.stop_again();
            return Ok(());
        }
        self.report.stops += 1;
        self.stopped = true;
        self.excuses.extend(self.excuses_of(&stopped, length));
        // With the owner stopped nothing of the job's gets any further, either.
        self.job.iter().for_each(Process::freeze);
        let waited = self.wait(Instant::now(), length);
        self.stopped = false;
        waited?;
        if let Some(later) = go_on {
            self.signal(victim, Signal::CONT)?;
            self.job.iter().for_each(Process::thaw);
            self.wait(Instant::now(), later)?;
        }
        self.kill(victim, "stopped")?;
        // A job whose owner was killed finds the next one.
        self.job.iter().for_each(Process::thaw);
        Ok(())
    }

    /// What may end while these are stopped: who lives now and needs the one of them that owns the directory.
    fn excuses_of(&self, stopped: &[u32], length: Duration) -> Vec<Excuse> {
        if self.leg.layout != Layout::Job || length <= SILENCE {
            return Vec::new();
        }
        let job = self.job.as_ref().map(Process::pid);
        let producer = self.producer.as_ref().map(|producer| producer.process.pid());
        let clients = || [job, producer].into_iter().flatten().filter(|pid| !stopped.contains(pid)).collect();
        // Which of the two owns the directory is known to them only: the next owner is whoever asks first. It is named.
        let of = |owner: &u32| {
            let says = vec![format!("process {owner} owns "), "has said nothing for".to_owned()];
            Excuse { says, clients: clients(), until: Instant::now() + length + EXCUSED }
        };
        stopped.iter().map(of).collect()
    }

    /// What may end because the owner at the address is gone: who has not been heard of yet, and so may not have reached
    /// it. Others look for it.
    fn excuse_the_young(&mut self) {
        let Some(address) = &self.broker else { return };
        let job = self.job.as_ref().filter(|job| job.seen().phase.is_empty() || job.seen().phase == "start");
        let producer = self.producer.as_ref().map(|producer| &producer.process);
        let young = [job, producer.filter(|producer| producer.seen().durable == 0)];
        let clients: Vec<_> = young.into_iter().flatten().map(Process::pid).collect();
        if !clients.is_empty() {
            // It came too late, or its connection was cut off while it was made.
            for what in ["nobody listens at ", "cannot reach a broker at "] {
                let (says, clients) = (vec![format!("{what}{address}")], clients.clone());
                self.excuses.push(Excuse { says, clients, until: Instant::now() + EXCUSED });
            }
        }
    }

    /// Sends a signal to whom it is meant for: who is there of them.
    fn signal(&mut self, victim: Victim, signal: Signal) -> Result<Vec<u32>> {
        let job = self.job.as_mut().filter(|_| victim != Victim::Owner);
        let owner = match (&mut self.owner, &mut self.producer) {
            (Some(owner), _) => Some(owner),
            (None, producer) => producer.as_mut().map(|producer| &mut producer.process),
        };
        let mut reached = Vec::new();
        for process in [job, owner.filter(|_| victim != Victim::Job)].into_iter().flatten() {
            process.signal(signal)?;
            if process.ended()?.is_none() {
                reached.push(process.pid());
            }
        }
        Ok(reached)
    }

    /// Waits until the victim has killed itself; asks it to end where that does not come.
    fn crash(&mut self, victim: Victim, point: &CrashPoint) -> Result<()> {
        let began = Instant::now();
        let mut asked = false;
        let mut last = Seen::default();
        let killed = loop {
            ensure!(!self.watch.interrupted.load(Ordering::Relaxed), Interrupted);
            if let Some(job) = &self.job {
                last = job.seen();
                self.start_producer()?;
            }
            let process = if victim == Victim::Job { self.job.as_mut() } else { self.owner.as_mut() };
            let process = process.context("the process with the crash point was started")?;
            if process.ended()?.is_some() {
                let killed = process.was_killed()?;
                // What a dead job handed over last may not have got anywhere.
                self.job.iter().filter(|_| victim == Victim::Job).for_each(Process::freeze);
                break killed;
            }
            let worked = began.elapsed() > CRASH_WITHIN && last.commits >= 2;
            if !asked && (worked || began.elapsed() > CRASH_AT_LAST) {
                asked = true;
                process.signal(Signal::TERM)?;
            }
            let (name, said) = (process.name().to_owned(), process.said());
            ensure!(began.elapsed() < PATIENCE, "{name} neither reaches {point:?} nor ends; it said: {said}");
            std::thread::sleep(Duration::from_millis(1));
        };
        if victim != Victim::Job {
            self.excuse_the_young();
        }
        let gone = if victim == Victim::Job { self.job.take() } else { self.owner.take() };
        if let Some(mut gone) = gone {
            let status = gone.ended()?;
            let (name, said) = (gone.name(), gone.said());
            ensure!(
                killed || asked && status.is_some_and(|status| status.success()),
                "{name} ended by itself on the way to {point:?} with {status:?}; it said: {said}"
            );
            if victim == Victim::Job {
                last = gone.last_words();
            }
        }
        if killed {
            *self.report.crash_points.entry(point.step.clone()).or_default() += 1;
            // Before its end a transaction has its offsets at least.
            let hit = point.step == "end" || last.in_transaction();
            let job = self.job.is_some() || victim == Victim::Job;
            self.report.outlived += u32::from(hit && victim != Victim::Job);
            self.count(job.then_some(&last), "crash point", hit);
            return Ok(());
        }
        let tries = self.tries.entry(point.step.clone()).or_default();
        *tries += 1;
        ensure!(*tries < 6, "crash point {} was not reached in {tries} runs", point.step);
        self.plan.again(victim, &point.step);
        Ok(())
    }

    // --- processes ----------------------------------------------------------------------------------------------

    fn streamctl(&self) -> Command {
        let mut command = Command::new(&self.leg.streamctl);
        command.stdin(std::process::Stdio::null());
        for name in
            ["TIDEMILL_DATA", "TIDEMILL_BROKER", "TIDEMILL_CRASH_AT", "TIDEMILL_CHAOS", "TIDEMILL_LOG"]
        {
            command.env_remove(name);
        }
        command
    }

    fn on_directory(&self, args: &[&str]) -> Command {
        let mut command = self.streamctl();
        command.arg("--data").arg(self.leg.dir.join("data")).args(args);
        command
    }

    /// A command that uses the log, in the way of the layout.
    fn client(&self, args: &[&str]) -> Command {
        match &self.broker {
            None => self.on_directory(args),
            Some(address) => {
                let mut command = self.streamctl();
                command.args(args).arg("--broker").arg(address);
                command
            }
        }
    }

    fn crashing(command: &mut Command, point: Option<&CrashPoint>) {
        if let Some(CrashPoint { step, nth }) = point {
            command.env("TIDEMILL_CHAOS", "1").env("TIDEMILL_CRASH_AT", format!("{step}:{nth}"));
        }
    }

    /// Whether there is an owner to work with; one with a crash point may be gone by then.
    fn start_owner(&mut self, crash: Option<&CrashPoint>) -> Result<bool> {
        let Some(address) = self.broker.clone() else { return Ok(true) };
        if self.owner.is_none() {
            let mut command = self.on_directory(&["serve", "--listen", &address]);
            Self::crashing(&mut command, crash);
            self.owner = Some(Process::start("serve", &mut command)?);
        }
        let owner = self.owner.as_mut().context("it was just started")?;
        let listens = owner.wait_until(PATIENCE, |seen| seen.listening);
        ensure!(listens || crash.is_some(), "serve does not listen; it said: {}", owner.said());
        Ok(listens)
    }

    fn start_job(&mut self, cycle: &Cycle, crash: Option<&CrashPoint>) -> Result<()> {
        if self.job.is_some() {
            return Ok(());
        }
        let mut command = self.run_command(cycle.tasks, &["--state-memory", cycle.memory]);
        command.arg("--commit-interval").arg(format!("{}ms", cycle.commit_ms)).arg("--status-lines");
        Self::crashing(&mut command, crash);
        self.job = Some(Process::start("the job", &mut command)?);
        Ok(())
    }

    fn run_command(&self, tasks: u64, more: &[&str]) -> Command {
        let mut command = self.client(&["run", "ip-count", "--set", "window=1s", "--set", "out_of_order=3s"]);
        // A partition that was idle is a decision that the input does not tell: none is.
        command.args(["--set", "idle_after=1h", "--tasks", &tasks.to_string()]).args(more);
        if let Some(guarantee) = &self.leg.guarantee {
            command.args(["--guarantee", guarantee]);
        }
        if self.broker.is_some() {
            command.arg("--state").arg(self.state_dir());
        }
        command
    }

    /// Starts a producer where none is alive, once the job, where it is to own the log, does.
    fn start_producer(&mut self) -> Result<()> {
        if self.producer.is_some() {
            return Ok(());
        }
        if self.leg.layout == Layout::Job {
            let Some(job) = &self.job else { return Ok(()) };
            let seen = job.seen();
            if seen.phase.is_empty() || seen.phase == "start" && seen.step != "log-serving" {
                return Ok(());
            }
        }
        let mut command =
            self.client(&["produce", TOPICS.input, "--key-regex", "^([^ ]+)", "--status-lines"]);
        let from = self.produced.iter().map(|p| p.from + p.given).max().unwrap_or(0);
        self.producer = Some(Producer::start(&mut command, self.load, from, RATE)?);
        Ok(())
    }

    /// Kills whoever owns the log beside the job; says whether there was one.
    fn kill_owner(&mut self) -> Result<bool> {
        match self.owner.take() {
            Some(mut owner) => {
                self.excuse_the_young();
                owner.kill()?;
                Ok(fell(&mut owner, false, &[])? == Fell::Killed)
            }
            None => self.kill_producer(),
        }
    }

    fn kill_producer(&mut self) -> Result<bool> {
        let Some(mut producer) = self.producer.take() else { return Ok(false) };
        producer.process.kill()?;
        let fell = fell(&mut producer.process, false, &self.excuses)?;
        self.produced.push(producer.produced());
        self.report.producers_killed += u32::from(fell == Fell::Killed);
        self.report.excused += u32::from(fell == Fell::Excused);
        Ok(fell == Fell::Killed)
    }

    /// Lets a job whose owner was killed find the next one: asked to stop before, it would say that it cannot commit.
    fn settle(&mut self) -> Result<()> {
        self.start_owner(None)?;
        let began = Instant::now();
        let Some(before) = self.job.as_ref().map(|job| job.seen().commits) else { return Ok(()) };
        loop {
            self.tend()?;
            let Some(job) = &self.job else { return Ok(()) };
            if job.wait_until(LOOK_AGAIN, |seen| seen.commits > before) {
                return Ok(());
            }
            ensure!(began.elapsed() < PATIENCE, "the job does not commit any more; it said: {}", job.said());
        }
    }

    fn stop_job(&mut self) -> Result<()> {
        if let Some(mut job) = self.job.take() {
            job.signal(Signal::TERM)?;
            job.ends_well(PATIENCE)?;
        }
        Ok(())
    }

    fn stop_owner(&mut self) -> Result<()> {
        if let Some(mut owner) = self.owner.take() {
            owner.signal(Signal::TERM)?;
            owner.ends_well(PATIENCE)?;
        }
        Ok(())
    }

    // --- the state directory ------------------------------------------------------------------------------------

    fn state_dir(&self) -> PathBuf {
        match self.leg.layout {
            Layout::Job => self.leg.dir.join("data/state"),
            Layout::Serve => self.leg.dir.join("state"),
        }
    }

    fn treat_state(&mut self, how: StateDir) -> Result<()> {
        let (state, copy) = (self.state_dir(), self.leg.dir.join("state-copy"));
        if !state.is_dir() {
            return Ok(());
        }
        match how {
            StateDir::Kept => {}
            StateDir::Copied => {
                remove(&copy)?;
                copy_dir(&state, &copy)?;
            }
            StateDir::Deleted => {
                remove(&state)?;
                self.report.states.0 += 1;
            }
            StateDir::Stale if copy.is_dir() => {
                remove(&state)?;
                copy_dir(&copy, &state)?;
                self.report.states.1 += 1;
            }
            StateDir::Stale => {}
        }
        Ok(())
    }

    // --- the end ------------------------------------------------------------------------------------------------

    fn stop_cleanly(&mut self) -> Result<()> {
        self.settle()?;
        if let Some(mut producer) = self.producer.take() {
            producer.end_input();
            producer.process.ends_well(PATIENCE).context("at the end of its input")?;
            self.produced.push(producer.produced());
        }
        self.stop_job().context("asked to stop")?;
        let mut last = self.run_command(2, &["--until-end"]);
        Process::start("the last run", &mut last)?.ends_well(PATIENCE)?;
        self.stop_owner().context("asked to stop")
    }

    fn verify(&mut self) {
        let expected = Expected { settings: SETTINGS, load: self.load, produced: &self.produced };
        self.report.verdict = match Files::open(&self.leg.dir.join("data")) {
            Ok(files) => check(&files, TOPICS, &expected),
            Err(error) => Verdict::unreadable(&error),
        };
    }

    /// After a failure: everything stops as well as it can, so that the data can be looked at.
    fn end_all(&mut self) {
        for process in
            [self.producer.as_mut().map(|p| &mut p.process), self.job.as_mut(), self.owner.as_mut()]
        {
            let Some(process) = process else { continue };
            let _ = process.signal(Signal::CONT);
            let _ = process.signal(Signal::TERM);
            let _ = process.ends_well(Duration::from_secs(10));
        }
    }
}

/// In place of a phase and a step where the owner was hit and there was no job.
pub const NO_JOB: &str = "no job";

/// Why a client may end by itself: its owner is stopped, or was killed before it reached it. Only the end that says so is
/// excused, and only of who lived then: neither the owner's nor that of a process that came later.
#[derive(Debug)]
struct Excuse {
    /// What its last line says.
    says: Vec<String>,
    /// Who needed the owner then.
    clients: Vec<u32>,
    until: Instant,
}

impl Excuse {
    fn covers(&self, pid: u32, status: ExitStatus, said: &str) -> bool {
        let gave_up =
            |line: &str| line.starts_with("error: ") && self.says.iter().all(|what| line.contains(what));
        Instant::now() < self.until
            && self.clients.contains(&pid)
            && status.code() == Some(1)
            && !said.contains("panicked")
            && said.lines().last().is_some_and(gave_up)
    }
}

/// How a process ended that was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fell {
    Killed,
    /// It had been asked to end, and was faster.
    Ended,
    /// It had given a stopped owner up.
    Excused,
}

/// How it ended; an error if by itself, and without an excuse.
fn fell(process: &mut Process, asked: bool, excuses: &[Excuse]) -> Result<Fell> {
    if process.was_killed()? {
        return Ok(Fell::Killed);
    }
    let Some(status) = process.ended()? else { bail!("{} was not killed", process.name()) };
    // Asked before it listens to that, it ends as any process does.
    if asked && (status.success() || status.signal() == Some(Signal::TERM.as_raw())) {
        return Ok(Fell::Ended);
    }
    let said = process.said();
    if excuses.iter().any(|excuse| excuse.covers(process.pid(), status, &said)) {
        return Ok(Fell::Excused);
    }
    bail!("{} ended by itself with {status}; it said: {said}", process.name())
}

/// 0 if it lives, 1 if it ended with an excuse; an error if without.
fn alive(process: &mut Process, excuses: &[Excuse]) -> Result<u32> {
    let Some(status) = process.ended()? else { return Ok(0) };
    // Nobody of ours has killed it.
    ensure!(
        !process.was_killed()?,
        "{} ended by itself with {status}; it said: {}",
        process.name(),
        process.said()
    );
    fell(process, false, excuses).map(|_| 1)
}

/// Somebody pressed Ctrl-C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// A port that is free now. Another process may take it before it is used; then the owner says so.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("cannot remove {}: {error}", dir.display())
        }
        _ => Ok(()),
    }
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENT: &str = "error: process 10 owns data and has said nothing for 5 s; if it is stopped, `kill -CONT 10` lets it go on";

    fn ended(script: &str) -> Process {
        let mut process = Process::start("sh", Command::new("sh").args(["-c", script])).unwrap();
        while process.ended().unwrap().is_none() {
            std::thread::yield_now();
        }
        process
    }

    fn excuse(clients: &[u32]) -> Excuse {
        Excuse {
            says: vec!["process 10 owns ".into(), "has said nothing for".into()],
            clients: clients.to_vec(),
            until: Instant::now() + Duration::from_secs(600),
        }
    }

    #[test]
    fn a_client_that_gives_a_stopped_owner_up_is_excused() {
        let mut client =
            ended(&format!("echo 'a word before' >&2; echo '{}' >&2; exit 1", SILENT.replace('`', "")));
        let excuses = [excuse(&[client.pid()])];
        assert_eq!(alive(&mut client, &excuses).unwrap(), 1);
        assert_eq!(fell(&mut client, false, &excuses).unwrap(), Fell::Excused);
        let error = alive(&mut client, &[]).unwrap_err().to_string();
        assert!(error.contains("ended by itself") && error.contains("has said nothing"), "{error}");
    }

    /// The window of an excuse hides nothing else: not a panic, not corruption, not another's end.
    #[test]
    fn nothing_else_is_excused() {
        let status = |script: &str| {
            let mut process = ended(script);
            process.ended().unwrap().unwrap()
        };
        let (one, zero) = (status("exit 1"), status("exit 0"));
        let (panic, killed) = (status("exit 101"), status("kill -9 $$"));
        let excuse = excuse(&[7, 8]);
        assert!(excuse.covers(7, one, SILENT));
        assert!(!excuse.covers(10, one, SILENT), "the owner itself");
        assert!(!excuse.covers(9, one, SILENT), "one that was started later");
        assert!(!excuse.covers(7, one, &SILENT.replace("10", "11")), "another owner is silent");
        assert!(!excuse.covers(7, one, "error: the log is corrupt"), "another reason");
        assert!(
            !excuse.covers(7, one, &format!("{SILENT}\nerror: the log is corrupt")),
            "another reason at last"
        );
        assert!(!excuse.covers(7, one, &format!("thread 'main' panicked at x\n{SILENT}")), "a panic");
        for other in [zero, panic, killed] {
            assert!(!excuse.covers(7, other, SILENT), "{other}");
        }
        let past = Excuse { until: Instant::now() - Duration::from_secs(1), ..excuse };
        assert!(!past.covers(7, one, SILENT), "long after");
    }

    /// A process that failed just before it was to be killed is not taken for one that was killed.
    #[test]
    fn who_fell_before_the_blow_is_told() {
        let mut panicked = ended("exit 101");
        panicked.kill().unwrap();
        assert!(fell(&mut panicked, true, &[]).unwrap_err().to_string().contains("ended by itself"));
        let mut done = ended("exit 0");
        assert_eq!(fell(&mut done, true, &[]).unwrap(), Fell::Ended);
        assert!(fell(&mut done, false, &[]).is_err(), "nobody asked it to end");
        let mut young = ended("kill -TERM $$");
        assert_eq!(fell(&mut young, true, &[]).unwrap(), Fell::Ended, "asked before it listened");
        assert!(fell(&mut young, false, &[]).is_err());
        let mut stranger = ended("kill -9 $$");
        assert!(alive(&mut stranger, &[]).is_err(), "killed by nobody of ours");
    }
}
