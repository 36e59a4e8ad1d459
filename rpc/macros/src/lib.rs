//! Generates stubs and servers from a trait; derives wire schemas.
