//! What each file of the program names: other files of it, and outside crates.
//!
//! The sources are parsed, not searched, so comments and strings name nothing. Modules are followed from `src/lib.rs`
//! and `src/main.rs` as `mod` declares them, without those for tests. Then every path is resolved as the compiler would
//! do it, near enough: those of each `use`, also in a function and in groups, those without `use`, and those in the tokens
//! of macros and attributes. A name that a face gives on with `pub use` is followed to the file that defines it, so that
//! no circle hides behind a face. What a path names beyond types and functions (methods, fields) names no file.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::source::{Source, attributes, impl_attributes, is_for_tests};

/// The name by which the program's `main` calls the library.
const LIBRARY: &str = "pg_outbox";

/// Who names what, with how it is written there: ``crate::nats::Down in line 12``.
#[derive(Default)]
pub struct Names {
    /// By the file that names and the file that is named.
    pub files: BTreeMap<(String, String), BTreeSet<String>>,
    /// By the crate that is named and the file that names it.
    pub crates: BTreeMap<(String, String), BTreeSet<String>>,
}

impl Names {
    pub fn of(sources: &[Source]) -> Names {
        let mut modules = Modules { sources, all: Vec::new(), library: 0 };
        for main in ["src/lib.rs", "src/main.rs"] {
            modules.add_file(main, None, "src/");
        }
        let mut names = Names::default();
        for (index, module) in modules.all.iter().enumerate() {
            for path in &module.paths {
                let from = module.file.clone();
                let written = format!("{} in line {}", path.segments.join("::"), path.line);
                match modules.resolve(index, path, &mut BTreeSet::new()) {
                    Place::Module(to) | Place::ItemOf(to) if modules.all[to].file != from => {
                        let to = modules.all[to].file.clone();
                        names.files.entry((from, to)).or_default().insert(written);
                    }
                    Place::Outside(name) => {
                        names.crates.entry((name, from)).or_default().insert(written);
                    }
                    _ => {}
                }
            }
        }
        names
    }
}

/// A path as it is written.
#[derive(Clone)]
struct Path {
    /// Begins with `::`, and so with a crate.
    rooted: bool,
    /// Stands in a `use`, where a single name may be a crate.
    in_use: bool,
    segments: Vec<String>,
    line: usize,
}

/// What a path leads to.
enum Place {
    Module(usize),
    /// Something that this module defines.
    ItemOf(usize),
    /// Something of this crate, or of nothing that we know.
    Outside(String),
    /// A name without a path that is no import: a local variable, a type of the prelude.
    Local,
}

/// One module: a file, or a `mod x { ... }` in one.
#[derive(Default)]
struct Module {
    file: String,
    parent: Option<usize>,
    children: BTreeMap<String, usize>,
    defined: BTreeSet<String>,
    /// Names that a `use` brings, also one within a function.
    bound: BTreeMap<String, Vec<Path>>,
    /// What stands before the star of a `use x::*`.
    globs: Vec<Path>,
    /// Macros for the whole crate, which its root therefore has; kept at the root.
    exported: BTreeMap<String, usize>,
    paths: Vec<Path>,
}

struct Modules<'a> {
    sources: &'a [Source],
    all: Vec<Module>,
    /// The root of the library.
    library: usize,
}

impl<'a> Modules<'a> {
    /// Adds the module that is the file `path`, and those below it, whose files are in `folder`.
    fn add_file(&mut self, path: &str, parent: Option<usize>, folder: &str) -> usize {
        let source = self.sources.iter().find(|source| source.path == path);
        let source = source.unwrap_or_else(|| panic!("{path} is declared as a module and is not there"));
        self.add(path, parent, folder, &source.parsed.items)
    }

    fn add(&mut self, file: &str, parent: Option<usize>, folder: &str, items: &'a [syn::Item]) -> usize {
        let index = self.all.len();
        self.all.push(Module { file: file.to_owned(), parent, ..Module::default() });
        let mut reader = Reader { module: Module::default(), inner: Vec::new(), exported: Vec::new() };
        items.iter().for_each(|item| reader.visit_item(item));
        let Reader { module, inner, exported } = reader;
        let root = self.root_of(index);
        self.all[root].exported.extend(exported.into_iter().map(|name| (name, index)));
        let read = &mut self.all[index];
        (read.defined, read.bound) = (module.defined, module.bound);
        (read.globs, read.paths) = (module.globs, module.paths);
        for declared in inner {
            let name = declared.ident.to_string();
            let below = format!("{folder}{name}/");
            let child = match &declared.content {
                Some((_, items)) => self.add(file, Some(index), &below, items),
                None => self.add_file(&format!("{folder}{name}.rs"), Some(index), &below),
            };
            self.all[index].children.insert(name, child);
        }
        index
    }

