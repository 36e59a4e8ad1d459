//! `xtask ledger`: long runs that add up, a row a chunk, in `reliability/ledger.csv`.
//!
//! ```text
//!   last row of the kind ─▶ next seed ─▶ chunk ─▶ row, synced ─▶ chunk ─▶ row, synced ─▶ ...
//! ```
//!
//! A run that is killed loses its chunk and nothing else, and the next run of the kind takes its seeds again. A chunk
//! that fails leaves a row, too: what was seen once is not forgotten, and the next run goes on behind it.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::chaos::{self, Bank, Layouts};
use crate::power::{FileSystem, MayCut, Outcome, Power};
use crate::recount::utc_text;

const HEADER: &str = "date,commit,kind,seed_from,seed_to,counts,failures";

/// What can be run for long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    /// Power cuts on ext4; a seed is a cut.
    PowerExt4,
    /// Power cuts on XFS; a seed is a cut.
    PowerXfs,
    /// Kills of a job, its log's owner and its producer; a seed is a data directory that sees fifty.
    Kills,
    /// Crashes of the log on a simulated disk; a seed is a history of requests, crashed at many of its disk calls.
    LogCrashes,
    /// Clients, network, time-outs and crashes around transactions, simulated; a seed is a schedule.
    LogTransactions,
    /// Random jobs and schedules against a sequential reference; a seed is a job.
    RandomJobs,
}

/// A figure that a kind is to reach: what counts, how many are asked for now, and how many in the long run.
struct Goal {
    kind: Kind,
    count: &'static str,
    now: u64,
    long: u64,
}

const GOALS: [Goal; 6] = [
    Goal { kind: Kind::PowerExt4, count: "cuts", now: 200, long: 10_000 },
    Goal { kind: Kind::PowerXfs, count: "cuts", now: 200, long: 10_000 },
    Goal { kind: Kind::Kills, count: "kills", now: 500, long: 10_000 },
    Goal { kind: Kind::LogCrashes, count: "states", now: 10_000, long: 1_000_000 },
    Goal { kind: Kind::LogTransactions, count: "schedules", now: 2_000, long: 1_000_000 },
    Goal { kind: Kind::RandomJobs, count: "jobs", now: 10_000, long: 1_000_000 },
];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::PowerExt4 => "power-ext4",
            Self::PowerXfs => "power-xfs",
            Self::Kills => "kills",
            Self::LogCrashes => "log-crashes",
            Self::LogTransactions => "log-transactions",
            Self::RandomJobs => "random-jobs",
        }
    }

    fn file_system(self) -> Option<FileSystem> {
        match self {
            Self::PowerExt4 => Some(FileSystem::Ext4),
            Self::PowerXfs => Some(FileSystem::Xfs),
            _ => None,
        }
    }

    /// Seeds of one chunk: half a minute or a few, so that a kill loses little.
    fn chunk(self) -> u64 {
        match self {
            Self::PowerExt4 | Self::PowerXfs => 20,
            Self::Kills => 1,
            Self::LogCrashes => 50,
            Self::LogTransactions => 500,
            Self::RandomJobs => 10_000,
        }
    }
}

/// `cargo xtask ledger ...`
#[derive(Debug, Args)]
pub struct Ledger {
    /// What to run. Without it, with `--show`: nothing.
    #[arg(required_unless_present = "show")]
    kind: Option<Kind>,
    /// How many more seeds.
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// Sum the rows by kind, beside what is asked for.
    #[arg(long, conflicts_with = "kind")]
    show: bool,
    /// The ledger.
    #[arg(long, default_value = "reliability/ledger.csv", value_name = "FILE")]
    file: PathBuf,
}

