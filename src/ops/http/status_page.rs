//! The status page: one HTML document that needs nothing from elsewhere.
//!
//! Markup, style and script stand in three files beside this one and are put together at start. The facts of the moment
//! go into it as JSON, so that it shows something at once; its script then asks `/status` and `/recent`. What is in
//! those may have come from anywhere (a topic, an error of a server), so there are three fences: no `<` of theirs is in
//! the document, the script makes text nodes of them and nothing else, and the content security policy lets no other
//! script run, no other style apply and nothing be asked but this server.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const DOCUMENT: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page, but for the facts.
#[derive(Debug)]
pub(super) struct StatusPage {
    before_facts: String,
    after_facts: String,
    policy: String,
}

impl StatusPage {
    /// Puts the page together. It links to `metrics_path`.
    pub(super) fn new(metrics_path: &str) -> StatusPage {
        let (before, after) =
            DOCUMENT.split_once("{{first}}").expect("page.html has a place for the facts, as a test shows");
        let fill = |part: &str| {
            // Relative links work behind a proxy that puts the page below a path of its own.
            part.replace("{{metrics}}", &escape(metrics_path.trim_start_matches('/')))
                .replace("{{style}}", STYLE)
                .replace("{{script}}", SCRIPT)
        };
        StatusPage { before_facts: fill(before), after_facts: fill(after), policy: policy() }
    }

    /// The page with these facts, which are JSON.
    pub(super) fn with(&self, facts: &str) -> String {
        // Within a script element nothing but `<` can mean anything, and in JSON it stands in strings alone.
        [&self.before_facts, facts.replace('<', "\\u003c").as_str(), &self.after_facts].concat()
    }

    /// What a browser lets it do.
    pub(super) fn policy(&self) -> &str {
        &self.policy
    }
}

/// The Content-Security-Policy (W3C, "Content Security Policy Level 3"): this style and this script by their hashes,
/// questions to this server, and nothing else.
fn policy() -> String {
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        hash(SCRIPT),
        hash(STYLE)
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_and_paths_stay_what_they_are() {
        let page = StatusPage::new("/m\"><b>&");
        let html = page.with(r#"{"reason":"</script><script>alert(1)</script><!--"}"#);
        assert!(html.contains(r#"{"reason":"\u003c/script>\u003cscript>alert(1)\u003c/script>\u003c!--"}"#));
        assert!(html.contains(r#"<a href="m&quot;&gt;&lt;b&gt;&amp;">metrics</a>"#));
        assert_eq!(html.matches("<script").count(), 2, "the facts and the one script");
        assert!(!html.contains("{{"), "a place was left empty");
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let html = StatusPage::new("/metrics").with("{}");
        let named: Vec<&str> = html.match_indices("://").map(|(at, _)| &html[at - 5..at + 16]).collect();
        // The one that names the vocabulary of drawings is never asked for.
        assert!(
            named.iter().all(|name| name.ends_with("http://www.w3.org/") || name.contains("//www.w3.org/")),
            "{named:?}"
        );
        for way_out in ["@import", "url(", "src=", "innerHTML", "eval(", "style=\""] {
            assert!(!html.contains(way_out), "{way_out}");
        }
    }
}
