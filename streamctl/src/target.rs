//! What a command works on: a data directory, or a broker at an address.
//!
//! ```text
//! --data DIR | --broker HOST:PORT      an option, else
//! TIDEMILL_DATA | TIDEMILL_BROKER      the environment, else
//! ./tidemill-data
//! ```
//!
//! Two of one line contradict each other and are refused: guessing would write to the wrong log.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cli::DEFAULT_DATA;
use crate::exit::Usage;

/// Where a command finds its broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Through this data directory.
    Directory(PathBuf),
    /// At this address, `HOST:PORT`.
    Broker(String),
}

impl Target {
    /// Of the options, the environment, or the default.
    pub fn new(data: Option<&Path>, broker: Option<&str>) -> Result<Target> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::choose(data, broker, set("TIDEMILL_DATA"), set("TIDEMILL_BROKER"))
    }

    fn choose(
        data: Option<&Path>,
        broker: Option<&str>,
        data_set: Option<OsString>,
        broker_set: Option<OsString>,
    ) -> Result<Target> {
        match (data, broker) {
            (Some(_), Some(_)) => Err(Usage::error(
                "--data and --broker exclude each other: the broker has the data directory (a job's state goes to \
                 --state DIR)",
            )),
            (Some(data), None) => Ok(Target::Directory(data.to_owned())),
            (None, Some(broker)) => address(broker, "--broker"),
            (None, None) => match (data_set, broker_set) {
                (Some(_), Some(_)) => Err(Usage::error(
                    "TIDEMILL_DATA and TIDEMILL_BROKER are both set: say --data or --broker, or unset one",
                )),
                (None, Some(broker)) => address(&broker.to_string_lossy(), "TIDEMILL_BROKER"),
                (Some(data), None) => Ok(Target::Directory(data.into())),
                (None, None) => Ok(Target::Directory(DEFAULT_DATA.into())),
            },
        }
    }

    /// The option that makes another command work on the same, with a space before it; empty where none is needed.
    pub fn option(&self) -> String {
        if Target::new(None, None).is_ok_and(|usual| usual == *self) {
            return String::new();
        }
        match self {
            Target::Directory(path) => format!(" --data {}", quoted(&path.to_string_lossy())),
            Target::Broker(address) => format!(" --broker {}", quoted(address)),
        }
    }

    /// The data directory, for a command that reads or serves its files.
    pub fn directory(&self, command: &str) -> Result<&Path> {
        match self {
            Target::Directory(path) => Ok(path),
            Target::Broker(address) => Err(Usage::error(format!(
                "`streamctl {command}` works on the files of a data directory, not on the broker at {address}: run it on \
                 the broker's machine with --data DIR"
            ))),
        }
    }
}

/// As a shell takes it for one word.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Whether it resolves is the network's business; that it has a port is a question of spelling.
fn address(text: &str, from: &str) -> Result<Target> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => {
            Ok(Target::Broker(text.to_owned()))
        }
        _ => Err(Usage::error(format!("{from}: expected HOST:PORT, such as 127.0.0.1:7070, not {text:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_counts_before_the_environment() {
        let choose = |data: Option<&str>, broker, data_set: Option<&str>, broker_set: Option<&str>| {
            let chosen = Target::choose(
                data.map(Path::new),
                broker,
                data_set.map(Into::into),
                broker_set.map(Into::into),
            );
            chosen.map_err(|error| error.is::<Usage>())
        };
        let directory = |path: &str| Ok(Target::Directory(path.into()));
        let broker = |address: &str| Ok(Target::Broker(address.to_owned()));
        assert_eq!(choose(None, None, None, None), directory(DEFAULT_DATA));
        assert_eq!(choose(None, None, Some("a"), None), directory("a"));
        assert_eq!(choose(None, None, None, Some("h:1")), broker("h:1"));
        assert_eq!(choose(Some("b"), None, Some("a"), Some("h:1")), directory("b"));
        assert_eq!(choose(None, Some("[::1]:7"), Some("a"), Some("h:1")), broker("[::1]:7"));
        assert_eq!(choose(None, None, Some("a"), Some("h:1")), Err(true));
        assert_eq!(choose(Some("b"), Some("h:1"), None, None), Err(true));
        for wrong in ["localhost", ":7070", "h:0", "h:port", "h:70700", ""] {
            assert_eq!(choose(None, Some(wrong), None, None), Err(true), "{wrong}");
        }
    }
}
