//! Case study: how often does each address come, per five seconds? From a TCP source, or from an access log.
//!
//! README.md beside this file says what to predict, to watch and to break. The parts, in the order of a line's way:
//! `source.rs` pushes it, `ingest.rs` appends and dates it, `job.rs` counts it, `count.rs` prints what was committed,
//! `check.rs` counts again without any of that.

mod check;
mod count;
mod ingest;
mod job;
mod line;
mod source;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, Parser, Subcommand};
use tidemill::Directory;
use tidemill_examples::{Place, finish, say};

/// Counts addresses per five seconds. Without a command: source, ingester, job and check in one program.
#[derive(Parser)]
#[command(name = "ip-count", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    store: Store,
}

#[derive(Subcommand)]
enum Part {
    /// Only the source: pushes lines to the first that connects.
    Source(Source),
    /// Only ingester and job: counts what the source on a port pushes, until it ends.
    Count {
        /// Where the source listens.
        #[arg(long, default_value_t = 9990)]
        port: u16,
        /// The day of the first line, where there is none before it [default: today, UTC].
        #[arg(long, value_name = "YYYY-MM-DD")]
        date: Option<jiff::civil::Date>,
        #[command(flatten)]
        store: Store,
    },
    /// Counts a web server's access log (common or combined format).
    File {
        /// The file.
        path: PathBuf,
        /// How much older than a line before it a line may be; busy servers write when a request ends, not when it began.
        #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = seconds)]
        out_of_order: i64,
        #[command(flatten)]
        store: Store,
    },
}

#[derive(Args)]
struct Source {
    /// Where the source listens; 0 takes a free port.
    #[arg(long, default_value_t = 9990)]
    port: u16,
    /// How many lines it has; about 20 are a second.
    #[arg(long, default_value_t = 1200)]
    lines: usize,
    /// Names the lines: the same seed, the same lines.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many times as fast as a clock the lines come.
    #[arg(long, default_value_t = 20.0, value_parser = above_zero)]
    speed: f64,
    /// When the first line is due.
    #[arg(long, default_value = "2024-02-28T23:59:30Z", value_name = "RFC3339")]
    start: jiff::Timestamp,
}

#[derive(Args)]
struct Store {
    /// Where the log and the state lie, and stay [default: a temporary folder].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

fn above_zero(text: &str) -> Result<f64> {
    let speed = text.parse::<f64>().ok().filter(|speed| speed.is_finite() && *speed > 0.0);
    speed.ok_or_else(|| anyhow!("a number above 0"))
}

/// Milliseconds of `60s`.
fn seconds(text: &str) -> Result<i64> {
    let seconds = text.strip_suffix('s').and_then(|n| n.parse::<u32>().ok());
    seconds.map(|seconds| i64::from(seconds) * 1000).ok_or_else(|| anyhow!("seconds, such as 60s"))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    finish(match cli.part {
        None => whole(&cli.source, &cli.store),
        Some(Part::Source(source)) => only_source(&source),
        Some(Part::Count { port, date, store }) => only_count(port, date, &store),
        Some(Part::File { path, out_of_order, store }) => file(&path, out_of_order, &store),
    })
}

fn listen(port: u16) -> Result<(TcpListener, SocketAddr)> {
    let taken = || format!("cannot listen on port {port}; --port 0 takes a free one");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).with_context(taken)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// The whole case.
fn whole(source: &Source, store: &Store) -> Result<()> {
    let mut place = Place::new(store.data.as_deref())?;
    let data = count::fresh(place.path())?;
    let (listener, address) = listen(source.port)?;
    let lines = Arc::new(source::lines(source.seed, source.start.as_millisecond(), source.lines));
    let first = source.start.as_millisecond();
    // Three quarters in one connection, the rest in another: each is a new life of the ingester.
    let before = &lines[..lines.len() * 3 / 4];
    say(format_args!(
        "The source on {address} has {} lines and pushes them {} times as fast as a clock. After line {} it breaks the\n\
         connection: a new ingester takes over, which knows the date only from the topic's last record.\n\
         A row is: the task that counted, when the window began, the address, how often it came.",
        lines.len(),
        source.speed,
        before.len(),
    ));
    let serving = {
        let (lines, middle, speed) = (Arc::clone(&lines), before.len(), source.speed);
        std::thread::spawn(move || source::serve(&listener, &[&lines[..middle], &lines[middle..]], speed))
    };
    // Where counting failed the program ends, and the source, which may wait for a connection, with it.
    let counted = count::from_source(&data, address, 2, first)?;
    serving.join().map_err(|_| anyhow!("the source panicked"))??;
    let truth = lines.iter().map(|line| line.ip.map(|ip| (line.due - line.due.rem_euclid(1000), ip)));
    let compared = check::compare(&counted, &check::recount(truth, 0));
    if compared.is_err() {
        place.keep();
    }
    compared
}

fn only_source(source: &Source) -> Result<()> {
    let (listener, address) = listen(source.port)?;
    let lines = source::lines(source.seed, source.start.as_millisecond(), source.lines);
    say(format_args!("{} lines wait on {address} for somebody to connect", lines.len()));
    source::serve(&listener, &[&lines], source.speed)
}

fn only_count(port: u16, date: Option<jiff::civil::Date>, store: &Store) -> Result<()> {
    let place = Place::new(store.data.as_deref())?;
    let data = Directory::create(place.path())?;
    let first = match date {
        Some(date) => date.to_zoned(jiff::tz::TimeZone::UTC)?.timestamp(),
        None => jiff::Timestamp::now(),
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let counted = count::from_source(&data, address, 1, first.as_millisecond())?;
    let sum: u64 = counted.counts.values().sum();
    say(format_args!(
        "{} lines = {sum} counted + {} damaged + {} late",
        counted.lines, counted.damaged, counted.late
    ));
    Ok(())
}

fn file(path: &std::path::Path, out_of_order_ms: i64, store: &Store) -> Result<()> {
    let mut place = Place::new(store.data.as_deref())?;
    let data = count::fresh(place.path())?;
    let counted = count::from_file(&data, path, &format!("{}s", out_of_order_ms / 1000))?;
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines: Vec<&[u8]> = text.split(|b| *b == b'\n').collect();
    // What follows the last newline is a line only if there is something.
    lines.pop_if(|last| last.is_empty());
    let mut dater = ingest::Dater::starting(0);
    let read = |line: &[u8]| {
        let at = dater.date(line);
        line::parse(line).ok().map(|line| (at, line.ip))
    };
    let compared = check::compare(&counted, &check::recount(lines.into_iter().map(read), out_of_order_ms));
    if compared.is_err() {
        place.keep();
    }
    compared
}
