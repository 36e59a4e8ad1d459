//! `streamctl completions SHELL`: the script that lets a shell complete commands, options and file names.

use std::io::Write;

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::stdout::{self, OrClosed};

/// `streamctl completions ...`
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell the script is for.
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Runs the command.
pub fn run(args: &Completions) -> Result<()> {
    // Written to memory first: the generator panics where its writer fails, and a reader may go away (`| head`).
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "streamctl", &mut script);
    let mut out = stdout::buffered();
    out.write_all(&script).and_then(|()| out.flush()).or_closed()
}
