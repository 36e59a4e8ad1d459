//! `cargo xtask chaos`: exactly once under fire, made falsifiable by anyone.
//!
//! ```text
//!   options ─▶ legs (bank.rs) ─▶ cycles (plan.rs) of processes (process.rs) under load (load.rs)
//!                  └──▶ verifier: catalog.rs, batch.rs, history.rs read the files; check.rs holds them against a recount
//! ```
//!
//! The bank draws everything from a seed: random kills, kills while a run closes, stops, crash points, changed numbers
//! of tasks, deleted and stale state. A *control* runs the same bank on a weaker guarantee and holds only if the
//! verifier finds what that guarantee allows: duplicates for at-least-once, losses for at-most-once, and not the other.
//!
//! What it does not show: anything about power cuts. A killed process leaves its writes to the page cache.

pub mod bank;
pub mod batch;
pub mod catalog;
pub mod check;
pub mod history;
pub mod load;
pub mod plan;
pub mod process;
pub mod random;

use std::cell::RefCell;
use std::io::IsTerminal;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use self::bank::{Interrupted, Leg, NO_JOB, Report, Watch};
use self::plan::{CrashPoint, Layout, Victim, crash_point};
use self::random::{Random, mix};

/// Kills of one data directory: then it is checked and a new one begun, so that a violation is found near its cause.
pub const LEG_KILLS: u32 = 50;
/// Banks below this need not hit every phase and step.
const WHOLE_BANK: u32 = 80;
/// Kills of one leg of a control, which is checked after each and stops at the first that shows what it must.
const CONTROL_KILLS: u32 = 5;

/// Steps of the log and of a run that a crash point can name; `streamctl` refuses what it does not know, and a test
/// holds this list against its own.
pub const STEPS: [&str; 38] = [
    "log-open",
    "log-decided",
    "log-redone",
    "log-other-slot",
    "log-both-slots",
    "log-serving",
    "log-round",
    "log-written",
    "log-synced",
    "log-acked",
    "log-segments",
    "log-recycle",
    "log-recycled",
    "log-checkpoint",
    "log-slot",
    "log-slot-written",
    "log-slot-synced",
    "log-close",
    "log-closed",
    "recover",
    "fence",
    "committed",
    "restore",
    "replay-marks",
    "replay",
    "replayed",
    "running",
    "output",
    "barrier",
    "state",
    "offsets",
    "end",
    "outcome",
    "write",
    "flush",
    "released",
    "closing",
    "closed",
];
/// How processes are killed, the columns of the table. An aimed kill waited for an open transaction.
const KINDS: [&str; 6] = ["random", "aimed", "owner", "closing", "stopped", "crash point"];
/// Phases of a run, all of which a whole bank hits.
const PHASES: [&str; 5] = ["start", "recovery", "running", "committing", "closing"];

/// How often a record counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Guarantee {
    /// Once: the verifier must find nothing.
    ExactlyOnce,
    /// Once or more often: a control, which must find duplicates.
    AtLeastOnce,
    /// Once or never: a control, which must find losses.
    AtMostOnce,
}

/// Which layouts are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layouts {
    /// The job owns the log.
    Job,
    /// `streamctl serve` owns it.
    Serve,
    /// Half of the kills each.
    Both,
}

/// `cargo xtask chaos ...`
#[derive(Debug, Args)]
pub struct Chaos {
    /// The job; the verifier knows `ip-count`.
    pub job: String,
    /// How many kills of job and owner.
    #[arg(long, default_value_t = 100)]
    pub kills: u32,
    /// Chooses everything.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// What is promised, and so what must be found.
    #[arg(long, value_enum, default_value_t = Guarantee::ExactlyOnce)]
    pub guarantee: Guarantee,
    /// Who owns the log.
    #[arg(long, value_enum, default_value_t = Layouts::Both)]
    pub layout: Layouts,
    /// The streamctl to run. Default: the one beside this program, built before.
    #[arg(long)]
    pub streamctl: Option<PathBuf>,
    /// Put the data into new folders of this one. Default: the build's target folder.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Keep the data.
    #[arg(long)]
    pub keep: bool,
}

/// What a bank needs, as other banks call it.
#[derive(Debug, Clone)]
pub struct Bank {
    /// The binary.
    pub streamctl: PathBuf,
    /// Where new folders are made.
    pub dir: PathBuf,
    /// Which layouts.
    pub layouts: Layouts,
    /// Whether folders of exact runs stay.
    pub keep: bool,
    /// Set by Ctrl-C.
    pub interrupted: Arc<AtomicBool>,
}

