//! `xtask`: what `./x` calls once the binaries are built.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use xtask::chaos::Chaos;
use xtask::demo::Demo;
use xtask::full_disk;
use xtask::ledger::Ledger;
use xtask::page::Pages;
use xtask::power::Power;
use xtask::prove::Prove;
use xtask::recount::{Recount, Settings};

#[derive(Debug, Parser)]
#[command(name = "xtask", about = "What ./x calls once the binaries are built")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the main job, kill it twice, and hold its output against a recount.
    Demo(Demo),
    /// Kill a job, its owner and its producer again and again, then check what is left in the files.
    Chaos(Chaos),
    /// Run the long banks.
    Prove(Prove),
    /// Run something for long, and add it to the ledger; or show the ledger.
    Ledger(Ledger),
    /// Cut the power of a file system under load, again and again.
    Power(Power),
    /// Run the commands that pages of documentation show, and hold what they print against the pages.
    Page(Pages),
    /// Fill a small file system; `prove` mounts one and calls this.
    #[command(hide = true)]
    FullDisk {
        #[arg(long)]
        streamctl: PathBuf,
        #[arg(long)]
        dir: PathBuf,
    },
    /// Count an access log as job ip-count must, one line after the other.
    Recount {
        /// The log.
        file: PathBuf,
        /// Partitions of the topic, keyed by address.
        #[arg(long, default_value_t = 4)]
        partitions: u32,
        /// Window size in seconds.
        #[arg(long, default_value_t = 5)]
        window: i64,
        /// How far out of order lines may be, in seconds.
        #[arg(long, default_value_t = 10)]
        out_of_order: i64,
    },
}

#[allow(clippy::print_stderr, reason = "a command says why it failed")]
fn main() -> ExitCode {
    match execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stdout, reason = "what it prints is its result")]
fn execute() -> Result<()> {
    match Cli::parse().command {
        Command::Demo(demo) => demo.run(),
        Command::Chaos(chaos) => chaos.run(),
        Command::Prove(prove) => prove.run(),
        Command::Ledger(ledger) => ledger.run(),
        Command::Power(power) => power.run_and_tell(),
        Command::Page(pages) => {
            println!("{}", pages.run()?);
            Ok(())
        }
        Command::FullDisk { streamctl, dir } => full_disk::run(&streamctl, &dir),
        Command::Recount { file, partitions, window, out_of_order } => {
            let text = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let settings = Settings { partitions, window_ms: window * 1000, bound_ms: out_of_order * 1000 };
            let recount = Recount::of(settings, &text);
            println!(
                "{} lines = {} counted in {} rows + {} late + {} dead-letter",
                recount.lines,
                recount.counted(),
                recount.counts.len(),
                recount.late.values().sum::<u64>(),
                recount.dead.values().sum::<u64>()
            );
            Ok(())
        }
    }
}
