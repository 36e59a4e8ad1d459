//! `streamctl new NAME`: writes a crate with a first job in it.
//!
//! ```text
//! NAME/ Cargo.toml      its own workspace; path dependencies on the toolkit's checkout; feature `program`
//!       Cargo.lock      a copy of the toolkit's: the same versions, so nothing of it is compiled twice
//!       src/lib.rs      the job        src/main.rs   the program (feature `program`: RocksDB)
//!       tests/crash.rs  the job with a virtual clock, crashed at every step (no C++)
//!       README.md  .gitignore
//! ```
//!
//! The files are in `new/template/`, with `__name__` (as given), `__crate__` (as Rust writes it) and `__Job__` (the type)
//! in the places of names: the Rust files are Rust as they stand, and `tests/new.rs` compiles and runs them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;

use crate::exit::Usage;
use crate::{note, toolkit};

/// `streamctl new ...`
#[derive(Debug, Args)]
pub struct New {
    /// The folder to make, and with its last part the name of crate and job: lower-case letters, digits, '-' and '_'.
    pub name: PathBuf,
    /// The checkout of Tidemill to depend on. Default: the one this program was built from.
    #[arg(long, value_name = "PATH")]
    pub tidemill: Option<PathBuf>,
}

/// The files by their place in the crate.
const TEMPLATE: [(&str, &str); 6] = [
    ("Cargo.toml", include_str!("new/template/Cargo.toml.in")),
    ("README.md", include_str!("new/template/README.md.in")),
    (".gitignore", include_str!("new/template/gitignore.in")),
    ("src/lib.rs", include_str!("new/template/src/lib.rs")),
    ("src/main.rs", include_str!("new/template/src/main.rs")),
    ("tests/crash.rs", include_str!("new/template/tests/crash.rs")),
];

/// Longest name: with its topics' suffixes it stays far below a topic name's limit.
const NAME_CHARS_MAX: usize = 64;

/// Runs the command.
pub fn run(args: &New) -> Result<()> {
    let names = Names::of(&args.name)?;
    let checkout = toolkit::checkout(args.tidemill.as_deref())?;
    names.check_against(&checkout)?;
    let dir = &args.name;
    // Never writes into a folder that is there, not even an empty one.
    fs::create_dir(dir).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            anyhow!("{} is there already; choose another name, or remove it first", dir.display())
        }
        std::io::ErrorKind::NotFound => {
            let parent = dir.parent().unwrap_or(dir);
            anyhow!("{} cannot be made: there is no folder {}", dir.display(), parent.display())
        }
        _ => anyhow::Error::new(error).context(format!("cannot make {}", dir.display())),
    })?;
    if let Err(error) = write(dir, &names, &checkout) {
        // It is this command's own folder, and half a crate is of no use.
        let _ = fs::remove_dir_all(dir);
        return Err(error);
    }
    let shown = shown(dir);
    note(format_args!("made {shown}: a job in src/lib.rs, its test in tests/crash.rs"));
    note(format_args!("  (cd {shown} && cargo test)        crashes the job at every step; compiles no C++"));
    let input = format!("{}-lines", names.package);
    note(format_args!("  printf '1431857103000 apple\\n' | streamctl produce {input} --create"));
    note(format_args!("  streamctl run {shown} --until-end"));
    Ok(())
}

/// The path as `streamctl run` takes it: with a slash, by which it differs from a job's name.
fn shown(dir: &Path) -> String {
    if dir.components().count() == 1 { format!("./{}", dir.display()) } else { dir.display().to_string() }
}