/// A violation, and where its data is.
#[derive(Debug)]
pub struct Violation {
    /// The leg's seed.
    pub seed: u64,
    /// Its layout.
    pub layout: Layout,
    /// Its folder, which stays.
    pub dir: PathBuf,
    /// What was found, a line each.
    pub what: Vec<String>,
}

impl Chaos {
    /// Runs the bank, or the control; an error unless it holds.
    ///
    /// # Errors
    ///
    /// If the job is unknown, a violation was found, too few kills proved something, or something else failed.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    pub fn run(&self) -> Result<()> {
        ensure!(
            self.job == "ip-count",
            "the verifier has no recount of job {:?}; it knows ip-count",
            self.job
        );
        ensure!(self.kills > 0, "--kills 0 kills nothing");
        if self.streamctl.is_none() {
            build_streamctl()?;
        }
        let bank = Bank::new(self.streamctl.clone(), self.dir.clone(), self.layout, self.keep)?;
        match self.guarantee {
            Guarantee::ExactlyOnce => {
                let began = Instant::now();
                let (report, violations) = bank.exactly_once(self.kills, self.seed)?;
                print!("{}", summary(&report, began.elapsed()));
                judge(&report, &violations, self.kills)
            }
            weaker => bank.control(weaker, self.kills, self.seed).map(|found| println!("{found}")),
        }
    }
}

