//! The job a command looks at from outside: its identity, what it committed to, and how its state reads.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use tidemill::Guarantee;
use tidemill::adapters::broker::{Access, Broker, FetchOffsets, GroupOffset, Stable};
use tidemill::adapters::{BrokerLog, Running, run_home, running, state_of};
use tidemill::names::{Identity, JobRecord};
use tidemill::stream::Plan;
use tidemill::stream::inspect::{self, InspectError, StateText};

use crate::data;
use crate::exit::Usage;
use crate::jobs;
use crate::target::{Target, quoted};

/// A job that has committed.
pub struct Known {
    /// Consumer group, transactional id and prefix of its changelogs.
    pub identity: Identity,
    /// What it committed to.
    pub record: JobRecord,
    /// Its plan, where this program has the job's code.
    pub plan: Option<Plan>,
}

/// The identity that a job name and `--name` come to.
pub fn identity(job: &str, name: Option<&str>) -> Result<Identity> {
    Identity::new(name.unwrap_or(job)).map_err(|error| Usage::error(error.to_string()))
}

/// Where the state of a job is, for commands that look at it from outside.
#[derive(Debug, Clone, Default, Args)]
pub struct StateAt {
    /// Where the job keeps its state, if it was run with `--broker` and `--state`; a data directory knows it.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
}

impl StateAt {
    /// The folder that says which jobs run.
    pub fn home(&self, access: &Access) -> PathBuf {
        run_home(access.path(), self.state.as_deref())
    }

    /// Whether the job runs here, and what it says; see [`running`].
    pub fn running(&self, access: &Access, identity: &Identity) -> Result<Option<Option<Running>>> {
        let home = self.home(access);
        running(&home, identity).with_context(|| unseen(&home, identity))
    }

    /// What a run says with `--state` to keep its state where it is; none where it need not.
    pub fn told(&self, access: &Access, identity: &Identity) -> Result<Option<PathBuf>> {
        let root = self.root(access, identity)?;
        Ok((root != run_home(access.path(), None)).then_some(root))
    }

    /// The folder with the job's own: what was said, else what its last run told, else the default.
    pub fn root(&self, access: &Access, identity: &Identity) -> Result<PathBuf> {
        let home = self.home(access);
        match &self.state {
            Some(given) => Ok(given.clone()),
            None => state_of(&home, identity).with_context(|| unseen(&home, identity)),
        }
    }
}

/// The file in `home` cannot be looked at.
pub fn unseen(home: &Path, identity: &Identity) -> String {
    format!("cannot look whether {identity} runs in {}", home.display())
}

/// What the identity committed to; an error that names those there are.
pub async fn find(access: &Access, job: &str, name: Option<&str>) -> Result<Known> {
    let identity = identity(job, name)?;
    let mut jobs = committed(&log(access)).await?;
    let Some(record) = jobs.remove(identity.as_str()) else {
        let known: Vec<_> = jobs.into_keys().collect();
        let known = match known.as_slice() {
            [] => "; no job has".to_owned(),
            known => format!("; these have: {}", known.join(", ")),
        };
        let said = format!("{identity} has committed nothing in {}{known}", access.target());
        return Err(unknown_or_new(job, said));
    };
    Ok(Known { plan: plan(&record), identity, record })
}

/// Nothing is known of an identity: wrong usage where its job is unknown too, else it only has not begun.
pub fn unknown_or_new(job: &str, said: String) -> anyhow::Error {
    if jobs::find(job).is_ok() { anyhow!(said) } else { Usage::error(said) }
}

/// What every identity committed to.
pub async fn committed(log: &BrokerLog<Access>) -> Result<std::collections::BTreeMap<String, JobRecord>> {
    blocking(log, |log| inspect::jobs(log)).await.map_err(explain)
}

/// The plan of a job with the arguments it committed to, where this program has it.
fn plan(record: &JobRecord) -> Option<Plan> {
    let job = jobs::find(&record.job).ok()?;
    let sets: Vec<String> = fixed(&job, record).map(|(name, value)| format!("{name}={value}")).collect();
    job.build(&sets).ok().map(|built| built.plan)
}

/// The job's arguments that it is fixed to, with their values.
pub fn fixed<'a>(
    job: &'a tidemill::JobSpec,
    record: &'a JobRecord,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let guarded = job.args.iter().filter(|arg| arg.guarded);
    guarded.filter_map(|arg| Some((arg.name, record.guarded.get(arg.name)?.as_str())))
}

/// What a crash may do to its output. An identity that says nothing is older than the choice.
pub fn guarantee(record: &JobRecord) -> Guarantee {
    record.guarded.get("guarantee").and_then(|name| name.parse().ok()).unwrap_or_default()
}

impl Known {
    /// The command that runs this job on, with what it is fixed to; none where this program does not have the job.
    pub fn run_command(&self, target: &Target, state: Option<&Path>) -> Option<String> {
        let job = jobs::find(&self.record.job).ok()?;
        let mut command = format!("streamctl{} run {}", target.option(), quoted(&jobs::word(job.name)?));
        if self.identity.as_str() != job.name {
            command += &format!(" --name {}", self.identity);
        }
        for (name, value) in fixed(&job, &self.record) {
            let usual = job.args.iter().any(|arg| arg.name == name && arg.default == Some(value));
            if !usual {
                command += &format!(" --set {}", quoted(&format!("{name}={value}")));
            }
        }
        let committed = guarantee(&self.record);
        if self.plan.as_ref().is_some_and(|plan| plan.guarantee() != committed) {
            command += &format!(" --guarantee {committed}");
        }
        if let Some(state) = state {
            command += &format!(" --state {}", quoted(&state.to_string_lossy()));
        }
        Some(command)
    }

    /// How long its windows are, in milliseconds.
    pub fn window_ms(&self) -> Option<i64> {
        match self.plan.as_ref().and_then(Plan::step) {
            Some(step) => Some(step.windows.size_ms()),
            None => self.duration_ms("window"),
        }
    }

    /// A guarded argument that is a duration, in milliseconds.
    pub fn duration_ms(&self, argument: &str) -> Option<i64> {
        let duration = humantime::parse_duration(self.record.guarded.get(argument)?).ok()?;
        i64::try_from(duration.as_millis()).ok()
    }

    /// How keys and values of a store read.
    pub fn text(&self, store: &str) -> StateText {
        let step = self.plan.as_ref().and_then(Plan::step).filter(|step| step.name == store);
        step.map_or_else(StateText::default, StateText::of)
    }
}

/// The offsets an identity committed, as they are now.
pub async fn offsets(access: &Access, identity: &Identity) -> Result<Vec<GroupOffset>> {
    let request = FetchOffsets { group: identity.to_string(), stable: Stable::Released };
    Ok(access.fetch_offsets(request).await.map_err(data::explain)?.offsets)
}

/// The log as the engine sees it.
pub fn log(access: &Access) -> BrokerLog<Access> {
    BrokerLog::new(access.clone(), tokio::runtime::Handle::current())
}

/// Calls the log from a thread that may block.
pub async fn blocking<T: Send + 'static, E: Send + 'static>(
    log: &BrokerLog<Access>,
    call: impl FnOnce(&BrokerLog<Access>) -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    let log = log.clone();
    match tokio::task::spawn_blocking(move || call(&log)).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// What a user reads.
pub fn explain(error: InspectError) -> anyhow::Error {
    anyhow::Error::new(error)
}
