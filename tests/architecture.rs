//! The rules of the code that a test can keep: which file and which crate is named where, how long a file and a function
//! may be, and what no file may hold.
//!
//! `source` reads and parses the files, `names` says what each of them names, and `arrows` what it may name; `planted`
//! tries that on lines that break it. `size` measures files and functions, and finds names of several types. The rules
//! in this file look for words in lines.

mod arrows;
mod names;
mod planted;
mod size;
pub mod source;

use source::{Source, assert_none, sources};

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
