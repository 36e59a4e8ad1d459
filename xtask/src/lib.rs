//! Checks and long runs of the project. They use nothing of it but the `streamctl` binary, so that what they find out
//! does not rest on the code they check.

pub mod counted;
pub mod demo;
pub mod full_disk;
pub mod kills;
pub mod prove;
pub mod recount;
pub mod streamctl;
