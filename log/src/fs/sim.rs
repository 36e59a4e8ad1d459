//! An in-memory [`Fs`](super::Fs) that loses what was not synced.
