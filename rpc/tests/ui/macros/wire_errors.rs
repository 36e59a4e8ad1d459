use tidemill_rpc::{RpcError, WireError};

#[derive(Debug, WireError)]
enum Unnumbered {
    #[wire(code = 1)]
    A,
    B,
}

#[derive(Debug, WireError)]
enum Twice {
    #[wire(code = 1)]
    A,
    #[wire(code = 1)]
    B,
}

#[derive(Debug, WireError)]
enum Zero {
    #[wire(code = 0)]
    A,
    #[wire(core = 2)]
    B(RpcError),
}

#[derive(Debug, WireError)]
struct Struct;

fn main() {}
