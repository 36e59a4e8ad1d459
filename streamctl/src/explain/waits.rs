//! What a job's open windows wait for.
//!
//! ```text
//!   committed: per partition next offset, event-time watermark ─┐
//!              open windows with their cells (changelog)        ├─▶ who holds event time back, and why
//!   now:       ends of the input; whether the job runs,         │
//!              and which partitions it calls idle              ─┘
//! ```
//!
//! The decision is a plain function over those facts ([`Facts::explain`]), tested without a log.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use tidemill::adapters::Running;
use tidemill::adapters::broker::{Access, Broker};
use tidemill::names::PartitionMark;
use tidemill::stream::inspect::{InspectError, StoreView};
use tidemill::stream::{MIN, Shard, Timestamp};

use super::plan::duration;
use crate::data::{self, Intent};
use crate::identity::{self, Known, StateAt};
use crate::state::JobName;
use crate::stdout;
use crate::target::Target;
use crate::units::{Count, plural};

/// Windows that are listed one by one.
const WINDOWS_LISTED: usize = 10;

/// Runs the command.
pub async fn run(target: &Target, job: &JobName, at: &StateAt) -> Result<()> {
    let access = data::open(target, Intent::Use).await?;
    let result = gather(target, &access, job, at).await;
    let facts = data::close(access, result).await?;
    for line in facts.explain() {
        stdout::line(format_args!("{line}"))?;
    }
    Ok(())
}

/// An input partition.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Partition {
    number: u32,
    /// The committed next offset; `None` where nothing was committed for it.
    at: Option<i64>,
    /// The committed event-time watermark.
    watermark: i64,
    stable: i64,
    high_watermark: i64,
    /// What the running job says: it does not take part.
    idle: bool,
}

impl Partition {
    fn unread(&self) -> i64 {
        self.stable.saturating_sub(self.at.unwrap_or(0)).max(0)
    }
}

/// An open window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Window {
    cells: u64,
    /// Rows, where the cells are counts.
    rows: Option<u64>,
}

/// All that is known.
#[derive(Debug)]
struct Facts {
    identity: String,
    input: String,
    partitions: Vec<Partition>,
    /// Open windows by end.
    windows: BTreeMap<i64, Window>,
    window_ms: i64,
    bound_ms: Option<i64>,
    /// When a quiet partition is called idle: never, or after this long; none where neither is known.
    idle_after_ms: Option<Option<i64>>,
    run: Run,
    /// The command that runs the job on; none where this program does not have the job.
    command: Option<String>,
}

/// Whether the job runs.
#[derive(Debug)]
enum Run {
    /// It does, and says this.
    Seen(Option<Running>),
    /// It does not.
    Not,
    /// That cannot be seen from here.
    Unknown,
}

async fn gather(target: &Target, access: &Access, job: &JobName, at: &StateAt) -> Result<Facts> {
    let log = identity::log(access);
    let known = identity::find(access, &job.job, job.name.as_deref()).await?;
    let name = known.identity.clone();
    let Some((store, record)) = known.record.stores.iter().next().map(|(n, r)| (n.clone(), r.clone())) else {
        return Err(anyhow!("{name} has no windows: its rows leave as they come"));
    };
    let input = known.record.guarded.get("input").cloned().unwrap_or_default();
    let running = at.running(access, &name)?;
    let event_time = known.plan.as_ref().and_then(|plan| plan.source().event_time);
    // A broker does not say who runs a job; the folder of the run's state does, if it was named.
    let run = match &running {
        Some(running) => Run::Seen(running.clone()),
        None if access.path().is_none() && at.state.is_none() => Run::Unknown,
        None => Run::Not,
    };
    let bound_ms = event_time.map(|time| time.bound_ms()).or_else(|| known.duration_ms("out_of_order"));
    // What a run was told counts before the job's default.
    let idle_after_ms = match &running {
        Some(Some(running)) => Some(running.idle_after_ms),
        _ => event_time.map(|time| time.idle_after_ms()),
    };
    let window_ms = known.window_ms().unwrap_or(0);
    let text = known.text(&store);
    let counts =
        known.plan.as_ref().and_then(|plan| plan.step()).is_some_and(|step| step.aggregate == "count");
    let windows = {
        let name = name.clone();
        identity::blocking(&log, move |log| -> Result<BTreeMap<i64, Window>> {
            let mut windows: BTreeMap<i64, Window> = BTreeMap::new();
            let Some(view) = StoreView::open(log, &name, &store, &record)? else { return Ok(windows) };
            for shard in (0..view.shards()).map(Shard) {
                view.each_cell::<InspectError>(shard, &mut |end, _, value| {
                    let window = windows.entry(end).or_insert(Window { cells: 0, rows: counts.then_some(0) });
                    window.cells += 1;
                    let rows = text.value(value).as_u64();
                    window.rows = window.rows.zip(rows).map(|(sum, rows)| sum + rows);
                    Ok(())
                })?;
            }
            Ok(windows)
        })
        .await?
    };
    let partitions = partitions(access, &known, &input, running.as_ref().and_then(Option::as_ref)).await?;
    Ok(Facts {
        identity: name.to_string(),
        input,
        partitions,
        windows,
        window_ms,
        bound_ms,
        idle_after_ms,
        run,
        command: known.run_command(target, at.told(access, &name)?.as_deref()),
    })
}

