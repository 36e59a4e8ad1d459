//! A job's state in RocksDB: one database per process, shared by its tasks.
//!
//! ```text
//!   state/<identity>/      one column family; keys and values are exactly those of `tidemill_stream::state`
//! ```
//!
//! Invariants
//! * RocksDB's own log is off: the changelog topics are the log. What survives a crash is a prefix of the writes,
//!   because one column family's memtables are flushed in order and a batch never spans two.
//! * All of its memory is one budget: memtables are charged to the block cache, index and filter blocks live in it.
//! * A database that cannot be opened because it is damaged is thrown away: state is rebuilt from the changelog. One
//!   that another process holds is not damaged: the caller is told.
//!
//! Windows that closed are deleted by range, when the engine says so. Left out: a compaction filter that drops them
//! without tombstones.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DB, DBCompressionType, Direction, ErrorKind, IteratorMode,
    LruCacheOptions, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};
use tidemill_stream::state::{KeyList, StateBackend, StateError, StoreBatch, StoreOp};

/// How long an open waits for the process that held the directory before this one to be gone.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// Memory for blocks of a store that is only looked at.
const READ_ONLY_CACHE: usize = 8 << 20;

/// The state store of one job.
pub struct RocksState {
    db: DB,
    path: PathBuf,
    cache: Cache,
    writes: WriteOptions,
}

impl std::fmt::Debug for RocksState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RocksState").field("path", &self.path).finish_non_exhaustive()
    }
}

fn store(source: rocksdb::Error) -> StateError {
    StateError::Store { source: Box::new(source) }
}

impl RocksState {
    /// Opens the store in `dir`, making it if it is not there. `memory_bytes_max` covers memtables, blocks, indexes.
    ///
    /// # Errors
    ///
    /// Where another process holds the directory for longer than a few seconds, or the disk fails.
    pub fn open(dir: &Path, memory_bytes_max: usize) -> Result<Self, StateError> {
        std::fs::create_dir_all(dir).map_err(|e| StateError::Store { source: Box::new(e) })?;
        let cache = cache(memory_bytes_max);
        let options = options(memory_bytes_max, &cache);
        let db = match open_when_free(&options, dir) {
            Err(e) if e.kind() == ErrorKind::Corruption => {
                tracing::warn!(dir = %dir.display(), error = %e, "the state store is damaged: it is rebuilt from the changelog");
                DB::destroy(&options, dir).map_err(store)?;
                open_database(&options, dir)
            }
            opened => opened,
        }
        .map_err(store)?;
        let mut writes = WriteOptions::default();
        writes.disable_wal(true);
        Ok(Self { db, path: dir.to_owned(), cache, writes })
    }

    /// Opens the store in `dir` to be read, beside a process that writes it too: what it had flushed by now is seen.
    /// `None` where there is none.
    ///
    /// # Errors
    ///
    /// If it cannot be read. Beside a writer that removes files just then, another try may succeed.
    pub fn read_only(dir: &Path) -> Result<Option<Self>, StateError> {
        if !dir.join("CURRENT").exists() {
            return Ok(None);
        }
        let cache = Cache::new_lru_cache(READ_ONLY_CACHE);
        let family = rocksdb::DEFAULT_COLUMN_FAMILY_NAME;
        let db = DB::open_cf_for_read_only(&Options::default(), dir, [family], false).map_err(store)?;
        Ok(Some(Self { db, path: dir.to_owned(), cache, writes: WriteOptions::default() }))
    }

    /// Bytes of memory in use: blocks, indexes, filters and memtables.
    pub fn memory_bytes(&self) -> usize {
        self.cache.get_usage()
    }

    fn property(&self, name: &'static str) -> u64 {
        // A property RocksDB does not know reads as nothing: it is for display only.
        self.db.property_int_value(name).ok().flatten().unwrap_or(0)
    }

    /// About how many entries the store holds.
    pub fn entries_estimate(&self) -> u64 {
        self.property("rocksdb.estimate-num-keys")
    }
}

/// By name, because a column family that was not named at the open has no handle, and batched reads take one.
fn open_database(options: &Options, dir: &Path) -> Result<DB, rocksdb::Error> {
    DB::open_cf_with_opts(options, dir, [(rocksdb::DEFAULT_COLUMN_FAMILY_NAME, options.clone())])
}

