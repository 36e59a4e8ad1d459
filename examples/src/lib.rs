//! What the case studies share: how they talk, where their data lies, and how they end.
//!
//! stdout carries the result and nothing else; everything that explains goes to stderr. A case study checks itself, and
//! ends with exit code 1 where the result is not what it should be.

use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// Says something on stderr. Where stderr is gone there is nobody to tell.
pub fn say(text: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Ends a program: 0 done, 1 failed. A reader that went away (`| head`) is no failure.
pub fn finish(result: Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let closed = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(closed) {
        return ExitCode::SUCCESS;
    }
    // Some errors repeat their cause in their own words.
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.last().is_none_or(|before| !before.contains(&cause)) {
            said.push(cause);
        }
    }
    say(format_args!("error: {}", said.join(": ")));
    ExitCode::FAILURE
}

/// Where a case study keeps its data: a folder that the user named and keeps, or one of its own that goes with it.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    own: Option<TempDir>,
}

impl Place {
    /// `named`, or a new temporary folder.
    ///
    /// # Errors
    ///
    /// If no folder can be made.
    pub fn new(named: Option<&Path>) -> Result<Self> {
        match named {
            Some(path) => Ok(Self { path: path.to_owned(), own: None }),
            None => {
                let own = tempfile::Builder::new().prefix("tidemill-example-").tempdir();
                let own = own.context("cannot make a temporary folder; name one with --data DIR")?;
                Ok(Self { path: own.path().join("data"), own: Some(own) })
            }
        }
    }

    /// The data directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps a temporary folder, for whoever wants to see what went wrong.
    pub fn keep(&mut self) {
        if let Some(own) = self.own.take() {
            let _kept = own.keep();
            say(format_args!("its data is kept in {}", self.path.display()));
        }
    }
}
