//! An in-memory [`Fs`] that keeps apart what the process sees and what the medium has.
//!
//! ```text
//!   file    4 KiB pages; for every page changed since the last sync: what the medium surely has, and each later version
//!   size    the same: the synced one and each later one
//!   names   two maps, seen and durable, and the list of creates, renames, unlinks since their directory's last sync
//!
//!   crash(Kill)   the process is gone, the system is not: everything stays, what was unsynced stays unsynced
//!   crash(None)   power cut; nothing unsynced had reached the medium
//!   crash(All)    power cut; all of it had
//!   crash(Any)    power cut; each page, size and name by itself is old, newest or in between; optionally a page is
//!                 torn at 512-byte sectors
//! ```
//!
//! A failed sync leaves the pages *lost*: the process reads the new bytes, a later sync succeeds without writing
//! them, and [`drop_cache`](super::File::drop_cache) shows what the medium has. That is how Linux behaves.
//!
//! Every call that changes something or syncs is counted. Before each of them a hook may run (to take a snapshot:
//! `crash` works on a copy), and a fault may be put in its place.
//!
//! It is the twin of `Disk` in the executable model of the log; the one thing it adds is bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::sync::Arc;

use parking_lot::Mutex;
use rand::{Rng, RngExt};

use super::{File, Fs, FsError, OpenHow, check_path, check_rename, parent};

/// Bytes of a page, the unit that persists by itself.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a sector, the unit that a torn page is made of.
pub const SECTOR_BYTES: usize = 512;
/// Versions kept of an unsynced page. A crash that would have left a version in between those kept is not explored.
const VERSIONS_MAX: usize = 8;
/// What [`Fs::free_bytes`] says where the space is not limited.
const UNLIMITED_BYTES: u64 = 1 << 40;

type Page = [u8; PAGE_BYTES];
/// `None` is a page never written, which reads as zeros.
type Content = Option<Arc<Page>>;

/// What is lost in a crash: see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The process dies, the page cache survives.
    Kill,
    /// Power cut; nothing unsynced persisted.
    None,
    /// Power cut; everything had persisted.
    All,
    /// Power cut; any subset persisted.
    Any,
}

/// Which call an [`Op`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is the call of the same name")]
pub enum Call {
    Open,
    Create,
    CreateDir,
    List,
    Rename,
    Unlink,
    RemoveDir,
    SyncDir,
    Read,
    Write,
    Sync,
    SetLen,
    Reserve,
    ZeroFill,
}

impl Call {
    /// True if the call changes something or makes it durable. Only these are numbered.
    pub fn counts(self) -> bool {
        !matches!(self, Self::Open | Self::List | Self::Read)
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Open | Self::Create => "open",
            Self::CreateDir => "create directory",
            Self::List => "list",
            Self::Rename => "rename",
            Self::Unlink => "unlink",
            Self::RemoveDir => "remove directory",
            Self::SyncDir => "sync directory",
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::SetLen => "resize",
            Self::Reserve => "reserve",
            Self::ZeroFill => "zero",
        }
    }
}

/// A call about to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op<'a> {
    /// Its number among the calls that [count](Call::counts), from 0; for the others, that of the next one.
    pub number: u64,
    /// Which call.
    pub call: Call,
    /// On which path, as it was opened.
    pub path: &'a str,
}

/// What happens in place of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The call fails and changes nothing; a failed sync loses what it should have written.
    Errno(i32),
    /// A write puts only this many of its bytes in the file and then fails.
    Short {
        /// Bytes written.
        bytes: usize,
        /// The error then.
        errno: i32,
    },
}

type Hook = Arc<dyn Fn(&SimFs, &Op<'_>) + Send + Sync>;
type Fault = Arc<dyn Fn(&Op<'_>) -> Option<Failure> + Send + Sync>;

/// The in-memory file system. Clones are handles to the same one.
#[derive(Clone, Default)]
pub struct SimFs {
    disk: Arc<Mutex<Disk>>,
}

impl std::fmt::Debug for SimFs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.files()).finish()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Dir,
    File(u64),
}

