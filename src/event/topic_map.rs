//! Topics to subjects: what an event's topic becomes on its way to NATS.
//!
//! A map holds exact topics and patterns with NATS wildcards: `*` stands for one token, a last `>` for one
//! or more. An exact name wins over every pattern; among patterns the most specific one wins: token by
//! token from the left, a literal before `*` before `>`, whatever the order in the file. (Two patterns of
//! different length can only match one topic if the shorter one ends in `>`, which decides it.) A topic that
//! nothing matches goes out unchanged, without a copy.
//!
//! A target's wildcards carry over what the pattern's matched: its first `*` the token of the pattern's first
//! `*` and so on, its `>` the tail. A target has as many `*` as its pattern or none at all, and may leave the
//! tail out: `audit.*.>` can go to `log.*.>`, `log.*`, `log.>` or `log`, but `a.*.*` cannot go to `b.*`, as
//! nothing says which of the two tokens is meant. The map never changes once it is made, so all threads may
//! share it. The rules of subjects are those of <https://docs.nats.io/nats-concepts/subjects>.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;

/// Longest subject or pattern, in bytes. A server closes the connection over a control line of more than
/// 4,096 bytes, and that line holds the subject beside a reply subject.
pub const MAX_SUBJECT_BYTES: usize = 2_000;

/// Topics to subjects, checked and ready for lookups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TopicMap {
    exact: HashMap<String, String>,
    /// Most specific first: the first match wins.
    patterns: Vec<Pattern>,
    /// Put before every subject, with a dot between.
    prefix: Option<String>,
}

/// An entry of a topic map that cannot work, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicMapProblem {
    /// The entry's topic or pattern.
    pub pattern: String,
    /// The entry's subject.
    pub target: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for TopicMapProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} to {:?}: {}", self.pattern, self.target, self.reason)
    }
}

impl TopicMap {
    /// Makes a map of (topic or pattern, subject) entries. All entries that cannot work are returned, in
    /// their order.
    pub fn new(
        entries: impl IntoIterator<Item = (String, String)>,
    ) -> Result<TopicMap, Vec<TopicMapProblem>> {
        let mut map = TopicMap::default();
        let mut problems = Vec::new();
        for (pattern, target) in entries {
            if let Err(reason) = map.insert(&pattern, &target) {
                problems.push(TopicMapProblem { pattern, target, reason });
            }
        }
        map.patterns.sort_by(|a, b| specificity(&a.tokens, &b.tokens));
        if problems.is_empty() { Ok(map) } else { Err(problems) }
    }

    /// The subject of `topic`; `topic` itself if nothing in the map matches it.
    pub fn subject<'a>(&self, topic: &'a str) -> Cow<'a, str> {
        match &self.prefix {
            None => self.mapped(topic),
            Some(prefix) => Cow::Owned(format!("{prefix}.{}", self.mapped(topic))),
        }
    }

    /// The same map with all subjects below `prefix`.
    pub fn below(self, prefix: Option<String>) -> TopicMap {
        TopicMap { prefix, ..self }
    }

    fn mapped<'a>(&self, topic: &'a str) -> Cow<'a, str> {
        if let Some(target) = self.exact.get(topic) {
            return Cow::Owned(target.clone());
        }
        match self.patterns.iter().find(|pattern| pattern.matches(topic)) {
            Some(pattern) => Cow::Owned(pattern.target_of(topic)),
            None => Cow::Borrowed(topic),
        }
    }

    /// The subjects, or patterns of subjects, that mapped topics go to, in no particular order.
    pub fn targets(&self) -> impl Iterator<Item = &str> {
        let patterns = self.patterns.iter().map(|pattern| pattern.written_target.as_str());
        self.exact.values().map(String::as_str).chain(patterns)
    }

    /// True if every topic goes out unchanged.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.patterns.is_empty()
    }

    fn insert(&mut self, pattern: &str, target: &str) -> Result<(), String> {
        is_pattern(pattern).map_err(|why| format!("not a topic: {why}"))?;
        is_pattern(target).map_err(|why| format!("not a subject: {why}"))?;
        if self.exact.contains_key(pattern) || self.patterns.iter().any(|known| known.is_written(pattern)) {
            return Err("this topic is mapped twice".to_owned());
        }
        if is_literal_subject(pattern).is_err() {
            self.patterns.push(Pattern::new(pattern, target)?);
        } else if is_literal_subject(target).is_ok() {
            self.exact.insert(pattern.to_owned(), target.to_owned());
        } else {
            return Err("the subject has a wildcard, but the topic has none to fill it".to_owned());
        }
        Ok(())
    }
}

