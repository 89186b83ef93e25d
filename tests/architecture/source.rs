//! A file of the repository: its text, what it parses to, and which of it is the program.
//!
//! Test code is left out where a rule is about the program: every item behind `#[cfg(test)]`, wherever it stands in its
//! file, and files that are called `tests.rs` or stand in the folder of one.

use std::fs;
use std::path::Path;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// A Rust file of the repository.
pub struct Source {
    /// Path from the root: `src/postgres.rs`.
    pub path: String,
    pub text: String,
    pub parsed: syn::File,
    /// How many lines the program has in it.
    pub lines: usize,
    /// The text, with the lines of tests empty.
    program: String,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Source {
        let parsed = syn::parse_file(text).unwrap_or_else(|error| panic!("{path}: no Rust: {error}"));
        let mut tests = TestItems::default();
        tests.visit_file(&parsed);
        let is_test = |number: usize| tests.0.iter().any(|(first, last)| (first..=last).contains(&&number));
        let (mut program, mut lines) = (String::new(), 0);
        if !is_tests(path) {
            for (index, line) in text.lines().enumerate() {
                if !is_test(index + 1) {
                    program.push_str(line);
                    lines += 1;
                }
                program.push('\n');
            }
        }
        Source { path: path.to_owned(), text: text.to_owned(), parsed, lines, program }
    }

    /// The text without its tests; lines keep their numbers.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// The program's lines that are no comments, with their numbers.
    pub fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.program
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

/// Whether the file `path` is the face of `place` (`src/nats` has `src/nats.rs`) or below it.
pub fn is_in(path: &str, place: &str) -> bool {
    path.strip_prefix(place).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

#[track_caller]
pub fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below `folder`, by path.
pub fn sources(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push(Source::new(&path.strip_prefix(root()).unwrap().to_string_lossy(), &text));
            }
        }
    }
    assert!(found.len() > 5, "{folder} has its files");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Whether the file holds tests alone: it is called `tests.rs`, or stands in the folder of one.
pub fn is_tests(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.starts_with("src/") && path.contains("/tests/")
}

/// Whether an item with these attributes is built for tests alone: `#[cfg(test)]` or `#[cfg(all(test, ...))]`.
pub fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let mut found = false;
        if attribute.path().is_ident("cfg") {
            // What is no list of this form, such as `feature = "x"`, is no test.
            let _ = attribute.parse_nested_meta(|meta| {
                found |= meta.path.is_ident("test");
                if meta.path.is_ident("all") {
                    let _ = meta.parse_nested_meta(|within| {
                        found |= within.path.is_ident("test");
                        within.input.parse::<proc_macro2::TokenStream>().map(drop)
                    });
                }
                meta.input.parse::<proc_macro2::TokenStream>().map(drop)
            });
        }
        found
    })
}

/// The attributes of an item, where an item has some.
pub fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    use syn::Item::*;
    match item {
        Const(syn::ItemConst { attrs, .. })
        | Enum(syn::ItemEnum { attrs, .. })
        | ExternCrate(syn::ItemExternCrate { attrs, .. })
        | Fn(syn::ItemFn { attrs, .. })
        | ForeignMod(syn::ItemForeignMod { attrs, .. })
        | Impl(syn::ItemImpl { attrs, .. })
        | Macro(syn::ItemMacro { attrs, .. })
        | Mod(syn::ItemMod { attrs, .. })
        | Static(syn::ItemStatic { attrs, .. })
        | Struct(syn::ItemStruct { attrs, .. })
        | Trait(syn::ItemTrait { attrs, .. })
        | TraitAlias(syn::ItemTraitAlias { attrs, .. })
        | Type(syn::ItemType { attrs, .. })
        | Union(syn::ItemUnion { attrs, .. })
        | Use(syn::ItemUse { attrs, .. }) => attrs,
        _ => &[],
    }
}

/// The attributes of what stands in an `impl`.
pub fn impl_attributes(item: &syn::ImplItem) -> &[syn::Attribute] {
    match item {
        syn::ImplItem::Const(item) => &item.attrs,
        syn::ImplItem::Fn(item) => &item.attrs,
        syn::ImplItem::Type(item) => &item.attrs,
        syn::ImplItem::Macro(item) => &item.attrs,
        _ => &[],
    }
}

/// First and last line of each item that is for tests alone.
#[derive(Default)]
struct TestItems(Vec<(usize, usize)>);

impl TestItems {
    fn add(&mut self, span: proc_macro2::Span) {
        self.0.push((span.start().line, span.end().line));
    }
}

impl<'ast> Visit<'ast> for TestItems {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        match is_for_tests(attributes(item)) {
            true => self.add(item.span()),
            false => visit::visit_item(self, item),
        }
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        match is_for_tests(impl_attributes(item)) {
            true => self.add(item.span()),
            false => visit::visit_impl_item(self, item),
        }
    }
}

#[test]
fn test_code_is_no_program_wherever_it_stands() {
    let text = "//! A file.\n\nfn a() {}\n\n#[cfg(test)]\nmod tests {\n    fn t() {}\n}\n\nimpl S {\n    #[cfg(all(test, \
                feature = \"f\"))]\n    fn u() {}\n\n    #[cfg(not(test))]\n    fn b() {}\n}\n\n#[cfg(feature = \
                \"test\")]\nfn c() {}\n";
    let program: String = Source::new("src/a.rs", text).program().split('\n').collect::<Vec<_>>().concat();
    for kept in ["fn a()", "impl S", "fn b()", "fn c()", "//! A file."] {
        assert!(program.contains(kept), "{kept}: {program}");
    }
    for left_out in ["mod tests", "fn t()", "fn u()", "all(test"] {
        assert!(!program.contains(left_out), "{left_out}: {program}");
    }
    assert_eq!(Source::new("src/a/tests.rs", "//! Tests.\nfn a() {}\n").program(), "");
}
