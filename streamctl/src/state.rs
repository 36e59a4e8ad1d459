//! `streamctl state list | get | scan`: a job's committed state, folded from its changelog through the broker.
//!
//! So it works beside a running job, and shows what is committed: neither what a task has in memory nor what the store
//! has not got yet. The price is reading a changelog: of one shard for `get`, of all of them for the others.

use std::collections::BTreeMap;
use std::io::{BufWriter, Stdout, Write};
use std::path::Path;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tidemill::adapters::broker::Access;
use tidemill::adapters::{BrokerLog, RocksState};
use tidemill::names::StoreRecord;
use tidemill::stream::inspect::{InspectError, StateText, StoreView};
use tidemill::stream::{Shard, Timestamp};

use crate::cli::ReportFormat;
use crate::data::{self, Intent};
use crate::exit::Usage;
use crate::identity::{self, Known, StateAt};
use crate::stdout::{self, OrClosed};
use crate::target::Target;
use crate::units::{Count, Size, plural};

/// `streamctl state ...`
#[derive(Debug, Clone, Subcommand)]
pub enum StateCommand {
    /// Show a job's stores: layout, open windows, keys, bytes, and where they stand.
    #[command(after_help = "\
Examples:
  streamctl state list ip-count
  streamctl state list ip-count --format json")]
    List(List),
    /// Show what a store has for a key, in each open window.
    #[command(after_help = "\
Examples:
  streamctl state get ip-count visits-per-ip 83.149.9.216
  streamctl state get ip-count visits-per-ip 83.149.9.216 --window 2015-05-17T10:05:00Z")]
    Get(Get),
    /// Show the cells of a store: window, key and value.
    #[command(after_help = "\
Examples:
  streamctl state scan ip-count visits-per-ip --max 10
  streamctl state scan ip-count visits-per-ip --prefix 83. --format json")]
    Scan(Scan),
}

impl StateCommand {
    /// The job it looks at.
    pub fn job_mut(&mut self) -> &mut JobName {
        match self {
            StateCommand::List(args) => &mut args.job,
            StateCommand::Get(args) => &mut args.job,
            StateCommand::Scan(args) => &mut args.job,
        }
    }
}

/// Which job.
#[derive(Debug, Clone, Args)]
pub struct JobName {
    /// The job.
    pub job: String,
    /// The name it was run under, where that is another one.
    #[arg(long)]
    pub name: Option<String>,
}

/// `streamctl state list ...`
#[derive(Debug, Clone, Args)]
pub struct List {
    #[command(flatten)]
    job: JobName,
    #[command(flatten)]
    at: StateAt,
    /// `text`: for people. `json`: one object a store.
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
}

/// `streamctl state get ...`
#[derive(Debug, Clone, Args)]
pub struct Get {
    #[command(flatten)]
    job: JobName,
    /// The store; `streamctl state list JOB` shows them.
    store: String,
    /// The key as text; bytes as 0x and hex digits.
    key: String,
    /// Only the window that starts then (RFC 3339).
    #[arg(long, value_name = "START")]
    window: Option<jiff::Timestamp>,
    /// `text`: window, key, value. `json`: one object a line.
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
}

/// `streamctl state scan ...`
#[derive(Debug, Clone, Args)]
pub struct Scan {
    #[command(flatten)]
    job: JobName,
    /// The store; `streamctl state list JOB` shows them.
    store: String,
    /// Only keys whose text begins like this.
    #[arg(long)]
    prefix: Option<String>,
    /// Only the window that starts then (RFC 3339).
    #[arg(long, value_name = "START")]
    window: Option<jiff::Timestamp>,
    /// Stop after this many cells.
    #[arg(long, value_name = "N")]
    max: Option<u64>,
    /// `text`: window, key, value. `json`: one object a line.
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
}

/// Runs the command.
pub async fn run(target: &Target, command: StateCommand) -> Result<()> {
    let access = data::open(target, Intent::Use).await?;
    let result = execute(&access, command).await;
    data::close(access, result).await
}

async fn execute(access: &Access, command: StateCommand) -> Result<()> {
    let log = identity::log(access);
    let job = match &command {
        StateCommand::List(args) => &args.job,
        StateCommand::Get(args) => &args.job,
        StateCommand::Scan(args) => &args.job,
    };
    let known = identity::find(access, &job.job, job.name.as_deref()).await?;
    let root = match &command {
        StateCommand::List(args) => Some(args.at.root(access, &known.identity)?),
        StateCommand::Get(_) | StateCommand::Scan(_) => None,
    };
    identity::blocking(&log, move |log| match command {
        StateCommand::List(args) => {
            let state = root.unwrap_or_default().join(known.identity.as_str());
            list(log, &known, &state, args.format)
        }
        StateCommand::Get(args) => get(log, &known, &args),
        StateCommand::Scan(args) => scan(log, &known, &args),
    })
    .await
}

