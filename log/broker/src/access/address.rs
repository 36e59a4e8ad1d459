//! The link to a broker that is served at an address: one connection, made again when it is lost.
//!
//! ```text
//!   connect ──▶ up ──connection ends, or a call finds it draining──▶ opening: calls wait
//!                ▲                                                      │ connect, 10 ms doubling to 1 s, jittered
//!                ├───────────────────answers────────────────────────────┤
//!                └───────────────────answers──── failed ◀──30 s─────────┘  calls fail with the last reason
//! ```
//!
//! The first connection is tried once: a command that names a broker wants to know at once that nobody is there. A
//! later one is looked for as long as the handle lives, because whoever restarts the broker does not restart its
//! clients. A broker that stops without closing its connections is noticed by the connection's own PING
//! (docs/wire.md).
//!
//! Left out: several addresses, and anything that proves who is at the other end; a served broker listens on loopback
//! unless it is told otherwise.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tidemill_rpc::{Client, ClientConfig, Code};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, sleep, timeout};

use super::{AccessError, AccessEvent, FRAME_BYTES_MAX, Link, Place, Shared};
use crate::api::{AnyBroker, BrokerClient};

/// How long calls wait for a broker that went away before they fail.
pub(super) const OUTAGE_MAX: Duration = Duration::from_secs(30);
/// The first and the longest pause between two attempts; each is shortened by up to a half, at random, so that the
/// clients of a broker that returns do not come all at once.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// An outage that is shorter is told in one line, once it is over.
const QUIET: Duration = Duration::from_secs(1);
/// Connecting, and then the handshake, take at most this long.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Keeps the link to an address.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) address: String,
}

/// A connection that answered.
pub(super) struct Connected {
    stub: BrokerClient,
    place: Place,
}

impl Keeper {
    /// One attempt.
    pub(super) async fn connect(&self) -> Result<Connected, AccessError> {
        let address = || self.address.clone();
        let unreachable = |why: String| AccessError::Unreachable { address: address(), why };
        let stream = match timeout(CONNECT_WITHIN, self.dial()).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(AccessError::NobodyListens { address: address() });
            }
            Ok(Err(error)) => return Err(unreachable(error.to_string())),
            Err(_) => return Err(unreachable(format!("no connection within {CONNECT_WITHIN:?}"))),
        };
        let peer = stream.peer_addr().map_err(|error| unreachable(error.to_string()))?;
        // Requests are small and answers are waited for: Nagle's delay would only slow them.
        stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        let config = ClientConfig {
            frame_bytes_max: FRAME_BYTES_MAX,
            connect_timeout: CONNECT_WITHIN,
            ..ClientConfig::default()
        };
        let client = match Client::connect(stream, config).await {
            Ok(client) => client,
            Err(error) if matches!(error.code, Code::Protocol | Code::Skew) => {
                let why = error.message.into_owned();
                return Err(AccessError::NotABroker { address: address(), why });
            }
            Err(error) => return Err(unreachable(error.message.into_owned())),
        };
        // A method that differs fails by itself, when it is called; a server that has none of them is another service.
        let methods = BrokerClient::METHODS;
        if methods.iter().all(|method| client.check(std::slice::from_ref(method)).is_err()) {
            let why = "it serves none of a broker's methods".to_owned();
            return Err(AccessError::NotABroker { address: address(), why });
        }
        Ok(Connected { stub: BrokerClient::new(client), place: Place::Address(peer) })
    }

    /// Names may have several addresses (`localhost` has two): the first that takes the connection counts.
    async fn dial(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in lookup_host(self.address.as_str()).await? {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The task.
    pub(super) async fn keep(self, first: Connected) {
        let mut closing = self.shared.closing.subscribe();
        let mut connected = first;
        for number in 1.. {
            let Connected { stub, place } = connected;
            let broker = AnyBroker::new(stub.clone());
            self.shared.link.send_replace(Link::Up { number, broker, place });
            let mut link = self.shared.link.subscribe();
            let why = tokio::select! {
                error = stub.client().closed() => error.message.into_owned(),
                // A call found it dead, or draining.
                _ = link.wait_for(|link| matches!(link, Link::Opening)) => "it is stopping".to_owned(),
                _ = closing.wait_for(|closing| *closing) => break,
            };
            // Calls made from here on wait for the next link; those in flight keep the old connection until they end.
            self.shared.link.send_replace(Link::Opening);
            drop(stub);
            connected = tokio::select! {
                connected = self.reconnect(why) => connected,
                _ = closing.wait_for(|closing| *closing) => break,
            };
        }
        self.shared.link.send_replace(Link::Closed);
    }

    /// Attempts until one answers. After [`OUTAGE_MAX`] calls fail meanwhile.
    async fn reconnect(&self, mut why: String) -> Connected {
        let since = Instant::now();
        let mut pause = PAUSE.0;
        let (mut told, mut failed) = (false, false);
        loop {
            sleep(pause.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
            pause = (2 * pause).min(PAUSE.1);
            match self.connect().await {
                Ok(connected) => {
                    self.shared.tell(&AccessEvent::Reconnected { address: self.address.clone() });
                    return connected;
                }
                Err(error) => {
                    if since.elapsed() >= OUTAGE_MAX {
                        if !std::mem::replace(&mut failed, true) {
                            self.shared.tell(&AccessEvent::Lost { why: error.to_string() });
                        }
                        self.shared.link.send_replace(Link::Failed(Arc::new(error)));
                    } else {
                        why = error.to_string();
                    }
                }
            }
            if since.elapsed() >= QUIET && !std::mem::replace(&mut told, true) {
                let (address, why) = (self.address.clone(), std::mem::take(&mut why));
                self.shared.tell(&AccessEvent::Searching { address, why });
            }
        }
    }
}
