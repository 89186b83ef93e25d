//! The rules of `arrows` tried on a copy of the program's sources, with a line planted that breaks one of them.
//!
//! The lines are of every kind that names something: with `use` and without, in a function, in a macro, in a string that
//! serde reads. The copy differs from the program in the planted file alone, so what is found then is of that line.

use super::arrows::broken;
use super::source::{Source, sources};

/// Files to plant into: on the ground floor, beside each other, and naming none of each other.
const ORDER: &str = "src/event/order.rs";
const RETRY: &str = "src/event/retry.rs";
const TOPICS: &str = "src/event/topic_map.rs";

/// A copy of the program's sources, to plant into.
struct Copy {
    files: Vec<Source>,
    /// What the rules find before.
    known: Vec<String>,
}

impl Copy {
    fn new() -> Copy {
        let files = sources("src");
        Copy { known: broken(&files), files }
    }

    /// What the rules find only when each of these files ends with a text; the files are then as before.
    fn found_with(&mut self, planted: &[(&str, &str)]) -> Vec<String> {
        let mut before = Vec::new();
        for (path, text) in planted {
            let at = self.files.iter().position(|file| file.path == *path);
            let file = &mut self.files[at.unwrap_or_else(|| panic!("no {path}"))];
            let with = Source::new(path, &format!("{}\n{text}\n", file.text));
            before.push((at, std::mem::replace(file, with)));
        }
        let found = broken(&self.files).into_iter().filter(|line| !self.known.contains(line)).collect();
        for (at, file) in before.into_iter().rev() {
            self.files[at.unwrap()] = file;
        }
        found
    }
}

/// Plants each text in src/event/order.rs, which must then be found to name the file beside it, by the words beside it.
/// What points up may close a circle as well; nothing else may be found.
#[track_caller]
fn assert_found(cases: &[(&str, &str, &str)]) {
    let mut copy = Copy::new();
    for (text, file, words) in cases {
        let found = copy.found_with(&[(ORDER, text)]);
        let arrow = found.first().unwrap_or_else(|| panic!("nothing was found: {text}"));
        assert!(arrow.starts_with(&format!("{ORDER} names {file}")), "{text}: {found:?}");
        assert!(arrow.contains(words), "{text}: {words} is not in {found:?}");
        let is_of_it =
            |line: &String| line.starts_with("a circle: ") && line.contains(&format!("{ORDER} names {file}"));
        assert!(found[1..].iter().all(is_of_it), "{text}: {found:?}");
    }
}

#[test]
fn an_arrow_up_is_found_however_it_is_written() {
    assert_found(&[
        ("use crate::service::Service;", "src/service.rs", "crate::service::Service in line"),
        ("pub use crate::service::Service as Order2;", "src/service.rs", "crate::service::Service"),
        (
            "fn planted() {\n    step();\n    use crate::service;\n    step();\n}",
            "src/service.rs",
            "crate::service",
        ),
        (
            "fn planted() -> usize {\n    1 + crate::service::planted()\n}",
            "src/service.rs",
            "crate::service::planted",
        ),
        ("fn planted(of: &crate::service::Service) {}", "src/service.rs", "crate::service::Service"),
        (
            "struct Planted<T: Into<Vec<super::super::service::Service>>>(T);",
            "src/service.rs",
            "super::super::service",
        ),
        ("mod planted {\n    use super::super::super::service::Service;\n}", "src/service.rs", "Service"),
        ("use self::super::super::service::*;", "src/service.rs", "self::super::super::service"),
        (
            "use crate::{event::{retry, headers}, service::{self, Service}};",
            "src/service.rs",
            "crate::service::Service",
        ),
        (
            "use crate::{\n    event::retry,\n    // A comment.\n    service::{\n        Service,\n    },\n};",
            "src/service.rs",
            "Service",
        ),
        ("use pg_outbox::service::Service;", "src/service.rs", "pg_outbox::service::Service"),
        (
            "fn planted() {\n    ::pg_outbox::service::planted();\n}",
            "src/service.rs",
            "pg_outbox::service::planted",
        ),
        ("impl crate::service::Planted for Order {}", "src/service.rs", "crate::service::Planted"),
        (
            "#[cfg(feature = \"failpoints\")]\nuse crate::service::Service;",
            "src/service.rs",
            "crate::service::Service",
        ),
        ("#[cfg(not(test))]\nuse crate::service::Service;", "src/service.rs", "crate::service::Service"),
    ]);
}

