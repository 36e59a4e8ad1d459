//! Partitioned log: record batches, segments, one journal, transactions, recovery.