async fn partitions(
    access: &Access,
    known: &Known,
    input: &str,
    running: Option<&Running>,
) -> Result<Vec<Partition>> {
    let committed = identity::offsets(access, &known.identity).await?;
    let described = access.describe(input.to_owned()).await.map_err(data::explain)?;
    let mut partitions = Vec::new();
    for (number, ends) in (0..).zip(&described.offsets) {
        let at = committed.iter().find(|offset| offset.partition == described.topic.partition(number));
        let mark = at.and_then(|offset| PartitionMark::decode(&offset.metadata));
        let live = running.and_then(|running| running.partitions.get(number as usize));
        partitions.push(Partition {
            number,
            at: at.map(|offset| offset.position.offset),
            watermark: mark.map_or(MIN, |mark| mark.watermark),
            stable: ends.last_stable,
            high_watermark: ends.high_watermark,
            idle: matches!(live, Some(None)),
        });
    }
    Ok(partitions)
}

fn moment(at: i64) -> String {
    if at == MIN { "nothing yet".to_owned() } else { Timestamp(at).to_string() }
}

impl Facts {
    /// The whole answer, a line each.
    fn explain(&self) -> Vec<String> {
        let mut lines = vec![self.first_line()];
        if !self.windows.is_empty() {
            lines.extend(self.held_back());
        }
        lines.push(String::new());
        lines.extend(self.table());
        if !self.windows.is_empty() {
            lines.push(String::new());
            lines.extend(self.window_lines());
        }
        lines
    }

    fn first_line(&self) -> String {
        let name = &self.identity;
        let Some((end, _)) = self.windows.first_key_value() else {
            return match self.partitions.iter().map(Partition::unread).sum::<i64>() {
                0 => format!("{name}: no window is open: every row that was read has fired or was late"),
                unread => format!(
                    "{name}: no window is open; {} of {} not read yet",
                    plural(unread.unsigned_abs(), "record", "records"),
                    self.input
                ),
            };
        };
        let open = plural(self.windows.len() as u64, "window is", "windows are");
        format!(
            "{name}: {open} open; the oldest, {} to {}, fires when event time reaches {}",
            moment(end.saturating_sub(self.window_ms)),
            moment(*end),
            moment(end.saturating_sub(1))
        )
    }

    /// The smallest event-time watermark of those that take part.
    fn slowest(&self) -> Option<&Partition> {
        let taking = self.partitions.iter().filter(|p| !p.idle);
        taking.min_by_key(|p| (p.watermark, p.number))
    }