    fn root_of(&self, module: usize) -> usize {
        self.all[module].parent.map_or(module, |parent| self.root_of(parent))
    }

    /// What `path` leads to when it stands in `module`. `seen` are the imports that are being followed.
    fn resolve(&self, module: usize, path: &Path, seen: &mut BTreeSet<(usize, String)>) -> Place {
        let (first, rest) = path.segments.split_first().expect("a path has a segment");
        match first.as_str() {
            _ if path.rooted && first != LIBRARY => return Place::Outside(first.clone()),
            "crate" => return self.below(self.root_of(module), rest, seen),
            "self" => return self.below(module, rest, seen),
            "super" => return self.below(self.all[module].parent.unwrap_or(module), rest, seen),
            _ => {}
        }
        match self.within(module, &path.segments, seen) {
            Some(place) => place,
            None if first == LIBRARY && (path.in_use || !rest.is_empty()) => {
                self.below(self.library, rest, seen)
            }
            None if path.in_use || !rest.is_empty() => Place::Outside(first.clone()),
            None => Place::Local,
        }
    }

    /// What `segments` lead to from `module` on; a name that it does not have is taken for one of its items.
    fn below(&self, module: usize, segments: &[String], seen: &mut BTreeSet<(usize, String)>) -> Place {
        match segments.first().map(String::as_str) {
            None => Place::Module(module),
            Some("self") => self.below(module, &segments[1..], seen),
            Some("super") => self.below(self.all[module].parent.unwrap_or(module), &segments[1..], seen),
            Some(_) => self.within(module, segments, seen).unwrap_or(Place::ItemOf(module)),
        }
    }

    /// The same, or `None` where the module has no such name.
    fn within(
        &self,
        module: usize,
        segments: &[String],
        seen: &mut BTreeSet<(usize, String)>,
    ) -> Option<Place> {
        let (name, rest) = segments.split_first()?;
        let here = &self.all[module];
        if let Some(child) = here.children.get(name) {
            return Some(self.below(*child, rest, seen));
        }
        if here.defined.contains(name) {
            return Some(Place::ItemOf(module));
        }
        if !seen.insert((module, name.clone())) {
            return None;
        }
        let mut found = None;
        for import in here.bound.get(name).into_iter().flatten() {
            let segments = [&import.segments, rest].concat();
            found = Some(self.resolve(module, &Path { segments, ..import.clone() }, seen));
            if let Some(Place::Module(_) | Place::ItemOf(_)) = found {
                break;
            }
        }
        for glob in &here.globs {
            if found.is_none()
                && let Place::Module(of) = self.resolve(module, glob, seen)
                && of != module
            {
                found = self.within(of, segments, seen);
            }
        }
        seen.remove(&(module, name.clone()));
        found.or_else(|| here.exported.get(name).map(|of| Place::ItemOf(*of)))
    }
}

/// Reads what one module has, but for the modules in it.
struct Reader<'a> {
    module: Module,
    inner: Vec<&'a syn::ItemMod>,
    exported: Vec<String>,
}

