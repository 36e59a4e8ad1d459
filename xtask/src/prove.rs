//! `./x prove`: the long banks, one after the other, each with a line that says what it showed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::demo::Demo;
use crate::{full_disk, kills};

/// Crates with a bank of seeded faults: rules that a test breaks to see that it notices. Their sweeps are whole here
/// (every case of the log's, 10,000 random jobs of the engine's), where `./x test` takes samples.
const FAULT_BANKS: [&str; 2] = ["tidemill-log", "tidemill-stream"];
const WHOLE_SWEEPS: [(&str, &str); 2] = [("TIDEMILL_SWEEP", "all"), ("TIDEMILL_SEEDS", "0-10000")];

/// `./x prove ...`
#[derive(Debug, Args)]
pub struct Prove {
    /// The streamctl to run.
    #[arg(long, hide = true)]
    streamctl: PathBuf,
    /// How many SIGKILLs at random moments.
    #[arg(long, default_value_t = 20)]
    kills: u32,
    /// Chooses the moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Prove {
    /// Runs the banks; an error at the first that fails.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    pub fn run(&self) -> Result<()> {
        let started = Instant::now();
        for package in FAULT_BANKS {
            println!("\n== seeded faults and long sweeps of {package}");
            cargo(&["test", "--release", "-p", package, "--features", "faults"])?;
        }
        println!("\n== a disk that fills up");
        full_disk::in_namespace(&self.streamctl)?;
        println!(
            "a full disk refused appends before anything was lost; with room again the input was completed"
        );
        println!("\n== {} SIGKILLs at random moments", self.kills);
        let target =
            self.streamctl.parent().and_then(Path::parent).context("the binary is in a target folder")?;
        let done = kills::run(&self.streamctl, target, self.kills, self.seed)?;
        println!("{} kills, {} of them with output rows in flight: exact", done.kills, done.in_flight);
        ensure!(
            done.in_flight > 0 || self.kills < 10,
            "no kill met output rows in flight: they proved too little"
        );
        println!("\n== the demo");
        Demo::with_defaults(self.streamctl.clone()).run()?;
        println!("\n./x prove: all banks held, in {} s", started.elapsed().as_secs());
        Ok(())
    }
}

fn cargo(args: &[&str]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).args(args).envs(WHOLE_SWEEPS).status().context("cannot start cargo")?;
    ensure!(status.success(), "cargo {} ended with {status}", args.join(" "));
    Ok(())
}
