//! Encodings of the files beside a segment.
