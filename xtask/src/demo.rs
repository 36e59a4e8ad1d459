//! `./x demo`: the main job on two million lines, killed twice, and its output held against a recount.
//!
//! ```text
//! gen ─▶ access.log ─▶ produce ─▶ topic access-log (4 partitions, keyed by address)
//!           │                          │
//!           │                    run ip-count ── SIGKILL ── run again ── SIGKILL ── run to the end
//!           ▼                          │
//!        recount  ◀──── equal? ────  consume ip-counts, ip-counts-late, ip-count-dead-letter
//! ```
//!
//! A kill counts only if it came after a commit of that run, before 90 % of the input, and while output rows were in the
//! open transaction: a reader that does not ask for committed data sees them, and they are in no committed result.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::catch::{Heard, kill_with_rows_open};
use crate::counted::Counted;
use crate::recount::{Recount, Settings};
use crate::streamctl::{Status, Streamctl};

const LINES: u64 = 2_000_000;
const PARTITIONS: u32 = 4;
const WINDOW_MS: i64 = 5_000;
const BOUND_MS: i64 = 10_000;
const KEY: &str = "^([^ ]+)";
/// The longest a run may say nothing. It commits every 200 ms; a loaded machine gets a lot more.
const PATIENCE: Duration = Duration::from_secs(60);
/// Kills that found no output rows in the open transaction are repeated, this often in all.
const ATTEMPTS_MAX: u32 = 8;
/// A run that reached the end before it could be killed twice is started over, this often in all.
const STARTS_MAX: u32 = 4;

/// `./x demo ...`
#[derive(Debug, Args)]
pub struct Demo {
    /// The streamctl to run.
    #[arg(long, hide = true)]
    streamctl: PathBuf,
    /// How many lines.
    #[arg(long, default_value_t = LINES, value_parser = clap::value_parser!(u64).range(200_000..))]
    lines: u64,
    /// Chooses the lines.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keep the data.
    #[arg(long)]
    keep: bool,
    /// Put the data into a new folder of this one. Default: the build's target folder, or another real disk.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Demo {
    /// The demo as `./x demo` runs it, with this binary.
    pub fn with_defaults(streamctl: PathBuf) -> Self {
        Demo { streamctl, lines: LINES, seed: 1, keep: false, dir: None }
    }

