//! Starts the real binary and waits for what it says, never for time to pass.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xtask::counted::Counted;
use xtask::recount::{Recount, Settings};
use xtask::streamctl::Streamctl;

/// The longest any single thing may take; the machine may be busy with other tests.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// A folder with a data directory in it, which is not there yet.
pub struct World {
    dir: TempDir,
    pub streamctl: Streamctl,
}

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let streamctl = Streamctl::new(env!("CARGO_BIN_EXE_streamctl"), dir.path().join("data"));
        World { dir, streamctl }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command to its end, with `input` on standard input.
    pub fn run_with(&self, args: &[&str], input: &[u8]) -> Ended {
        let mut child = self
            .streamctl
            .command(args)
            .env_remove("TIDEMILL_DATA")
            .env_remove("TIDEMILL_BROKER")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("streamctl starts");
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        // The command may end before it has read everything.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().expect("streamctl ends");
        feeder.join().expect("the feeder ends");
        Ended {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
        }
    }

    pub fn run(&self, args: &[&str]) -> Ended {
        self.run_with(args, b"")
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> Ended {
        let ended = self.run(args);
        assert_eq!(ended.code, Some(0), "streamctl {args:?}: {ended:#?}");
        ended
    }

    /// Runs a command that must end with this code and say each of these on stderr, and nothing on stdout.
    #[track_caller]
    pub fn fails(&self, args: &[&str], code: i32, says: &[&str]) {
        let ended = self.run(args);
        assert_eq!(ended.code, Some(code), "streamctl {args:?}: {ended:#?}");
        assert_eq!(ended.stdout, "", "streamctl {args:?}: data where there is none");
        for part in says {
            assert!(
                ended.stderr.contains(part),
                "streamctl {args:?} does not say {part:?}: {}",
                ended.stderr
            );
        }
    }

    /// Starts a command.
    pub fn start(&self, args: &[&str]) -> Process {
        Process::start(self.streamctl.command(args).env_remove("TIDEMILL_DATA").env_remove("TIDEMILL_BROKER"))
    }

    /// Generates an access log and returns its text.
    pub fn generate(&self, lines: u64, seed: u64, more: &[&str]) -> Vec<u8> {
        let (lines, seed) = (lines.to_string(), seed.to_string());
        let args: Vec<&str> = ["gen", "access-log", "--lines", &lines, "--seed", &seed]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        self.streamctl.output(&args).expect("gen works")
    }

    /// Appends lines to topic `access-log`, keyed by address.
    #[track_caller]
    pub fn append(&self, text: &[u8], partitions: u32) -> Ended {
        let partitions = partitions.to_string();
        let args =
            ["produce", "access-log", "--create", "--partitions", &partitions, "--key-regex", "^([^ ]+)"];
        let ended = self.run_with(&args, text);
        assert_eq!(ended.code, Some(0), "{ended:#?}");
        ended
    }

    /// What the job wrote so far, committed.
    pub fn counted(&self) -> Counted {
        let values = |topic| self.streamctl.values(topic, "read-committed").expect("consume works");
        Counted::read(&values("ip-counts"), &values("ip-counts-late"), &values("ip-count-dead-letter"))
            .expect("the job's rows have their form")
    }

    /// The job's output equals the recount of `text`.
    #[track_caller]
    pub fn assert_exact(&self, text: &[u8], settings: Settings) -> Counted {
        self.assert_equal(&Recount::of(settings, text), settings)
    }

    #[track_caller]
    pub fn assert_equal(&self, recount: &Recount, settings: Settings) -> Counted {
        let counted = self.counted();
        let differences = counted.differences(recount, settings.window_ms);
        assert!(differences.is_empty(), "{differences:#?}");
        counted
    }
}

/// The main job's defaults.
pub fn settings(partitions: u32) -> Settings {
    Settings { partitions, window_ms: 5_000, bound_ms: 10_000 }
}

/// A command that runs. Dropping it kills it.
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Lines,
    stderr: Lines,
}

