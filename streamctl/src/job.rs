//! `streamctl job list | describe`.

use anyhow::Result;
use tidemill_broker::{Access, Broker, FetchOffsets, Stable};

use crate::cli::JobCommand;
use crate::data::{self, Intent};
use crate::target::Target;
use crate::{jobs, stdout};

/// Runs the command.
pub async fn run(target: &Target, command: &JobCommand) -> Result<()> {
    match command {
        JobCommand::List => list(),
        JobCommand::Describe { job, name } => {
            let job = jobs::find(job)?;
            let identity = name.as_deref().unwrap_or(job.name);
            describe_arguments(&job)?;
            let access = match data::open(target, Intent::Use).await {
                Ok(access) => access,
                Err(error) => {
                    crate::note(format_args!("no committed offsets: {error:#}"));
                    return Ok(());
                }
            };
            let result = describe_offsets(&access, identity).await;
            data::close(access, result).await
        }
    }
}

fn list() -> Result<()> {
    let jobs = jobs::all();
    let width = jobs.iter().map(|job| job.name.len()).max().unwrap_or(0);
    for job in jobs {
        stdout::line(format_args!("{:width$}  {}", job.name, job.about))?;
    }
    Ok(())
}

fn describe_arguments(job: &tidemill::JobSpec) -> Result<()> {
    stdout::line(format_args!("{}: {}\n\narguments (--set key=value)", job.name, job.about))?;
    let default = |arg: &tidemill::args::ArgSpec| arg.default.map_or("required".to_owned(), str::to_owned);
    let names = job.args.iter().map(|arg| arg.name.len()).max().unwrap_or(0);
    let defaults = job.args.iter().map(|arg| default(arg).len()).max().unwrap_or(0);
    for arg in job.args {
        let guarded = if arg.guarded { " (fixed once it ran)" } else { "" };
        stdout::line(format_args!(
            "  {:names$}  {:defaults$}  {}{guarded}",
            arg.name,
            default(arg),
            arg.help
        ))?;
    }
    Ok(())
}

async fn describe_offsets(access: &Access, identity: &str) -> Result<()> {
    let request = FetchOffsets { group: identity.to_owned(), stable: Stable::Released };
    let committed = access.fetch_offsets(request).await.map_err(data::explain)?.offsets;
    if committed.is_empty() {
        crate::note(format_args!("{identity} has committed nothing in {} yet", access.target()));
        return Ok(());
    }
    let topics = access.topics().await.map_err(data::explain)?;
    let width = topics.iter().map(|topic| topic.name.len()).max().unwrap_or(0);
    stdout::line(format_args!("\n{:width$}  partition   committed      stable         lag", "topic"))?;
    for topic in &topics {
        let mut mine: Vec<_> = committed.iter().filter(|offset| offset.partition.topic == topic.id).collect();
        if mine.is_empty() {
            continue;
        }
        mine.sort_by_key(|offset| offset.partition.partition);
        let described = access.describe(topic.name.clone()).await.map_err(data::explain)?;
        for offset in mine {
            let number = offset.partition.partition;
            let stable = described.offsets.get(number as usize).map_or(0, |offsets| offsets.last_stable);
            let at = offset.position.offset;
            let lag = (stable - at).max(0);
            stdout::line(format_args!(
                "{:width$}  {number:>9}  {at:>10}  {stable:>10}  {lag:>10}",
                topic.name
            ))?;
        }
    }
    Ok(())
}
