//! A job's plan as text, from its source to its sinks.

use std::time::Duration;

use anyhow::Result;
use tidemill::Guarantee;
use tidemill::adapters::JobPlan;
use tidemill::engine::Layout;
use tidemill::names::{Identity, JobRecord};
use tidemill::stream::{Plan, Role};

use crate::cli::Setting;
use crate::data::{self, Intent};
use crate::exit::{Stopped, Usage};
use crate::state::JobName;
use crate::target::Target;
use crate::{identity, jobs, stdout};

/// Runs the command.
pub async fn run(
    target: &Target,
    job: &JobName,
    set: &[Setting],
    guarantee: Option<Guarantee>,
) -> Result<()> {
    let spec = jobs::find(&job.job)?;
    let sets: Vec<String> = set.iter().map(|set| format!("{}={}", set.key, set.value)).collect();
    // Wrong arguments are told before anything is opened.
    let asked = spec.build(&sets).map_err(|error| Usage::error(error.to_string()))?;
    let identity = identity::identity(&job.job, job.name.as_deref())?;
    let committed = committed(target, &identity).await?.filter(|record| record.job == spec.name);
    let (mut built, mut fixed) = (asked.clone(), None);
    if let Some(record) = &committed {
        let said = |name: &str| set.iter().any(|set| set.key == name);
        let mut all: Vec<String> =
            identity::fixed(&spec, record).filter(|(name, _)| !said(name)).map(pair).collect();
        all.extend(sets);
        // Where the job's code changed its arguments since, the code counts.
        if let Ok(with) = spec.build(&all) {
            built = with;
        }
        fixed = Some(identity::guarantee(record));
    }
    let JobPlan { plan, .. } = built;
    let shown = guarantee.or(fixed).unwrap_or(plan.guarantee());
    let plan = plan.with_guarantee(shown);
    let record = plan.record(Layout::SHARDS);
    for (what, is) in lines(&plan, &identity, &record) {
        stdout::line(format_args!("{}", format!("{what:12}  {is}").trim_end()))?;
    }
    // What is shown has what was committed; a run has its own arguments and the code's defaults.
    let asked = asked.plan;
    let guarantee = guarantee.unwrap_or(asked.guarantee());
    let asked = asked.with_guarantee(guarantee).record(Layout::SHARDS);
    if let Some(Err(mismatch)) = committed.map(|committed| asked.check(&identity, &committed)) {
        crate::note(format_args!("a run with these arguments is refused: {mismatch}"));
    }
    Ok(())
}

fn pair((name, value): (&str, &str)) -> String {
    format!("{name}={value}")
}

/// What the identity committed to, where there is a log and it has.
async fn committed(target: &Target, identity: &Identity) -> Result<Option<JobRecord>> {
    if matches!(target, Target::Directory(dir) if !dir.exists()) {
        return Ok(None);
    }
    let looked = match data::open(target, Intent::Use).await {
        Ok(access) => {
            let all = identity::committed(&identity::log(&access)).await;
            data::close(access, all).await
        }
        Err(error) => Err(error),
    };
    match looked {
        Ok(mut all) => Ok(all.remove(identity.as_str())),
        Err(stopped) if stopped.is::<Stopped>() => Err(stopped),
        Err(error) => {
            crate::note(format_args!(
                "from the job's code alone; what {identity} committed is not known: {error:#}"
            ));
            Ok(None)
        }
    }
}

/// A duration as arguments have it.
pub fn duration(ms: i64) -> String {
    humantime::format_duration(Duration::from_millis(ms.max(0).unsigned_abs())).to_string()
}

