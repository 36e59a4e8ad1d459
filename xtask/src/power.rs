//! Power cuts on real file systems: an image is mounted, shut down under load, mounted again, and what is left is held
//! against what was acknowledged.
//!
//! ```text
//!   xtask power ──unshare: mount and process namespaces of its own──▶ sh ──▶ xtask power --inside DIR
//!                                                                                │
//!   image (unlinked) ◀── loop device (frees itself) ◀── mount ◀──────────────────┤
//!      │ 5 cuts, then a fresh one                                                │
//!      ├─ even: `tidemill-load`, every kind of request of the log      log_cuts  │
//!      └─ odd:  `streamctl produce` and `streamctl run ip-count`       job_cuts  ▼
//!          mount ─ load for 200 to 600 ms ─ some pages written back ─ ⚡ ─ unmount ─ mount ─ check
//! ```
//!
//! The shutdown drops every page that the file system had not written: what an unplugged machine loses, but for the
//! cache inside a disk. `xfs_io -c shutdown` does it on ext4, too.
//!
//! Nothing is left behind however this ends: the namespaces die with their first process and take the mount along, the
//! last close frees the loop device, and the image has no name. The first process dies when whoever started it does:
//! it watches a pipe.

mod disk;
mod job_cuts;
mod log_cuts;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// Cuts that one image takes: what one recovery left, the next one starts from.
const CUTS_PER_IMAGE: u64 = 5;

/// What is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum FileSystem {
    /// ext4 with the defaults of mkfs.
    Ext4,
    /// XFS with the defaults of mkfs.
    Xfs,
}

impl FileSystem {
    /// As mount calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

/// `xtask power ...`
#[derive(Debug, Clone, Args)]
pub struct Power {
    /// The file system.
    #[arg(long, value_enum)]
    pub fs: FileSystem,
    /// How many power cuts.
    #[arg(long, default_value_t = 50)]
    pub cuts: u64,
    /// The first cut's seed; the others follow.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The streamctl to cut; `tidemill-load` lies beside it.
    #[arg(long, hide = true)]
    pub streamctl: PathBuf,
    /// The load to use instead, and the rule of the log to break in it: the cuts must notice.
    #[arg(long, hide = true, requires = "fault")]
    pub load: Option<PathBuf>,
    /// See `load`.
    #[arg(long, hide = true)]
    pub fault: Option<String>,
    /// Already in the namespaces: work here.
    #[arg(long, hide = true)]
    pub inside: Option<PathBuf>,
}

/// What a bank of cuts met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Power cuts whose aftermath was checked.
    pub cuts: u64,
    /// Of them, under a job and its producer.
    pub job_cuts: u64,
    /// After some pages were written back at random.
    pub written_back: u64,
    /// In which something survived that was not acknowledged.
    pub beyond_acks: u64,
    /// Acknowledged requests of the log, or lines of the producer.
    pub acked: u64,
    /// Acknowledged commits of the job.
    pub commits: u64,
    /// How long it took.
    pub seconds: u64,
}

/// How a bank ended that did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All cuts were made and checked.
    Done(Counts),
    /// This machine can not cut power, and why.
    Skipped(String),
}

impl Power {
    /// Runs the bank, in namespaces of its own, and says how it went; an error at the first broken promise.
    pub fn run(&self) -> Result<Outcome> {
        if let Some(work) = &self.inside {
            watch_the_starter();
            return inside(self, work).map(Outcome::Done);
        }
        match may_cut() {
            MayCut::Yes(root) => self.in_namespaces(&root).map(Outcome::Done),
            MayCut::No(why) => Ok(Outcome::Skipped(why)),
            MayCut::Broken(why) => bail!(why),
        }
    }

