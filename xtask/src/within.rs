//! A child process that must be done in time: else it is killed with all that it started, and what it said is told.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

/// Starts the command in a process group of its own, gives it `input`, and returns what it printed, wherever that is piped.
///
/// # Errors
///
/// If it cannot be started, or is not done after `limit`: then its group is killed, and the error has the end of what it said.
pub fn output(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.process_group(0).spawn().with_context(|| format!("cannot start {name}"))?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a child has a process id")?;
    let (done, waits) = mpsc::channel();
    let input = input.to_owned();
    // Over once the pipes are closed, which the kill below sees to; so it is never left behind.
    let reader = thread::spawn(move || {
        let fed = child.stdin.take().map(|mut pipe| std::io::Write::write_all(&mut pipe, &input));
        let output = child.wait_with_output();
        let _ = done.send(fed.unwrap_or(Ok(())).and(output));
    });
    let received = waits.recv_timeout(limit);
    if received.is_err() {
        kill_process_group(group, Signal::KILL).with_context(|| format!("cannot kill {name}"))?;
    }
    let late = received.is_err();
    let output = received.or_else(|_| waits.recv()).context("the reader of its output is gone")?;
    reader.join().ok().context("the reader of its output panicked")?;
    let output = output.with_context(|| format!("cannot wait for {name}"))?;
    if late {
        let said = [output.stdout, output.stderr].concat();
        let tail = String::from_utf8_lossy(&said[said.len().saturating_sub(TAIL)..]).into_owned();
        bail!(
            "{name} was not done after {} s and was killed; the end of what it said:\n{tail}",
            limit.as_secs()
        );
    }
    Ok(output)
}

/// Bytes of output in an error.
const TAIL: usize = 4096;

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    fn bash(script: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    #[test]
    fn what_it_prints_comes_back() {
        let output = output(&mut bash("cat; exit 3"), b"given", Duration::from_secs(60)).unwrap();
        assert_eq!((output.stdout.as_slice(), output.status.code()), (&b"given"[..], Some(3)));
    }

    /// The pipe is held by a process that the killed one started, too.
    #[test]
    fn one_that_hangs_is_killed_with_all_it_started() {
        let error =
            output(&mut bash("echo here; sleep 1000 & wait"), b"", Duration::from_millis(300)).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("bash was not done") && said.ends_with("here\n"), "{said}");
    }
}
