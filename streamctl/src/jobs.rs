//! The jobs this program can run: its own first, then the ready-made ones.

use std::sync::OnceLock;

use anyhow::Result;
use tidemill::JobSpec;

use crate::exit::Usage;

/// Set once, before the command line is read. `streamctl` itself has none of its own.
static OWN: OnceLock<Vec<JobSpec>> = OnceLock::new();

/// Gives the program its own jobs. Later calls change nothing.
pub fn set_own(jobs: &[JobSpec]) {
    OWN.get_or_init(|| jobs.to_vec());
}

/// The program's own jobs.
pub fn own() -> &'static [JobSpec] {
    OWN.get().map_or(&[], Vec::as_slice)
}

/// Every job, by name; a job of its own hides a ready-made one of the same name.
pub fn all() -> Vec<JobSpec> {
    let ready_made = tidemill_jobs::all();
    let hidden = |job: &JobSpec| own().iter().any(|own| own.name == job.name);
    own().iter().copied().chain(ready_made.into_iter().filter(|job| !hidden(job))).collect()
}

/// How a command line calls a job: a crate by its path, another one by its name; none where this program does not have it.
pub fn word(name: &str) -> Option<String> {
    match own().iter().position(|own| own.name == name) {
        // `streamctl` knows a crate's first job, by the path.
        Some(at) => crate::user_crate::called().filter(|_| at == 0),
        None => all().iter().any(|job| job.name == name).then(|| name.to_owned()),
    }
}

/// The job of this name, or a usage error that lists those there are.
pub fn find(name: &str) -> Result<JobSpec> {
    let all = all();
    all.iter().find(|job| job.name == name).copied().ok_or_else(|| {
        let known: Vec<_> = all.iter().map(|job| job.name).collect();
        let known = known.join(", ");
        // A crate is a path, or else a folder could hide a job.
        let crate_here = std::path::Path::new(name).join("Cargo.toml").is_file();
        let meant =
            if crate_here { format!(". For the crate in that folder write ./{name}") } else { String::new() };
        Usage::error(format!("unknown job {name:?}; known are: {known}{meant}"))
    })
}
