//! A user's crate in the place of a job's name: `streamctl run ./words`.
//!
//! ```text
//!   streamctl run ./words --until-end
//!      │  cargo build, with the toolkit's target folder, profiles, compilers and lock file
//!      ▼
//!   exec words run ./words --until-end        the same words; TIDEMILL_CRATE=./words
//! ```
//!
//! The crate's program is this command line with the crate's job (`streamctl::main`), so every command and option that
//! takes a job takes a crate, and none of them is described twice. It takes the place of this process: signals,
//! standard streams and the exit code are its own.
//!
//! All crates share the toolkit's target folder, and cargo tells packages at the root of their workspaces apart by name and
//! version only: of two that are called the same it takes the one for the other. So the folder has a list of which crate a
//! name was built for last, and what was built for another one is removed first. A build has a lock while it does that, and
//! its program gets a place of its own.
//!
//! ```text
//!   <target>/tidemill-crates/.lock            locked while a crate is built
//!   <target>/tidemill-crates/<package>        the manifest that the name was built for last
//!   <target>/tidemill-crates/<package>-<hash of the manifest's path>/<program>
//! ```
//!
//! What has a slash in it, and `.` and `..`, is a crate; no job's name may look like that.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::exit::Usage;
use crate::{jobs, note, stdout, toolkit};

/// Says to the program of a crate how it was called, so that it knows itself by that name.
const CRATE: &str = "TIDEMILL_CRATE";

/// Turns a crate into its job's name. Where this is not the program of that crate it is built, and takes this process's
/// place. Does nothing to a job's name.
pub fn resolve(job: &mut String) -> Result<()> {
    if !(job.contains('/') || job == "." || job == "..") {
        return Ok(());
    }
    if std::env::var_os(CRATE).is_some_and(|built| built == job.as_str()) {
        let own = jobs::own().first();
        let own =
            own.with_context(|| format!("the program of {job} has no job: give `streamctl::main` one"))?;
        own.name.clone_into(job);
        return Ok(());
    }
    match build_and_become(job)? {}
}

/// The path of the crate whose program this is, as it was called.
pub fn called() -> Option<String> {
    std::env::var(CRATE).ok()
}

fn build_and_become(dir: &str) -> Result<Infallible> {
    let program = program(dir)?;
    let error = Command::new(&program).args(std::env::args_os().skip(1)).env(CRATE, dir).exec();
    Err(anyhow::Error::new(error).context(format!("cannot start {}", program.display())))
}

/// `streamctl build CRATE`: prints the program's path.
pub fn build_and_tell(dir: &str) -> Result<()> {
    let program = program(dir)?;
    stdout::line(format_args!("{}", program.display()))
}

/// The program of the crate in this folder, built.
fn program(dir: &str) -> Result<PathBuf> {
    let manifest = Path::new(dir).join("Cargo.toml");
    if !manifest.is_file() {
        return Err(Usage::error(format!(
            "{dir} is no crate: there is no {}. `streamctl new NAME` makes one; a job's name has no slash",
            manifest.display()
        )));
    }
    build(&manifest.canonicalize().with_context(|| format!("cannot resolve {}", manifest.display()))?)
}

/// What `cargo metadata` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_root: PathBuf,
    target_directory: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    default_run: Option<String>,
    dependencies: Vec<Dependency>,
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    path: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
    #[serde(default, rename = "required-features")]
    required_features: Vec<String>,
}

/// A line of `cargo build --message-format json`.
#[derive(Debug, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
enum Message {
    CompilerArtifact {
        target: Target,
        executable: Option<PathBuf>,
    },
    #[serde(other)]
    Other,
}