    /// The command's whole output.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    pub fn run_and_tell(&self) -> Result<()> {
        match self.run() {
            Ok(Outcome::Done(counts)) if self.inside.is_some() => {
                println!("{}", serde_json::to_string(&counts)?);
            }
            // Whoever started it says the rest.
            Err(error) if self.inside.is_some() => {
                println!("{error:#}");
                std::process::exit(1);
            }
            Ok(Outcome::Done(counts)) => println!("{}", counts.sentence(self.fs)),
            Ok(Outcome::Skipped(why)) => bail!("skipped: {why}"),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn in_namespaces(&self, root: &[String]) -> Result<Counts> {
        for tool in [&format!("mkfs.{}", self.fs.name()), "xfs_io", "losetup", "mount", "umount"] {
            ensure!(
                on_path(tool),
                "{tool} is missing; ./x installs it, or: apt-get install xfsprogs e2fsprogs mount"
            );
        }
        let streamctl = std::path::absolute(&self.streamctl)?;
        let target = streamctl.parent().and_then(Path::parent).context("the binary is in a target folder")?;
        remove_stale(target);
        let work = target.join(format!("tidemill-power-{}-{}", self.fs.name(), std::process::id()));
        fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
        let mut command: Vec<String> = root.to_vec();
        command.extend(UNSHARE.map(str::to_owned));
        // The shell is the first process of the namespace: a signal from the terminal reaches its child, not it.
        command.extend(["sh", "-c", "\"$@\"; exit $?", "sh"].map(str::to_owned));
        let text = |path: &Path| Ok::<_, anyhow::Error>(std::path::absolute(path)?.display().to_string());
        command.push(text(&std::env::current_exe()?)?);
        command.extend(["power", "--fs", self.fs.name()].map(str::to_owned));
        command.extend(["--cuts".into(), self.cuts.to_string(), "--seed".into(), self.seed.to_string()]);
        command.extend(["--streamctl".into(), text(&self.streamctl)?, "--inside".into(), text(&work)?]);
        if let (Some(load), Some(fault)) = (&self.load, &self.fault) {
            command.extend(["--load".into(), text(load)?, "--fault".into(), fault.clone()]);
        }
        let started = Instant::now();
        let child = Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", command[0]))?;
        // Its standard input stays open until it is done: it ends when that closes.
        let mut child = child;
        let stdin = child.stdin.take();
        let output = child.wait_with_output()?;
        drop(stdin);
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let kept = match &self.fault {
                None => format!("kept for a look: {}", work.display()),
                Some(_) => match remove_as_root(root, &work) {
                    Ok(()) => "nothing kept".to_owned(),
                    // What the cuts found is what counts.
                    Err(error) => format!("{error:#}"),
                },
            };
            bail!("power cuts on {}: {}\n{kept}", self.fs.name(), said.trim());
        }
        let mut counts: Counts =
            serde_json::from_str(said.trim()).with_context(|| format!("not a result: {said:?}"))?;
        counts.seconds = started.elapsed().as_secs();
        remove_as_root(root, &work)?;
        Ok(counts)
    }
}

/// A mount and a process namespace that die together with whoever started them.
const UNSHARE: [&str; 7] =
    ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"];

impl Counts {
    /// One line for people.
    pub fn sentence(&self, fs: FileSystem) -> String {
        format!(
            "{} power cuts on {} in {} s, {} of them under a job: {} acks and {} commits, none lost; {} cuts after partial write-back, in {} more survived than was acknowledged",
            self.cuts,
            fs.name(),
            self.seconds,
            self.job_cuts,
            self.acked,
            self.commits,
            self.written_back,
            self.beyond_acks
        )
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.cuts += other.cuts;
        self.job_cuts += other.job_cuts;
        self.written_back += other.written_back;
        self.beyond_acks += other.beyond_acks;
        self.acked += other.acked;
        self.commits += other.commits;
        self.seconds += other.seconds;
    }
}

/// Whether power can be cut here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MayCut {
    /// With this before a command it is root's.
    Yes(Vec<String>),
    /// This machine has not got what it takes.
    No(String),
    /// It has root and loop devices, and yet it does not work: that is no reason to skip anything.
    Broken(String),
}

/// How to become root here, or why power can not be cut.
pub(crate) fn may_cut() -> MayCut {
    if !cfg!(target_os = "linux") {
        return MayCut::No("power cuts need Linux: they mount loop images".into());
    }
    let root: Vec<String> = if rustix::process::geteuid().is_root() {
        Vec::new()
    } else if succeeds("sudo", &["-n", "true"]) {
        vec!["sudo".into(), "-n".into()]
    } else {
        return MayCut::No("power cuts need root, and `sudo -n` asks for a password".into());
    };
    if !Path::new("/dev/loop-control").exists() {
        return MayCut::No("power cuts need loop devices, and there is no /dev/loop-control".into());
    }
    probed(root, &UNSHARE)
}

/// With root and loop devices there is nothing to skip: a namespace that cannot be made is a failure.
fn probed(root: Vec<String>, namespace: &[&str]) -> MayCut {
    let mut probe: Vec<&str> = root.iter().map(String::as_str).collect();
    probe.extend(namespace);
    probe.push("true");
    if succeeds(probe[0], &probe[1..]) {
        return MayCut::Yes(root);
    }
    MayCut::Broken(format!(
        "root and loop devices are here, and yet `{}` fails: power cuts need a mount namespace",
        probe.join(" ")
    ))
}