impl Bank {
    /// With the defaults of the command line; takes Ctrl-C over.
    ///
    /// # Errors
    ///
    /// If there is no binary, or no folder for the data.
    pub fn new(
        streamctl: Option<PathBuf>,
        dir: Option<PathBuf>,
        layouts: Layouts,
        keep: bool,
    ) -> Result<Self> {
        let streamctl = match streamctl {
            Some(given) => std::path::absolute(given)?,
            None => std::env::current_exe()?.with_file_name("streamctl"),
        };
        ensure!(
            streamctl.is_file(),
            "there is no {}; `cargo build --release -p streamctl` makes it, --streamctl names another one",
            streamctl.display()
        );
        let dir = match dir {
            Some(dir) => std::path::absolute(dir)?,
            // target/release/streamctl: a real disk with room, usually.
            None => streamctl
                .parent()
                .and_then(Path::parent)
                .context("the binary is in no target folder")?
                .to_owned(),
        };
        let interrupted = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&interrupted))
            .context("cannot take over Ctrl-C")?;
        Ok(Bank { streamctl, dir, layouts, keep, interrupted })
    }

    /// So many kills over legs whose seeds begin at `seed`, every crash point among them where there are enough.
    /// Violations are returned, not errors, so that a ledger can count them.
    ///
    /// # Errors
    ///
    /// If a process failed in a way that is no violation to count, or somebody interrupted.
    pub fn exactly_once(&self, kills: u32, seed: u64) -> Result<(Report, Vec<Violation>)> {
        let progress = Progress::new(kills);
        let (mut total, mut violations) = (Report::default(), Vec::new());
        let legs = self.legs(kills, seed);
        for leg in legs {
            let (seed, layout, dir) = (leg.seed, leg.layout, leg.dir.clone());
            let report = self.leg(leg, &progress)?;
            progress.leg(&report);
            if report.verdict.is_exact() {
                self.forget(&dir)?;
            } else {
                let what = report.verdict.what();
                progress.say(&format!(
                    "violation  seed {seed}, layout {layout:?}, data kept in {}",
                    dir.display()
                ));
                what.iter().for_each(|line| progress.say(&format!("           {line}")));
                violations.push(Violation { seed, layout, dir, what });
            }
            total.add(report);
        }
        progress.end();
        Ok((total, violations))
    }

    /// Seeds that a bank of so many kills uses from its first one on.
    pub fn seeds(kills: u32, seed: u64) -> Range<u64> {
        seed..seed + u64::from(kills.div_ceil(LEG_KILLS).max(1))
    }

    /// The weaker guarantee under the same kills, at most so many: what was found, or an error if it was not what that
    /// allows. It stops at the first leg that shows it.
    ///
    /// # Errors
    ///
    /// If no violation in the expected direction was found, or one in the other.
    pub fn control(&self, guarantee: Guarantee, kills: u32, seed: u64) -> Result<String> {
        let (name, must, must_not) = match guarantee {
            Guarantee::ExactlyOnce => bail!("exactly-once is no control"),
            Guarantee::AtLeastOnce => ("at-least-once", "duplicated", "lost"),
            Guarantee::AtMostOnce => ("at-most-once", "lost", "duplicated"),
        };
        let progress = Progress::new(kills);
        let mut total = Report::default();
        for mut leg in self.control_legs(kills, seed) {
            leg.guarantee = Some(name.to_owned());
            let (seed, layout, dir) = (leg.seed, leg.layout, leg.dir.clone());
            let report = self.leg(leg, &progress)?;
            progress.leg(&report);
            let verdict = &report.verdict;
            let found = match guarantee {
                Guarantee::AtLeastOnce => (verdict.duplicated, verdict.lost),
                _ => (verdict.lost, verdict.duplicated),
            };
            let (lines, first) = (found.0, verdict.shown.first().cloned().unwrap_or_default());
            ensure!(
                found.1 == 0 && verdict.broken.is_empty(),
                "{name}, seed {seed}, layout {layout:?}: {} lines {must_not}, which it must not; data kept in {}: {:#?}",
                found.1,
                dir.display(),
                verdict.what()
            );
            total.add(report);
            self.forget(&dir)?;
            if lines > 0 {
                progress.end();
                return Ok(format!(
                    "control {name}: {lines} lines {must} after {} kills ({}), none {must_not}, as it must be ({first})",
                    total.kills,
                    how_killed(&total)
                ));
            }
        }
        progress.end();
        bail!(
            "control {name}: {} kills ({}), and no line {must}: either it promises more, or the verifier is blind",
            total.kills,
            how_killed(&total)
        )
    }

    /// Short legs of the same kills: in the same layouts, and with crash points among them.
    fn control_legs(&self, kills: u32, seed: u64) -> Vec<Leg> {
        let mut random = Random::new(mix(seed));
        let mut steps = STEPS;
        random.shuffle(&mut steps);
        let mut left = kills;
        let mut legs = Vec::new();
        for (number, step) in (0..kills.div_ceil(CONTROL_KILLS)).zip(steps.into_iter().cycle()) {
            let share = left.min(CONTROL_KILLS);
            left -= share;
            let layout = match self.layouts {
                Layouts::Job => Layout::Job,
                Layouts::Serve => Layout::Serve,
                Layouts::Both => [Layout::Job, Layout::Serve][number as usize % 2],
            };
            let mut leg = self.one_leg(layout, mix(seed.wrapping_add(u64::from(number))), share);
            deal(&mut leg, step, &mut random);
            legs.push(leg);
        }
        legs
    }

    fn legs(&self, kills: u32, seed: u64) -> Vec<Leg> {
        let mut legs = Vec::new();
        let mut left = kills;
        let parts = kills.div_ceil(LEG_KILLS).max(1);
        for (number, seed) in Self::seeds(kills, seed).enumerate() {
            let share = left / (parts - number as u32);
            left -= share;
            let layout = match self.layouts {
                Layouts::Job => Layout::Job,
                Layouts::Serve => Layout::Serve,
                Layouts::Both if parts == 1 => [Layout::Job, Layout::Serve][(seed % 2) as usize],
                Layouts::Both => [Layout::Job, Layout::Serve][number % 2],
            };
            legs.push(self.one_leg(layout, seed, share));
        }
        // The crash points are dealt out over the legs: all of them, or as many as a third of the kills are.
        let mut random = Random::new(mix(seed ^ u64::from(kills)));
        let mut steps = STEPS;
        random.shuffle(&mut steps);
        let dealt = if kills >= WHOLE_BANK { steps.len() } else { steps.len().min(kills as usize / 3) };
        for (i, step) in steps.into_iter().take(dealt).enumerate() {
            let leg = i % legs.len();
            deal(&mut legs[leg], step, &mut random);
        }
        legs
    }

    fn one_leg(&self, layout: Layout, seed: u64, kills: u32) -> Leg {
        let name = format!("tidemill-chaos-{}-{seed}", std::process::id());
        Leg {
            streamctl: self.streamctl.clone(),
            dir: self.dir.join(name),
            layout,
            seed,
            kills,
            guarantee: None,
            crash_points: Vec::new(),
        }
    }

    fn leg(&self, leg: Leg, progress: &Progress) -> Result<Report> {
        let (seed, dir) = (leg.seed, leg.dir.clone());
        let told = |report: &Report| progress.kill(report);
        let watch = Watch { told: &told, interrupted: Arc::clone(&self.interrupted) };
        bank::run(leg, &watch).map_err(|error| {
            progress.end();
            let what = if error.is::<Interrupted>() { "everything was stopped" } else { "the bank failed" };
            error.context(format!("seed {seed}: {what}; the data is in {}", dir.display()))
        })
    }

    fn forget(&self, dir: &Path) -> Result<()> {
        if self.keep {
            return Ok(());
        }
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
    }
}