type Names = BTreeMap<String, Node>;

#[derive(Debug, Clone)]
enum NameOp {
    Add(String, Node),
    Remove(String),
    Rename(String, String),
}

impl NameOp {
    /// The directory whose sync makes it durable.
    fn dir(&self) -> &str {
        match self {
            Self::Add(path, _) | Self::Remove(path) | Self::Rename(path, _) => parent(path),
        }
    }

    fn apply(&self, names: &mut Names) {
        match self {
            Self::Add(path, node) => drop(names.insert(path.clone(), *node)),
            Self::Remove(path) => drop(names.remove(path)),
            Self::Rename(from, to) => {
                if let Some(node) = names.remove(from) {
                    names.insert(to.clone(), node);
                }
            }
        }
    }
}

/// A page changed since the last good sync.
#[derive(Clone)]
struct Unsynced {
    /// What the medium may have: the synced one first, the newest last.
    versions: Vec<Content>,
    /// True after a failed sync until the page is written again: a sync will not write it.
    lost: bool,
}

#[derive(Clone, Default)]
struct Inode {
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
    unsynced: BTreeMap<u64, Unsynced>,
    /// Earlier sizes since the last good sync, the synced one first; empty if the size is synced.
    lens: Vec<u64>,
    /// Pages that take space: written or reserved.
    allocated: BTreeSet<u64>,
}

impl Inode {
    fn set_page(&mut self, index: u64, content: Content) {
        let old = match &content {
            Some(page) => self.pages.insert(index, page.clone()),
            None => self.pages.remove(&index),
        };
        let entry =
            self.unsynced.entry(index).or_insert_with(|| Unsynced { versions: vec![old], lost: false });
        entry.lost = false;
        if entry.versions.len() == VERSIONS_MAX {
            entry.versions.remove(VERSIONS_MAX / 2);
        }
        entry.versions.push(content);
    }

    fn set_len(&mut self, len: u64) {
        if len != self.len {
            if self.lens.len() == VERSIONS_MAX {
                self.lens.remove(VERSIONS_MAX / 2);
            }
            self.lens.push(self.len);
            self.len = len;
        }
    }

    fn cut(&mut self, len: u64) {
        let whole = len.div_ceil(PAGE_BYTES as u64);
        for index in self.pages.range(whole..).map(|(&i, _)| i).collect::<Vec<_>>() {
            self.set_page(index, None);
        }
        self.allocated.split_off(&whole);
        if let Some(page) = self.pages.get(&(len / PAGE_BYTES as u64)) {
            let keep = len as usize % PAGE_BYTES;
            if page[keep..].iter().any(|&b| b != 0) {
                let mut page = **page;
                page[keep..].fill(0);
                self.set_page(len / PAGE_BYTES as u64, Some(Arc::new(page)));
            }
        }
    }

    fn write(&mut self, bytes: &[u8], at: u64) {
        let mut done = 0;
        while done < bytes.len() {
            let pos = at + done as u64;
            let (index, start) = (pos / PAGE_BYTES as u64, pos as usize % PAGE_BYTES);
            let n = (PAGE_BYTES - start).min(bytes.len() - done);
            let mut page = self.pages.get(&index).map_or([0; PAGE_BYTES], |page| **page);
            page[start..start + n].copy_from_slice(&bytes[done..done + n]);
            self.set_page(index, Some(Arc::new(page)));
            self.allocated.insert(index);
            done += n;
        }
        self.set_len(self.len.max(at + bytes.len() as u64));
    }

