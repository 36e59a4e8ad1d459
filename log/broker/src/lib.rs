//! The broker: where the log meets the RPC.
//!
//! ```text
//!   Producer<B>  TransactionalProducer<B>  Consumer<B>      clients, generic over the trait
//!        └───────────────┬──────────────────┘
//!                     Broker                                 one `#[service]` trait
//!            ┌───────────┴────────────┐
//!       LocalBroker              BrokerClient                the log of this process, or a stub
//!            │                        │  TCP, or the Unix socket in the data directory
//!       tidemill_log::Log        BrokerServer<LocalBroker> of the owner
//! ```
//!
//! [`Data::open`] is the way in for a command: it takes ownership of a data directory or reaches its owner, and the
//! handle it gives goes over to another owner, or becomes one, when that owner dies.

mod api;
mod convert;
mod error;
mod local;

pub use api::*;
pub use error::{BrokerError, PartitionError, Reaction};
pub use local::LocalBroker;
