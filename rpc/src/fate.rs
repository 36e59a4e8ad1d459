//! What is known of a call that did not bring its answer.

/// How far a failed call got: what a caller may conclude before it tries again.
///
/// It is read from the frame's own status and from the state of the call in the table, never from
/// an error inside an application's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// The request was not fully written and never will be: the server cannot have seen it.
    NotSent,
    /// The server refused it, or it expired there before its first poll, or it lies beyond the count
    /// of a GOAWAY: it was not executed.
    Rejected,
    /// It was executed: an answer came back, or an application error.
    Executed,
    /// Anything else. It may have been executed, wholly, in part or not at all.
    Unknown,
}

impl Fate {
    /// Whether the call is known not to have executed, so that sending it again is safe.
    pub fn is_safe_to_resend(self) -> bool {
        matches!(self, Fate::NotSent | Fate::Rejected)
    }
}
