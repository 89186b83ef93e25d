//! YAML text to a tree of nodes, and each node's place in the text.
//!
//! serde_yaml reads the text, but forgets where a value stood once it is read; it only tells the place of an
//! error. So nodes are numbered in the order in which they are read, and [`locate`] reads the text once more
//! and fails on purpose at the wanted number: the error then has the line and the column. That costs nothing
//! unless there is a problem to report, and needs no second YAML parser, which would have to agree with the
//! first on every text. The tree keeps all entries of a mapping, so that a key written twice can be reported.
//! A node read through an alias is found where its anchor is. Nesting and aliases are bounded by serde_yaml.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// A key or a value.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// Its number in the order of the text.
    pub(super) id: usize,
    pub(super) value: Value,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Bool(bool),
    /// As text, so that no range or precision is lost before it is checked.
    Number(String),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

/// Reads `text`. An empty text is a null.
pub(super) fn parse(text: &str) -> Result<Node, serde_yaml::Error> {
    read(text, None)
}

/// Line and column, from 1, of node `id` of a text that [`parse`] took.
pub(super) fn locate(text: &str, id: usize) -> Option<(usize, usize)> {
    let location = read(text, Some(id)).err()?.location()?;
    Some((location.line(), location.column()))
}

fn read(text: &str, stop_at: Option<usize>) -> Result<Node, serde_yaml::Error> {
    let walk = Walk { next: Cell::new(0), stop_at };
    walk.deserialize(serde_yaml::Deserializer::from_str(text))
}

struct Walk {
    next: Cell<usize>,
    stop_at: Option<usize>,
}

impl Walk {
    fn number<E: Error>(&self) -> Result<usize, E> {
        let id = self.next.get();
        self.next.set(id + 1);
        if self.stop_at == Some(id) { Err(E::custom("found")) } else { Ok(id) }
    }

    fn leaf<E: Error>(&self, value: Value) -> Result<Node, E> {
        Ok(Node { id: self.number()?, value })
    }
}

impl<'de> DeserializeSeed<'de> for &Walk {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &Walk {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value without a tag")
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        self.leaf(Value::Null)
    }
    fn visit_none<E: Error>(self) -> Result<Node, E> {
        self.leaf(Value::Null)
    }
    fn visit_bool<E: Error>(self, value: bool) -> Result<Node, E> {
        self.leaf(Value::Bool(value))
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<Node, E> {
        self.leaf(Value::Number(value.to_string()))
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<Node, E> {
        self.leaf(Value::Number(value.to_string()))
    }
    fn visit_i128<E: Error>(self, value: i128) -> Result<Node, E> {
        self.leaf(Value::Number(value.to_string()))
    }
    fn visit_u128<E: Error>(self, value: u128) -> Result<Node, E> {
        self.leaf(Value::Number(value.to_string()))
    }
    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        self.leaf(Value::Number(value.to_string()))
    }
    fn visit_str<E: Error>(self, value: &str) -> Result<Node, E> {
        self.leaf(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Node, A::Error> {
        let id = self.number()?;
        let mut list = Vec::new();
        while let Some(element) = elements.next_element_seed(self)? {
            list.push(element);
        }
        Ok(Node { id, value: Value::List(list) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let id = self.number()?;
        let mut map = Vec::new();
        while let Some(key) = entries.next_key_seed(self)? {
            map.push((key, entries.next_value_seed(self)?));
        }
        Ok(Node { id, value: Value::Map(map) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every scalar of `node` with its place, in the order of the text.
    fn places(text: &str, node: &Node, found: &mut Vec<String>) {
        let mut note = |value: &str| {
            let (line, column) = locate(text, node.id).expect("a place");
            found.push(format!("{value}@{line}:{column}"));
        };
        match &node.value {
            Value::Null => note("null"),
            Value::Bool(value) => note(&value.to_string()),
            Value::Number(value) | Value::Text(value) => note(value),
            Value::List(elements) => elements.iter().for_each(|element| places(text, element, found)),
            Value::Map(entries) => entries.iter().for_each(|(key, value)| {
                places(text, key, found);
                places(text, value, found);
            }),
        }
    }

    #[test]
    fn every_key_and_value_has_its_place() {
        let text =
            "# first\na: 1\nb:\n  c: [x, \"y\", -0.5]\n  'd': { e: true,\n    f: ~ }\nb: |\n  text\nz:\n";
        let mut found = Vec::new();
        places(text, &parse(text).unwrap(), &mut found);
        assert_eq!(
            found,
            [
                "a@2:1",
                "1@2:4",
                "b@3:1",
                "c@4:3",
                "x@4:7",
                "y@4:10",
                "-0.5@4:15",
                "d@5:3",
                "e@5:10",
                "true@5:13",
                "f@6:5",
                "null@6:8",
                "b@7:1",
                "text\n@7:4",
                "z@9:1",
                "null@9:3",
            ]
        );
    }

    #[test]
    fn an_alias_stands_where_its_anchor_is() {
        let text = "a: &x [1, 2]\nb: *x\nc: 3\n";
        let mut found = Vec::new();
        places(text, &parse(text).unwrap(), &mut found);
        assert_eq!(found, ["a@1:1", "1@1:8", "2@1:11", "b@2:1", "1@1:8", "2@1:11", "c@3:1", "3@3:4"]);
    }

    #[test]
    fn odd_texts_are_errors_or_nulls_but_no_panics() {
        for text in ["", "# only a comment\n", "---\n", "~", "\u{feff}"] {
            assert!(matches!(parse(text).map(|node| node.value), Ok(Value::Null)), "{text:?}");
        }
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
            d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
        let deep = "[".repeat(10_000);
        for text in ["a: *x", "a: !tag b", "a: b: c", "a\n---\nb", "@", "a: [", bomb, &deep] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(parse("? [a, b]\n: c\n1: d\n<<: *x\n").is_err());
        assert!(parse("? [a, b]\n: c\n1: d\n").is_ok());
    }

    #[test]
    fn random_texts_do_not_panic() {
        let pieces =
            ["a", ": ", "\n", "  ", "- ", "[", "]", "{", "}", ",", "&x ", "*x", "\"", "'", "|\n", "#", "!t "];
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..5_000 {
            let text: String =
                (0..random.usize(..25)).map(|_| pieces[random.usize(..pieces.len())]).collect();
            if let Ok(node) = parse(&text) {
                assert!(locate(&text, node.id).is_some() || text.trim().is_empty(), "{text:?}");
            }
        }
    }
}
