//! Checks and long runs of the project. They use nothing of it but its binaries (`streamctl`, and `tidemill-load` for
//! the power cuts), so that what they find out does not rest on the code they check.

pub mod catch;
pub mod chaos;
pub mod counted;
pub mod demo;
pub mod full_disk;
pub mod ledger;
pub mod page;
pub mod power;
pub mod prove;
pub mod recount;
pub mod streamctl;
pub mod within;
