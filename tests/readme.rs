//! The README names every key of the configuration and every metric, and no metric that is none.

use std::collections::BTreeSet;
use std::fs;

use pg_outbox::ops::metrics::Metrics;
use serde_yaml::Value;

use crate::architecture::source::{assert_none, root};

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The keys of etc/config.yaml with their sections, the commented ones included: a `#` right before a key.
fn config_keys() -> BTreeSet<String> {
    let text: String = read("etc/config.yaml")
        .lines()
        .map(|line| {
            let trimmed = line.trim_start();
            let indent = &line[..line.len() - trimmed.len()];
            match trimmed.strip_prefix('#') {
                Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) => format!("{indent}{key}\n"),
                _ => format!("{line}\n"),
            }
        })
        .collect();
    let yaml: Value = serde_yaml::from_str(&text).unwrap();
    let mut keys = BTreeSet::new();
    for (section, values) in yaml.as_mapping().unwrap() {
        add_keys(&mut keys, section.as_str().unwrap(), values);
    }
    keys
}

fn add_keys(keys: &mut BTreeSet<String>, path: &str, value: &Value) {
    match value.as_mapping() {
        Some(values) => {
            for (key, value) in values {
                add_keys(keys, &format!("{path}.{}", key.as_str().unwrap()), value);
            }
        }
        None => assert!(keys.insert(path.to_owned()), "{path} twice"),
    }
}

#[test]
fn the_readme_names_every_key_of_the_configuration() {
    let (readme, keys) = (read("README.md"), config_keys());
    assert!(keys.contains("dispatcher.batch_size") && keys.contains("nats.jetstream.subjects"), "{keys:?}");
    let missing: Vec<String> = keys.into_iter().filter(|key| !readme.contains(&format!("`{key}`"))).collect();
    assert_none(&missing, "keys of etc/config.yaml that the README does not name");
}

/// The words of `text` that begin with `outbox_` and are written as code, on their own or before a `{` or a space.
fn outbox_words(text: &str) -> BTreeSet<&str> {
    text.match_indices("outbox_")
        .filter(|(at, _)| !text[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '-'))
        .map(|(at, _)| {
            let rest = &text[at..];
            &rest[..rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len())]
        })
        .collect()
}

#[test]
fn the_readme_names_every_metric_and_no_other() {
    let rendered = Metrics::new().render();
    let exposed: BTreeSet<&str> = rendered
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .filter(|name| name.starts_with("outbox_"))
        .collect();
    assert!(exposed.contains("outbox_events_published_total"), "{exposed:?}");
    let readme = read("README.md");
    let named = outbox_words(&readme);
    let missing: Vec<String> = exposed.difference(&named).map(|name| (*name).to_owned()).collect();
    assert_none(&missing, "metrics that the README does not name");
    // What else is called so is in the schema, or the name of the library.
    let schema: String = fs::read_dir(root().join("schema"))
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    let in_schema = outbox_words(&schema);
    let other: Vec<String> = named
        .iter()
        .filter(|name| !exposed.contains(*name) && !in_schema.contains(*name))
        .map(|name| (*name).to_owned())
        .collect();
    assert_none(&other, "the README names what is no metric and not in the schema");
}
