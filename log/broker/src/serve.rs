//! A data directory that is served over TCP by a process that does nothing else: what `streamctl serve` runs.
//!
//! It is the directory's owner (owner.rs) with one more listener; commands on the same machine may reach it through
//! the directory's Unix socket as well. Unlike [`crate::Access`] it never becomes a client of another owner: a broker
//! that forwards to a command which happens to own the directory would end with that command.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemill_log::{Config, Create};
use tidemill_rpc::Drained;

use crate::directory::{DataDir, DirError, Intent};
use crate::local::LocalBroker;
use crate::owner::{Owner, OwnerError};
use crate::tcp;

/// Which addresses a broker may listen on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Exposure {
    /// Loopback ones: there is no authentication yet.
    #[default]
    Loopback,
    /// Any. Whoever reaches the port may read, write and delete every topic.
    Insecure,
}

/// How a data directory is served.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Whether the directory is made, or filled, where there is none.
    pub intent: Intent,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Which addresses are allowed.
    pub exposure: Exposure,
    /// The log's settings; [`Config::create`] follows the intent.
    pub log: Config,
}

impl ServeOptions {
    /// Defaults for an address.
    pub fn new(intent: Intent, listen: SocketAddr) -> Self {
        ServeOptions { intent, listen, exposure: Exposure::default(), log: Config::default() }
    }
}

/// Why a directory is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The directory cannot be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The log or the socket could not be opened.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// Another process owns the directory.
    #[error("{}", owned(path, *pid))]
    Owned {
        /// The data directory.
        path: PathBuf,
        /// Its owner, where it is known.
        pid: Option<u32>,
    },
    /// The address is not loopback.
    #[error(
        "{address} can be reached from other machines, and there is no authentication: whoever reaches it may read and \
         delete everything. Listen on 127.0.0.1, or say --insecure-listen"
    )]
    Exposed {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address, port 0 takes a free port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
}

fn owned(path: &Path, pid: Option<u32>) -> String {
    let path = path.display();
    match pid {
        Some(pid) => format!(
            "process {pid} owns {path}; end it (`kill {pid}`) and start again, or use it as it is: commands with \
             --data {path} reach it through its socket"
        ),
        None => format!("another process owns {path}; end it and start again"),
    }
}

/// A served directory. Dropped without [`Serving::close`], the log is closed on a thread of its own.
pub struct Serving {
    owner: Owner,
    address: SocketAddr,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Serving {
    /// Takes the directory, recovers its log, and listens. Clients are refused until then. Must be called on a tokio
    /// runtime, which runs the tasks behind it.
    pub async fn start(path: impl AsRef<Path>, options: ServeOptions) -> Result<Serving, ServeError> {
        let ServeOptions { intent, listen: address, exposure, log: mut config } = options;
        if exposure == Exposure::Loopback && !address.ip().is_loopback() {
            return Err(ServeError::Exposed { address });
        }
        let listen = |source| ServeError::Listen { address, source };
        let dir = Arc::new(DataDir::open(path.as_ref(), intent)?);
        // Before a recovery that may take long: a port in use is told at once.
        let socket = tcp::bind(address).map_err(listen)?;
        let Some(lock) = dir.try_lock()? else {
            let pid = dir.holder().map(|holder| holder.pid);
            return Err(ServeError::Owned { path: dir.path().to_owned(), pid });
        };
        config.create = intent.create();
        if config.create == Create::Never && !dir.is_made()? {
            return Err(DirError::Missing { path: dir.path().to_owned() }.into());
        }
        let mut owner = Owner::start(dir, lock, config).await?;
        let bound = tcp::listen(socket).and_then(|listener| Ok((listener.local_addr()?, listener)));
        match bound {
            Ok((address, listener)) => {
                owner.accept_tcp(listener);
                Ok(Serving { owner, address })
            }
            Err(source) => {
                // It owns the directory for nothing; closing in order spares the next open the recovery.
                if let Err(error) = owner.close().await {
                    tracing::warn!(%error, "the next open recovers the log");
                }
                Err(ServeError::Listen { address, source })
            }
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The broker, for callers in this process.
    pub fn broker(&self) -> LocalBroker {
        self.owner.broker()
    }

    /// Accepts nobody any more, answers what is in flight, closes the log in order, frees the directory.
    pub async fn close(self) -> Result<Drained, OwnerError> {
        self.owner.close().await
    }
}
