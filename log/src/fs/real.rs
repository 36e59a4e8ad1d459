//! [`Fs`] on the operating system's files.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use super::{File, Fs, FsError, OpenHow, check_path, check_rename};

/// Zeros are written in pieces of this size: large enough for the device, small enough for a buffer.
const ZERO_PIECE_BYTES: usize = 1 << 20;

/// The files below one real directory. Every path is resolved from a descriptor held open since the start, so that
/// renaming or replacing the directory cannot redirect a write; the last component is never followed if it is a
/// symbolic link. Descriptors close on exec.
#[derive(Debug)]
pub struct RealFs {
    root: OwnedFd,
}

impl RealFs {
    /// Opens an existing directory.
    pub fn new(dir: impl AsRef<Path>) -> io::Result<Self> {
        let dir = dir.as_ref();
        let root =
            rustix::fs::openat(CWD, dir, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| FsError::wrap("open", &dir.to_string_lossy(), e))?;
        Ok(Self { root })
    }

    fn open_dir(&self, op: &'static str, path: &str) -> io::Result<OwnedFd> {
        check_path(op, path)?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = if path.is_empty() { "." } else { path };
        rustix::fs::openat(&self.root, name, flags, Mode::empty()).map_err(|e| FsError::wrap(op, path, e))
    }
}

impl Fs for RealFs {
    fn open(&self, path: &str, how: OpenHow) -> io::Result<Arc<dyn File>> {
        check_path("open", path)?;
        let flags = OFlags::CLOEXEC
            | OFlags::NOFOLLOW
            | match how {
                OpenHow::Read => OFlags::RDONLY,
                OpenHow::Write => OFlags::RDWR,
                OpenHow::CreateNew => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
            };
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP;
        let open = || -> io::Result<std::fs::File> {
            let file = std::fs::File::from(rustix::fs::openat(&self.root, path, flags, mode)?);
            if file.metadata()?.is_dir() {
                return Err(rustix::io::Errno::ISDIR.into());
            }
            Ok(file)
        };
        let file = open().map_err(|e| FsError::wrap("open", path, e))?;
        Ok(Arc::new(RealFile { file, path: path.into() }))
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        check_path("create directory", path)?;
        let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP;
        rustix::fs::mkdirat(&self.root, path, mode).map_err(|e| FsError::wrap("create directory", path, e))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let fd = self.open_dir("list", dir)?;
        let wrap = |e: rustix::io::Errno| FsError::wrap("list", dir, e);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::new(fd).map_err(wrap)? {
            let entry = entry.map_err(wrap)?;
            match entry.file_name().to_str() {
                Ok("." | "..") => {}
                Ok(name) => names.push(name.to_owned()),
                // Nothing of ours has such a name, and it could not be passed back to us.
                Err(_) => tracing::debug!(dir, "a name that is not UTF-8 is left alone"),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_rename(from, to)?;
        rustix::fs::renameat(&self.root, from, &self.root, to).map_err(|e| FsError::wrap("rename", from, e))
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        check_path("unlink", path)?;
        rustix::fs::unlinkat(&self.root, path, AtFlags::empty()).map_err(|e| FsError::wrap("unlink", path, e))
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        check_path("remove directory", path)?;
        rustix::fs::unlinkat(&self.root, path, AtFlags::REMOVEDIR)
            .map_err(|e| FsError::wrap("remove directory", path, e))
    }

    fn syncs_at_once(&self) -> usize {
        // A first run leaves some 250 files of a few pages: 16 at a time share the commits of the file system.
        16
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let fd = self.open_dir("sync directory", path)?;
        rustix::fs::fsync(fd).map_err(|e| FsError::wrap("sync directory", path, e))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root).map_err(|e| FsError::wrap("statvfs", "", e))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

struct RealFile {
    file: std::fs::File,
    path: Box<str>,
}

impl RealFile {
    fn wrap(&self, op: &'static str) -> impl Fn(io::Error) -> io::Error {
        move |e| FsError::wrap(op, &self.path, e)
    }

    fn write_all(&self, bufs: &[IoSlice<'_>], mut at: u64) -> io::Result<()> {
        let mut left: Vec<IoSlice<'_>> = bufs.iter().map(|b| IoSlice::new(b)).collect();
        let mut rest = left.as_mut_slice();
        IoSlice::advance_slices(&mut rest, 0); // drops empty buffers in front
        while !rest.is_empty() {
            match pwritev(&self.file, rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    at += n as u64;
                    IoSlice::advance_slices(&mut rest, n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// One vectored write; the system takes at most 1,024 buffers at a time.
#[cfg(not(target_os = "macos"))]
fn pwritev(file: &std::fs::File, bufs: &[IoSlice<'_>], at: u64) -> io::Result<usize> {
    Ok(rustix::io::pwritev(file, &bufs[..bufs.len().min(1024)], at)?)
}

#[cfg(target_os = "macos")]
fn pwritev(file: &std::fs::File, bufs: &[IoSlice<'_>], at: u64) -> io::Result<usize> {
    file.write_at(&bufs[0], at)
}

impl File for RealFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        loop {
            match self.file.read_at(buf, at) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                done => return done.map_err(self.wrap("read")),
            }
        }
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        self.write_all(bufs, at).map_err(self.wrap("write"))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data().map_err(self.wrap("sync"))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len).map_err(self.wrap("resize"))
    }

    fn reserve(&self, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        match rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::KEEP_SIZE, at, len)
        }) {
            // A file system without the call gives no promise; the write itself then reports a full disk.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(e) => return Err(FsError::wrap("reserve", &self.path, e)),
        }
        let _ = at;
        Ok(())
    }

    fn zero_fill(&self, len: u64) -> io::Result<()> {
        let zeros = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(ZERO_PIECE_BYTES)];
        let mut at = 0;
        while at < len {
            let piece = usize::try_from(len - at).unwrap_or(usize::MAX).min(zeros.len());
            self.write_all(&[IoSlice::new(&zeros[..piece])], at).map_err(self.wrap("zero"))?;
            at += piece as u64;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata().map_err(self.wrap("stat"))?.len())
    }

    fn drop_cache(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed)
            .map_err(|e| FsError::wrap("drop cache of", &self.path, e))?;
        Ok(())
    }
}
