//! `tidemill-load`: puts a log under load until it is cut off, then checks what is left.
//!
//! ```text
//!   run   ─ opens the directory, folds the history, asks op after op ─▶ acks file: how many were acknowledged
//!         ⚡ power cut, or SIGKILL
//!   check ─ opens it again, reads everything, finds the k >= acks whose Model(k) it equals ─▶ history: seed k
//! ```
//!
//! The history, a line a run, says what must be there: run 0 through its k, then run 1 through its k, and so on. History
//! and acks lie outside the disk that is cut. Whoever cuts is elsewhere: `xtask power`.
//!
//! It uses the log as its owner does, without the lock of the directory.

mod drive;
mod observe;
mod script;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use drive::{Acks, Driver, in_flight_of, open};
use script::{Model, Script};
use tidemill_log::Create;

#[derive(Debug, Parser)]
#[command(name = "tidemill-load", about = "Puts a log under load, and checks what a power cut left of it")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask until the log stops; ends with 0 then, too.
    Run {
        #[command(flatten)]
        place: Place,
        /// Stop after so many ops instead.
        #[arg(long, default_value_t = u64::MAX)]
        ops: u64,
    },
    /// Open the directory, hold all of it against the history, and write what survived into the history.
    Check {
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, Args)]
struct Place {
    /// The data directory.
    #[arg(long)]
    dir: PathBuf,
    /// The runs before this one.
    #[arg(long)]
    history: PathBuf,
    /// How many ops of this run were acknowledged.
    #[arg(long)]
    acks: PathBuf,
    /// Chooses the ops of this run.
    #[arg(long)]
    seed: u64,
}

#[allow(clippy::print_stderr, reason = "a command says why it failed")]
fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run { place, ops } => run(&place, ops),
        Command::Check { place } => check(&place),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The runs so far: their number, and what they left.
fn history(path: &Path) -> Result<(u64, Model)> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let (mut run, mut model) = (0, Model::default());
    for line in text.lines() {
        let numbers =
            line.split_once(' ').and_then(|(seed, kept)| Some((seed.parse().ok()?, kept.parse().ok()?)));
        let (seed, kept): (u64, u64) =
            numbers.with_context(|| format!("not a line of a history: {line:?}"))?;
        let mut script = Script::new(seed, run, model);
        for _ in 0..kept {
            script.next();
        }
        model = script.model;
        model.crash();
        run += 1;
    }
    Ok((run, model))
}

#[allow(clippy::print_stderr, reason = "whoever cuts the power waits for the first line and reads the last")]
fn run(place: &Place, ops: u64) -> Result<()> {
    let (run, model) = history(&place.history)?;
    let acks = Acks::create(&place.acks)?;
    std::fs::create_dir_all(&place.dir).with_context(|| format!("cannot create {}", place.dir.display()))?;
    let log = open(&place.dir, Create::IfMissing)?;
    let driver = Driver::new(&log, acks, in_flight_of(place.seed)?)?;
    let mut script = Script::new(place.seed, run, model);
    if let Some(stopped) = driver.run(&mut script, ops)? {
        eprintln!("stopped: {stopped}");
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "what it prints is its result")]
fn check(place: &Place) -> Result<()> {
    let acked = Acks::read(&place.acks)?;
    let (run, model) = history(&place.history)?;
    let log = open(&place.dir, Create::Never)?;
    if let Some(damage) = log.status().damage {
        bail!("a crash is called corruption: {damage}");
    }
    let found = observe::observe(&log)?;
    let mut script = Script::new(place.seed, run, model);
    for _ in 0..acked {
        script.next();
    }
    let in_flight = in_flight_of(place.seed)? as u64;
    let mut first_difference = None;
    for kept in acked..=acked + in_flight {
        let mut model = script.model.clone();
        model.crash();
        let Some(difference) = found.differs_from(&model.visible()) else {
            let line = format!("{} {kept}\n", place.seed);
            let mut history = OpenOptions::new().create(true).append(true).open(&place.history)?;
            history.write_all(line.as_bytes()).context("cannot write the history")?;
            println!("run {run} seed {}: {acked} acked, {kept} there, exactly a prefix", place.seed);
            return Ok(());
        };
        first_difference.get_or_insert(difference);
        script.next();
    }
    ensure!(
        first_difference.is_none(),
        "LOST OR INVENTED in run {run}, seed {}: {acked} ops were acknowledged, and what is there is no prefix of what was asked that holds them. Against exactly the acknowledged ones: {}",
        place.seed,
        first_difference.unwrap_or_default()
    );
    Ok(())
}
