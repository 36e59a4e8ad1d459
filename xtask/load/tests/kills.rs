//! The load and its check on the real binary: killed at random it finds nothing wrong, and whatever is taken away or
//! put there it notices. SIGKILL stands in for the power cut here, which needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, verb: &str, seed: u64) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill-load"));
        command.arg(verb).arg("--dir").arg(self.path("data")).arg("--history").arg(self.path("history"));
        command.arg("--acks").arg(self.path("acks")).arg("--seed").arg(seed.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs so many ops to their end.
    fn run(&self, seed: u64, ops: u64) {
        let output = self.command("run", seed).arg("--ops").arg(ops.to_string()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(self.acked(), ops);
    }

    fn acked(&self) -> u64 {
        fs::read_to_string(self.path("acks")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    fn check(&self, seed: u64) -> Output {
        self.command("check", seed).output().unwrap()
    }

    #[track_caller]
    fn notices(&self, seed: u64, what: &str) {
        let output = self.check(seed);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(what), "does not say {what:?}: {said}");
    }
}

#[track_caller]
fn is_right(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &to),
            false => assert!(fs::copy(&path, &to).is_ok()),
        }
    }
}

/// Waits until so many ops are acked, then kills.
fn kill_after(mut child: Child, place: &Place, acked: u64) {
    let since = Instant::now();
    while place.acked() < acked {
        assert!(since.elapsed() < Duration::from_secs(120), "{} acks so far", place.acked());
        assert!(child.try_wait().unwrap().is_none(), "the load ended by itself");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn killed_again_and_again_it_leaves_a_prefix() {
    let place = Place::new();
    for (seed, acked) in [(1, 40), (2, 300), (3, 150), (4, 700)] {
        let _ = fs::remove_file(place.path("acks"));
        kill_after(place.command("run", seed).spawn().unwrap(), &place, acked);
        let output = place.check(seed);
        is_right(&output);
        assert!(String::from_utf8_lossy(&output.stdout).contains("exactly a prefix"));
    }
    assert_eq!(fs::read_to_string(place.path("history")).unwrap().lines().count(), 4);
}

#[test]
fn what_is_lost_or_invented_is_noticed() {
    let place = Place::new();
    place.run(1, 150);
    copy(&place.path("data"), &place.path("old"));
    is_right(&place.check(1));
    place.run(5, 150);
    copy(&place.path("data"), &place.path("new"));

    // Acked ops that are not there: the directory as it was before them.
    fs::remove_dir_all(place.path("data")).unwrap();
    fs::rename(place.path("old"), place.path("data")).unwrap();
    place.notices(5, "LOST OR INVENTED");

    // Ops there that nobody asked for: a run of another seed.
    fs::remove_dir_all(place.path("data")).unwrap();
    copy(&place.path("new"), &place.path("data"));
    place.notices(6, "LOST OR INVENTED");

    // A damaged segment.
    let mut logs = Vec::new();
    find(&place.path("data/topics"), &mut logs);
    let log = logs.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = fs::read(log).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(log, bytes).unwrap();
    place.notices(5, "damaged");

    fs::remove_dir_all(place.path("data")).unwrap();
    fs::rename(place.path("new"), place.path("data")).unwrap();
    is_right(&place.check(5));
}

fn find(dir: &Path, logs: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find(&path, logs);
        } else if path.extension().is_some_and(|e| e == "log") {
            logs.push(path);
        }
    }
}
