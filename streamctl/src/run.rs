//! `streamctl run`: runs a job until its end, or until Ctrl-C and one more commit.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::json;
use tidemill::JobSpec;
use tidemill::adapters::{self, JobRunError, RunOptions};
use tidemill::args::ByteSize;
use tidemill::engine::Mode;
use tidemill::io::LogError;
use tidemill::runtime::{Monitor, Progress, RunError, RunReport};
use tidemill_broker::BrokerError;

use crate::data::{self, Intent};
use crate::exit::Usage;
use crate::jobs;
use crate::live;
use crate::stop::Stop;
use crate::target::Target;
use crate::{chaos, cli};

/// How long the watcher waits for a change before it looks whether the run is over.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Runs the command.
pub async fn run(target: &Target, args: &cli::Run, stop: &Stop) -> Result<()> {
    let job = jobs::find(&args.job)?;
    let sets: Vec<String> = args.set.iter().map(|set| format!("{}={}", set.key, set.value)).collect();
    // Wrong arguments are told before anything is opened.
    let built = job.build(&sets).map_err(|error| Usage::error(error.to_string()))?;
    let input = built.plan.source().topic.clone();
    let options = RunOptions {
        name: args.name.clone(),
        mode: if args.until_end { Mode::UntilEnd } else { Mode::Unbounded },
        sets,
        tasks: args.tasks.map(|tasks| tasks as usize),
        commit_interval: args.commit_interval,
        state_memory: ByteSize(args.state_memory.0),
        state: args.state.clone(),
        guarantee: args.guarantee,
        poison_tries: args.poison_tries,
        ..RunOptions::default()
    };
    if args.status_lines {
        chaos::tell_phases();
    }
    let access = data::open(target, Intent::Use).await?;
    let result = process(&job, &access, options, args, &input, stop).await;
    data::close(access, result).await
}

async fn process(
    job: &JobSpec,
    access: &tidemill_broker::Access,
    options: RunOptions,
    args: &cli::Run,
    input: &str,
    stop: &Stop,
) -> Result<()> {
    let monitor = Monitor::with_probe(chaos::run_probe());
    let view = (live::is_wanted() && !args.status_lines).then(|| {
        let (ends, following) = live::follow(access.clone(), input.to_owned());
        let (monitor, name) = (monitor.clone(), args.name.clone().unwrap_or_else(|| job.name.to_owned()));
        (following, std::thread::spawn(move || live::show(&monitor, &name, &ends)))
    });
    let watcher = {
        let (monitor, lines, name) = (monitor.clone(), args.status_lines, args.name.clone());
        let name = name.unwrap_or_else(|| job.name.to_owned());
        std::thread::spawn(move || watch(&monitor, lines, &name))
    };
    let mut running = {
        let (job, access, monitor) = (*job, access.clone(), monitor.clone());
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || adapters::run(&job, &access, &options, &runtime, &monitor))
    };
    let ended = tokio::select! {
        biased;
        ended = &mut running => ended,
        () = stop.wait() => {
            crate::note(format_args!("stops after one more commit; Ctrl-C again stops at once"));
            monitor.stop();
            running.await
        }
    };
    monitor.stop_at_once();
    let watched = watcher.join().unwrap_or_else(|_| Err(anyhow!("the thread that watches the run panicked")));
    if let Some((following, showing)) = view {
        following.abort();
        showing.join().map_err(|_| anyhow!("the thread that shows the run panicked"))?;
    }
    let report = ended.context("the thread of the run panicked")?.map_err(explain)?;
    watched?;
    report_end(job, args, &report)
}

/// Says what the run came to.
fn report_end(job: &JobSpec, args: &cli::Run, report: &RunReport) -> Result<()> {
    let name = args.name.as_deref().unwrap_or(job.name);
    let (records, early) = (report.counters.rows_in, report.summary.closed_early.len());
    if args.status_lines {
        status_line(&json!({ "event": "done", "windows_closed_early": early, "records": records }))?;
    }
    let how = if report.stopped { "stopped" } else { "reached the end" };
    if report.found_nothing() && !report.stopped {
        crate::note(format_args!("{name} {how}: nothing new since its last commit"));
    } else {
        let took = report.took.as_secs_f64();
        let records = format!("{records} {}", if records == 1 { "record" } else { "records" });
        crate::note(format_args!("{name} {how}: {records} in {took:.1} s, all committed{}", asides(report)));
    }
    if args.until_end && !report.stopped {
        match early {
            0 if report.found_nothing() => {}
            0 => crate::note(format_args!("no window was closed before its time")),
            1 => crate::note(format_args!("1 window was closed before its time, because the input ended")),
            _ => crate::note(format_args!(
                "{early} windows were closed before their time, because the input ended"
            )),
        }
    }
    Ok(())
}

