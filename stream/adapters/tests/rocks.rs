//! RocksDB as a state store: the suite that every backend passes, with little and with much memory, and what a crash or
//! damage leaves.

#![cfg(feature = "rocksdb")]

use std::sync::Arc;

use tidemill_adapters::RocksState;
use tidemill_stream::state::StateBackend;
use tidemill_stream::testing::backend_suite;

#[test]
fn passes_the_suite_with_any_memory() {
    for (seed, memory) in [(1, 256 << 10), (2, 64 << 20)] {
        let dir = tempfile::tempdir().unwrap();
        let open = || -> Arc<dyn StateBackend> { Arc::new(RocksState::open(dir.path(), memory).unwrap()) };
        backend_suite(seed, open(), |backend| {
            drop(backend);
            open()
        });
    }
}

#[test]
fn a_damaged_store_is_made_again_and_a_held_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let held = RocksState::open(dir.path(), 1 << 20).unwrap();
    let error = RocksState::open(dir.path(), 1 << 20).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("lock"), "{error:?}");
    drop(held);
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let path = file.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("MANIFEST") {
            std::fs::write(path, b"damage").unwrap();
        }
    }
    let again = RocksState::open(dir.path(), 1 << 20).unwrap();
    assert!(again.memory_bytes() < 1 << 20);
}
