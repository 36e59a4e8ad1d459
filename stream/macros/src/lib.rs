//! Derives a job's arguments.