fn open_when_free(options: &Options, dir: &Path) -> Result<DB, rocksdb::Error> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match open_database(options, dir) {
            Err(e) if e.to_string().contains("lock") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            opened => return opened,
        }
    }
}

/// Parts of the cache, each with its own lock and its share of the memory. By default there are 64: a part smaller than a
/// file's filter threw it out at once, and every batch of misses read it from the file again.
const CACHE_PART_BYTES: usize = 16 << 20;

fn cache(memory_bytes_max: usize) -> Cache {
    let mut options = LruCacheOptions::default();
    options.set_capacity(memory_bytes_max);
    let parts = (memory_bytes_max / CACHE_PART_BYTES).clamp(1, 64);
    options.set_num_shard_bits(i32::try_from(parts.ilog2()).unwrap_or(0));
    Cache::new_lru_cache_opts(&options)
}

fn options(memory_bytes_max: usize, cache: &Cache) -> Options {
    // A third for what is being written; two memtables at most, so one can fill while the other is flushed.
    let memtables = (memory_bytes_max / 3).max(128 << 10);
    let memtable = (memtables / 2).clamp(64 << 10, 64 << 20);
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_cache_index_and_filter_blocks_with_high_priority(true);
    table.set_block_size(8 << 10);
    // Most misses ask for keys that are not there: a key's first row in its window.
    table.set_bloom_filter(10.0, false);
    // Filters and indexes in pages, of which a batch of misses (and a start) reads those it needs: whole, those of a
    // large file are megabytes.
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_metadata_block_size(8 << 10);
    table.set_pin_top_level_index_and_filter(true);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    let manager = WriteBufferManager::new_write_buffer_manager_with_cache(memtables, false, cache.clone());
    options.set_write_buffer_manager(&manager);
    options.set_write_buffer_size(memtable);
    // The arena's block is the least a memtable takes; the default would be more than a small budget.
    options.set_arena_block_size((memtable / 8).clamp(8 << 10, 1 << 20));
    options.set_max_write_buffer_number(2);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_max_background_jobs(2);
    options.set_max_open_files(256);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_level_compaction_dynamic_level_bytes(true);
    options.set_target_file_size_base((4 * memtable as u64).clamp(1 << 20, 64 << 20));
    options
}

/// A key of the store and its value.
pub type StoreEntry = (Vec<u8>, Vec<u8>);

/// Every entry of the store in `dir`, in key order. The job must not be running.
///
/// # Errors
///
/// If the store is not there, is held by another process, or cannot be read.
pub fn dump_state(dir: &Path) -> Result<Vec<StoreEntry>, StateError> {
    let db = DB::open_for_read_only(&Options::default(), dir, false).map_err(store)?;
    db.iterator(IteratorMode::Start)
        .map(|entry| entry.map(|(key, value)| (key.into_vec(), value.into_vec())).map_err(store))
        .collect()
}

impl StateBackend for RocksState {
    fn get_many(&self, keys: &KeyList, found: &mut dyn FnMut(usize, &[u8])) -> Result<(), StateError> {
        let Some(family) = self.db.cf_handle(rocksdb::DEFAULT_COLUMN_FAMILY_NAME) else {
            unreachable!("a database has its default column family")
        };
        let values = self.db.batched_multi_get_cf_opt(family, keys.iter(), false, &ReadOptions::default());
        for (i, value) in values.into_iter().enumerate() {
            if let Some(value) = value.map_err(store)? {
                found(i, &value);
            }
        }
        Ok(())
    }

    fn write(&self, batch: &StoreBatch) -> Result<(), StateError> {
        let mut writes = WriteBatch::default();
        batch.for_each(|op| match op {
            StoreOp::Put(key, value) => writes.put(key, value),
            StoreOp::DeleteRange(from, to) => writes.delete_range(from, to),
        });
        self.db.write_opt(writes, &self.writes).map_err(store)
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StateError> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to);
        for entry in self.db.iterator_opt(IteratorMode::From(from, Direction::Forward), options) {
            let (key, value) = entry.map_err(store)?;
            if each(&key, &value).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StateError> {
        self.db.flush().map_err(store)
    }

    fn bytes(&self) -> u64 {
        self.property("rocksdb.total-sst-files-size") + self.property("rocksdb.cur-size-all-mem-tables")
    }
}
