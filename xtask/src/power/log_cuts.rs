//! Cuts under `tidemill-load`: every kind of request of the log, whose fate its check knows to the last one.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::disk::{self, Cut, Disk};
use super::{Counts, Power, Random};

/// Opening a directory on a busy machine takes long, but never this long.
const FIRST_ACK_WITHIN: Duration = Duration::from_secs(60);

/// The paths of one image's runs.
struct Paths {
    load: PathBuf,
    data: PathBuf,
    history: PathBuf,
    acks: PathBuf,
    said: PathBuf,
}

/// Cuts one image with these seeds.
pub(super) fn image(options: &Power, disk: &Disk, work: &Path, seeds: Range<u64>) -> Result<Counts> {
    let beside = || options.streamctl.with_file_name("tidemill-load");
    let paths = Paths {
        load: options.load.clone().unwrap_or_else(beside),
        data: disk.dir().join("data"),
        history: work.join("history"),
        acks: work.join("acks"),
        said: work.join("said"),
    };
    match fs::remove_file(&paths.history) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut counts = Counts::default();
    for seed in seeds {
        cycle(options, disk, work, &paths, seed, &mut counts).with_context(|| format!("seed {seed}"))?;
    }
    Ok(counts)
}

fn cycle(
    options: &Power,
    disk: &Disk,
    work: &Path,
    paths: &Paths,
    seed: u64,
    counts: &mut Counts,
) -> Result<()> {
    let mut random = Random::new(seed);
    let cut = Cut::of(&mut random);
    disk.mount()?;
    // Of the run before.
    let _ = fs::remove_file(&paths.acks);
    let mut load = paths.command("run", seed);
    load.stderr(File::create(&paths.said)?);
    if let Some(fault) = &options.fault {
        load.env("TIDEMILL_FAULT", fault);
    }
    let mut load = Load(load.spawn().with_context(|| format!("cannot start {}", paths.load.display()))?);
    let result = under_load(disk, paths, &mut load, &cut, &mut random);
    let said =
        |why| format!("{why}; it said: {}", fs::read_to_string(&paths.said).unwrap_or_default().trim());
    result.with_context(|| said("the load did not get to the cut"))?;
    load.end()?;
    let ended = fs::read_to_string(&paths.said)?;
    ensure!(!ended.contains("error:"), "the load failed: {}", ended.trim());

    disk.unmount()?;
    disk.mount()?;
    // The check changes the directory, and what it finds wrong must be looked at as it was.
    let before = work.join("before");
    let _ = fs::remove_dir_all(&before);
    disk::run("cp", &["-a", &paths.data.to_string_lossy(), &before.to_string_lossy()])?;
    let output = paths.command("check", seed).stderr(Stdio::piped()).output()?;
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{} ({cut:?}, the directory as the cut left it: {})",
        why.trim(),
        before.display()
    );
    disk.unmount()?;

    let acked = paths.acked()?;
    let history = fs::read_to_string(&paths.history)?;
    let kept =
        history.lines().next_back().and_then(|line| line.split_once(' ')).map(|(_, kept)| kept.parse());
    let kept: u64 = kept.context("the check wrote no history")??;
    counts.cuts += 1;
    counts.acked += acked;
    counts.written_back += u64::from(cut.write_back);
    counts.beyond_acks += u64::from(kept > acked);
    Ok(())
}

/// From the first ack to the cut.
fn under_load(disk: &Disk, paths: &Paths, load: &mut Load, cut: &Cut, random: &mut Random) -> Result<()> {
    let started = Instant::now();
    while paths.acked().unwrap_or(0) == 0 {
        ensure!(started.elapsed() < FIRST_ACK_WITHIN, "no ack within {FIRST_ACK_WITHIN:?}");
        if let Some(status) = load.0.try_wait()? {
            bail!("the load ended with {status}");
        }
        thread::sleep(Duration::from_millis(2));
    }
    // The load itself, not a wait for something.
    thread::sleep(cut.after);
    if cut.frozen {
        load.signal(Signal::STOP)?;
    }
    if cut.write_back {
        disk::write_back(&paths.data, random)?;
    }
    disk.cut(cut)
}

impl Paths {
    fn command(&self, verb: &str, seed: u64) -> Command {
        let mut command = Command::new(&self.load);
        command.arg(verb).stdin(Stdio::null()).stdout(Stdio::null());
        command.arg("--dir").arg(&self.data).arg("--history").arg(&self.history);
        command.arg("--acks").arg(&self.acks).arg("--seed").arg(seed.to_string());
        command
    }

    fn acked(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.acks).context("cannot read the acks")?;
        text.trim().parse().with_context(|| format!("not a number of acks: {text:?}"))
    }
}

/// A process that does not outlive this.
struct Load(Child);

impl Load {
    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).context("a process has an id")?;
        kill_process(pid, signal).context("cannot signal the load")
    }

    fn end(mut self) -> Result<()> {
        self.0.kill().context("cannot kill the load")?;
        self.0.wait().context("cannot wait for the load")?;
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Both fail where it ended before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
