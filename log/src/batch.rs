//! Kafka record batches, format v2.
