//! loom models of the lock-free and locked parts, without tokio or RocksDB.
