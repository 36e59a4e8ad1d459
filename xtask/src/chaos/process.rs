//! The processes of a run: what they say on their pipes, and the signals they get.
//!
//! A thread per process reads its status lines into [`Seen`]. What was said before a kill is still in the pipe after
//! it, so the phase in which a kill hit is read to the end before it is counted.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::check::Produced;
use super::load::Load;
use crate::streamctl::Status;

/// Of what a process says on stderr, so much is kept for an error message.
const SAID_BYTES: usize = 4 << 10;
/// How long the rest of a dead process's pipe may take.
const DRAIN: Duration = Duration::from_secs(10);
/// Output is in the log this long after it was handed over, at the latest: a run sends it every 50 ms.
const ON_ITS_WAY: Duration = Duration::from_millis(100);
/// How often a feeder writes.
const FEED: Duration = Duration::from_millis(5);

/// What a process has said so far.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The phase it was last about to enter.
    pub phase: String,
    /// The step it was last about to take.
    pub step: String,
    /// Since when output is in its open transaction, or on the way there. Not in the first one, which a start ends as soon as
    /// it has output.
    opened: Option<Instant>,
    /// Whether its first transaction has ended.
    ended_first: bool,
    /// Since when nothing gets any further: somebody on the way to the log is stopped, or this process is dead.
    frozen: Option<Instant>,
    /// Whether it has handed any output over since its first transaction ended.
    pub has_output: bool,
    /// Commits of this process.
    pub commits: u64,
    /// Leading lines that are durable.
    pub durable: u64,
    /// Whether it said that it listens.
    pub listening: bool,
    /// Whether its output is closed.
    pub ended: bool,
}