#[test]
fn an_arrow_up_is_found_in_the_tokens_of_macros_and_attributes() {
    assert_found(&[
        (
            "fn planted() {\n    println!(\"{}\", crate::service::planted());\n}",
            "src/service.rs",
            "crate::service::planted",
        ),
        (
            "fn planted() {\n    vec![1, 2].push(assert!(!super::super::service::IS_SO));\n}",
            "src/service.rs",
            "IS_SO",
        ),
        (
            "macro_rules! planted {\n    ($a:expr) => {\n        $crate::service::planted($a.b)\n    };\n}",
            "src/service.rs",
            "crate::service::planted",
        ),
        (
            "macro_rules! planted {\n    () => {\n        use crate::{event::{retry}, service::{Service}};\n    };\n}",
            "src/service.rs",
            "Service",
        ),
        ("fn planted() {\n    crate::service::planted!();\n}", "src/service.rs", "crate::service::planted"),
        ("#[derive(crate::service::Planted)]\nstruct Planted;", "src/service.rs", "crate::service::Planted"),
        (
            "#[derive(Serialize)]\nstruct Planted {\n    #[serde(with = \"crate::service::text\")]\n    a: u8,\n}",
            "src/service.rs",
            "crate::service::text",
        ),
    ]);
}

#[test]
fn places_on_one_floor_do_not_name_each_other() {
    assert_found(&[("use crate::lane::LANES;", "src/lane", "crate::lane::LANES in line")]);
}

#[test]
fn what_a_face_gives_on_is_named_where_it_is_defined() {
    let mut copy = Copy::new();
    let planted = [
        ("src/event.rs", "pub use order::Order as Planted;"),
        (ORDER, "use super::retry::Policy;"),
        (RETRY, "use crate::event::Planted;"),
    ];
    let found = copy.found_with(&planted);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].contains("src/event/retry.rs names src/event/order.rs (crate::event::Planted"),
        "{found:?}"
    );
}

#[test]
fn comments_strings_and_tests_name_nothing() {
    let mut copy = Copy::new();
    let texts = [
        "// use crate::service::Service;\n/* crate::service::planted() */\n/// [`crate::service::Service`]\nfn planted() {}",
        "const PLANTED: &str = \"use crate::service::Service;\";\nconst RAW: &str = r#\"crate::service::planted()\"#;",
        "fn planted() {\n    log::info!(\"crate::service::planted()\");\n}",
        "#[cfg(test)]\nmod planted {\n    use crate::service::Service;\n}",
        "#[cfg(all(test, feature = \"failpoints\"))]\nfn planted() {\n    crate::service::planted();\n}",
        "impl Order {\n    #[cfg(test)]\n    fn planted() {\n        crate::service::planted();\n    }\n}",
        // One's own module of that name, a variable, a field and a method.
        "mod inner {\n    pub(super) mod service {}\n    pub(in crate::event) use self::service::Planted;\n}",
        "fn planted(service: u8) -> u8 {\n    assert!(service.service().nats > service);\n    service\n}",
    ];
    assert_eq!(copy.found_with(&texts.map(|text| (ORDER, text))), Vec::<String>::new());
}

#[test]
fn a_circle_is_found_whatever_its_length() {
    let mut copy = Copy::new();
    let of_two = [(ORDER, "use super::retry::Policy;"), (RETRY, "fn a() {\n    super::order::planted();\n}")];
    let found = copy.found_with(&of_two);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains(&format!("{ORDER} names {RETRY} (super::retry::Policy in line")), "{found:?}");
    assert!(found[0].contains(&format!("{RETRY} names {ORDER} (super::order::planted in line")), "{found:?}");

    let of_three = [
        (ORDER, "use super::retry::Policy;"),
        (RETRY, "use crate::event::topic_map;"),
        (TOPICS, "pub use super::{headers, order};"),
    ];
    let found = copy.found_with(&of_three);
    assert_eq!(found.len(), 1, "{found:?}");
    for (from, to) in [(ORDER, RETRY), (RETRY, TOPICS), (TOPICS, ORDER)] {
        assert!(found[0].contains(&format!("{from} names {to}")), "{found:?}");
    }
    for two in [[of_three[0], of_three[1]], [of_three[1], of_three[2]], [of_three[2], of_three[0]]] {
        assert_eq!(copy.found_with(&two), Vec::<String>::new());
    }
}

