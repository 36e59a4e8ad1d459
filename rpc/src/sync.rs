//! The lock under the in-flight table, named here so that the loom models can compile the table over their own.

pub(crate) use parking_lot::Mutex;
