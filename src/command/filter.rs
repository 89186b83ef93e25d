//! How operators name events on the command line: topics with wildcards, and times.
//!
//! Pure: text in, what the store selects by out. A topic pattern becomes a regular expression, so that PostgreSQL
//! selects and nothing travels that was not asked for; a time may be a moment or a while ago, the latter by the
//! database's clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::event::topic_map;

/// The regular expression of PostgreSQL's that matches the topics which a pattern matches: `*` is one token, a last
/// `>` one or more.
///
/// # Errors
/// Why the pattern is none.
pub fn topics(pattern: &str) -> Result<String, String> {
    topic_map::is_pattern(pattern).map_err(str::to_owned)?;
    let tokens: Vec<String> = pattern
        .split('.')
        .map(|token| match token {
            "*" => "[^.]+".to_owned(),
            ">" => ".+".to_owned(),
            literal => escaped(literal),
        })
        .collect();
    Ok(format!("^{}$", tokens.join("[.]")))
}

fn escaped(literal: &str) -> String {
    let mut text = String::with_capacity(literal.len());
    for c in literal.chars() {
        // A backslash before a letter or digit would mean something.
        if c.is_ascii_punctuation() {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

/// A time in milliseconds: since 1970 if above 0, else from now. Written as `2h` (ago), `2026-11-25`, or
/// `2026-11-25T07:30:00Z` (UTC, the `T` may be a blank and the `Z` left out).
///
/// # Errors
/// It is neither.
pub fn time(text: &str) -> Result<i64, String> {
    let text = text.trim();
    if let Ok(ago) = humantime::parse_duration(text) {
        return Ok(-ms(ago));
    }
    let moment = if text.len() == "2026-11-25".len() { format!("{text} 00:00:00") } else { text.to_owned() };
    humantime::parse_rfc3339_weak(&moment)
        .ok()
        .and_then(|moment: SystemTime| moment.duration_since(UNIX_EPOCH).ok())
        .map(ms)
        .filter(|&ms| ms > 0)
        .ok_or_else(|| "write 2h for two hours ago, 2026-11-25, or 2026-11-25T07:30:00Z (UTC)".to_owned())
}

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_pattern_becomes_a_regular_expression() {
        let cases = [
            ("order.placed", r"^order[.]placed$"),
            ("order.*", r"^order[.][^.]+$"),
            ("order.>", r"^order[.].+$"),
            (">", r"^.+$"),
            ("*.placed", r"^[^.]+[.]placed$"),
            ("a+b(c)\\d$.é_9", r"^a\+b\(c\)\\d\$[.]é\_9$"),
        ];
        for (pattern, expected) in cases {
            assert_eq!(topics(pattern).as_deref(), Ok(expected), "{pattern}");
        }
        for pattern in ["", "a..b", "a.>.b", "a*", "a b"] {
            assert!(topics(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn a_time_is_a_moment_or_a_while_ago() {
        let cases = [
            ("2h", Ok(-7_200_000)),
            ("1500ms", Ok(-1_500)),
            ("0s", Ok(0)),
            ("1970-01-02", Ok(86_400_000)),
            ("1970-01-01T00:00:01Z", Ok(1_000)),
            (" 1970-01-01 00:00:01.5 ", Ok(1_500)),
        ];
        for (text, expected) in cases {
            assert_eq!(time(text), expected, "{text}");
        }
        for text in ["", "yesterday", "2026-13-01", "1970-01-01", "12"] {
            assert!(time(text).is_err(), "{text}");
        }
    }
}
