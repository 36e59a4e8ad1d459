//! `streamctl explain plan | why-not-fired`: what a job is made of, and what its windows wait for.

mod plan;
mod waits;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::cli::Setting;
use crate::state::JobName;
use crate::target::Target;

/// `streamctl explain ...`
#[derive(Debug, Clone, Subcommand)]
pub enum ExplainCommand {
    /// Show a job's operators, exchange, stores, topics and event-time settings.
    ///
    /// Looks at the job's code alone: it needs no data directory, and the job need not have run.
    #[command(after_help = "\
Examples:
  streamctl explain plan ip-count
  streamctl explain plan ip-count --set window=1m")]
    Plan(Plan),
    /// Tell why a job's open windows have not fired: which partition holds event time back, and what it waits for.
    ///
    /// Rests on what the job committed, and on what a running job says about itself (which partitions are idle).
    #[command(after_help = "\
Example:
  streamctl explain why-not-fired ip-count")]
    WhyNotFired(JobName),
}

impl ExplainCommand {
    /// The job it explains.
    pub fn job_mut(&mut self) -> &mut JobName {
        match self {
            ExplainCommand::Plan(args) => &mut args.job,
            ExplainCommand::WhyNotFired(job) => job,
        }
    }
}

/// `streamctl explain plan ...`
#[derive(Debug, Clone, Args)]
pub struct Plan {
    #[command(flatten)]
    job: JobName,
    /// An argument of the job; `streamctl job describe JOB` shows them.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<Setting>,
}

/// Runs the command.
pub async fn run(target: &Target, command: &ExplainCommand) -> Result<()> {
    match command {
        ExplainCommand::Plan(args) => plan::run(&args.job, &args.set),
        ExplainCommand::WhyNotFired(job) => waits::run(target, job).await,
    }
}