    /// Runs the demo; an error unless every window is exact.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    pub fn run(&self) -> Result<()> {
        let dir = self.place()?;
        println!(
            "demo       job ip-count on {} lines of access log, killed twice with SIGKILL",
            grouped(self.lines)
        );
        let fate = if self.keep { "kept at the end" } else { "deleted at the end; --keep keeps it" };
        println!("data       {} ({fate})", dir.display());
        if let Err(error) = self.run_in(&dir) {
            println!("data       kept, because the demo failed: {}", dir.display());
            return Err(error);
        }
        if !self.keep {
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot delete {}", dir.display()))?;
        }
        let streamctl = std::path::absolute(&self.streamctl)?;
        let streamctl = streamctl.display();
        println!("\nTo go on by hand (the data goes to ./tidemill-data):\n");
        println!(
            "  {streamctl} gen access-log --lines 100000 --seed 7 | {streamctl} produce access-log --create --key-regex '{KEY}'"
        );
        println!("  {streamctl} run ip-count --until-end");
        println!("  {streamctl} consume ip-counts --from -3 --until-end");
        Ok(())
    }

    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    fn run_in(&self, dir: &Path) -> Result<()> {
        let streamctl = Streamctl::new(&self.streamctl, dir.join("data"));
        let log = dir.join("access.log");
        let file = log.to_str().context("the data's path is not UTF-8")?;

        let started = Instant::now();
        let (lines, seed) = (self.lines.to_string(), self.seed.to_string());
        streamctl.run(&["gen", "access-log", "--lines", &lines, "--seed", &seed, "--file", file])?;
        println!("generate   {} lines, seed {seed}, in {}", grouped(self.lines), seconds(started.elapsed()));

        let mut starts = 1;
        let mut busy = loop {
            self.append(&streamctl, file)?;
            if let Some(busy) = self.kill_twice(&streamctl)? {
                break busy;
            }
            ensure!(
                starts < STARTS_MAX,
                "in {starts} starts the run came to its end before it could be killed twice; use more --lines"
            );
            starts += 1;
            println!(
                "again      the run came to its end before it could be killed twice: all of it once more, on new data"
            );
            std::fs::remove_dir_all(streamctl.data()).context("cannot delete the data")?;
        };
        busy += self.run_to_end(&streamctl)?;
        let rate = self.lines as f64 / busy.as_secs_f64();
        println!(
            "throughput {} lines/s: {} lines in {} of running, kills and recoveries included",
            grouped(rate as u64),
            grouped(self.lines),
            seconds(busy)
        );

        let started = Instant::now();
        let settings = Settings { partitions: PARTITIONS, window_ms: WINDOW_MS, bound_ms: BOUND_MS };
        let recount = Recount::of(settings, &std::fs::read(&log).context("cannot read the generated log")?);
        let counted = Counted::read(
            &streamctl.values("ip-counts", "read-committed")?,
            &streamctl.values("ip-counts-late", "read-committed")?,
            &streamctl.values("ip-count-dead-letter", "read-committed")?,
        )?;
        println!("\ntop ten addresses");
        for (ip, count) in counted.top(10) {
            println!("{:>11}  {ip}", grouped(count));
        }
        let (late, dead) = (counted.late.values().sum::<u64>(), counted.dead.values().sum::<u64>());
        println!("\n{} lines = {} counted + {late} late + {dead} dead-letter", self.lines, counted.counted());
        let differences = counted.differences(&recount, WINDOW_MS);
        let sum = counted.counted() + late + dead == self.lines;
        let exact = differences.is_empty() && sum && late > 0 && dead > 0;
        let (rows, took) = (grouped(counted.rows.len() as u64), seconds(started.elapsed()));
        println!(
            "every window exact: {} ({rows} rows held against a recount in {took})",
            if exact { "yes" } else { "NO" }
        );
        for difference in &differences {
            println!("  {difference}");
        }
        ensure!(sum, "the lines do not add up");
        ensure!(late > 0 && dead > 0, "the input must have late lines and lines that do not parse");
        ensure!(exact, "the output differs from the recount");
        Ok(())
    }

    /// Appends the generated lines.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    fn append(&self, streamctl: &Streamctl, file: &str) -> Result<()> {
        let started = Instant::now();
        let partitions = PARTITIONS.to_string();
        streamctl.run_quietly(&[
            "produce",
            "access-log",
            "--create",
            "--partitions",
            &partitions,
            "--key-regex",
            KEY,
            "--file",
            file,
        ])?;
        println!(
            "append     {} records to topic access-log, {PARTITIONS} partitions, each ack durable, in {}",
            grouped(self.lines),
            seconds(started.elapsed())
        );
        Ok(())
    }

    /// Runs the job and kills it, until two kills met rows in the open transaction: how long it ran in all. None where
    /// a run reached the end before.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    fn kill_twice(&self, streamctl: &Streamctl) -> Result<Option<Duration>> {
        let mut busy = Duration::ZERO;
        let mut careless = 0;
        let (mut kills, mut attempts) = (0, 0);
        while kills < 2 {
            attempts += 1;
            ensure!(
                attempts <= ATTEMPTS_MAX,
                "{ATTEMPTS_MAX} kills, and not two of them met output rows in the open transaction"
            );
            let Some(killed) = self.run_and_kill(streamctl, kills, attempts)? else { return Ok(None) };
            busy += killed.busy;
            let all = rows(&streamctl.values("ip-counts", "read-uncommitted")?);
            let committed = rows(&streamctl.values("ip-counts", "read-committed")?);
            ensure!(
                all >= committed + careless,
                "{all} rows in all, {committed} committed, {careless} seen uncommitted before"
            );
            let beyond = all - committed - careless;
            careless += beyond;
            println!(
                "kill {}     at {} % of the input, after {} commits of this run, with {} output rows in the open transaction;",
                kills + 1,
                killed.percent,
                killed.commits,
                grouped(killed.open_rows)
            );
            println!(
                "           a careless reader (read-uncommitted) saw {} rows beyond the {} committed ones",
                grouped(beyond),
                grouped(committed)
            );
            if beyond > 0 {
                kills += 1;
            } else {
                println!("           that kill proves nothing, so it is repeated");
            }
        }
        Ok(Some(busy))
    }

    /// Starts the job and kills it once the kill proves something; none where it reached the end before.
    fn run_and_kill(&self, streamctl: &Streamctl, kills: u32, attempts: u32) -> Result<Option<Killed>> {
        let bar = self.bar(&format!("run {attempts}"))?;
        // Commits come often, so that there is one to kill after on a fast machine and on a busy one.
        let run = streamctl.start_run(&["ip-count", "--until-end", "--commit-interval", "50ms"])?;
        let started = Instant::now();
        // The first kill leaves room for the second, which comes where it can.
        let wanted = if kills == 0 { 0.05 } else { 0.2 };
        let share = |records: u64| records as f64 / self.lines as f64;
        let ready = |heard: &Heard| {
            let moved = heard.began.is_some_and(|began| heard.records > began);
            moved && heard.commits > 0 && (wanted..0.9).contains(&share(heard.records))
        };
        let killed = kill_with_rows_open(run, PATIENCE, ready, |status| match status {
            Status::Started { recovery_ms, replayed, .. } => {
                say_recovery(&bar, attempts, *recovery_ms, *replayed);
            }
            Status::Committed { committed_records, .. } => bar.set_position(*committed_records),
            Status::Open { .. } | Status::Phase { .. } | Status::Durable { .. } | Status::Done { .. } => {}
        })?;
        bar.finish_and_clear();
        Ok(killed.map(|heard| Killed {
            percent: (share(heard.records) * 100.0) as u32,
            commits: heard.commits,
            open_rows: heard.open_rows,
            busy: started.elapsed(),
        }))
    }

    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    fn run_to_end(&self, streamctl: &Streamctl) -> Result<Duration> {
        let bar = self.bar("last run")?;
        let mut run = streamctl.start_run(&["ip-count", "--until-end"])?;
        let mut done = None;
        while let Some(status) = run.next(PATIENCE)? {
            match status {
                Status::Started { recovery_ms, replayed, .. } => say_recovery(&bar, 2, recovery_ms, replayed),
                Status::Committed { committed_records, .. } => bar.set_position(committed_records),
                Status::Open { .. } | Status::Phase { .. } | Status::Durable { .. } => {}
                Status::Done { windows_closed_early, .. } => done = Some(windows_closed_early),
            }
        }
        bar.finish_and_clear();
        let busy = run.elapsed();
        let (status, said) = run.wait()?;
        ensure!(status.success(), "the run ended with {status}: {said}");
        let early = done.context("the run did not say that it was done")?;
        println!("done       at the end of the input; {early} windows closed before their time");
        Ok(busy)
    }

    fn bar(&self, name: &str) -> Result<ProgressBar> {
        if !std::io::stderr().is_terminal() {
            return Ok(ProgressBar::hidden());
        }
        let style =
            ProgressStyle::with_template("{msg:10} {bar:40} {human_pos} of {human_len} lines committed")?;
        Ok(ProgressBar::new(self.lines).with_style(style).with_message(name.to_owned()))
    }

    /// A new folder on a real disk with room: killing processes on a tmpfs would show little.
    fn place(&self) -> Result<PathBuf> {
        let mut candidates = Vec::new();
        if let Some(dir) = &self.dir {
            candidates.push(dir.clone());
        } else {
            // target/release/streamctl: the build's target folder.
            let target = std::path::absolute(&self.streamctl)?;
            candidates.extend(target.parent().and_then(Path::parent).map(Path::to_owned));
            candidates.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
            candidates.push("/var/tmp".into());
        }
        let want_bytes = self.lines * 1200 + (1 << 30);
        let mut refused = Vec::new();
        for candidate in candidates {
            if std::fs::create_dir_all(&candidate).is_err() {
                refused.push(format!("{} cannot be made", candidate.display()));
                continue;
            }
            let fs = rustix::fs::statfs(&candidate)
                .with_context(|| format!("cannot look at {}", candidate.display()))?;
            let free = fs.f_bavail * u64::try_from(fs.f_bsize).unwrap_or(0);
            // TMPFS_MAGIC and RAMFS_MAGIC of linux/magic.h.
            if self.dir.is_none() && [0x0102_1994, 0x8584_58f6].contains(&i128::from(fs.f_type)) {
                refused.push(format!("{} is in memory", candidate.display()));
            } else if free < want_bytes {
                refused.push(format!(
                    "{} has {} MB free of the {} MB needed",
                    candidate.display(),
                    free >> 20,
                    want_bytes >> 20
                ));
            } else {
                let dir = candidate.join(format!("tidemill-demo-{}", std::process::id()));
                std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
                return Ok(dir);
            }
        }
        bail!("no place for the data: {}. Name one with --dir", refused.join("; "))
    }
}

struct Killed {
    percent: u32,
    commits: u64,
    open_rows: u64,
    busy: Duration,
}

#[allow(clippy::print_stdout, reason = "what it prints is its result")]
fn say_recovery(bar: &ProgressBar, attempt: u32, recovery_ms: u64, replayed: u64) {
    let took = seconds(Duration::from_millis(recovery_ms));
    bar.suspend(|| match attempt {
        1 => println!("run        started in {took}, nothing to recover"),
        _ => println!("recovery   in {took}, {} changelog records replayed", grouped(replayed)),
    });
}

fn rows(text: &[u8]) -> u64 {
    text.iter().filter(|b| **b == b'\n').count() as u64
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// 1234567 as `1,234,567`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(n), text);
        }
    }
}
