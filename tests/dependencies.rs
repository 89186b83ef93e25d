//! What we depend on: licences and sources as `.deny.toml` allows them, and a reason for each crate that we name.
//!
//! Judged from Cargo.lock and the crates' own metadata, without the network. `cargo deny check` looks for known
//! vulnerabilities as well, which needs it.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Where every crate that is not ours comes from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";
/// A reason in fewer characters is none.
const REASON_MIN: usize = 8;

fn read(path: &str) -> String {
    std::fs::read_to_string(format!("{ROOT}/{path}")).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The quoted words between `allow = [` and `]` in `.deny.toml`.
fn allowed_licences() -> BTreeSet<String> {
    let text = read(".deny.toml");
    let (_, list) = text.split_once("\nallow = [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Every package that is built on this platform.
fn packages() -> Vec<Value> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", &platform])
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// Whether an SPDX expression (`A OR B`, `(A OR B) AND C`; older crates write `A/B`) can be met with these licences.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let met = any_of(&mut rest, allowed);
    assert!(rest.is_empty(), "{expression}: cannot read it from {rest:?} on");
    met
}

fn any_of(rest: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    let mut met = all_of(rest, allowed);
    while let ["OR", others @ ..] = rest {
        *rest = others;
        met |= all_of(rest, allowed);
    }
    met
}

fn all_of(rest: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    let mut met = one(rest, allowed);
    while let ["AND", others @ ..] = rest {
        *rest = others;
        met &= one(rest, allowed);
    }
    met
}

fn one(rest: &mut &[&str], allowed: &BTreeSet<String>) -> bool {
    match *rest {
        ["(", inner @ ..] => {
            *rest = inner;
            let met = any_of(rest, allowed);
            assert_eq!(rest.first(), Some(&")"));
            *rest = &rest[1..];
            met
        }
        [licence, "WITH", exception, others @ ..] => {
            *rest = others;
            allowed.contains(&format!("{licence} WITH {exception}"))
        }
        [licence, others @ ..] => {
            *rest = others;
            allowed.contains(*licence)
        }
        [] => false,
    }
}

#[test]
fn an_expression_is_met_as_spdx_says() {
    let allowed = BTreeSet::from(["A".to_owned(), "B".to_owned(), "D WITH E".to_owned()]);
    for (expression, met) in [
        ("A", true),
        ("X", false),
        ("X OR A", true),
        ("X/A", true),
        ("X AND A", false),
        ("A AND B", true),
        ("(X OR A) AND B", true),
        ("(X OR A) AND Y", false),
        ("A OR X AND Y", true),
        ("X AND A OR Y", false),
        ("D WITH E", true),
        ("D WITH E AND X OR B", true),
        ("D", false),
        ("A WITH E", false),
    ] {
        assert_eq!(is_met(expression, &allowed), met, "{expression}");
    }
}

#[test]
fn every_crate_has_an_allowed_licence_and_comes_from_the_registry() {
    let allowed = allowed_licences();
    assert!(allowed.contains("MIT") && allowed.len() < 10, "{allowed:?}");
    let packages = packages();
    assert!(packages.len() > 100, "{}", packages.len());
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_met(licence, &allowed), "{name}: {licence}");
        match package["source"].as_str() {
            None => assert_eq!(name, env!("CARGO_PKG_NAME"), "{name} is ours?"),
            Some(source) => assert_eq!(source, REGISTRY, "{name}"),
        }
    }
}

#[test]
fn every_dependency_is_named_with_its_reason() {
    let manifest = read("Cargo.toml");
    let mut section = "";
    let mut named = 0;
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
        }
        let Some((name, rest)) = line.split_once(" = ") else { continue };
        let of_others = section.contains("dependencies]") && name != env!("CARGO_PKG_NAME");
        if !of_others || line.starts_with('#') {
            continue;
        }
        named += 1;
        let reason = rest.split_once('#').map_or("", |(_, reason)| reason.trim());
        assert!(reason.len() >= REASON_MIN, "Cargo.toml: {name} has no reason: {reason:?}");
    }
    assert!(named > 20, "{named}");
}