/// The store of this name, or those there are.
fn store<'a>(known: &'a Known, name: &str) -> Result<&'a StoreRecord> {
    known.record.stores.get(name).ok_or_else(|| {
        let names: Vec<_> = known.record.stores.keys().map(String::as_str).collect();
        let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Usage::error(format!("{} has no store {name:?}; its stores: {names}", known.identity))
    })
}

fn view<'a>(log: &'a BrokerLog<Access>, known: &Known, name: &str) -> Result<StoreView<'a>> {
    let record = store(known, name)?;
    let view = StoreView::open(log, &known.identity, name, record).map_err(identity::explain)?;
    view.ok_or_else(|| {
        anyhow!("the changelogs of store {name} are gone: the job makes them when it runs again")
    })
}

/// Where what is shown stands, for stderr.
fn stands(known: &Known, view: &StoreView<'_>) {
    let steady = match view.steady {
        true => "",
        false => "; the job commits faster than this reads, so it mixes neighbouring commits",
    };
    crate::note(format_args!(
        "{} {} as committed: {} at offset {} (sum of {} shards), closed through {}{steady}",
        known.identity,
        view.name,
        view.changelog.name,
        Count(at(view)),
        view.shards(),
        through(view.marks.closed),
    ));
}

fn at(view: &StoreView<'_>) -> u64 {
    view.ends.iter().map(|end| end.last_stable.max(0).unsigned_abs()).sum()
}

fn through(window_end: i64) -> String {
    if window_end == i64::MIN { "nothing yet".to_owned() } else { Timestamp(window_end).to_string() }
}

/// What a store has, summed up.
#[derive(Debug, Default)]
struct Sums {
    keys: u64,
    bytes: u64,
    /// Cells by window end.
    windows: BTreeMap<i64, u64>,
}

fn sums(view: &StoreView<'_>) -> Result<Sums> {
    let mut sums = Sums::default();
    for shard in (0..view.shards()).map(Shard) {
        view.each_cell::<InspectError>(shard, &mut |end, key, value| {
            sums.keys += 1;
            sums.bytes += (key.len() + value.len()) as u64;
            *sums.windows.entry(end).or_default() += 1;
            Ok(())
        })?;
    }
    Ok(sums)
}

fn list(log: &BrokerLog<Access>, known: &Known, state: &Path, format: ReportFormat) -> Result<()> {
    if known.record.stores.is_empty() {
        crate::note(format_args!("{} keeps no state", known.identity));
    }
    for name in known.record.stores.keys() {
        let view = view(log, known, name)?;
        let sums = sums(&view)?;
        let stored = match RocksState::read_only(state) {
            Ok(None) => None,
            Ok(Some(store)) => Some(view.behind(&store).map_err(identity::explain)),
            Err(error) => Some(Err(error.into())),
        };
        match format {
            ReportFormat::Json => stdout::line(format_args!("{}", list_json(known, &view, &sums, &stored)))?,
            ReportFormat::Text => list_text(known, &view, &sums, &stored)?,
        }
        if !view.steady {
            stands(known, &view);
        }
    }
    Ok(())
}

fn list_json(known: &Known, view: &StoreView<'_>, sums: &Sums, stored: &Option<Result<u64>>) -> Value {
    let time = |at: i64| if at == i64::MIN { Value::Null } else { json!(Timestamp(at).to_string()) };
    json!({
        "name": known.identity.as_str(),
        "store": view.name,
        "id": view.record.id,
        "layout": view.record.layout,
        "codec": view.record.codec,
        "windows": sums.windows.len(),
        "keys": sums.keys,
        "bytes": sums.bytes,
        "fired_through": time(view.marks.fired),
        "closed_through": time(view.marks.closed),
        "changelog": view.changelog.name.as_ref(),
        "changelog_offset": at(view),
        "shards": view.shards(),
        "on_disk_behind": stored.as_ref().and_then(|stored| stored.as_ref().ok()),
    })
}

