//! Producer and job as processes of their own: started from this very program, listened to, killed.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The longest that anything may take which needs no luck: a busy machine is slow, not stuck.
const DEADLINE: Duration = Duration::from_secs(60);

/// How to start a process again and again.
#[derive(Clone, Debug)]
pub(crate) struct Role {
    name: &'static str,
    program: PathBuf,
    args: Vec<String>,
}

impl Role {
    pub(crate) fn new(name: &'static str, data: &Path, args: &[&str]) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let data = data.to_str().context("the data folder's name is not UTF-8")?;
        let mut all = vec![name.to_owned(), "--data".to_owned(), data.to_owned()];
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        Ok(Self { name, program, args: all })
    }

    pub(crate) fn start(&self) -> Result<Process> {
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start the {}", self.name))?;
        let stdout = child.stdout.take().context("its output is a pipe")?;
        let process = Process { name: self.name, stdin: child.stdin.take(), child, heard: Arc::default() };
        let heard = Arc::clone(&process.heard);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                heard.line(&line);
            }
            heard.end();
        });
        Ok(process)
    }
}

/// Of each kind of line (its first word) how many came, and the last one.
#[derive(Default)]
struct Heard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: BTreeMap<String, (u64, String)>,
    ended: bool,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut state = self.lock();
        let (count, last) = state.lines.entry(word.to_owned()).or_default();
        (*count, *last) = (*count + 1, rest.to_owned());
        self.changed.notify_all();
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until `enough` finds something, or the process's output ends; an error: neither came in time.
    fn wait<T>(
        &self,
        patience: Duration,
        mut enough: impl FnMut(&State) -> Option<T>,
    ) -> Result<Option<T>, ()> {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            let found = enough(&state);
            if found.is_some() || state.ended {
                return Ok(found);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(());
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A process that runs. Dropping it kills it.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    stdin: Option<ChildStdin>,
    heard: Arc<Heard>,
}

impl Process {
    /// Waits for a line that begins with this word, from now on, and returns the rest of it.
    pub(crate) fn says(&self, word: &str) -> Result<String> {
        let said = |state: &State| state.lines.get(word).cloned().unwrap_or_default();
        let (before, _) = said(&self.heard.lock());
        let after = self.heard.wait(DEADLINE, |state| Some(said(state)).filter(|(count, _)| *count > before));
        match after {
            Ok(Some((_, rest))) => Ok(rest),
            Ok(None) => bail!("the {} ended by itself", self.name),
            Err(()) => bail!("the {} has not said {word:?} within {} s", self.name, DEADLINE.as_secs()),
        }
    }

    /// SIGKILL: it gets no chance to do anything. Returns once it is gone.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill the {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends its input and waits for its own, orderly end, which may take `patience` beyond the usual.
    pub(crate) fn end(mut self, patience: Duration) -> Result<()> {
        self.stdin = None;
        let patience = DEADLINE + patience;
        // Its output ends with it.
        if self.heard.wait(patience, |state| state.ended.then_some(())).is_err() {
            bail!("the {} has not ended within {} s", self.name, patience.as_secs());
        }
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the {} failed: {status}", self.name);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
