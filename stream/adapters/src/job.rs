//! A job without its type: what a registry lists and what a command line runs.

use tidemill_stream::args::{ArgError, ArgSpec, JobArgs};
use tidemill_stream::{Job, Plan, PlanError};

/// Why a job cannot be made from its arguments.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// An argument is wrong.
    #[error(transparent)]
    Args(#[from] ArgError),
    /// The job refuses its arguments, or its pipeline is not complete.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// A job that can be described and made from `key=value` arguments.
#[derive(Clone, Copy)]
pub struct JobSpec {
    /// Its name.
    pub name: &'static str,
    /// One line that says what it does.
    pub about: &'static str,
    /// Its arguments.
    pub args: &'static [ArgSpec],
    build: fn(&[String]) -> Result<JobPlan, JobError>,
}

/// A job made from its arguments.
#[derive(Clone, Debug)]
pub struct JobPlan {
    /// The plan.
    pub plan: Plan,
    /// Every argument with its value.
    pub values: Vec<(&'static str, String)>,
}

impl JobSpec {
    /// Of a job type.
    pub fn of<J: Job + JobArgs>(about: &'static str) -> Self {
        fn build<J: Job + JobArgs>(pairs: &[String]) -> Result<JobPlan, JobError> {
            let job = J::parse(pairs)?;
            Ok(JobPlan { plan: Plan::of(&job)?, values: job.values() })
        }
        Self { name: J::NAME, about, args: J::ARGS, build: build::<J> }
    }

    /// Makes the job from `key=value` pairs.
    ///
    /// # Errors
    ///
    /// If an argument is unknown or unreadable, or the job refuses them.
    pub fn build(&self, pairs: &[String]) -> Result<JobPlan, JobError> {
        (self.build)(pairs)
    }
}

impl std::fmt::Debug for JobSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobSpec").field("name", &self.name).field("args", &self.args).finish_non_exhaustive()
    }
}
