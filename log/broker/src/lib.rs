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
//! handle it gives goes over to another owner, or becomes one, when that owner dies. [`Access::connect`] is the way to
//! a broker at an address, and [`Serving`] is that broker.

mod access;
mod api;
mod consumer;
mod convert;
mod directory;
mod error;
mod local;
mod owner;
mod producer;
mod serve;
mod sessions;
mod silence;
mod status;
mod tcp;
mod visible;

pub use access::{Access, AccessError, AccessEvent, AccessOptions, Data, Listener, Place};
pub use api::*;
pub use consumer::{Consumed, Consumer, ConsumerOptions, Event};
pub use directory::{DirError, Intent};
pub use error::{BrokerError, PartitionError, Reaction};
pub use local::LocalBroker;
pub use owner::OwnerError;
pub use producer::*;
pub use serve::{Exposure, ServeError, ServeOptions, Serving};
/// What a client of the broker builds and reads.
pub use tidemill_log::batch;
pub use tidemill_rpc::{Attachment, Drained};
pub use visible::{OPEN_BYTES_MAX, VisibleBatch, for_each_record, visible};
