//! Plays a transcript: what its commands say now, in the form in which it is written.

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::Instant;

use regex::Regex;
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

use crate::common::{DEADLINE, Process};

/// Names for what differs from run to run, applied in this order.
static MASKS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let mask = |pattern: &str, name| (Regex::new(pattern).expect("a pattern"), name);
    vec![
        mask(r"\b(process|pid) \d+", "$1 [PID]"),
        mask(r"\b127\.0\.0\.1:\d+", "127.0.0.1:[PORT]"),
        mask(r"\b\d+\.\d+ s\b", "[SECONDS] s"),
        mask(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{32}\b", "[UUID]"),
        mask(r"\b20(2[4-9]|[3-9]\d)-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "[NOW]"),
        mask(r" *\b\d+(\.\d+)? (B|KiB|MiB|GiB)\b", " [SIZE]"),
        // Files of a directory, which depend on how often it was opened and what a checkpoint met.
        mask(r"(?m)(\[SIZE\]) +\d+$", "$1 [N]"),
        mask(r"(crc |crc is |expected |bytes )0x[0-9a-f]{8}\b", "$1[CRC]"),
        // A busy machine makes fewer, larger commits.
        mask(r#"(\bat offset |"changelog_offset":|"on_disk_behind":)(\d{1,3}(,\d{3})+|\d+|null)"#, "$1[N]"),
        mask(r"\b[\d,]+ commits?, phase \w+", "[N] commits, phase [PHASE]"),
    ]
});

/// A fresh folder, and the binary on the path.
pub(crate) struct World {
    dir: TempDir,
    path: std::ffi::OsString,
}

/// What a command came to.
pub(crate) struct Said {
    pub(crate) stdout: String,
    stderr: String,
    code: String,
}

impl World {
    pub(crate) fn new() -> Self {
        let bin = PathBuf::from(env!("CARGO_BIN_EXE_streamctl"));
        let mut path = bin.parent().expect("a folder").as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        Self { dir: tempfile::tempdir().expect("a temporary folder"), path }
    }

    fn command(&self, line: &str) -> Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new("sh");
        command
            .args(["-c", line])
            .current_dir(self.dir.path())
            .env("PATH", &self.path)
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .env_remove("TIDEMILL_DATA")
            .env_remove("TIDEMILL_LOG")
            .env_remove("TIDEMILL_BROKER")
            // A group of its own: `^C` reaches what the shell started, and not this test.
            .process_group(0);
        command
    }

    /// Runs a command to its end.
    pub(crate) fn sh(&self, line: &str) -> Said {
        let child =
            self.command(line).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let output = child.and_then(Child::wait_with_output).expect("sh runs");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Said { stdout: text(output.stdout), stderr: text(output.stderr), code: code(output.status) }
    }

    fn masked(&self, text: &str) -> String {
        let mut text = text.replace(&self.dir.path().display().to_string(), "[DIR]");
        for (pattern, name) in MASKS.iter() {
            text = pattern.replace_all(&text, *name).into_owned();
        }
        text
    }

    fn write(&self, said: &Said, to: &mut String) {
        for line in self.masked(&said.stdout).lines() {
            to.push_str(line);
            to.push('\n');
        }
        for line in self.masked(&said.stderr).lines() {
            to.push_str(format!("! {line}").trim_end());
            to.push('\n');
        }
        if said.code != "0" {
            to.push_str(&format!("? {}\n", said.code));
        }
    }
}

fn code(status: ExitStatus) -> String {
    status.code().map_or("signal".to_owned(), |code| code.to_string())
}

/// The transcript with what its commands say now.
pub(crate) fn play(world: &World, transcript: &str) -> String {
    let mut played = String::new();
    let mut lines = transcript.lines().peekable();
    let mut inside = false;
    let mut running: Option<Process> = None;
    while let Some(line) = lines.next() {
        let fence = line.starts_with("```");
        if !inside || fence {
            inside = !inside && line == "```console";
            played.push_str(line);
            played.push('\n');
            continue;
        }
        // What a command had said is left out here and said anew.
        let mut command = match line.split_at_checked(2) {
            Some(("$ " | "& " | "~ ", rest)) => rest.to_owned(),
            _ if line == "^C" => String::new(),
            _ => continue,
        };
        played.push_str(line);
        played.push('\n');
        while let Some(more) = lines.next_if(|next| next.starts_with("> ")) {
            played.push_str(more);
            played.push('\n');
            command.push('\n');
            command.push_str(&more[2..]);
        }
        match &line[..1] {
            "$" => world.write(&world.sh(&command), &mut played),
            "&" => {
                assert!(running.is_none(), "one command at a time is left running");
                // The shell gives way to the command, whose exit code is the one that counts.
                running = Some(Process::start(&mut world.command(&format!("exec {command}"))));
            }
            "~" => running.as_mut().expect("a command was left running").says_anywhere(&command),
            _ => {
                let process = running.take().expect("a command was left running");
                world.write(&interrupt(process), &mut played);
            }
        }
    }
    assert!(running.is_none(), "a command is still running: end it with ^C");
    played
}

/// Ctrl-C, as a terminal sends it: to the whole group.
fn interrupt(process: Process) -> Said {
    let group = Pid::from_raw(i32::try_from(process.id()).expect("a pid")).expect("not 0");
    kill_process_group(group, Signal::INT).expect("the group is there");
    let began = Instant::now();
    let (status, stdout, stderr) = process.ends();
    assert!(began.elapsed() < DEADLINE, "it ends when it is interrupted");
    let text = |lines: Vec<String>| lines.iter().map(|line| format!("{line}\n")).collect();
    Said { stdout: text(stdout), stderr: text(stderr), code: code(status) }
}
