//! What can be wrong with a configuration: the faults of one value, the problems of a file, and the error that a user
//! reads.
//!
//! Plain data, on the thread that loads the configuration. A check of a value yields [`Faults`], which know nothing of
//! the key; the reading adds the key and the place and makes a [`Problem`] of each; [`ConfigError`] holds their lines.
//! Nothing here looks at a value, so no secret can come in but in a text that somebody wrote.

use std::fmt;

/// All that is wrong with a configuration. Displays one problem a line, in the order of the file:
/// `file:line:column: key: what is wrong; what is allowed`, or `environment: VARIABLE: ...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub(super) problems: Vec<String>,
}

impl ConfigError {
    /// The problems, each on one line; at least one.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    pub(super) fn of_yaml(name: &str, error: &serde_yaml::Error) -> ConfigError {
        let reason = error.to_string();
        let problem = match error.location() {
            None => format!("{name}: not YAML: {reason}"),
            Some(location) => {
                let (line, column) = (location.line(), location.column());
                let reason = reason.replacen(&format!(" at line {line} column {column}"), "", 1);
                format!("{name}:{line}:{column}: not YAML: {reason}")
            }
        };
        ConfigError { problems: vec![problem] }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// What is wrong with one value: one fault, or several within a list or mapping.
#[derive(Debug, Default)]
pub(super) struct Faults(pub(super) Vec<Fault>);

/// One of them.
#[derive(Debug)]
pub(super) struct Fault {
    /// The node within the value; `None` for the value itself.
    pub(super) node: Option<usize>,
    /// What to append to the key, such as `[2]`.
    pub(super) suffix: String,
    pub(super) text: String,
}

impl Faults {
    pub(super) fn add(&mut self, node: Option<usize>, suffix: String, text: String) {
        self.0.push(Fault { node, suffix, text });
    }

    pub(super) fn extend(&mut self, other: Faults) {
        self.0.extend(other.0);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What the first of them says; empty without any.
    pub(super) fn first_text(self) -> String {
        self.0.into_iter().next().map(|fault| fault.text).unwrap_or_default()
    }
}

impl From<String> for Faults {
    fn from(text: String) -> Faults {
        Faults(vec![Fault { node: None, suffix: String::new(), text }])
    }
}

/// Where a value comes from. Problems are sorted by it: the file from its beginning, then the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum WrittenAt {
    Node(usize),
    Environment(&'static str),
}

/// What is wrong with the configuration at one place.
pub(super) struct Problem {
    pub(super) place: WrittenAt,
    /// The key in full; empty for the file as a whole.
    pub(super) key: String,
    pub(super) text: String,
}
