//! The toolkit's checkout, as other crates are built against it: where it is, its lock file, its profiles, the C++
//! compiler it was built with.
//!
//! A user's crate is the root of its own build, and cargo takes profiles and lock file from the root alone. Both are
//! carried over from the checkout, or else everything, RocksDB included, would be compiled a second time.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::exit::Usage;

/// Written by `./x` into the target folder: a line `CC=...` and a line `CXX=...`, with nothing behind the sign where the
/// variable was not set. The build of RocksDB looks at both, and compiles it again where they differ.
const COMPILERS: &str = "x-compilers";

/// The checkout given, or the one this program was built from.
///
/// # Errors
///
/// Wrong usage, if it is none.
pub fn checkout(given: Option<&Path>) -> Result<PathBuf> {
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let root = given.unwrap_or(built_from);
    if let Some(missing) = missing_of_checkout(root) {
        return Err(Usage::error(match given {
            Some(_) => format!("{} is no checkout of Tidemill: {missing}", root.display()),
            None => format!(
                "the checkout of Tidemill this program was built from, {}, is gone; say where one is with --tidemill PATH",
                root.display()
            ),
        }));
    }
    root.canonicalize().with_context(|| format!("cannot resolve {}", root.display()))
}

/// What a folder lacks to be a checkout.
fn missing_of_checkout(root: &Path) -> Option<String> {
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap_or_default();
    if !manifest.lines().any(|line| line == "name = \"tidemill\"") {
        return Some("it has no Cargo.toml of package tidemill".to_owned());
    }
    let needed = ["Cargo.lock", "streamctl/Cargo.toml"];
    needed.iter().find(|file| !root.join(file).is_file()).map(|file| format!("it has no {file}"))
}

/// The text of a checkout's profiles: the tables `[profile...]` of its manifest.
pub fn profiles(manifest: &str) -> String {
    let mut inside = false;
    let mut text = String::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.starts_with("[profile.");
        }
        if inside {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// The C and C++ compilers that `./x` built `target` with: `CC` and `CXX`, each with its value where it had one. Nothing
/// where `./x` never built there.
pub fn compilers(target: &Path) -> Vec<(String, Option<String>)> {
    let text = fs::read_to_string(target.join(COMPILERS)).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once('='));
    let of =
        |(name, value): (&str, &str)| (name.to_owned(), Some(value.to_owned()).filter(|v| !v.is_empty()));
    lines.filter(|(name, _)| ["CC", "CXX"].contains(name)).map(of).collect()
}

/// A package of a lock file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Locked<'a> {
    pub name: &'a str,
    pub version: &'a str,
    /// Its whole entry, from `[[package]]` on.
    entry: &'a str,
}

/// The packages of a lock file, in its order.
pub fn locked(lock: &str) -> impl Iterator<Item = Locked<'_>> {
    let mut rest = lock.find(ENTRY).map_or("", |at| &lock[at..]);
    std::iter::from_fn(move || {
        let after = rest.strip_prefix(ENTRY)?;
        let end = after.find(ENTRY).map_or(rest.len(), |at| at + ENTRY.len());
        let (entry, next) = rest.split_at(end);
        rest = next;
        let value = |key: &str| {
            entry.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"'))
        };
        Some(Locked { name: value("name").unwrap_or(""), version: value("version").unwrap_or(""), entry })
    })
}

const ENTRY: &str = "[[package]]\n";

/// What cargo treats as one choice: the version up to its first number that is not zero.
fn compatible(version: &str) -> &str {
    let zeros = version.split('.').take_while(|part| *part == "0").count();
    let end = version.match_indices('.').nth(zeros).map_or(version.len(), |(at, _)| at);
    &version[..end]
}

/// The lock file `theirs` with the versions of `ours` wherever both have a package in compatible versions. Packages that
/// only `theirs` has stay as they are; those that only `ours` has are added, and cargo drops what nobody uses.
///
/// An entry may then name a dependency in a version that is gone: cargo chooses anew for it, from what is locked.
pub fn merged_lock(ours: &str, theirs: &str) -> String {
    let mine: Vec<Locked<'_>> = locked(ours).collect();
    let replaced = |their: &Locked<'_>| {
        mine.iter().any(|my| my.name == their.name && compatible(my.version) == compatible(their.version))
    };
    let mut entries: Vec<Locked<'_>> =
        mine.iter().copied().chain(locked(theirs).filter(|p| !replaced(p))).collect();
    entries.sort_by_key(|package| package.name);
    let head = &ours[..ours.find(ENTRY).unwrap_or(ours.len())];
    let entries: Vec<&str> = entries.iter().map(|package| package.entry.trim_end()).collect();
    format!("{head}{}\n", entries.join("\n\n"))
}

