//! `partitions`, `logging` and `metrics`: what the service does beside publishing.
//!
//! Each section's struct, its keys with their ranges and defaults, and how they are read. Pure, on the thread that loads
//! the configuration: it opens no socket and starts no log.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::reading::{ConfigReading, Section};
use super::section::Keys;
use super::values::{DAY, boolean, count, duration_or_off, one_of, shown, text};
use super::yaml::Node;

/// The paths that are taken.
const OTHER_PATHS: [&str; 7] = ["/", "/status", "/recent", "/health", "/healthz", "/ready", "/readyz"];

/// How the monthly partitions of the outbox are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partitions {
    /// Months after this one that have their partition, 1 to 120. Default 3.
    pub premake: u32,
    /// Published events older than this are deleted, whole partitions at a time where possible; 1day to 100years, or
    /// `None` (written `off`): they are kept for ever. Default 30days.
    pub retention: Option<Duration>,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// Level: error, warn, info, debug or trace. Default info.
    pub level: log::LevelFilter,
    /// Format: json or text (plain is the same). Default text.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Plain text.
    Text,
}

/// The HTTP server: probes, metrics, status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// false: no HTTP server. Default true.
    pub enabled: bool,
    /// Address to listen on. Default 0.0.0.0.
    pub address: IpAddr,
    /// Port; 0 picks a free one. Default 8080.
    pub port: u16,
    /// Path of the metrics; not one of the paths the server has anyway. Default /metrics.
    pub path: String,
}

pub(super) fn partitions(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Partitions {
    let section = reading.section(root, "partitions");
    let mut value = Keys { reading, section: &section };
    Partitions {
        premake: value.of("premake", 3, count(1..=120)),
        retention: value.of("retention", Some(30 * DAY), duration_or_off(DAY..=36_525 * DAY)),
    }
}

pub(super) fn logging(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Logging {
    use log::LevelFilter::{Debug, Error, Info, Trace, Warn};
    let section = reading.section(root, "logging");
    let mut value = Keys { reading, section: &section };
    let levels = [("error", Error), ("warn", Warn), ("info", Info), ("debug", Debug), ("trace", Trace)];
    let formats = [("json", LogFormat::Json), ("text", LogFormat::Text), ("plain", LogFormat::Text)];
    Logging {
        level: value.of("level", Info, one_of("level", &levels)),
        format: value.of("format", LogFormat::Text, one_of("format", &formats)),
    }
}

pub(super) fn metrics(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Metrics {
    let section = reading.section(root, "metrics");
    let mut value = Keys { reading, section: &section };
    Metrics {
        enabled: value.of("enabled", true, boolean),
        address: value.of("address", IpAddr::V4(Ipv4Addr::UNSPECIFIED), address),
        port: value.of("port", 8080, count(0..=65_535)),
        path: value.of("path", "/metrics".to_owned(), metrics_path),
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
