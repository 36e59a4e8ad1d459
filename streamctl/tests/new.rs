//! `streamctl new`: what it writes, what it refuses; and the job it writes, compiled and crashed here as it stands.
//!
//! That cargo builds the crate, without C++, and that it runs, is shown by `./x prove` (docs/first-job.md).

mod common;

use std::fs;
use std::path::Path;

use common::World;

/// The job of the template, in the place of the crate it is written into.
#[allow(non_camel_case_types, unreachable_pub, reason = "its names are put in by `streamctl new`")]
#[path = "../src/new/template/src/lib.rs"]
mod __crate__;
include!("../src/new/template/tests/crash.rs");

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

#[test]
fn a_crate_is_written_whole() {
    let world = World::new();
    let dir = world.path("page-hits");
    let said = world.ok(&["new", dir.to_str().expect("UTF-8")]);
    assert_eq!(said.stdout, "");
    assert!(said.stderr.contains("streamctl run "), "{}", said.stderr);
    let mut files = Vec::new();
    collect(&dir, &mut files);
    files.sort();
    let names: Vec<_> =
        files.iter().map(|f| f.strip_prefix(&dir).expect("in it").display().to_string()).collect();
    assert_eq!(
        names,
        [
            ".gitignore",
            "Cargo.lock",
            "Cargo.toml",
            "README.md",
            "src/lib.rs",
            "src/main.rs",
            "tests/crash.rs"
        ]
    );
    for file in files.iter().filter(|file| !file.ends_with("Cargo.lock")) {
        let text = fs::read_to_string(file).expect("text");
        assert!(!text.contains("__"), "{} still has a placeholder: {text}", file.display());
    }
    let read = |name: &str| fs::read_to_string(dir.join(name)).expect(name);
    let manifest = read("Cargo.toml");
    assert!(manifest.contains("name = \"page-hits\""));
    let root = checkout().canonicalize().expect("it is there");
    assert!(manifest.contains(&format!("tidemill = {{ path = {root:?} }}")), "{manifest}");
    assert!(read("src/lib.rs").contains("pub struct PageHits {"));
    assert!(read("tests/crash.rs").contains("use page_hits::PageHits;"));
    assert_eq!(read("Cargo.lock"), fs::read_to_string(root.join("Cargo.lock")).expect("the lock file"));

    let before = fs::read_to_string(dir.join("src/lib.rs")).expect("the job");
    fs::write(dir.join("src/lib.rs"), "// mine\n").expect("written");
    world.fails(&["new", dir.to_str().expect("UTF-8")], 1, &["is there already", "choose another name"]);
    assert_eq!(read("src/lib.rs"), "// mine\n", "it was {before:?}");
}

fn collect(dir: &Path, into: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { collect(&path, into) } else { into.push(path) }
    }
}

#[test]
fn what_cannot_be_a_crate_is_refused() {
    let world = World::new();
    let path = |name: &str| world.path(name).to_str().expect("UTF-8").to_owned();
    world.fails(&["new", &path("Words")], 2, &["\"Words\"", "lower-case"]);
    world.fails(&["new", &path("test")], 2, &["\"test\"", "Rust or cargo"]);
    world.fails(&["new", &path("streamctl")], 2, &["\"streamctl\"", "Tidemill is made of"]);
    world.fails(&["new", &path("serde")], 2, &["\"serde\"", "Tidemill is made of"]);
    world.fails(&["new", &path("ip-count")], 2, &["\"ip-count\"", "that Tidemill has itself"]);
    world.fails(&["new", &path("life-of-a-message")], 2, &["that Tidemill has itself"]);
    world.fails(&["new", &path("no/where/words")], 1, &["there is no folder", "no/where"]);
    // A path that is no checkout: nothing there, and a crate that is another.
    world.fails(&["new", &path("words"), "--tidemill", &path("gone")], 2, &["is no checkout of Tidemill"]);
    let jobs = checkout().join("jobs");
    let jobs = jobs.to_str().expect("UTF-8");
    world.fails(
        &["new", &path("words"), "--tidemill", jobs],
        2,
        &["is no checkout of Tidemill", "package tidemill"],
    );
    for name in ["Words", "test", "streamctl", "serde", "ip-count", "life-of-a-message", "no", "words"] {
        assert!(!world.path(name).exists(), "{name} was made all the same");
    }
}

#[test]
fn a_crate_that_cannot_be_run_says_why() {
    let world = World::new();
    let path = |name: &str| world.path(name).to_str().expect("UTF-8").to_owned();
    world.fails(&["run", &path("gone")], 2, &["is no crate", "streamctl new NAME"]);
    world.fails(&["job", "describe", "./gone"], 2, &["./gone is no crate"]);
    world.fails(&["build", &path("gone")], 2, &["is no crate"]);
    // One that does not depend on a checkout.
    fs::create_dir_all(world.path("other/src")).expect("made");
    fs::write(world.path("other/Cargo.toml"), "[package]\nname = \"other\"\n[workspace]\n").expect("written");
    fs::write(world.path("other/src/main.rs"), "fn main() {}\n").expect("written");
    world.fails(&["run", &path("other")], 1, &["does not depend on the path of a checkout of Tidemill"]);
    // One whose program would replace one of Tidemill's in the folder both are built into.
    let program = format!(
        "[package]\nname = \"words\"\n[workspace]\n[[bin]]\nname = \"ip-count\"\npath = \"src/main.rs\"\n\
         [dependencies]\ntidemill = {{ path = {:?} }}\n",
        checkout()
    );
    fs::write(world.path("other/Cargo.toml"), program).expect("written");
    world.fails(&["build", &path("other")], 2, &["ip-count is the name of a crate or a program"]);
    // A manifest that cargo cannot read: its words.
    fs::write(world.path("other/Cargo.toml"), "[package\n").expect("written");
    world.fails(&["run", &path("other")], 1, &["Cargo.toml", "cargo cannot read"]);
}
