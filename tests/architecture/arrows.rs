//! Which file may name which, and which outside crates: the floors, no circles, one home for each crate of the core.
//!
//! The rules are functions of a set of sources, and what they find is said in lines. So each rule is tried on the real
//! sources, where it must find nothing, and on copies of them with one line planted, where it must name that.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::names::Names;
use super::source::{Source, assert_none, is_in, sources};

/// The places of the program and the floors they stand on, as the map in `src/lib.rs` has them. A file names files of
/// its own place and of floors below; two places on one floor do not name each other.
const FLOORS: [(&str, u8); 16] = [
    ("src/main", 12),
    ("src/cli", 11),
    ("src/lab", 10),
    ("src/command", 9),
    ("src/service", 8),
    ("src/claim", 7),
    ("src/publish", 6),
    ("src/nats", 5),
    ("src/ops", 4),
    ("src/postgres", 3),
    ("src/config", 2),
    ("src/event", 1),
    ("src/lane", 1),
    ("src/tls", 0),
    ("src/boottime", 0),
    ("src/failpoint", 0),
];

/// Declares the modules, and has nothing that a file could name.
const MAP: &str = "src/lib.rs";

/// Outside crates, each with the places that may name it.
const HOMES: [(&str, &[&str]); 19] = [
    ("nats", &["src/nats"]),
    ("nkeys", &["src/nats"]),
    ("data_encoding", &["src/nats"]),
    ("postgres", &["src/postgres"]),
    ("r2d2", &["src/postgres"]),
    ("r2d2_postgres", &["src/postgres"]),
    ("tokio_postgres_rustls", &["src/postgres"]),
    ("prometheus", &["src/ops/metrics"]),
    ("tiny_http", &["src/ops/http"]),
    ("env_logger", &["src/ops/logging"]),
    ("serde_yaml", &["src/config"]),
    ("rustls", &["src/tls"]),
    ("rustls_native_certs", &["src/tls"]),
    ("plotters", &["src/lab"]),
    ("indicatif", &["src/lab"]),
    ("tempfile", &["src/lab"]),
    ("clap", &["src/cli", "src/main", "src/command/generate"]),
    ("clap_complete", &["src/command/generate"]),
    ("clap_mangen", &["src/command/generate"]),
];

type Named = BTreeMap<(String, String), BTreeSet<String>>;

fn floor_of(path: &str) -> Option<(&'static str, u8)> {
    FLOORS.into_iter().find(|(place, _)| is_in(path, place))
}

/// How it is written: the paths that say the whole of it if there are any, else the words behind an import.
fn written(names: &BTreeSet<String>) -> String {
    let is_whole = |name: &&str| {
        ["crate::", "super::", "self::", "pg_outbox::"].iter().any(|root| name.starts_with(root))
    };
    let mut shown: Vec<&str> = names.iter().map(String::as_str).filter(is_whole).collect();
    if shown.is_empty() {
        shown = names.iter().map(String::as_str).collect();
    }
    shown.join(", ")
}

/// The arrows that do not point down.
fn arrows_up(named: &Named) -> Vec<String> {
    let mut found = Vec::new();
    for ((from, to), names) in named.iter().filter(|((from, _), _)| from != MAP) {
        let why = match (floor_of(from), floor_of(to)) {
            (None, _) => format!("{from} stands on no floor"),
            (_, None) => format!("{to} stands on no floor"),
            (Some((of, _)), Some((place, _))) if of == place => continue,
            (Some((_, above)), Some((_, below))) if above > below => continue,
            (Some((_, lower)), Some((_, upper))) => format!("floor {lower} names floor {upper}"),
        };
        found.push(format!("{from} names {to} ({}): {why}", written(names)));
    }
    found
}

/// Whether `face` is the face of a folder that `file` is in: `src/a.rs` of `src/a/b.rs` and of `src/a/b/c.rs`.
fn is_face_of(face: &str, file: &str) -> bool {
    face.strip_suffix(".rs").is_some_and(|folder| file != face && is_in(file, folder))
}

/// The circles among files. A face and the files of its folder may name each other; a circle that leaves the folder, or
/// closes without the face, is one.
fn circles(named: &Named) -> Vec<String> {
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (from, to) in named.keys() {
        graph.entry(from).or_default().insert(to);
        graph.entry(to).or_default();
    }
    let mut found = Vec::new();
    let mut rest = connected(&graph, &graph.keys().copied().collect());
    while let Some(files) = rest.pop() {
        let is_face_of_all = |face: &str| files.iter().all(|file| *file == face || is_face_of(face, file));
        if let Some(face) = files.iter().copied().find(|face| is_face_of_all(face)) {
            let others = files.iter().copied().filter(|file| *file != face).collect();
            rest.extend(connected(&graph, &others));
        } else {
            found.push(circle(named, &graph, &files));
        }
    }
    found
}

