//! What a database can store of a text.
//!
//! Why an event failed is written with its outcome, and a text that PostgreSQL refuses would have the settle tried for
//! ever. No text column holds a NUL, and a database whose encoding is not UTF8 may lack any character beyond ASCII. What
//! cannot be stored is escaped, never left out, and the text is cut to its limit. Pure.

/// Encodings that take any character of ours. (SQL_ASCII takes any bytes.)
pub(super) const WIDE_ENCODINGS: [&str; 2] = ["UTF8", "SQL_ASCII"];

/// Which characters a database has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Any,
    /// These at least.
    Ascii,
}

pub(super) fn storable(text: &str, max_chars: usize, width: Width) -> String {
    let mut stored = String::with_capacity(text.len());
    for c in text.chars().take(max_chars) {
        match width {
            _ if c == '\0' => stored.push('?'),
            Width::Ascii if !c.is_ascii() => stored.extend(c.escape_unicode()),
            Width::Any | Width::Ascii => stored.push(c),
        }
    }
    stored
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_texts_can_be_stored() {
        assert_eq!(storable("a\0b", 3, Width::Any), "a?b");
        assert_eq!(storable("a\0ä中", 4, Width::Ascii), "a?\\u{e4}\\u{4e2d}");
        assert_eq!(storable(&"ä".repeat(5_000), 2_000, Width::Any).chars().count(), 2_000);
    }
}