impl Reader<'_> {
    fn add(&mut self, rooted: bool, segments: &[&proc_macro2::Ident]) {
        let Some(first) = segments.first() else { return };
        let line = first.span().start().line;
        let segments = segments.iter().map(ToString::to_string).collect();
        self.module.paths.push(Path { rooted, in_use: false, segments, line });
    }

    fn add_use(&mut self, before: &Path, tree: &syn::UseTree) {
        let with = |ident: &proc_macro2::Ident| {
            let mut path = before.clone();
            path.line = ident.span().start().line;
            path.segments.push(ident.to_string());
            path
        };
        let (path, bound) = match tree {
            syn::UseTree::Path(tree) => return self.add_use(&with(&tree.ident), &tree.tree),
            syn::UseTree::Group(tree) => {
                return tree.items.iter().for_each(|tree| self.add_use(before, tree));
            }
            syn::UseTree::Glob(_) => {
                self.module.globs.push(before.clone());
                (before.clone(), None)
            }
            syn::UseTree::Name(tree) if tree.ident == "self" => {
                (before.clone(), before.segments.last().cloned())
            }
            syn::UseTree::Name(tree) => (with(&tree.ident), Some(tree.ident.to_string())),
            syn::UseTree::Rename(tree) => (with(&tree.ident), Some(tree.rename.to_string())),
        };
        if let Some(name) = bound {
            self.module.bound.entry(name).or_default().push(path.clone());
        }
        self.module.paths.push(path);
    }

    /// The paths among tokens, which may be those of a macro: `a::b`, `a::{b, c::d}`, `$crate::a`.
    fn add_tokens(&mut self, tokens: TokenStream, before: &[proc_macro2::Ident]) {
        let trees: Vec<TokenTree> = tokens.into_iter().collect();
        let is = |at: usize, wanted: char| matches!(trees.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == wanted);
        let mut at = 0;
        while at < trees.len() {
            match &trees[at] {
                TokenTree::Group(group) => self.add_tokens(group.stream(), &[]),
                TokenTree::Ident(ident) => {
                    let leading = at >= 2 && is(at - 1, ':') && is(at - 2, ':');
                    // After a dot it is a field or a method, after `>::` an associated item, after `'` a lifetime, and
                    // after `$` whatever a caller gives.
                    let of_a_crate = ident == "crate";
                    let is_path = match at.checked_sub(1) {
                        None => true,
                        Some(_) if leading => at < 3 || !is(at - 3, '>'),
                        Some(last) => {
                            !(is(last, '.') && !(last > 0 && is(last - 1, '.')) || is(last, '\''))
                                && (of_a_crate || !is(last, '$'))
                        }
                    };
                    let mut path = before.to_vec();
                    path.push(ident.clone());
                    let mut is_group = false;
                    while is(at + 1, ':') && is(at + 2, ':') {
                        match trees.get(at + 3) {
                            Some(TokenTree::Ident(next)) => path.push(next.clone()),
                            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                                self.add_tokens(group.stream(), &path);
                                is_group = true;
                            }
                            _ => break,
                        }
                        at += 3;
                    }
                    if is_path && !is_group {
                        self.add(leading && before.is_empty(), &path.iter().collect::<Vec<_>>());
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// The paths that serde takes as strings: `#[serde(with = "crate::a::b")]`.
    fn add_paths_in_strings(&mut self, tokens: TokenStream) {
        for tree in tokens {
            let TokenTree::Literal(literal) = tree else { continue };
            let text = syn::parse_str::<syn::LitStr>(&literal.to_string());
            let Ok(path) = text.and_then(|text| text.parse::<syn::Path>()) else { continue };
            let line = literal.span().start().line;
            let segments = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            let rooted = path.leading_colon.is_some();
            self.module.paths.push(Path { rooted, in_use: false, segments, line });
        }
    }
}

impl<'ast> Visit<'ast> for Reader<'ast> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if is_for_tests(attributes(item)) {
            return;
        }
        let defined = match item {
            syn::Item::Const(item) => Some(&item.ident),
            syn::Item::Enum(item) => Some(&item.ident),
            syn::Item::Fn(item) => Some(&item.sig.ident),
            syn::Item::Macro(item) => item.ident.as_ref(),
            syn::Item::Static(item) => Some(&item.ident),
            syn::Item::Struct(item) => Some(&item.ident),
            syn::Item::Trait(item) => Some(&item.ident),
            syn::Item::TraitAlias(item) => Some(&item.ident),
            syn::Item::Type(item) => Some(&item.ident),
            syn::Item::Union(item) => Some(&item.ident),
            _ => None,
        };
        self.module.defined.extend(defined.map(ToString::to_string));
        if let syn::Item::Macro(item) = item
            && item.attrs.iter().any(|attribute| attribute.path().is_ident("macro_export"))
        {
            self.exported.extend(item.ident.as_ref().map(ToString::to_string));
        }
        visit::visit_item(self, item);
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        if !is_for_tests(impl_attributes(item)) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.inner.push(item);
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let rooted = item.leading_colon.is_some();
        self.add_use(&Path { rooted, in_use: true, segments: Vec::new(), line: 0 }, &item.tree);
    }

    fn visit_item_extern_crate(&mut self, item: &'ast syn::ItemExternCrate) {
        self.add(true, &[&item.ident]);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<&proc_macro2::Ident> = path.segments.iter().map(|segment| &segment.ident).collect();
        self.add(path.leading_colon.is_some(), &segments);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, of: &'ast syn::Macro) {
        self.add_tokens(of.tokens.clone(), &[]);
        visit::visit_macro(self, of);
    }

    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        if let syn::Meta::List(list) = &attribute.meta {
            self.add_tokens(list.tokens.clone(), &[]);
            if list.path.is_ident("serde") {
                self.add_paths_in_strings(list.tokens.clone());
            }
        }
        visit::visit_attribute(self, attribute);
    }

    /// Who may see an item is no arrow: it can only name modules that the item stands in.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
}
