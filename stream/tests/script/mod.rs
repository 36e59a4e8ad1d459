//! Golden scripts for the test driver: a claim, a job, commands, and below each what it committed.
//!
//! ```text
//! # what the case shows
//! job window=10 bound=3 partitions=2 tasks=2
//! > send 0 5 a, 1 16 b
//! > commit
//!     out a 0..10 1
//! ```
//!
//! `queue=N` bounds the channels between tasks. Records are `TIME KEY`. Of rows that one command committed the order is not told: between keys there is none.
//! `TIDEMILL_GOLDEN=write` writes what comes out into the files; review it like code.
//!
//! | command | means |
//! |---|---|
//! | `send P T K, ...` | records to partitions; what is no `TIME KEY` is unreadable |
//! | `meanwhile P T K, ...` | the same, while the next commit ends |
//! | `commit`, `until-end`, `stop` | as the driver's |
//! | `idle P`, `advance MS` | as the driver's |
//! | `tasks N`, `crash`, `crash-into N` | another number of tasks, a power cut, both |
//! | `abort`, `abort-unknown`, `commit-unknown` | what becomes of the next end of a transaction |
//! | `delete-store`, `copy-store`, `stale-store` | the state directory |
//! | `write-store`, `flush-store` | where the job says `lagging` |
//! | `copy-log`, `lose-log-suffix` | the log loses its newest part; the store does not |
//! | `hour` | an hour passes with a commit due every 200 ms; tells how much the log grew |
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tidemill_stream::testing::{DriveError, EndFate, TestDriver};
use tidemill_stream::{EventTime, Flow, Job, Malformed, Result, Text, Tumbling, decode_with, topic};

/// Counts `TIME KEY` records per key and window.
#[derive(Clone, Copy)]
pub struct Counts {
    window: u64,
    bound: u64,
    idle: Option<u64>,
}

impl Job for Counts {
    const NAME: &'static str = "counts";
    fn build(&self, flow: &Flow) -> Result<()> {
        let millis = Duration::from_millis;
        let line = decode_with(|record| {
            let text = std::str::from_utf8(record.value().unwrap_or_default()).unwrap_or_default();
            let (t, key) = text.split_once(' ').ok_or_else(|| Malformed::new("no space"))?;
            Ok((t.parse::<i64>().map_err(|e| Malformed::new(e.to_string()))?, key.to_owned()))
        });
        let mut event_time = EventTime::out_of_order(millis(self.bound));
        if let Some(idle) = self.idle {
            event_time = event_time.idle_after(millis(idle));
        }
        flow.source(topic("in"), line)
            .dead_letter_to(topic("dead"))
            .event_time(|row| row.0, event_time)
            .key_by(|row| row.1.clone())
            .window(Tumbling::of(millis(self.window)))
            .count("per-key")
            .late_to(topic("late"))
            .map(|w| format!("{} {}..{} {}", w.key, w.start.millis(), w.end.millis(), w.value))
            .to(topic("out"), Text);
        Ok(())
    }
}

pub type Driver = TestDriver<Counts>;

/// A case: a file of the folder.
pub struct Case {
    pub name: String,
    pub path: PathBuf,
    pub text: String,
    job: Counts,
    partitions: u32,
    pub tasks: usize,
    lagging: bool,
    /// Messages that a channel holds, if it is bounded.
    queue: Option<usize>,
    /// Whether a crash may change nothing. Not where idleness is a decision that a crash undoes.
    pub crashes: bool,
}

/// Rows and how often each was committed.
pub type Rows = BTreeMap<String, usize>;

/// What a run of a case came to.
pub struct Ran {
    /// The file as it should be.
    pub text: String,
    /// Every row committed.
    pub rows: Rows,
}

pub fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/script/cases");
    let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut cases: Vec<_> = files.map(|file| Case::read(&file.expect("an entry").path())).collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    cases
}

