//! Commands and their mistakes, as a user meets them.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Instant;

use common::{DEADLINE, Process, World, find, settings};
use rustix::process::Signal;

#[test]
fn topics_are_created_listed_and_described() {
    let world = World::new();
    let data = world.streamctl.data().display().to_string();
    world.fails(&["topic", "list"], 1, &[&data, "topic create"]);
    assert!(!world.streamctl.data().exists(), "a command that only looks makes nothing");
    world.fails(&["topic", "create", "a/b"], 2, &["a/b"]);
    world.ok(&["topic", "create", "lines", "--partitions", "2"]);
    world.fails(&["topic", "create", "lines"], 1, &["lines", "already"]);
    assert_eq!(world.ok(&["topic", "list"]).stdout, "topic  partitions\nlines           2\n");
    world.fails(&["topic", "describe", "line"], 1, &["\"line\"", "lines", "topic create"]);
    world.run_with(&["produce", "lines"], b"one\ntwo\n");
    let described = world.ok(&["topic", "describe", "lines"]).stdout;
    assert_eq!(described.lines().count(), 3, "{described}");
    let ends: i64 = described
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().nth(2).unwrap().parse::<i64>().unwrap())
        .sum();
    assert_eq!(ends, 2, "{described}");
}

#[test]
fn wrong_usage_is_2_and_names_what_there_is() {
    let world = World::new();
    world.ok(&["topic", "create", "access-log"]);
    world.fails(&["run", "ip-cuont"], 2, &["ip-cuont", "ip-count"]);
    world.fails(&["job", "describe", "ip-cuont"], 2, &["ip-cuont", "ip-count"]);
    world.fails(
        &["run", "ip-count", "--set", "windwo=5s"],
        2,
        &["windwo", "window", "out_of_order", "idle_after"],
    );
    world.fails(&["run", "ip-count", "--set", "window=soon"], 2, &["window", "soon"]);
    world.fails(&["consume", "access-log", "--from", "7"], 2, &["--partition"]);
    world.fails(&["consume", "access-log", "--from", "newest"], 2, &["earliest, latest"]);
    world.fails(&["consume", "access-log", "--partition", "9"], 2, &["9", "4 partitions"]);
    world.fails(&["produce", "access-log", "--key-regex", "abc"], 2, &["capture group"]);
    world.fails(&["frobnicate"], 2, &["frobnicate"]);
}

#[test]
fn what_is_missing_is_named_with_the_command_that_makes_it() {
    let world = World::new();
    let data = world.streamctl.data().display().to_string();
    for args in [&["consume", "t"][..], &["produce", "t"], &["run", "ip-count"]] {
        world.fails(args, 1, &[&data, "topic create"]);
        assert!(!world.streamctl.data().exists(), "{args:?} made the directory");
    }
    world.ok(&["topic", "create", "other"]);
    world.fails(&["consume", "t"], 1, &["\"t\"", "streamctl topic create t"]);
    world.fails(&["produce", "t"], 1, &["\"t\"", "streamctl topic create t", "--create"]);
    world.fails(&["run", "ip-count", "--until-end"], 1, &["access-log", "streamctl topic create access-log"]);
    world.fails(&["produce", "other", "--file", "/does/not/exist"], 1, &["/does/not/exist", "No such file"]);
    world.fails(&["produce", "new", "--create", "--file", "/does/not/exist"], 1, &["/does/not/exist"]);
    assert!(
        !world.ok(&["topic", "list"]).stdout.contains("new"),
        "nothing is made for input that is not there"
    );
}

#[test]
fn lines_go_in_and_come_out() {
    let world = World::new();
    let ended = world.run_with(
        &["produce", "t", "--create", "--partitions", "1", "--key-regex", "^(\\w+)="],
        b"a=1\nno key\n\nb=\xc3\xbc\nlast",
    );
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(ended.stderr.contains("5 lines appended to t"), "{}", ended.stderr);
    assert!(ended.stderr.contains("3 of them do not match"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
    assert_eq!(world.ok(&["consume", "t", "--until-end"]).stdout, "a=1\nno key\n\nb=ü\nlast\n");
    assert_eq!(world.ok(&["consume", "t", "--until-end", "--from", "-2"]).stdout, "b=ü\nlast\n");
    assert_eq!(
        world.ok(&["consume", "t", "--until-end", "--from", "3", "--partition", "0"]).stdout,
        "b=ü\nlast\n"
    );
    assert_eq!(world.ok(&["consume", "t", "--until-end", "--from", "latest"]).stdout, "");
    assert_eq!(world.ok(&["consume", "t", "--max", "1"]).stdout, "a=1\n");
    assert_eq!(
        world.ok(&["consume", "t", "--until-end", "--from", "-99", "--max", "2"]).stdout,
        "a=1\nno key\n"
    );
    let json = world.ok(&["consume", "t", "--max", "2", "--format", "json"]).stdout;
    let records: Vec<serde_json::Value> =
        json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&records[0]["key"], &records[0]["value"]), (&"a".into(), &"a=1".into()));
    assert_eq!((&records[1]["key"], &records[1]["offset"]), (&serde_json::Value::Null, &1.into()));
    world.fails(&["consume", "t", "--from", "77", "--partition", "0", "--until-end"], 1, &["77"]);
}

