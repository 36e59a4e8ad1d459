//! A disk whose power can be cut: an image without a name, behind a loop device that frees itself.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{FileSystem, Random};

/// Sparse: what is not written takes no space. XFS makes nothing below 300 MB.
const IMAGE_BYTES: u64 = 2 << 30;
/// A process that was just killed may hold the mount for a moment.
const UNMOUNT_WITHIN: Duration = Duration::from_secs(30);
/// Most ranges of files that are written back before a cut.
const PIECES_MAX: u64 = 8;

pub(super) struct Disk {
    fs: FileSystem,
    device: String,
    /// The last close frees the loop device.
    _held: File,
    mount: PathBuf,
}

/// When and how the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// Load before it.
    pub after: Duration,
    /// Random pages are written back first.
    pub write_back: bool,
    /// The load is stopped meanwhile, so that what it left half done is.
    pub frozen: bool,
    /// The file system's own log is flushed first.
    pub flush_log: bool,
}

impl Cut {
    pub(super) fn of(random: &mut Random) -> Self {
        Self {
            after: Duration::from_millis(200 + random.below(400)),
            write_back: random.percent(30),
            frozen: random.percent(50),
            flush_log: random.percent(25),
        }
    }
}

impl Disk {
    pub(super) fn new(fs: FileSystem, work: &Path) -> Result<Self> {
        let image = work.join("image");
        File::create(&image).and_then(|f| f.set_len(IMAGE_BYTES)).context("cannot make the image")?;
        let name = image.to_str().context("the path of the image is not UTF-8")?;
        let device = run("losetup", &["--find", "--show", name])?.trim().to_owned();
        let held = OpenOptions::new().read(true).open(&device);
        // In use, so this only tells it to free itself at the last close.
        run("losetup", &["--detach", &device])?;
        let held = held.with_context(|| format!("cannot open {device}"))?;
        fs::remove_file(&image).context("cannot unlink the image")?;
        let mount = work.join("mnt");
        fs::create_dir_all(&mount)?;
        Ok(Self { fs, device, _held: held, mount })
    }

    /// Where it is mounted.
    pub(super) fn dir(&self) -> &Path {
        &self.mount
    }

    /// An empty file system.
    pub(super) fn format(&self) -> Result<()> {
        let mkfs = format!("mkfs.{}", self.fs.name());
        match self.fs {
            // Without the lazy part, which would write to the disk in the background for minutes.
            FileSystem::Ext4 => {
                let now = "lazy_itable_init=0,lazy_journal_init=0";
                run(&mkfs, &["-q", "-F", "-E", now, &self.device])
            }
            FileSystem::Xfs => run(&mkfs, &["-q", "-f", &self.device]),
        }?;
        Ok(())
    }

    pub(super) fn mount(&self) -> Result<()> {
        run("mount", &["-t", self.fs.name(), &self.device, self.mount_text()?])?;
        Ok(())
    }

    pub(super) fn unmount(&self) -> Result<()> {
        let since = Instant::now();
        loop {
            match run("umount", &[self.mount_text()?]) {
                Ok(_) => return Ok(()),
                Err(error) if since.elapsed() > UNMOUNT_WITHIN => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The power goes: what was not written to the disk is lost.
    pub(super) fn cut(&self, cut: &Cut) -> Result<()> {
        let shutdown = if cut.flush_log { "shutdown -f" } else { "shutdown" };
        run("xfs_io", &["-x", "-c", shutdown, self.mount_text()?])?;
        ensure!(
            File::create(self.mount.join("after-the-cut")).is_err(),
            "the file system still takes files after its shutdown"
        );
        Ok(())
    }

    /// Copies what is on the disk, as far as that goes.
    pub(super) fn keep(&self, to: &Path) {
        // It may be mounted, shut down, or neither.
        let _ = run("umount", &[&self.mount.to_string_lossy()]);
        let _ = self.mount();
        let _ = run("cp", &["-a", &self.mount.to_string_lossy(), &to.to_string_lossy()]);
        let _ = self.unmount();
    }

    fn mount_text(&self) -> Result<&str> {
        self.mount.to_str().context("the mount point is not UTF-8")
    }
}

/// Writes some ranges of some files back, in no order, as the system does when it finds the time.
pub(super) fn write_back(dir: &Path, random: &mut Random) -> Result<()> {
    let mut files = Vec::new();
    list(dir, &mut files)?;
    files.sort();
    if files.is_empty() {
        bail!("there is no file below {}", dir.display());
    }
    for _ in 0..1 + random.below(PIECES_MAX) {
        let path = &files[usize::try_from(random.below(files.len() as u64))?];
        // It may be gone by now: the load goes on.
        let Ok(bytes) = fs::metadata(path).map(|m| m.len()) else { continue };
        let from = random.below(bytes.max(1)) / 4096 * 4096;
        let length = 4096 * (1 + random.below(64));
        let how = match random.below(4) {
            0 => "fdatasync".to_owned(),
            _ => format!("sync_range -w {from} {length}"),
        };
        let _ = run("xfs_io", &["-c", &how, &path.to_string_lossy()]);
    }
    Ok(())
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => list(&entry.path(), files)?,
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
    Ok(())
}

/// Runs a tool to its end and returns what it printed.
pub(super) fn run(program: &str, args: &[&str]) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(args)
        // Not every root has its own tools on the path.
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} {} ended with {}: {}",
        args.join(" "),
        output.status,
        said.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