#[test]
fn a_face_and_its_files_may_name_each_other_and_nobody_else_through_them() {
    let mut copy = Copy::new();
    let both =
        [("src/event.rs", "use order::Order;"), (ORDER, "use super::Outcome;"), (RETRY, "use super::Event;")];
    assert_eq!(copy.found_with(&both), Vec::<String>::new());

    // A folder in the folder: the circle goes from its face through the file beside it to a file in it.
    let (inner, names_face) = ("src/event/order/inner.rs", "//! A file.\nuse super::Order;");
    copy.files.push(Source::new(inner, names_face));
    let of_inner =
        [(ORDER, "pub mod inner;\nuse inner::Planted;"), (RETRY, "use super::order::inner::Planted;")];
    assert_eq!(copy.found_with(&of_inner), Vec::<String>::new());
    let closed = [of_inner[0], of_inner[1], (ORDER, "use super::retry::Policy;")];
    let found = copy.found_with(&closed);
    assert_eq!(found.len(), 1, "{found:?}");
    for (from, to) in [(ORDER, RETRY), (RETRY, inner), (inner, ORDER)] {
        assert!(found[0].contains(&format!("{from} names {to}")), "{found:?}");
    }
}

#[test]
fn a_crate_of_the_core_is_found_outside_its_home() {
    let mut copy = Copy::new();
    let crates = [
        ("use nats::Connection;", "nats"),
        ("fn planted(key: ::nkeys::KeyPair) {}", "nkeys"),
        ("fn planted() {\n    use postgres as pg;\n}", "postgres"),
        ("pub use r2d2::{self, Pool};", "r2d2"),
        ("use r2d2_postgres::PostgresConnectionManager;", "r2d2_postgres"),
        (
            "fn planted() {\n    drop(tokio_postgres_rustls::MakeRustlsConnect::new(a));\n}",
            "tokio_postgres_rustls",
        ),
        ("static PLANTED: prometheus::IntCounter = todo();", "prometheus"),
        ("fn planted() {\n    println!(\"{}\", tiny_http::StatusCode(200));\n}", "tiny_http"),
        ("impl From<serde_yaml::Error> for Order {}", "serde_yaml"),
        ("use {plotters::prelude::*, std::fmt};", "plotters"),
        ("extern crate indicatif;", "indicatif"),
        ("use tempfile;", "tempfile"),
        ("#[derive(clap::Parser)]\nstruct Planted;", "clap"),
        ("use rustls::ClientConfig;", "rustls"),
    ];
    let found = copy.found_with(&crates.map(|(text, _)| (ORDER, text)));
    for (text, name) in crates {
        let words = format!("{ORDER} names the crate {name} (");
        assert_eq!(found.iter().filter(|line| line.starts_with(&words)).count(), 1, "{text}: {found:?}");
    }
    assert_eq!(found.len(), crates.len(), "{found:?}");
    // Our own modules of the same names are not the crates.
    let above = [(
        "src/service.rs",
        "use crate::{nats, postgres};\nfn planted() {\n    nats::planted(postgres::x::Y);\n}",
    )];
    assert_eq!(copy.found_with(&above), Vec::<String>::new());
    // A face does not carry a crate out of its home.
    let carried = [
        ("src/postgres.rs", "pub use r2d2::Pool as Planted;"),
        ("src/service.rs", "fn planted(pool: crate::postgres::Planted) {}"),
    ];
    let found = copy.found_with(&carried);
    assert!(found.len() == 1 && found[0].starts_with("src/service.rs names the crate r2d2"), "{found:?}");
}
