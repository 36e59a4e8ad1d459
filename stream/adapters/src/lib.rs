//! Joins the engine to the log and to RocksDB.
