//! How many files this process may have open.
//!
//! A partition has a file open for each of its last segment's parts, and a job's changelogs have 64 partitions each; so the
//! usual 1024 is soon too few. The soft limit is a default for programs that select(2) over descriptors, which none here
//! does: it is raised to the hard one. Where that is too low, too, the error is told with the limit and the remedy.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit as far as this process may. Where it may not, it runs with what it has.
pub fn raise_limit() {
    let now = getrlimit(Resource::Nofile);
    if now.current != now.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, ..now })
    {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// What to do about an error that says that there are no more files to be had; `None` if it says something else.
pub fn remedy(said: &str) -> Option<String> {
    let of = |errno| crate::exit::is_errno(said, errno);
    if of(rustix::io::Errno::MFILE) {
        let limit = getrlimit(Resource::Nofile).current;
        let limit = limit.map_or_else(|| "no number of".to_owned(), |limit| limit.to_string());
        return Some(format!(
            "the process that met this, this one or the one that serves the log, may have no more files open (`ulimit -n`; \
             this one may have {limit}). Nothing that was acknowledged is lost: raise its limit, such as \
             `ulimit -n 65536`, and start it again"
        ));
    }
    of(rustix::io::Errno::NFILE).then(|| {
        "this machine has as many files open as it may (sysctl fs.file-max). Nothing that was acknowledged is lost: raise \
         it, or end other programs, and run the command again"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lack_of_files_has_the_remedy() {
        let said = |errno: rustix::io::Errno| format!("open x: {}", std::io::Error::from(errno));
        assert!(remedy(&said(rustix::io::Errno::MFILE)).is_some_and(|text| text.contains("ulimit -n 65536")));
        assert!(remedy(&said(rustix::io::Errno::NFILE)).is_some_and(|text| text.contains("fs.file-max")));
        assert_eq!(remedy(&said(rustix::io::Errno::NOENT)), None);
    }
}
