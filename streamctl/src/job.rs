//! `streamctl job list | describe`.

use anyhow::Result;
use tidemill_broker::{Access, AccessError, Broker, DirError, FetchOffsets, Stable};

use crate::cli::JobCommand;
use crate::data::{self, Intent};
use crate::identity::StateAt;
use crate::target::Target;
use crate::{identity, jobs, stdout};

/// Runs the command.
pub async fn run(target: &Target, command: &JobCommand) -> Result<()> {
    match command {
        JobCommand::List(at) => {
            list()?;
            // Without a directory nothing ran; that is no failure of a list.
            if matches!(target, Target::Directory(dir) if !dir.exists()) {
                return Ok(());
            }
            let access = data::open(target, Intent::Use).await?;
            let result = list_identities(&access, at).await;
            data::close(access, result).await
        }
        JobCommand::Describe { job, name } => {
            let job = jobs::find(job)?;
            let identity = name.as_deref().unwrap_or(job.name);
            describe_arguments(&job)?;
            let access = match data::open(target, Intent::Use).await {
                Ok(access) => access,
                // Without a directory nothing was committed; what cannot be looked at may have something.
                Err(error) if is_missing(&error) => {
                    crate::note(format_args!("no committed offsets: {error}"));
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            let result = describe_offsets(&access, identity).await;
            data::close(access, result).await
        }
    }
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(AccessError::Dir(DirError::Missing { .. })))
}

fn list() -> Result<()> {
    let jobs = jobs::all();
    let width = jobs.iter().map(|job| job.name.len()).max().unwrap_or(0);
    for job in jobs {
        stdout::line(format_args!("{:width$}  {}", job.name, job.about))?;
    }
    Ok(())
}

/// The identities that have committed, with what they have not read.
async fn list_identities(access: &Access, at: &StateAt) -> Result<()> {
    let committed = identity::committed(&identity::log(access)).await?;
    let column = |title: &str, words: &mut dyn Iterator<Item = &String>| {
        words.map(String::len).max().unwrap_or(0).max(title.len())
    };
    let names = column("name", &mut committed.keys());
    let width = column("job", &mut committed.values().map(|record| &record.job));
    let mut title = Some(format!("\n{:names$}  {:width$}         lag  runs", "name", "job"));
    for (name, record) in &committed {
        let identity = identity::identity(name, None)?;
        let lag: i64 = read(access, name).await?.iter().map(Read::lag).sum();
        let runs = match at.running(access, &identity)? {
            Some(Some(running)) => format!("in process {}", running.pid),
            Some(None) => "yes".to_owned(),
            None => "no".to_owned(),
        };
        if let Some(title) = title.take() {
            stdout::line(format_args!("{title}"))?;
        }
        stdout::line(format_args!("{name:names$}  {:width$}  {lag:>10}  {runs}", record.job))?;
    }
    Ok(())
}

/// How far an identity has read one partition.
#[derive(Debug)]
struct Read {
    topic: String,
    partition: u32,
    committed: i64,
    stable: i64,
}

impl Read {
    fn lag(&self) -> i64 {
        self.stable.saturating_sub(self.committed).max(0)
    }
}

/// Every partition that an identity has committed, by topic and number.
async fn read(access: &Access, identity: &str) -> Result<Vec<Read>> {
    let request = FetchOffsets { group: identity.to_owned(), stable: Stable::Released };
    let committed = access.fetch_offsets(request).await.map_err(data::explain)?.offsets;
    let mut all = Vec::with_capacity(committed.len());
    if committed.is_empty() {
        return Ok(all);
    }
    for topic in access.topics().await.map_err(data::explain)? {
        let mine: Vec<_> = committed.iter().filter(|offset| offset.partition.topic == topic.id).collect();
        if mine.is_empty() {
            continue;
        }
        let described = access.describe(topic.name.clone()).await.map_err(data::explain)?;
        for offset in mine {
            let partition = offset.partition.partition;
            let stable = described.offsets.get(partition as usize).map_or(0, |offsets| offsets.last_stable);
            let topic = topic.name.clone();
            all.push(Read { topic, partition, committed: offset.position.offset, stable });
        }
    }
    all.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
    Ok(all)
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
    let all = read(access, identity).await?;
    if all.is_empty() {
        crate::note(format_args!("{identity} has committed nothing in {} yet", access.target()));
        return Ok(());
    }
    let width = all.iter().map(|read| read.topic.len()).max().unwrap_or(0);
    stdout::line(format_args!("\n{:width$}  partition   committed      stable         lag", "topic"))?;
    for read in all {
        stdout::line(format_args!(
            "{:width$}  {:>9}  {:>10}  {:>10}  {:>10}",
            read.topic,
            read.partition,
            read.committed,
            read.stable,
            read.lag()
        ))?;
    }
    Ok(())
}
