//! Kills at random moments: SIGKILL after 20 to 1500 ms, again and again, and the output equals the recount.
//!
//! The demo kills where it proves most; this kills anywhere: in recovery, in a commit, in the middle of a checkpoint.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::counted::Counted;
use crate::recount::{Recount, Settings};
use crate::streamctl::{Status, Streamctl};

/// What a bank of kills did.
#[derive(Debug)]
pub struct Done {
    /// Runs that were killed.
    pub kills: u32,
    /// Of them, those that had output rows in the open transaction.
    pub in_flight: u32,
}

/// `kills` SIGKILLs of `run ip-count`, over as many inputs as it takes; folders under `dir` are removed if all is exact.
pub fn run(streamctl: &Path, dir: &Path, kills: u32, seed: u64) -> Result<Done> {
    let mut done = Done { kills: 0, in_flight: 0 };
    let mut input = seed;
    while done.kills < kills {
        let before = done.kills;
        one_input(streamctl, dir, kills, input, &mut done)?;
        ensure!(done.kills > before, "a whole input was processed before the first kill");
        input += 1;
    }
    Ok(done)
}

/// Kills runs over one input until one gets through, or there were enough kills, then checks what came out.
fn one_input(streamctl: &Path, dir: &Path, kills: u32, seed: u64, done: &mut Done) -> Result<()> {
    let dir = dir.join(format!("tidemill-kills-{}-{seed}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let streamctl = Streamctl::new(streamctl, dir.join("data"));
    let log = dir.join("access.log");
    let file = log.to_string_lossy().into_owned();
    streamctl.run(&[
        "gen",
        "access-log",
        "--lines",
        "1000000",
        "--seed",
        &seed.to_string(),
        "--file",
        &file,
    ])?;
    streamctl.run(&["produce", "access-log", "--create", "--key-regex", "^([^ ]+)", "--file", &file])?;
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut through = false;
    while done.kills < kills && !through {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let tasks = (1 + random % 3).to_string();
        let deadline = Instant::now() + Duration::from_millis(20 + (random >> 8) % 1480);
        let mut run = streamctl.start_run(&[
            "ip-count",
            "--until-end",
            "--commit-interval",
            "30ms",
            "--tasks",
            &tasks,
        ])?;
        let mut open = 0;
        // A run that says nothing until the deadline is killed like any other.
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match run.next(left) {
                Ok(Some(Status::Open { output_rows })) => open = output_rows,
                Ok(Some(Status::Committed { .. })) => open = 0,
                Ok(Some(_)) | Err(_) => {}
                Ok(None) => {
                    through = true;
                    break;
                }
            }
        }
        run.kill()?;
        if !through {
            done.kills += 1;
            done.in_flight += u32::from(open > 0);
        }
    }
    streamctl.run(&["run", "ip-count", "--until-end"])?;
    let settings = Settings { partitions: 4, window_ms: 5_000, bound_ms: 10_000 };
    let recount = Recount::of(settings, &std::fs::read(&log)?);
    let counted = Counted::read(
        &streamctl.values("ip-counts", "read-committed")?,
        &streamctl.values("ip-counts-late", "read-committed")?,
        &streamctl.values("ip-count-dead-letter", "read-committed")?,
    )?;
    let differences = counted.differences(&recount, settings.window_ms);
    ensure!(
        differences.is_empty(),
        "after {} kills, data kept in {}: {differences:#?}",
        done.kills,
        dir.display()
    );
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