fn lines(plan: &Plan, identity: &Identity, record: &JobRecord) -> Vec<(&'static str, String)> {
    let sink = |role: Role| {
        let topics: Vec<_> =
            plan.sinks().iter().filter(|sink| sink.role == role).map(|sink| sink.topic.as_str()).collect();
        topics.join(", ")
    };
    let malformed = match plan.malformed() {
        Ok(_) => format!("to topic {}, with the reason in a header", sink(Role::DeadLetter)),
        Err(what) => what.to_owned(),
    };
    let operators = plan.operators();
    // From the window on they run behind the exchange.
    let keyed_from = operators.iter().position(|name| name == "window").unwrap_or(operators.len());
    let (before, behind) = operators.split_at(keyed_from);
    let chain = |first: &str, rest: &[String], last: &str| {
        let mut all = vec![first.to_owned()];
        all.extend_from_slice(rest);
        all.push(last.to_owned());
        all.join(" -> ")
    };

    let mut lines = vec![
        ("job", plan.job().to_owned()),
        ("identity", format!("{identity}: consumer group, transactional id, prefix of its changelogs")),
        (
            "source",
            format!("topic {}; a partition belongs to task (partition mod tasks)", plan.source().topic),
        ),
    ];
    let time = match plan.source().event_time {
        None => "the timestamps of records".to_owned(),
        Some(time) => {
            let idle = match time.idle_after_ms() {
                Some(ms) => format!(
                    "a partition read to its end and without records for {} no longer holds it back",
                    duration(ms)
                ),
                None => "a quiet partition holds it back for ever".to_owned(),
            };
            format!("of each partition: newest time - {} - 1 ms; {idle}", duration(time.bound_ms()))
        }
    };
    lines.push(("event time", time));
    lines.push(("unreadable", malformed));
    let Some(step) = plan.step() else {
        lines.push(("chain", chain("source", operators, &format!("topic {}", sink(Role::Output)))));
        lines.push(("exchange", "none: every row stays in the task that read it".to_owned()));
        lines.push(("commit", commit(plan.guarantee(), "output, dead letters", None)));
        lines.push(("guarantee", promise(plan.guarantee())));
        return lines;
    };
    let combine = if step.aggregate == "count" { " -> combine by key and window" } else { "" };
    lines.push(("chain 1", chain("source", before, &format!("late?{combine} -> exchange"))));
    let late = match sink(Role::Late) {
        topic if topic.is_empty() => "dropped and counted".to_owned(),
        topic => format!("to topic {topic}, unchanged"),
    };
    lines.push((
        "late rows",
        format!("{late}: their window closed by the partition's own event time before them"),
    ));
    lines.push((
        "exchange",
        format!(
            "by key: shard = (murmur2(key) & 0x7fffffff) mod {0}; a shard belongs to task (shard mod tasks)",
            record.shards
        ),
    ));
    let offset = match step.windows.offset_ms() {
        0 => String::new(),
        ms => format!(" offset by {}", duration(ms)),
    };
    let window = format!("window {}{offset}", duration(step.windows.size_ms()));
    let rest = behind.get(1..).unwrap_or_default();
    let keyed =
        chain(&format!("{window} -> {}", step.aggregate), rest, &format!("topic {}", sink(Role::Output)));
    lines.push(("chain 2", keyed));
    lines.push((
        "fires",
        "once, when the smallest event-time watermark of the partitions that take part reaches window end - 1 ms".into(),
    ));
    for (name, store) in &record.stores {
        let layout =
            if store.layout == 'T' { "T (window end, key)".to_owned() } else { store.layout.to_string() };
        lines.push((
            "store",
            format!(
                "{name}: number {}, layout {layout}, codec version {}, keys {}, {} shards",
                store.id,
                store.codec,
                short(step.key_type),
                record.shards
            ),
        ));
        if let (Ok(keyed), Ok(windows)) = (identity.keyed_changelog(), identity.changelog(name)) {
            lines.push(("changelogs", format!("{windows} (cells), {keyed} (marks)")));
        }
    }
    lines
        .push(("commit", commit(plan.guarantee(), "output, late rows, dead letters", Some("changed state"))));
    lines.push(("guarantee", promise(plan.guarantee())));
    let guarded: Vec<_> = record.guarded.iter().map(|(name, value)| format!("{name}={value}")).collect();
    lines.push(("fixed", format!("{} (once it ran; `streamctl reset` frees them)", guarded.join(" "))));
    lines
}

fn commit(guarantee: Guarantee, output: &str, state: Option<&str>) -> String {
    let state = state.map(|state| format!("{state}, ")).unwrap_or_default();
    match guarantee {
        Guarantee::ExactlyOnce => format!("one transaction each: {output}, {state}offsets and event time"),
        Guarantee::AtLeastOnce => {
            format!(
                "one transaction each: {state}offsets and event time; beside it, acknowledged before it ends: {output}"
            )
        }
        Guarantee::AtMostOnce => format!(
            "one transaction each: {output}, {state}event time, and the offsets behind what is fetched and not processed yet"
        ),
    }
}

fn promise(guarantee: Guarantee) -> String {
    let crash = match guarantee {
        Guarantee::ExactlyOnce => "",
        Guarantee::AtLeastOnce => ": a crash repeats output that was not committed",
        Guarantee::AtMostOnce => ": a crash loses input that was fetched and not processed",
    };
    format!("{guarantee}{crash}")
}

/// A type's name without its path.
fn short(name: &str) -> &str {
    if name.contains('<') { name } else { name.rsplit("::").next().unwrap_or(name) }
}
