//! Jobs on an open directory.

use std::thread::JoinHandle;

use tidemill_adapters::{JobRunError, JobSpec, RunOptions};
use tidemill_stream::Job;
use tidemill_stream::args::JobArgs;
use tidemill_stream::runtime::{Monitor, RunReport};

use super::{Directory, DirectoryError};

/// A job that runs on threads of its own. Dropping it stops the job after one more commit.
#[derive(Debug)]
pub struct RunningJob {
    monitor: Monitor,
    thread: Option<JoinHandle<Result<RunReport, JobRunError>>>,
}

impl Directory {
    /// Starts a job and returns at once; [`RunOptions::sets`] are its arguments. Whether it could start is told by
    /// [`RunningJob::join`], how far it got by [`RunningJob::monitor`].
    ///
    /// # Errors
    ///
    /// If there is no thread for it.
    pub fn start<J: Job + JobArgs>(&self, options: RunOptions) -> Result<RunningJob, DirectoryError> {
        let (job, monitor) = (JobSpec::of::<J>(""), Monitor::new());
        let thread = {
            let (directory, monitor) = (self.clone(), monitor.clone());
            std::thread::Builder::new().name(J::NAME.to_owned()).spawn(move || {
                let runtime = directory.inside.runtime.handle();
                tidemill_adapters::run(&job, directory.access(), &options, runtime, &monitor)
            })
        };
        Ok(RunningJob { monitor, thread: Some(thread.map_err(DirectoryError::Threads)?) })
    }

    /// Runs a job to its end ([`crate::engine::Mode::UntilEnd`]).
    ///
    /// # Errors
    ///
    /// If it cannot start or go on. What was committed stays.
    pub fn run<J: Job + JobArgs>(&self, options: RunOptions) -> Result<RunReport, DirectoryError> {
        self.start::<J>(options)?.join()
    }
}

impl RunningJob {
    /// Shows and stops it.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// True once it has ended, for whatever reason; [`RunningJob::join`] then returns at once.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// If it could not start or go on. What was committed stays.
    pub fn join(mut self) -> Result<RunReport, DirectoryError> {
        Ok(self.ended()?)
    }

    /// Asks it to stop after one more commit, and waits for its end.
    ///
    /// # Errors
    ///
    /// If it could not start or go on. What was committed stays.
    pub fn stop(self) -> Result<RunReport, DirectoryError> {
        self.monitor.stop();
        self.join()
    }

    fn ended(&mut self) -> Result<RunReport, JobRunError> {
        let thread = self.thread.take().expect("joined once");
        // A panic inside a task is an error of the run; one outside is a broken promise of ours.
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for RunningJob {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.monitor.stop();
            if let Err(error) = self.ended() {
                tracing::warn!(error = %error.chain().join(": "), "a job that nobody waited for ended with an error");
            }
        }
    }
}