/// Builds a crate's program and says where it is. Cargo tells the user what it does and what is wrong.
fn build(manifest: &Path) -> Result<PathBuf> {
    let cargo = cargo()?;
    let metadata = metadata(&cargo, manifest)?;
    let package = metadata.packages.iter().find(|package| package.manifest_path == manifest);
    let package = package.with_context(|| {
        format!("{} is a workspace without a package; name the folder of the one to run", manifest.display())
    })?;
    let tidemill = package.dependencies.iter().find(|d| d.name == "tidemill").and_then(|d| d.path.as_deref());
    let tidemill = tidemill.with_context(|| {
        format!(
            "{} does not depend on the path of a checkout of Tidemill; write under [dependencies]: tidemill = {{ path = \"...\" }}",
            manifest.display()
        )
    })?;
    let checkout = toolkit::checkout(Some(tidemill))?;
    let toolkit = self::metadata(&cargo, &checkout.join("Cargo.toml"))?;
    let target = toolkit.target_directory;
    let binary = program_of(package)?;
    check_names(&toolkit.packages, &metadata.packages, &binary.name)?;
    if toolkit::follow_lock(&checkout, &metadata.workspace_root)? {
        note(format_args!(
            "{}: took the versions of Tidemill's",
            metadata.workspace_root.join("Cargo.lock").display()
        ));
    }
    let profiles = write_profiles(&checkout, &target)?;
    let crates = target.join(CRATES);
    let _turn = take_turn(&cargo, &crates, &target, manifest, &metadata.packages)?;

    let mut command = Command::new(&cargo);
    // From the checkout: so its own cargo settings and toolchain count, as they did when it was built.
    command.current_dir(&checkout).args([
        "build",
        "--release",
        "--message-format",
        "json-render-diagnostics",
    ]);
    command.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(&target);
    command.arg("--config").arg(profiles).arg("--bin").arg(&binary.name);
    command.arg("--package").arg(&package.name);
    if !binary.required_features.is_empty() {
        command.arg("--features").arg(binary.required_features.join(","));
    }
    for (name, value) in toolkit::compilers(&target) {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", cargo.to_string_lossy()))?;
    let mut built = None;
    for line in BufReader::new(child.stdout.take().context("its output is piped")?).lines() {
        let line = line.context("cannot read what cargo built")?;
        // What is no message is what a build script or a macro printed.
        if let Ok(Message::CompilerArtifact { target, executable: Some(path) }) = serde_json::from_str(&line)
            && target.name == binary.name
        {
            built = Some(path);
        }
    }
    let status = child.wait().context("cannot wait for cargo")?;
    if !status.success() {
        bail!("{} was not built; cargo says why above", package.name);
    }
    let built = built.with_context(|| format!("cargo built no program of {}", package.name))?;
    keep(&built, &crates, manifest, &package.name)
        .with_context(|| format!("cannot keep the program of {} in {}", package.name, crates.display()))
}

/// Both build into one folder: what is called like something of the toolkit's would replace it there.
fn check_names(toolkit: &[Package], packages: &[Package], program: &str) -> Result<()> {
    let programs = toolkit.iter().flat_map(|package| &package.targets);
    let programs = programs.filter(|target| target.kind.iter().any(|kind| kind == "bin"));
    let taken: Vec<&str> = toolkit
        .iter()
        .map(|package| &package.name)
        .chain(programs.map(|t| &t.name))
        .map(String::as_str)
        .collect();
    let named = packages.iter().map(|package| package.name.as_str()).chain([program]);
    match named.into_iter().find(|name| taken.contains(name)) {
        Some(name) => Err(Usage::error(format!(
            "{name} is the name of a crate or a program that Tidemill has itself, and both are built into one folder; \
             give yours another name in its Cargo.toml"
        ))),
        None => Ok(()),
    }
}

/// Which crate each package of the target folder was built for, and their programs.
const CRATES: &str = "tidemill-crates";

/// Waits for its turn to build, and removes what was built for other crates whose packages are called the same. The lock is
/// released when the file is dropped.
fn take_turn(
    cargo: &OsString,
    crates: &Path,
    target: &Path,
    manifest: &Path,
    packages: &[Package],
) -> Result<File> {
    let path = crates.join(".lock");
    let open = || {
        fs::create_dir_all(crates)?;
        File::options().write(true).create(true).truncate(false).open(&path)
    };
    let lock = open().with_context(|| format!("cannot open {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            note(format_args!("waits for another crate that is built in {}", target.display()));
            lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    let is = |package: &Package| package.manifest_path.display().to_string();
    let was = |package: &Package| fs::read_to_string(crates.join(&package.name)).unwrap_or_default();
    let others: Vec<&Package> = packages.iter().filter(|package| was(package) != is(package)).collect();
    if others.is_empty() {
        return Ok(lock);
    }
    let mut clean = Command::new(cargo);
    clean.args(["clean", "--quiet", "--release", "--manifest-path"]).arg(manifest);
    clean.arg("--target-dir").arg(target);
    for package in &others {
        clean.arg("--package").arg(&package.name);
    }
    let status = clean.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot start {}", cargo.to_string_lossy()))?;
    if !status.success() {
        bail!("cargo cannot remove what it built for another crate of the same name; it says why above");
    }
    for package in others {
        let name = crates.join(&package.name);
        fs::write(&name, is(package)).with_context(|| format!("cannot write {}", name.display()))?;
    }
    Ok(lock)
}

/// Gives a program a place where no other crate's build replaces it.
fn keep(built: &Path, crates: &Path, manifest: &Path, package: &str) -> std::io::Result<PathBuf> {
    let mut hash = DefaultHasher::new();
    manifest.hash(&mut hash);
    let dir = crates.join(format!("{package}-{:016x}", hash.finish()));
    let kept = dir.join(built.file_name().unwrap_or_default());
    let new = dir.join(format!(".new-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    // On one file system it takes no room; elsewhere it is copied.
    if fs::hard_link(built, &new).is_err() {
        fs::copy(built, &new)?;
    }
    fs::rename(&new, &kept)?;
    // Of two links to one file a rename removes neither.
    let _ = fs::remove_file(&new);
    Ok(kept)
}

/// The program to run: the only one, the one `default-run` names, or the one named like its package.
fn program_of(package: &Package) -> Result<&Target> {
    let programs: Vec<&Target> =
        package.targets.iter().filter(|target| target.kind.iter().any(|kind| kind == "bin")).collect();
    let wanted = package.default_run.as_ref().unwrap_or(&package.name);
    match programs.as_slice() {
        [] => bail!("{} has no program: src/main.rs is to call `streamctl::main`", package.name),
        [only] => Ok(only),
        several => several.iter().copied().find(|program| program.name == *wanted).ok_or_else(|| {
            let names: Vec<_> = several.iter().map(|program| program.name.as_str()).collect();
            anyhow!(
                "{} has several programs ({}); name one with `default-run` in its Cargo.toml",
                package.name,
                names.join(", ")
            )
        }),
    }
}

/// The file of profiles that cargo is given, for profiles of a dependency's own manifest do not count.
fn write_profiles(checkout: &Path, target: &Path) -> Result<PathBuf> {
    let manifest = checkout.join("Cargo.toml");
    let manifest =
        fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let file = target.join("tidemill-profiles.toml");
    fs::create_dir_all(target)
        .and_then(|()| fs::write(&file, toolkit::profiles(&manifest)))
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

fn metadata(cargo: &OsString, manifest: &Path) -> Result<Metadata> {
    let root = manifest.parent().unwrap_or(Path::new("/"));
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(manifest)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", cargo.to_string_lossy()))?;
    if !output.status.success() {
        // Cargo's words, as they are.
        note(format_args!("{}", String::from_utf8_lossy(&output.stderr).trim_end()));
        bail!("cargo cannot read {}", manifest.display());
    }
    serde_json::from_slice(&output.stdout).context("cannot read what `cargo metadata` says")
}

/// cargo: that of `$CARGO`, on the PATH, or where rustup puts it.
fn cargo() -> Result<OsString> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        return Ok(cargo);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    std::env::split_paths(&path)
        .chain(home.map(|home| home.join("bin")))
        .map(|dir| dir.join("cargo"))
        .find(|cargo| cargo.is_file())
        .map(PathBuf::into_os_string)
        .ok_or_else(|| {
            anyhow!("cargo is missing, and a crate is built with it. Install Rust (https://rustup.rs), then run this again")
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn package(manifest: &Path) -> Package {
        Package {
            name: "words".into(),
            manifest_path: manifest.to_owned(),
            default_run: None,
            dependencies: Vec::new(),
            targets: Vec::new(),
        }
    }

    #[test]
    fn what_was_built_for_another_crate_of_the_same_name_is_removed_first() {
        let dir = tempfile::tempdir().unwrap();
        let (cargo, crates) = (dir.path().join("cargo"), dir.path().join("target/tidemill-crates"));
        let told = dir.path().join("told");
        fs::write(&cargo, format!("#!/bin/sh\necho \"$@\" >>'{}'\n", told.display())).unwrap();
        fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
        let cleaned = |of: &str| {
            let _ = fs::remove_file(&told);
            let manifest = dir.path().join(of).join("Cargo.toml");
            let cargo = cargo.clone().into_os_string();
            let target = dir.path().join("target");
            take_turn(&cargo, &crates, &target, &manifest, &[package(&manifest)]).unwrap();
            fs::read_to_string(&told).unwrap_or_default()
        };
        assert!(cleaned("a").contains("--package words"), "nobody knows what is there");
        assert_eq!(cleaned("a"), "", "its own");
        assert!(cleaned("b").starts_with("clean --quiet --release"), "the other's");
        assert!(cleaned("a").contains("--package words"), "and back");
    }

    #[test]
    fn two_crates_of_one_name_have_a_program_each() {
        let dir = tempfile::tempdir().unwrap();
        let (built, crates) = (dir.path().join("words"), dir.path().join("crates"));
        let kept = |of: &str| {
            fs::write(&built, of).unwrap();
            let kept = keep(&built, &crates, Path::new(of), "words").unwrap();
            fs::remove_file(&built).unwrap();
            kept
        };
        let (a, b) = (kept("a/Cargo.toml"), kept("b/Cargo.toml"));
        assert_ne!(a, b);
        assert_eq!(fs::read_to_string(&a).unwrap(), "a/Cargo.toml");
        assert_eq!(kept("a/Cargo.toml"), a);
        assert_eq!(fs::read_to_string(&b).unwrap(), "b/Cargo.toml");
    }
}