    fn held_back(&self) -> Vec<String> {
        let Some(slowest) = self.slowest() else {
            return vec![
                "every partition is idle: event time stands still until a record comes to one of them"
                    .to_owned(),
                self.remedy(),
            ];
        };
        let n = slowest.number;
        let mut lines = vec![match slowest.watermark {
            MIN => format!(
                "held back by partition {n}: no record of it has been committed, so nothing is known of its time"
            ),
            at => {
                let bound = match self.bound_ms {
                    Some(bound) => format!(
                        " (its newest record, {}, minus {} and 1 ms)",
                        moment(at.saturating_add(bound).saturating_add(1)),
                        duration(bound)
                    ),
                    None => String::new(),
                };
                format!("held back by partition {n}: its event-time watermark is {}{bound}", moment(at))
            }
        }];
        let (unread, kept) = (slowest.unread(), slowest.high_watermark.saturating_sub(slowest.stable));
        if unread > 0 {
            let unread = plural(unread.unsigned_abs(), "record", "records");
            lines.push(match &self.run {
                Run::Seen(_) => {
                    format!("{unread} of it are not committed yet: the job is on its way through them")
                }
                Run::Not => {
                    format!("{unread} of it are not read, and the job does not run: {} goes on", self.again(""))
                }
                Run::Unknown => format!(
                    "{unread} of it are not committed: the job is on its way through them, or does not run, and then {} goes on",
                    self.again("")
                ),
            });
        } else if kept > 0 {
            lines.push(format!(
                "it is read up to an open transaction, which holds {} of it back until it ends",
                plural(kept.unsigned_abs(), "record", "records")
            ));
        } else {
            let oldest = self.windows.keys().next().copied().unwrap_or(MIN);
            let needed =
                oldest.saturating_sub(1).saturating_add(self.bound_ms.unwrap_or(0)).saturating_add(1);
            lines.push(format!(
                "it is read to its end and not idle: it needs a record of {} or later{}",
                moment(needed),
                match (self.idle_after_ms, &self.run) {
                    (Some(Some(idle)), Run::Seen(_)) => format!(", or {} without one", duration(idle)),
                    (Some(Some(idle)), Run::Not) => format!(
                        ", or, once the job runs again (it does not), {} without one",
                        duration(idle)
                    ),
                    (Some(Some(idle)), Run::Unknown) => {
                        format!(", or, while the job runs, {} without one", duration(idle))
                    }
                    (Some(None), _) =>
                        "; without idle_after a quiet partition holds event time back for ever".to_owned(),
                    (None, _) => ", or to be idle, if the job has idle_after (ask its own program, \
                                  `streamctl explain why-not-fired ./CRATE`)"
                        .to_owned(),
                }
            ));
        }
        lines.push(self.remedy());
        lines
    }

    fn remedy(&self) -> String {
        let more = match self.run {
            Run::Seen(_) => " (after this run was stopped)",
            Run::Unknown => " (after a run of it was stopped)",
            Run::Not => "",
        };
        format!("{} closes every window now{more}", self.again(" --until-end"))
    }

    /// The command that runs the job again, or words for it.
    fn again(&self, more: &str) -> String {
        match &self.command {
            Some(command) => format!("`{command}{more}`"),
            None => format!("a run of its crate (`streamctl run ./CRATE{more}`)"),
        }
    }