#[test]
fn skip_lines_continues() {
    let world = World::new();
    world.run_with(&["produce", "t", "--create", "--partitions", "1"], b"1\n2\n");
    let ended = world.run_with(&["produce", "t", "--skip-lines", "2"], b"1\n2\n3\n4\n");
    assert!(ended.stderr.contains("2 lines appended"), "{}", ended.stderr);
    assert_eq!(world.ok(&["consume", "t", "--until-end"]).stdout, "1\n2\n3\n4\n");
}

#[test]
fn a_stopped_produce_says_what_is_durable() {
    let world = World::new();
    world.ok(&["topic", "create", "t", "--partitions", "1"]);
    let mut reader = world.start(&["consume", "t"]);
    let mut produce = world.start(&["produce", "t"]);
    produce.feed(b"1\n2\n3\n");
    // Seen by a reader: durable.
    for line in ["1", "2", "3"] {
        assert_eq!(reader.next_line(), line);
    }
    produce.signal(Signal::TERM);
    produce.says("3 leading lines are durable, 0 more are in doubt; continue with --skip-lines 3");
    let (status, ..) = produce.ends();
    assert_eq!(status.code(), Some(0));
}

/// Lines that are to be skipped are durable, whether they were read again or not: nothing is sent twice on that word.
#[test]
fn a_produce_that_ends_while_it_skips_keeps_its_place() {
    let world = World::new();
    world.run_with(&["produce", "t", "--create", "--partitions", "1"], b"1\n2\n3\n4\n");
    let mut produce = world.start(&["produce", "t", "--skip-lines", "4", "--status-lines"]);
    produce.feed(b"1\n2\n");
    produce.prints("{\"event\":\"durable\",\"lines\":4}");
    produce.signal(Signal::TERM);
    produce.says("4 leading lines are durable, 0 more are in doubt; continue with --skip-lines 4");
    assert_eq!(produce.ends().0.code(), Some(0));
    // The third line is too long: it fails before the skipped ones are through.
    let mut long = b"1\n2\n".to_vec();
    long.resize(10 << 20, b'x');
    let failed = world.run_with(&["produce", "t", "--skip-lines", "4"], &long);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    for part in ["line 3 is longer than", "4 leading lines are durable", "--skip-lines 4"] {
        assert!(failed.stderr.contains(part), "{part}: {}", failed.stderr);
    }
    let rest = world.run_with(&["produce", "t", "--skip-lines", "4"], b"1\n2\n3\n4\n5\n");
    assert_eq!(rest.code, Some(0), "{rest:?}");
    assert_eq!(world.ok(&["consume", "t", "--until-end"]).stdout, "1\n2\n3\n4\n5\n");
}

#[test]
fn a_topic_that_is_there_keeps_its_partitions_and_says_so() {
    let world = World::new();
    world.ok(&["topic", "create", "t", "--partitions", "1"]);
    let ended = world.run_with(&["produce", "t", "--create", "--partitions", "7"], b"1\n");
    assert!(ended.stderr.contains("is there already, with 1 partition; "), "{}", ended.stderr);
    let ended = world.run_with(&["produce", "t", "--create"], b"1\n");
    assert!(!ended.stderr.contains("already"), "{}", ended.stderr);
}

/// Also one that has what it wanted while nothing more comes.
#[test]
fn a_reader_that_goes_away_while_we_wait_ends_us() {
    let world = World::new();
    world.run_with(&["produce", "t", "--create", "--partitions", "1"], b"1\n2\n");
    let mut child = consumer(&world);
    let mut read = BufReader::new(child.stdout.take().unwrap());
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let (mut lines, mut waits) = (String::new(), String::new());
    while lines != "1\n2\n" {
        read.read_line(&mut lines).unwrap();
    }
    said.read_line(&mut waits).unwrap();
    assert!(waits.contains("waits at the end"), "{waits}");
    drop(read);
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!((child.wait().unwrap().code(), rest.as_str()), (Some(0), ""));
}

