//! Generates stubs and servers from a trait; derives wire schemas and numbered errors.
//!
//! Used through `tidemill_rpc`, which documents the macros for their users. Here: `service` reads
//! the trait and refuses what cannot travel, `expand` writes the code, `wire` and `wire_error` are
//! the derives. Every refusal points at the token that caused it; what a type must implement is
//! left to the compiler, with the span of the type as the user wrote it.

mod expand;
mod service;
mod wire;
mod wire_error;

#[cfg(test)]
mod tests;

use proc_macro::TokenStream;

/// Makes an RPC service of a trait of `async fn`s. See the crate `tidemill_rpc`.
#[proc_macro_attribute]
pub fn service(arguments: TokenStream, item: TokenStream) -> TokenStream {
    match service::parse(arguments.into(), item.into()) {
        Ok(service) => expand::expand(&service).into(),
        Err(error) => error.into_compile_error().into(),
    }
}

/// Derives `tidemill_rpc::Wire`: the schema that the handshake compares and the least encoded size.
#[proc_macro_derive(Wire)]
pub fn derive_wire(item: TokenStream) -> TokenStream {
    wire::derive(item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Derives `tidemill_rpc::WireError` for an enum whose variants carry written numbers.
#[proc_macro_derive(WireError, attributes(wire))]
pub fn derive_wire_error(item: TokenStream) -> TokenStream {
    wire_error::derive(item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
