//! Why a run ended other than by its end.

use std::error::Error as StdError;

use crate::error::{PlanError, StartError, StepError};
use crate::io::LogError;
use crate::state::StateError;

/// A run ended early. What was committed stays; the rest is undone by the next start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The job cannot be built.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The job cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A task cannot go on.
    #[error("{task} of {step} stopped")]
    Step {
        /// Which thread.
        task: String,
        /// Which step of the plan.
        step: String,
        /// Why.
        source: StepError,
    },
    /// Something panicked that is no record's and no group's, the engine itself. Has a few tries.
    #[error("{task} panicked in {step}: {message}")]
    Panicked {
        /// Which thread.
        task: String,
        /// Which step of the plan.
        step: String,
        /// The panic's message.
        message: String,
    },
    /// The engine broke its own rules.
    #[error("the commit of an epoch failed")]
    Commit(#[source] StepError),
    /// The log failed.
    #[error(transparent)]
    Log(LogError),
    /// The state store failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The log stayed out of reach.
    #[error("gave up after returning to the last commit {restarts} times without a commit in between")]
    Unreachable {
        /// How often.
        restarts: u32,
        /// What the last one saw.
        source: Box<Self>,
    },
    /// A transaction was aborted, by its timeout or by the owner of the log when it opened. Retried by itself.
    #[error("the transaction of a job epoch was aborted")]
    Aborted,
    /// A second stop was asked for before the first one's commit.
    #[error(
        "stopped at once, before the open epoch was committed; the next run continues from the last commit"
    )]
    StoppedAtOnce,
    /// What made the job panic cannot be remembered.
    #[error(
        "how often records made the job panic cannot be kept{}",
        after.as_ref().map(|after| format!(" (after this: {after})")).unwrap_or_default()
    )]
    Tries {
        /// The panic that was to be remembered; `None` while the run starts.
        after: Option<String>,
        /// Why.
        source: std::io::Error,
    },
    /// A thread could not be made.
    #[error("a thread of the run could not be made")]
    Thread(#[source] std::io::Error),
}

impl RunError {
    /// Whether returning to the last commit may help.
    pub(super) fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Aborted
                | Self::Log(LogError::Unreachable { .. })
                | Self::Start(StartError::Log(LogError::Unreachable { .. }))
        )
    }

    /// With what happened before: a panic must not be lost because it cannot be remembered.
    pub(super) fn after(self, panic: &Self) -> Self {
        match self {
            Self::Tries { source, .. } => Self::Tries { after: Some(panic.chain().join(": ")), source },
            error => error,
        }
    }

    /// Whether the arguments or the job are to be corrected, rather than something outside.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Plan(_) | Self::Start(StartError::Mismatch(_) | StartError::Name(_)))
    }

    /// The error and its causes, outermost first, each once.
    pub fn chain(&self) -> Vec<String> {
        let mut all = vec![self.to_string()];
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some say their cause themselves.
            if !all.last().is_some_and(|said| said.ends_with(&text)) {
                all.push(text);
            }
            cause = error.source();
        }
        all
    }
}

impl From<LogError> for RunError {
    fn from(error: LogError) -> Self {
        Self::Log(error)
    }
}
