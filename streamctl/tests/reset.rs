//! `reset`, cut short before and after each of its writes: the job then runs on what it had, or not at all, and the same
//! command completes it.

mod common;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use common::World;

/// How often each row of the job's output is in its topic.
fn times(world: &World) -> BTreeMap<Vec<u8>, usize> {
    let mut times = BTreeMap::new();
    for row in
        world.streamctl.values("ip-counts", "read-committed").expect("consume works").split(|b| *b == b'\n')
    {
        if !row.is_empty() {
            *times.entry(row.to_vec()).or_insert(0) += 1;
        }
    }
    times
}

#[test]
fn a_reset_that_is_cut_short_anywhere_is_completed_by_the_next() {
    let world = World::new();
    let text = world.generate(4_000, 41, &["--addresses", "50"]);
    world.append(&text, 2);
    world.ok(&["run", "ip-count", "--until-end"]);
    let once = times(&world);
    assert!(once.len() > 10 && once.values().all(|n| *n == 1));
    let mut runs = 1;
    // Where a job started that was found after a cut: with all it had, not at all, and anew.
    let (mut untouched, mut refused, mut anew) = (0, 0, 0);
    // A round is what is written and synced at once. Before it, nothing of a change is there; after it, nobody was told.
    for step in ["log-round", "log-synced"] {
        for nth in 1.. {
            assert!(nth < 1_000, "{step} never ends");
            let mut reset = world.streamctl.command(["reset", "ip-count", "--yes"]);
            reset.env_remove("TIDEMILL_DATA").env_remove("TIDEMILL_BROKER");
            reset.env("TIDEMILL_CHAOS", "1").env("TIDEMILL_CRASH_AT", format!("{step}:{nth}"));
            let cut = reset.stdin(Stdio::null()).output().expect("streamctl starts");
            let killed = cut.status.signal() == Some(9);
            assert!(killed || cut.status.success(), "{step}:{nth}: {}", String::from_utf8_lossy(&cut.stderr));

            let found = world.run(&["run", "ip-count", "--until-end"]);
            if found.code == Some(1) {
                assert!(found.stderr.contains("streamctl reset ip-count"), "{step}:{nth}: {}", found.stderr);
                let completed = world.ok(&["reset", "ip-count", "--yes"]);
                assert!(completed.stderr.contains("was cut short"), "{step}:{nth}: {}", completed.stderr);
                world.ok(&["run", "ip-count", "--until-end"]);
                (refused, runs) = (refused + 1, runs + 1);
            } else if found.stderr.contains("nothing new since its last commit") {
                assert!(killed, "{step}:{nth}: it was reset, and its run found nothing");
                untouched += 1;
            } else {
                assert_eq!(found.code, Some(0), "{step}:{nth}: {}", found.stderr);
                (anew, runs) = (anew + 1, runs + 1);
            }
            let now = times(&world);
            assert!(now.keys().eq(once.keys()), "{step}:{nth}: other rows");
            assert!(now.values().all(|n| *n == runs), "{step}:{nth}: not every row {runs} times");
            if !killed {
                break;
            }
        }
    }
    assert!(untouched > 0 && refused > 0 && anew > 0, "{untouched} {refused} {anew}: not every case was met");
}

/// The command that `explain why-not-fired` advises runs, and closes the windows it was asked about.
#[test]
fn the_advice_for_open_windows_can_be_followed() {
    let world = World::new();
    world.append(&world.generate(6_000, 7, &["--addresses", "3", "--rate", "100"]), 2);
    let named =
        ["--name", "per-minute", "--set", "window=1m", "--set", "output=p.m", "--guarantee", "at-least-once"];
    let mut args =
        vec!["run", "ip-count", "--set", "idle_after=1h", "--commit-interval", "20ms", "--status-lines"];
    args.extend(named);
    let mut run = world.start(&args);
    while !run.prints("\"event\":\"committed\"").contains("\"committed_records\":6000") {}
    run.interrupted();
    let why = world.ok(&["explain", "why-not-fired", "per-minute"]).stdout;
    let advice = why.split('`').find(|part| part.starts_with("streamctl ")).expect(&why);
    assert!(advice.ends_with(" --until-end") && advice.contains("--guarantee at-least-once"), "{advice}");
    assert!(!advice.contains("--state"), "its state is where it is by default: {advice}");
    let mut words: Vec<&str> = advice.split(' ').skip(1).collect();
    // The test's own words name the directory already.
    let data = words.iter().position(|word| *word == "--data").expect(advice);
    assert_eq!(words[data + 1], world.streamctl.data().to_str().unwrap());
    words.drain(data..data + 2);
    world.ok(&words);
    let why = world.ok(&["explain", "why-not-fired", "per-minute"]).stdout;
    assert!(why.contains("no window is open"), "{why}");
}

/// Whoever looks at the data directory sees a run wherever it keeps its state.
#[test]
fn a_job_whose_state_is_elsewhere_is_seen_and_found() {
    let world = World::new();
    world.append(&world.generate(2_000, 42, &["--addresses", "20", "--rate", "40"]), 2);
    let (elsewhere, other) = (world.path("elsewhere"), world.path("other"));
    let [at, there] = [&elsewhere, &other].map(|path| path.display().to_string());
    let here = {
        let mut job = world.start(&["run", "ip-count", "--state", &at, "--set", "idle_after=1h"]);
        job.says("ip-count runs");
        // A first commit: until then nobody knows the job.
        let mut rows = world.start(&["consume", "ip-counts"]);
        rows.next_line();
        let here = format!("in process {}", job.id());
        for again in [&["run", "ip-count", "--until-end"][..], &["run", "ip-count", "--state", &there]] {
            world.fails(again, 1, &["runs already", &here]);
        }
        assert!(!other.exists(), "a run that is refused makes nothing");
        world.fails(&["reset", "ip-count", "--yes"], 1, &["ip-count runs", &here, "stop it first"]);
        assert!(world.ok(&["job", "list"]).stdout.contains(&here));
        let why = world.ok(&["explain", "why-not-fired", "ip-count"]).stdout;
        assert!(why.contains(&format!("the job runs {here}")), "{why}");
        job.interrupted();
        here
    };
    let store = world.ok(&["state", "list", "ip-count"]).stdout;
    assert!(store.contains("on disk") && !store.contains("rebuilds"), "{store}");
    let why = world.ok(&["explain", "why-not-fired", "ip-count"]).stdout;
    assert!(why.contains("does not run here") && !why.contains(&here), "{why}");
    assert!(why.contains(&format!(" --state {at} --until-end`")), "{why}");
    assert!(elsewhere.join("ip-count").is_dir());
    // A start that is refused, with its state at the default place, takes nothing from where the state is.
    world.fails(&["run", "ip-count", "--set", "window=1m"], 2, &["streamctl reset ip-count"]);
    let reset = world.ok(&["reset", "ip-count", "--yes"]).stderr;
    assert!(reset.contains(&format!("its state in {at}/ip-count")), "{reset}");
    assert!(!elsewhere.join("ip-count").exists());
    world.ok(&["run", "ip-count", "--until-end"]);
    assert!(world.streamctl.data().join("state/ip-count").is_dir());
    // One that is over before it is looked at again has said where its state is.
    world.ok(&["run", "ip-count", "--until-end", "--state", &there]);
    let reset = world.ok(&["reset", "ip-count", "--yes"]).stderr;
    assert!(reset.contains(&format!("its state in {there}/ip-count")), "{reset}");
}
