//! Arguments of a job: `key=value` pairs with defaults, described well enough for `streamctl job describe`.
//!
//! `#[derive(JobArgs)]` lists the fields; the rules are here. Every value has one text form (what a user types, what
//! is printed, what a job's identity compares), and a default is text parsed by the same code as a user's value.
//!
//! Invariants
//! * `parse(text(v)) == v` for every [`ArgValue`].
//! * An unknown, repeated, missing or unreadable argument is an error that names what would have been right.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// One argument, as `job describe` prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArgSpec {
    /// The name before the equals sign.
    pub name: &'static str,
    /// What kind of text it takes: `duration`, `size`, `text`, ...
    pub kind: &'static str,
    /// Its doc comment.
    pub help: &'static str,
    /// The text used when it is not given; without one the argument is required.
    pub default: Option<&'static str>,
    /// Whether the state of a job depends on the value, so that a later run with another one is refused.
    pub guarded: bool,
}

/// What is wrong with the arguments given to a job. A usage error: nothing has been touched.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgError {
    /// Not of the form `key=value`.
    #[error("`{0}` is not of the form key=value")]
    NotAPair(String),
    /// No such argument.
    #[error("unknown argument `{name}`; known are: {known}")]
    Unknown {
        /// The name that was given.
        name: String,
        /// All names of the job.
        known: String,
    },
    /// Given twice.
    #[error("argument `{0}` is given twice")]
    Twice(String),
    /// Required and not given.
    #[error("argument `{0}` is required: give it as {0}=...")]
    Missing(String),
    /// The text cannot be read as the argument's kind.
    #[error("argument `{name}`: `{value}` is not a {kind}: {reason}")]
    Unreadable {
        /// The argument.
        name: String,
        /// The text that was given.
        value: String,
        /// What was expected.
        kind: &'static str,
        /// Why it was refused.
        reason: String,
    },
}

/// The arguments of a job, derived from its fields.
///
/// ```
/// use std::time::Duration;
/// use tidemill_stream::args::JobArgs;
///
/// #[derive(JobArgs, Debug)]
/// #[job_args(crate = "tidemill_stream")]
/// struct Args {
///     /// Topic to read.
///     #[arg(default = "access-log", guarded)]
///     input: String,
///     /// Length of a window.
///     #[arg(default = "5s", guarded)]
///     window: Duration,
/// }
///
/// let args = Args::parse(["window=1m"])?;
/// assert_eq!((args.input.as_str(), args.window), ("access-log", Duration::from_secs(60)));
/// let error = Args::parse(["windows=1m"]).unwrap_err();
/// assert_eq!(error.to_string(), "unknown argument `windows`; known are: input, window");
/// # Ok::<_, tidemill_stream::args::ArgError>(())
/// ```
pub trait JobArgs: Sized {
    /// The arguments in the order of the fields.
    const ARGS: &'static [ArgSpec];

    /// Takes each field from `values`. Written by the derive; call [`JobArgs::parse`].
    fn from_values(values: &mut ArgValues) -> Result<Self, ArgError>;

    /// Every argument with the text form of its value, in the order of the fields.
    fn values(&self) -> Vec<(&'static str, String)>;

    /// Reads `key=value` pairs; what is not given takes its default.
    fn parse<S: AsRef<str>>(pairs: impl IntoIterator<Item = S>) -> Result<Self, ArgError> {
        let mut values = ArgValues::new(Self::ARGS, pairs)?;
        Self::from_values(&mut values)
    }

    /// The values a job's state depends on, for the record of its identity.
    fn guarded(&self) -> Vec<(&'static str, String)> {
        let kept = |name: &str| Self::ARGS.iter().any(|a| a.name == name && a.guarded);
        self.values().into_iter().filter(|(name, _)| kept(name)).collect()
    }
}

pub use tidemill_stream_macros::JobArgs;

/// The pairs that were given, on their way into the fields.
#[derive(Debug)]
pub struct ArgValues {
    specs: &'static [ArgSpec],
    given: BTreeMap<String, String>,
}

impl ArgValues {
    /// Splits `pairs` and checks their names against `specs`.
    pub fn new<S: AsRef<str>>(
        specs: &'static [ArgSpec],
        pairs: impl IntoIterator<Item = S>,
    ) -> Result<Self, ArgError> {
        let mut given = BTreeMap::new();
        for pair in pairs {
            let pair = pair.as_ref();
            let (name, value) = pair.split_once('=').ok_or_else(|| ArgError::NotAPair(pair.to_owned()))?;
            // The flags of a command line are spelt with dashes; both spellings name the field.
            let name = name.trim().replace('-', "_");
            if !specs.iter().any(|s| s.name == name) {
                let known = specs.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
                let known = if known.is_empty() { "none".to_owned() } else { known };
                return Err(ArgError::Unknown { name, known });
            }
            if given.insert(name.clone(), value.to_owned()).is_some() {
                return Err(ArgError::Twice(name));
            }
        }
        Ok(Self { specs, given })
    }