impl Ledger {
    /// Runs or shows; an error at the first chunk that failed, after its row was written.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    pub fn run(&self) -> Result<()> {
        let rows = read(&self.file)?;
        let Some(kind) = self.kind else {
            print!("{}", shown(&rows));
            return Ok(());
        };
        build()?;
        if let Some(fs) = kind.file_system()
            && let MayCut::No(why) | MayCut::Broken(why) = crate::power::may_cut()
        {
            bail!("power cuts on {} can not be run here: {why}", fs.name());
        }
        let commit = commit()?;
        let mut from = next_seed(&rows, kind);
        let end = from + self.count;
        while from < end {
            let to = end.min(from + kind.chunk());
            let started = Instant::now();
            let done = chunk(kind, from, to);
            let seconds = started.elapsed().as_secs();
            let (counts, failures) = match &done {
                Ok(counts) => (counts.clone(), 0),
                Err(error) => (reason(error), 1),
            };
            let counts = format!("{counts} seconds={seconds}").trim().to_owned();
            let row = Row {
                date: now(),
                commit: commit.clone(),
                kind: kind.name().into(),
                from,
                to,
                counts,
                failures,
            };
            append(&self.file, &row)?;
            println!("{row}");
            done.with_context(|| format!("{} failed within seeds {from}..{to}", kind.name()))?;
            from = to;
        }
        Ok(())
    }
}

/// A line of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    date: String,
    commit: String,
    kind: String,
    from: u64,
    to: u64,
    /// `name=number`, with blanks between.
    counts: String,
    failures: u64,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { date, commit, kind, from, to, counts, failures } = self;
        write!(f, "{date},{commit},{kind},{from},{to},{counts},{failures}")
    }
}

impl Row {
    fn parse(line: &str) -> Option<Self> {
        let [date, commit, kind, from, to, counts, failures] =
            line.split(',').collect::<Vec<_>>().try_into().ok()?;
        Some(Self {
            date: date.into(),
            commit: commit.into(),
            kind: kind.into(),
            from: from.parse().ok()?,
            to: to.parse().ok()?,
            counts: counts.into(),
            failures: failures.parse().ok()?,
        })
    }

    fn count(&self, name: &str) -> u64 {
        let values = self.counts.split(' ').filter_map(|pair| pair.split_once('='));
        values.filter(|(n, _)| *n == name).filter_map(|(_, v)| v.parse::<u64>().ok()).sum()
    }
}

fn read(path: &Path) -> Result<Vec<Row>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    rows(&text).with_context(|| format!("{} is no ledger", path.display()))
}

/// The rows of a ledger's text. A last line without a newline was cut off by a kill and counts for nothing.
fn rows(text: &str) -> Result<Vec<Row>> {
    let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    let mut lines = whole.lines();
    match lines.next() {
        None => return Ok(Vec::new()),
        Some(first) => ensure!(first == HEADER, "its first line is {first:?}, not {HEADER:?}"),
    }
    lines.map(|line| Row::parse(line).with_context(|| format!("not a row: {line:?}"))).collect()
}

/// Why a chunk failed, as one word of the counts that no reader of them takes for a number: `failed:the_last_cause`.
fn reason(error: &anyhow::Error) -> String {
    const MOST: usize = 120;
    // The ledger is no place for where a checkout was on one machine.
    let here = std::env::current_dir().map(|dir| format!("{}/", dir.display())).unwrap_or_default();
    let said = format!("{error:#}");
    let said = if here.is_empty() { said } else { said.replace(&here, "") };
    let word = |c: char| if c.is_alphanumeric() || "-+.:/'".contains(c) { c } else { '_' };
    format!("failed:{}", said.trim().chars().take(MOST).map(word).collect::<String>())
}

/// Where the last run of this kind ended.
fn next_seed(rows: &[Row], kind: Kind) -> u64 {
    rows.iter().filter(|row| row.kind == kind.name()).map(|row| row.to).max().unwrap_or(0)
}

/// Adds a row and syncs it.
fn append(path: &Path, row: &Row) -> Result<()> {
    let write = || -> Result<()> {
        let old = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            other => other?,
        };
        let whole = old.rfind('\n').map_or(0, |at| at + 1);
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::create_dir_all(dir)?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        // What a kill left of a row goes.
        file.set_len(whole as u64)?;
        let header = if whole == 0 { format!("{HEADER}\n") } else { String::new() };
        file.write_all(format!("{header}{row}\n").as_bytes())?;
        file.sync_all()?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// A line a kind: what was run, and how far that is.
fn shown(rows: &[Row]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<18}{:>12}{:>12}{:>12}{:>10}  in",
        "kind", "done", "asked now", "in the end", "failures"
    );
    for goal in &GOALS {
        let of: Vec<&Row> = rows.iter().filter(|row| row.kind == goal.kind.name()).collect();
        let done: u64 = of.iter().map(|row| row.count(goal.count)).sum();
        let failures: u64 = of.iter().map(|row| row.failures).sum();
        let seconds: u64 = of.iter().map(|row| row.count("seconds")).sum();
        let _ = writeln!(
            text,
            "{:<18}{:>12}{:>12}{:>12}{:>10}  {} {}, {} min {:02} s, {} rows",
            goal.kind.name(),
            done,
            goal.now,
            goal.long,
            failures,
            done,
            goal.count,
            seconds / 60,
            seconds % 60,
            of.len()
        );
    }
    text
}