fn list_text(known: &Known, view: &StoreView<'_>, sums: &Sums, stored: &Option<Result<u64>>) -> Result<()> {
    let layout = match view.record.layout {
        'T' => "T (window end, key)".to_owned(),
        other => other.to_string(),
    };
    let windows = match (sums.windows.first_key_value(), sums.windows.last_key_value()) {
        (Some((first, _)), Some((last, _))) => {
            format!("{}, ending {} to {}", sums.windows.len(), Timestamp(*first), Timestamp(*last))
        }
        _ => "none".to_owned(),
    };
    let on_disk = match stored {
        None => "none: a start rebuilds it from the changelog".to_owned(),
        Some(Ok(0)) => "at the end of the changelog".to_owned(),
        Some(Ok(behind)) => {
            format!("{} behind what is committed: a start replays them", plural(*behind, "offset", "offsets"))
        }
        Some(Err(error)) => format!("cannot be looked at just now ({error:#})"),
    };
    for (what, is) in [
        ("store", format!("{} of {}, number {}", view.name, known.identity, view.record.id)),
        ("layout", format!("{layout}, codec version {}", view.record.codec)),
        ("open windows", windows),
        ("cells", Count(sums.keys).to_string()),
        ("bytes", format!("{} of keys and values", Size(sums.bytes))),
        ("fired through", through(view.marks.fired)),
        ("closed through", through(view.marks.closed)),
        (
            "changelog",
            format!("{}, {} shards, at offset {}", view.changelog.name, view.shards(), Count(at(view))),
        ),
        ("on disk", on_disk),
    ] {
        stdout::line(format_args!("{what:14}  {is}"))?;
    }
    Ok(())
}

/// Prints cells.
struct Printer<'a> {
    known: &'a Known,
    store: &'a str,
    text: StateText,
    format: ReportFormat,
    out: BufWriter<Stdout>,
}

impl Printer<'_> {
    fn cell(&mut self, end: i64, key: &[u8], value: &[u8]) -> Result<()> {
        let start = Timestamp(end.saturating_sub(self.known.window_ms().unwrap_or(0))).to_string();
        let (key, value) = (self.text.key(key), self.text.value(value));
        match self.format {
            ReportFormat::Text => writeln!(self.out, "{start}  {key}  {}", plain(&value)),
            ReportFormat::Json => {
                let end = Timestamp(end).to_string();
                let cell = json!({
                    "store": self.store, "window_start": start, "window_end": end, "key": key, "value": value,
                });
                writeln!(self.out, "{cell}")
            }
        }
        .or_closed()
    }
}

/// A JSON value as text: a string without its quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The end of the window that starts then.
fn window_end(known: &Known, start: Option<jiff::Timestamp>) -> Result<Option<i64>> {
    let Some(start) = start else { return Ok(None) };
    let size = known
        .window_ms()
        .ok_or_else(|| anyhow!("{} did not say how long its windows are", known.identity))?;
    Ok(Some(start.as_millisecond().saturating_add(size)))
}

fn get(log: &BrokerLog<Access>, known: &Known, args: &Get) -> Result<()> {
    let view = view(log, known, &args.store)?;
    let text = known.text(&args.store);
    let key = text.parse_key(&args.key).ok_or_else(|| {
        Usage::error(format!(
            "{:?} is no key of store {}: a key reads like {}",
            args.key,
            args.store,
            example(text)
        ))
    })?;
    let wanted = window_end(known, args.window)?;
    stands(known, &view);
    let mut printer =
        Printer { known, store: &args.store, text, format: args.format, out: stdout::buffered() };
    let mut found = 0;
    view.each_cell::<Failed>(view.shard_of(&key), &mut |end, of, value| {
        if of == key && wanted.is_none_or(|wanted| wanted == end) {
            found += 1;
            printer.cell(end, of, value)?;
        }
        Ok(())
    })
    .map_err(|failed| failed.0)?;
    printer.out.flush().or_closed()?;
    if found == 0 {
        let window = if wanted.is_some() { "that window" } else { "any open window" };
        return Err(anyhow!("store {} has nothing for key {} in {window}", args.store, args.key));
    }
    Ok(())
}

fn example(text: StateText) -> &'static str {
    match text.parse_key("1.2.3.4") {
        Some(_) => "1.2.3.4",
        None => "42",
    }
}

fn scan(log: &BrokerLog<Access>, known: &Known, args: &Scan) -> Result<()> {
    let view = view(log, known, &args.store)?;
    let text = known.text(&args.store);
    let wanted = window_end(known, args.window)?;
    stands(known, &view);
    let mut printer =
        Printer { known, store: &args.store, text, format: args.format, out: stdout::buffered() };
    let mut left = args.max.unwrap_or(u64::MAX);
    for shard in (0..view.shards()).map(Shard) {
        if left == 0 {
            break;
        }
        view.each_cell::<Failed>(shard, &mut |end, key, value| {
            let begins = args.prefix.as_ref().is_none_or(|prefix| text.key(key).starts_with(prefix.as_str()));
            if left > 0 && begins && wanted.is_none_or(|wanted| wanted == end) {
                left -= 1;
                printer.cell(end, key, value)?;
            }
            Ok(())
        })
        .map_err(|failed| failed.0)?;
        printer.out.flush().or_closed()?;
    }
    Ok(())
}

/// An error on either side of a cell.
struct Failed(anyhow::Error);

impl From<InspectError> for Failed {
    fn from(error: InspectError) -> Self {
        Self(identity::explain(error))
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self(error)
    }
}
