//! Starts the `streamctl` binary, reads what it says and kills it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde::Deserialize;

/// The binary and the data directory it works on.
#[derive(Debug, Clone)]
pub struct Streamctl {
    binary: PathBuf,
    data: PathBuf,
}

/// A line that `run --status-lines` prints.
#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Status {
    /// State is recovered; rows are processed from now on.
    Started {
        /// From the start of the process, in milliseconds.
        recovery_ms: u64,
        /// Changelog records replayed into the store.
        replayed: u64,
        /// Input records the committed offsets are past, over all partitions.
        committed_records: u64,
    },
    /// A transaction was committed.
    Committed {
        /// Commits of this run so far.
        commits: u64,
        /// Input records the committed offsets are past, over all partitions.
        committed_records: u64,
    },
    /// Output rows of the open transaction that the log has acknowledged.
    Open {
        /// How many; since the last commit.
        output_rows: u64,
    },
    /// The run is about to take a step.
    Phase {
        /// In which phase; none where it is beside the phases.
        phase: Option<String>,
        /// Which step.
        step: String,
    },
    /// More leading lines of a `produce` are durable.
    Durable {
        /// So many.
        lines: u64,
    },
    /// The run ends.
    Done {
        /// Windows closed before their time by the bounded end.
        windows_closed_early: u64,
        /// Input records processed by this run.
        records: u64,
    },
}

impl Streamctl {
    /// That binary on that data directory; neither is checked.
    pub fn new(binary: impl Into<PathBuf>, data: impl Into<PathBuf>) -> Self {
        Streamctl { binary: binary.into(), data: data.into() }
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A command with these arguments on the data directory; stdin is closed, the rest inherited.
    pub fn command<I: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--data").arg(&self.data).args(args).stdin(Stdio::null());
        command
    }

    /// Runs to the end; an error unless it exits 0. What it says on stderr is passed through.
    pub fn run(&self, args: &[&str]) -> Result<()> {
        let status =
            self.command(args).status().with_context(|| format!("cannot start {}", self.binary.display()))?;
        ensure!(status.success(), "streamctl {} ended with {status}", args.join(" "));
        Ok(())
    }

    /// Runs to the end; what it says on stderr is shown only where it fails.
    pub fn run_quietly(&self, args: &[&str]) -> Result<()> {
        let output =
            self.command(args).output().with_context(|| format!("cannot start {}", self.binary.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "streamctl {} ended with {}: {said}", args.join(" "), output.status);
        Ok(())
    }

    /// Runs to the end and returns what it printed; an error unless it exits 0.
    pub fn output(&self, args: &[&str]) -> Result<Vec<u8>> {
        let output = self
            .command(args)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        ensure!(output.status.success(), "streamctl {} ended with {}", args.join(" "), output.status);
        Ok(output.stdout)
    }

    /// All values of a topic, a line each.
    pub fn values(&self, topic: &str, isolation: &str) -> Result<Vec<u8>> {
        self.output(&["consume", topic, "--until-end", "--isolation", isolation])
    }

    /// Starts `run ... --status-lines`.
    pub fn start_run(&self, args: &[&str]) -> Result<Run> {
        let mut child = self
            .command(["run"].iter().chain(args).chain(&["--status-lines"]))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        let mut stderr = child.stderr.take().context("standard error is piped")?;
        let said = std::thread::spawn(move || {
            let mut text = String::new();
            // What is not UTF-8 ends it; it is for people only.
            let _ = stderr.read_to_string(&mut text);
            text
        });
        let stdout = child.stdout.take().context("standard output is piped")?;
        let (send, lines) = sync_channel(1024);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Run { child, lines, said: Some(said), started: Instant::now() })
    }
}

/// What a run says while somebody listens for a moment.
#[derive(Debug, Clone, PartialEq)]
pub enum Polled {
    /// This.
    Said(Status),
    /// Nothing.
    Nothing,
    /// Nothing more: it closed its output.
    End,
}

/// A running job. Dropping it kills it.
#[derive(Debug)]
pub struct Run {
    child: Child,
    lines: Receiver<String>,
    said: Option<JoinHandle<String>>,
    started: Instant,
}

impl Run {
    /// Since it was started.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The next status, or none once the process closed its output; an error if it says nothing for `patience`.
    pub fn next(&mut self, patience: Duration) -> Result<Option<Status>> {
        match self.poll(patience)? {
            Polled::Said(status) => Ok(Some(status)),
            Polled::End => Ok(None),
            Polled::Nothing => bail!("the run has said nothing for {patience:?}"),
        }
    }

    /// What it says within `patience`; an error if that is no status.
    pub fn poll(&mut self, patience: Duration) -> Result<Polled> {
        match self.lines.recv_timeout(patience) {
            Ok(line) => {
                let status =
                    serde_json::from_str(&line).with_context(|| format!("not a status line: {line}"))?;
                Ok(Polled::Said(status))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(Polled::End),
            Err(RecvTimeoutError::Timeout) => Ok(Polled::Nothing),
        }
    }

    /// SIGSTOP, and waits until the process stands still; false if it has ended.
    ///
    /// What it said before can be read while it stands.
    pub fn freeze(&self) -> Result<bool> {
        self.signal(Signal::STOP)?;
        let pid = self.pid()?;
        // An end is only looked at, so that `kill` and `wait` still find it; the stop is taken, so that the next one counts.
        let either = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let is = waitid(WaitId::Pid(pid), either).context("cannot wait for the run")?;
        if !is.is_some_and(|is| is.stopped()) {
            return Ok(false);
        }
        waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).context("cannot wait for the run")?;
        Ok(true)
    }

    /// SIGCONT: it goes on.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        // It is not waited for yet, so the number is still its own.
        kill_process(self.pid()?, signal).with_context(|| format!("cannot send {signal:?} to the run"))
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(i32::try_from(self.child.id())?).context("a process has a number")
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("cannot kill the run")?;
        self.child.wait().context("cannot wait for the run")?;
        Ok(())
    }

    /// SIGKILL; then what the process had said and nobody had read yet.
    pub fn kill_and_drain(mut self) -> Result<Vec<Status>> {
        self.child.kill().context("cannot kill the run")?;
        self.child.wait().context("cannot wait for the run")?;
        // Its death closed the pipe, so the reader ends. A line that was cut off says nothing.
        Ok(self.lines.iter().filter_map(|line| serde_json::from_str(&line).ok()).collect())
    }

    /// Waits for a process that closed its output: how it ended, and what it said on stderr.
    pub fn wait(mut self) -> Result<(ExitStatus, String)> {
        let status = self.child.wait().context("cannot wait for the run")?;
        let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        Ok((status, said))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Both fail where the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
