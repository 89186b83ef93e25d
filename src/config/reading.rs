//! The reading of one configuration: takes values out of the tree of nodes, and gathers all problems.
//!
//! Whoever reads asks for each key once, with its declaration (`key.rs`); so the keys that
//! exist are the keys that were asked for, and no list of them can fall behind. A key with a problem yields
//! its default, so that the reading goes on, and what follows from a problem is not reported as another.
//! Runs on the thread that loads the configuration; reads no file and changes nothing.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::faults::{ConfigError, Problem, WrittenAt};
use super::key::{Key, KeyFacts};
use super::secrets::Credentials;
use super::values::{name, shown};
use super::yaml::{self, Node, Value};

/// How many problems are reported. Finding a line reads the text again, and nobody mends more in one go.
const MAX_PROBLEMS: usize = 100;

/// A key that has a value, not just a default.
struct Given {
    place: WrittenAt,
    good: bool,
}

/// A mapping of the file, such as `nats.jetstream`; empty if the file does not have it.
pub(super) struct Section<'n> {
    path: String,
    entries: &'n [(Node, Node)],
}

impl Section<'_> {
    fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

pub(super) struct ConfigReading<'e> {
    environment: &'e dyn Fn(&str) -> Option<String>,
    credentials: Credentials,
    problems: Vec<Problem>,
    /// All keys that exist, sections included, in the order of asking.
    known: Vec<String>,
    keys: Vec<KeyFacts>,
    sections: HashSet<String>,
    given: HashMap<String, Given>,
}

