//! `partitions`, `logging` and `metrics`: what the service does beside publishing.
//!
//! Each section's struct, its keys with their ranges and defaults, and how they are read. Pure, on the thread that loads
//! the configuration: it opens no socket and starts no log.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use log::LevelFilter::{Debug, Error, Info, Trace, Warn};

use super::key::key;
use super::section::section;
use super::values::{DAY, boolean, checked_by, count, duration_or_off, one_of, shown, text};
use super::yaml::Node;

/// The paths that are taken.
const OTHER_PATHS: [&str; 7] = ["/", "/status", "/recent", "/health", "/healthz", "/ready", "/readyz"];

section! {
    /// How the monthly partitions of the outbox are kept.
    pub struct Partitions = "partitions" {
        /// Months after this one that have their partition.
        pub premake: u32 = key(3, count(1..=120)).live(),
        /// Published events older than this are deleted, whole partitions at a time where possible; `None` (written
        /// `off`): they are kept for ever.
        pub retention: Option<Duration> = key(Some(30 * DAY), duration_or_off(DAY..=36_525 * DAY)).live(),
        /// Blocks a second (of 8 KiB) that are read in search of events that claims have passed; 0: none are.
        pub sweep_rate: u32 = key(256, count(0..=1_000_000)).live(),
    }
}

section! {
    /// What is logged.
    pub struct Logging = "logging" {
        /// The least that is logged.
        pub level: log::LevelFilter = key(Info, one_of("level", LEVELS)).variable("LOG_LEVEL").live(),
        /// How a line looks. `plain` is `text`.
        pub format: LogFormat = key(LogFormat::Text, one_of("format", FORMATS)),
    }
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Plain text.
    Text,
}

const LEVELS: &[(&str, log::LevelFilter)] =
    &[("error", Error), ("warn", Warn), ("info", Info), ("debug", Debug), ("trace", Trace)];

const FORMATS: &[(&str, LogFormat)] =
    &[("json", LogFormat::Json), ("text", LogFormat::Text), ("plain", LogFormat::Text)];

section! {
    /// The HTTP server: probes, metrics, status.
    pub struct HttpEndpoint = "metrics" {
        /// false: no HTTP server.
        pub enabled: bool = key(true, boolean()),
        /// Address to listen on.
        pub address: IpAddr = key(IpAddr::V4(Ipv4Addr::UNSPECIFIED), checked_by(address)),
        /// Port; 0 picks a free one.
        pub port: u16 = key(8080, count(0..=65_535)),
        /// Path of the metrics; not one of the paths the server has anyway.
        pub path: String = key("/metrics".to_owned(), checked_by(metrics_path)),
    }
}

fn address(node: &Node) -> Result<IpAddr, String> {
    text(node)?.parse().map_err(|_| {
        format!("{} is not an IP address; allowed: such as 0.0.0.0, 127.0.0.1 or ::", shown(node))
    })
}

fn metrics_path(node: &Node) -> Result<String, String> {
    let path = text(node)?;
    if OTHER_PATHS.contains(&path) {
        return Err(format!("{} is taken; allowed: any path but {}", shown(node), OTHER_PATHS.join(" ")));
    }
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic() && !b"?#%\"".contains(&b)) {
        return Err(format!("{} is not a path; allowed: such as /metrics", shown(node)));
    }
    Ok(path.to_owned())
}