/// Has a leg crash at a step: a step of the log in whoever owns it.
fn deal(leg: &mut Leg, step: &str, random: &mut Random) {
    let owner = leg.layout == Layout::Serve && step.starts_with("log-");
    let victim = if owner { Victim::Owner } else { Victim::Job };
    let point: CrashPoint = crash_point(step, random);
    leg.crash_points.push((victim, point));
}

/// What is tested is what lies here in source, not what was built some time ago.
fn build_streamctl() -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let status = cargo
        .args(["build", "--quiet", "--release", "-p", "streamctl"])
        .status()
        .context("cannot start cargo to build streamctl; --streamctl names one that is built")?;
    ensure!(status.success(), "streamctl does not build; --streamctl names one that does");
    Ok(())
}

/// An error unless the bank shows what it must.
///
/// # Errors
///
/// A violation; too few kills hit an open transaction, or stops are missing; or, in a whole bank, a phase or step.
pub fn judge(report: &Report, violations: &[Violation], kills: u32) -> Result<()> {
    if let Some(first) = violations.first() {
        bail!(
            "{} of the runs were not exact; the first has seed {} and its data in {}",
            violations.len(),
            first.seed,
            first.dir.display()
        );
    }
    // The files have the last word: what was on its way to the log when the job died was not in a transaction.
    let aborted = u32::try_from(report.verdict.transactions.1).unwrap_or(u32::MAX);
    let hits = report.outlived + (report.hits - report.outlived).min(aborted);
    ensure!(
        hits * 2 >= report.kills,
        "only {hits} of {} kills hit an open transaction with uncommitted input: they proved too little",
        report.kills
    );
    ensure!(
        report.stops >= report.stops_due,
        "only {} stops, and every tenth cycle is one: {} must be",
        report.stops,
        report.stops_due
    );
    if kills >= WHOLE_BANK {
        let missed: Vec<_> = STEPS.iter().filter(|step| !report.crash_points.contains_key(**step)).collect();
        ensure!(missed.is_empty(), "no kill at these crash points: {missed:?}");
        let missed: Vec<_> = PHASES.iter().filter(|phase| !report.phases.contains_key(**phase)).collect();
        ensure!(missed.is_empty(), "no kill in these phases: {missed:?}");
    }
    Ok(())
}

/// What a bank did, for people.
pub fn summary(report: &Report, took: Duration) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line(format!("{:<12}{}", "kills in", KINDS.map(|kind| format!("{kind:>13}")).concat()));
    let no_job = report.phases.contains_key(NO_JOB).then_some(NO_JOB);
    for phase in PHASES.into_iter().chain(no_job) {
        let count = |kind| report.phases.get(phase).and_then(|kinds| kinds.get(kind)).copied().unwrap_or(0);
        line(format!("  {phase:<10}{}", KINDS.map(|kind| format!("{:>13}", count(kind))).concat()));
    }
    let steps: Vec<_> = report.steps.iter().map(|(step, n)| format!("{step} {n}")).collect();
    line(format!("before step {}", steps.join(", ")));
    line(format!("crash points reached: {} of {}", report.crash_points.len(), STEPS.len()));
    let Report { kills, hits, outlived, aimed, stops, stops_due, excused, producers_killed, .. } = report;
    let ((deleted, stale), verdict) = (report.states, &report.verdict);
    line(format!(
        "{kills} kills in {:.0} s, {hits} of them with uncommitted input in an open transaction: {} of {} at their drawn \
         moment, {} of {} that were added and waited for one; {outlived} hit only the log's owner, and the job went on with it",
        took.as_secs_f64(),
        hits - aimed.1,
        kills - aimed.0,
        aimed.1,
        aimed.0
    ));
    line(format!(
        "{stops} stops ({stops_due} due), {excused} clients gave an owner up that was stopped or gone; {producers_killed} producers \
         killed; state deleted {deleted} times, replaced by a stale copy {stale} times"
    ));
    let (committed, aborted) = verdict.transactions;
    line(format!(
        "the files hold {} lines ({} acked), {} rows, {} late, {} dead letters; {committed} transactions committed, {aborted} aborted",
        verdict.lines, verdict.acked, verdict.rows, verdict.late, verdict.dead
    ));
    line(format!(
        "{} lost, {} duplicated, {} broken rules",
        verdict.lost,
        verdict.duplicated,
        verdict.broken.len()
    ));
    text
}

/// `3 random, 1 crash point`
fn how_killed(report: &Report) -> String {
    let count = |kind| report.phases.values().filter_map(|kinds| kinds.get(kind)).sum::<u32>();
    let counts = KINDS.into_iter().map(|kind| (kind, count(kind))).filter(|(_, n)| *n > 0);
    counts.map(|(kind, n)| format!("{n} {kind}")).collect::<Vec<_>>().join(", ")
}