/// Whether a process has a handler for a signal: its bit in SigCgt of /proc/PID/status.
#[cfg(target_os = "linux")]
fn catches(pid: u32, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it is there");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("it has signals");
    let mask = u64::from_str_radix(mask.trim(), 16).expect("a mask");
    mask & (1 << (signal.as_raw() - 1)) != 0
}

/// Ends a command once it is so far and listens to signals: before that one ends it as it ends any process.
#[cfg(target_os = "linux")]
#[track_caller]
fn stops_before_it_begins(command: Process, so_far: impl Fn(u32) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !so_far(command.id()) || !catches(command.id(), Signal::TERM) {
        assert!(Instant::now() < deadline, "it does not get so far, or does not listen to signals");
        std::thread::yield_now();
    }
    command.signal(Signal::TERM);
    let (status, _, said) = command.ends();
    assert_eq!(status.code(), Some(0), "{said:?}");
    assert!(said.iter().any(|line| line == "stopped before it began"), "{said:?}");
}

/// Starts `consume t`, with both its streams piped.
fn consumer(world: &World) -> std::process::Child {
    let mut command = world.streamctl.command(["consume", "t"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Whoever waits for an owner that stands still can be stopped, and says that it had not begun.
#[cfg(target_os = "linux")]
#[test]
fn a_command_that_waits_for_the_owner_can_be_stopped() {
    let world = World::new();
    world.ok(&["topic", "create", "t", "--partitions", "1"]);
    let mut owner = world.start(&["consume", "t"]);
    owner.says("waits at the end");
    owner.signal(Signal::STOP);
    for args in [
        &["topic", "list"][..],
        &["consume", "t"],
        &["job", "describe", "ip-count"],
        &["explain", "plan", "ip-count"],
    ] {
        stops_before_it_begins(world.start(args), |_| true);
    }
    owner.signal(Signal::CONT);
    owner.interrupted();
}

/// So can one that owns the directory and stands in a system call: here it opens a pipe that nobody writes.
#[cfg(target_os = "linux")]
#[test]
fn a_command_that_opens_the_log_can_be_stopped() {
    let world = World::new();
    world.ok(&["topic", "create", "t", "--partitions", "1"]);
    let format = world.streamctl.data().join("format");
    std::fs::remove_file(&format).unwrap();
    assert!(Command::new("mkfifo").arg(&format).status().unwrap().success());
    // It holds LOCK once it is on its way into the log.
    let lock = || std::fs::read_to_string(world.streamctl.data().join("LOCK")).unwrap_or_default();
    let holds = |pid: u32| lock().trim_start().starts_with(&format!("{pid} "));
    stops_before_it_begins(world.start(&["topic", "list"]), holds);
}

#[test]
fn a_reader_of_our_output_may_go_away() {
    let world = World::new();
    let lines: String = (0..100_000).map(|i| format!("line {i}\n")).collect();
    world.run_with(&["produce", "t", "--create", "--partitions", "1"], lines.as_bytes());
    let mut child = consumer(&world);
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert_eq!(first, "line 0\n");
    // The reader is dropped: the pipe is closed.
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("rror"), "{output:?}");
}

#[test]
fn jobs_are_listed_and_described() {
    let world = World::new();
    // What is no directory may have been one: its offsets are not known to be none.
    std::fs::write(world.streamctl.data(), "").unwrap();
    let described = world.run(&["job", "describe", "ip-count"]);
    assert_eq!(described.code, Some(1), "{described:?}");
    assert!(
        described.stdout.contains("window") && described.stderr.contains("it is a file"),
        "{described:?}"
    );
    std::fs::remove_file(world.streamctl.data()).unwrap();
    assert!(world.ok(&["job", "list"]).stdout.contains("ip-count"));
    world.append(&world.generate(1000, 1, &[]), 2);
    let before = world.ok(&["job", "describe", "ip-count"]).stdout;
    for part in ["window", "5s", "out_of_order", "10s", "idle_after", "30s", "access-log", "ip-counts-late"] {
        assert!(before.contains(part), "{part}: {before}");
    }
    world.ok(&["run", "ip-count", "--until-end"]);
    let after = world.ok(&["job", "describe", "ip-count"]).stdout;
    let lags: Vec<&str> = after.lines().filter(|line| line.trim_start().starts_with("access-log")).collect();
    assert_eq!(lags.len(), 2, "a line a partition: {after}");
    assert!(lags.iter().all(|line| line.trim_end().ends_with(" 0")), "no lag: {after}");
}

/// A damaged segment fails its partition and names the file; the others stay readable.
#[test]
fn a_damaged_segment_is_named_and_the_other_partition_is_read() {
    let world = World::new();
    let lines: String = (0..20_000).map(|i| format!("line {i}\n")).collect();
    world.run_with(&["produce", "t", "--create", "--partitions", "2"], lines.as_bytes());
    let segments: Vec<_> = find(&world.streamctl.data().join("topics"), ".log")
        .into_iter()
        .filter(|path| std::fs::metadata(path).unwrap().len() > 10_000)
        .collect();
    assert!(!segments.is_empty(), "no segment to damage");
    let mut bytes = std::fs::read(&segments[0]).unwrap();
    // In the first batch, beyond its header.
    bytes[200] ^= 0x40;
    std::fs::write(&segments[0], bytes).unwrap();
    let results: Vec<_> = ["0", "1"]
        .map(|p| world.run(&["consume", "t", "--until-end", "--partition", p]))
        .into_iter()
        .collect();
    let failed: Vec<_> = results.iter().filter(|ended| ended.code != Some(0)).collect();
    assert_eq!(failed.len(), 1, "{results:#?}");
    assert_eq!(failed[0].code, Some(1));
    assert!(failed[0].stderr.contains(".log"), "names the file: {}", failed[0].stderr);
}

/// What is damaged where the directory is opened keeps everything from being appended, and says what helps.
#[test]
fn a_directory_that_is_read_only_for_damage_says_what_helps() {
    let world = World::new();
    world.run_with(&["produce", "t", "--create", "--partitions", "1"], b"1\n2\n");
    let segments = find(&world.streamctl.data().join("topics"), ".log");
    let segment = segments.iter().find(|path| std::fs::metadata(path).unwrap().len() > 0).expect("a segment");
    let whole = std::fs::read(segment).unwrap();
    let mut bytes = whole.clone();
    bytes[0] ^= 1;
    std::fs::write(segment, bytes).unwrap();
    let remedy = "Restore the file from a copy";
    let refused = world.run_with(&["produce", "t"], b"3\n");
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains(remedy) && !refused.stderr.contains("recovers it"), "{}", refused.stderr);
    world.fails(&["topic", "create", "u"], 1, &[remedy, ".log"]);
    world.fails(&["run", "ip-count", "--set", "input=t"], 1, &[remedy, ".log"]);
    std::fs::write(segment, whole).unwrap();
    world.run_with(&["produce", "t"], b"3\n");
    assert_eq!(world.ok(&["consume", "t", "--until-end"]).stdout, "1\n2\n3\n");
}

/// Too few files to be had is an error that names the limit and the remedy; what was acknowledged is there afterwards.
#[test]
fn a_process_without_file_descriptors_says_so_and_loses_nothing() {
    let world = World::new();
    let text = world.generate(2_000, 44, &["--addresses", "5"]);
    world.append(&text, 4);
    let binary = world.streamctl.binary().display().to_string();
    let data = world.streamctl.data().display().to_string();
    for (limit, command) in [
        // Not enough for the log, the socket, and the changelogs of a job.
        (16, "produce access-log"),
        (16, "serve --listen 127.0.0.1:0"),
        (20, "serve --listen 127.0.0.1:0"),
        (16, "run ip-count --until-end"),
        (60, "run ip-count --until-end"),
        (120, "run ip-count --until-end"),
    ] {
        let line = format!("ulimit -n {limit} && exec '{binary}' --data '{data}' {command}");
        let mut process = Process::start(Command::new("sh").args(["-c", &line]));
        process.end_input();
        let (status, stdout, stderr) = process.ends();
        let said = stderr.join("\n");
        assert_eq!(status.code(), Some(1), "{limit} {command}: {stdout:?} {said}");
        let limited =
            said.contains(&format!("this one may have {limit})")) && said.contains("`ulimit -n 65536`");
        assert!(limited, "{limit} {command}: {said}");
    }
    world.ok(&["run", "ip-count", "--until-end"]);
    world.assert_exact(&text, settings(4));
}
