//! How long a file and a function may be, and that one name is the name of one type.

use std::collections::BTreeMap;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::source::{Source, assert_none, attributes, impl_attributes, is_for_tests, is_tests, sources};

/// Longest file, without its tests.
const FILE_LINES_MAX: usize = 500;
/// Longest `main.rs`.
const MAIN_LINES_MAX: usize = 40;
/// Longest function, from `fn` to its closing brace: about a screen.
const FUNCTION_LINES_MAX: usize = 60;
/// A function may be longer for a reason, which stands in the comment above it behind this.
const REASON: &str = "// Long: ";

fn long_files(files: &[Source]) -> Vec<String> {
    let limit = |file: &Source| if file.path == "src/main.rs" { MAIN_LINES_MAX } else { FILE_LINES_MAX };
    let long = files.iter().filter(|file| file.lines > limit(file));
    long.map(|file| format!("{}: {} lines, allowed: {}", file.path, file.lines, limit(file))).collect()
}

fn long_functions(files: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files {
        let lines: Vec<&str> = file.text.lines().collect();
        for function in &Items::of(file).functions {
            let count = function.last - function.first + 1;
            // Attributes and other comments may stand between the reason and the function.
            let above = lines[..function.first - 1].iter().rev().map(|line| line.trim_start());
            let mut above = above.take_while(|line| line.starts_with("//") || line.starts_with('#'));
            if count > FUNCTION_LINES_MAX && !above.any(|line| line.starts_with(REASON)) {
                let place = format!("{}:{}", file.path, function.first);
                found
                    .push(format!("{place}: {} has {count} lines and no `{REASON}...` above", function.name));
            }
        }
    }
    found
}

fn names_of_several(files: &[Source]) -> Vec<String> {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in files {
        for (name, line) in Items::of(file).types {
            places.entry(name).or_default().push(format!("{}:{line}", file.path));
        }
    }
    places.retain(|_, places| places.len() > 1);
    places.iter().map(|(name, places)| format!("{name}: {}", places.join(", "))).collect()
}

/// The functions and types of a file, without its tests. Types of an `impl` have their names from a trait.
#[derive(Default)]
struct Items {
    functions: Vec<Function>,
    types: Vec<(String, usize)>,
}

struct Function {
    name: String,
    first: usize,
    last: usize,
}

impl Items {
    fn of(file: &Source) -> Items {
        let mut items = Items::default();
        if !is_tests(&file.path) {
            items.visit_file(&file.parsed);
        }
        items
    }

    /// Types among the tokens of a macro: `struct` and such before a name.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut is_definition = false;
        for tree in tokens {
            match &tree {
                TokenTree::Group(group) => self.add_tokens(group.stream()),
                TokenTree::Ident(name) if is_definition => {
                    self.types.push((name.to_string(), name.span().start().line));
                }
                _ => {}
            }
            let words = ["enum", "struct", "trait", "type", "union"];
            is_definition =
                matches!(&tree, TokenTree::Ident(ident) if words.iter().any(|word| ident == word));
        }
    }

    fn add(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let first = signature.fn_token.span.start().line;
        let last = body.brace_token.span.close().end().line;
        self.functions.push(Function { name: signature.ident.to_string(), first, last });
    }
}

impl<'ast> Visit<'ast> for Items {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if is_for_tests(attributes(item)) {
            return;
        }
        let named = match item {
            syn::Item::Enum(item) => Some(&item.ident),
            syn::Item::Struct(item) => Some(&item.ident),
            syn::Item::Trait(item) => Some(&item.ident),
            syn::Item::TraitAlias(item) => Some(&item.ident),
            syn::Item::Type(item) => Some(&item.ident),
            syn::Item::Union(item) => Some(&item.ident),
            _ => None,
        };
        self.types.extend(named.map(|ident| (ident.to_string(), ident.span().start().line)));
        visit::visit_item(self, item);
    }

    fn visit_macro(&mut self, of: &'ast syn::Macro) {
        self.add_tokens(of.tokens.clone());
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.add(&function.sig, &function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        if !is_for_tests(impl_attributes(item)) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.add(&function.sig, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(body) = &function.default {
            self.add(&function.sig, body);
        }
        visit::visit_trait_item_fn(self, function);
    }
}

#[test]
fn a_file_and_a_function_can_be_read_in_one_go() {
    let files = sources("src");
    assert_none(&long_files(&files), "files that are too long");
    assert_none(&long_functions(&files), "functions that are too long");
}

#[test]
fn one_name_is_the_name_of_one_type() {
    assert_none(&names_of_several(&sources("src")), "type names that are defined more than once");
}

#[test]
fn what_is_too_long_is_found_and_tests_do_not_count() {
    let function = |lines: usize| format!("fn long() {{\n{}}}\n", "    step();\n".repeat(lines - 2));
    let of = |path: &str, text: &str| [Source::new(path, &format!("//! A file.\n{text}"))];
    let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", function(600));

    assert!(long_files(&of("src/a.rs", &("\n".repeat(499) + &tests))).is_empty());
    assert_eq!(long_files(&of("src/a.rs", &"\n".repeat(500))), ["src/a.rs: 501 lines, allowed: 500"]);
    assert!(long_files(&of("src/a/tests.rs", &"\n".repeat(500))).is_empty());
    assert_eq!(long_files(&of("src/main.rs", &"\n".repeat(40))), ["src/main.rs: 41 lines, allowed: 40"]);

    assert!(long_functions(&of("src/a.rs", &(function(60) + &tests))).is_empty());
    let found = long_functions(&of("src/a.rs", &function(61)));
    assert_eq!(found, ["src/a.rs:2: long has 61 lines and no `// Long: ...` above"]);
    let method = format!("impl S {{\n{}}}\n", function(61));
    assert_eq!(long_functions(&of("src/a.rs", &method)).len(), 1);
    let reason = "/// What it does.\n// Long: one table.\n#[inline]\n";
    assert!(long_functions(&of("src/a.rs", &format!("{reason}{}", function(61)))).is_empty());
    assert_eq!(long_functions(&of("src/a.rs", &format!("{reason}\n{}", function(61)))).len(), 1, "not above");
}

#[test]
fn a_name_of_two_types_is_found_and_a_trait_s_own_do_not_count() {
    let of = |path: &str, text: &str| Source::new(path, &format!("//! A file.\n{text}"));
    let files = [
        of(
            "src/a.rs",
            "struct Way;\nimpl T for Way { type Error = u8; }\n#[cfg(test)]\nmod tests { struct Event; }\n",
        ),
        of("src/b.rs", "fn f() { enum Way { A } }\nimpl T for u8 { type Error = u8; }\npub struct Event;\n"),
        of("src/c.rs", "section! {\n    /// A section.\n    pub struct Way = \"way\" { struct_: u8 }\n}\n"),
    ];
    assert_eq!(names_of_several(&files), ["Way: src/a.rs:2, src/b.rs:2, src/c.rs:4"]);
}
