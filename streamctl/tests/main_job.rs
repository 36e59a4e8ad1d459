//! Job `ip-count` on generated logs, by the real binary: every row, late line and dead letter against a recount.

mod common;

use common::{World, settings};
use xtask::recount::{Recount, Settings};

const LINES: u64 = 30_000;

/// One and four partitions, one to three tasks, a wide and a narrow bound: the output is a function of the input.
#[test]
fn any_number_of_partitions_and_tasks_gives_the_recount() {
    for (partitions, tasks, bound_s) in [(1, 1, 10), (1, 3, 60), (4, 1, 1), (4, 2, 10), (4, 3, 1)] {
        let world = World::new();
        let text = world.generate(LINES, 11, &["--addresses", "500", "--rate", "500"]);
        world.append(&text, partitions);
        let (tasks, bound) = (tasks.to_string(), format!("out_of_order={bound_s}s"));
        world.ok(&["run", "ip-count", "--until-end", "--tasks", &tasks, "--set", &bound]);
        let settings = Settings { bound_ms: bound_s * 1000, ..settings(partitions) };
        let counted = world.assert_exact(&text, settings);
        let (late, dead) = (counted.late.values().sum::<u64>(), counted.dead.values().sum::<u64>());
        assert_eq!(counted.counted() + late + dead, LINES);
        assert!(dead > 0 && (late > 0 || bound_s == 60), "{late} late, {dead} dead: the input shows nothing");
    }
}

/// A bounded run closes everything; what comes later for a closed window is late, newer windows are counted.
#[test]
fn bounded_runs_follow_one_another() {
    let world = World::new();
    let (first, second) = (world.generate(20_000, 1, &[]), {
        // Starts 5 s before the first log ends: part of it is for closed windows.
        world.generate(20_000, 2, &["--start", "2015-05-17T10:05:05Z"])
    });
    let mut recount = Recount::new(settings(4));
    world.append(&first, 4);
    let ended = world.ok(&["run", "ip-count", "--until-end"]);
    assert!(ended.stderr.contains("before their time"), "{}", ended.stderr);
    recount.add_all(&first);
    recount.end_bounded_run();
    world.assert_equal(&recount, settings(4));
    let late_before = recount.late.len();

    let ended = world.ok(&["run", "ip-count", "--until-end"]);
    assert!(ended.stderr.contains("nothing new"), "{}", ended.stderr);
    world.assert_equal(&recount, settings(4));

    world.append(&second, 4);
    world.ok(&["run", "ip-count", "--until-end"]);
    recount.add_all(&second);
    recount.end_bounded_run();
    world.assert_equal(&recount, settings(4));
    assert!(recount.late.len() > late_before + 1000, "lines for closed windows are late");
    assert!(recount.counts.len() > 1000);
}

/// Late lines keep key, value and timestamp; dead letters carry the reason beside them.
#[test]
fn dead_letters_say_why() {
    let world = World::new();
    world.append(b"1.1.1.1 - - [31/Feb/2015:10:05:00 +0000] \"GET / HTTP/1.1\" 200 1\nnonsense\n\n", 1);
    let said = world.ok(&["run", "ip-count", "--until-end"]).stderr;
    for part in ["; 3 are dead letters", "no window was closed before its time"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let dead = world.ok(&["consume", "ip-count-dead-letter", "--until-end", "--format", "json"]).stdout;
    let dead: Vec<serde_json::Value> = dead.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(dead.len(), 3, "{dead:#?}");
    for letter in &dead {
        assert_eq!(letter["headers"][0][0], "reason", "{letter}");
        assert!(letter["headers"][0][1].as_str().is_some_and(|reason| !reason.is_empty()), "{letter}");
    }
    assert_eq!(dead[0]["key"], "1.1.1.1");
    assert_eq!(dead[1]["value"], "nonsense");
    assert_eq!((&dead[2]["key"], &dead[2]["value"]), (&serde_json::Value::Null, &"".into()));
}

/// The identity remembers what it committed to.
#[test]
fn a_run_that_differs_from_its_identity_is_refused() {
    let world = World::new();
    world.append(&world.generate(100, 1, &[]), 1);
    world.ok(&["run", "ip-count", "--until-end"]);
    for set in ["window=10s", "out_of_order=1s", "output=elsewhere", "input=elsewhere"] {
        let value = set.split_once('=').unwrap().1;
        world.fails(
            &["run", "ip-count", "--until-end", "--set", set],
            2,
            &[value, "--name", "streamctl reset"],
        );
    }
    assert!(!world.ok(&["topic", "list"]).stdout.contains("elsewhere"), "a refused run makes nothing");
    world.ok(&[
        "run",
        "ip-count",
        "--until-end",
        "--set",
        "window=10s",
        "--set",
        "output=elsewhere",
        "--name",
        "other",
    ]);
}

/// So little memory that open windows do not fit: counts are evicted and read back.
#[test]
fn little_state_memory_gives_the_same_output() {
    let world = World::new();
    let text = world.generate(150_000, 5, &["--addresses", "50000", "--rate", "25000"]);
    world.append(&text, 4);
    world.ok(&["run", "ip-count", "--until-end", "--state-memory", "1MiB"]);
    world.assert_exact(&text, settings(4));
}
