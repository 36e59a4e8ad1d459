//! A data directory as a place that one process owns: LOCK, the holder's name, the socket's address.
//!
//! ```text
//!   LOCK        flock, exclusive, never waited for; inside: pid and start time of the holder, fixed width
//!   (dir)       flock too: a LOCK that was unlinked and made again does not make two owners
//!   sock        the owner's Unix socket; bound as .sock.new, listening before it gets its name
//! ```
//!
//! Invariants
//! * A [`DirLock`] is given only while the file that is locked is the one that `LOCK` names.
//! * The socket is bound and reached through `/proc/self/fd/<dir>`: a socket's path is limited to 107 bytes, a data
//!   directory's is not. Where there is no `/proc` the path itself is used, with that limit.
//! * Every descriptor closes on exec.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use tidemill_log::Create;

/// The lock file's name.
const LOCK: &str = "LOCK";
/// The socket's name.
pub(crate) const SOCKET: &str = "sock";
/// The socket's name until it listens.
pub(crate) const SOCKET_NEW: &str = ".sock.new";
/// The file that makes a directory a data directory; the log writes it.
const FORMAT: &str = "format";
/// What may lie in a directory that is about to become a data directory.
const ALLOWED_BEFORE: [&str; 2] = ["state", "lost+found"];

/// Whether a command may make the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// It must be there.
    Use,
    /// It must be there; an empty one is made a data directory. For a server: a volume that was just mounted is
    /// filled, a path that was mistyped is not.
    Fill,
    /// It is made where it is missing.
    Create,
}

impl Intent {
    /// What an open of the log does where there is none.
    pub(crate) fn create(self) -> Create {
        match self {
            Intent::Use => Create::Never,
            Intent::Fill | Intent::Create => Create::IfMissing,
        }
    }
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// There is no data directory at the path.
    #[error(
        "there is no data directory at {}; `streamctl topic create NAME` and `streamctl produce TOPIC --create` make one",
        path.display()
    )]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// The path, or what it begins with, is a file.
    #[error("{} cannot be a data directory: it is a file, or lies below one; name a directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// The path holds something else.
    #[error(
        "{} is not a data directory and not empty (it holds {found:?}); name another one or empty it", path.display()
    )]
    NotOurs {
        /// The path.
        path: PathBuf,
        /// One name in it.
        found: String,
    },
    /// A system call failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
}

/// Who holds a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) pid: u32,
    /// The number is one of another pid namespace, where it means another process than here.
    pub(crate) elsewhere: bool,
    /// In clock ticks after boot, 0 where unknown: tells a process from a later one with its pid.
    pub(crate) started: u64,
}

/// An open data directory.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    fd: OwnedFd,
    proc_fd: bool,
}

/// Exclusive ownership of a data directory, for as long as it lives.
#[derive(Debug)]
pub(crate) struct DirLock {
    // Fields drop in order: the directory's flock goes first, LOCK last.
    _dir: OwnedFd,
    _lock: OwnedFd,
}

