//! Crash points, and the phases of a run: what `cargo xtask chaos` needs of the production binary.
//!
//! ```text
//!   TIDEMILL_CHAOS=1 TIDEMILL_CRASH_AT=end:3    the process gets SIGKILL, from itself, when a commit is about to end its
//!                                               transaction for the third time: no destructor runs, nothing is flushed
//!   run --status-lines                          {"event":"phase","phase":"committing","step":"end"} before each step
//! ```
//!
//! The steps are the moments of the log ([`tidemill_log::Moment`], names with `log-`) and those of a run
//! ([`tidemill::stream::Moment`]). The libraries read no environment: they call a probe, which is given to them only
//! where somebody listens. Without `TIDEMILL_CHAOS=1` a crash point is refused: it must not sleep in somebody's
//! profile.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Result;
use serde_json::json;
use tidemill::stream::{self, Phase};
use tidemill_log as log;

use crate::exit::Usage;

const ALLOW: &str = "TIDEMILL_CHAOS";
const CRASH_AT: &str = "TIDEMILL_CRASH_AT";

/// What this process was asked for. Set once, before anything runs.
static CRASH: OnceLock<CrashPoint> = OnceLock::new();
/// Whether phases are printed.
static TOLD: AtomicBool = AtomicBool::new(false);
/// Once a run closes it does not do anything else, whatever step that takes.
static CLOSING: AtomicBool = AtomicBool::new(false);

/// A step, and which time it is reached that the process dies.
#[derive(Debug)]
struct CrashPoint {
    step: &'static str,
    nth: u64,
    reached: AtomicU64,
}

/// Every step that a crash point can name, those of the log first.
pub fn steps() -> impl Iterator<Item = &'static str> {
    let log = log::Moment::ALL.into_iter().map(log::Moment::name);
    log.chain(stream::Moment::ALL.into_iter().map(stream::Moment::name))
}

/// Takes the crash point from the environment.
///
/// # Errors
///
/// If it is not allowed, or names no step.
pub fn install() -> Result<()> {
    let Some(text) = std::env::var_os(CRASH_AT) else { return Ok(()) };
    let allowed = std::env::var_os(ALLOW).is_some_and(|value| value == "1");
    let point = crash_point(&text.to_string_lossy(), allowed).map_err(Usage::error)?;
    // Called once, so it is never set already.
    let _ = CRASH.set(point);
    Ok(())
}

fn crash_point(text: &str, allowed: bool) -> Result<CrashPoint, String> {
    if !allowed {
        return Err(format!(
            "{CRASH_AT}={text:?} would kill this process at that step, which is only done with {ALLOW}=1; unset {CRASH_AT}, or \
             set both on purpose"
        ));
    }
    let wrong = || format!("{CRASH_AT}={text:?} is not of the form step:nth, such as end:3");
    let (name, nth) = text.split_once(':').ok_or_else(wrong)?;
    let nth = nth.parse().ok().filter(|nth| *nth > 0).ok_or_else(wrong)?;
    let step = steps().find(|step| *step == name).ok_or_else(|| {
        format!(
            "{CRASH_AT}: no step is called {name:?}; there are {}",
            steps().collect::<Vec<_>>().join(", ")
        )
    })?;
    Ok(CrashPoint { step, nth, reached: AtomicU64::new(0) })
}

/// Prints the phases of this process from now on; the first one is the start.
pub fn tell_phases() {
    TOLD.store(true, Ordering::Relaxed);
    line(Some(Phase::Start), "start");
}

/// What the log calls where this process owns one.
pub fn log_probe() -> log::Probe {
    if CRASH.get().is_none() && !TOLD.load(Ordering::Relaxed) {
        return log::Probe::default();
    }
    log::Probe::new(|moment| {
        use log::Moment as M;
        // Rounds come by the hundred a second: they are crash points and not told.
        let rare = !matches!(moment, M::Round | M::Written | M::Synced | M::Acked | M::Segments);
        if rare && TOLD.load(Ordering::Relaxed) {
            let phase = match moment {
                M::Open | M::Decided | M::Redone | M::OtherSlot | M::BothSlots => Some(Phase::Start),
                M::Close | M::Closed => Some(Phase::Closing),
                _ => None,
            };
            line(phase, moment.name());
        }
        reached(moment.name());
    })
}

/// What a run calls.
pub fn run_probe() -> stream::Probe {
    if CRASH.get().is_none() && !TOLD.load(Ordering::Relaxed) {
        return stream::Probe::default();
    }
    stream::Probe::new(|moment| {
        if TOLD.load(Ordering::Relaxed) {
            line(moment.phase(), moment.name());
        }
        reached(moment.name());
    })
}

/// Whoever reads this knows the phase before it begins: the line is in the pipe, which outlives the process.
fn line(phase: Option<Phase>, step: &str) {
    let closing = phase == Some(Phase::Closing);
    let phase = match CLOSING.fetch_or(closing, Ordering::Relaxed) {
        true => phase.map(|_| Phase::Closing),
        false => phase,
    };
    let text = json!({ "event": "phase", "phase": phase.map(Phase::name), "step": step });
    // Where nobody reads any more, the watcher of the run finds out and fails.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Counts a step and dies where it is the one.
fn reached(step: &str) {
    let Some(point) = CRASH.get().filter(|point| point.step == step) else { return };
    if point.reached.fetch_add(1, Ordering::SeqCst) + 1 == point.nth {
        // The thread does not come back from this call.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crash_points_are_steps_with_a_count() {
        let point = crash_point("end:3", true).unwrap();
        assert_eq!((point.step, point.nth), ("end", 3));
        for (text, says) in [
            ("end", "step:nth"),
            ("end:0", "step:nth"),
            ("end:x", "step:nth"),
            (":1", "no step is called"),
            ("start:1", "log-written, "),
        ] {
            let error = crash_point(text, true).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(crash_point("end:3", false).unwrap_err().contains("TIDEMILL_CHAOS=1"));
    }

    #[test]
    fn steps_have_names_of_their_own() {
        let mut names: Vec<_> = steps().collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        // Each commit step of the engine's table can be crashed at.
        for row in tidemill::engine::COMMIT_STEPS {
            assert!(names.contains(&stream::Moment::Commit(row.step).name()), "{row:?}");
        }
    }
}
