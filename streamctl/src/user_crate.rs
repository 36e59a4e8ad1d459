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
//! What has a slash in it, and `.` and `..`, is a crate; no job's name may look like that.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs;
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
    if toolkit::follow_lock(&checkout, &metadata.workspace_root)? {
        note(format_args!(
            "{}: took the versions of Tidemill's",
            metadata.workspace_root.join("Cargo.lock").display()
        ));
    }
    let target = self::metadata(&cargo, &checkout.join("Cargo.toml"))?.target_directory;
    let profiles = write_profiles(&checkout, &target)?;
    let binary = program_of(package)?;

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
    built.with_context(|| format!("cargo built no program of {}", package.name))
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