    fn read(&self, buf: &mut [u8], at: u64) -> usize {
        let n = usize::try_from(self.len.saturating_sub(at)).unwrap_or(usize::MAX).min(buf.len());
        let mut done = 0;
        while done < n {
            let pos = at + done as u64;
            let start = pos as usize % PAGE_BYTES;
            let piece = (PAGE_BYTES - start).min(n - done);
            match self.pages.get(&(pos / PAGE_BYTES as u64)) {
                Some(page) => buf[done..done + piece].copy_from_slice(&page[start..start + piece]),
                None => buf[done..done + piece].fill(0),
            }
            done += piece;
        }
        n
    }

    fn sync(&mut self) {
        self.unsynced.retain(|_, page| page.lost);
        self.lens.clear();
    }

    /// The pages are called clean, and are not on the medium.
    fn lose(&mut self) {
        for page in self.unsynced.values_mut() {
            page.lost = true;
        }
    }

    fn drop_cache(&mut self) {
        let lost: Vec<u64> = self.unsynced.iter().filter(|(_, p)| p.lost).map(|(&i, _)| i).collect();
        for index in lost {
            let Some(page) = self.unsynced.remove(&index) else { continue };
            match &page.versions[0] {
                Some(old) => drop(self.pages.insert(index, old.clone())),
                None => drop(self.pages.remove(&index)),
            }
        }
    }

    /// What a power cut leaves.
    fn power_cut(&self, how: Crash, tear: bool, rng: &mut impl Rng) -> Self {
        let mut after = Self { pages: self.pages.clone(), len: self.len, ..Self::default() };
        for (&index, page) in &self.unsynced {
            let versions = &page.versions;
            let content = match how {
                Crash::None => versions[0].clone(),
                Crash::Any if tear && rng.random_bool(0.25) => torn(versions, rng),
                Crash::Any => versions[rng.random_range(0..versions.len())].clone(),
                Crash::All | Crash::Kill => versions.last().and_then(Clone::clone),
            };
            match content {
                Some(page) => drop(after.pages.insert(index, page)),
                None => drop(after.pages.remove(&index)),
            }
        }
        if !self.lens.is_empty() {
            after.len = match how {
                Crash::None => self.lens[0],
                Crash::Any => match rng.random_range(0..=self.lens.len()) {
                    i if i == self.lens.len() => self.len,
                    i => self.lens[i],
                },
                Crash::All | Crash::Kill => self.len,
            };
        }
        let len = after.len;
        after.cut(len);
        after.unsynced.clear();
        after.allocated = after.pages.keys().copied().collect();
        after
    }
}

/// A page whose sectors are each of any version.
fn torn(versions: &[Content], rng: &mut impl Rng) -> Content {
    let mut page = [0; PAGE_BYTES];
    for (i, sector) in page.chunks_mut(SECTOR_BYTES).enumerate() {
        if let Some(version) = &versions[rng.random_range(0..versions.len())] {
            sector.copy_from_slice(&version[i * SECTOR_BYTES..(i + 1) * SECTOR_BYTES]);
        }
    }
    Some(Arc::new(page))
}

#[derive(Default)]
struct Disk {
    inodes: BTreeMap<u64, Inode>,
    names: Names,
    durable: Names,
    pending: Vec<NameOp>,
    next_inode: u64,
    ops: u64,
    tear: bool,
    /// The most pages the files may take together; `None`: no limit.
    pages_max: Option<u64>,
    hook: Option<Hook>,
    fault: Option<Fault>,
}

impl Disk {
    fn name_op(&mut self, op: NameOp) {
        op.apply(&mut self.names);
        self.pending.push(op);
    }

    fn is_dir(&self, path: &str) -> bool {
        path.is_empty() || self.names.get(path) == Some(&Node::Dir)
    }

    fn children<'a>(&'a self, dir: &'a str) -> impl Iterator<Item = &'a str> {
        self.names.keys().filter(move |path| parent(path) == dir).map(|path| match path.rsplit_once('/') {
            Some((_, name)) => name,
            None => path.as_str(),
        })
    }

    fn inode(&mut self, number: u64) -> &mut Inode {
        self.inodes.entry(number).or_default()
    }

