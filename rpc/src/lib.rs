//! RPC in which the stub is the trait: `#[service]` on a trait of `async fn`s gives a client that
//! implements that same trait, so code generic over it runs in process or over a socket, unchanged.
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use tidemill_rpc::{Attachment, ClientConfig, RpcError, Server, Wire, WireError, service};
//!
//! #[derive(Debug, Serialize, Deserialize, Wire)]
//! pub struct Greeting {
//!     pub text: String,
//!     pub times: u32,
//! }
//!
//! #[derive(Debug, thiserror::Error, WireError)]
//! pub enum EchoError {
//!     #[error("nothing to say")]
//!     #[wire(code = 1)] // written once, never reused
//!     Empty,
//!     #[error("at most {most} bytes")]
//!     #[wire(code = 2)]
//!     TooLong { most: u64 },
//!     #[error(transparent)]
//!     #[wire(rpc)] // every call can fail on the way
//!     Rpc(#[from] RpcError),
//! }
//!
//! #[service(name = "echo.v1")]
//! pub trait Echo: Send + Sync + 'static {
//!     /// Safe to resend.
//!     #[rpc(idempotent, timeout = "2s")]
//!     async fn say(&self, greeting: Greeting) -> Result<String, EchoError>;
//!     /// Large bytes travel beside the arguments, uncopied.
//!     async fn turn(&self, name: String, body: Attachment) -> Result<(u64, Attachment), EchoError>;
//! }
//!
//! struct Local;
//!
//! impl Echo for Local {
//!     async fn say(&self, greeting: Greeting) -> Result<String, EchoError> {
//!         if greeting.text.is_empty() {
//!             return Err(EchoError::Empty);
//!         }
//!         Ok(greeting.text.repeat(greeting.times as usize))
//!     }
//!     async fn turn(&self, _name: String, body: Attachment) -> Result<(u64, Attachment), EchoError> {
//!         Ok((body.len() as u64, body))
//!     }
//! }
//!
//! /// Does not know where the service is.
//! async fn twice(echo: impl Echo) -> Result<String, EchoError> {
//!     echo.say(Greeting { text: "tide".into(), times: 2 }).await
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), EchoError> {
//! // Generated: EchoServer, EchoClient, AnyEcho, and Echo for Arc<T>.
//! let server = Server::new(EchoServer::new(Local)); // .serve_tcp(listener), .serve_unix(..), .serve_stream(..)
//! let client = server.connect_in_memory(ClientConfig::default()).await?; // Client::connect_tcp, connect_unix, connect
//! let remote = EchoClient::new(client.clone());
//! assert_eq!(twice(Local).await?, "tidetide");
//! assert_eq!(twice(remote.clone()).await?, "tidetide");
//!
//! // Chosen at run time:
//! let any: AnyEcho = if client.is_closed() { AnyEcho::new(Local) } else { AnyEcho::new(remote) };
//! let (length, body) = any.turn("x".into(), Attachment::new(vec![7; 1 << 20])).await?;
//! assert_eq!((length, body.into_bytes().len()), (1 << 20, 1 << 20));
//! server.drain(std::time::Duration::from_secs(1)).await;
//! # Ok(())
//! # }
//! ```
//!
//! # What holds
//!
//! * A call ends exactly once: with its answer, its deadline, its cancellation (dropping the future) or the
//!   death of the connection, which fails every call at once. [`Fate`] says what is known of one that failed.
//! * Every call has a deadline: `timeout` of `#[rpc]`, else [`ClientConfig::timeout`], or a nearer one in force
//!   ([`with_deadline`]). It covers the wait for a slot, the queue, the write and the answer, travels as a
//!   relative budget, and is inherited by the calls a handler makes.
//! * In flight there are as many calls as the table has slots; further ones wait in line, with their deadline running.
//! * Types are compared in the handshake ([`Wire::SCHEMA`]): a client and a server built from different traits get
//!   an error that names the method, not a misread value.
//! * A handler is polled on its connection's task, in the order of arrival, and must not block it: what reads files
//!   or takes more than about 100 µs belongs on a thread of its own.
//!
//! What can travel: types with `#[derive(Wire, Serialize, Deserialize)]`, the usual leaves and collections, and
//! [`bytes::Bytes`]. `Vec<u8>` as an argument is refused: it would be encoded byte by byte. An [`Attachment`] is
//! the last argument, or the second half of a `(T, Attachment)` result.
//!
//! # The parts
//!
//! [`frame`] and [`hello`] are the wire (docs/wire.md has its numbered rules); the client's in-flight table is a state
//! machine under one lock, checked by a loom model; `client` and `server` are one task per connection, which owns
//! the socket, the buffers and, at the server, the handlers.
//!
//! Left out so far: streams, retries and pools, the name service, other codecs than bincode, middleware,
//! reflection, blocking methods. The frame kinds, flags and metadata they need are reserved.

mod attachment;
mod client;
mod codec;
mod deadline;
mod error;
mod fate;
pub mod frame;
pub mod hello;
mod io;
mod method;
mod server;
mod sync;
mod table;
mod wire;
mod writer;

pub use attachment::Attachment;
pub use client::{Client, ClientConfig, Peer};
pub use codec::CodecError;
pub use deadline::{deadline, with_deadline};
pub use error::{Code, ErrorBody, RpcError, WireError};
pub use fate::Fate;
pub use method::{Method, Service};
pub use server::{Drained, Server, ServerBuilder, ServerConfig};
pub use tidemill_rpc_macros::{Wire, WireError, service};
pub use wire::{Field, Schema, Variant, Wire, signature};

/// What generated code needs; not for users.
#[doc(hidden)]
pub mod __private {
    pub use crate::client::{call, call_attached};
    pub use crate::method::{Handler, Reply, Request};

    /// The least of several sizes.
    pub const fn least(sizes: &[usize]) -> usize {
        crate::wire::least(sizes)
    }
}

#[cfg(test)]
mod decode_tests;
#[cfg(test)]
mod table_tests;
#[cfg(test)]
mod writer_tests;
