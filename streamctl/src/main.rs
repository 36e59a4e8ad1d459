//! The command line of Tidemill.

fn main() {}
