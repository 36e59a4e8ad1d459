//! A data directory from inside a program: topics, producers, readers and jobs, without a server and without futures.
//!
//! ```text
//!   Directory ─┬─ producer()                Producer       send ─▶ Sent::offset     idempotent, batching
//!              ├─ transactional_producer()  Transaction    send, commit             all of it or none; fences its elder
//!              ├─ reader(), read()          Reader         next ─▶ records          committed, or everything
//!              └─ start::<J>(), run::<J>()  RunningJob     monitor, stop, join      exactly once
//! ```
//!
//! The first process that opens a directory owns it, the others reach it through the owner's socket, and when the owner
//! dies another takes over: a program need not know which of the two it is. Everything here blocks and runs its
//! requests on a small runtime of the directory's own, so it is called from threads, never from a future; a program
//! that is built on futures takes [`crate::broker`], which this is a thin layer over.
//!
//! Invariants
//! * A record that [`Sent::offset`] or [`Producer::flush`] told is durable survives a kill and a power cut.
//! * A reader of committed records sees whole transactions, and nothing of one that was aborted.
//!
//! Left out: consumer groups, compression settings, times to start reading from.

#[cfg(feature = "rocksdb")]
mod job;
mod read;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemill_adapters::broker::batch::BatchError;
use tidemill_adapters::broker::{
    Access, AccessError, AccessOptions, Broker, BrokerError, Intent, NewTopic, Topic, TopicDescription,
};

#[cfg(feature = "rocksdb")]
pub use job::RunningJob;
pub use read::{Reader, Record, StartAt};
pub use tidemill_adapters::broker::{AccessEvent, Isolation, Outcome};
pub use write::{NewRecord, Producer, Sent, Transaction};

/// Why something on a [`Directory`] failed.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The directory cannot be opened.
    #[error(transparent)]
    Open(#[from] AccessError),
    /// A request was refused; [`BrokerError::reaction`] says what to do about it.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// Stored bytes are not a batch of records.
    #[error("what was read is damaged")]
    Batch(#[from] BatchError),
    /// A partition cannot be read any further.
    #[error("partition {partition} of {topic} at offset {offset}")]
    Partition {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// Where reading stopped.
        offset: i64,
        /// Why.
        source: BrokerError,
    },
    /// Nothing came for as long as the call waits.
    #[error("{what} did not come within {} s", seconds.as_secs())]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: std::time::Duration,
    },
    /// The threads behind it cannot be started, or one of them is gone.
    #[error("the directory's threads: {0}")]
    Threads(std::io::Error),
    /// A job.
    #[cfg(feature = "rocksdb")]
    #[error(transparent)]
    Job(#[from] tidemill_adapters::JobRunError),
}

/// An open data directory. Clones share it; it is given up when the last clone, and everything made from it, is gone.
///
/// ```
/// use tidemill::{Directory, Isolation, NewRecord};
///
/// let dir = std::env::temp_dir().join(format!("tidemill-doc-{}", std::process::id()));
/// let data = Directory::create(&dir)?;
/// let greetings = data.create_topic("greetings", 1)?;
///
/// let producer = data.producer()?;
/// let first = producer.send(&greetings, NewRecord::of("hello").key("en"))?;
/// producer.send(&greetings, NewRecord::of("你好").key("zh"))?;
/// producer.flush()?;                          // both are on the disk now
/// assert_eq!(first.offset()?, 0);
///
/// let read = data.read("greetings", Isolation::ReadCommitted)?;
/// assert_eq!(read.iter().map(|record| record.text()).collect::<Vec<_>>(), ["hello", "你好"]);
/// # drop((first, producer, data));
/// # std::fs::remove_dir_all(dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Directory {
    inside: Arc<Inside>,
}

#[derive(Debug)]
struct Inside {
    path: PathBuf,
    access: Access,
    runtime: tokio::runtime::Runtime,
}

impl Drop for Inside {
    fn drop(&mut self) {
        // In order: what is in flight is answered, and the next open finds a checkpoint. Within a future nothing may
        // block; there the directory is given up as by a kill, which loses nothing either.
        if tokio::runtime::Handle::try_current().is_err() {
            self.runtime.block_on(self.access.close());
        }
    }
}

impl Directory {
    /// Opens a data directory that is there.
    ///
    /// # Errors
    ///
    /// If there is none at `path`, or if it can be neither taken nor reached through its owner.
    ///
    /// # Panics
    ///
    /// Within a future.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DirectoryError> {
        Self::open_with(path, Intent::Use, |_| {})
    }

    /// Opens a data directory and makes it where it is missing.
    ///
    /// # Errors
    ///
    /// If `path` holds something else, or if the directory can be neither taken nor reached through its owner.
    ///
    /// # Panics
    ///
    /// Within a future.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, DirectoryError> {
        Self::open_with(path, Intent::Create, |_| {})
    }

    /// Opens a directory and is told, by a line of text each, when its owner changes.
    ///
    /// # Errors
    ///
    /// As [`Directory::open`] and [`Directory::create`].
    ///
    /// # Panics
    ///
    /// Within a future.
    pub fn open_with(
        path: impl AsRef<Path>,
        intent: Intent,
        on_event: impl Fn(&AccessEvent) + Send + Sync + 'static,
    ) -> Result<Self, DirectoryError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("tidemill-io")
            .enable_all()
            .build()
            .map_err(DirectoryError::Threads)?;
        let options = AccessOptions::new(intent).on_event(on_event);
        let path = path.as_ref().to_owned();
        let access = runtime.block_on(Access::open(&path, options))?;
        Ok(Self { inside: Arc::new(Inside { path, access, runtime }) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.inside.path
    }

    /// The service beneath, for requests that have no method here; [`Directory::wait`] runs them.
    pub fn access(&self) -> &Access {
        &self.inside.access
    }

    /// Makes a durable topic, or answers with the one of that name, whatever its settings. Durable on return.
    ///
    /// # Errors
    ///
    /// If the name breaks the rules of topic names, or the log refuses it.
    pub fn create_topic(&self, name: &str, partitions: u32) -> Result<Topic, DirectoryError> {
        let wanted = NewTopic::new(name, partitions).keep_existing();
        Ok(self.wait(self.access().create_topic(wanted))?)
    }

    /// A topic and the offsets of its partitions, as they are now.
    ///
    /// # Errors
    ///
    /// If there is no such topic.
    pub fn describe(&self, topic: &str) -> Result<TopicDescription, DirectoryError> {
        Ok(self.wait(self.access().describe(topic.to_owned()))?)
    }

    /// Runs a request of [`Directory::access`] to its end.
    ///
    /// # Panics
    ///
    /// Within a future.
    pub fn wait<F: Future>(&self, request: F) -> F::Output {
        self.inside.runtime.block_on(request)
    }
}