/// A pattern with at least one wildcard, and where its matches go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    tokens: Vec<Token>,
    target: Vec<TargetToken>,
    written_target: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Token {
    // In order of precedence: deriving Ord makes the first the most specific.
    Literal(String),
    One,
    Tail,
}

/// A token of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
enum TargetToken {
    Literal(String),
    /// The topic's token at this index.
    One(usize),
    /// The topic's tokens from this index on.
    Tail(usize),
}

impl Pattern {
    fn new(pattern: &str, target: &str) -> Result<Pattern, String> {
        let tokens: Vec<Token> = pattern.split('.').map(Token::new).collect();
        let ones: Vec<usize> = (0..tokens.len()).filter(|&index| tokens[index] == Token::One).collect();
        let tail = tokens.iter().position(|token| *token == Token::Tail);

        let wanted = target.split('.').filter(|token| *token == "*").count();
        if wanted != 0 && wanted != ones.len() {
            return Err(format!(
                "the subject has {wanted} of * and the topic {}; allowed: as many, or none in the subject",
                ones.len()
            ));
        }
        let mut ones = ones.into_iter();
        let part = |token: &str| match token {
            "*" => ones.next().map(TargetToken::One),
            ">" => tail.map(TargetToken::Tail),
            literal => Some(TargetToken::Literal(literal.to_owned())),
        };
        let parts: Option<Vec<TargetToken>> = target.split('.').map(part).collect();
        let target_parts = parts.ok_or("the subject ends in >, but the topic does not")?;
        Ok(Pattern { tokens, target: target_parts, written_target: target.to_owned() })
    }

    fn is_written(&self, pattern: &str) -> bool {
        self.tokens.iter().map(Token::as_str).eq(pattern.split('.'))
    }

    fn matches(&self, topic: &str) -> bool {
        matches_tokens(self.tokens.iter().map(Token::as_str), topic)
    }

    /// The subject of a topic that this pattern matches.
    fn target_of(&self, topic: &str) -> String {
        let mut subject = String::with_capacity(self.written_target.len() + topic.len());
        for part in &self.target {
            if !subject.is_empty() {
                subject.push('.');
            }
            match part {
                TargetToken::Literal(literal) => subject.push_str(literal),
                TargetToken::One(index) => subject.push_str(topic.split('.').nth(*index).unwrap_or_default()),
                TargetToken::Tail(index) => {
                    subject.push_str(topic.splitn(index + 1, '.').nth(*index).unwrap_or_default());
                }
            }
        }
        subject
    }
}

impl Token {
    fn new(token: &str) -> Token {
        match token {
            "*" => Token::One,
            ">" => Token::Tail,
            literal => Token::Literal(literal.to_owned()),
        }
    }

    fn as_str(&self) -> &str {
        match self {
            Token::Literal(literal) => literal,
            Token::One => "*",
            Token::Tail => ">",
        }
    }
}

/// Token by token, a literal before `*` before `>`; then the longer one first.
fn specificity(a: &[Token], b: &[Token]) -> Ordering {
    let first_difference = a.iter().zip(b).map(|(a, b)| a.cmp(b)).find(|order| order.is_ne());
    first_difference.unwrap_or_else(|| b.len().cmp(&a.len()))
}

