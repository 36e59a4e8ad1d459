//! Cuts under `streamctl produce` and `streamctl run ip-count` on one data directory.
//!
//! ```text
//!   lines not there yet ──fed slowly──▶ produce ──▶ topic access-log ──▶ run ip-count ──▶ output, state, offsets
//!                                          │ "N leading lines are durable"        │ a line for each commit
//!                                          ▼                                      ▼
//!                                        acks, outside the disk that is cut
//! ```
//!
//! After each cut: every partition holds a prefix of what was sent to it, with every durable line in it. The next run
//! tells where it starts again, before it has read anything: not before the last commit that was told, and not behind
//! the lines that are there. After the last cut the job runs to its end, starting no earlier, either, and its output
//! equals a recount of the lines that are there.

use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::disk::{self, Cut, Disk};
use super::{Counts, Power, Random};
use crate::counted::Counted;
use crate::recount::{Recount, Settings, partition_of};
use crate::streamctl::{Polled, Run, Status, Streamctl};

const SETTINGS: Settings = Settings { partitions: 4, window_ms: 5_000, bound_ms: 10_000 };
/// More than five cuts use up.
const LINES: u64 = 150_000;
/// Lines fed at a time, each millisecond.
const LINES_A_MS: usize = 5;
/// The longest anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Cuts one image with these seeds.
pub(super) fn image(options: &Power, disk: &Disk, work: &Path, seeds: Range<u64>) -> Result<Counts> {
    let streamctl = Streamctl::new(&options.streamctl, disk.dir().join("data"));
    let log = work.join("access.log");
    let (file, lines, seed) =
        (log.to_string_lossy().into_owned(), LINES.to_string(), seeds.start.to_string());
    streamctl.run_quietly(&["gen", "access-log", "--lines", &lines, "--seed", &seed, "--file", &file])?;
    let text = std::fs::read(&log)?;
    let mut input = Input::new(&text);
    let mut counts = Counts::default();
    let mut committed = 0;
    for seed in seeds {
        let cut = cycle(&streamctl, disk, &mut input, seed, &mut committed, &mut counts);
        cut.with_context(|| format!("seed {seed}"))?;
    }
    disk.mount()?;
    to_the_end(&streamctl, committed, input.there.iter().sum::<usize>() as u64)?;
    let recount = Recount::of(SETTINGS, &input.there_text());
    let counted = Counted::read(
        &streamctl.values("ip-counts", "read-committed")?,
        &streamctl.values("ip-counts-late", "read-committed")?,
        &streamctl.values("ip-count-dead-letter", "read-committed")?,
    )?;
    let differences = counted.differences(&recount, SETTINGS.window_ms);
    ensure!(differences.is_empty(), "the job's output differs from a recount of its input: {differences:#?}");
    ensure!(recount.counted() > 0, "the job counted nothing: this proves nothing");
    disk.unmount()?;
    Ok(counts)
}

