//! The rules of the code that a test can keep: which crate is named where, and what no file may hold.
//!
//! It reads the files of the repository as text. Test code within `src` is left out where a rule is about the
//! program: everything from a file's `#[cfg(test)]` on, and files that are called `tests.rs`.

use std::fs;
use std::path::{Path, PathBuf};

/// A file of the repository.
struct Source {
    /// Path from the root: `src/postgres.rs`.
    path: String,
    text: String,
}

impl Source {
    /// The text without its tests.
    fn program(&self) -> &str {
        if self.path.ends_with("/tests.rs") {
            return "";
        }
        self.text.split("#[cfg(test)]").next().unwrap_or_default()
    }

    /// The program's lines that are no comments, with their numbers.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.program()
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    fn is_below(&self, place: &str) -> bool {
        self.path == place || self.path.starts_with(place.strip_suffix(".rs").unwrap_or(place))
    }
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below `folder`.
fn sources(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(source(&path));
            }
        }
    }
    assert!(found.len() > 5, "{folder} has its files");
    found
}

fn source(path: &PathBuf) -> Source {
    let text = fs::read_to_string(path).unwrap();
    Source { path: path.strip_prefix(root()).unwrap().to_string_lossy().into_owned(), text }
}

/// Lines of the program that `breaks` calls out, as `path:line: text`.
fn lines_that(breaks: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    let files = sources("src");
    let mut found = Vec::new();
    for file in &files {
        for (number, line) in file.code().filter(|(_, line)| breaks(file, line)) {
            found.push(format!("{}:{number}: {}", file.path, line.trim()));
        }
    }
    found
}

#[track_caller]
pub fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// Whether `line`, as rustfmt writes it, has a path that begins with the crate `name`: `name::`, or `use name`.
fn names_crate(line: &str, name: &str) -> bool {
    let line = line.trim_start();
    let path = format!("{name}::");
    let in_a_path = line.match_indices(&path).any(|(at, _)| {
        // `::nats::` is the crate, `config::nats::` and `my_nats::` are not.
        let before = line[..at].strip_suffix("::").unwrap_or(&line[..at]);
        !before.ends_with(|c: char| c.is_alphanumeric() || c == '_')
    });
    in_a_path || line == format!("use {name};") || line.starts_with(&format!("use {name} as "))
}

#[test]
fn each_outside_crate_of_the_core_is_named_in_one_place() {
    let homes = [
        ("nats", "src/nats.rs"),
        ("postgres", "src/postgres.rs"),
        ("r2d2", "src/postgres.rs"),
        ("tokio_postgres_rustls", "src/postgres.rs"),
        ("rustls", "src/tls.rs"),
        ("rustls_native_certs", "src/tls.rs"),
        ("tiny_http", "src/ops/http.rs"),
        ("prometheus", "src/ops/metrics.rs"),
    ];
    for (name, home) in homes {
        let named = lines_that(|file, line| file.is_below(home) && names_crate(line, name));
        assert!(!named.is_empty(), "{name} is not even named in {home}: is this test blind?");
        let elsewhere = lines_that(|file, line| !file.is_below(home) && names_crate(line, name));
        assert_none(&elsewhere, &format!("{name} is named outside {home}"));
    }
}

#[test]
fn nothing_unwraps_outside_tests() {
    assert_none(&lines_that(|_, line| line.contains(".unwrap()")), "unwrap outside tests");
    assert_none(&lines_that(|_, line| line.contains(".expect(\"\")")), "expect without a reason");
}

#[test]
fn only_main_ends_the_process() {
    let exits = lines_that(|file, line| {
        file.path != "src/main.rs" && (line.contains("process::exit") || line.contains("process::abort"))
    });
    assert_none(&exits, "the process is ended elsewhere than in main");
}

#[test]
fn every_channel_is_bounded() {
    let unbounded = |line: &str| {
        line.contains("unbounded(") || line.contains("unbounded::<") || line.contains("mpsc::channel")
    };
    assert_none(&lines_that(|_, line| unbounded(line)), "a channel without a limit");
}

#[test]
fn every_file_says_first_what_it_is() {
    let mut silent = Vec::new();
    for file in sources("src").iter().chain(&sources("tests")) {
        if !file.text.starts_with("//! ") {
            silent.push(file.path.clone());
        }
    }
    assert_none(&silent, "a file does not begin with //!");
}
