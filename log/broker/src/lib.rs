//! The broker: its service trait, in-process and remote, clients, ownership of a data directory.
