//! SIGKILL at moments that matter, and Ctrl-C: nothing is lost, nothing is counted twice.

mod common;

use common::{DEADLINE, World, settings};
use xtask::streamctl::Status;

/// Killed again and again after each commit while output rows are in the open transaction.
#[test]
fn a_run_killed_with_output_in_flight_is_exact_in_the_end() {
    let world = World::new();
    let text = world.generate(400_000, 21, &["--addresses", "2000"]);
    world.append(&text, 4);
    let mut kills = 0;
    while kills < 3 {
        let mut run =
            world.streamctl.start_run(&["ip-count", "--until-end", "--commit-interval", "20ms"]).unwrap();
        let mut committed = false;
        loop {
            match run.next(DEADLINE).unwrap() {
                Some(Status::Committed { .. }) => committed = true,
                Some(Status::Open { output_rows }) if committed && output_rows > 0 => {
                    run.kill().unwrap();
                    kills += 1;
                    break;
                }
                Some(Status::Started { .. } | Status::Open { .. }) => {}
                Some(Status::Done { .. }) | None => panic!("the run ended after {kills} kills"),
            }
        }
    }
    let rows = |isolation| {
        world.streamctl.values("ip-counts", isolation).unwrap().iter().filter(|b| **b == b'\n').count()
    };
    let (all, committed) = (rows("read-uncommitted"), rows("read-committed"));
    assert!(all > committed, "a careless reader saw nothing uncommitted: the kills proved nothing");
    world.ok(&["run", "ip-count", "--until-end"]);
    world.assert_exact(&text, settings(4));
}

/// Ctrl-C ends a run cleanly, after a commit; it goes on where it stopped.
#[test]
fn a_stopped_run_continues() {
    let world = World::new();
    let text = world.generate(400_000, 22, &["--addresses", "2000"]);
    world.append(&text, 4);
    let mut run = world.start(&["run", "ip-count", "--commit-interval", "20ms", "--status-lines"]);
    run.prints("\"event\":\"committed\"");
    run.interrupted();
    world.ok(&["run", "ip-count", "--until-end"]);
    world.assert_exact(&text, settings(4));
}