/// Whether a message can be published on `subject`: no blank or control character, no empty token, no
/// wildcard, at most [`MAX_SUBJECT_BYTES`]. The error says what is wrong.
pub fn is_literal_subject(subject: &str) -> Result<(), &'static str> {
    is_pattern(subject)?;
    if subject.split('.').any(|token| token == "*" || token == ">") {
        return Err("it has a wildcard");
    }
    Ok(())
}

/// Whether `pattern` is a subject that may hold wildcards, each a token of its own, `>` only as the last one.
/// The error says what is wrong.
pub fn is_pattern(pattern: &str) -> Result<(), &'static str> {
    if pattern.is_empty() {
        return Err("it is empty");
    }
    if pattern.len() > MAX_SUBJECT_BYTES {
        return Err("it is longer than 2000 bytes");
    }
    if pattern.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("it has a blank or a control character");
    }
    let mut tokens = pattern.split('.').peekable();
    while let Some(token) = tokens.next() {
        match token {
            "" => return Err("it has an empty token (a dot at an end, or two in a row)"),
            "*" => {}
            ">" if tokens.peek().is_some() => return Err("it has a > that is not its last token"),
            ">" => {}
            // NATS would take `a*` for a literal that nobody subscribes to; it is always a slip.
            _ if token.contains(['*', '>']) => {
                return Err("it has a wildcard within a token; * and > stand alone between dots");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether `subject`, without wildcards, is one that a subscription to `pattern` receives.
pub fn matches(pattern: &str, subject: &str) -> bool {
    matches_tokens(pattern.split('.'), subject)
}

fn matches_tokens<'a>(pattern: impl Iterator<Item = &'a str>, subject: &str) -> bool {
    let mut subject = subject.split('.');
    for wanted in pattern {
        match (wanted, subject.next()) {
            (">", Some(_)) => return true,
            (_, None) => return false,
            ("*", Some(_)) => {}
            (literal, Some(token)) if literal == token => {}
            _ => return false,
        }
    }
    subject.next().is_none()
}

/// Whether every subject that `inner` matches is one that `outer` matches; both may hold wildcards. For
/// "does this stream take all that this entry of the topic map can publish".
pub fn contains(outer: &str, inner: &str) -> bool {
    let mut inner = inner.split('.');
    for wanted in outer.split('.') {
        match (wanted, inner.next()) {
            (">", Some(_)) => return true,
            (_, None | Some(">")) => return false,
            ("*", Some(_)) => {}
            (literal, Some(token)) if literal == token => {}
            _ => return false,
        }
    }
    inner.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&str, &str)]) -> Result<TopicMap, Vec<TopicMapProblem>> {
        TopicMap::new(entries.iter().map(|(pattern, target)| ((*pattern).to_owned(), (*target).to_owned())))
    }

    #[test]
    fn a_prefix_goes_before_whatever_the_subject_is() {
        let entries = [("a".to_owned(), "x.y".to_owned()), ("b.*".to_owned(), "z.*".to_owned())];
        let map = TopicMap::new(entries).unwrap().below(Some("again".to_owned()));
        for (topic, subject) in [("a", "again.x.y"), ("b.c", "again.z.c"), ("c", "again.c")] {
            assert_eq!(map.subject(topic), subject);
        }
    }

    #[test]
    fn a_topic_becomes_the_subject_of_the_most_specific_entry() {
        let entries = [
            ("user.created", "app.users.created"),
            ("order.*", "production.orders.*"),
            ("order.*.*", "production.*.of.*"),
            ("order.eu.*", "europe.*"),
            ("order.*.cancelled", "cancelled.*"),
            ("order.>", "rest.>"),
            ("audit.*.>", "log.*.all.>"),
            ("metrics.>", "metrics"),
            ("trace.*.>", "traces.*"),
            ("span.*.*.>", "spans.>"),
            ("pair.*.*", "pairs"),
            ("*.ping", "pings.*"),
            ("swap.*.*.x", "x.*.*"),
        ];
        let cases = [
            ("user.created", "app.users.created"),
            ("user.deleted", "user.deleted"),
            ("user", "user"),
            ("user.created.twice", "user.created.twice"),
            ("order.placed", "production.orders.placed"),
            ("order.eu.placed", "europe.placed"),
            // Both order.eu.* and order.*.cancelled match: the literal further left wins.
            ("order.eu.cancelled", "europe.cancelled"),
            ("order.us.cancelled", "cancelled.us"),
            ("order.us.placed", "production.us.of.placed"),
            ("order.a.b.c", "rest.a.b.c"),
            ("order", "order"),
            ("audit.login.eu.ok", "log.login.all.eu.ok"),
            ("audit.login", "audit.login"),
            ("metrics.cpu.load", "metrics"),
            ("trace.a.b.c", "traces.a"),
            ("span.a.b.c.d", "spans.c.d"),
            ("pair.a.b", "pairs"),
            ("eu.ping", "pings.eu"),
            ("order.ping", "production.orders.ping"),
            ("swap.a.b.x", "x.a.b"),
            ("überall.ping", "pings.überall"),
        ];
        let mut shuffled = entries;
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20 {
            random.shuffle(&mut shuffled);
            let map = map(&shuffled).expect("a good map");
            for (topic, subject) in cases {
                assert_eq!(map.subject(topic), subject, "{topic} with {shuffled:?}");
            }
        }
    }

    #[test]
    fn an_exact_name_wins_over_a_pattern_and_everything_can_be_mapped() {
        let map = map(&[(">", "all.>"), ("*", "one.*"), ("a.b", "exact")]).unwrap();
        assert_eq!(map.subject("a.b"), "exact");
        assert_eq!(map.subject("a"), "one.a");
        assert_eq!(map.subject("a.c"), "all.a.c");
        let mut targets: Vec<&str> = map.targets().collect();
        targets.sort_unstable();
        assert_eq!(targets, ["all.>", "exact", "one.*"]);
    }

    #[test]
    fn an_unmapped_topic_is_not_copied() {
        assert!(matches!(TopicMap::default().subject("a.b"), Cow::Borrowed("a.b")));
        assert!(TopicMap::default().is_empty());
    }

    #[test]
    fn an_entry_that_cannot_work_is_refused() {
        let long = "x".repeat(MAX_SUBJECT_BYTES + 1);
        let cases = [
            ("", "a", "not a topic: it is empty"),
            ("a", "", "not a subject: it is empty"),
            ("a b", "a", "not a topic: it has a blank or a control character"),
            ("a", "a\tb", "not a subject: it has a blank or a control character"),
            ("a\u{a0}b", "a", "not a topic: it has a blank or a control character"),
            (".a", "a", "not a topic: it has an empty token (a dot at an end, or two in a row)"),
            ("a.", "a", "not a topic: it has an empty token (a dot at an end, or two in a row)"),
            ("a", "a..b", "not a subject: it has an empty token (a dot at an end, or two in a row)"),
            ("a.>.b", "a", "not a topic: it has a > that is not its last token"),
            ("a.*", "b.>.*", "not a subject: it has a > that is not its last token"),
            ("a*", "a", "not a topic: it has a wildcard within a token; * and > stand alone between dots"),
            (
                "order.*",
                "orders.**",
                "not a subject: it has a wildcard within a token; * and > stand alone between dots",
            ),
            ("a", "b.*", "the subject has a wildcard, but the topic has none to fill it"),
            ("a", ">", "the subject has a wildcard, but the topic has none to fill it"),
            (
                "a.*",
                "b.*.*",
                "the subject has 2 of * and the topic 1; allowed: as many, or none in the subject",
            ),
            (
                "a.*.*",
                "b.*",
                "the subject has 1 of * and the topic 2; allowed: as many, or none in the subject",
            ),
            (
                "a.>",
                "b.*",
                "the subject has 1 of * and the topic 0; allowed: as many, or none in the subject",
            ),
            ("a.*", "b.>", "the subject ends in >, but the topic does not"),
            (&long, "a", "not a topic: it is longer than 2000 bytes"),
        ];
        for (pattern, target, reason) in cases {
            let problems = map(&[("fine", "fine"), (pattern, target)]).unwrap_err();
            let expected = TopicMapProblem {
                pattern: pattern.to_owned(),
                target: target.to_owned(),
                reason: reason.to_owned(),
            };
            assert_eq!(problems, [expected]);
        }
    }

    #[test]
    fn a_topic_mapped_twice_is_refused_and_all_problems_come_at_once() {
        let problems = map(&[("a", "b"), ("a", "c"), ("x.*", "y.*"), ("x.*", "z.*"), ("", "")]).unwrap_err();
        let reasons: Vec<&str> = problems.iter().map(|problem| problem.reason.as_str()).collect();
        assert_eq!(
            reasons,
            ["this topic is mapped twice", "this topic is mapped twice", "not a topic: it is empty"]
        );
    }

    #[test]
    fn patterns_match_as_nats_matches() {
        let cases = [
            ("a.b", "a.b", true),
            ("a.b", "a.B", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("a.>", "a", false),
            ("a.>", "a.b", true),
            ("a.>", "a.b.c", true),
            (">", "a", true),
            ("*", "a.b", false),
            ("*.b", "a.b", true),
            ("*.>", "a", false),
            ("a.*.c", "a.b.c", true),
            ("a.*.c", "a.b.d", false),
        ];
        for (pattern, subject, expected) in cases {
            assert_eq!(matches(pattern, subject), expected, "{pattern} {subject}");
        }
    }

    #[test]
    fn a_pattern_lies_within_another() {
        let cases = [
            ("app.>", "app.users.*", true),
            ("app.>", "app.>", true),
            ("app.>", "app", false),
            ("app.*", "app.*", true),
            ("app.*", "app.>", false),
            ("app.*", "app.users", true),
            ("app.users", "app.*", false),
            ("app.users", "app.users", true),
            ("app.*.x", "app.*.x", true),
            ("app.*.x", "app.y.*", false),
            (">", "a.*.>", true),
            ("*.>", "a.>", true),
            ("a.*.>", "a.>", false),
            ("a", "a.b", false),
        ];
        for (outer, inner, expected) in cases {
            assert_eq!(contains(outer, inner), expected, "{outer} contains {inner}");
        }
    }

    /// Over random patterns and topics: the winner is what comparing the matches pair by pair would choose,
    /// the subject can be published, and it lies within the entry's target.
    #[test]
    fn the_winner_is_the_most_specific_match_of_any_map() {
        let mut random = fastrand::Rng::with_seed(42);
        let alphabet = ["a", "b", "*", ">"];
        for _ in 0..3_000 {
            let mut entries = HashMap::new();
            for index in 0..random.usize(1..12) {
                let tokens: Vec<&str> =
                    (0..random.usize(1..5)).map(|_| alphabet[random.usize(..4)]).collect();
                let carried = tokens.iter().filter(|token| ["*", ">"].contains(token));
                let target: String = carried.fold(format!("t{index}"), |target, token| target + "." + token);
                entries.insert(tokens.join("."), target);
            }
            entries.retain(|pattern, _| is_pattern(pattern).is_ok());
            let map = TopicMap::new(entries.clone()).expect("a good map");
            let topic: Vec<&str> = (0..random.usize(1..5)).map(|_| alphabet[random.usize(..2)]).collect();
            let topic = topic.join(".");
            let subject = map.subject(&topic);
            is_literal_subject(&subject).expect("a subject that can be published");

            let rank = |pattern: &str| -> Vec<u8> {
                let kind = |token| if token == ">" { 2 } else { u8::from(token == "*") };
                pattern.split('.').map(kind).collect()
            };
            let best = entries
                .iter()
                .filter(|(pattern, _)| matches(pattern, &topic))
                .min_by_key(|(pattern, _)| (**pattern != topic, rank(pattern)));
            match best {
                None => assert_eq!(subject, topic),
                Some((_, target)) => assert!(matches(target, &subject), "{topic} {subject} {entries:?}"),
            }
        }
    }
}