/// What became of the records that are in no result, and why a number may be too high.
fn asides(report: &RunReport) -> String {
    let mut text = String::new();
    for (count, one, many) in [
        (report.counters.late, "was late for its window", "were late for their window"),
        (report.counters.dead, "is a dead letter", "are dead letters"),
    ] {
        if count > 0 {
            text += &format!("; {count} {}", if count == 1 { one } else { many });
        }
    }
    match report.restarts {
        0 => {}
        1 => text += "; what was processed again after a return to the last commit counts again",
        n => text += &format!("; what was processed again after {n} returns to the last commit counts again"),
    }
    text
}

/// Follows a run until it is over or stopped at once; says on stderr that it runs, and where it returned to a commit.
fn watch(monitor: &Monitor, lines: bool, name: &str) -> Result<()> {
    let mut shown: Option<Progress> = None;
    let mut restarts = 0;
    while monitor.asked() != tidemill::runtime::Stop::AtOnce {
        let differs = |now: &Progress| match &shown {
            None => now.running,
            Some(shown) => {
                now.commits != shown.commits
                    || now.open_rows != shown.open_rows
                    || now.restarts != shown.restarts
            }
        };
        if !monitor.wait_until(LOOK_AGAIN, differs) {
            continue;
        }
        let now = monitor.progress();
        if now.restarts > restarts {
            restarts = now.restarts;
            let cause = now.returned_because.as_deref().unwrap_or("no reason given");
            crate::note(format_args!("{name} returned to its last commit and goes on: {cause}"));
        }
        if lines {
            let before = shown.as_ref();
            if before.is_none() {
                status_line(&json!({
                    "event": "started",
                    "recovery_ms": u64::try_from(now.recovery.as_millis()).unwrap_or(u64::MAX),
                    "replayed": now.replayed,
                    // Of the start itself: by now a first commit may have come.
                    "committed_records": sum(&now.began),
                }))?;
            }
            if before.is_none_or(|before| before.commits != now.commits) && now.commits > 0 {
                status_line(&json!({
                    "event": "committed", "commits": now.commits, "committed_records": sum(&now.committed),
                }))?;
            }
            if before.map_or(0, |before| before.open_rows) != now.open_rows {
                status_line(&json!({ "event": "open", "output_rows": now.open_rows }))?;
            }
        } else if shown.is_none() {
            let recovery = now.recovery.as_secs_f64();
            let replayed = match now.replayed {
                0 => String::new(),
                n => format!(", {n} changelog records replayed"),
            };
            crate::note(format_args!(
                "{name} runs (started in {recovery:.2} s{replayed}); Ctrl-C stops it after a commit"
            ));
        }
        shown = Some(now);
    }
    Ok(())
}

/// Offsets, over all partitions.
fn sum(offsets: &BTreeMap<u32, i64>) -> i64 {
    offsets.values().sum()
}

fn status_line(line: &serde_json::Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot write a status line")
}

/// What a user reads: the causes, and what to do about them.
fn explain(error: JobRunError) -> anyhow::Error {
    // A cause that its wrapper already quotes is not said twice.
    let mut said = String::new();
    for cause in error.chain() {
        match said.is_empty() {
            true => said = cause,
            false if said.contains(&cause) => {}
            false => said = format!("{said}: {cause}"),
        }
    }
    if error.is_usage() {
        return Usage::error(said);
    }
    if topic_was_deleted(&error) {
        return anyhow!(
            "{said}: a topic that the job reads or writes was deleted while it ran. A run makes those it writes anew; for another \
             input topic under the old name, `streamctl reset` comes first"
        );
    }
    if let Some(remedy) = of_broker(&error).and_then(data::remedy) {
        return anyhow!("{said}; {remedy}");
    }
    match missing_topic(&error) {
        Some(topic) => anyhow!(
            "{said}; `streamctl topic create {topic}` makes it, or name another one with --set input=TOPIC"
        ),
        None => anyhow!(said),
    }
}

/// The broker no longer knows a partition that it gave to this run.
fn topic_was_deleted(error: &JobRunError) -> bool {
    matches!(of_broker(error), Some(BrokerError::UnknownPartition { .. }))
}

/// What the broker said, where that is the cause.
fn of_broker(error: &JobRunError) -> Option<&BrokerError> {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.into_iter().find_map(|cause| cause.downcast_ref::<BrokerError>())
}

fn missing_topic(error: &JobRunError) -> Option<&str> {
    let JobRunError::Run(error) = error else { return None };
    match error {
        RunError::Log(LogError::NoSuchTopic { topic })
        | RunError::Start(tidemill::stream::StartError::Log(LogError::NoSuchTopic { topic })) => Some(topic),
        _ => None,
    }
}