/// Runs these seeds and returns what they counted.
fn chunk(kind: Kind, from: u64, to: u64) -> Result<String> {
    match kind {
        Kind::PowerExt4 => power(FileSystem::Ext4, from, to),
        Kind::PowerXfs => power(FileSystem::Xfs, from, to),
        Kind::Kills => kills(from, to),
        Kind::LogCrashes => {
            let said = bank(
                &[
                    "-p",
                    "tidemill-log",
                    "--lib",
                    "--",
                    "--exact",
                    "crash_test::no_crash_loses_or_invents_anything",
                ],
                &[("CRASH_FROM", from), ("CRASH_SEEDS", to - from)],
                "CRASH_REPORT",
            )?;
            Ok(counts_of(&said))
        }
        Kind::LogTransactions => {
            let said = bank(
                &[
                    "-p",
                    "tidemill-log",
                    "--lib",
                    "--",
                    "--exact",
                    "transactions_test::no_schedule_loses_tears_or_doubles_anything",
                ],
                &[("TXN_FROM", from), ("TXN_SEEDS", to - from)],
                "TXN_REPORT",
            )?;
            Ok(format!("schedules={} {}", to - from, counts_of(&said)))
        }
        Kind::RandomJobs => {
            let mut command = cargo();
            command.args(["test", "--quiet", "--release", "-p", "tidemill-stream", "--test", "random_jobs"]);
            command.env("TIDEMILL_SEEDS", format!("{from}-{to}"));
            ended(command)?;
            Ok(format!("jobs={}", to - from))
        }
    }
}

fn kills(from: u64, to: u64) -> Result<String> {
    let bank = Bank::new(None, None, Layouts::Both, false)?;
    let kills = chaos::LEG_KILLS * u32::try_from(to - from).context("too many seeds")?;
    let (report, violations) = bank.exactly_once(kills, from)?;
    chaos::judge(&report, &violations, kills)?;
    Ok(format!(
        "kills={} open={} stops={} producers={} lines={} rows={} aborted={}",
        report.kills,
        report.hits,
        report.stops,
        report.producers_killed,
        report.verdict.lines,
        report.verdict.rows,
        report.verdict.transactions.1
    ))
}

fn power(fs: FileSystem, from: u64, to: u64) -> Result<String> {
    let streamctl = std::env::current_exe()?.with_file_name("streamctl");
    let power = Power { fs, cuts: to - from, seed: from, streamctl, load: None, fault: None, inside: None };
    match power.run()? {
        Outcome::Done(c) => Ok(format!(
            "cuts={} job_cuts={} written_back={} beyond_acks={} acked={} commits={}",
            c.cuts, c.job_cuts, c.written_back, c.beyond_acks, c.acked, c.commits
        )),
        Outcome::Skipped(why) => bail!("{why}"),
    }
}

/// Runs a test of the log over a range of seeds and returns the report that it writes.
fn bank(args: &[&str], env: &[(&str, u64)], report: &str) -> Result<String> {
    let file = std::env::temp_dir().join(format!("tidemill-ledger-{}", std::process::id()));
    let mut command = cargo();
    command.args(["test", "--quiet", "--release"]).args(args).env(report, &file);
    command.envs(env.iter().map(|(name, value)| (name, value.to_string())));
    ended(command)?;
    let said = fs::read_to_string(&file).context("the bank wrote no report")?;
    fs::remove_file(&file)?;
    Ok(said)
}

