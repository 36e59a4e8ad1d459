//! `streamctl explain plan | why-not-fired`: what a job is made of, and what its windows wait for.

mod plan;
mod waits;

use anyhow::Result;
use clap::{Args, Subcommand};
use tidemill::Guarantee;

use crate::cli::{Setting, guarantees};
use crate::identity::StateAt;
use crate::state::JobName;
use crate::target::Target;

/// `streamctl explain ...`
#[derive(Debug, Clone, Subcommand)]
pub enum ExplainCommand {
    /// Show a job's operators, exchange, stores, topics and event-time settings.
    ///
    /// Looks at the job's code: it needs no data directory, and the job need not have run. Where it committed, what it is
    /// fixed to counts before the defaults.
    #[command(after_help = "\
Examples:
  streamctl explain plan ip-count
  streamctl explain plan ip-count --set window=1m
  streamctl explain plan ip-count --name repeats --guarantee at-least-once")]
    Plan(Plan),
    /// Tell why a job's open windows have not fired: which partition holds event time back, and what it waits for.
    ///
    /// Rests on what the job committed, and on what a running job says about itself (which partitions are idle).
    #[command(after_help = "\
Example:
  streamctl explain why-not-fired ip-count")]
    WhyNotFired(WhyNotFired),
}

impl ExplainCommand {
    /// The job it explains.
    pub fn job_mut(&mut self) -> &mut JobName {
        match self {
            ExplainCommand::Plan(args) => &mut args.job,
            ExplainCommand::WhyNotFired(args) => &mut args.job,
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
    /// What a crash may do to output, as `streamctl run --guarantee` has it.
    #[arg(long, value_name = "G", value_parser = guarantees())]
    guarantee: Option<Guarantee>,
}

/// `streamctl explain why-not-fired ...`
#[derive(Debug, Clone, Args)]
pub struct WhyNotFired {
    #[command(flatten)]
    job: JobName,
    #[command(flatten)]
    at: StateAt,
}

/// Runs the command.
pub async fn run(target: &Target, command: &ExplainCommand) -> Result<()> {
    match command {
        ExplainCommand::Plan(args) => plan::run(target, &args.job, &args.set, args.guarantee).await,
        ExplainCommand::WhyNotFired(args) => waits::run(target, &args.job, &args.at).await,
    }
}
