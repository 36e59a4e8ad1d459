//! `streamctl`, the command line of Tidemill. A module per command; what they share is small:
//! [`stdout`] (data only), [`stop`] (Ctrl-C), [`exit`] (exit codes).

#![allow(unreachable_pub, reason = "a binary exports nothing; `pub` marks what a module offers the others")]

mod cli;
mod consume;
mod data;
mod exit;
mod generate;
mod job;
mod print;
mod produce;
mod run;
mod serve;
mod stdout;
mod stop;
mod target;
mod topic;

use std::fmt;
use std::io::{IsTerminal, Write};

use clap::Parser;
use cli::{Cli, Command, GenCommand};
use stop::Stop;
use target::Target;

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
    std::process::exit(exit::code(execute(cli)));
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    if let Command::Gen(GenCommand::AccessLog(args)) = &cli.command {
        // Needs no directory and no signals: it ends where it is when it is interrupted.
        return generate::access_log(args);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = Stop::install()?;
        let target = Target::new(cli.data.as_deref(), cli.broker.as_deref())?;
        match &cli.command {
            Command::Gen(_) => Ok(()),
            Command::Topic(command) => topic::run(&target, command).await,
            Command::Produce(args) => produce::run(&target, args, &stop).await,
            Command::Consume(args) => consume::run(&target, args, &stop).await,
            Command::Job(command) => job::run(&target, command).await,
            Command::Serve(args) => serve::run(target.directory("serve")?, args, &stop).await,
            Command::Run(args) => run::run(&target, args, &stop).await,
        }
    })
}

/// Says something to the user on stderr. A terminal that is gone is no reason to fail.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
