//! Ready-made jobs and their registry.

pub mod access_log;
