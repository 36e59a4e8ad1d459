//! `streamctl reset JOB`: the job starts again, from the beginning of its input or another place.
//!
//! ```text
//!   lock the run ─▶ fence the identity ─▶ transaction 1: `_jobs` says that a reset began
//!       ─▶ remove the state directory ─▶ delete the changelogs
//!       ─▶ transaction 2: the new offsets, and the identity's record in `_jobs` goes
//! ```
//!
//! Invariants
//! * Between the two transactions the job does not start: its record says that a reset began. So it never runs on offsets
//!   and state that do not belong together, wherever this is cut short; the same command completes it.
//! * A job that runs on this machine is not touched. One that runs elsewhere is fenced: it can commit nothing more.
//! * Output, late rows and dead letters stay: a log forgets nothing because somebody reads it again.

use std::collections::BTreeSet;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use tidemill::adapters::RunLock;
use tidemill::names::{Identity, JOBS_TOPIC, JobRecord};
use tidemill_broker::batch::RecordParts;
use tidemill_broker::{
    Access, At, Broker, DeleteTopic, GroupOffset, IfUsed, ListOffsets, ListedOffset, Outcome, Topic,
    TransactionalOptions, TransactionalProducer,
};

use crate::cli::From;
use crate::data::{self, Intent};
use crate::exit::Usage;
use crate::identity::{self, StateAt};
use crate::state::JobName;
use crate::target::Target;
use crate::units::plural;

/// `streamctl reset ...`
#[derive(Debug, Clone, Args)]
pub struct Reset {
    #[command(flatten)]
    job: JobName,
    /// Where it starts to read: `earliest`, `latest`, `@-1h` (the first records with a timestamp so long ago or later) or
    /// `@TIME` (the same from a time on, RFC 3339). The timestamp is when `produce` appended a record, not the event time
    /// that the job reads from it.
    #[arg(long, default_value = "earliest", allow_hyphen_values = true, value_name = "FROM")]
    to: From,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    at: StateAt,
}

impl Reset {
    /// The job.
    pub fn job_mut(&mut self) -> &mut String {
        &mut self.job.job
    }
}

/// Runs the command.
pub async fn run(target: &Target, args: &Reset) -> Result<()> {
    let at = match args.to {
        From::Earliest => At::Earliest,
        // What an open transaction holds is not read yet, so it is still to come.
        From::Latest => At::Stable,
        From::Time(time) => At::Time(time.as_millisecond()),
        From::Offset(_) | From::Last(_) => {
            return Err(Usage::error("--to takes earliest, latest or @TIME: a job reads many partitions"));
        }
    };
    let access = data::open(target, Intent::Use).await?;
    let result = reset(&access, args, at).await;
    data::close(access, result).await
}

/// What there is of a job.
struct Found {
    identity: Identity,
    record: Option<JobRecord>,
    /// Where it will read.
    offsets: Vec<GroupOffset>,
    input: Vec<String>,
    changelogs: Vec<Topic>,
    /// Its state directories: of its last run, and where one was left by an earlier run.
    states: Vec<PathBuf>,
}

async fn reset(access: &Access, args: &Reset, at: At) -> Result<()> {
    let identity = identity::identity(&args.job.job, args.job.name.as_deref())?;
    let home = args.at.home(access);
    let mut roots = vec![home.clone(), args.at.root(access, &identity)?];
    roots.retain(|root| root.join(identity.as_str()).exists());
    roots.dedup();
    // Before anything is made: a mistyped name leaves nothing behind.
    look(access, &args.job, identity.clone(), at, &roots).await?;
    // Held to the end: nobody starts the job meanwhile.
    let lock =
        RunLock::try_take(&home, &roots, &identity).with_context(|| identity::unseen(&home, &identity))?;
    let _lock = match lock {
        Ok(lock) => lock,
        Err(by) => {
            let by = by.map_or_else(String::new, |by| format!(" in process {}", by.pid));
            bail!("{identity} runs{by}; stop it first (Ctrl-C), then reset it");
        }
    };
    let found = look(access, &args.job, identity, at, &roots).await?;
    tell(&found, args);
    confirm(args)?;
    carry_out(access, &found).await?;
    let from = match args.to {
        From::Earliest => "the earliest records".to_owned(),
        From::Latest => "what comes from now on".to_owned(),
        _ => "the first records with a timestamp since then".to_owned(),
    };
    crate::note(format_args!("{} is reset: its next run begins with {from}", found.identity));
    Ok(())
}