    /// Pages that named files take.
    fn used_pages(&self) -> u64 {
        let named: BTreeSet<u64> = self
            .names
            .values()
            .filter_map(|node| match node {
                Node::File(number) => Some(*number),
                Node::Dir => None,
            })
            .collect();
        named
            .iter()
            .filter_map(|number| self.inodes.get(number))
            .map(|inode| inode.allocated.len() as u64)
            .sum()
    }

    fn free_pages(&self) -> u64 {
        match self.pages_max {
            Some(max) => max.saturating_sub(self.used_pages()),
            None => UNLIMITED_BYTES / PAGE_BYTES as u64,
        }
    }

    /// The bytes of `at..at + len` that fit the free space, counted from the front.
    fn fitting(&mut self, number: u64, at: u64, len: u64) -> u64 {
        if self.pages_max.is_none() || len == 0 {
            return len;
        }
        let mut free = self.free_pages();
        let allocated = &self.inode(number).allocated;
        for index in at / PAGE_BYTES as u64..=(at + len - 1) / PAGE_BYTES as u64 {
            if !allocated.contains(&index) {
                if free == 0 {
                    return (index * PAGE_BYTES as u64).saturating_sub(at);
                }
                free -= 1;
            }
        }
        len
    }

    fn snapshot(&self) -> Self {
        Self {
            inodes: self.inodes.clone(),
            names: self.names.clone(),
            durable: self.durable.clone(),
            pending: self.pending.clone(),
            next_inode: self.next_inode,
            ops: 0,
            tear: self.tear,
            pages_max: self.pages_max,
            hook: None,
            fault: None,
        }
    }

    fn crash(&self, how: Crash, rng: &mut impl Rng) -> Self {
        let mut after = self.snapshot();
        if how != Crash::Kill {
            let mut names = self.durable.clone();
            for op in &self.pending {
                let kept = match how {
                    Crash::None => false,
                    Crash::Any => rng.random_bool(0.5),
                    Crash::All | Crash::Kill => true,
                };
                if kept {
                    op.apply(&mut names);
                }
            }
            // What is in a directory that did not persist is not reachable. Parents sort before what they hold.
            let mut reachable = Names::new();
            for (path, node) in names {
                if parent(&path).is_empty() || reachable.get(parent(&path)) == Some(&Node::Dir) {
                    reachable.insert(path, node);
                }
            }
            after.durable = reachable.clone();
            after.names = reachable;
            after.pending.clear();
            for inode in after.inodes.values_mut() {
                *inode = inode.power_cut(how, self.tear, rng);
            }
        }
        // Files that no name reaches any more are gone; the handles of the life before have their own disk.
        let mut live: BTreeSet<u64> = BTreeSet::new();
        let adds = after.pending.iter().filter_map(|op| match op {
            NameOp::Add(_, node) => Some(node),
            _ => None,
        });
        for node in after.names.values().chain(after.durable.values()).chain(adds) {
            if let Node::File(number) = node {
                live.insert(*number);
            }
        }
        after.inodes.retain(|number, _| live.contains(number));
        after
    }
}

fn system(call: Call, path: &str, errno: rustix::io::Errno) -> io::Error {
    FsError::wrap(call.verb(), path, errno)
}

impl SimFs {
    /// An empty directory on a medium without limits.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk after a crash, as a new and independent one: counters at 0, no hook, no fault. This one is unchanged.
    pub fn crash(&self, how: Crash, rng: &mut impl Rng) -> Self {
        Self { disk: Arc::new(Mutex::new(self.disk.lock().crash(how, rng))) }
    }

    /// Lets [`Crash::Any`] tear pages at sectors, too.
    pub fn tear_sectors(&self) {
        self.disk.lock().tear = true;
    }

    /// Limits the space that files take; bytes round down to pages.
    pub fn limit_space(&self, bytes: u64) {
        self.disk.lock().pages_max = Some(bytes / PAGE_BYTES as u64);
    }

