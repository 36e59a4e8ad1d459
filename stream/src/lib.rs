//! Dataflow engine: DSL, operators, time, windows, state, commit protocol, test driver.

pub mod args;