impl<'e> ConfigReading<'e> {
    pub(super) fn new(
        environment: &'e dyn Fn(&str) -> Option<String>,
        credentials: Credentials,
    ) -> ConfigReading<'e> {
        ConfigReading {
            environment,
            credentials,
            problems: Vec::new(),
            known: Vec::new(),
            keys: Vec::new(),
            sections: HashSet::new(),
            given: HashMap::new(),
        }
    }

    /// The file as a whole.
    pub(super) fn root<'n>(&mut self, node: &'n Node) -> Section<'n> {
        self.given.insert(String::new(), Given { place: WrittenAt::Node(node.id), good: true });
        Section { path: String::new(), entries: self.entries(node, "") }
    }

    pub(super) fn section<'n>(&mut self, parent: &Section<'n>, name: &str) -> Section<'n> {
        let path = parent.key(name);
        self.known.push(path.clone());
        self.sections.insert(path.clone());
        let entries = match find(parent, name) {
            None => &[][..],
            Some((key, value)) => {
                self.given.insert(path.clone(), Given { place: WrittenAt::Node(key.id), good: true });
                self.entries(value, &path)
            }
        };
        Section { path, entries }
    }

    fn entries<'n>(&mut self, node: &'n Node, path: &str) -> &'n [(Node, Node)] {
        match &node.value {
            Value::Map(entries) => entries,
            Value::Null => &[],
            _ => {
                let text = format!("{} where a mapping of keys to values is due", shown(node));
                self.problems.push(Problem { place: WrittenAt::Node(node.id), key: path.to_owned(), text });
                &[]
            }
        }
    }

    /// The value of `name` in `section`; `key`'s default if it is absent, null or wrong.
    pub(super) fn value<T>(&mut self, section: &Section<'_>, name: &str, key: Key<T>) -> T {
        let Key { default, kind, reload, variable } = key;
        let key = section.key(name);
        self.known.push(key.clone());
        self.keys.push(KeyFacts { key: key.clone(), allowed: kind.allowed.clone(), reload });
        let Some((place, node)) = self.find_value(section, name, variable) else { return default };
        let read = kind.read(&node, &self.credentials);
        self.given.insert(key.clone(), Given { place, good: read.is_ok() });
        let faults = match read {
            Ok(value) => return value,
            Err(faults) => faults,
        };
        for fault in faults.0 {
            let place = match (place, fault.node) {
                (WrittenAt::Node(_), Some(node)) => WrittenAt::Node(node),
                _ => place,
            };
            self.problems.push(Problem { place, key: key.clone() + &fault.suffix, text: fault.text });
        }
        default
    }

    fn find_value<'n>(
        &self,
        section: &Section<'n>,
        name: &str,
        variable: Option<&'static str>,
    ) -> Option<(WrittenAt, Cow<'n, Node>)> {
        if let Some(variable) = variable
            && let Some(text) = (self.environment)(variable).filter(|text| !text.is_empty())
        {
            let node = Node { id: 0, value: Value::Text(text) };
            return Some((WrittenAt::Environment(variable), Cow::Owned(node)));
        }
        match find(section, name) {
            Some((_, value)) if !matches!(value.value, Value::Null) => {
                Some((WrittenAt::Node(value.id), Cow::Borrowed(value)))
            }
            _ => None,
        }
    }

    /// True if `key` has a value, right or wrong.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.given.contains_key(key)
    }

    /// Reports values that do not go together, at the first of `keys` that has one; silent if one of them is
    /// already known to be wrong. A section stands for a key that is missing from it.
    pub(super) fn clash(&mut self, keys: &[&str], text: String) {
        let given: Vec<(&str, &Given)> =
            keys.iter().filter_map(|key| Some((*key, self.given.get(*key)?))).collect();
        if given.iter().any(|(_, given)| !given.good) {
            return;
        }
        if let Some((key, Given { place, .. })) = given.first() {
            self.problems.push(Problem { place: *place, key: (*key).to_owned(), text });
        }
    }

    /// Reports that `key` of `section` has no value, at the section, or at the file's beginning without one.
    pub(super) fn missing(&mut self, section: &Section<'_>, name: &str, text: String) {
        let place =
            [section.path.as_str(), ""].iter().find_map(|path| self.given.get(*path)).map(|g| g.place);
        let place = place.unwrap_or(WrittenAt::Node(0));
        self.problems.push(Problem { place, key: section.key(name), text });
    }

    /// Reports keys that do not exist or are written twice. To be called once every key was asked for.
    pub(super) fn check_keys(&mut self, root: &Node) {
        self.check_keys_below(root, "");
    }

    fn check_keys_below(&mut self, node: &Node, path: &str) {
        let Value::Map(entries) = &node.value else { return };
        // Below a key that is no section, such as a topic map, the names are the user's.
        let is_section = path.is_empty() || self.sections.contains(path);
        let mut written = HashSet::new();
        for (key, value) in entries {
            let name = name(key);
            let full = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            let is_new = match &key.value {
                Value::Text(text) | Value::Number(text) => written.insert(text),
                _ => true,
            };
            let problem = if !is_new {
                Some("written twice; keep one".to_owned())
            } else if is_section && !self.known.contains(&full) {
                Some(self.unknown(path, &name))
            } else {
                None
            };
            match problem {
                Some(text) => self.problems.push(Problem { place: WrittenAt::Node(key.id), key: full, text }),
                None => self.check_keys_below(value, &full),
            }
        }
    }

    fn unknown(&self, path: &str, name: &str) -> String {
        if name == "\"<<\"" {
            return "merge keys are not supported; write the keys out".to_owned();
        }
        let in_section = |known: &&str| parent(known) == path;
        let keys = || self.known.iter().map(String::as_str);
        let siblings: Vec<&str> = keys().filter(in_section).map(last).collect();
        let closest = siblings.iter().map(|known| (distance(known, name), *known)).min();
        if let Some((distance, known)) = closest
            && distance <= (name.chars().count() / 3).clamp(1, 3)
        {
            return format!("unknown key; did you mean {known}?");
        }
        // The right key in the wrong section, if there is but one of that name.
        let mut elsewhere = keys().filter(|known| last(known) == name);
        if let (Some(known), None) = (elsewhere.next(), elsewhere.next()) {
            return format!("unknown key; did you mean {known}?");
        }
        format!("unknown key; allowed: {}", siblings.join(", "))
    }

    /// All keys that were asked for, without the sections.
    pub(super) fn keys(&self) -> &[KeyFacts] {
        &self.keys
    }

    /// All problems, each with its line; `file` and `text` are the file's name and content.
    pub(super) fn finish(mut self, file: &str, text: &str) -> Result<(), ConfigError> {
        if self.problems.is_empty() {
            return Ok(());
        }
        self.problems.sort_by_key(|problem| problem.place);
        let more = self.problems.len().saturating_sub(MAX_PROBLEMS);
        self.problems.truncate(MAX_PROBLEMS);
        let line = |problem: &Problem| {
            let (place, source) = match problem.place {
                WrittenAt::Environment(variable) => ((usize::MAX, 0), format!("environment: {variable}")),
                WrittenAt::Node(id) => {
                    let (line, column) = yaml::locate(text, id).unwrap_or((1, 1));
                    let key = &problem.key;
                    let separator = if key.is_empty() { "" } else { ": " };
                    ((line, column), format!("{file}:{line}:{column}{separator}{key}"))
                }
            };
            (place, format!("{source}: {}", problem.text))
        };
        let mut lines: Vec<((usize, usize), String)> = self.problems.iter().map(line).collect();
        // Not yet in order: what is read through an alias stands where its anchor does.
        lines.sort_by_key(|(place, _)| *place);
        let mut problems: Vec<String> = lines.into_iter().map(|(_, line)| line).collect();
        if more > 0 {
            problems.push(format!("{file}: and {more} more"));
        }
        Err(ConfigError { problems })
    }
}

fn find<'n>(section: &Section<'n>, wanted: &str) -> Option<&'n (Node, Node)> {
    section.entries.iter().find(|(key, _)| matches!(&key.value, Value::Text(text) if text == wanted))
}

/// The section of a key; empty for a section at the top.
fn parent(key: &str) -> &str {
    key.rsplit_once('.').map_or("", |(parent, _)| parent)
}

/// A key without its section.
fn last(key: &str) -> &str {
    key.rsplit_once('.').map_or(key, |(_, last)| last)
}

/// How many characters must be added, removed, replaced or swapped with their neighbour to make `b` of `a`
/// (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(before_last[j - 2] + 1);
            }
            row.push(least);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn the_distance_of_two_spellings() {
        let cases = [
            ("", "", 0),
            ("abc", "abc", 0),
            ("abc", "", 3),
            ("batch_size", "bach_size", 1),
            ("batch_size", "batch-size", 1),
            ("level", "lveel", 1),
            ("port", "path", 3),
            ("ab", "ba", 1),
        ];
        for (a, b, expected) in cases {
            assert_eq!((distance(a, b), distance(b, a)), (expected, expected), "{a} {b}");
        }
    }
}
