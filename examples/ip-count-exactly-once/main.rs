//! Case study: exactly once, seen with one's own eyes. Four addresses, a record a second each, windows of five seconds:
//! every complete window must count 5, however often producer and job are killed.
//!
//! README.md beside this file says what to predict, to watch and to break. `producer.rs` and `job.rs` are the two
//! programs, `supervise.rs` starts and kills them (this binary, run again as `producer` and `job`), `verdict.rs` compares.

mod children;
mod job;
mod producer;
mod supervise;
mod verdict;

use std::fmt;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::{Args, Parser, Subcommand};
use tidemill::engine::Mode;
use tidemill::{Directory, Guarantee, Isolation};
use tidemill_examples::{Place, finish, say};

use crate::producer::Schedule;
use crate::supervise::Plan;

/// How times are written.
const FORM: &str = "%Y-%m-%d_%H:%M:%S";

/// Counts under kill -9, and shows what the weaker guarantees would have made of it.
#[derive(Parser)]
#[command(name = "ip-count-exactly-once", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    schedule: ScheduleArgs,
    /// How often the exactly-once job and its producer are killed; the weaker ones a quarter of it.
    #[arg(long, default_value_t = 12)]
    kills: u32,
    /// Names the victims and the moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this guarantee [default: all three, one after the other].
    #[arg(long, value_parser = guarantee)]
    guarantee: Option<Guarantee>,
    /// Where log and state lie, and stay: a folder per guarantee in it [default: a temporary folder].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Role {
    /// Writes a record per address and second, until its input ends (Ctrl-D).
    Producer {
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        #[command(flatten)]
        schedule: ScheduleArgs,
    },
    /// Counts, until its input ends (Ctrl-D).
    Job {
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// What a kill may do to the output.
        #[arg(long, default_value = "exactly-once", value_parser = guarantee)]
        guarantee: Guarantee,
        /// To the end of what is there, then every window is closed.
        #[arg(long)]
        until_end: bool,
    },
    /// Prints the rows that the job wrote.
    Read {
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// Also those of transactions that are open, or were aborted.
        #[arg(long)]
        uncommitted: bool,
    },
}

#[derive(Args)]
struct ScheduleArgs {
    /// The first second.
    #[arg(long, default_value = "2024-05-17T10:00:00Z", value_name = "RFC3339")]
    start: jiff::Timestamp,
    /// Seconds of event time per second.
    #[arg(long, default_value_t = 60.0, value_parser = above_zero)]
    speed: f64,
    /// At least so many seconds are written.
    #[arg(long, default_value_t = 30)]
    seconds: u32,
}

impl ScheduleArgs {
    /// Whole seconds: a record stands for a second.
    fn schedule(&self) -> Schedule {
        Schedule { start: self.start.as_second() * 1000, speed: self.speed, seconds: self.seconds }
    }
}

fn guarantee(text: &str) -> Result<Guarantee> {
    text.parse().map_err(|error| anyhow!("{error}"))
}

fn above_zero(text: &str) -> Result<f64> {
    let speed = text.parse::<f64>().ok().filter(|speed| speed.is_finite() && *speed > 0.0);
    speed.ok_or_else(|| anyhow!("a number above 0"))
}

/// A line of data on stdout, seen at once.
fn tell(line: impl fmt::Display) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    finish(match &cli.role {
        None => whole(&cli),
        Some(Role::Producer { data, schedule }) => producer::run(data, schedule.schedule()),
        Some(Role::Job { data, guarantee, until_end }) => {
            job::run(data, *guarantee, if *until_end { Mode::UntilEnd } else { Mode::Unbounded })
        }
        Some(Role::Read { data, uncommitted }) => read(data, *uncommitted),
    })
}

/// The whole case.
fn whole(cli: &Cli) -> Result<()> {
    let mut place = Place::new(cli.data.as_deref())?;
    let all = Guarantee::ALL.into_iter().filter(|g| cli.guarantee.is_none_or(|only| only == *g));
    let mut failed = Vec::new();
    tell("guarantee      kills windows  exactly 5  above 5  below 5")?;
    for guarantee in all {
        let kills = if guarantee == Guarantee::ExactlyOnce { cli.kills } else { cli.kills.div_ceil(4) };
        let plan = Plan { guarantee, kills, seed: cli.seed, schedule: cli.schedule.schedule() };
        say(format_args!("{guarantee}: producer and job run as processes of their own"));
        let data = place.path().join(guarantee.name());
        let outcome = supervise::run(&data, plan);
        let judged = outcome.and_then(|outcome| {
            tell(format_args!("{:<14} {:>5} {}", guarantee.name(), outcome.kills, outcome.verdict))?;
            explain(&outcome.verdict);
            supervise::judge(plan, &outcome)
        });
        if let Err(error) = judged {
            failed.push(error);
        }
    }
    match failed.into_iter().next() {
        None => Ok(()),
        Some(error) => {
            place.keep();
            Err(error)
        }
    }
}

/// What the numbers do not show.
fn explain(verdict: &verdict::Verdict) {
    if let Some((window, sum)) = &verdict.example {
        say(format_args!("  for example, the rows of {window} add up to {sum}"));
    }
    let (all, committed) = (verdict.uncommitted_rows, verdict.committed_rows);
    match &verdict.seen_often {
        Some((row, times)) if all > committed => say(format_args!(
            "  a reader of uncommitted data sees {all} rows where {committed} are committed; \"{row}\" {times} times"
        )),
        _ => say(format_args!("  committed or not, a reader sees the same {committed} rows")),
    }
}

fn read(data: &std::path::Path, uncommitted: bool) -> Result<()> {
    let isolation = if uncommitted { Isolation::ReadUncommitted } else { Isolation::ReadCommitted };
    for row in Directory::open(data)?.read(job::SINK, isolation)? {
        tell(row.text())?;
    }
    Ok(())
}
