//! SIGKILL at moments that matter, and Ctrl-C: nothing is lost, nothing is counted twice.

mod common;

use common::{DEADLINE, World, settings};
use xtask::streamctl::Status;

/// Killed again and again, each time after a commit while output rows are in the open transaction.
#[test]
fn a_run_killed_with_output_in_flight_is_exact_in_the_end() {
    let world = World::new();
    let text = world.generate(2_000_000, 21, &["--addresses", "2000"]);
    world.append(&text, 4);
    let rows = |isolation| {
        world.streamctl.values("ip-counts", isolation).unwrap().iter().filter(|b| **b == b'\n').count()
    };
    let (mut kills, mut uncommitted) = (0, 0);
    // Rows are reported when they are handed to the log; a kill may come before it took them, and is then repeated.
    while kills < 2 || uncommitted == 0 {
        assert!(kills < 10, "{kills} kills, and a careless reader never saw an uncommitted row");
        let mut run =
            world.streamctl.start_run(&["ip-count", "--until-end", "--commit-interval", "50ms"]).unwrap();
        let (mut committed, mut reported) = (false, 0);
        loop {
            match run.next(DEADLINE).unwrap() {
                Some(Status::Committed { .. }) => (committed, reported) = (true, 0),
                Some(Status::Open { output_rows }) if committed && output_rows > 0 && reported > 0 => break,
                Some(Status::Open { output_rows }) => reported = output_rows,
                Some(Status::Started { .. } | Status::Phase { .. } | Status::Durable { .. }) => {}
                Some(Status::Done { .. }) | None => panic!("the run ended after {kills} kills"),
            }
        }
        run.kill().unwrap();
        kills += 1;
        uncommitted = rows("read-uncommitted") - rows("read-committed");
    }
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