fn cycle(
    streamctl: &Streamctl,
    disk: &Disk,
    input: &mut Input<'_>,
    seed: u64,
    committed: &mut u64,
    counts: &mut Counts,
) -> Result<()> {
    let mut random = Random::new(seed);
    let cut = Cut::of(&mut random);
    let tasks = (1 + random.below(3)).to_string();
    disk.mount()?;
    let topic = ["topic", "create", "access-log", "--partitions", "4"];
    if !streamctl.data().exists() {
        streamctl.run_quietly(&topic)?;
    }
    let missing = input.missing();
    // Whoever comes first owns the directory; the other one reaches it through a socket.
    let producer_first = random.percent(50);
    let mut producer =
        producer_first.then(|| Producer::start(streamctl, input.text(&missing))).transpose()?;
    let mut run = streamctl.start_run(&[
        "ip-count",
        "--set",
        "idle_after=1h",
        "--commit-interval",
        "30ms",
        "--tasks",
        &tasks,
    ])?;
    let mut producer = match producer.take() {
        Some(producer) => producer,
        None => {
            started(&mut run, *committed)?;
            Producer::start(streamctl, input.text(&missing))?
        }
    };
    if producer_first {
        started(&mut run, *committed)?;
    }
    let (mut commits, mut acked) = (0, *committed);
    let mut until = None;
    let begun = Instant::now();
    // The load counts from the first commit on.
    while until.is_none_or(|until| Instant::now() < until) {
        ensure!(begun.elapsed() < PATIENCE, "no commit within {PATIENCE:?}");
        match run.poll(Duration::from_millis(10))? {
            Polled::Said(Status::Committed { committed_records, .. }) => {
                note(committed_records, &mut acked, &mut commits)?;
                until.get_or_insert(Instant::now() + cut.after);
            }
            Polled::Said(_) | Polled::Nothing => {}
            Polled::End => bail!("the run ended before the cut: {}", run.wait()?.1),
        }
    }
    if cut.write_back {
        disk::write_back(streamctl.data(), &mut random)?;
    }
    disk.cut(&cut)?;
    // Whatever it said before its death was acknowledged.
    for status in run.kill_and_drain()? {
        if let Status::Committed { committed_records, .. } = status {
            note(committed_records, &mut acked, &mut commits)?;
        }
    }
    let said = producer.end()?;
    let (durable, doubt) = match said.contains(", all durable") {
        // It had appended every line before the cut, and waited for more.
        true => (number_before(&said, " lines appended")?, 0),
        false => {
            (number_before(&said, " leading lines are durable")?, number_before(&said, " more are in doubt")?)
        }
    };
    disk.unmount()?;

    disk.mount()?;
    let there = streamctl.values("access-log", "read-uncommitted")?;
    disk.unmount()?;
    let before = input.there.iter().sum::<usize>();
    input.found(&there)?;
    let now = input.there.iter().sum::<usize>() - before;
    ensure!(missing.len() >= durable, "{durable} lines are called durable, {} were sent", missing.len());
    if let Some(lost) = missing[..durable].iter().position(|line| !input.is_there(*line)) {
        bail!(
            "ACKED AND LOST: {durable} leading lines were durable, and line {lost} of them is not there ({cut:?})"
        );
    }
    ensure!(now <= durable + doubt, "{durable} durable, {doubt} in doubt, and {now} are there");
    *committed = acked;
    counts.cuts += 1;
    counts.job_cuts += 1;
    counts.acked += durable as u64;
    counts.commits += commits;
    counts.written_back += u64::from(cut.write_back);
    counts.beyond_acks += u64::from(now > durable);
    Ok(())
}

/// Waits until the run is recovered: it must start behind everything that was told committed.
fn started(run: &mut Run, acked: u64) -> Result<()> {
    let since = Instant::now();
    loop {
        ensure!(since.elapsed() < PATIENCE, "the run has not started within {PATIENCE:?}");
        match run.next(PATIENCE)? {
            Some(Status::Started { committed_records, .. }) => return recovered(committed_records, acked),
            Some(_) => {}
            None => bail!("the run ended before it started"),
        }
    }
}

/// A run starts where `found` records are committed, and `acked` were told committed before the cut.
fn recovered(found: u64, acked: u64) -> Result<()> {
    ensure!(
        found >= acked,
        "COMMITTED AND LOST: {acked} records were told committed, and the next run starts behind {found}"
    );
    Ok(())
}

/// The last run, over what `there` is in the input: from where everything told is committed to where everything is.
fn to_the_end(streamctl: &Streamctl, acked: u64, there: u64) -> Result<()> {
    let mut run = streamctl.start_run(&["ip-count", "--until-end"])?;
    started(&mut run, acked)?;
    let (mut last, mut commits) = (acked, 0);
    while let Some(status) = run.next(PATIENCE)? {
        if let Status::Committed { committed_records, .. } = status {
            note(committed_records, &mut last, &mut commits)?;
        }
    }
    let (status, said) = run.wait()?;
    ensure!(status.success(), "the last run ended with {status}: {said}");
    ensure!(last <= there, "{last} records are told committed, and {there} are there");
    Ok(())
}