async fn look(
    access: &Access,
    job: &JobName,
    identity: Identity,
    at: At,
    roots: &[PathBuf],
) -> Result<Found> {
    let mut jobs = identity::committed(&identity::log(access)).await?;
    let record = jobs.remove(identity.as_str());
    let committed = identity::offsets(access, &identity).await?;
    let states: Vec<_> = roots.iter().map(|root| root.join(identity.as_str())).collect();
    let topics = access.topics().await.map_err(data::explain)?;
    let mut of_changelogs: BTreeSet<String> = identity.keyed_changelog().into_iter().collect();
    let stores = record.iter().flat_map(|record| record.stores.keys());
    of_changelogs.extend(stores.filter_map(|store| identity.changelog(store).ok()));
    let (changelogs, others): (Vec<_>, Vec<_>) =
        topics.into_iter().partition(|topic| of_changelogs.contains(&topic.name));
    if record.is_none() && committed.is_empty() && states.is_empty() && changelogs.is_empty() {
        let known: Vec<_> = jobs.into_keys().collect();
        let known = match known.as_slice() {
            [] => "no job has".to_owned(),
            known => format!("these have: {}", known.join(", ")),
        };
        let said = format!("{identity} has committed nothing in {}; {known}", access.target());
        return Err(identity::unknown_or_new(&job.job, said));
    }
    let mut offsets = Vec::new();
    let mut input = Vec::new();
    for topic in &others {
        if !committed.iter().any(|offset| offset.partition.topic == topic.id) {
            continue;
        }
        input.push(topic.name.clone());
        let partitions: Vec<_> = (0..topic.partitions).map(|number| topic.partition(number)).collect();
        let request = ListOffsets { partitions: partitions.clone(), at };
        let listed = access.list_offsets(request).await.map_err(data::explain)?.offsets;
        for (partition, listed) in partitions.into_iter().zip(listed) {
            let position = match listed {
                ListedOffset::Found(position) | ListedOffset::AllOlder(position) => position,
                ListedOffset::Refused(error) => return Err(data::explain(error.into_error())),
            };
            // Without metadata nothing is known of event time: it begins anew, too.
            offsets.push(GroupOffset { partition, position, metadata: bytes::Bytes::new() });
        }
    }
    Ok(Found { identity, record, offsets, input, changelogs, states })
}

/// Says what goes and what stays.
fn tell(found: &Found, args: &Reset) {
    let Found { identity, record, input, changelogs, states, .. } = found;
    if record.as_ref().is_some_and(|record| record.resetting) {
        crate::note(format_args!("a reset of {identity} was cut short; this one completes it"));
    }
    crate::note(format_args!("resetting {identity} removes"));
    if !input.is_empty() {
        let to = match args.to {
            From::Earliest => "the earliest record".to_owned(),
            From::Latest => "the end".to_owned(),
            From::Time(time) => format!("the first record with a timestamp of {time} or later"),
            // Refused before.
            From::Offset(_) | From::Last(_) => String::new(),
        };
        crate::note(format_args!("  its committed offsets in {}: it reads from {to}", input.join(", ")));
    }
    for state in states {
        crate::note(format_args!("  its state in {}", state.display()));
    }
    for topic in changelogs {
        crate::note(format_args!(
            "  its changelog {} ({})",
            topic.name,
            plural(topic.partitions.into(), "partition", "partitions")
        ));
    }
    if let Some(record) = record {
        let fixed: Vec<_> = record.guarded.iter().map(|(name, value)| format!("{name}={value}")).collect();
        crate::note(format_args!("  what it was fixed to: {}", fixed.join(" ")));
        let output = record.guarded.get("output").filter(|output| !output.is_empty());
        if let Some(output) = output {
            crate::note(format_args!(
                "it leaves topic {output} and what is in it: rows that the job writes again stand there twice"
            ));
        }
    }
}

fn confirm(args: &Reset) -> Result<()> {
    if args.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Usage::error("nobody is here to be asked: say --yes to do it"));
    }
    let mut err = std::io::stderr().lock();
    let _ = write!(err, "reset it? [y/N] ");
    let _ = err.flush();
    drop(err);
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(anyhow!("not reset: nothing was changed")),
    }
}

async fn carry_out(access: &Access, found: &Found) -> Result<()> {
    let Found { identity, record, offsets, changelogs, states, .. } = found;
    let jobs = match access.describe(JOBS_TOPIC.to_owned()).await {
        Ok(described) => Some(described.topic),
        Err(tidemill_broker::BrokerError::UnknownTopic { .. }) => None,
        Err(error) => return Err(data::explain(error)),
    };
    let options = TransactionalOptions::default();
    let mut producer = TransactionalProducer::open(access.clone(), identity.as_str(), options)
        .await
        .map_err(data::explain)?;
    let key = Some(identity.as_str().as_bytes());
    if let Some((jobs, record)) = jobs.as_ref().zip(record.as_ref()) {
        let began = serde_json::to_vec(&JobRecord { resetting: true, ..record.clone() })?;
        let parts = RecordParts { key, value: Some(&began), ..RecordParts::default() };
        // The commit waits for it.
        let _ack = producer.send(jobs, Some(0), parts).await.map_err(data::explain)?;
        commit(&mut producer).await?;
    }
    for state in states {
        remove(state).with_context(|| format!("cannot remove {}", state.display()))?;
    }
    for topic in changelogs {
        let request = DeleteTopic { topic: topic.id, if_used: IfUsed::Delete };
        access.delete_topic(request).await.map_err(data::explain)?;
    }
    if !offsets.is_empty() {
        producer.add_offsets(identity.as_str(), offsets.clone()).await.map_err(data::explain)?;
    }
    if let Some((jobs, _)) = jobs.as_ref().zip(record.as_ref()) {
        let parts = RecordParts { key, value: None, ..RecordParts::default() };
        // The commit waits for it.
        let _ack = producer.send(jobs, Some(0), parts).await.map_err(data::explain)?;
    }
    commit(&mut producer).await
}

async fn commit(producer: &mut TransactionalProducer<Access>) -> Result<()> {
    match producer.commit().await.map_err(data::explain)? {
        Outcome::Committed => Ok(()),
        Outcome::Aborted => {
            Err(anyhow!("the log aborted the transaction, because its owner changed; run the command again"))
        }
    }
}

/// Removes a folder with everything in it; one that is gone is fine.
fn remove(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
