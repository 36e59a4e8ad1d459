//! RPC framework in which the stub is the trait.