/// A commit was told: it must not lie before one that was told earlier.
fn note(committed_records: u64, acked: &mut u64, commits: &mut u64) -> Result<()> {
    ensure!(
        committed_records >= *acked,
        "COMMITTED AND LOST: {acked} records were committed, and now a commit holds {committed_records}"
    );
    (*acked, *commits) = (committed_records, *commits + 1);
    Ok(())
}

/// The lines, and how many of each partition are in the log.
struct Input<'a> {
    /// A line and its partition.
    lines: Vec<(&'a [u8], usize)>,
    /// Numbers of the lines of each partition.
    of: Vec<Vec<usize>>,
    there: Vec<usize>,
}

impl<'a> Input<'a> {
    fn new(text: &'a [u8]) -> Self {
        let partitions = SETTINGS.partitions as usize;
        let mut input =
            Self { lines: Vec::new(), of: vec![Vec::new(); partitions], there: vec![0; partitions] };
        for line in text.strip_suffix(b"\n").unwrap_or(text).split(|b| *b == b'\n') {
            // Without a key it may go to any partition.
            if matches!(line.first(), None | Some(b' ')) {
                continue;
            }
            let partition = partition(line);
            input.of[partition].push(input.lines.len());
            input.lines.push((line, partition));
        }
        input
    }

    fn is_there(&self, line: usize) -> bool {
        let of = &self.of[self.lines[line].1];
        of[..self.there[self.lines[line].1]].binary_search(&line).is_ok()
    }

    /// The lines that are not there, in their order.
    fn missing(&self) -> Vec<usize> {
        (0..self.lines.len()).filter(|line| !self.is_there(*line)).collect()
    }

    fn text(&self, lines: &[usize]) -> Vec<Vec<u8>> {
        lines.chunks(LINES_A_MS).map(|some| self.joined(some.iter().copied())).collect()
    }

    fn there_text(&self) -> Vec<u8> {
        self.joined((0..self.lines.len()).filter(|line| self.is_there(*line)))
    }

    fn joined(&self, lines: impl Iterator<Item = usize>) -> Vec<u8> {
        lines.flat_map(|line| [self.lines[line].0, b"\n"].concat()).collect()
    }

    /// Takes over what the log holds: each partition must hold a prefix of its lines, and no less than before.
    fn found(&mut self, text: &[u8]) -> Result<()> {
        let mut there = vec![0; self.there.len()];
        for line in text.split_inclusive(|b| *b == b'\n').map(|line| line.strip_suffix(b"\n").unwrap_or(line))
        {
            let partition = partition(line);
            let at = there[partition];
            let expected = self.of[partition].get(at).map(|line| self.lines[*line].0);
            ensure!(
                expected == Some(line),
                "partition {partition} is no prefix of what was sent to it: record {at} is {:?}, expected {:?}",
                String::from_utf8_lossy(line),
                expected.map(String::from_utf8_lossy)
            );
            there[partition] += 1;
        }
        for (partition, (now, before)) in there.iter().zip(&self.there).enumerate() {
            ensure!(now >= before, "partition {partition} held {before} lines at the last cut, now {now}");
        }
        self.there = there;
        Ok(())
    }
}

fn partition(line: &[u8]) -> usize {
    let key = line.split(|b| *b == b' ').next().unwrap_or_default();
    partition_of(key, SETTINGS.partitions) as usize
}

/// A `streamctl produce` and who feeds it. Dropping it kills it.
struct Producer {
    child: Child,
    said: Option<JoinHandle<String>>,
    /// The feeder ends where this does.
    go_on: Option<Sender<()>>,
}