/// Ends this process, and with it the namespaces, when standard input closes: whoever started it is gone.
fn watch_the_starter() {
    std::thread::spawn(|| {
        let mut byte = [0];
        while !matches!(std::io::stdin().read(&mut byte), Ok(0) | Err(_)) {}
        std::process::exit(1);
    });
}

/// The bank itself, where mounting is nobody else's business.
fn inside(options: &Power, work: &Path) -> Result<Counts> {
    let disk = disk::Disk::new(options.fs, work)?;
    let mut counts = Counts::default();
    let end = options.seed + options.cuts;
    let mut seed = options.seed;
    while seed < end {
        let image = seed..end.min(seed + CUTS_PER_IMAGE - seed % CUTS_PER_IMAGE);
        seed = image.end;
        disk.format()?;
        let of_job = image.start / CUTS_PER_IMAGE % 2 == 1 && options.fault.is_none();
        let what = format!("seeds {}..{}, {}", image.start, image.end, if of_job { "job" } else { "log" });
        let done = match of_job {
            true => job_cuts::image(options, &disk, work, image),
            false => log_cuts::image(options, &disk, work, image),
        };
        match done {
            Ok(done) => counts.add(&done),
            Err(error) => {
                disk.keep(&work.join("disk"));
                return Err(error.context(what));
            }
        }
        let _ = writeln!(
            std::io::stderr(),
            "power {}: {} of {} cuts",
            options.fs.name(),
            counts.cuts,
            options.cuts
        );
    }
    drop(disk);
    for entry in fs::read_dir(work)? {
        let path = entry?.path();
        match path.is_dir() {
            true => fs::remove_dir_all(&path)?,
            false => fs::remove_file(&path)?,
        }
    }
    Ok(counts)
}

/// Removes a folder in which files may be root's.
fn remove_as_root(root: &[String], dir: &Path) -> Result<()> {
    if root.is_empty() {
        return fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()));
    }
    let status = Command::new(&root[0]).args(&root[1..]).args(["rm", "-rf", "--"]).arg(dir).status();
    let status = status.with_context(|| format!("cannot start {} to remove {}", root[0], dir.display()))?;
    ensure!(status.success(), "cannot remove {}: {} rm ended with {status}", dir.display(), root.join(" "));
    Ok(())
}

/// Folders of runs that were killed. Those of failed runs are kept: they say so by a file in them.
fn remove_stale(target: &Path) {
    let Ok(entries) = fs::read_dir(target) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid =
            name.strip_prefix("tidemill-power-").and_then(|rest| rest.rsplit_once('-')).map(|(_, pid)| pid);
        let gone = pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists());
        if gone && !entry.path().join("disk").exists() {
            // What root left is not ours to remove; it is small.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn succeeds(program: &str, args: &[&str]) -> bool {
    let quiet = || Stdio::null();
    let status = Command::new(program).args(args).stdin(quiet()).stdout(quiet()).stderr(quiet()).status();
    status.is_ok_and(|status| status.success())
}

/// Is there such a program? The folders of root's tools count, too.
fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.into_iter().any(|dir| dir.join(tool).is_file())
}

/// A sequence of random numbers that a seed decides.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A skip must not hide that what was there to be used does not work.
    #[test]
    fn a_probe_that_fails_with_root_and_loop_devices_is_no_skip() {
        assert_eq!(probed(Vec::new(), &["env"]), MayCut::Yes(Vec::new()));
        let broken = probed(Vec::new(), &["env", "false"]);
        assert!(
            matches!(&broken, MayCut::Broken(why) if why.contains("`env false true` fails")),
            "{broken:?}"
        );
    }

    #[test]
    fn a_folder_is_removed_by_whoever_may() {
        let dir = tempfile::tempdir().unwrap();
        for root in [Vec::new(), vec!["env".to_owned(), "LC_ALL=C".to_owned()]] {
            let work = dir.path().join("work");
            fs::create_dir_all(work.join("deep")).unwrap();
            remove_as_root(&root, &work).unwrap();
            assert!(!work.exists());
        }
        let error = remove_as_root(&["false".to_owned()], dir.path()).unwrap_err().to_string();
        assert!(error.starts_with("cannot remove"), "{error}");
    }
}
