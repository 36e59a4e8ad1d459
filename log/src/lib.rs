//! Partitioned log: record batches, segments, one journal, transactions, recovery.

pub mod batch;
pub mod fs;
pub mod sidecar;