impl Producer {
    fn start(streamctl: &Streamctl, chunks: Vec<Vec<u8>>) -> Result<Self> {
        let mut child = streamctl
            .command(["produce", "access-log", "--key-regex", "^([^ ]+)"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start streamctl")?;
        let stdin = child.stdin.take().context("standard input is piped")?;
        let mut stderr = child.stderr.take().context("standard error is piped")?;
        let (go_on, stop) = channel();
        thread::spawn(move || feed(stdin, &chunks, &stop));
        let said = thread::spawn(move || {
            let mut text = String::new();
            let _ = std::io::Read::read_to_string(&mut stderr, &mut text);
            text
        });
        Ok(Self { child, said: Some(said), go_on: Some(go_on) })
    }

    /// What it said once it met the cut and ended.
    fn end(&mut self) -> Result<String> {
        self.go_on = None;
        let since = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(since.elapsed() < PATIENCE, "the producer has not noticed the cut within {PATIENCE:?}");
            thread::sleep(Duration::from_millis(5));
        }
        let said = self.said.take().and_then(|said| said.join().ok());
        said.context("what the producer said can not be read")
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Both fail where it ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A chunk a millisecond until the producer ends, or this is over. The producer is not told that the input ended before.
fn feed(mut stdin: ChildStdin, chunks: &[Vec<u8>], stop: &std::sync::mpsc::Receiver<()>) {
    for chunk in chunks {
        if stdin.write_all(chunk).is_err() {
            return;
        }
        if stop.recv_timeout(Duration::from_millis(1)) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
    let _ = stop.recv();
}

fn number_before(text: &str, what: &str) -> Result<usize> {
    let Some((before, _)) = text.split_once(what) else {
        bail!("the producer does not say {what:?}: {text}")
    };
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().with_context(|| format!("no number before {what:?}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `streamctl` that says these status lines, whatever it is asked.
    fn saying(dir: &Path, lines: &str) -> Streamctl {
        let path = dir.join("streamctl");
        std::fs::write(&path, format!("#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Streamctl::new(path, dir)
    }

    fn line(event: &str, records: u64) -> String {
        format!(
            "{{\"event\":\"{event}\",\"recovery_ms\":1,\"replayed\":0,\"commits\":1,\"committed_records\":{records}}}"
        )
    }

    /// A run that starts before what was told committed reads those records again: by its first commit it is past
    /// them, and nothing shows.
    #[test]
    fn a_lost_commit_shows_where_the_next_run_starts() {
        let dir = tempfile::tempdir().unwrap();
        let lost = [line("started", 900), line("committed", 1_200)].join("\n");
        let streamctl = saying(dir.path(), &lost);
        let mut run = streamctl.start_run(&["ip-count"]).unwrap();
        let error = started(&mut run, 1_000).unwrap_err().to_string();
        assert!(error.starts_with("COMMITTED AND LOST: 1000 records"), "{error}");
        let error = to_the_end(&streamctl, 1_000, 1_200).unwrap_err().to_string();
        assert!(error.starts_with("COMMITTED AND LOST: 1000 records"), "{error}");
        to_the_end(&streamctl, 900, 1_200).unwrap();
        assert!(to_the_end(&streamctl, 900, 1_199).unwrap_err().to_string().contains("are there"));
    }

    #[test]
    fn a_line_that_is_no_status_is_an_error_and_silence_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let streamctl = saying(dir.path(), "thread 'main' panicked");
        let mut run = streamctl.start_run(&["ip-count"]).unwrap();
        let error = run.poll(PATIENCE).unwrap_err().to_string();
        assert!(error.contains("not a status line"), "{error}");
        assert_eq!(run.poll(PATIENCE).unwrap(), Polled::End);
        let path = dir.path().join("streamctl");
        std::fs::write(&path, "#!/bin/sh\nexec sleep 60\n").unwrap();
        let mut run = streamctl.start_run(&["ip-count"]).unwrap();
        assert_eq!(run.poll(Duration::from_millis(1)).unwrap(), Polled::Nothing);
    }
}
