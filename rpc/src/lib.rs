//! RPC in which the stub is the trait: `#[service]` on a trait of `async fn`s gives a client that
//! implements that same trait, so code generic over it runs in process or over a socket, unchanged.

mod attachment;
mod client;
mod codec;
mod error;
mod fate;
mod frame;
mod method;
mod server;
mod wire;

pub use attachment::Attachment;
pub use client::{Client, ClientConfig};
pub use codec::CodecError;
pub use error::{Code, ErrorBody, RpcError, WireError};
pub use fate::Fate;
pub use method::{Method, Service};
pub use server::{Drained, Server};
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
