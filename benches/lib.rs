//! What the benchmarks share: what a process cost, percentiles, and where data goes.
//!
//! Each program states its question, workload, seed and durability in its head, measures in child processes, so that
//! start, end, memory and processor time of a run are all of its own, and checks its answer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What this process has cost so far (Linux).
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Processor time, user and system, of all threads.
    pub cpu_s: f64,
    /// Largest resident set.
    pub peak_mb: f64,
    /// Bytes given to write calls.
    pub written_mb: f64,
    /// Bytes that were to reach the disk; less where files were deleted before.
    pub disk_mb: f64,
}

impl Cost {
    /// Of this process, from `/proc/self`.
    ///
    /// # Errors
    ///
    /// Where there is no such file.
    pub fn so_far() -> Result<Self> {
        const TICKS_A_SECOND: f64 = 100.0; // USER_HZ, the same on every Linux
        let read = |name: &str| {
            std::fs::read_to_string(Path::new("/proc/self").join(name))
                .with_context(|| format!("/proc/self/{name}"))
        };
        let stat = read("stat")?;
        // The second field is the name in parentheses, which may hold anything.
        let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        let (status, io) = (read("status")?, read("io")?);
        Ok(Self {
            cpu_s: (ticks(11) + ticks(12)) / TICKS_A_SECOND,
            peak_mb: labelled(&status, "VmHWM:") / 1024.0,
            written_mb: labelled(&io, "wchar:") / 1e6,
            disk_mb: labelled(&io, "write_bytes:") / 1e6,
        })
    }
}

/// Median, 99th percentile and maximum of durations, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Spread {
    /// Half are at most this.
    pub p50: f64,
    /// 99 in 100 are at most this.
    pub p99: f64,
    /// All are at most this.
    pub max: f64,
}

impl Spread {
    /// Of these durations.
    pub fn of(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        let at = |share: f64| {
            let i = ((all.len() as f64 * share).ceil() as usize).clamp(1, all.len().max(1)) - 1;
            all.get(i).map_or(0.0, |d| d.as_secs_f64() * 1e3)
        };
        Self { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", self.p50, self.p99, self.max)
    }
}

/// A directory for a benchmark's data, removed at the end: in `TIDEMILL_BENCH_DIR`, else beside the build. Not in the
/// system's temporary directory, which is often memory, where a sync costs nothing.
///
/// # Errors
///
/// If it cannot be made.
pub fn scratch() -> Result<tempfile::TempDir> {
    let dir = match std::env::var_os("TIDEMILL_BENCH_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => beside_the_build()?.join("bench-data"),
    };
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(tempfile::TempDir::with_prefix_in("run-", dir)?)
}

/// Megabytes of the files in a directory and those below it.
///
/// # Errors
///
/// If one cannot be looked at.
pub fn directory_mb(dir: &Path) -> Result<f64> {
    let mut bytes = 0;
    each_file(dir, &mut |path| {
        bytes += std::fs::metadata(path)?.len();
        Ok(())
    })?;
    Ok(bytes as f64 / 1e6)
}

/// Drops the files of a directory from the page cache, so that they are read from the disk again. They are synced
/// first: what is dirty cannot be dropped.
///
/// # Errors
///
/// If one cannot be opened or synced.
pub fn evict(dir: &Path) -> Result<()> {
    each_file(dir, &mut |path| {
        // Sockets are no files.
        if path.metadata()?.is_file() {
            let file = std::fs::File::open(path)?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(())
    })
}

fn each_file(dir: &Path, each: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let (path, kind) = {
            let entry = entry?;
            (entry.path(), entry.file_type()?)
        };
        if kind.is_dir() {
            each_file(&path, each)?;
        } else {
            each(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Megabytes that this process has read from the disk itself, page cache left out.
///
/// # Errors
///
/// Where there is no `/proc`.
pub fn read_mb() -> Result<f64> {
    let io = std::fs::read_to_string("/proc/self/io").context("/proc/self/io")?;
    Ok(labelled(&io, "read_bytes:") / 1e6)
}

/// The number behind a label at the beginning of a line.
fn labelled(text: &str, label: &str) -> f64 {
    let line = text.lines().find_map(|l| l.strip_prefix(label));
    line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0)
}

/// `target/release`, where this program's `deps` are.
///
/// # Errors
///
/// If the program's own path is not known.
pub fn beside_the_build() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let deps = own.parent().and_then(Path::parent).context("the program is in no build directory")?;
    Ok(deps.to_owned())
}

/// The machine and the load on it, for the head of a result.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("?");
    let cores = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let load = read("/proc/loadavg");
    let load: Vec<_> = load.split(' ').take(2).collect();
    format!("{} x {}, load {}", cores, model.trim_start_matches([' ', '\t', ':']), load.join(" "))
}
