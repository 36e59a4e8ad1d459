//! Runs each case study as its reader does, as a process, and compares what it prints with the transcript in its folder.
//!
//! A transcript is stdout, a line `--- stderr ---`, and stderr. What differs from run to run is masked: pids, ports,
//! times, folders, and what a kill at a random moment makes of a number. `TIDEMILL_BLESS=1 cargo test ...` writes the
//! transcripts anew; a change in them is reviewed like code.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use regex::Regex;

/// What is replaced in the output, in this order.
type Masks = &'static [(&'static str, &'static str)];

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().expect("the program starts")
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Runs a program, which must succeed, and compares with `file` in the folder of the case study.
#[track_caller]
fn transcript(case: &str, program: &str, args: &[&str], file: &str, masks: Masks) {
    let output = run(program, args);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{case} {args:?} failed\n{stdout}\n--- stderr ---\n{stderr}");
    let mut found = format!("{stdout}--- stderr ---\n{stderr}");
    for (pattern, mask) in masks {
        found = Regex::new(pattern).expect("a pattern").replace_all(&found, *mask).into_owned();
    }
    let path = folder(case).join(file);
    if std::env::var_os("TIDEMILL_BLESS").is_some() {
        fs::write(&path, &found).expect("the transcript can be written");
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let differs = |(a, b): &(&str, &str)| a != b;
    let first = kept.lines().zip(found.lines()).position(|lines| differs(&lines));
    assert!(
        kept == found,
        "{} differs from line {} on; with TIDEMILL_BLESS=1 this test writes what it is now:\n{found}",
        path.display(),
        first.unwrap_or_else(|| kept.lines().count().min(found.lines().count())) + 1
    );
}

#[test]
fn ip_count() {
    let masks: Masks = &[(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT")];
    transcript(
        "ip-count",
        env!("CARGO_BIN_EXE_ip-count"),
        &["--port", "0", "--speed", "60"],
        "transcript.txt",
        masks,
    );
}

#[test]
fn ip_count_of_an_access_log() {
    let log = folder("ip-count").join("access.log");
    let log = log.to_str().expect("a path of this repository");
    transcript("ip-count", env!("CARGO_BIN_EXE_ip-count"), &["file", log], "transcript-file.txt", &[]);
}

#[test]
fn exactly_once_undisturbed() {
    transcript(
        "ip-count-exactly-once",
        env!("CARGO_BIN_EXE_ip-count-exactly-once"),
        &["--kills", "0"],
        "transcript-undisturbed.txt",
        // Whichever of the two processes came first ended first, or did not.
        &[(r"(?m)^process \d+, which owned .*\n", ""), (r"(?m)^the connection to process .*\n", "")],
    );
}

#[test]
fn exactly_once_under_kills() {
    let masks: Masks = &[
        // How many windows there were by then, and what was open, is chance; that nothing is above or below is not.
        (r"(?m)^(exactly-once) +\d+ +(\d+) +(\d+) +0 +0$", "$1 KILLS N N 0 0"),
        (r"(?m)^(at-least-once) +\d+ +\d+ +\d+ +[1-9]\d* +0$", "$1 KILLS N N SOME 0"),
        (r"(?m)^(at-most-once) +\d+ +\d+ +\d+ +0 +[1-9]\d*$", "$1 KILLS N N 0 SOME"),
        (r"(?m)^  kill .*\n", ""),
        (r"(?m)^process \d+, which owned .*\n", ""),
        (r"(?m)^the connection to process .*\n", ""),
        (r"2024-05-17_\d\d:\d\d:\d\d 192\.168\.1\.\d", "MOMENT ADDRESS"),
        (r"add up to \d+", "add up to N"),
        (r"\d+ rows", "N rows"),
        (r"where \d+ are", "where N are"),
        (r#"" \d+ times"#, "\" N times"),
        (r"a reader of uncommitted data sees .*", "UNCOMMITTED"),
        (r"committed or not, a reader .*", "UNCOMMITTED"),
    ];
    transcript(
        "ip-count-exactly-once",
        env!("CARGO_BIN_EXE_ip-count-exactly-once"),
        &["--kills", "4"],
        "transcript.txt",
        masks,
    );
}

#[test]
fn life_of_a_message() {
    // Fields marked with * differ from run to run.
    let masks: Masks = &[
        (r"(?m)^.{8}\*(?: [0-9a-f]{2})+\n", ""),
        (r"(?m)^(.{8}\*) .{23}  (.{18}).*$", "$1 BYTES $2"),
        (r" +\n", "\n"),
    ];
    transcript("life-of-a-message", env!("CARGO_BIN_EXE_life-of-a-message"), &[], "transcript.txt", masks);
}

/// What the story says does a step is a file that is there.
#[test]
fn the_sources_that_the_story_names_exist() {
    let story = fs::read_to_string(folder("life-of-a-message").join("transcript.txt")).expect("a transcript");
    let names = Regex::new(r"[a-z]+(?:/[a-z_]+)*/[a-z_]+\.rs").expect("a pattern");
    let root = folder("..");
    let found: Vec<_> = names.find_iter(&story).map(|name| name.as_str().to_owned()).collect();
    assert!(found.len() > 15, "the test reads {} names: it looks at nothing", found.len());
    let missing: Vec<_> = found.iter().filter(|name| !root.join(name).is_file()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// Wrong arguments are wrong usage, and say so.
#[test]
fn wrong_usage_is_told() {
    for (program, args) in [
        (env!("CARGO_BIN_EXE_ip-count"), ["--speed", "0"]),
        (env!("CARGO_BIN_EXE_ip-count-exactly-once"), ["--guarantee", "twice"]),
        (env!("CARGO_BIN_EXE_life-of-a-message"), ["--what", "ever"]),
    ] {
        let output = run(program, &args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    let output = run(env!("CARGO_BIN_EXE_ip-count"), &["file", "no/such.log"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no/such.log"));
}
