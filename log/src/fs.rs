//! The one way to files: a trait, the real directory, and an in-memory twin.
