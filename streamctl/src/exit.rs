//! How a command ends: 0 done, 1 failed, 2 wrong usage.

use std::fmt;

use crate::stdout::Closed;

/// A mistake in the arguments that only shows once the command runs, such as an unknown job.
#[derive(Debug)]
pub struct Usage(String);

impl Usage {
    /// An error with exit code 2.
    pub fn error(text: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Usage(text.into()))
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A stop was asked for before the command had begun: nothing failed.
#[derive(Debug)]
pub struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped before it began")
    }
}

impl std::error::Error for Stopped {}

/// The exit code, after saying on stderr what failed.
pub fn code(result: anyhow::Result<()>) -> i32 {
    let Err(error) = result else { return 0 };
    if error.is::<Closed>() {
        return 0;
    }
    if error.is::<Stopped>() {
        crate::note(format_args!("{Stopped}"));
        return 0;
    }
    // A source that its wrapper already quotes is not said twice.
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said.push_str(": ");
            said.push_str(&cause);
        }
    }
    if let Some(remedy) = crate::files::remedy(&said).or_else(|| remedy(&said)) {
        said = format!("{said}; {remedy}");
    }
    crate::note(format_args!("error: {said}"));
    if error.is::<Usage>() { 2 } else { 1 }
}

/// Whether a failure of the system's with this number is told. By its text: what reaches a user crossed threads, crates and
/// sockets, and is text by then.
pub fn is_errno(said: &str, errno: rustix::io::Errno) -> bool {
    said.contains(&number(errno))
}

fn number(errno: rustix::io::Errno) -> String {
    format!("(os error {})", errno.raw_os_error())
}

/// What to do about a failure of the system's. What is said behind it helps against a full disk; against a refusal only what
/// the refusal is about does.
fn remedy(said: &str) -> Option<String> {
    use rustix::io::Errno;
    let of = |errno| is_errno(said, errno);
    if said.contains("cannot listen on") {
        return None;
    }
    if of(Errno::ACCESS) || of(Errno::PERM) {
        let user = rustix::process::geteuid().as_raw();
        return Some(format!(
            "the process that met this, this one (of user {user}) or the one that serves the log, may not do that: run it as \
             the owner, let the owner allow it, or name another place"
        ));
    }
    if of(Errno::ROFS) {
        return Some(
            "that file system is mounted read-only: mount it writable, or name another place".to_owned(),
        );
    }
    let full = |errno| said.rsplit_once(&number(errno)).is_some_and(|(_, more)| !more.contains("; "));
    (full(Errno::NOSPC) || full(Errno::DQUOT)).then(|| {
        "nothing that was acknowledged is lost. Free some space on that disk and run the command again"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_the_system_have_their_remedies() {
        let said = |errno: rustix::io::Errno| remedy(&format!("open x: {}", std::io::Error::from(errno)));
        assert!(said(rustix::io::Errno::ACCESS).is_some_and(|text| text.contains("of user")));
        assert!(said(rustix::io::Errno::ROFS).is_some_and(|text| text.contains("read-only")));
        assert!(said(rustix::io::Errno::NOSPC).is_some_and(|text| text.contains("Free some space")));
        assert_eq!(said(rustix::io::Errno::NOENT), None);
        let stopped = "the log stopped: Permission denied (os error 13); open the directory again";
        assert!(remedy(stopped).is_some_and(|text| text.contains("of user")));
        assert_eq!(remedy("cannot listen on [::1]:80: Permission denied (os error 13)"), None);
        assert_eq!(remedy("no room (os error 28); free some space"), None, "it has one");
    }
}
