//! The `streamctl` program: the command line, with the ready-made jobs.

fn main() -> ! {
    streamctl::main(&[])
}
