//! What a job promises about its output when it is killed: exactly once, or one of two weaker modes.
//!
//! ```text
//!                    a transaction of epoch N carries          output            a crash may
//!   exactly once     output, state, marks, offsets to N's end  inside            change nothing
//!   at least once    state, marks, offsets to N's end          outside, acked    repeat output of the open epoch
//!                                                              before the end
//!   at most once     output, state, marks, offsets of what     inside            lose what was fetched for N + 1
//!                    N + 1 begins with: already fetched
//! ```
//!
//! The weaker modes cost as much as the exact one; they are here to be compared with it, and to show that whatever
//! checks an exact run can fail. Undisturbed, all three give the same output.

use std::fmt;
use std::str::FromStr;

/// What a crash may do to a job's output. See the head of the file.
///
/// ```
/// use tidemill_stream::Guarantee;
/// assert_eq!("at-most-once".parse(), Ok(Guarantee::AtMostOnce));
/// assert_eq!(Guarantee::default().to_string(), "exactly-once");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Guarantee {
    /// Output, state and offsets are committed together: a crash changes nothing.
    #[default]
    ExactlyOnce,
    /// Output leaves outside the transaction and is acked before it ends; state, offsets and marks stay in it. A crash
    /// repeats the output of the open epoch. Readers see rows before their epoch is committed.
    AtLeastOnce,
    /// Output, state and marks are committed with the offsets behind what was fetched and not yet processed. A crash
    /// loses that input; nothing is repeated. A clean stop commits what was processed, and loses nothing.
    AtMostOnce,
}

impl Guarantee {
    /// All of them, the exact one first.
    pub const ALL: [Self; 3] = [Self::ExactlyOnce, Self::AtLeastOnce, Self::AtMostOnce];

    /// Its name on command lines and in the record of what an identity committed to.
    pub fn name(self) -> &'static str {
        match self {
            Self::ExactlyOnce => "exactly-once",
            Self::AtLeastOnce => "at-least-once",
            Self::AtMostOnce => "at-most-once",
        }
    }
}

impl fmt::Display for Guarantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no guarantee.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of exactly-once, at-least-once, at-most-once")]
pub struct NotAGuarantee(String);

impl FromStr for Guarantee {
    type Err = NotAGuarantee;

    fn from_str(text: &str) -> Result<Self, NotAGuarantee> {
        Self::ALL.into_iter().find(|g| g.name() == text).ok_or_else(|| NotAGuarantee(text.to_owned()))
    }
}