/// A process that was started.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    said: Arc<Mutex<String>>,
    saying: JoinHandle<()>,
    started: Instant,
    status: Option<ExitStatus>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// Starts it in a process group of its own, so that Ctrl-C on the terminal reaches the supervisor only.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn start(name: impl Into<String>, command: &mut Command) -> Result<Self> {
        let name = name.into();
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let stdout = child.stdout.take().context("standard output is piped")?;
        let stderr = child.stderr.take().context("standard error is piped")?;
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let said = Arc::new(Mutex::new(String::new()));
        let (to, text) = (Arc::clone(&seen), Arc::clone(&said));
        std::thread::spawn(move || read_status(stdout, &to));
        let saying = std::thread::spawn(move || read_said(stderr, &text));
        Ok(Process { name, child, seen, said, saying, started: Instant::now(), status: None })
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Since it was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said.
    pub fn seen(&self) -> Seen {
        lock(&self.seen.0).clone()
    }

    /// The end of what it said on stderr; of one that has ended, its last line is among it.
    pub fn said(&self) -> String {
        let deadline = Instant::now() + DRAIN;
        while self.status.is_some() && !self.saying.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        lock(&self.said).trim().to_owned()
    }

    /// From now on what is on its way gets no further; see [`Seen::in_transaction`].
    pub fn freeze(&self) {
        lock(&self.seen.0).freeze(Instant::now());
    }

    /// It goes on again.
    pub fn thaw(&self) {
        lock(&self.seen.0).thaw(Instant::now());
    }

    /// Waits until it has said `enough`, closed its output, or `patience` is over; says whether it has.
    pub fn wait_until(&self, patience: Duration, enough: impl Fn(&Seen) -> bool) -> bool {
        let waiting = |seen: &mut Seen| !enough(seen) && !seen.ended;
        let waited = self.seen.1.wait_timeout_while(lock(&self.seen.0), patience, waiting);
        enough(&waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    ///
    /// If the system does not know it.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))?;
        }
        Ok(self.status)
    }

    /// Whether it was ended by SIGKILL.
    ///
    /// # Errors
    ///
    /// As [`Process::ended`].
    pub fn was_killed(&mut self) -> Result<bool> {
        Ok(self.ended()?.is_some_and(|status| status.signal() == Some(Signal::KILL.as_raw())))
    }

    /// Sends a signal; nothing happens where it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_none()
            && let Some(pid) = Pid::from_raw(self.child.id() as i32)
        {
            kill_process(pid, signal).with_context(|| format!("cannot send a signal to {}", self.name))?;
        }
        Ok(())
    }

    /// SIGKILL; returns once it is gone and its pipe was read to the end: what it had said by then.
    ///
    /// # Errors
    ///
    /// If the system does not know it.
    pub fn kill(&mut self) -> Result<Seen> {
        self.signal(Signal::KILL)?;
        self.status = Some(self.child.wait().with_context(|| format!("cannot wait for {}", self.name))?);
        Ok(self.last_words())
    }

    /// All it said, once it has ended.
    pub fn last_words(&self) -> Seen {
        self.wait_until(DRAIN, |_| false);
        self.seen()
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// If it takes longer than `patience`, or does not exit 0.
    pub fn ends_well(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while self.ended()?.is_none() {
            if Instant::now() > deadline {
                bail!("{} does not end within {patience:?}; it said: {}", self.name, self.said());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        match self.status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{} ended with {status}; it said: {}", self.name, self.said()),
            None => Ok(()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail where it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_status(from: impl Read, to: &(Mutex<Seen>, Condvar)) {
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        let mut seen = lock(&to.0);
        match serde_json::from_str(&line) {
            Ok(Status::Phase { phase, step }) => seen.step_taken(phase, step),
            Ok(Status::Committed { commits, .. }) => seen.commits = commits,
            Ok(Status::Durable { lines }) => seen.durable = lines,
            Ok(Status::Started { .. } | Status::Open { .. } | Status::Done { .. }) => {}
            Err(_) => seen.listening |= line.starts_with("listening"),
        }
        to.1.notify_all();
    }
    lock(&to.0).ended = true;
    to.1.notify_all();
}

impl Seen {
    /// Whether output is in its open transaction: handed over, and for long enough to be in the log.
    pub fn in_transaction(&self) -> bool {
        self.in_transaction_at(Instant::now())
    }

    fn in_transaction_at(&self, now: Instant) -> bool {
        let until = self.frozen.unwrap_or(now);
        self.opened.is_some_and(|opened| until.saturating_duration_since(opened) >= ON_ITS_WAY)
    }

    fn freeze(&mut self, now: Instant) {
        self.frozen.get_or_insert(now);
    }

    /// The time in between counts for nothing.
    fn thaw(&mut self, now: Instant) {
        if let Some(frozen) = self.frozen.take() {
            self.opened =
                self.opened.map(|opened| opened + now.saturating_duration_since(opened.max(frozen)));
        }
    }

    fn step_taken(&mut self, phase: Option<String>, step: String) {
        self.phase = phase.unwrap_or_else(|| std::mem::take(&mut self.phase));
        match step.as_str() {
            "output" if self.ended_first => {
                self.has_output = true;
                self.opened.get_or_insert_with(Instant::now);
            }
            // From here on the transaction may have ended.
            "end" | "running" => self.opened = None,
            "outcome" | "released" => (self.opened, self.ended_first) = (None, true),
            // A start within the process.
            "recover" => (self.opened, self.ended_first) = (None, false),
            _ => {}
        }
        self.step = step;
    }
}

fn read_said(mut from: impl Read, to: &Mutex<String>) {
    let mut buffer = [0; 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let mut said = lock(to);
        said.push_str(&String::from_utf8_lossy(&buffer[..read]));
        if said.len() > 2 * SAID_BYTES {
            let mut cut = said.len() - SAID_BYTES;
            while !said.is_char_boundary(cut) {
                cut += 1;
            }
            said.drain(..cut);
        }
    }
}

/// A `produce` and the thread that feeds it.
#[derive(Debug)]
pub struct Producer {
    /// The process.
    pub process: Process,
    from: u64,
    given: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    feeder: Option<JoinHandle<()>>,
}

impl Producer {
    /// Starts it and feeds it the lines from number `from` on, so many a second.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn start(command: &mut Command, load: Load, from: u64, rate: u64) -> Result<Self> {
        let mut process = Process::start("the producer", command.stdin(Stdio::piped()))?;
        let mut stdin = process.child.stdin.take().context("standard input is piped")?;
        let (given, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ended) = (Arc::clone(&given), Arc::clone(&stop));
        let feeder = std::thread::spawn(move || {
            let began = Instant::now();
            let mut n = 0;
            while !ended.load(Ordering::Relaxed) {
                let due = (began.elapsed().as_millis() as u64 * rate / 1000).min(n + rate);
                let text: String = (n..due).map(|n| load.line(from + n) + "\n").collect();
                n = due;
                // Before the write: a line may be in the log that was only half written when the producer died.
                count.store(n, Ordering::SeqCst);
                if stdin.write_all(text.as_bytes()).is_err() {
                    return;
                }
                std::thread::sleep(FEED);
            }
        });
        Ok(Producer { process, from, given, stop, feeder: Some(feeder) })
    }

    /// Ends its input; it ends once all is durable.
    pub fn end_input(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(feeder) = self.feeder.take() {
            // It does not panic.
            let _ = feeder.join();
        }
    }

    /// What it was given and what it said of it, once the process has ended.
    pub fn produced(mut self) -> Produced {
        let seen = self.process.last_words();
        self.end_input();
        Produced { from: self.from, acked: seen.durable, given: self.given.load(Ordering::SeqCst) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_nothing_gets_further_brings_nothing_into_a_transaction() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut seen = Seen { opened: Some(at(0)), ..Seen::default() };
        assert!(!seen.in_transaction_at(at(99)));
        assert!(seen.in_transaction_at(at(100)));
        seen.freeze(at(40));
        assert!(!seen.in_transaction_at(at(5_000)), "stopped 40 ms after the output was handed over");
        seen.thaw(at(5_000));
        assert!(!seen.in_transaction_at(at(5_059)));
        assert!(seen.in_transaction_at(at(5_060)));
        // Handed over while whoever owns the log was stopped.
        let mut seen = Seen { opened: Some(at(500)), ..Seen::default() };
        seen.freeze(at(400));
        assert!(!seen.in_transaction_at(at(5_000)));
        seen.thaw(at(5_000));
        assert!(!seen.in_transaction_at(at(5_099)));
        assert!(seen.in_transaction_at(at(5_100)));
    }

    /// What a process said last is read to its end once it has ended, or its last word would be missed now and then.
    #[test]
    fn the_last_word_of_a_dead_process_is_heard() {
        let mut process =
            Process::start("sh", Command::new("sh").args(["-c", "echo last >&2; exit 3"])).unwrap();
        while process.ended().unwrap().is_none() {
            std::thread::yield_now();
        }
        assert_eq!(process.said(), "last");
    }
}
