//! `streamctl log dump FILE`: a file of a data directory as text, and where it is damaged.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Subcommand};
use tidemill_log::dump::{DumpError, DumpOptions, Records, dump};

use crate::exit::Usage;
use crate::stdout::{self, OrClosed};

/// `streamctl log ...`
#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Print a file of a data directory as text, with the places where it is damaged.
    ///
    /// Knows segments (.log), the files beside them (.headcrc, .index, .txnindex), journal files (.wal), checkpoints
    /// (checkpoint.a, checkpoint.b) and `format`. Reads the file alone and changes nothing, so it works beside a running
    /// owner and where the directory does not open. Of a damaged file it prints what is whole, behind the damage too,
    /// and ends with exit code 1.
    #[command(after_help = "\
Examples:
  streamctl log dump tidemill-data/checkpoint.a
  streamctl log dump --batches tidemill-data/topics/UUID/0/00000000000000000000.log")]
    Dump(Dump),
}

/// `streamctl log dump ...`
#[derive(Debug, Args)]
pub struct Dump {
    /// The file.
    pub file: PathBuf,
    /// Leave out the records of batches, and the batches of journal entries.
    #[arg(long)]
    pub batches: bool,
    /// Show at most so many bytes of a key or value.
    #[arg(long, value_name = "N", default_value_t = 120)]
    pub value_bytes: usize,
}

/// Runs the command.
pub fn run(command: &LogCommand) -> Result<()> {
    let LogCommand::Dump(args) = command;
    let file = args.file.display();
    if args.file.is_dir() {
        return Err(Usage::error(format!(
            "{file} is a directory; name a file in it, such as a segment: topics/<uuid>/<partition>/<offset>.log"
        )));
    }
    let records = if args.batches { Records::Hidden } else { Records::Shown };
    let options = DumpOptions { records, value_bytes_max: args.value_bytes };
    let mut out: BufWriter<_> = stdout::buffered();
    let damaged = match dump(&args.file, &options, &mut out) {
        Ok(damaged) => damaged,
        Err(DumpError::Write(error)) => return Err(error).or_closed(),
        Err(error @ DumpError::UnknownKind { .. }) => return Err(Usage::error(error.to_string())),
        Err(error @ DumpError::Read(_)) => return Err(error).with_context(|| file.to_string()),
    };
    out.flush().or_closed()?;
    match damaged {
        0 => Ok(()),
        1 => Err(anyhow!("{file} is damaged in one place")),
        n => Err(anyhow!("{file} is damaged in {n} places")),
    }
}
