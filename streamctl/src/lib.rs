//! The command line of Tidemill, as a library: the `streamctl` program is [`main`] with the ready-made jobs, and the
//! program of a user's crate is [`main`] with the user's. So a job of one's own has every command and option.
//!
//! ```no_run
//! # use tidemill::prelude::*;
//! # #[derive(JobArgs)] struct Words { #[arg(default = "lines")] input: String }
//! # impl Job for Words {
//! #     const NAME: &'static str = "words";
//! #     fn build(&self, flow: &Flow) -> Result<()> { flow.source(topic(&self.input), Text).to(topic("copy"), Text); Ok(()) }
//! # }
//! fn main() {
//!     streamctl::main(&[JobSpec::of::<Words>("words per window")])
//! }
//! ```
//!
//! A module per command; what they share is small: `stdout` (data only), `stop` (Ctrl-C), `exit` (exit codes), `jobs`
//! (which jobs there are).

#![allow(unreachable_pub, reason = "only `main` is exported; `pub` marks what a module offers the others")]

mod chaos;
mod cli;
mod completions;
mod consume;
mod data;
mod du;
mod exit;
mod explain;
mod files;
mod generate;
mod identity;
mod job;
mod jobs;
mod live;
mod log_dump;
mod new;
mod print;
mod produce;
mod reset;
mod run;
mod serve;
mod state;
mod stdout;
mod stop;
mod target;
mod toolkit;
mod topic;
mod units;
mod used;
mod user_crate;

use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use cli::{Cli, Command, GenCommand};
use stop::Stop;
use target::Target;
use tidemill::JobSpec;

/// Runs the command line of this process with these jobs beside the ready-made ones, and ends the process: exit code 0
/// done, 1 failed, 2 wrong usage. The first job is the one that `streamctl run ./CRATE` runs.
pub fn main(jobs: &[JobSpec]) -> ! {
    jobs::set_own(jobs);
    let cli = cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TIDEMILL_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(|| live::Stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    files::raise_limit();
    // Threads that still wait for standard input must not keep a finished command alive.
    std::process::exit(exit::code(execute(cli)))
}

/// How long a command that is done waits for threads that it does not need any more.
const LEFT_BEHIND: Duration = Duration::from_secs(1);

fn execute(mut cli: Cli) -> anyhow::Result<()> {
    chaos::install()?;
    if let Some(job) = cli.command.job_mut() {
        user_crate::resolve(job)?;
    }
    match &cli.command {
        Command::New(args) => return new::run(args),
        Command::Build { dir } => return user_crate::build_and_tell(dir),
        Command::Completions(args) => return completions::run(args),
        Command::Log(command) => return log_dump::run(command),
        _ => {}
    }
    if let Command::Gen(GenCommand::AccessLog(args)) = &cli.command {
        // Needs no directory and no signals: it ends where it is when it is interrupted.
        return generate::access_log(args);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let stop = Stop::install()?;
        let target = Target::new(cli.data.as_deref(), cli.broker.as_deref())?;
        match &cli.command {
            Command::Gen(_)
            | Command::New(_)
            | Command::Build { .. }
            | Command::Completions(_)
            | Command::Log(_) => Ok(()),
            Command::Topic(command) => topic::run(&target, command).await,
            Command::Produce(args) => produce::run(&target, args, &stop).await,
            Command::Consume(args) => consume::run(&target, args, &stop).await,
            Command::Du(args) => du::run(target.directory("du")?, args).await,
            Command::Explain(command) => explain::run(&target, command).await,
            Command::Job(command) => job::run(&target, command).await,
            Command::Serve(args) => serve::run(target.directory("serve")?, args, &stop).await,
            Command::Reset(args) => reset::run(&target, args).await,
            Command::Run(args) => run::run(&target, args, &stop).await,
            Command::State(command) => state::run(&target, command.clone()).await,
        }
    });
    // What was being opened may stand in a system call: it is not waited for, and the process ends with it. What a command
    // began in order it has ended by now.
    runtime.shutdown_timeout(match &result {
        Err(error) if error.is::<exit::Stopped>() => Duration::ZERO,
        _ => LEFT_BEHIND,
    });
    result
}

/// Says something to the user on stderr. A terminal that is gone is no reason to fail.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = live::around(|| writeln!(std::io::stderr().lock(), "{text}"));
}
