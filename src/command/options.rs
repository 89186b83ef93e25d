//! What several commands are told on the command line: whether to do it or only say it, whether to ask first, and how
//! to print what there is.
//!
//! Plain data. The flags themselves (`--dry-run`, `--yes`, `--json`) are the command line's.

use std::io::Write;

use anyhow::{Context, Result};
use serde::Serialize;

use super::terminal::Consent;

/// Whether to do it or to say what would be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Do it.
    Real,
    /// Only say it.
    Dry,
}

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Tables and sentences.
    Table,
    /// JSON.
    Json,
}

/// How a change is made.
#[derive(Debug, Clone, Copy)]
pub struct ChangeOptions {
    /// Whether to do it.
    pub mode: Mode,
    /// Whether to ask first.
    pub consent: Consent,
    /// How to say what was done.
    pub format: Format,
}

/// Prints `value` as JSON on one line.
///
/// # Errors
/// `out` cannot be written.
pub fn print_json_line(value: &impl Serialize, out: &mut impl Write) -> Result<()> {
    writeln!(out, "{}", serde_json::to_string(value).context("write JSON")?)?;
    Ok(())
}

/// Prints `value` as JSON on lines that a person can read.
///
/// # Errors
/// `out` cannot be written.
pub fn print_json(value: &impl Serialize, out: &mut impl Write) -> Result<()> {
    writeln!(out, "{}", serde_json::to_string_pretty(value).context("write JSON")?)?;
    Ok(())
}
