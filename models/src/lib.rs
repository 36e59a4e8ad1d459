//! loom models of the locked parts, without tokio or RocksDB: each test compiles the real file over loom's lock.
//!
//! `cargo test -p tidemill-models --release` explores every interleaving; no RUSTFLAGS are needed, because the
//! tests always use loom's types.
