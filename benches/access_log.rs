//! How much of a bare loop's speed does the main job keep, on the lines of a web server's access log?
//!
//! Workload: `streamctl gen access-log`, combined format, about 168 bytes a line, 10,000 addresses by a Zipf law of 0.9,
//! one in six IPv6, some lines out of order, late or malformed. Seed 1. Four partitions, keyed by address, lz4.
//! Durability: every topic durable, a commit every 200 ms (the default), tasks as many as cores.
//! Measured: `streamctl run ip-count --until-end` as a whole process, on lines that are in the log already; beside it a
//! bare loop over the same file that parses with the job's own parser and counts by window and address on one core.
//! Answer: the output's counts and the lines that were late or dead sum to the lines, and every count of the bare
//! loop's windows that no late line touched is found in the output.
//!
//! `cargo bench -p tidemill-benches --bench access_log [-- LINES]` (2,000,000). Needs `streamctl` beside it:
//! `./x bench access_log` builds both.
#![allow(clippy::print_stdout, reason = "a bench prints its numbers")]
#![allow(missing_docs, reason = "a program")]

use std::io::BufRead as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use hashbrown::HashMap;
use tidemill_benches::{Cost, beside_the_build, machine, scratch};
use tidemill_jobs::access_log::parse;

const LINES: u64 = 2_000_000;
const WINDOW_MS: i64 = 5_000;

type Counts = HashMap<(i64, IpAddr), u64, foldhash::fast::FixedState>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["bare", file] => bare(Path::new(file)),
        [] => bench(LINES),
        [lines] => bench(lines.parse().context("give a number of lines")?),
        _ => bail!("give a number of lines"),
    }
}

fn bench(lines: u64) -> Result<()> {
    println!("{}", machine());
    let dir = scratch()?;
    let (file, data) = (dir.path().join("access.log"), dir.path().join("data"));
    let (file, streamctl) = (file.to_string_lossy(), Streamctl::find(&data)?);
    streamctl.run(&["gen", "access-log", "--seed", "1", "--lines", &lines.to_string(), "--file", &file])?;
    let bytes = std::fs::metadata(&*file)?.len();
    println!("{lines} lines, {} bytes each", bytes / lines.max(1));

    let produce = ["produce", "access-log", "--create", "--key-regex", "^([^ ]+)", "--file", &file];
    report("produce", lines, streamctl.timed(&produce)?, None);

    let own = std::env::current_exe()?.to_string_lossy().into_owned();
    let looped = timed(Command::new(own).args(["bare", &file]))?;
    report("bare loop", lines, looped, None);
    report("whole process", lines, streamctl.timed(&["run", "ip-count", "--until-end"])?, Some(looped));
    check(&streamctl, &file, lines)
}

/// Wall and processor seconds.
type Took = (f64, f64);

fn report(what: &str, lines: u64, (wall, cpu): Took, beside: Option<Took>) {
    let share = beside.map_or(String::new(), |(loop_wall, loop_cpu)| {
        format!(
            "; {:.1} % of the bare loop's speed, {:.2} times its processor time",
            100.0 * loop_wall / wall,
            cpu / loop_cpu
        )
    });
    println!(
        "  {what:14} {:.2} M lines/s: {wall:.2} s, {cpu:.2} s of processor{share}",
        lines as f64 / wall / 1e6
    );
}

/// Runs a command to its end; the processor time is that of all children since, which are one after the other.
fn timed(command: &mut Command) -> Result<Took> {
    let (before, began) = (children_cpu()?, Instant::now());
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok((began.elapsed().as_secs_f64(), children_cpu()? - before))
}

/// Processor seconds of the children that ended.
fn children_cpu() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(13) + ticks(14)) / 100.0)
}

struct Streamctl {
    program: PathBuf,
    data: PathBuf,
}

impl Streamctl {
    fn find(data: &Path) -> Result<Self> {
        let program = beside_the_build()?.join("streamctl");
        ensure!(
            program.exists(),
            "{} is not there: `cargo build --release -p streamctl` makes it",
            program.display()
        );
        Ok(Self { program, data: data.to_owned() })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env("TIDEMILL_DATA", &self.data);
        command
    }

    fn timed(&self, args: &[&str]) -> Result<Took> {
        timed(&mut self.command(args))
    }

    fn run(&self, args: &[&str]) -> Result<Vec<u8>> {
        let output = self.command(args).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "{args:?}: {}", output.status);
        Ok(output.stdout)
    }

    /// Lines of a topic; none where the topic is not there.
    fn consume(&self, topic: &str) -> Result<Vec<u8>> {
        self.run(&["consume", topic, "--until-end"])
    }
}

/// Counts by window end and address; and the lines that do not parse.
fn count(path: &Path) -> Result<(Counts, u64)> {
    let file = std::fs::read(path)?;
    let (mut counts, mut bad) = (Counts::default(), 0);
    let mut at = 0;
    while at < file.len() {
        let end = memchr::memchr(b'\n', &file[at..]).map_or(file.len(), |n| at + n);
        match parse(&file[at..end]) {
            Ok(line) => {
                let end = line.at - line.at.rem_euclid(WINDOW_MS) + WINDOW_MS;
                *counts.entry((end, line.ip)).or_insert(0) += 1;
            }
            Err(_) => bad += 1,
        }
        at = end + 1;
    }
    Ok((counts, bad))
}

fn bare(path: &Path) -> Result<()> {
    let (counts, bad) = count(path)?;
    println!("{} groups, {bad} bad lines, {:?}", counts.len(), Cost::so_far()?);
    Ok(())
}

fn check(streamctl: &Streamctl, file: &str, lines: u64) -> Result<()> {
    let (mut counts, bad) = count(Path::new(file))?;
    let dead = streamctl.consume("ip-count-dead-letter")?.lines().count() as u64;
    ensure!(dead == bad, "{dead} dead letters instead of {bad}");
    // Late lines count in the bare loop, which waits for all; they are taken from it.
    let mut late = 0;
    for line in streamctl.consume("ip-counts-late")?.lines() {
        let line = line?;
        let Ok(line) = parse(line.as_bytes()) else { bail!("a late line that cannot be read: {line}") };
        let end = line.at - line.at.rem_euclid(WINDOW_MS) + WINDOW_MS;
        *counts.get_mut(&(end, line.ip)).context("a late line that was not in the file")? -= 1;
        late += 1;
    }
    let mut counted = 0;
    for row in streamctl.consume("ip-counts")?.lines() {
        let row: serde_json::Value = serde_json::from_str(&row?)?;
        let ip: IpAddr = row["ip"].as_str().context("no ip")?.parse()?;
        let n = row["count"].as_u64().context("no count")?;
        let end = millis(row["window_end"].as_str().context("no window_end")?)?;
        let expected = counts.get_mut(&(end, ip)).context("a group of no line")?;
        ensure!(*expected == n, "{row}: {n} instead of {expected}");
        *expected = 0;
        counted += n;
    }
    let missing: u64 = counts.values().sum();
    ensure!(missing == 0, "{missing} lines are in no result");
    println!("every group equals the recount: {counted} counted, {late} late, {dead} dead of {lines} lines");
    Ok(())
}

/// Milliseconds of a window's end, which the job writes as RFC 3339 in UTC.
fn millis(text: &str) -> Result<i64> {
    let number =
        |at: std::ops::Range<usize>| text.get(at).context("cut off")?.parse::<i64>().context("no number");
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    // Days by the civil calendar, years beginning in March.
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468;
    let seconds = days * 86_400 + number(11..13)? * 3_600 + number(14..16)? * 60 + number(17..19)?;
    Ok(seconds * 1_000)
}