impl DataDir {
    pub(crate) fn open(path: &Path, intent: Intent) -> Result<Self, DirError> {
        let io = |what, source: io::Error| DirError::Io { what, path: path.to_owned(), source };
        // A file in its place is told by what it is, when it is opened.
        let made = match intent {
            Intent::Create => std::fs::create_dir_all(path),
            Intent::Use | Intent::Fill => Ok(()),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                made.map_err(|e| io("create", e))?;
                return Err(DirError::Missing { path: path.to_owned() });
            }
            Err(Errno::NOTDIR) => return Err(DirError::NotADirectory { path: path.to_owned() }),
            Err(e) => return Err(io("open", e.into())),
        };
        made.map_err(|e| io("create", e))?;
        let proc_fd = Path::new("/proc/self/fd").is_dir();
        let dir = DataDir { path: path.to_owned(), fd, proc_fd };
        if !dir.has(FORMAT)? {
            match intent {
                // Another process may be making it right now: then LOCK is there, and its holder answers.
                Intent::Use if !dir.has(LOCK)? => return Err(DirError::Missing { path: path.to_owned() }),
                Intent::Use => {}
                Intent::Fill | Intent::Create => {
                    let mut names = Vec::new();
                    for entry in std::fs::read_dir(path).map_err(|e| io("list", e))? {
                        let name = entry.map_err(|e| io("list", e))?.file_name();
                        names.push(name.to_string_lossy().into_owned());
                    }
                    // A LOCK says that somebody is making it, or began to; then anything of ours may be there.
                    let foreign = |name: &&String| !ALLOWED_BEFORE.contains(&name.as_str());
                    if !names.iter().any(|name| name == LOCK || name == FORMAT)
                        && let Some(found) = names.iter().find(foreign)
                    {
                        return Err(DirError::NotOurs { path: path.to_owned(), found: found.clone() });
                    }
                }
            }
        }
        Ok(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the log has ever been opened here. Asked again with the lock held.
    pub(crate) fn is_made(&self) -> Result<bool, DirError> {
        self.has(FORMAT)
    }

    fn has(&self, name: &str) -> Result<bool, DirError> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(self.io("look for", name, e)),
        }
    }

    pub(crate) fn io(&self, what: &'static str, name: &str, source: impl Into<io::Error>) -> DirError {
        DirError::Io { what, path: self.path.join(name), source: source.into() }
    }

    /// Takes the lock if nobody holds it.
    pub(crate) fn try_lock(&self) -> Result<Option<DirLock>, DirError> {
        // A LOCK that is replaced between the open and the check is tried again; a few times is already somebody's bug.
        for _ in 0..16 {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
            let lock = rustix::fs::openat(&self.fd, LOCK, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|e| self.io("open", LOCK, e))?;
            if !self.flock(&lock, LOCK)? {
                return Ok(None);
            }
            let dir = rustix::fs::openat(
                &self.fd,
                ".",
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(|e| self.io("open", ".", e))?;
            if !self.flock(&dir, ".")? {
                return Ok(None);
            }
            let locked = rustix::fs::fstat(&lock).map_err(|e| self.io("stat", LOCK, e))?;
            match rustix::fs::statat(&self.fd, LOCK, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(named) if (named.st_dev, named.st_ino) == (locked.st_dev, locked.st_ino) => {}
                Ok(_) | Err(Errno::NOENT) => continue,
                Err(e) => return Err(self.io("stat", LOCK, e)),
            }
            let pid = std::process::id();
            let text = format!("{pid:>10} {:>20}\n", started(pid).unwrap_or(0));
            // The text serves error messages, and clients that cannot see this process: a full disk does not keep a directory
            // from opening.
            match rustix::io::pwrite(&lock, text.as_bytes(), 0) {
                Ok(_) | Err(Errno::NOSPC | Errno::DQUOT) => {}
                Err(e) => return Err(self.io("write", LOCK, e)),
            }
            return Ok(Some(DirLock { _dir: dir, _lock: lock }));
        }
        Ok(None)
    }

    fn flock(&self, fd: &OwnedFd, name: &str) -> Result<bool, DirError> {
        match rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Err(e) => Err(self.io("lock", name, e)),
        }
    }

    /// Who holds LOCK now, by `/proc/locks`; else who LOCK says that holds it. The table has no line of a holder in another
    /// pid namespace (a container on the same volume), and LOCK's number is one of that namespace then.
    pub(crate) fn holder(&self) -> Option<Holder> {
        let stat = rustix::fs::statat(&self.fd, LOCK, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let table = std::fs::read_to_string("/proc/locks");
        match table.as_ref().map(|table| flock_pid(table, stat.st_ino)) {
            Ok(Some(pid)) => Some(Holder { pid, elsewhere: false, started: started(pid).unwrap_or(0) }),
            Ok(None) => Some(Holder { elsewhere: true, ..self.written_holder()? }),
            Err(_) => self.written_holder(),
        }
    }

    fn written_holder(&self) -> Option<Holder> {
        let fd = rustix::fs::openat(&self.fd, LOCK, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut text = [0; 32];
        let read = rustix::io::pread(&fd, &mut text, 0).ok()?;
        let mut words = std::str::from_utf8(text.get(..read)?).ok()?.split_whitespace();
        let pid = words.next()?.parse().ok()?;
        let started = words.next().and_then(|started| started.parse().ok()).unwrap_or(0);
        Some(Holder { pid, elsewhere: false, started })
    }

    /// The path by which the socket `name` of this directory is bound or reached.
    pub(crate) fn socket_path(&self, name: &str) -> PathBuf {
        if self.proc_fd {
            PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
        } else {
            self.path.join(name)
        }
    }

    pub(crate) fn unlink(&self, name: &str) -> Result<(), DirError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(self.io("unlink", name, e)),
        }
    }

    pub(crate) fn chmod_owner_only(&self, name: &str) -> Result<(), DirError> {
        rustix::fs::chmodat(&self.fd, name, Mode::RUSR | Mode::WUSR, AtFlags::empty())
            .map_err(|e| self.io("set the mode of", name, e))
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), DirError> {
        rustix::fs::renameat(&self.fd, from, &self.fd, to).map_err(|e| self.io("rename", from, e))
    }
}

