//! `streamctl`, the command line of Tidemill. A module per command; what they share is small:
//! [`stdout`] (data only), [`stop`] (Ctrl-C), [`exit`] (exit codes).

#![allow(unreachable_pub, reason = "a binary exports nothing; `pub` marks what a module offers the others")]

mod cli;
mod exit;
mod generate;
mod stdout;
mod stop;

use std::fmt;
use std::io::{IsTerminal, Write};

use clap::Parser;
use cli::{Cli, Command, GenCommand};

fn main() {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TIDEMILL_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    // Threads that still wait for standard input must not keep a finished command alive.
    std::process::exit(exit::code(run(cli)));
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Gen(GenCommand::AccessLog(args)) => generate::access_log(&args),
        _ => Ok(()),
    }
}

/// Says something to the user on stderr. A terminal that is gone is no reason to fail.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
