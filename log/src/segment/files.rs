//! Open files of segments, within a limit, and which of them hold bytes that were not synced.
//!
//! * A write is noted after it happened; a sync clears what was noted before it began. So a file is called clean
//!   only if a sync that began after its last noted write succeeded.
//! * A file with unsynced bytes stays open: the error of a failed write-back is told to those who hold it.

use crate::fs::{File, Fs, OpenHow};
use crate::names::{self, Kind};
use crate::state::SegmentId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

pub(crate) type FileKey = (SegmentId, Kind);

pub(crate) struct Files {
    fs: Arc<dyn Fs>,
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    files: HashMap<FileKey, Cached>,
    /// Directories with names that were made, and how many of them were synced.
    dirs: BTreeMap<String, Marks>,
    uses: u64,
}

struct Cached {
    file: Arc<dyn File>,
    marks: Marks,
    used: u64,
}

#[derive(Clone, Copy, Default)]
struct Marks {
    noted: u64,
    synced: u64,
}

/// What to do where the file is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Fail,
    Create,
}

impl Files {
    pub(crate) fn new(fs: Arc<dyn Fs>, limit: usize) -> Self {
        Self { fs, limit, inner: Mutex::default() }
    }

    pub(crate) fn get(&self, key: FileKey, missing: Missing) -> io::Result<Arc<dyn File>> {
        let mut inner = self.inner.lock();
        inner.uses += 1;
        let used = inner.uses;
        if let Some(c) = inner.files.get_mut(&key) {
            c.used = used;
            return Ok(c.file.clone());
        }
        let path = names::segment_file(key.0, key.1);
        let file = match self.fs.open(&path, OpenHow::Write) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && missing == Missing::Create => {
                let file = self.fs.open(&path, OpenHow::CreateNew)?;
                inner.dirs.entry(names::partition_dir(key.0.tp)).or_default().noted += 1;
                file
            }
            other => other?,
        };
        inner.files.insert(key, Cached { file: file.clone(), marks: Marks::default(), used });
        if inner.files.len() > self.limit {
            inner.evict(self.limit);
        }
        Ok(file)
    }

    /// Notes that bytes were written to this file.
    pub(crate) fn written(&self, key: FileKey, file: &Arc<dyn File>) {
        let mut inner = self.inner.lock();
        inner.uses += 1;
        let used = inner.uses;
        let cached = inner.files.entry(key).or_insert_with(|| Cached {
            file: file.clone(),
            marks: Marks::default(),
            used,
        });
        cached.marks.noted += 1;
    }

    /// Files with unsynced bytes, in order.
    pub(crate) fn dirty(&self) -> Vec<FileKey> {
        let inner = self.inner.lock();
        let dirty = inner.files.iter().filter(|(_, c)| c.marks.noted > c.marks.synced);
        let mut keys: Vec<_> = dirty.map(|(key, _)| *key).collect();
        keys.sort_unstable();
        keys
    }

    /// Syncs one file, if it still has unsynced bytes.
    pub(crate) fn sync(&self, key: FileKey) -> io::Result<()> {
        let (file, noted) = match self.inner.lock().files.get(&key) {
            Some(c) if c.marks.noted > c.marks.synced => (c.file.clone(), c.marks.noted),
            _ => return Ok(()),
        };
        file.sync()?;
        if let Some(c) = self.inner.lock().files.get_mut(&key) {
            c.marks.synced = c.marks.synced.max(noted);
        }
        Ok(())
    }

    /// [`Files::sync`] for several files at once. One sync after the other waits for the disk each time; together, a file
    /// system makes them durable in a few commits of its own.
    pub(crate) fn sync_all(&self, keys: &[FileKey]) -> io::Result<()> {
        if let [key] = keys {
            return self.sync(*key);
        }
        thread::scope(|scope| {
            let mut syncs = Vec::with_capacity(keys.len());
            for key in keys {
                syncs.push(thread::Builder::new().spawn_scoped(scope, || self.sync(*key))?);
            }
            // After an error the scope waits for the others; the first is told.
            for sync in syncs {
                sync.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            }
            Ok(())
        })
    }

    /// Counts this file as synced without syncing it: only seeded bugs do so.
    pub(crate) fn forget(&self, key: FileKey) {
        if let Some(c) = self.inner.lock().files.get_mut(&key) {
            c.marks.synced = c.marks.noted;
        }
    }

    pub(crate) fn dirty_dirs(&self) -> Vec<String> {
        let inner = self.inner.lock();
        inner.dirs.iter().filter(|(_, m)| m.noted > m.synced).map(|(dir, _)| dir.clone()).collect()
    }

    pub(crate) fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let noted = self.inner.lock().dirs.get(dir).map_or(0, |m| m.noted);
        self.fs.sync_dir(dir)?;
        if let Some(m) = self.inner.lock().dirs.get_mut(dir) {
            m.synced = m.synced.max(noted);
        }
        Ok(())
    }

    pub(crate) fn forget_dir(&self, dir: &str) {
        if let Some(m) = self.inner.lock().dirs.get_mut(dir) {
            m.synced = m.noted;
        }
    }

    /// Lets go of a segment's files, which nothing names any more.
    pub(crate) fn drop_segment(&self, id: SegmentId) {
        let mut inner = self.inner.lock();
        for kind in Kind::ALL {
            inner.files.remove(&(id, kind));
        }
    }

    /// Lets go of a directory that nothing names any more.
    pub(crate) fn drop_dir(&self, dir: &str) {
        self.inner.lock().dirs.remove(dir);
    }
}

impl Inner {
    /// Closes the files that were not used for longest, down to three quarters of the limit.
    fn evict(&mut self, limit: usize) {
        let clean = |c: &Cached| c.marks.noted == c.marks.synced;
        let mut ages: Vec<_> =
            self.files.iter().filter(|(_, c)| clean(c)).map(|(k, c)| (c.used, *k)).collect();
        ages.sort_unstable();
        let most = self.files.len().saturating_sub(limit * 3 / 4);
        for (_, key) in ages.into_iter().take(most) {
            self.files.remove(&key);
        }
    }
}