struct Lines {
    coming: Receiver<String>,
    seen: Vec<String>,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let stdin = child.stdin.take();
        let stdout = Lines::of(child.stdout.take().expect("piped"));
        let stderr = Lines::of(child.stderr.take().expect("piped"));
        Process { child, stdin, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Gives it input.
    pub fn feed(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("its input is open");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("it reads its input");
    }

    /// Gives it input and ends the input, from a thread, so that the test goes on.
    pub fn feed_all(&mut self, bytes: Vec<u8>) {
        let mut stdin = self.stdin.take().expect("its input is open");
        std::thread::spawn(move || drop(stdin.write_all(&bytes)));
    }

    /// Ends its input.
    pub fn end_input(&mut self) {
        self.stdin = None;
    }

    /// Waits for a line on stderr that contains `part`.
    #[track_caller]
    pub fn says(&mut self, part: &str) -> String {
        match self.stderr.wait(part) {
            Ok(line) => line,
            Err(seen) => panic!("stderr never said {part:?}, but {seen:#?}"),
        }
    }

    /// Waits for a line on either stream that contains `part`.
    #[track_caller]
    pub fn says_anywhere(&mut self, part: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if self.stdout.has(part) || self.stderr.has(part) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "it never said {part:?}, but {:#?} and on stderr {:#?}",
                self.stdout.seen,
                self.stderr.seen
            );
        }
    }

    /// Waits for a line on stdout that contains `part`.
    #[track_caller]
    pub fn prints(&mut self, part: &str) -> String {
        match self.stdout.wait(part) {
            Ok(line) => line,
            Err(seen) => panic!(
                "stdout never had {part:?}, but {seen:#?}; stderr: {:#?}",
                self.stderr.rest(Duration::from_secs(1))
            ),
        }
    }

    /// The next line of stdout.
    #[track_caller]
    pub fn next_line(&mut self) -> String {
        self.prints("")
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")).expect("not 0");
        kill_process(pid, signal).expect("the process is there");
    }

    /// SIGKILL; returns once it is gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// Waits for its end: exit status and all it said, stdout then stderr.
    #[track_caller]
    pub fn ends(mut self) -> (ExitStatus, Vec<String>, Vec<String>) {
        self.stdin = None;
        let (stdout, stderr) = (self.stdout.rest(DEADLINE), self.stderr.rest(DEADLINE));
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it can be waited for") {
                return (status, stdout, stderr);
            }
            assert!(Instant::now() < deadline, "it does not end; {stdout:#?} {stderr:#?}");
            std::thread::yield_now();
        }
    }

    /// Ctrl-C must end it with exit 0.
    #[track_caller]
    pub fn interrupted(self) -> (Vec<String>, Vec<String>) {
        self.signal(Signal::INT);
        let (status, stdout, stderr) = self.ends();
        assert_eq!(status.code(), Some(0), "{stdout:#?} {stderr:#?}");
        (stdout, stderr)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Lines {
    fn of(from: impl Read + Send + 'static) -> Self {
        let (send, coming) = channel();
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line)).into_owned();
                if send.send(text).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Lines { coming, seen: Vec::new() }
    }

    fn wait(&mut self, part: &str) -> Result<String, Vec<String>> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.coming.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(part) {
                        return Ok(line);
                    }
                }
                Err(_) => return Err(std::mem::take(&mut self.seen)),
            }
        }
    }

    /// Whether a line so far contains `part`; waits a moment for the next one.
    fn has(&mut self, part: &str) -> bool {
        if let Ok(line) = self.coming.recv_timeout(Duration::from_millis(20)) {
            self.seen.push(line);
        }
        self.seen.iter().any(|line| line.contains(part))
    }

    /// All lines, until the other end closes.
    fn rest(&mut self, patience: Duration) -> Vec<String> {
        let deadline = Instant::now() + patience;
        loop {
            match self.coming.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout) => {
                    return std::mem::take(&mut self.seen);
                }
            }
        }
    }
}

/// The only file under `dir` whose name ends like this and that is not empty.
pub fn find(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(find(&path, ending));
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}