    /// Calls so far that change something or sync.
    pub fn ops(&self) -> u64 {
        self.disk.lock().ops
    }

    /// Runs `hook` before each call that changes something or syncs. The hook may use the file system it is given,
    /// its own calls are counted too and call it again.
    pub fn set_hook(&self, hook: impl Fn(&Self, &Op<'_>) + Send + Sync + 'static) {
        self.disk.lock().hook = Some(Arc::new(hook));
    }

    /// Stops the hook.
    pub fn clear_hook(&self) {
        self.disk.lock().hook = None;
    }

    /// Asks `fault` about every call, reads included, and fails it where it says so.
    pub fn set_fault(&self, fault: impl Fn(&Op<'_>) -> Option<Failure> + Send + Sync + 'static) {
        self.disk.lock().fault = Some(Arc::new(fault));
    }

    /// Fails the counted call with this number, and no other.
    pub fn fail_op(&self, number: u64, failure: Failure) {
        self.set_fault(move |op| (op.call.counts() && op.number == number).then_some(failure));
    }

    /// No more failures.
    pub fn clear_fault(&self) {
        self.disk.lock().fault = None;
    }

    /// Every file's path and size, as the process sees them.
    pub fn files(&self) -> Vec<(String, u64)> {
        let disk = self.disk.lock();
        let files = disk.names.iter().filter_map(|(path, node)| match node {
            Node::File(number) => Some((path.clone(), disk.inodes.get(number).map_or(0, |inode| inode.len))),
            Node::Dir => None,
        });
        files.collect()
    }

    /// A file's bytes as the process sees them.
    pub fn peek(&self, path: &str) -> Option<Vec<u8>> {
        let disk = self.disk.lock();
        let Some(Node::File(number)) = disk.names.get(path) else { return None };
        let inode = disk.inodes.get(number)?;
        let mut bytes = vec![0; inode.len as usize];
        inode.read(&mut bytes, 0);
        Some(bytes)
    }

    /// Damages the medium: changes a file's bytes and calls them synced. Not counted, no hook, no fault.
    ///
    /// # Panics
    ///
    /// If there is no such file.
    pub fn rot(&self, path: &str, at: u64, bytes: &[u8]) {
        let mut disk = self.disk.lock();
        let Some(&Node::File(number)) = disk.names.get(path) else { panic!("no file {path}") };
        let inode = disk.inode(number);
        inode.write(bytes, at);
        let pages = at / PAGE_BYTES as u64..=(at + bytes.len() as u64) / PAGE_BYTES as u64;
        inode.unsynced.retain(|index, _| !pages.contains(index));
    }

    /// Makes everything durable, names included. Not counted.
    pub fn sync_all(&self) {
        let mut disk = self.disk.lock();
        disk.durable = disk.names.clone();
        disk.pending.clear();
        for inode in disk.inodes.values_mut() {
            inode.unsynced.clear();
            inode.lens.clear();
        }
    }

    /// Counts the call, runs the hook and returns what the fault says. No lock is held while they run.
    fn enter(&self, call: Call, path: &str) -> Option<Failure> {
        let (op, hook, fault) = {
            let mut disk = self.disk.lock();
            let op = Op { number: disk.ops, call, path };
            if call.counts() {
                disk.ops += 1;
            }
            (op, disk.hook.clone().filter(|_| call.counts()), disk.fault.clone())
        };
        if let Some(hook) = hook {
            hook(self, &op);
        }
        fault.and_then(|fault| fault(&op))
    }

    /// [`SimFs::enter`] for a call that fails whole.
    fn enter_whole(&self, call: Call, path: &str) -> io::Result<()> {
        match self.enter(call, path) {
            Some(Failure::Errno(errno) | Failure::Short { errno, .. }) => {
                Err(FsError::wrap(call.verb(), path, io::Error::from_raw_os_error(errno)))
            }
            None => Ok(()),
        }
    }
}

impl Fs for SimFs {
    fn open(&self, path: &str, how: OpenHow) -> io::Result<Arc<dyn File>> {
        use rustix::io::Errno;
        check_path("open", path)?;
        let call = if how == OpenHow::CreateNew { Call::Create } else { Call::Open };
        self.enter_whole(call, path)?;
        let mut disk = self.disk.lock();
        let found = if path.is_empty() { Some(Node::Dir) } else { disk.names.get(path).copied() };
        let number = match (found, how) {
            (Some(_), OpenHow::CreateNew) => return Err(system(call, path, Errno::EXIST)),
            (Some(Node::Dir), _) => return Err(system(call, path, Errno::ISDIR)),
            (Some(Node::File(number)), _) => number,
            (None, OpenHow::CreateNew) if disk.is_dir(parent(path)) => {
                let number = disk.next_inode;
                disk.next_inode += 1;
                disk.inodes.insert(number, Inode::default());
                disk.name_op(NameOp::Add(path.to_owned(), Node::File(number)));
                number
            }
            (None, _) => return Err(system(call, path, Errno::NOENT)),
        };
        Ok(Arc::new(SimFile { fs: self.clone(), number, path: path.into(), writable: how != OpenHow::Read }))
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        use rustix::io::Errno;
        let call = Call::CreateDir;
        check_path(call.verb(), path)?;
        self.enter_whole(call, path)?;
        let mut disk = self.disk.lock();
        if path.is_empty() || disk.names.contains_key(path) {
            return Err(system(call, path, Errno::EXIST));
        }
        if !disk.is_dir(parent(path)) {
            return Err(system(call, path, Errno::NOENT));
        }
        disk.name_op(NameOp::Add(path.to_owned(), Node::Dir));
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let call = Call::List;
        check_path(call.verb(), dir)?;
        self.enter_whole(call, dir)?;
        let disk = self.disk.lock();
        match disk.names.get(dir) {
            Some(Node::File(_)) => Err(system(call, dir, rustix::io::Errno::NOTDIR)),
            None if !dir.is_empty() => Err(system(call, dir, rustix::io::Errno::NOENT)),
            _ => {
                let mut names: Vec<String> = disk.children(dir).map(str::to_owned).collect();
                names.sort_unstable();
                Ok(names)
            }
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        use rustix::io::Errno;
        let call = Call::Rename;
        check_rename(from, to)?;
        self.enter_whole(call, from)?;
        let mut disk = self.disk.lock();
        match (disk.names.get(from), disk.names.get(to)) {
            (None, _) => Err(system(call, from, Errno::NOENT)),
            (Some(Node::File(_)), Some(Node::Dir)) => Err(system(call, from, Errno::ISDIR)),
            (Some(Node::Dir), _) => Err(system(call, from, Errno::INVAL)), // what it holds would have to move
            (Some(Node::File(_)), _) => {
                if from != to {
                    disk.name_op(NameOp::Rename(from.to_owned(), to.to_owned()));
                }
                Ok(())
            }
        }
    }

    fn unlink(&self, path: &str) -> io::Result<()> {
        use rustix::io::Errno;
        let call = Call::Unlink;
        check_path(call.verb(), path)?;
        self.enter_whole(call, path)?;
        let mut disk = self.disk.lock();
        match disk.names.get(path) {
            Some(Node::File(_)) => {
                disk.name_op(NameOp::Remove(path.to_owned()));
                Ok(())
            }
            Some(Node::Dir) => Err(system(call, path, Errno::ISDIR)),
            None => Err(system(call, path, Errno::NOENT)),
        }
    }

    fn remove_dir(&self, path: &str) -> io::Result<()> {
        use rustix::io::Errno;
        let call = Call::RemoveDir;
        check_path(call.verb(), path)?;
        self.enter_whole(call, path)?;
        let mut disk = self.disk.lock();
        let error = match disk.names.get(path) {
            Some(Node::Dir) if disk.children(path).next().is_some() => Errno::NOTEMPTY,
            Some(Node::Dir) => {
                disk.name_op(NameOp::Remove(path.to_owned()));
                return Ok(());
            }
            Some(Node::File(_)) => Errno::NOTDIR,
            None => Errno::NOENT,
        };
        Err(system(call, path, error))
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let call = Call::SyncDir;
        check_path(call.verb(), path)?;
        self.enter_whole(call, path)?;
        let disk = &mut *self.disk.lock();
        if !disk.is_dir(path) {
            return Err(system(call, path, rustix::io::Errno::NOENT));
        }
        let (synced, pending) = disk.pending.drain(..).partition::<Vec<_>, _>(|op| op.dir() == path);
        disk.pending = pending;
        for op in synced {
            op.apply(&mut disk.durable);
        }
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.disk.lock().free_pages() * PAGE_BYTES as u64)
    }
}

struct SimFile {
    fs: SimFs,
    number: u64,
    path: Box<str>,
    writable: bool,
}

impl SimFile {
    fn with<R>(&self, f: impl FnOnce(&mut Disk) -> R) -> R {
        f(&mut self.fs.disk.lock())
    }

    fn check_writable(&self, call: Call) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(system(call, &self.path, rustix::io::Errno::BADF)) }
    }

