//! Ready-made jobs and their registry.
