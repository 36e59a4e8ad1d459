//! A served directory, as its users meet it: over TCP, killed and started again under load, closed in order.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Process, World, settings};
use rustix::process::Signal;
use xtask::recount::Recount;
use xtask::streamctl::Streamctl;

/// `serve` on the world's directory, and where it listens.
fn serve(world: &World, listen: &str) -> (Process, String) {
    let mut serve = world.start(&["serve", "--listen", listen]);
    let address = serve.next_line().strip_prefix("listening on ").expect("the ready line").to_owned();
    (serve, address)
}

/// A command that knows nothing but an address, in a folder of its own.
fn remote(world: &World, args: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(world.streamctl.binary());
    command.args(args).current_dir(folder).env_remove("TIDEMILL_DATA").env_remove("TIDEMILL_BROKER");
    command
}

#[test]
fn every_command_works_over_an_address() {
    let world = World::new();
    std::fs::create_dir(world.streamctl.data()).unwrap();
    let (serve, address) = serve(&world, "127.0.0.1:0");
    let folder = world.path("elsewhere");
    std::fs::create_dir(&folder).unwrap();
    let run = |args: &[&str], input: &[u8]| {
        let args = [&["--broker", &address], args].concat();
        let mut process = Process::start(&mut remote(&world, &args, &folder));
        process.feed_all(input.to_vec());
        let (status, stdout, stderr) = process.ends();
        assert_eq!(status.code(), Some(0), "{args:?}: {stderr:#?}");
        stdout
    };
    run(&["topic", "create", "t", "--partitions", "1"], b"");
    run(&["produce", "t", "--key-delimiter", ",", "--compression", "gzip"], b"a,1\nb,2\nnone\n");
    assert_eq!(run(&["consume", "t", "--until-end"], b""), ["1", "2", "none"]);
    assert_eq!(run(&["consume", "t", "--until-end", "--from", "@2001-01-01T00:00:00Z"], b"").len(), 3);
    assert_eq!(run(&["topic", "describe", "t"], b"").len(), 2);
    run(&["topic", "alter", "t", "--partitions", "2"], b"");
    assert_eq!(run(&["topic", "describe", "t"], b"").len(), 3);
    // By the directory's socket, too; and the job keeps its state where it runs.
    let text = world.generate(5_000, 7, &[]);
    world.append(&text, 4);
    run(&["run", "ip-count", "--until-end"], b"");
    world.assert_exact(&text, settings(4));
    assert!(folder.join("tidemill-state/ip-count").is_dir());
    assert!(!world.streamctl.data().join("state").exists());
    let described = run(&["job", "describe", "ip-count"], b"");
    assert!(described.iter().any(|line| line.starts_with("access-log")), "{described:#?}");
    run(&["topic", "delete", "t"], b"");
    assert!(!run(&["topic", "list"], b"").iter().any(|line| line.starts_with("t ")));
    serve.signal(Signal::TERM);
    let (status, stdout, stderr) = serve.ends();
    assert_eq!((status.code(), stdout.len()), (Some(0), 1), "{stderr:#?}");
    assert!(stderr.iter().any(|line| line.starts_with("closed: ")), "{stderr:#?}");
    // Nobody is there now, and the error says what to do.
    let gone = Process::start(&mut remote(&world, &["--broker", &address, "topic", "list"], &folder));
    let (status, _, stderr) = gone.ends();
    assert_eq!(status.code(), Some(1));
    let remedy = format!("streamctl serve --listen {address}");
    assert!(stderr.iter().any(|line| line.contains(&remedy)), "{stderr:#?}");
}

#[test]
fn a_server_that_is_killed_and_started_again_costs_its_clients_nothing() {
    let world = World::new();
    let text = world.generate(200_000, 33, &["--addresses", "1000"]);
    world.ok(&["topic", "create", "access-log"]);
    let (mut server, address) = serve(&world, "127.0.0.1:0");
    let folder = world.path("elsewhere");
    std::fs::create_dir(&folder).unwrap();
    let start = |args: &[&str]| {
        let args = [args, &["--broker", &address]].concat();
        Process::start(&mut remote(&world, &args, &folder))
    };
    let mut run = start(&["run", "ip-count", "--set", "idle_after=1h", "--status-lines"]);
    run.prints("started");
    let mut reader = start(&["consume", "ip-counts"]);
    let mut produce = start(&["produce", "access-log", "--key-regex", "^([^ ]+)"]);
    for (number, piece) in text.chunks(text.len() / 20 + 1).enumerate() {
        produce.feed(piece);
        if number >= 10 {
            reader.next_line();
        }
        if matches!(number, 5 | 12) {
            server.kill();
            (server, _) = serve(&world, &address);
        }
    }
    produce.end_input();
    produce.says("200000 lines appended");
    run.interrupted();
    reader.interrupted();
    let (status, _, stderr) = start(&["run", "ip-count", "--until-end", "--set", "idle_after=1h"]).ends();
    assert_eq!(status.code(), Some(0), "{stderr:#?}");
    world.assert_equal(&Recount::of(settings(4), &text), settings(4));
    server.interrupted();
}