    /// The value of argument `name`: what was given, else its default.
    pub fn take<T: ArgValue>(&mut self, name: &'static str) -> Result<T, ArgError> {
        let default = self.specs.iter().find(|s| s.name == name).and_then(|s| s.default);
        let text = match (self.given.remove(name), default) {
            (Some(text), _) => text,
            (None, Some(text)) => text.to_owned(),
            (None, None) => return Err(ArgError::Missing(name.to_owned())),
        };
        T::parse(&text).map_err(|reason| ArgError::Unreadable {
            name: name.to_owned(),
            value: text,
            kind: T::KIND,
            reason,
        })
    }
}

/// A type an argument can have.
pub trait ArgValue: Sized {
    /// The word for it in descriptions and errors.
    const KIND: &'static str;
    /// Reads the text form; the error says why it cannot.
    fn parse(text: &str) -> Result<Self, String>;
    /// The text form, the same for equal values.
    fn text(&self) -> String;
}

impl ArgValue for String {
    const KIND: &'static str = "text";
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("it is empty".to_owned()) } else { Ok(text.to_owned()) }
    }
    fn text(&self) -> String {
        self.clone()
    }
}

impl ArgValue for bool {
    const KIND: &'static str = "yes or no";
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "true" | "yes" | "on" | "1" => Ok(true),
            "false" | "no" | "off" | "0" => Ok(false),
            _ => Err("write yes or no".to_owned()),
        }
    }
    fn text(&self) -> String {
        if *self { "yes".to_owned() } else { "no".to_owned() }
    }
}

macro_rules! numbers {
    ($($ty:ty),*) => {$(
        impl ArgValue for $ty {
            const KIND: &'static str = "number";
            fn parse(text: &str) -> Result<Self, String> {
                text.parse().map_err(|e: std::num::ParseIntError| e.to_string())
            }
            fn text(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
numbers!(u8, u16, u32, u64, usize, i8, i16, i32, i64);

impl ArgValue for Duration {
    const KIND: &'static str = "duration";
    fn parse(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text).map_err(|e| format!("{e}; write it like 200ms, 5s or 1m 30s"))
    }
    fn text(&self) -> String {
        humantime::format_duration(*self).to_string()
    }
}

/// A number of bytes, written like `64KiB`, `256MiB`, `1GiB` or plain `1048576`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(_, bytes)| self.0 >= *bytes && self.0.is_multiple_of(*bytes));
        let (name, bytes) = unit.unwrap_or(&("B", 1));
        write!(f, "{}{name}", self.0 / bytes)
    }
}

impl std::str::FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const HELP: &str = "write it like 64KiB, 256MiB or 1GiB";
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| HELP.to_owned())?;
        let unit = unit.trim();
        let bytes = match UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
            Some((_, bytes)) => *bytes,
            None if unit.is_empty() => 1,
            None => return Err(format!("unknown unit `{unit}`; {HELP}")),
        };
        number.checked_mul(bytes).map(Self).ok_or_else(|| "too large".to_owned())
    }
}

impl ArgValue for ByteSize {
    const KIND: &'static str = "size";
    fn parse(text: &str) -> Result<Self, String> {
        text.parse()
    }
    fn text(&self) -> String {
        self.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPECS: &[ArgSpec] = &[
        ArgSpec { name: "input", kind: "text", help: "", default: Some("a"), guarded: true },
        ArgSpec { name: "idle_after", kind: "duration", help: "", default: None, guarded: false },
    ];

    fn values(pairs: &[&str]) -> Result<ArgValues, ArgError> {
        ArgValues::new(SPECS, pairs)
    }

    #[test]
    fn mistakes_name_what_would_have_been_right() {
        let say = |pairs: &[&str]| values(pairs).map(|_| ()).unwrap_err().to_string();
        assert_eq!(say(&["input"]), "`input` is not of the form key=value");
        assert_eq!(say(&["outptu=x"]), "unknown argument `outptu`; known are: input, idle_after");
        assert_eq!(say(&["input=x", "input=y"]), "argument `input` is given twice");
        let missing = values(&[]).unwrap().take::<Duration>("idle_after").unwrap_err();
        assert_eq!(missing.to_string(), "argument `idle_after` is required: give it as idle_after=...");
        let bad = values(&["idle-after=5"]).unwrap().take::<Duration>("idle_after").unwrap_err();
        assert!(bad.to_string().starts_with("argument `idle_after`: `5` is not a duration: "), "{bad}");
    }

    #[test]
    fn a_value_may_hold_an_equals_sign() {
        assert_eq!(values(&["input=a=b"]).unwrap().take::<String>("input").unwrap(), "a=b");
    }

    proptest! {
        #[test]
        fn text_reads_back(bytes: u64, millis in 0..10_000_000_000u64, flag: bool, n: i64) {
            prop_assert_eq!(ByteSize::parse(&ByteSize(bytes).text()), Ok(ByteSize(bytes)));
            let d = Duration::from_millis(millis);
            prop_assert_eq!(Duration::parse(&d.text()), Ok(d));
            prop_assert_eq!(bool::parse(&flag.text()), Ok(flag));
            prop_assert_eq!(i64::parse(&n.text()), Ok(n));
        }

        #[test]
        fn sizes_never_panic(text in "\\PC{0,12}") {
            let _ = ByteSize::parse(&text);
        }
    }
}