/// `Counts { states: 3, opens: 4 }` as `states=3 opens=4`.
fn counts_of(debug: &str) -> String {
    let inner = debug.split_once('{').map_or("", |(_, rest)| rest.trim_end().trim_end_matches('}'));
    let pairs = inner.split(',').filter_map(|pair| pair.split_once(':'));
    pairs.map(|(name, value)| format!("{}={}", name.trim(), value.trim())).collect::<Vec<_>>().join(" ")
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn ended(mut command: Command) -> Result<()> {
    let status = command.stdout(std::io::stderr()).status().context("cannot start cargo")?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

/// The binaries that the kinds run are those of this checkout.
fn build() -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--quiet", "--release", "-p", "streamctl", "-p", "tidemill-load"]);
    ended(command)
}

/// The commit of this checkout; with a plus where files differ from it.
fn commit() -> Result<String> {
    let git = |args: &[&str]| -> Result<String> {
        let output = Command::new("git").args(args).output().context("cannot start git")?;
        ensure!(output.status.success(), "git {} ended with {}", args.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let hash = git(&["rev-parse", "--short=10", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ":!reliability"])?;
    Ok(if changed.is_empty() { hash } else { format!("{hash}+") })
}

fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = utc_text(i64::try_from(since.as_millis()).unwrap_or(0));
    // Seconds will do.
    text.split_once('.').map_or(text.clone(), |(seconds, _)| format!("{seconds}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kind: &str, from: u64, to: u64, counts: &str, failures: u64) -> Row {
        let (date, commit) = ("2026-01-02T03:04:05Z".into(), "0123456789".into());
        Row { date, commit, kind: kind.into(), from, to, counts: counts.into(), failures }
    }

    #[test]
    fn rows_come_back_and_a_cut_off_one_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/ledger.csv");
        assert_eq!(read(&path).unwrap(), []);
        let first = row("power-xfs", 0, 20, "cuts=20 seconds=9", 0);
        append(&path, &first).unwrap();
        // A kill in the middle of a write.
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}2026-01-02T03:04:06Z,0123")).unwrap();
        assert_eq!(read(&path).unwrap(), std::slice::from_ref(&first));
        let second = row("power-xfs", 20, 40, "cuts=20 seconds=8", 1);
        append(&path, &second).unwrap();
        assert_eq!(read(&path).unwrap(), [first, second]);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
        assert!(rows("a,b\n").is_err() && rows(&format!("{HEADER}\n1,2\n")).is_err());
    }

    #[test]
    fn seeds_go_on_where_the_kind_ended() {
        let rows =
            [row("power-xfs", 0, 20, "", 0), row("power-ext4", 0, 7, "", 1), row("power-xfs", 20, 30, "", 0)];
        assert_eq!(next_seed(&rows, Kind::PowerXfs), 30);
        assert_eq!(next_seed(&rows, Kind::PowerExt4), 7);
        assert_eq!(next_seed(&rows, Kind::RandomJobs), 0);
    }

    #[test]
    fn a_failed_row_says_why_and_is_still_a_row() {
        let counts = reason(&anyhow::anyhow!("LOST, 5 lines=3\nand more {}", "x".repeat(500)));
        assert!(counts.starts_with("failed:LOST__5_lines_3_and_more_x"), "{counts}");
        let here = std::env::current_dir().unwrap();
        let there = reason(&anyhow::anyhow!("kept in {}/target/x", here.display()));
        assert_eq!(there, "failed:kept_in_target/x", "no path of this machine");
        let line = row("power-xfs", 0, 20, &format!("{counts} seconds=70"), 1);
        assert_eq!(Row::parse(&line.to_string()), Some(line.clone()));
        assert_eq!((line.count("seconds"), line.count("lines")), (70, 0));
    }

    #[test]
    fn sums_are_by_kind() {
        let rows = [
            row("power-xfs", 0, 20, "cuts=20 acked=5 seconds=70", 0),
            row("power-xfs", 20, 30, "cuts=9 acked=5 seconds=9", 1),
        ];
        let shown = shown(&rows);
        let line = shown.lines().find(|line| line.starts_with("power-xfs")).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words[..5], ["power-xfs", "29", "200", "10000", "1"], "{line}");
        assert!(line.contains("1 min 19 s, 2 rows"), "{line}");
        assert_eq!(counts_of("Counts { states: 3, opens: 4 }\n"), "states=3 opens=4");
    }
}
