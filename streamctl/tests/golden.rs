//! Golden transcripts: `golden/*.md` are texts for people whose `console` blocks are run against the real binary.
//!
//! ```text
//! $ command        run to its end by `sh`, in a fresh folder of the transcript; `> ` continues the command
//! & command        started, and left running
//! ~ text           waits until the command left running has said this
//! ^C               interrupts it and waits for its end
//! line             a line of standard output
//! ! line           a line of standard error
//! ? 2              an exit code other than 0
//! ```
//!
//! Output is compared line by line after the parts that differ from run to run got the names in [`MASKS`]. Transcripts
//! are written anew only on purpose, by `TIDEMILL_GOLDEN=write cargo test --release -p streamctl --test golden`, and
//! reviewed like code. Each also proves that its commands follow one another: they share the folder.

mod common;
#[path = "golden/runner.rs"]
mod runner;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use runner::{World, play};

fn transcripts() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found: Vec<_> = fs::read_dir(dir)
        .expect("the transcripts are there")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "md"))
        .collect();
    found.sort();
    found
}

#[test]
fn transcripts_hold() {
    let write = std::env::var_os("TIDEMILL_GOLDEN").is_some_and(|how| how == "write");
    let queue = Mutex::new(transcripts());
    assert!(!queue.lock().unwrap().is_empty(), "no transcripts");
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(path) = queue.lock().unwrap().pop() else { return };
                    let expected = fs::read_to_string(&path).expect("a transcript is text");
                    let played = play(&World::new(), &expected);
                    if played == expected {
                        continue;
                    }
                    if write {
                        fs::write(&path, played).expect("the transcript can be written");
                    } else {
                        failures.lock().unwrap().push(difference(&path, &expected, &played));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{}\nTIDEMILL_GOLDEN=write cargo test --release -p streamctl --test golden  takes over what differs",
        failures.join("\n")
    );
}

/// The lines around the first difference.
fn difference(path: &Path, expected: &str, played: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (expected.lines().collect(), played.lines().collect());
    let same = old.iter().zip(&new).take_while(|(old, new)| old == new).count();
    let around = |lines: &[&str]| {
        let upto = lines.len().min(same + 12);
        lines[same.saturating_sub(3).min(upto)..upto].join("\n")
    };
    format!(
        "== {} line {}\n-- expected\n{}\n-- found\n{}",
        path.file_name().unwrap_or_default().to_string_lossy(),
        same + 1,
        around(&old),
        around(&new)
    )
}

/// Every command of the program is in a transcript, with what it prints where it works.
#[test]
fn every_command_has_a_transcript() {
    let world = World::new();
    let texts: String = transcripts().iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let mut open = vec![String::new()];
    let mut leaves = Vec::new();
    while let Some(command) = open.pop() {
        let help = world.sh(&format!("streamctl help {command}")).stdout;
        let listed =
            help.split("\nCommands:\n").nth(1).map(|rest| rest.split("\n\n").next().unwrap_or_default());
        let before = open.len();
        for line in listed
            .unwrap_or_default()
            .lines()
            .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        {
            let name = line.split_whitespace().next().expect("a command's name");
            if name != "help" {
                open.push(format!("{command} {name}").trim().to_owned());
            }
        }
        if open.len() == before && !command.is_empty() {
            leaves.push(command);
        }
    }
    assert!(leaves.len() > 5, "{leaves:?}");
    let missing: Vec<_> = leaves
        .iter()
        .filter(|leaf| {
            !texts
                .lines()
                .any(|line| line.starts_with(['$', '&']) && line.contains(&format!("streamctl {leaf}")))
        })
        .collect();
    assert!(missing.is_empty(), "no transcript shows {missing:?}");
}

#[test]
fn a_transcript_that_does_not_hold_is_noticed() {
    let played = play(
        &World::new(),
        "# t\n\n```console\n$ echo one; echo two >&2; exit 3\none\n! 2\n? 3\n```\n\nend\n",
    );
    assert_eq!(played, "# t\n\n```console\n$ echo one; echo two >&2; exit 3\none\n! two\n? 3\n```\n\nend\n");
    // A shell that began with SIGINT ignored (its parent may run in the background) would not end by it.
    let ends = "& env --default-signal=INT sh -c 'echo up; read line'\n~ up\n^C\n";
    let played = play(&World::new(), &format!("```console\n{ends}```\n"));
    assert_eq!(played, format!("```console\n{ends}up\n? signal\n```\n"));
}
