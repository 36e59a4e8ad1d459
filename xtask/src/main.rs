//! Checks and long runs of the project.

fn main() {}
