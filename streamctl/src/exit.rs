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

/// The exit code, after saying on stderr what failed.
pub fn code(result: anyhow::Result<()>) -> i32 {
    let Err(error) = result else { return 0 };
    if error.is::<Closed>() {
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
    if let Some(remedy) = crate::files::remedy(&said) {
        said = format!("{said}; {remedy}");
    }
    crate::note(format_args!("error: {said}"));
    if error.is::<Usage>() { 2 } else { 1 }
}