/// A bar on a terminal, plain lines otherwise.
struct Progress {
    bar: Option<ProgressBar>,
    kills: u32,
    /// Kills and hits of legs that are over.
    before: RefCell<(u32, u32)>,
}

impl Progress {
    fn new(kills: u32) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{elapsed:>5} {bar:40} {pos} of {len} kills  {msg}");
            ProgressBar::new(u64::from(kills))
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Progress { bar, kills, before: RefCell::default() }
    }

    fn kill(&self, report: &Report) {
        let before = *self.before.borrow();
        let (done, hits) = (before.0 + report.kills, before.1 + report.hits);
        match &self.bar {
            Some(bar) => {
                bar.set_position(u64::from(done));
                bar.set_message(format!("{hits} hit an open transaction"));
            }
            None if report.kills.is_multiple_of(10) && report.kills > 0 => {
                self.say(&format!("{done:>5} of {} kills, {hits} hit an open transaction", self.kills));
            }
            None => {}
        }
    }

    fn leg(&self, report: &Report) {
        let mut before = self.before.borrow_mut();
        *before = (before.0 + report.kills, before.1 + report.hits);
    }

    #[allow(clippy::print_stderr, reason = "what it prints is for people")]
    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bank(layouts: Layouts) -> Bank {
        Bank {
            streamctl: "streamctl".into(),
            dir: "target".into(),
            layouts,
            keep: false,
            interrupted: Arc::default(),
        }
    }

    fn fit() -> Report {
        let mut report = Report { kills: 10, hits: 5, stops: 1, stops_due: 1, ..Report::default() };
        report.verdict.transactions = (20, 5);
        report
    }

    #[test]
    fn a_bank_holds_only_if_enough_was_hit_and_every_stop_was_made() {
        judge(&fit(), &[], 10).unwrap();
        let few = judge(&Report { hits: 4, ..fit() }, &[], 10).unwrap_err().to_string();
        assert!(few.contains("only 4 of 10"), "{few}");
        let mut aborted = fit();
        aborted.verdict.transactions.1 = 4;
        assert!(judge(&aborted, &[], 10).is_err(), "the files have the last word");
        judge(&Report { outlived: 1, ..aborted }, &[], 10).unwrap();
        let stops = judge(&Report { stops: 0, ..fit() }, &[], 10).unwrap_err().to_string();
        assert!(stops.contains("only 0 stops"), "{stops}");
        assert!(judge(&fit(), &[], WHOLE_BANK).unwrap_err().to_string().contains("crash points"));
    }

    /// The controls see what the bank sees: both layouts, crash points, as many kills as were asked for.
    #[test]
    fn a_control_is_under_the_same_kills() {
        let legs = bank(Layouts::Both).control_legs(23, 1);
        assert_eq!(legs.iter().map(|leg| leg.kills).sum::<u32>(), 23);
        for layout in [Layout::Job, Layout::Serve] {
            assert!(legs.iter().filter(|leg| leg.layout == layout).count() >= 2);
        }
        assert!(legs.iter().all(|leg| leg.crash_points.len() == 1));
        let serve = bank(Layouts::Serve).control_legs(200, 1);
        assert!(serve.iter().all(|leg| leg.layout == Layout::Serve));
        let dealt: std::collections::BTreeSet<_> =
            serve.iter().flat_map(|leg| &leg.crash_points).map(|(_, point)| point.step.as_str()).collect();
        assert_eq!(dealt.len(), STEPS.len(), "a long one gets to each");
        let seeds: std::collections::BTreeSet<_> = serve.iter().map(|leg| &leg.dir).collect();
        assert_eq!(seeds.len(), serve.len());
    }

    #[test]
    fn the_table_has_what_was_aimed_and_what_hit_no_job_in_places_of_their_own() {
        let mut report = Report { aimed: (2, 2), ..fit() };
        report.phases.entry("running".into()).or_default().extend([("random", 5), ("aimed", 2)]);
        let text = summary(&report, Duration::from_secs(9));
        assert!(text.contains("random        aimed        owner"), "{text}");
        assert!(text.contains("3 of 8 at their drawn moment, 2 of 2 that were added"), "{text}");
        assert!(!text.contains(NO_JOB), "{text}");
        report.phases.entry(NO_JOB.into()).or_default().insert("owner", 1);
        assert!(summary(&report, Duration::ZERO).contains(NO_JOB));
        assert_eq!(how_killed(&report), "5 random, 2 aimed, 1 owner");
    }
}
