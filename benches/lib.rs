//! Benchmarks; each states its question and checks its answer.