/// The sets of two files and more, all in `among`, of which each leads to each other.
fn connected<'a>(
    graph: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    among: &BTreeSet<&'a str>,
) -> Vec<BTreeSet<&'a str>> {
    let reached = |from: &'a str| paths(graph, among, from).into_keys().collect::<BTreeSet<&str>>();
    let from: BTreeMap<&str, BTreeSet<&str>> = among.iter().map(|file| (*file, reached(file))).collect();
    let mut found: Vec<BTreeSet<&str>> = Vec::new();
    for file in among {
        if found.iter().all(|known| !known.contains(file)) {
            let both = from[file].iter().filter(|other| from[*other].contains(file)).copied().collect();
            found.push(both);
        }
    }
    found.retain(|files| files.len() > 1);
    found
}

/// Every file that a file leads to within `among`, with the one before it on a shortest way; itself only by a circle.
fn paths<'a>(
    graph: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    among: &BTreeSet<&'a str>,
    from: &'a str,
) -> BTreeMap<&'a str, &'a str> {
    let mut before = BTreeMap::new();
    let mut next = VecDeque::from([from]);
    while let Some(file) = next.pop_front() {
        for to in graph[file].intersection(among) {
            if !before.contains_key(to) {
                before.insert(*to, file);
                next.push_back(to);
            }
        }
    }
    before
}

/// A shortest circle in `files` that is not just one of a face and a file of its folder.
fn circle<'a>(
    named: &Named,
    graph: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    files: &BTreeSet<&'a str>,
) -> String {
    let mut shortest: Option<Vec<&str>> = None;
    for first in files {
        for second in graph[first].intersection(files).filter(|second| !is_face_of(first, second)) {
            let before = paths(graph, files, second);
            let mut way = vec![*first];
            while way.last() != Some(second) {
                way.push(before[way[way.len() - 1]]);
            }
            let is_excepted = way.len() == 2 && is_face_of(second, first);
            if !is_excepted && shortest.as_ref().is_none_or(|known| way.len() < known.len()) {
                shortest = Some(way);
            }
        }
    }
    let mut way = shortest.expect("files that lead to each other are on a circle");
    way.reverse();
    let steps = (0..way.len()).map(|at| {
        let (from, to) = (way[at].to_owned(), way[(at + 1) % way.len()].to_owned());
        let names = written(&named[&(from.clone(), to.clone())]);
        format!("{from} names {to} ({names})")
    });
    format!("a circle: {}", steps.collect::<Vec<_>>().join("; "))
}

/// Where a crate of the core is named outside its home.
fn crates_abroad(named: &Named) -> Vec<String> {
    let mut found = Vec::new();
    for (name, homes) in HOMES {
        for ((_, file), names) in named.iter().filter(|((of, _), _)| of == name) {
            if !homes.iter().any(|home| is_in(file, home)) {
                found.push(format!(
                    "{file} names the crate {name} ({}), which belongs to {}",
                    written(names),
                    homes[0]
                ));
            }
        }
    }
    found
}

pub fn broken(sources: &[Source]) -> Vec<String> {
    let names = Names::of(sources);
    [arrows_up(&names.files), circles(&names.files), crates_abroad(&names.crates)].concat()
}

#[test]
fn arrows_point_down_and_nothing_goes_in_circles() {
    let names = Names::of(&sources("src"));
    let found = [arrows_up(&names.files), circles(&names.files)].concat();
    assert_none(&found, "files may name files of their place and of floors below");
    let into_lab = names.files.keys().filter(|(from, to)| is_in(to, "src/lab") && !is_in(from, "src/lab"));
    let strangers: Vec<_> = into_lab.filter(|(from, _)| !is_in(from, "src/cli")).collect();
    assert!(strangers.is_empty(), "only the command line names what is no part of the daemon: {strangers:?}");
}

#[test]
fn each_outside_crate_of_the_core_is_named_in_one_place() {
    let names = Names::of(&sources("src"));
    let found = crates_abroad(&names.crates);
    assert_none(&found, "a crate of the core is named outside its home");
    for (name, homes) in HOMES {
        for home in homes {
            let is_there = names.crates.keys().any(|(of, file)| of == name && is_in(file, home));
            assert!(is_there, "{name} is not even named in {home}: is this test blind?");
        }
    }
}

#[test]
fn every_place_has_a_face_and_stands_in_the_map() {
    let files = sources("src");
    let map = files.iter().find(|file| file.path == MAP).unwrap();
    for file in files.iter().filter(|file| file.path != MAP) {
        let (place, floor) =
            floor_of(&file.path).unwrap_or_else(|| panic!("{} stands on no floor", file.path));
        let face = format!("{place}.rs");
        assert!(files.iter().any(|file| file.path == face), "{} is in a folder without {face}", file.path);
        let name = place.strip_prefix("src/").unwrap();
        let row = map.text.lines().find(|line| {
            line.starts_with(&format!("//! | {floor} |"))
                && (line.contains(&format!("`{name}`")) || line.contains(&format!("`mod@{name}`")))
        });
        assert!(row.is_some() || name == "main", "the map in {MAP} does not have {name} on floor {floor}");
    }
}
