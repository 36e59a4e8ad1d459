//! Counting: the ingester fills the topic, the job counts, and what it committed is printed.
//!
//! ```text
//!   source ─TCP─▶ ingester ─▶ topic lines ─▶ job ip-count ─▶ topic ip-counts ─▶ print      while the source pushes
//!                                            job, until end ─▶                             once it has ended
//! ```
//!
//! Rows are printed by a reader of committed records, not by the job: stdout takes no part in a commit, so what a job
//! prints itself may come twice after a kill, or be of a transaction that never was.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use tidemill::engine::{Counters, Layout, Mode};
use tidemill::stream::shard_of;
use tidemill::{Directory, Isolation, Reader, Record, RunOptions, StartAt};

use crate::ingest;
use crate::job::IpCount;

pub(crate) const WINDOW_MS: i64 = 5_000;
/// Fixed, so that the number before `>` is the same on every machine.
const TASKS: usize = 3;
/// How often it is looked whether the source has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Counts per (start of the window, address).
pub(crate) type Counts = BTreeMap<(i64, IpAddr), u64>;

/// What a run came to.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) counts: Counts,
    /// Rows for a (window, address) that had one already.
    pub(crate) twice: u64,
    pub(crate) lines: u64,
    pub(crate) damaged: u64,
    pub(crate) late: u64,
    /// Windows that were open when the input ended.
    pub(crate) closed_early: usize,
}

/// Opens a data directory in which nothing has been counted yet: what is checked must be all there is.
pub(crate) fn fresh(path: &Path) -> Result<Directory> {
    let data = Directory::create(path)?;
    data.create_topic("lines", 1)?;
    if data.describe("lines")?.offsets.iter().any(|offsets| offsets.high_watermark > 0) {
        bail!("{} holds lines already; name another folder with --data", path.display());
    }
    Ok(data)
}

/// Counts what a source pushes into this many connections, one after the other. Lines before which there is none are
/// of the day of `first` (milliseconds since 1970).
pub(crate) fn from_source(
    data: &Directory,
    address: SocketAddr,
    connections: usize,
    first: i64,
) -> Result<Counted> {
    let topic = data.create_topic("lines", 1)?;
    let mut rows = Rows::of(data, StartAt::Latest)?;
    let job = data.start::<IpCount>(options(Mode::Unbounded, "0s"))?;
    let ingester = {
        let data = data.clone();
        std::thread::spawn(move || -> Result<()> {
            for _ in 0..connections {
                let connection = TcpStream::connect(address)
                    .with_context(|| format!("no source listens on {address}; start one there first"))?;
                // A new ingester each time, which knows only what the topic tells it.
                ingest::append(&data, &topic, BufReader::new(connection), first)?;
            }
            Ok(())
        })
    };
    while !ingester.is_finished() && !job.is_over() {
        let more = rows.reader.next(LOOK_AGAIN)?;
        rows.print(more)?;
    }
    // Where the job failed this says why; the ingester may wait for its source as long as it likes.
    let report = job.stop()?;
    ingester.join().map_err(|_| anyhow!("the ingester panicked"))??;
    rows.counted.add(&report.counters);
    tidemill_examples::say(
        "The source has ended. The last window will not be closed by a later line: the end closes it.",
    );
    until_end(data, rows, "0s")
}

/// Counts the lines of a file, at most `out_of_order` older than one before them.
pub(crate) fn from_file(data: &Directory, path: &Path, out_of_order: &str) -> Result<Counted> {
    let topic = data.create_topic("lines", 1)?;
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    ingest::append(data, &topic, BufReader::with_capacity(1 << 20, file), 0)
        .with_context(|| format!("cannot append {}", path.display()))?;
    let rows = Rows::of(data, StartAt::Earliest)?;
    until_end(data, rows, out_of_order)
}

/// Lets the job count what is there, and closes every window.
fn until_end(data: &Directory, mut rows: Rows, out_of_order: &str) -> Result<Counted> {
    let report = data.run::<IpCount>(options(Mode::UntilEnd, out_of_order))?;
    rows.counted.add(&report.counters);
    rows.counted.closed_early = report.summary.closed_early.len();
    let rest = rows.reader.read_to_end()?;
    rows.print(rest)?;
    Ok(rows.counted)
}

fn options(mode: Mode, out_of_order: &str) -> RunOptions {
    let sets = vec![format!("out_of_order={out_of_order}")];
    RunOptions { mode, sets, tasks: Some(TASKS), ..RunOptions::default() }
}

/// Prints what is committed, and keeps it for the check.
struct Rows {
    reader: Reader,
    counted: Counted,
}

impl Rows {
    fn of(data: &Directory, start: StartAt) -> Result<Self> {
        data.create_topic("ip-counts", 1)?;
        let reader = data.reader("ip-counts", start, Isolation::ReadCommitted)?;
        Ok(Self { reader, counted: Counted::default() })
    }

    /// A commit holds whole windows, whose rows come from several threads in any order: sorted, they are always the
    /// same.
    fn print(&mut self, records: Vec<Record>) -> Result<()> {
        let mut rows: Vec<_> = records.iter().map(Row::read).collect::<Result<_>>()?;
        rows.sort_by_key(|row| (row.start, row.ip));
        let mut out = io::stdout().lock();
        for Row { start, ip, count, text } in rows {
            let task = shard_of(ip.to_string().as_bytes(), Layout::SHARDS).task(TASKS) + 1;
            writeln!(out, "{task}> {text}")?;
            self.counted.twice += u64::from(self.counted.counts.insert((start, ip), count).is_some());
        }
        Ok(out.flush()?)
    }
}

/// A row of the output.
struct Row<'a> {
    start: i64,
    ip: IpAddr,
    count: u64,
    text: std::borrow::Cow<'a, str>,
}

impl<'a> Row<'a> {
    fn read(record: &'a Record) -> Result<Self> {
        let text = record.text();
        let count = text.rsplit(' ').next().and_then(|count| count.parse().ok());
        let ip = record.key_text().parse().ok();
        let (Some(count), Some(ip)) = (count, ip) else { bail!("the job wrote {text:?}") };
        // A window's result is dated with the window's last millisecond.
        Ok(Self { start: record.timestamp + 1 - WINDOW_MS, ip, count, text })
    }
}

impl Counted {
    fn add(&mut self, counters: &Counters) {
        self.lines += counters.rows_in;
        self.damaged += counters.dead;
        self.late += counters.late;
    }
}