/// Whether `theirs` has a package in a version other than the compatible one of `ours`.
fn differ(ours: &str, theirs: &str) -> bool {
    let mine: Vec<Locked<'_>> = locked(ours).collect();
    locked(theirs).any(|their| {
        let same =
            |my: &&Locked<'_>| my.name == their.name && compatible(my.version) == compatible(their.version);
        mine.iter().find(same).is_some_and(|my| my.version != their.version)
    })
}

/// Brings a crate's lock file to the checkout's versions, where the checkout's is the newer file. Says whether it did.
///
/// Only then: a user who needs another version of something chooses it with cargo, and that choice stays until the
/// toolkit's own file changes.
pub fn follow_lock(checkout: &Path, crate_root: &Path) -> Result<bool> {
    let (from, to) = (checkout.join("Cargo.lock"), crate_root.join("Cargo.lock"));
    let ours = fs::read_to_string(&from).with_context(|| format!("cannot read {}", from.display()))?;
    let new = match fs::read_to_string(&to) {
        Ok(theirs) => {
            let written = |path: &Path| path.metadata().and_then(|about| about.modified());
            if written(&from)? <= written(&to)? || !differ(&ours, &theirs) {
                return Ok(false);
            }
            merged_lock(&ours, &theirs)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => ours,
        Err(error) => bail!("cannot read {}: {error}", to.display()),
    };
    fs::write(&to, new).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(packages: &[(&str, &str)]) -> String {
        let mut text = "# generated\nversion = 4\n\n".to_owned();
        for (name, version) in packages {
            text.push_str(&format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n\n"));
        }
        text
    }

    fn names(lock: &str) -> Vec<(&str, &str)> {
        locked(lock).map(|package| (package.name, package.version)).collect()
    }

    #[test]
    fn a_lock_file_is_read_entry_by_entry() {
        let own = include_str!("../../Cargo.lock");
        let count = own.matches("[[package]]").count();
        assert!(count > 100);
        assert_eq!(locked(own).count(), count);
        assert!(locked(own).all(|package| !package.name.is_empty() && !package.version.is_empty()));
        assert_eq!(
            locked(own).map(|package| package.entry.len()).sum::<usize>(),
            own.len() - own.find(ENTRY).unwrap()
        );
        assert_eq!(locked("").count(), 0);
        assert!(merged_lock(own, own) == own, "nothing to merge changes nothing");
    }

    #[test]
    fn merging_takes_compatible_versions_and_keeps_the_rest() {
        let ours = lock(&[("bytes", "1.12.1"), ("rand", "0.10.3"), ("tidemill", "0.1.0")]);
        let theirs = lock(&[
            ("bytes", "1.11.0"),
            ("csv", "1.3.0"),
            ("rand", "0.8.5"),
            ("rand", "0.10.1"),
            ("words", "0.1.0"),
        ]);
        assert!(differ(&ours, &theirs));
        let merged = merged_lock(&ours, &theirs);
        assert_eq!(
            names(&merged),
            [
                ("bytes", "1.12.1"),
                ("csv", "1.3.0"),
                ("rand", "0.10.3"),
                ("rand", "0.8.5"),
                ("tidemill", "0.1.0"),
                ("words", "0.1.0")
            ]
        );
        assert!(!differ(&ours, &merged));
        assert!(merged.starts_with("# generated\nversion = 4\n\n[[package]]\n"));
    }

    #[test]
    fn compatible_versions_are_cargos() {
        assert_eq!(["1.2.3", "0.10.3", "0.0.7", "2.0.0-rc.1"].map(compatible), ["1", "0.10", "0.0.7", "2"]);
    }

    #[test]
    fn profiles_are_cut_out_whole() {
        let own = include_str!("../../Cargo.toml");
        let text = profiles(own);
        assert!(text.starts_with("[profile.release]\ndebug = false\n"));
        assert_eq!(text.matches("[profile.").count(), own.matches("\n[profile.").count());
        assert!(!text.contains("[package]") && !text.contains("[features]") && !text.contains("[lints]"));
    }

    #[test]
    fn the_compilers_of_the_build_are_those_of_x() {
        let dir = tempfile::tempdir().unwrap();
        assert!(compilers(dir.path()).is_empty());
        fs::write(dir.path().join(COMPILERS), "CC=ccache gcc\nCXX=\nPATH=/evil\n").unwrap();
        let set = vec![("CC".to_owned(), Some("ccache gcc".to_owned())), ("CXX".to_owned(), None)];
        assert_eq!(compilers(dir.path()), set);
        assert!(include_str!("../../x").contains(COMPILERS), "./x writes the file that is read here");
    }
}