/// The pid in the line of `/proc/locks` that is a flock on inode `inode`. The device is not compared: on overlay and
/// btrfs it differs from what stat says.
fn flock_pid(table: &str, inode: u64) -> Option<u32> {
    table.lines().find_map(|line| {
        // 3: FLOCK  ADVISORY  WRITE 4711 08:01:131 0 EOF; a waiter has "->" after its number, and nobody waits here.
        let mut words = line.split_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let pid = words.nth(2)?;
        let of: u64 = words.next()?.rsplit(':').next()?.parse().ok()?;
        if of == inode { pid.parse().ok().filter(|&pid| pid != 0) } else { None }
    })
}

/// When a process started, in clock ticks after boot: field 22 of its stat line.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in field 2 may hold anything; fields are counted after its last parenthesis.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_table_names_the_holder_by_inode() {
        let table = "1: POSIX  ADVISORY  WRITE 1 08:01:77 0 EOF\n2: FLOCK  ADVISORY  WRITE 4711 00:2a:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 99 08:01:78 0 EOF\n";
        assert_eq!(flock_pid(table, 77), Some(4711));
        assert_eq!(flock_pid(table, 78), Some(99));
        assert_eq!(flock_pid(table, 79), None);
    }

    #[test]
    fn a_lock_is_held_once_and_its_holder_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(temp.path(), Intent::Create).unwrap();
        let other = DataDir::open(temp.path(), Intent::Create).unwrap();
        let lock = dir.try_lock().unwrap().expect("free");
        assert!(other.try_lock().unwrap().is_none());
        assert_eq!(other.holder().unwrap().pid, std::process::id());
        let pid = std::process::id();
        let known = Holder { pid, elsewhere: false, started: started(pid).unwrap_or(0) };
        assert_eq!((other.written_holder(), other.holder()), (Some(known), Some(known)));
        drop(lock);
        assert!(other.try_lock().unwrap().is_some());
    }

    #[test]
    fn an_unlinked_lock_does_not_make_two_owners() {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(temp.path(), Intent::Create).unwrap();
        let _lock = dir.try_lock().unwrap().expect("free");
        std::fs::remove_file(temp.path().join(LOCK)).unwrap();
        assert!(dir.try_lock().unwrap().is_none());
    }

    /// As a client in another pid namespace sees it: LOCK is held, and no line of the table says by whom.
    #[test]
    fn a_holder_that_the_table_does_not_have_is_who_lock_names() {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(temp.path(), Intent::Create).unwrap();
        std::fs::write(temp.path().join(LOCK), "      4711                   99\n").unwrap();
        let elsewhere = std::fs::read_to_string("/proc/locks").is_ok();
        assert_eq!(dir.holder(), Some(Holder { pid: 4711, elsewhere, started: 99 }));
        std::fs::write(temp.path().join(LOCK), "").unwrap();
        assert_eq!(dir.holder(), None);
    }

    #[test]
    fn a_file_is_no_directory() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        for path in [file.clone(), file.join("below")] {
            for intent in [Intent::Use, Intent::Fill, Intent::Create] {
                let error = DataDir::open(&path, intent).unwrap_err();
                assert!(matches!(error, DirError::NotADirectory { .. }), "{intent:?}: {error}");
            }
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"mine");
        // A link that leads nowhere is not made, and not told to be.
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(temp.path().join("gone"), &link).unwrap();
        let error = DataDir::open(&link, Intent::Create).unwrap_err();
        assert!(matches!(error, DirError::Io { what: "create", .. }), "{error}");
    }

    #[test]
    fn a_missing_directory_is_named_and_nothing_is_made() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("not-there");
        let error = DataDir::open(&path, Intent::Use).unwrap_err().to_string();
        assert!(error.contains("not-there") && error.contains("topic create"), "{error}");
        assert!(!path.exists());
        let error = DataDir::open(temp.path(), Intent::Use).unwrap_err();
        assert!(
            matches!(error, DirError::Missing { .. }),
            "an empty directory is no data directory: {error}"
        );
    }

    #[test]
    fn a_directory_with_other_things_in_it_is_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("thesis.txt"), "years of work").unwrap();
        let error = DataDir::open(temp.path(), Intent::Create).unwrap_err().to_string();
        assert!(error.contains("thesis.txt"), "{error}");
    }
}
