//! What the commands have in common towards a person: text from events that cannot steer a terminal, and the question
//! before more than one event is changed.
//!
//! The question goes to stderr, so that stdout stays what a script reads. Without a terminal to answer it nothing is
//! asked and nothing is done: the flag that answers beforehand is named instead.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Result, bail};

use crate::ops::logging::turns_text;

/// Longest text shown in a table, in characters.
pub const SHOWN_MAX: usize = 70;

/// Whether the operator has agreed beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// By `--yes`.
    Given,
    /// To be asked for.
    Ask,
}

/// Text from events, so that it fits and cannot steer a terminal.
pub fn printable(text: &str) -> String {
    let mut short: String = harmless(text).chars().take(SHOWN_MAX).collect();
    if text.chars().count() > SHOWN_MAX {
        short.push('…');
    }
    short
}

/// Text from events, whole, so that it cannot steer a terminal.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || turns_text(c) { '\u{fffd}' } else { c }).collect()
}

/// Asks whether to do `what` to `count` things. More than one want a yes, one goes without saying.
///
/// # Errors
/// A yes is needed and there is no terminal to ask for it.
pub fn agreed(what: &str, count: usize, consent: Consent) -> Result<bool> {
    if consent == Consent::Given || count <= 1 {
        return Ok(true);
    }
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        bail!("{what}: nothing done, as there is no terminal to ask for a yes; --yes gives it beforehand");
    }
    let mut stderr = std::io::stderr();
    write!(stderr, "{what}? [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_events_cannot_steer_a_terminal() {
        assert_eq!(printable("a\x1b[2J\nb"), "a\u{fffd}[2J\u{fffd}b");
        assert_eq!(printable("a\u{202e}b\u{2066}"), "a\u{fffd}b\u{fffd}");
        assert_eq!(printable(&"ä".repeat(200)).chars().count(), SHOWN_MAX + 1);
        assert_eq!(
            harmless(&format!("{}\u{9b}2J", "ä".repeat(200))),
            format!("{}\u{fffd}2J", "ä".repeat(200))
        );
    }

    #[test]
    fn one_goes_without_saying_and_more_with_a_yes() {
        assert!(agreed("retry 1", 1, Consent::Ask).unwrap());
        assert!(agreed("retry 100", 100, Consent::Given).unwrap());
    }
}
