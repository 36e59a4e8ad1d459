use serde::{Deserialize, Serialize};
use tidemill_rpc::Wire;

#[derive(Serialize, Deserialize, Wire)]
struct Skips {
    a: u8,
    #[serde(skip)]
    b: u8,
}

#[derive(Serialize, Wire)]
struct Borrows<'a> {
    a: &'a str,
}

#[derive(Wire)]
union Union {
    a: u8,
}

#[derive(Wire)]
enum Never {}

fn main() {}