impl Case {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("job"))
            .unwrap_or_else(|| panic!("{name}: no job"));
        let words: BTreeMap<_, _> =
            line.split_whitespace().map(|word| word.split_once('=').unwrap_or((word, ""))).collect();
        let number = |name: &str| words.get(name).map(|n| n.parse::<u64>().expect("a number"));
        let unknown = |word: &&str| {
            !["window", "bound", "idle", "partitions", "tasks", "lagging", "crashes", "queue"].contains(word)
        };
        assert_eq!(words.keys().copied().find(|word| unknown(word)), None, "{name}");
        Self {
            job: Counts {
                window: number("window").unwrap_or(10),
                bound: number("bound").unwrap_or(3),
                idle: number("idle"),
            },
            partitions: number("partitions").unwrap_or(2) as u32,
            tasks: number("tasks").unwrap_or(2) as usize,
            lagging: words.contains_key("lagging"),
            queue: number("queue").map(|n| n as usize),
            crashes: words.get("crashes") != Some(&"no"),
            path: path.to_owned(),
            name,
            text,
        }
    }

    pub fn driver(&self, tasks: usize) -> Result<Driver> {
        let driver = Driver::new(&self.job)?.partitions(self.partitions).tasks(tasks).shards(4);
        let driver = if let Some(queue) = self.queue { driver.queue(queue) } else { driver };
        Ok(if self.lagging { driver.lagging_store() } else { driver })
    }

    fn commands(&self) -> impl Iterator<Item = &str> {
        self.text.lines().filter_map(|line| line.strip_prefix("> "))
    }

    /// Runs the commands without looking at what comes out between.
    pub fn play(&self, driver: &mut Driver) -> Result<(), DriveError> {
        self.commands().try_for_each(|command| self.run(driver, command).map(|_| ()))
    }

    /// Runs the case and writes down what every command committed.
    pub fn record(&self, mut driver: Driver) -> Result<Ran, DriveError> {
        let head = self.text.lines().take_while(|line| !line.starts_with('>'));
        let mut text: String = head.map(|line| format!("{line}\n")).collect();
        let (mut before, mut starts, mut waits) = (Rows::new(), driver.starts(), driver.waits());
        for command in self.commands() {
            writeln!(text, "> {command}").expect("a string");
            let said = self.run(&mut driver, command)?;
            said.into_iter().for_each(|line| writeln!(text, "    {line}").expect("a string"));
            let now = driver.starts();
            if now.0 != starts.0 && starts.0 > 0 {
                let (replayed, rebuilt) = (now.1 - starts.1, now.2 - starts.2);
                writeln!(text, "    starts: {replayed} replayed, {rebuilt} shards rebuilt")
                    .expect("a string");
            }
            starts = now;
            let waited = driver.waits() - std::mem::replace(&mut waits, driver.waits());
            if waited > 0 {
                writeln!(text, "    a read waited for a full queue {waited} times").expect("a string");
            }
            let rows = rows(&driver);
            for (row, times) in &rows {
                for _ in before.get(row).copied().unwrap_or(0)..*times {
                    writeln!(text, "    {row}").expect("a string");
                }
            }
            before = rows;
        }
        Ok(Ran { text, rows: before })
    }

    fn run(&self, driver: &mut Driver, command: &str) -> Result<Vec<String>, DriveError> {
        let (word, rest) = command.split_once(' ').unwrap_or((command, ""));
        let number = || rest.parse::<u64>().unwrap_or_else(|_| panic!("{}: {command}", self.name));
        let mut said = Vec::new();
        match word {
            "send" | "meanwhile" => {
                for record in rest.split(", ") {
                    let (partition, line) = record.split_once(' ').expect("P TIME KEY");
                    let (partition, line) = (partition.parse().expect("a partition"), line.to_owned());
                    if word == "send" {
                        driver.send(partition, line)
                    } else {
                        driver.send_meanwhile(partition, line)
                    };
                }
            }
            "commit" => driver.commit()?,
            "stop" => driver.stop()?,
            "until-end" => {
                let summary = driver.until_end()?;
                let ends: Vec<_> = summary.closed_early.iter().map(ToString::to_string).collect();
                said.push(format!("closed before their time: {}", ends.join(", ")));
            }
            "idle" => driver.idle(number() as u32)?,
            "advance" => driver.advance(Duration::from_millis(number()))?,
            "tasks" => driver.restart_with(number() as usize)?,
            "crash" => driver.crash()?,
            "crash-into" => driver.crash_into(number() as usize)?,
            "abort" => driver.next_end(EndFate::Abort),
            "abort-unknown" => driver.next_end(EndFate::AbortUnknown),
            "commit-unknown" => driver.next_end(EndFate::CommitUnknown),
            "delete-store" => driver.lose_store()?,
            "copy-store" => driver.copy_store(),
            "stale-store" => driver.restore_store()?,
            "write-store" => driver.write_store()?,
            "flush-store" => driver.flush_store()?,
            "copy-log" => driver.copy_log(),
            "lose-log-suffix" => driver.lose_log_suffix(),
            "hour" => {
                let before = driver.log_size();
                for _ in 0..3_600 * 5 {
                    driver.advance(Duration::from_millis(200))?;
                    driver.commit()?;
                }
                said.push(format!("the log grew by {}", driver.log_size() - before));
            }
            _ => panic!("{}: no command `{command}`", self.name),
        }
        Ok(said)
    }
}

/// Everything committed.
pub fn rows(driver: &Driver) -> Rows {
    let mut rows = Rows::new();
    let out = driver.outputs().into_iter().map(|row| format!("out {}", row.value));
    let late = driver.late().into_iter().map(|row| format!("late {} {}", row.partition, row.value));
    let dead = driver.dead_letters().into_iter().map(|row| format!("dead {} {}", row.partition, row.value));
    out.chain(late).chain(dead).for_each(|row| *rows.entry(row).or_default() += 1);
    rows
}