    /// Writes what fits and what the fault lets through.
    fn put(&self, call: Call, bytes: &[u8], at: u64) -> io::Result<()> {
        self.check_writable(call)?;
        let (upto, errno) = match self.fs.enter(call, &self.path) {
            None => (bytes.len(), None),
            Some(Failure::Errno(errno)) => (0, Some(errno)),
            Some(Failure::Short { bytes: n, errno }) => (n.min(bytes.len()), Some(errno)),
        };
        let fits = self.with(|disk| {
            let fits = disk.fitting(self.number, at, upto as u64) as usize;
            if fits > 0 {
                disk.inode(self.number).write(&bytes[..fits], at);
            }
            fits
        });
        let error = match errno {
            _ if fits < upto => rustix::io::Errno::NOSPC.into(),
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => return Ok(()),
        };
        Err(FsError::wrap(call.verb(), &self.path, error))
    }
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.fs.enter_whole(Call::Read, &self.path)?;
        Ok(self.with(|disk| disk.inode(self.number).read(buf, at)))
    }

    fn write_at(&self, bufs: &[IoSlice<'_>], at: u64) -> io::Result<()> {
        let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        self.put(Call::Write, &bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        let entered = self.fs.enter_whole(Call::Sync, &self.path);
        self.with(|disk| match entered {
            Ok(()) => disk.inode(self.number).sync(),
            Err(_) => disk.inode(self.number).lose(),
        });
        entered
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_writable(Call::SetLen)?;
        self.fs.enter_whole(Call::SetLen, &self.path)?;
        self.with(|disk| {
            let inode = disk.inode(self.number);
            if len < inode.len {
                inode.cut(len);
            }
            inode.set_len(len);
        });
        Ok(())
    }

    fn reserve(&self, at: u64, len: u64) -> io::Result<()> {
        self.check_writable(Call::Reserve)?;
        self.fs.enter_whole(Call::Reserve, &self.path)?;
        if len == 0 {
            return Ok(());
        }
        self.with(|disk| {
            if disk.fitting(self.number, at, len) < len {
                return Err(system(Call::Reserve, &self.path, rustix::io::Errno::NOSPC));
            }
            let pages = at / PAGE_BYTES as u64..=(at + len - 1) / PAGE_BYTES as u64;
            if disk.pages_max.is_some() {
                disk.inode(self.number).allocated.extend(pages);
            }
            Ok(())
        })
    }

    fn zero_fill(&self, len: u64) -> io::Result<()> {
        self.put(Call::ZeroFill, &vec![0; len as usize], 0)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|disk| disk.inode(self.number).len))
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.with(|disk| disk.inode(self.number).drop_cache());
        Ok(())
    }
}
