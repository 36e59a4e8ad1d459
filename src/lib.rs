//! Stream processing over a message log: exactly-once jobs as Rust pipelines.