#[test]
fn what_cannot_be_served_says_why() {
    let world = World::new();
    let data = world.streamctl.data().display().to_string();
    world.fails(&["serve", "--listen", "127.0.0.1:0"], 1, &[&data, "topic create", &format!("mkdir {data}")]);
    assert!(!world.streamctl.data().exists());
    world.fails(&["serve", "--listen", "0.0.0.0:0"], 2, &["no authentication", "--insecure-listen"]);
    world.fails(&["serve", "--listen", "7070"], 2, &["HOST:PORT"]);
    world.ok(&["topic", "create", "t"]);
    let (server, address) = serve(&world, "127.0.0.1:0");
    world.fails(&["serve", "--listen", "127.0.0.1:0"], 1, &[&format!("process {} owns", server.id())]);
    let other = Streamctl::new(world.streamctl.binary(), world.path("other"));
    other.run_quietly(&["topic", "create", "t"]).unwrap();
    let taken = other.run_quietly(&["serve", "--listen", &address]).unwrap_err().to_string();
    assert!(taken.contains(&format!("cannot listen on {address}")), "{taken}");
    world.fails(&["topic", "list", "--broker", &address], 2, &["--data and --broker"]);
    server.interrupted();
}

#[test]
fn a_topic_that_a_job_needs_is_not_deleted() {
    let world = World::new();
    let text = world.generate(2_000, 8, &[]);
    world.append(&text, 2);
    world.ok(&["run", "ip-count", "--until-end"]);
    world.fails(
        &["topic", "delete", "access-log"],
        1,
        &["the input of job ip-count", "streamctl reset ip-count", "--force"],
    );
    for (topic, role) in [
        ("ip-counts", "is the output of job ip-count"),
        ("ip-counts-late", "has the late rows of job ip-count"),
        ("ip-count-dead-letter", "has the dead letters of job ip-count"),
    ] {
        world.fails(&["topic", "delete", topic], 1, &[role, "streamctl reset ip-count", "--force"]);
    }
    // A run may have its late rows elsewhere: then that is the topic the job needs.
    world.append(&world.generate(2_000, 9, &[]), 2);
    world.ok(&["run", "ip-count", "--until-end", "--set", "late=elsewhere"]);
    world.fails(&["topic", "delete", "elsewhere"], 1, &["has the late rows of job ip-count"]);
    world.ok(&["topic", "delete", "ip-counts-late"]);
    world.fails(&["topic", "delete", "_jobs"], 1, &["ip-count"]);
    let topics = world.ok(&["topic", "list"]).stdout;
    let changelog = topics.lines().map(|line| line.split(' ').next().unwrap());
    let changelog = changelog.into_iter().find(|name| name.ends_with("-changelog")).expect("a changelog");
    world.fails(&["topic", "delete", changelog, "--force"], 1, &["the state of job ip-count"]);
    world.fails(&["topic", "alter", changelog, "--partitions", "100"], 1, &["the state of job ip-count"]);
    world.fails(&["topic", "alter", "access-log", "--partitions", "1"], 1, &["cannot become 1"]);
    world.fails(&["topic", "alter", "access-log"], 2, &["--partitions"]);
    let altered = world.ok(&["topic", "alter", "access-log", "--partitions", "3"]).stderr;
    assert!(altered.contains("3 partitions (was 2)") && altered.contains("job ip-count"), "{altered}");
    world.ok(&["topic", "delete", "access-log", "--force"]);
    world.fails(&["topic", "describe", "access-log"], 1, &["no topic"]);
    // The job goes on with another topic of that name.
    world.append(&text, 3);
    world.ok(&["run", "ip-count", "--until-end"]);
}

/// Whoever says --force while the job runs makes it end, with words that say what was done to it.
#[test]
fn a_topic_deleted_under_a_running_job_ends_it_and_is_told() {
    for topic in ["access-log", "ip-count-dead-letter"] {
        let world = World::new();
        world.append(&world.generate(2_000, 8, &[]), 2);
        let mut run = world.start(&["run", "ip-count", "--commit-interval", "20ms", "--status-lines"]);
        run.prints("\"event\":\"committed\"");
        world.ok(&["topic", "delete", topic, "--force"]);
        if topic != "access-log" {
            world.append(b"no line of a log\n", 2);
        }
        let (status, _, said) = run.ends();
        let said = said.join("\n");
        assert_eq!(status.code(), Some(1), "{topic}: {said}");
        assert!(said.contains("was deleted while it ran"), "{topic}: {said}");
    }
}
