//! Case study: the life of one message, byte by byte, from `send` to the committed count that it became part of.
//!
//! Everything shown is read from the files of a real run in a temporary folder, and every sentence that begins with `=`
//! is checked while it is printed: exit code 1 if one does not hold. `first_half.rs` goes from the producer to the
//! reader, `second_half.rs` from the job to the committed output; `disk.rs` finds things in files, `dump.rs` shows them.

mod disk;
mod dump;
mod first_half;
mod job;
mod second_half;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use tidemill_examples::{Place, finish};

use crate::dump::text;

/// Follows one record through every file it comes to lie in, with its bytes.
#[derive(Parser)]
#[command(name = "life-of-a-message")]
struct Cli {
    /// Where the data lies, and stays [default: a temporary folder]. It must be new.
    #[arg(long, value_name = "DIR")]
    data: Option<std::path::PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    finish(story(&cli))
}

fn story(cli: &Cli) -> Result<()> {
    let place = Place::new(cli.data.as_deref())?;
    text(
        "One message: address 192.168.1.7 was seen on 17 May 2024 at 10:00:03. It is sent to topic `visits`; a job counts\n\
         visits per address and five seconds, and writes the counts to topic `counts`. Here is what becomes of it.\n\n\
         Left: the position in the file or message (* differs from run to run). Then the bytes, the field, its meaning.\n\
         Lines with = are checked while they are printed.",
    )?;
    let visits = first_half::tell(place.path())?;
    second_half::tell(place.path(), visits)?;
    text("\nThat was the whole life. Every claim above held.")
}
