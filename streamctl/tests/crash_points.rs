//! Crash points: refused unless allowed, and a death like SIGKILL's where they are reached.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};

use common::{World, settings};
use xtask::chaos::STEPS;

fn with(command: &mut Command, variables: &[(&str, &str)]) -> Output {
    let command = command.env_remove("TIDEMILL_DATA").envs(variables.iter().copied());
    command.stdin(Stdio::null()).output().expect("streamctl starts")
}

#[test]
fn a_crash_point_is_refused_unless_it_is_allowed_and_known() {
    let world = World::new();
    let list = format!("there are {}", STEPS.join(", "));
    for (variables, says) in [
        (vec![("TIDEMILL_CRASH_AT", "end:1")], "only done with TIDEMILL_CHAOS=1"),
        (vec![("TIDEMILL_CRASH_AT", "end:1"), ("TIDEMILL_CHAOS", "0")], "only done with TIDEMILL_CHAOS=1"),
        (vec![("TIDEMILL_CRASH_AT", "end"), ("TIDEMILL_CHAOS", "1")], "step:nth"),
        // The supervisor's list of steps is the binary's.
        (vec![("TIDEMILL_CRASH_AT", "lunch:1"), ("TIDEMILL_CHAOS", "1")], list.as_str()),
    ] {
        let output = with(&mut world.streamctl.command(["topic", "create", "t"]), &variables);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{variables:?}: {said}");
        assert!(said.contains(says), "{variables:?}: {said}");
    }
    assert!(!world.streamctl.data().exists(), "nothing was made");
}

/// One point of each kind: in a commit, in a recovery, in the log's open and in its close.
#[test]
fn a_process_dies_at_its_crash_point_and_the_next_one_goes_on() {
    let world = World::new();
    let text = world.generate(20_000, 31, &["--addresses", "200"]);
    world.append(&text, 4);
    for point in ["end:1", "outcome:1", "replayed:1", "log-other-slot:1", "closed:1", "log-slot-synced:1"] {
        let variables = [("TIDEMILL_CHAOS", "1"), ("TIDEMILL_CRASH_AT", point)];
        let mut run =
            world.streamctl.command(["run", "ip-count", "--until-end", "--commit-interval", "20ms"]);
        let output = with(&mut run, &variables);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(9), "{point}: {:?}, {said}", output.status);
        // Nothing after it: the process said no word of its end.
        assert!(!said.contains("all committed") || point.starts_with("log-"), "{point}: {said}");
    }
    world.ok(&["run", "ip-count", "--until-end"]);
    world.assert_exact(&text, settings(4));
}
