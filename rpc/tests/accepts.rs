//! What the macros accept: generics, doc comments, cfg, raw identifiers, visibility, all-owned types, wire names.
#![deny(missing_docs)]
#![allow(dead_code, reason = "compiled, hardly run")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tidemill_rpc::{Attachment, RpcError, Wire, WireError, service};

/// Documented types.
pub mod api {
    use super::*;

    /// A pair of anything that travels.
    #[derive(Debug, Clone, Serialize, Deserialize, Wire)]
    pub struct Pair<A, B> {
        /// One.
        pub a: A,
        /// The other.
        pub b: Option<Box<B>>,
    }

    /// A tuple struct.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Wire)]
    pub struct Offset(pub u64, pub i32);

    /// A unit struct.
    #[derive(Debug, Serialize, Deserialize, Wire)]
    pub struct Nothing;

    /// Every kind of variant.
    #[derive(Debug, Serialize, Deserialize, Wire)]
    pub enum Choice<T> {
        /// Unit.
        Unit,
        /// Tuple.
        Tuple(T, u8),
        /// Struct.
        Struct {
            /// With a raw name.
            r#type: String,
        },
    }

    /// Only raw and plain errors.
    #[derive(Debug, thiserror::Error, WireError)]
    pub enum Failure {
        /// Unit.
        #[error("unit")]
        #[wire(code = 1)]
        Unit,
        /// Tuple.
        #[error("tuple {0}")]
        #[wire(code = 3)]
        Tuple(u64, String),
        /// Struct.
        #[error("struct {type}")]
        #[wire(code = 2)]
        Struct {
            /// With a raw name.
            r#type: String,
        },
        /// On the way.
        #[error(transparent)]
        #[wire(rpc)]
        Rpc(#[from] RpcError),
    }

    /// A store of anything.
    #[service(name = "store-2.v1")]
    pub trait Store<K: Wire + Ord, V, const N: usize = 4>: Send + Sync + 'static
    where
        V: Wire + Clone,
    {
        /// No arguments.
        #[rpc(idempotent)]
        async fn all(&self) -> Result<BTreeMap<Offset, String>, Failure>;
        /// A raw name, raw arguments and a type that is written in full.
        #[rpc(name = "match_it", timeout = "150ms")]
        async fn r#match(&self, r#type: K, list: Vec<V>) -> std::result::Result<Pair<K, V>, Failure>;
        /// Only an attachment.
        async fn put(&self, body: Attachment) -> Result<(), RpcError>;
        /// Both.
        async fn turn(
            &self,
            map: HashMap<String, u32>,
            bytes: Bytes,
            body: tidemill_rpc::Attachment,
        ) -> Result<(Choice<V>, Attachment), Failure>;
        /// A tuple that is no attachment.
        async fn pair(&self, id: [u8; 16]) -> Result<(Nothing, u128), Failure>;
        /// Not compiled.
        #[cfg(any())]
        async fn gone(&self, what: ThereIsNoSuchType) -> Result<(), Failure>;
        /// One of two.
        #[cfg(unix)]
        async fn either(&self) -> Result<u8, Failure>;
        /// One of two.
        #[cfg(not(unix))]
        async fn either(&self) -> Result<u8, Failure>;
    }

    /// Not compiled at all.
    #[service(name = "gone.v1")]
    #[cfg(any())]
    pub trait Gone: Send + Sync + 'static {
        /// Nothing.
        async fn gone(&self, what: ThereIsNoSuchType) -> Result<(), Failure>;
    }
}

use api::*;

struct Local;

impl Store<String, u8, 7> for Local {
    async fn all(&self) -> Result<BTreeMap<Offset, String>, Failure> {
        Err(Failure::Tuple(1, "x".into()))
    }
    async fn r#match(&self, r#type: String, list: Vec<u8>) -> Result<Pair<String, u8>, Failure> {
        Ok(Pair { a: r#type, b: list.first().copied().map(Box::new) })
    }
    async fn put(&self, _body: Attachment) -> Result<(), RpcError> {
        Ok(())
    }
    async fn turn(
        &self,
        _map: HashMap<String, u32>,
        _bytes: Bytes,
        body: Attachment,
    ) -> Result<(Choice<u8>, Attachment), Failure> {
        Ok((Choice::Unit, body))
    }
    async fn pair(&self, _id: [u8; 16]) -> Result<(Nothing, u128), Failure> {
        Ok((Nothing, 1))
    }
    async fn either(&self) -> Result<u8, Failure> {
        Ok(1)
    }
}

fn is_store(_: &impl Store<String, u8, 7>) {}

fn is_send<T: Send>(future: T) -> T {
    future
}

/// Mostly: that it compiles is the claim.
#[test]
fn it_compiles_and_counts_its_methods() {
    fn with(client: tidemill_rpc::Client) {
        let stub = StoreClient::<String, u8, 7>::new(client);
        is_store(&stub);
        is_store(&stub.clone());
        drop(is_send(stub.r#match("x".into(), vec![1])));
    }
    let _ = with;
    is_store(&Local);
    is_store(&Arc::new(Local));
    let any = AnyStore::new(Local);
    is_store(&any.clone());
    drop(is_send(any.either()));
    let _ = tidemill_rpc::Server::new(StoreServer::new(any));
    let methods = StoreClient::<String, u8, 7>::METHODS;
    let names: Vec<&str> = methods.iter().map(|method| method.name).collect();
    assert_eq!(names, ["all", "match_it", "put", "turn", "pair", "either"]);
    assert!(methods[0].idempotent && !methods[1].idempotent);
    assert_eq!(methods[1].timeout, Some(std::time::Duration::from_millis(150)));
    let other = StoreClient::<String, u16, 7>::METHODS;
    assert_eq!(methods[0].signature, other[0].signature);
    assert_ne!(methods[1].signature, other[1].signature, "a parameter is part of the signature");
}
