//! The one door between the log and its files.
//!
//! Everything the log reads or writes below its data directory goes through [`Fs`] and [`File`], so that a test can
//! put a medium behind them that loses, reorders and tears what was not synced ([`sim::SimFs`]) where a process
//! has the operating system ([`RealFs`]).
//!
//! What the log may rely on, and what both implementations are tested for:
//!
//! * a write, a size, a zeroing is durable after [`File::sync`] of that file, not before;
//! * a create, a rename, an unlink, a directory is durable after [`Fs::sync_dir`] of the directory that holds the
//!   name, not before, and independently of the file's bytes;
//! * until then any subset of them may survive a power cut, page by page, in any order;
//! * a sync that failed is never repeated: the system may have dropped the pages it could not write and call them
//!   clean. What the medium has is seen only after [`File::drop_cache`];
//! * an open file outlives its name.
//!
//! Paths are relative to the data directory, `/`-separated, and are refused if they could leave it. Every error
//! names the operation and the path ([`FsError`]) and keeps its [`io::ErrorKind`] and errno ([`errno`]).
//!
//! Left out: renames between two directories (nothing here needs one, and their durability rests on two directories)
//! and a way to lock; the owner of the directory locks it before an `Fs` is made.

mod real;
pub mod sim;

use std::io::{self, IoSlice};
use std::sync::Arc;

pub use real::RealFs;

/// How [`Fs::open`] opens a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenHow {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    Write,
    /// A file that does not exist yet, for reading and writing.
    CreateNew,
}

/// The files of one data directory. See the [module](self) for what survives what.
pub trait Fs: Send + Sync + 'static {
    /// Opens or creates a file. Fails with `NotFound`, `AlreadyExists` or `IsADirectory` where that is the cause.
    fn open(&self, path: &str, how: OpenHow) -> io::Result<Arc<dyn File>>;
    /// Creates a directory; its parent exists and it does not.
    fn create_dir(&self, path: &str) -> io::Result<()>;
    /// The names in a directory, sorted; `""` is the data directory.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
    /// Renames a file within its directory, replacing what had the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file's name.
    fn unlink(&self, path: &str) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &str) -> io::Result<()>;
    /// Makes the names in a directory durable; `""` is the data directory.
    fn sync_dir(&self, path: &str) -> io::Result<()>;
    /// How many files are worth syncing at the same time, from threads of their own. One after the other where calls
    /// are counted.
    fn syncs_at_once(&self) -> usize {
        1
    }
    /// Bytes the file system can still take.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// An open file. Calls may come from several threads at once; each is atomic towards none of the others.
pub trait File: Send + Sync + 'static {
    /// Reads up to `buf.len()` bytes at `at`; 0 only at the end of the file.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize>;
    /// Writes all the buffers one after the other at `at`, growing the file if needed. After an error any part of
    /// them may have been written.
    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()>;
    /// Makes the file's bytes and size durable. Never call it again after it failed.
    fn sync(&self) -> io::Result<()>;
    /// Cuts the file, or grows it by zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Reserves space for the bytes `at..at + len` without changing the size, so that writing them cannot fail for
    /// want of space.
    fn reserve(&self, at: u64, len: u64) -> io::Result<()>;
    /// Writes zeros over the bytes `0..len`, growing the file if needed. Overwriting them later allocates nothing.
    fn zero_fill(&self, len: u64) -> io::Result<()>;
    /// The file's size in bytes.
    fn len(&self) -> io::Result<u64>;
    /// True if the file holds no byte.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Forgets cached pages that the system calls clean, so that the next read comes from the medium. Pages still to
    /// be written are kept. A hint where the system has no such call.
    fn drop_cache(&self) -> io::Result<()>;
    /// Fills `buf` from `at`; `UnexpectedEof` if the file ends before.
    fn read_exact_at(&self, mut buf: &mut [u8], mut at: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.read_at(buf, at)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => {
                    buf = &mut buf[n..];
                    at += n as u64;
                }
            }
        }
        Ok(())
    }
}

/// What every error of an [`Fs`] or [`File`] carries inside its [`io::Error`]: operation, path, cause.
#[derive(Debug, thiserror::Error)]
#[error("{op} {path}: {cause}")]
pub struct FsError {
    /// The operation, as a verb.
    pub op: &'static str,
    /// The path, relative to the data directory (the directory itself: `.`).
    pub path: String,
    /// What the system said.
    pub cause: io::Error,
}

impl FsError {
    /// Wraps `cause` with its place; the kind is kept.
    pub(crate) fn wrap(op: &'static str, path: &str, cause: impl Into<io::Error>) -> io::Error {
        let cause = cause.into();
        let path = if path.is_empty() { "." } else { path }.to_owned();
        io::Error::new(cause.kind(), Self { op, path, cause })
    }
}

/// The operating system's error number inside an error of this module, if there is one.
pub fn errno(error: &io::Error) -> Option<i32> {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<FsError>()) {
        Some(inner) => inner.cause.raw_os_error(),
        None => error.raw_os_error(),
    }
}

/// The longest name that ext4 and XFS take.
const NAME_BYTES_MAX: usize = 255;

/// Refuses a path that could name something outside the data directory. The empty path is the directory itself.
fn check_path(op: &'static str, path: &str) -> io::Result<()> {
    let good = |name: &str| {
        !name.is_empty()
            && name != "."
            && name != ".."
            && name.len() <= NAME_BYTES_MAX
            && !name.contains('\0')
    };
    if path.is_empty() || path.split('/').all(good) {
        return Ok(());
    }
    let cause = io::Error::new(io::ErrorKind::InvalidInput, "not a path below the data directory");
    Err(FsError::wrap(op, path, cause))
}

/// The directory that holds this name: `""` for a name in the data directory.
fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

fn check_rename(from: &str, to: &str) -> io::Result<()> {
    check_path("rename", from)?;
    check_path("rename", to)?;
    if parent(from) == parent(to) && !from.is_empty() && !to.is_empty() {
        return Ok(());
    }
    let cause = io::Error::new(io::ErrorKind::InvalidInput, "a file is renamed within its directory only");
    Err(FsError::wrap("rename", from, cause))
}
