//! The integration tests: one binary.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on must end, and says where")]

mod http;