fn write(dir: &Path, names: &Names, checkout: &Path) -> Result<()> {
    for (place, text) in TEMPLATE {
        let text = text
            .replace("__tidemill__", &quoted(checkout)?)
            .replace("__streamctl__", &quoted(&checkout.join("streamctl"))?)
            .replace("__name__", &names.package)
            .replace("__crate__", &names.module)
            .replace("__Job__", &names.job);
        let path = dir.join(place);
        let made = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, text));
        made.with_context(|| format!("cannot write {}", path.display()))?;
    }
    let (from, to) = (checkout.join("Cargo.lock"), dir.join("Cargo.lock"));
    fs::copy(&from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// A path as a string of TOML. JSON's strings are TOML's basic strings.
fn quoted(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8, which Cargo.toml must be", path.display()))?;
    Ok(serde_json::Value::from(text).to_string())
}

/// The forms of a crate's name.
#[derive(Debug, PartialEq, Eq)]
struct Names {
    /// As cargo and `streamctl` know it: `page-hits`.
    package: String,
    /// As Rust code names it: `page_hits`.
    module: String,
    /// The job's type: `PageHits`.
    job: String,
}

/// Names that mean something else where the job is written: of the prelude and of Rust's own.
const TAKEN_TYPES: [&str; 32] = [
    "Box",
    "ByteSize",
    "Clone",
    "Debug",
    "Decoder",
    "Duration",
    "Encoder",
    "Eq",
    "Err",
    "Event",
    "EventTime",
    "Flow",
    "Job",
    "JobArgs",
    "JobSpec",
    "Json",
    "Key",
    "Malformed",
    "None",
    "Ok",
    "Option",
    "PartialEq",
    "Plan",
    "RecordRef",
    "Result",
    "Self",
    "Some",
    "String",
    "Text",
    "Timestamp",
    "Tumbling",
    "Window",
];

/// Names that cargo or rustc keep for themselves, and Rust's keywords.
const TAKEN_NAMES: [&str; 58] = [
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "bench",
    "box",
    "break",
    "build",
    "const",
    "continue",
    "core",
    "crate",
    "deps",
    "do",
    "dyn",
    "else",
    "enum",
    "examples",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "incremental",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "proc_macro",
    "pub",
    "ref",
    "return",
    "self",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "where",
];

impl Names {
    fn of(dir: &Path) -> Result<Names> {
        let Some(package) = dir.file_name().and_then(|name| name.to_str()) else {
            return Err(Usage::error(format!("{} does not end with a name", dir.display())));
        };
        let plain =
            package.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_');
        if !plain || !package.starts_with(|c: char| c.is_ascii_lowercase()) {
            return Err(Usage::error(format!(
                "{package:?} is no name for a crate: it begins with a lower-case letter and has only those, digits, '-' and '_'"
            )));
        }
        if package.len() > NAME_CHARS_MAX {
            return Err(Usage::error(format!(
                "{package:?} is too long for a name: {} characters, and at most {NAME_CHARS_MAX} are allowed",
                package.len()
            )));
        }
        let module = package.replace('-', "_");
        if TAKEN_NAMES.contains(&module.as_str()) || ["while", "yield", "virtual"].contains(&module.as_str())
        {
            return Err(Usage::error(format!(
                "{package:?} means something to Rust or cargo; choose another name"
            )));
        }
        let mut job: String = module.split('_').map(capitalised).collect();
        if TAKEN_TYPES.contains(&job.as_str()) {
            job.push_str("Job");
        }
        Ok(Names { package: package.to_owned(), module, job })
    }

    /// A crate that is named like one it depends on confuses cargo, and its program would overwrite the toolkit's.
    fn check_against(&self, checkout: &Path) -> Result<()> {
        let lock = checkout.join("Cargo.lock");
        let lock = fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
        if toolkit::locked(&lock).any(|locked| locked.name.replace('-', "_") == self.module) {
            return Err(Usage::error(format!(
                "{:?} is the name of a crate that Tidemill is made of; choose another name",
                self.package
            )));
        }
        // A case study is a folder with a program of its name; a job of the toolkit's has its state under its name.
        let case_study = checkout.join("examples").join(&self.package).join("main.rs").is_file();
        if case_study || tidemill_jobs::all().iter().any(|job| job.name == self.package) {
            return Err(Usage::error(format!(
                "{:?} is the name of a job or a program that Tidemill has itself; choose another name",
                self.package
            )));
        }
        Ok(())
    }
}

fn capitalised(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + chars.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_three_forms() {
        let names = Names::of(Path::new("some/where/page-hits_2")).unwrap();
        assert_eq!((names.package.as_str(), names.module.as_str()), ("page-hits_2", "page_hits_2"));
        assert_eq!(names.job, "PageHits2");
        // `Text` is the codec that the job uses.
        assert_eq!(Names::of(Path::new("text")).unwrap().job, "TextJob");
    }

    #[test]
    fn bad_names_are_refused_with_the_reason() {
        for (name, reason) in [
            ("", "does not end with a name"),
            ("..", "does not end with a name"),
            ("Words", "lower-case"),
            ("2words", "begins with a lower-case letter"),
            ("-words", "begins with a lower-case letter"),
            ("wörter", "lower-case"),
            ("wo rds", "lower-case"),
            ("test", "means something"),
            ("proc-macro", "means something"),
            (&"x".repeat(65), "too long"),
        ] {
            let error = Names::of(Path::new(name)).unwrap_err();
            assert!(error.to_string().contains(reason), "{name:?}: {error}");
            assert!(error.is::<Usage>(), "{name:?} is wrong usage");
        }
    }
}
