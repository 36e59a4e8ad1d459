//! The connections an owner serves, so that it can drain all of them when it closes.
//!
//! Each connection is a session of the broker of its own: the log sees which requests came on which connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tidemill_rpc::{Drained, Server, ServerConfig};

use crate::access::FRAME_BYTES_MAX;
use crate::api::BrokerServer;
use crate::local::LocalBroker;

/// The servers of the connections that are open. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Sessions {
    open: Arc<Mutex<Open>>,
}

#[derive(Default)]
struct Open {
    /// No session begins once a drain did: it would be missed.
    draining: bool,
    next: u64,
    servers: HashMap<u64, Server>,
}

/// A session's server, on the list until it is dropped.
pub(crate) struct Session {
    sessions: Sessions,
    number: u64,
    pub(crate) server: Server,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sessions.open.lock().servers.remove(&self.number);
    }
}

impl Sessions {
    /// The server of a new connection; none while draining.
    pub(crate) fn begin(&self, broker: &LocalBroker) -> Option<Session> {
        let mut open = self.open.lock();
        if open.draining {
            return None;
        }
        let config = ServerConfig { frame_bytes_max: FRAME_BYTES_MAX, ..ServerConfig::default() };
        let server = Server::builder().config(config).service(BrokerServer::new(broker.session())).build();
        let number = open.next;
        open.next += 1;
        open.servers.insert(number, server.clone());
        Some(Session { sessions: self.clone(), number, server })
    }

    /// Answers what is in flight on every connection and closes them; what is left after `limit` is dropped.
    pub(crate) async fn drain(&self, limit: Duration) -> Drained {
        let servers: Vec<Server> = {
            let mut open = self.open.lock();
            open.draining = true;
            open.servers.values().cloned().collect()
        };
        let drained = futures::future::join_all(servers.iter().map(|server| server.drain(limit))).await;
        drained.into_iter().fold(Drained::default(), |sum, one| Drained {
            completed: sum.completed + one.completed,
            cancelled: sum.cancelled + one.cancelled,
        })
    }
}