    fn table(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "{:width$}  partition   committed      unread  event-time watermark      state",
            "input",
            width = self.input.len().max(5)
        )];
        let slowest = self.slowest().map(|p| p.number);
        for p in &self.partitions {
            let state = match p {
                p if p.idle => "idle: holds nothing back",
                p if Some(p.number) == slowest && !self.windows.is_empty() => "holds event time back",
                _ => "",
            };
            let at = p.at.map_or_else(|| "-".to_owned(), |at| at.to_string());
            lines.push(
                format!(
                    "{:width$}  {:>9}  {at:>10}  {:>10}  {:24}  {state}",
                    self.input,
                    p.number,
                    p.unread(),
                    moment(p.watermark),
                    width = self.input.len().max(5)
                )
                .trim_end()
                .to_owned(),
            );
        }
        lines.push(match &self.run {
            Run::Seen(Some(running)) => {
                format!(
                    "the job runs in process {}: {}, phase {}",
                    running.pid,
                    plural(running.commits, "commit", "commits"),
                    running.phase
                )
            }
            Run::Seen(None) => "the job runs".to_owned(),
            Run::Not => "the job does not run here".to_owned(),
            Run::Unknown => {
                "whether the job runs is not known to the broker; the --state DIR of its run tells".to_owned()
            }
        });
        lines
    }

    fn window_lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{:24}  {:>10}  {:>10}", "open window from", "keys", "rows")];
        for (end, window) in self.windows.iter().take(WINDOWS_LISTED) {
            let rows = window.rows.map_or_else(|| "-".to_owned(), |rows| Count(rows).to_string());
            let start = moment(end.saturating_sub(self.window_ms));
            lines.push(format!("{start:24}  {:>10}  {rows:>10}", Count(window.cells)));
        }
        let more = self.windows.len().saturating_sub(WINDOWS_LISTED);
        if more > 0 {
            lines.push(format!("and {more} more"));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(number: u32, at: i64, watermark: i64, stable: i64) -> Partition {
        Partition { number, at: Some(at), watermark, stable, high_watermark: stable, idle: false }
    }

    fn facts(partitions: Vec<Partition>, running: bool) -> Facts {
        Facts {
            identity: "job".into(),
            input: "lines".into(),
            partitions,
            windows: [
                (10_000, Window { cells: 2, rows: Some(5) }),
                (15_000, Window { cells: 1, rows: Some(1) }),
            ]
            .into(),
            window_ms: 5_000,
            bound_ms: Some(2_000),
            idle_after_ms: Some(Some(30_000)),
            run: if running { Run::Seen(None) } else { Run::Not },
            command: Some("streamctl run job --name a".into()),
        }
    }

    fn text(facts: &Facts) -> String {
        facts.explain().join("\n")
    }

    #[test]
    fn the_partition_with_the_smallest_event_time_is_named_with_what_it_needs() {
        let told = text(&facts(vec![partition(0, 9, 12_000, 9), partition(1, 4, 7_999, 4)], true));
        for part in [
            "2 windows are open; the oldest, 1970-01-01T00:00:05.000Z to 1970-01-01T00:00:10.000Z, fires when event time reaches 1970-01-01T00:00:09.999Z",
            "held back by partition 1: its event-time watermark is 1970-01-01T00:00:07.999Z (its newest record, 1970-01-01T00:00:10.000Z, minus 2s and 1 ms)",
            "needs a record of 1970-01-01T00:00:12.000Z or later, or 30s without one",
            "1970-01-01T00:00:05.000Z           2           5",
        ] {
            assert!(told.contains(part), "{part}\n{told}");
        }
        assert!(!told.contains("held back by partition 0"), "{told}");
    }

    #[test]
    fn each_cause_has_its_own_words() {
        let idle = |p: Partition| Partition { idle: true, ..p };
        let stuck = || partition(0, 4, 7_000, 4);
        let cases = [
            (
                facts(vec![Partition { stable: 6, high_watermark: 6, ..stuck() }], false),
                "2 records of it are not read, and the job does not run: `streamctl run job --name a` goes on",
            ),
            (
                facts(vec![Partition { stable: 6, high_watermark: 6, ..stuck() }], true),
                "on its way through them",
            ),
            (
                facts(vec![Partition { high_watermark: 7, ..stuck() }], true),
                "an open transaction, which holds 3 records of it back",
            ),
            (
                facts(
                    vec![Partition { at: None, watermark: MIN, stable: 0, high_watermark: 0, ..stuck() }],
                    true,
                ),
                "no record of it has been committed",
            ),
            (facts(vec![idle(stuck())], true), "every partition is idle"),
            (facts(vec![idle(stuck()), partition(1, 1, 8_000, 1)], true), "held back by partition 1"),
            (facts(vec![stuck()], false), "once the job runs again (it does not), 30s without one"),
            (Facts { idle_after_ms: Some(None), ..facts(vec![stuck()], true) }, "for ever"),
            (Facts { idle_after_ms: None, ..facts(vec![stuck()], true) }, "if the job has idle_after"),
            (Facts { run: Run::Unknown, ..facts(vec![stuck()], true) }, "is not known to the broker"),
            (Facts { command: None, ..facts(vec![stuck()], false) }, "`streamctl run ./CRATE --until-end`"),
            (facts(vec![stuck()], false), "`streamctl run job --name a --until-end` closes every window now"),
            (
                Facts { windows: BTreeMap::new(), ..facts(vec![stuck()], true) },
                "no window is open: every row",
            ),
        ];
        for (facts, part) in cases {
            assert!(text(&facts).contains(part), "{part}\n{}", text(&facts));
        }
    }
}
