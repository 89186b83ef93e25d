//! Tables of configurations: what good ones mean, and what is said about broken ones, word for word.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use super::yaml::{Node, Value};
use super::*;

const SHIPPED: &str = include_str!("../../etc/config.yaml");
const README: &str = include_str!("../../README.md");

/// A good beginning for texts that are about something else; two lines.
const DSN: &str = "database:\n  dsn: postgresql://u:hunter2@h/d\n";

fn parse(text: &str) -> Result<Config, ConfigError> {
    parse_with(text, &[])
}

fn parse_with(text: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::parse(text, "config.yaml", |wanted| {
        environment.iter().find(|(name, _)| *name == wanted).map(|(_, value)| (*value).to_owned())
    })
}

/// The messages about `text`, none of which may hold the passwords used here.
fn problems(text: &str, environment: &[(&str, &str)]) -> Vec<String> {
    let error = parse_with(text, environment).expect_err(text);
    for secret in ["hunter2", "hunter"] {
        assert!(!error.to_string().contains(secret), "a password in {error}");
    }
    error.problems().to_vec()
}

#[test]
fn the_documented_example_works_as_it_stands() {
    let text = r#"
dispatcher: { instance_id: "dispatcher-1", batch_size: 100, max_attempts: 3, poll_interval: 1s, fallback_interval: 30s, workers: 5, shutdown_grace: 30s }
database: { dsn: "postgresql://user:pass@localhost:5432/mydb", max_connections: 20, max_idle: 10 }
nats:
  url: "nats://localhost:4222"
  max_retries: 5      # connection attempts at start, retry_delay apart, then exit 1 (systemd starts it again: StartLimitIntervalSec=0); once up, it reconnects for ever
  retry_delay: 2s
  jetstream: { enabled: true, stream_name: "EVENTS" }
  topic_map: { "user.created": "app.users.created", "order.*": "production.orders.*" }
logging: { level: "info", format: "json" }
metrics: { enabled: true, port: 8080, path: "/metrics" }
"#;
    let config = parse(text).unwrap();
    assert_eq!(config.dispatcher.instance_id, "dispatcher-1");
    assert_eq!(config.dispatcher.poll_interval, Duration::from_secs(1));
    assert_eq!(config.dispatcher.shutdown_grace, Duration::from_secs(30));
    assert_eq!(config.database.dsn.expose(), "postgresql://user:pass@localhost:5432/mydb");
    assert_eq!(config.nats.servers, ["nats://localhost:4222"]);
    assert_eq!(config.nats.retry_delay, Duration::from_secs(2));
    assert_eq!(config.nats.jetstream.stream_name, "EVENTS");
    assert_eq!(config.nats.topic_map.subject("order.placed"), "production.orders.placed");
    assert_eq!(config.nats.topic_map.subject("user.created"), "app.users.created");
    assert_eq!(config.logging.format, LogFormat::Json);
    assert_eq!(config.metrics.port, 8080);
}

#[test]
fn everything_but_the_dsn_has_a_default() {
    let config = parse("database: { dsn: 'host=/run/postgresql dbname=app' }").unwrap();
    assert!(!config.dispatcher.instance_id.is_empty());
    assert_eq!(config.dispatcher.workers, 5);
    assert_eq!(config.dispatcher.max_in_flight_bytes, 64 * 1024 * 1024);
    assert_eq!(config.database.dsn.expose(), "host=/run/postgresql dbname=app");
    assert!(config.ordering.enabled);
    assert!(matches!(config.nats.auth, NatsAuth::None));
    assert_eq!(config.logging.level, log::LevelFilter::Info);
    let expected = format!("{config:?}");

    let dsn = ("DATABASE_DSN", "host=/run/postgresql dbname=app");
    for text in [
        "",
        "# nothing\n",
        "database:\n",
        "database: {}\nnats: ~\n",
        "database: { dsn: }",
        "nats:\n  topic_map:\n",
    ] {
        assert_eq!(format!("{:?}", parse_with(text, &[dsn]).unwrap()), expected, "{text:?}");
    }
}

#[test]
fn the_shipped_file_loads_and_states_the_defaults() {
    let shipped = parse(SHIPPED).unwrap();
    let defaults = parse("database: { dsn: 'postgresql://outbox@localhost:5432/app' }").unwrap();
    assert_eq!(format!("{shipped:?}"), format!("{defaults:?}"));
    assert_eq!(shipped.database.dsn, defaults.database.dsn);
}

/// Keys that are commented out have their # right before them, unlike prose.
#[test]
fn the_shipped_file_has_every_key() {
    let is_key = |rest: &str| rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '"');
    let uncommented: Vec<String> = SHIPPED
        .lines()
        .map(|line| match line.split_once('#') {
            Some((indent, rest)) if indent.trim().is_empty() && is_key(rest) => format!("{indent}{rest}"),
            _ => line.to_owned(),
        })
        .collect();
    let node = yaml::parse(&uncommented.join("\n")).unwrap();
    let mut reading = ConfigReading::new(&|_| None, Credentials::of("config.yaml", |_| None));
    Config::read(&mut reading, &node);
    let known: BTreeSet<String> = reading.keys().iter().map(|facts| facts.key.clone()).collect();

    let mut written = BTreeSet::new();
    collect_keys(&node, "", &known, &mut written);
    assert_eq!(written, known);
    // Nothing is wrong with the file uncommented but that it then has several ways to log in.
    let problems = reading.finish("config.yaml", &uncommented.join("\n")).unwrap_err();
    assert_eq!(problems.problems().len(), 1, "{problems}");
    assert!(problems.to_string().contains("more than one way to log in"), "{problems}");
}

fn collect_keys(node: &Node, path: &str, known: &BTreeSet<String>, found: &mut BTreeSet<String>) {
    let Value::Map(entries) = &node.value else { return };
    for (key, value) in entries {
        let full = format!("{path}{}", values::name(key));
        let is_section = matches!(value.value, Value::Map(_)) && !known.contains(&full);
        if is_section {
            collect_keys(value, &format!("{full}."), known, found);
        } else {
            found.insert(full);
        }
    }
}

/// Every key with a value that is not its default.
const EVERY_KEY: &str = r#"
dispatcher:
  instance_id: two words
  batch_size: 7
  max_attempts: 8
  poll_interval: 250ms
  fallback_interval: 1m 30s
  workers: 64
  shutdown_grace: 0s
  claim_budget: 2s
  max_in_flight_bytes: 512KiB
  backoff_initial: 100ms
  backoff_max: 1h
  stuck_after: 30s
ordering: { enabled: false, on_dead: block }
database:
  dsn: host=a
  max_connections: 66
  max_idle: 0
  connect_timeout: 1s
  listen: false
  listen_dsn: host = b
  user: me
  password: hunter2
  sslrootcert: system
  sslcert: /c
  sslkey: /k
  schema: the Shop
  prepared_statements: never
  synchronous_commit: true
nats:
  url: [ "nats://a:4222", "TLS://b.example/, nats://[::1]:4333" ]
  user: me
  password: "123"
  max_retries: 9
  retry_delay: 10ms
  connect_timeout: 3s
  ack_timeout: 4s
  allow_headers: Nats-TTL
  dead_letter_subject: outbox.dead
  inbox_prefix: _INBOX.outbox
  tls: { ca: /ca, cert: /cert, key: /key }
  jetstream:
    enabled: false
    stream_name: OTHER_1
    atomic_batches: false
    create: true
    subjects: [ app.>, "*.b" ]
    storage: memory
    replicas: 5
    duplicate_window: 1h
  topic_map: { "a.*": b.* }
partitions: { premake: 12, retention: 90d, sweep_rate: 7 }
logging: { level: TRACE, format: json }
metrics: { enabled: false, address: "::1", port: 0, path: /m/x }
"#;

#[test]
fn every_key_has_its_effect() {
    let Config { dispatcher, ordering, database, nats, partitions, logging, metrics } =
        parse(EVERY_KEY).unwrap();
    let ms = Duration::from_millis;
    assert_eq!(dispatcher.instance_id, "two words");
    assert_eq!((dispatcher.batch_size, dispatcher.max_attempts, dispatcher.workers), (7, 8, 64));
    assert_eq!((dispatcher.poll_interval, dispatcher.fallback_interval), (ms(250), ms(90_000)));
    assert_eq!((dispatcher.shutdown_grace, dispatcher.claim_budget), (ms(0), ms(2_000)));
    assert_eq!(dispatcher.max_in_flight_bytes, 512 * 1024);
    assert_eq!(dispatcher.stuck_after, ms(30_000));
    assert_eq!((dispatcher.backoff_initial, dispatcher.backoff_max), (ms(100), ms(3_600_000)));
    assert_eq!((ordering.enabled, ordering.on_dead), (false, OnDead::Block));
    assert_eq!((database.max_connections, database.max_idle), (66, 0));
    assert_eq!(database.connect_timeout, ms(1_000));
    assert_eq!((database.listen, database.synchronous_commit), (false, true));
    assert_eq!(database.listen_dsn, Some(Secret::new("host = b")));
    assert_eq!(database.prepared_statements, PreparedStatements::Never);
    assert_eq!(database.schema.as_deref(), Some("the Shop"));
    assert_eq!(nats.servers, ["nats://a:4222", "tls://b.example", "nats://[::1]:4333"]);
    assert!(
        matches!(nats.auth, NatsAuth::UserPassword(user, password) if user == "me" && password.expose() == "123")
    );
    assert_eq!(nats.inbox_prefix, "_INBOX.outbox");
    let file = |path: &str| Some(path.into());
    assert_eq!(nats.tls, NatsTls { ca: file("/ca"), cert: file("/cert"), key: file("/key") });
    assert_eq!((nats.max_retries, nats.retry_delay), (9, ms(10)));
    assert_eq!((nats.connect_timeout, nats.ack_timeout), (ms(3_000), ms(4_000)));
    assert_eq!(nats.allow_headers, ["Nats-TTL"]);
    assert_eq!(nats.dead_letter_subject.as_deref(), Some("outbox.dead"));
    assert_eq!(nats.topic_map.subject("a.x"), "b.x");
    let jetstream = nats.jetstream;
    assert_eq!((jetstream.enabled, jetstream.create), (false, true));
    assert_eq!((jetstream.stream_name.as_str(), jetstream.replicas), ("OTHER_1", 5));
    assert!(!jetstream.atomic_batches);
    assert_eq!(jetstream.subjects, ["app.>", "*.b"]);
    assert_eq!((jetstream.storage, jetstream.duplicate_window), (Storage::Memory, ms(3_600_000)));
    assert_eq!((partitions.premake, partitions.sweep_rate), (12, 7));
    assert_eq!(partitions.retention, Some(Duration::from_secs(90 * 86_400)));
    assert_eq!((logging.level, logging.format), (log::LevelFilter::Trace, LogFormat::Json));
    assert_eq!((metrics.enabled, metrics.port, metrics.path.as_str()), (false, 0, "/m/x"));
    assert_eq!(metrics.address, "::1".parse::<IpAddr>().unwrap());
}

#[test]
fn a_reload_takes_over_what_is_live_and_names_the_rest() {
    let mut config = parse(DSN).unwrap();
    let new = parse(EVERY_KEY).unwrap();
    let first = config.take_live(&new);
    assert_eq!(
        first.applied,
        [
            "dispatcher.batch_size",
            "dispatcher.max_attempts",
            "dispatcher.backoff_initial",
            "dispatcher.backoff_max",
            "nats.allow_headers",
            "nats.dead_letter_subject",
            "nats.topic_map",
            "partitions.premake",
            "partitions.retention",
            "partitions.sweep_rate",
            "logging.level"
        ]
    );
    assert_eq!(config.nats.topic_map, new.nats.topic_map);
    assert_eq!(config.dispatcher.workers, 5, "what takes a restart stays as it was");
    assert_eq!(config.take_live(&new), Changes { applied: Vec::new(), ..first.clone() });
}

/// A configuration in which nothing is written but the connection string and these keys.
fn with_keys(written: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let mut root = serde_yaml::Value::from(serde_yaml::Mapping::new());
    for (key, value) in [("database.dsn", "host=h")].iter().chain(written) {
        let mut node = &mut root;
        for name in key.split('.') {
            if !node.is_mapping() {
                *node = serde_yaml::Mapping::new().into();
            }
            node = node.as_mapping_mut().unwrap().entry(name.into()).or_insert(serde_yaml::Value::Null);
        }
        *node = serde_yaml::from_str(value).unwrap();
    }
    parse(&serde_yaml::to_string(&root).unwrap())
}

/// What is written for `key`, and for the key that it cannot be without, so that it is not its default: of these the
/// first that it takes.
fn another_value(facts: &KeyFacts, defaults: &Config) -> (Vec<&'static str>, Config) {
    const PAIRS: [(&str, &str, &str); 5] = [
        ("nats.user", "nats.password", "other"),
        ("nats.password", "nats.user", "other"),
        ("nats.tls.cert", "nats.tls.key", "/other"),
        ("nats.tls.key", "nats.tls.cert", "/other"),
        ("nats.jetstream.create", "nats.jetstream.subjects", "other"),
    ];
    let key = facts.key.as_str();
    let pair = PAIRS.iter().find(|(of, ..)| *of == key).map(|(_, other, value)| (*other, *value));
    let numbers = ["1000", "64", "5", "2", "1h", "10s", "60d", "1GiB", "true", "false"];
    let texts = ["other", "/other", "::1", "nats://other", "host=other", "Nats-TTL", "{ a: b }"];
    for value in numbers.into_iter().chain(texts).chain(facts.allowed.split(", ")) {
        let written: Vec<(&str, &str)> = [(key, value)].into_iter().chain(pair).collect();
        if let Ok(config) = with_keys(&written)
            && config != *defaults
        {
            return (pair.map(|(other, _)| other).into_iter().collect(), config);
        }
    }
    panic!("{key} takes none of these: give this test a value for it");
}

#[test]
fn a_reload_does_with_each_key_what_is_declared() {
    const LOGINS: [&str; 5] =
        ["nats.user", "nats.password", "nats.token", "nats.nkey_file", "nats.credentials_file"];
    let defaults = with_keys(&[]).unwrap();
    for facts in keys() {
        let (pair, new) = another_value(&facts, &defaults);
        let mut running = defaults.clone();
        let changes = running.take_live(&new);
        let (named, others, expected) = match facts.reload {
            Reload::Applies => (changes.applied, changes.need_restart, &new),
            Reload::NeedsRestart => (changes.need_restart, changes.applied, &defaults),
        };
        let named: BTreeSet<&str> = named.into_iter().collect();
        let known = |key| if LOGINS.contains(&key) { "nats credentials" } else { key };
        assert_eq!(named, pair.iter().copied().chain([&*facts.key]).map(known).collect(), "{}", facts.key);
        assert!(others.is_empty(), "{} and {others:?}", facts.key);
        assert_eq!(running, *expected, "{}", facts.key);
    }
}

/// The keys of the shipped file with the comment above them and the value beside them; `None` for one that is
/// commented out. Keys that stand together share their comment.
fn shipped_keys() -> HashMap<String, (String, Option<String>)> {
    let mut keys = HashMap::new();
    let (mut path, mut comment, mut has_key): (Vec<&str>, String, bool) = Default::default();
    for line in SHIPPED.lines() {
        let text = line.trim_start();
        let is_key = |text: &str| text.starts_with(|c: char| c.is_ascii_lowercase());
        let commented = text.strip_prefix('#');
        if let Some((name, value)) = commented
            .filter(|rest| is_key(rest))
            .or(is_key(text).then_some(text))
            .and_then(|t| t.split_once(':'))
        {
            path.truncate((line.len() - text.len()) / 2);
            path.push(name);
            has_key = true;
            let value = commented.is_none().then(|| value.trim().to_owned());
            keys.insert(path.join("."), (comment.clone(), value));
        } else {
            if has_key || text.is_empty() {
                comment.clear();
                has_key = false;
            }
            comment += text.trim_start_matches(['#', ' ']);
            comment.push(' ');
        }
    }
    keys
}

/// What is wrong with the ranges and words of `text` if it is about this key. Truth values go without saying.
fn disagreement(text: &str, facts: &KeyFacts, must_state: bool) -> Option<String> {
    if facts.allowed.is_empty() || facts.allowed == "true, false" {
        return None;
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let stands = |part: &&str| {
        let at_a_border = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
        text.match_indices(*part).any(|(at, _)| {
            at_a_border(text[..at].chars().next_back()) && at_a_border(text[at + part.len()..].chars().next())
        })
    };
    let missing: Vec<&str> = facts.allowed.split(", ").filter(|part| !stands(part)).collect();
    if must_state && !missing.is_empty() {
        return Some(format!("{} does not say {missing:?}: {text}", facts.key));
    }
    let words: Vec<&str> = text.split([' ', ',', ';', '.', '`']).collect();
    let is_number = |word: &str| word.starts_with(|c: char| c.is_ascii_digit());
    words
        .windows(3)
        .filter(|three| three[1] == "to" && is_number(three[0]) && is_number(three[2]))
        .map(|three| three.join(" "))
        .find(|range| !facts.allowed.split(", ").any(|part| part == range))
        .map(|range| format!("{} says {range}, not {}: {text}", facts.key, facts.allowed))
}

#[test]
fn the_shipped_file_states_what_each_key_may_be() {
    let shipped = shipped_keys();
    let wrong: Vec<String> =
        keys().iter().filter_map(|facts| disagreement(&shipped[&facts.key].0, facts, true)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_readme_states_each_default() {
    let shipped = shipped_keys();
    let defaults = with_keys(&[]).unwrap();
    let mut missing: BTreeMap<String, KeyFacts> =
        keys().into_iter().map(|facts| (facts.key.clone(), facts)).collect();
    let table = README.split("| key | default | meaning |").nth(1).unwrap().split("\n\n").next().unwrap();
    for row in table.lines().filter(|row| row.starts_with("| `")) {
        let [names, default, meaning] =
            row.trim_matches('|').splitn(3, '|').map(str::trim).collect::<Vec<_>>().try_into().unwrap();
        for key in names.split(", ").map(|name| name.trim_matches('`')) {
            let facts = missing.remove(key).unwrap_or_else(|| panic!("no such key, or twice: {row}"));
            assert_eq!(disagreement(meaning, &facts, false), None);
            if shipped[key].1.is_none() || key == "database.dsn" {
                // None, or one that depends on the machine or another key.
                continue;
            }
            let value = default.strip_prefix('`').and_then(|rest| rest.strip_suffix('`')).expect(row);
            assert_eq!(with_keys(&[(key, value)]).as_ref(), Ok(&defaults), "{row}");
        }
    }
    assert!(missing.is_empty(), "the README's table lacks {:?}", missing.keys());
}

#[test]
fn the_texts_name_the_keys_that_a_reload_applies_and_no_others() {
    let keys = keys();
    let last = |facts: &KeyFacts| facts.key.rsplit('.').next().unwrap_or_default().to_owned();
    let live: BTreeSet<String> =
        keys.iter().filter(|facts| facts.reload == Reload::Applies).map(last).collect();
    let fixed: BTreeSet<String> = keys.iter().map(last).filter(|name| !live.contains(name)).collect();
    for (text, start) in
        [(SHIPPED, "# SIGHUP (systemctl reload)"), (README, "SIGHUP (`systemctl reload pg-outbox`)")]
    {
        let paragraph = text.split(start).nth(1).unwrap().split("\n\n").next().unwrap();
        let words: BTreeSet<String> =
            paragraph.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).map(str::to_owned).collect();
        assert_eq!(live.difference(&words).next(), None, "not named:\n{paragraph}");
        assert_eq!(fixed.intersection(&words).next(), None, "it takes a restart:\n{paragraph}");
    }
}

#[test]
fn the_environment_wins_over_the_file_unless_it_is_empty() {
    let text = format!(
        "{DSN}dispatcher: {{ instance_id: f }}\nnats: {{ url: 'nats://f' }}\nlogging: {{ level: warn, format: plain }}"
    );
    let all = [
        ("DATABASE_DSN", "host=e"),
        ("NATS_URL", "nats://e1:1,nats://e2:2"),
        ("DISPATCHER_INSTANCE_ID", "e"),
        ("LOG_LEVEL", "debug"),
    ];
    let config = parse_with(&text, &all).unwrap();
    assert_eq!(config.database.dsn.expose(), "host=e");
    assert_eq!(config.nats.servers, ["nats://e1:1", "nats://e2:2"]);
    assert_eq!(config.dispatcher.instance_id, "e");
    assert_eq!(config.logging.level, log::LevelFilter::Debug);

    let empty = all.map(|(name, _)| (name, ""));
    let config = parse_with(&text, &empty).unwrap();
    assert_eq!(config.nats.servers, ["nats://f"]);
    assert_eq!(config.dispatcher.instance_id, "f");
    assert_eq!(config.logging.level, log::LevelFilter::Warn);
    assert_eq!(config.logging.format, LogFormat::Text);

    // What the environment replaces need not be right, or be there.
    assert!(parse_with("database: { dsn: '' }", &all).is_ok());
}

#[test]
fn the_ways_to_log_in_to_nats() {
    let auth = |nats: &str| parse(&format!("{DSN}nats: {{ {nats} }}")).unwrap().nats;
    let nats = auth("url: 'nats://me:p%40%3Ass@a,nats://me:p%40%3Ass@b:4223,nats://c'");
    assert_eq!(nats.servers, ["nats://a", "nats://b:4223", "nats://c"]);
    assert!(
        matches!(nats.auth, NatsAuth::UserPassword(user, password) if user == "me" && password.expose() == "p@:ss")
    );
    assert!(
        matches!(auth("url: 'nats://t0ken@a'").auth, NatsAuth::Token(token) if token.expose() == "t0ken")
    );
    assert!(matches!(auth("token: t0ken").auth, NatsAuth::Token(token) if token.expose() == "t0ken"));
    assert!(
        matches!(auth("credentials_file: /x").auth, NatsAuth::CredentialsFile(path) if path == Path::new("/x"))
    );
    assert!(matches!(auth("nkey_file: /x").auth, NatsAuth::NkeyFile(path) if path == Path::new("/x")));
}

#[test]
fn secrets_do_not_print() {
    let text = "database: { dsn: 'postgresql://u:hunter2@h/d', listen_dsn: 'host=h password=hunter2' }\n\
                nats: { url: 'nats://u:hunter2@h' }";
    let config = parse(text).unwrap();
    let printed = format!("{config:?} {config:#?} {}", config.database.dsn);
    assert!(!printed.contains("hunter2") && printed.contains("***"), "{printed}");
}

/// Each text is broken in one way; its message, word for word.
#[test]
fn a_broken_value_is_named_with_its_line_and_what_is_allowed() {
    let cases = [
        ("dispatcher:\n  bach_size: 10", "3: dispatcher.bach_size: unknown key; did you mean batch_size?"),
        ("dispatcher:\n  batch-size: 10", "3: dispatcher.batch-size: unknown key; did you mean batch_size?"),
        (
            "dispatcher:\n  stream_name: A",
            "3: dispatcher.stream_name: unknown key; did you mean nats.jetstream.stream_name?",
        ),
        ("ordering:\n  strict: true", "3: ordering.strict: unknown key; allowed: enabled, on_dead"),
        ("ordering:\n  \"a b\": true", "3: ordering.\"a b\": unknown key; allowed: enabled, on_dead"),
        (
            "partitions:\n  retention: 30",
            "14: partitions.retention: 30 has no unit; write 30s for seconds, or off",
        ),
        (
            "partitions:\n  retention: 1h",
            "14: partitions.retention: \"1h\" is too short; allowed: 1day to 100years, or off",
        ),
        ("partitions:\n  premake: 0", "12: partitions.premake: 0 is out of range; allowed: 1 to 120"),
        ("ordering:\n  7: true", "3: ordering.7: unknown key; allowed: enabled, on_dead"),
        ("ordering:\n  <<: 1", "3: ordering.\"<<\": merge keys are not supported; write the keys out"),
        ("loging: {}", "1: loging: unknown key; did you mean logging?"),
        ("dispatcher:\n  workers: 2\n  workers: 3", "3: dispatcher.workers: written twice; keep one"),
        (
            "dispatcher:\n  batch_size: 0",
            "15: dispatcher.batch_size: 0 is out of range; allowed: 1 to 100000",
        ),
        (
            "dispatcher:\n  batch_size: -5",
            "15: dispatcher.batch_size: -5 is out of range; allowed: 1 to 100000",
        ),
        (
            "dispatcher:\n  batch_size: 1.5",
            "15: dispatcher.batch_size: 1.5 is not a whole number; allowed: 1 to 100000",
        ),
        (
            "dispatcher:\n  batch_size: many",
            "15: dispatcher.batch_size: \"many\" is not a whole number; allowed: 1 to 100000",
        ),
        (
            "dispatcher:\n  batch_size: '10'",
            "15: dispatcher.batch_size: \"10\" is text; write the number without quotes; allowed: 1 to 100000",
        ),
        (
            "dispatcher:\n  batch_size: [1]",
            "15: dispatcher.batch_size: a list is not a whole number; allowed: 1 to 100000",
        ),
        (
            "dispatcher:\n  batch_size: 99999999999999999999999",
            "15: dispatcher.batch_size: 99999999999999999999999 is out of range; allowed: 1 to 100000",
        ),
        ("dispatcher:\n  workers: 65", "12: dispatcher.workers: 65 is out of range; allowed: 1 to 64"),
        (
            "dispatcher:\n  max_attempts: 0",
            "17: dispatcher.max_attempts: 0 is out of range; allowed: 1 to 1000000",
        ),
        (
            "dispatcher:\n  poll_interval: 30",
            "18: dispatcher.poll_interval: 30 has no unit; write 30s for seconds",
        ),
        (
            "dispatcher:\n  poll_interval: \"30\"",
            "18: dispatcher.poll_interval: 30 has no unit; write 30s for seconds",
        ),
        (
            "dispatcher:\n  poll_interval: 0s",
            "18: dispatcher.poll_interval: \"0s\" is too short; allowed: 10ms to 1h",
        ),
        (
            "dispatcher:\n  poll_interval: -1s",
            "18: dispatcher.poll_interval: \"-1s\" is not a duration such as 500ms, 30s or 5m; allowed: 10ms to 1h",
        ),
        (
            "dispatcher:\n  poll_interval: 2h",
            "18: dispatcher.poll_interval: \"2h\" is too long; allowed: 10ms to 1h",
        ),
        (
            "dispatcher:\n  poll_interval: true",
            "18: dispatcher.poll_interval: true is not a duration; allowed: 10ms to 1h",
        ),
        (
            "dispatcher:\n  poll_interval: 31s",
            "18: dispatcher.poll_interval: poll_interval 31s is longer than fallback_interval 30s; allowed: at most as long",
        ),
        (
            "dispatcher:\n  backoff_max: 500ms",
            "16: dispatcher.backoff_max: backoff_initial 1s is longer than backoff_max 500ms; allowed: at most as long",
        ),
        (
            "dispatcher:\n  max_in_flight_bytes: 1000000",
            "24: dispatcher.max_in_flight_bytes: 1000000 is not a size such as 512KiB, 64MiB or 1GiB; allowed: 64KiB to 64GiB",
        ),
        (
            "dispatcher:\n  max_in_flight_bytes: 64MB",
            "24: dispatcher.max_in_flight_bytes: \"64MB\" is not a size such as 512KiB, 64MiB or 1GiB; allowed: 64KiB to 64GiB",
        ),
        (
            "dispatcher:\n  max_in_flight_bytes: 1KiB",
            "24: dispatcher.max_in_flight_bytes: \"1KiB\" is out of range; allowed: 64KiB to 64GiB",
        ),
        (
            "dispatcher:\n  max_in_flight_bytes: 99999999999999999GiB",
            "24: dispatcher.max_in_flight_bytes: \"99999999999999999GiB\" is out of range; allowed: 64KiB to 64GiB",
        ),
        (
            "dispatcher:\n  instance_id: 5",
            "16: dispatcher.instance_id: 5 is not text; write it in quotes: \"5\"",
        ),
        (
            "dispatcher:\n  instance_id: ü",
            "16: dispatcher.instance_id: \"ü\" is not an instance name; allowed: 1 to 63 printable ASCII characters, no blank at either end",
        ),
        (
            "dispatcher:\n  instance_id: \"a\\nb\"",
            "16: dispatcher.instance_id: \"a\\nb\" is not an instance name; allowed: 1 to 63 printable ASCII characters, no blank at either end",
        ),
        ("dispatcher:\n  instance_id: \"\"", "16: dispatcher.instance_id: is empty; allowed: text"),
        ("dispatcher: fast", "13: dispatcher: \"fast\" where a mapping of keys to values is due"),
        (
            "dispatcher:\n  workers: 30",
            "12: dispatcher.workers: max_connections 20 is too small for 30 workers; allowed: at least 32 (workers + 2)",
        ),
        (
            "ordering:\n  enabled: yes",
            "12: ordering.enabled: \"yes\" is not a truth value; allowed: true, false",
        ),
        (
            "ordering:\n  on_dead: stop",
            "12: ordering.on_dead: \"stop\" is not a way to treat a key; allowed: continue, block",
        ),
        (
            "nats:\n  url: localhost:4222",
            "8: nats.url: \"localhost:4222\" is not a URL; allowed: nats://host:4222 or tls://host:4222",
        ),
        (
            "nats:\n  url: http://localhost",
            "8: nats.url: \"http://localhost\" has a scheme that is not nats or tls; allowed: nats://host:4222 or tls://host:4222",
        ),
        (
            "nats:\n  url: nats://u:hunter2@h:0",
            "8: nats.url: \"nats://***@h:0\" has a port that is not 1 to 65535; allowed: nats://host:4222 or tls://host:4222",
        ),
        (
            "nats:\n  url: nats://u:hunter,2@h",
            "8: nats.url: \"nats://***@h\" has a port that is not 1 to 65535; allowed: nats://host:4222 or tls://host:4222",
        ),
        (
            "nats:\n  url: nats://u:hunter%2@h",
            "8: nats.url: \"nats://***@h\" has a % in its credentials that does not begin an escape such as %40; allowed: nats://host:4222 or tls://host:4222",
        ),
        (
            "nats:\n  url: nats://h/path",
            "8: nats.url: \"nats://h/path\" has more than a host and a port; allowed: nats://host:4222 or tls://host:4222",
        ),
        (
            "nats:\n  url: nats://a@h,nats://b@h",
            "8: nats.url: its servers have different credentials; allowed: the same for all, once is enough",
        ),
        ("nats:\n  url: [nats://h, 5]", "19: nats.url[1]: 5 is not text; write it in quotes: \"5\""),
        (
            "nats:\n  url: [nats://h, 'nats://']",
            "19: nats.url[1]: \"nats://\" has no valid host; allowed: nats://host:4222 or tls://host:4222",
        ),
        ("nats:\n  url: []", "8: nats.url: the list is empty; leave the key out for its default"),
        (
            "nats:\n  url: postgresql://u:hunter2@h/d",
            "8: nats.url: \"postgresql://***@h/d\" has a scheme that is not nats or tls; allowed: nats://host:4222 or tls://host:4222",
        ),
        (
            "nats:\n  url: host=h password=hunter2",
            "8: nats.url: \"***\" is not a URL; allowed: nats://host:4222 or tls://host:4222",
        ),
        ("nats:\n  password: 12", "13: nats.password: is not text; write it in quotes"),
        (
            "nats:\n  password: hunter2",
            "13: nats.password: nats.user and nats.password go together; one of them is missing",
        ),
        ("nats:\n  user: u", "9: nats.user: nats.user and nats.password go together; one of them is missing"),
        (
            "nats: { user: u, password: hunter2, token: hunter2 }",
            "44: nats.token: more than one way to log in (nats.token, nats.user and nats.password); keep one",
        ),
        (
            "nats: { nkey_file: /x, credentials_file: /x }",
            "20: nats.nkey_file: more than one way to log in (nats.nkey_file, nats.credentials_file); keep one",
        ),
        (
            "nats: { tls: { cert: /x } }",
            "22: nats.tls.cert: nats.tls.cert and nats.tls.key go together; one of them is missing",
        ),
        (
            "nats: { inbox_prefix: '_INBOX.>' }",
            "23: nats.inbox_prefix: \"_INBOX.>\" is not a subject: it has a wildcard; allowed: such as _INBOX_outbox",
        ),
        (
            "nats: { dead_letter_subject: 'dead.*' }",
            "30: nats.dead_letter_subject: \"dead.*\" is not a subject: it has a wildcard; allowed: such as outbox.dead",
        ),
        (
            "nats: { dead_letter_subject: $JS.x }",
            "30: nats.dead_letter_subject: \"$JS.x\" begins with what is NATS's own; allowed: such as outbox.dead",
        ),
        (
            "nats: { inbox_prefix: $SYS }",
            "23: nats.inbox_prefix: \"$SYS\" begins with what is NATS's own; allowed: such as _INBOX_outbox",
        ),
        (
            "nats: { url: 'nats://hunter2@h', token: hunter2 }",
            "41: nats.token: more than one way to log in (nats.url, nats.token); keep one",
        ),
        (
            "nats:\n  allow_headers: [Nats-TTL, Nats-Msg-Id]",
            "29: nats.allow_headers[1]: \"Nats-Msg-Id\" cannot be allowed: it decides where an event is stored, so metadata never sets it",
        ),
        (
            "nats:\n  allow_headers: X-Trace",
            "18: nats.allow_headers: \"X-Trace\" cannot be allowed: only Nats-* headers need permission",
        ),
        ("nats:\n  max_retries: 0", "16: nats.max_retries: 0 is out of range; allowed: 1 to 1000000"),
        (
            "nats:\n  topic_map: [a, b]",
            "14: nats.topic_map: a list is not a mapping; allowed: lines such as order.*: app.orders.*",
        ),
        (
            "nats:\n  topic_map: { a.*: b.*.* }",
            "16: nats.topic_map.\"a.*\": cannot go to \"b.*.*\": the subject has 2 of * and the topic 1; allowed: as many, or none in the subject",
        ),
        (
            "nats:\n  topic_map: { a.b: 5 }",
            "21: nats.topic_map.\"a.b\": 5 is not text; write it in quotes: \"5\"",
        ),
        (
            "nats:\n  topic_map: { 5: a }",
            "16: nats.topic_map.5: its topic 5 is not text; write it in quotes: \"5\"",
        ),
        ("nats:\n  topic_map: { a: b, a: c }", "22: nats.topic_map.a: written twice; keep one"),
        (
            "nats:\n  jetstream: { stream_name: a.b }",
            "29: nats.jetstream.stream_name: \"a.b\" is not a stream name; allowed: at most 255 characters, no blank and none of . * > / \\",
        ),
        (
            "nats:\n  jetstream: { create: true }",
            "24: nats.jetstream.create: true, but nats.jetstream.subjects is missing; write the new stream's subjects, such as [\"app.>\"]",
        ),
        (
            "nats:\n  jetstream: { create: true, subjects: [a.>.b] }",
            "41: nats.jetstream.subjects[0]: \"a.>.b\" is not a subject: it has a > that is not its last token",
        ),
        (
            "nats:\n  jetstream: { replicas: 6 }",
            "26: nats.jetstream.replicas: 6 is out of range; allowed: 1 to 5",
        ),
        (
            "nats:\n  jetstream: { storage: disk }",
            "25: nats.jetstream.storage: \"disk\" is not a kind of storage; allowed: file, memory",
        ),
        (
            "logging:\n  level: loud",
            "10: logging.level: \"loud\" is not a level; allowed: error, warn, info, debug, trace",
        ),
        (
            "logging:\n  format: console",
            "11: logging.format: \"console\" is not a format; allowed: json, text, plain",
        ),
        ("metrics:\n  port: 65536", "9: metrics.port: 65536 is out of range; allowed: 0 to 65535"),
        (
            "metrics:\n  path: metrics",
            "9: metrics.path: \"metrics\" is not a path; allowed: such as /metrics",
        ),
        (
            "metrics:\n  path: /ready",
            "9: metrics.path: \"/ready\" is taken; allowed: any path but / /status /recent /health /healthz /ready /readyz",
        ),
        (
            "metrics:\n  address: localhost",
            "12: metrics.address: \"localhost\" is not an IP address; allowed: such as 0.0.0.0, 127.0.0.1 or ::",
        ),
    ];
    for (broken, expected) in cases {
        // The dsn comes first, in two lines; the fault is on the last line.
        let text = format!("{DSN}{broken}");
        let expected = format!("config.yaml:{}:{expected}", text.lines().count());
        assert_eq!(problems(&text, &[]), [expected], "{text}");
    }
}

#[test]
fn a_broken_database_section_is_named_too() {
    let forms = "allowed: postgresql://user:password@host:5432/database, or host=... user=... password=... dbname=...";
    let missing =
        "database.dsn: missing; write the connection string here or in the environment as DATABASE_DSN";
    let ok = "dsn: host=h";
    let no_schema = "is not a schema's name; allowed: 1 to 63 bytes, no quotation marks, backslashes or control characters";
    let cases = [
        (String::new(), format!("1:1: {missing}")),
        ("logging: {}\ndatabase:\n".to_owned(), format!("2:1: {missing}")),
        ("\n\nlogging: {}\n".to_owned(), format!("3:1: {missing}")),
        ("database: { dsn: '' }".to_owned(), format!("1:18: database.dsn: is empty; {forms}")),
        ("database: { dsn: 5 }".to_owned(), format!("1:18: database.dsn: not a connection string; {forms}")),
        ("database: { dsn: u:hunter2@h }".to_owned(), format!("1:18: database.dsn: not a connection string; {forms}")),
        ("database: { dsn: 'mysql://u:hunter2@h/d?x=y' }".to_owned(), format!("1:18: database.dsn: not a connection string; {forms}")),
        ("database: { dsn: 'postgresql://u:hunter2 @h' }".to_owned(), format!("1:18: database.dsn: not a connection string; {forms}")),
        (format!("database: {{ {ok}, listen_dsn: hunter2 }}"), format!("1:38: database.listen_dsn: not a connection string; {forms}")),
        (format!("database: {{ {ok}, max_connections: 6 }}"), "1:43: database.max_connections: max_connections 6 is too small for 5 workers; allowed: at least 7 (workers + 2)".to_owned()),
        (format!("database: {{ {ok}, max_connections: 0 }}"), "1:43: database.max_connections: 0 is out of range; allowed: 1 to 1000".to_owned()),
        (format!("database: {{ {ok}, max_idle: 21 }}"), "1:36: database.max_idle: max_idle 21 is more than max_connections; allowed: 0 to 20".to_owned()),
        (format!("database: {{ {ok}, schema: \"a'b\" }}"), format!("1:34: database.schema: \"a'b\" {no_schema}")),
        (format!("database: {{ {ok}, schema: 'a\"b' }}"), format!("1:34: database.schema: \"a\\\"b\" {no_schema}")),
        (format!("database: {{ {ok}, schema: '' }}"), "1:34: database.schema: is empty; allowed: text".to_owned()),
        ("database: { token: hunter2, dsn: host=h }".to_owned(), "1:13: database.token: unknown key; did you mean nats.token?".to_owned()),
    ];
    for (text, expected) in cases {
        assert_eq!(problems(&text, &[]), [format!("config.yaml:{expected}")], "{text}");
    }
}

#[test]
fn a_text_that_is_not_yaml_is_named_with_its_line() {
    let cases = [
        (
            "a: [1,\nb: 2\n",
            "3:1: not YAML: did not find expected ',' or ']', while parsing a flow sequence at line 1 column 4",
        ),
        (
            "database:\n\tdsn: x\n",
            "2:1: not YAML: found character that cannot start any token, while scanning for the next token",
        ),
        ("a: *nobody\n", "1:4: not YAML: unknown anchor"),
        ("a: !tag b\n", "1:4: not YAML: a: invalid type: enum, expected a value without a tag"),
    ];
    for (text, expected) in cases {
        assert_eq!(problems(text, &[]), [format!("config.yaml:{expected}")], "{text}");
    }
    assert_eq!(
        problems("just text", &[])[0],
        "config.yaml:1:1: \"just text\" where a mapping of keys to values is due"
    );
    assert_eq!(problems("- a\n", &[])[0], "config.yaml:1:1: a list where a mapping of keys to values is due");
    assert!(problems("a: 1\n---\nb: 2\n", &[])[0].starts_with("config.yaml: not YAML: "));
}

#[test]
fn a_broken_environment_is_named_by_its_variable() {
    let environment = [
        ("DATABASE_DSN", "u:hunter2@h"),
        ("NATS_URL", "http://u:hunter2@h"),
        ("DISPATCHER_INSTANCE_ID", " x"),
        ("LOG_LEVEL", "loud"),
    ];
    let forms = "allowed: postgresql://user:password@host:5432/database, or host=... user=... password=... dbname=...";
    let mut found = problems("", &environment);
    found.sort();
    assert_eq!(
        found,
        [
            format!("environment: DATABASE_DSN: not a connection string; {forms}"),
            "environment: DISPATCHER_INSTANCE_ID: \" x\" is not an instance name; allowed: 1 to 63 printable ASCII characters, no blank at either end".to_owned(),
            "environment: LOG_LEVEL: \"loud\" is not a level; allowed: error, warn, info, debug, trace".to_owned(),
            "environment: NATS_URL: \"http://***@h\" has a scheme that is not nats or tls; allowed: nats://host:4222 or tls://host:4222".to_owned(),
        ]
    );
}

#[test]
fn all_problems_come_at_once_in_the_order_of_the_file() {
    let text = "metrics:\n  prot: 1\n  port: -1\nnats: { url: [ftp://h, nats://h, x] }\ndispatcher:\n  workers: 0\n  batch_size: 0\n";
    let places: Vec<String> = problems(text, &[("LOG_LEVEL", "loud")])
        .iter()
        .map(|problem| problem.splitn(5, ':').take(4).collect::<Vec<&str>>().join(":"))
        .collect();
    assert_eq!(
        places,
        [
            "config.yaml:1:1: database.dsn",
            "config.yaml:2:3: metrics.prot",
            "config.yaml:3:9: metrics.port",
            "config.yaml:4:15: nats.url[0]",
            "config.yaml:6:12: dispatcher.workers",
            "config.yaml:7:15: dispatcher.batch_size",
            "environment: LOG_LEVEL: \"loud\" is not a level; allowed: error, warn, info, debug, trace",
        ]
    );
}

#[test]
fn a_flood_of_problems_is_cut_short() {
    let text: String = (0..5_000).map(|n| format!("key-{n}: 1\n")).collect();
    let found = problems(&format!("{DSN}{text}"), &[]);
    assert_eq!(found.len(), 101);
    assert_eq!(found[100], "config.yaml: and 4900 more");
}

#[test]
fn aliases_are_followed() {
    let text =
        "database: { dsn: host=h, connect_timeout: &t 7s }\nnats: { ack_timeout: *t, connect_timeout: *t }";
    let config = parse(text).unwrap();
    assert_eq!(config.nats.ack_timeout, Duration::from_secs(7));
    let text = "database: { dsn: host=h, connect_timeout: &t 7 }\nnats: { ack_timeout: *t }";
    let keys = ["database.connect_timeout", "nats.ack_timeout"];
    let expected = keys.map(|key| format!("config.yaml:1:43: {key}: 7 has no unit; write 7s for seconds"));
    assert_eq!(problems(text, &[]), expected);
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.yaml");
    let error = Config::load(&absent).unwrap_err().to_string();
    let expected = format!("{}: cannot be read: No such file or directory (os error 2)", absent.display());
    assert_eq!(error, expected);

    let binary = folder.path().join("binary.yaml");
    std::fs::write(&binary, b"a: \xff\n").unwrap();
    assert!(Config::load(&binary).unwrap_err().to_string().ends_with("stream did not contain valid UTF-8"));

    let huge = folder.path().join("huge.yaml");
    std::fs::write(&huge, " ".repeat(1_048_577)).unwrap();
    assert!(Config::load(&huge).unwrap_err().to_string().ends_with("it is larger than 1048576 bytes"));
}

#[test]
fn random_texts_do_not_panic() {
    let pieces = [
        "dispatcher",
        "nats",
        "database",
        "topic_map",
        "url",
        "dsn",
        "workers",
        ": ",
        ":\n  ",
        "\n",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "1",
        "-1",
        "1s",
        "'",
        "\"",
        "&a ",
        "*a",
        "<<: ",
        "a.*",
        "nats://",
        "@",
        "~",
        "é",
        "host=",
    ];
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..20_000 {
        let text: String = (0..random.usize(..20)).map(|_| pieces[random.usize(..pieces.len())]).collect();
        if let Err(error) = parse(&text) {
            assert!(
                !error.problems().is_empty() && error.problems().iter().all(|line| !line.contains('\n')),
                "{error}"
            );
        }
    }
}

#[test]
fn secrets_may_stand_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| std::fs::write(folder.path().join(name), content).unwrap();
    file("dsn", "postgresql://u:hunter2@h/d\n");
    file("password", "hunter2 \r\n");
    file("nats.creds", "-----BEGIN NATS USER JWT-----\n");
    let credentials = ("CREDENTIALS_DIRECTORY", folder.path().to_str().unwrap());
    let path = folder.path().display();

    let text = format!("database: {{ dsn: 'file:{path}/dsn', listen_dsn: credential:dsn }}\n");
    let config = parse_with(&text, &[credentials]).unwrap();
    assert_eq!(config.database.dsn.expose(), "postgresql://u:hunter2@h/d");
    assert_eq!(config.database.listen_dsn, Some(config.database.dsn.clone()));

    let nats = |nats: &str| parse_with(&format!("{DSN}nats: {{ {nats} }}"), &[credentials]).unwrap().nats;
    let login = nats("user: me, password: credential:password").auth;
    assert_eq!(login, NatsAuth::UserPassword("me".to_owned(), Secret::new("hunter2 ")));
    assert_eq!(nats("token: credential:password").auth, NatsAuth::Token(Secret::new("hunter2 ")));
    let creds = NatsAuth::CredentialsFile(folder.path().join("nats.creds"));
    assert_eq!(nats("credentials_file: credential:nats.creds").auth, creds);
    assert_eq!(nats(&format!("credentials_file: 'file:{path}/nats.creds'")).auth, creds);
    file("url", "nats://me:hunter2@a,nats://b\n");
    assert_eq!(nats("url: credential:url").servers, ["nats://a", "nats://b"]);

    file("key", "not looked at");
    let parts =
        "user: me, password: credential:password, sslrootcert: system, sslcert: /c, sslkey: credential:key";
    let text = format!("database: {{ dsn: 'postgresql://h/d', {parts} }}");
    let parts = DsnParts {
        user: Some("me".to_owned()),
        password: Some(Secret::new("hunter2 ")),
        sslrootcert: Some("system".into()),
        sslcert: Some("/c".into()),
        sslkey: Some(folder.path().join("key")),
    };
    let config = parse_with(&text, &[credentials]).unwrap();
    assert_eq!(config.database.parts, parts);
    assert!(!format!("{config:?}").contains("hunter2"));

    let from_environment = parse_with("", &[("DATABASE_DSN", "credential:dsn"), credentials]).unwrap();
    assert_eq!(from_environment.database.dsn.expose(), "postgresql://u:hunter2@h/d");
}

/// To open one waits for who writes into it: for ever, and at a reload too.
#[test]
fn a_pipe_in_the_place_of_a_secret_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
    let text = format!("database:\n  dsn: \"file:{}\"\n", pipe.display());
    let (said, problem) = std::sync::mpsc::channel();
    std::thread::spawn(move || said.send(problems(&text, &[])));
    let found = problem.recv_timeout(Duration::from_secs(20)).expect("it waits");
    assert_eq!(found, [format!("config.yaml:2:8: database.dsn: file:{} is not a file", pipe.display())]);
}

#[test]
fn what_is_wrong_with_secrets_elsewhere_is_said_without_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| std::fs::write(folder.path().join(name), content).unwrap();
    file("wrong", b"hunter2");
    file("empty", b"\n");
    file("binary", b"hunter2\xff");
    file("long", &[b'x'; (64 << 10) + 1]);
    let path = folder.path().to_str().unwrap();
    let credentials = ("CREDENTIALS_DIRECTORY", path);
    let forms = "allowed: the value itself, file:/path or credential:NAME";
    let dsns = "allowed: postgresql://user:password@host:5432/database, or host=... user=... password=... dbname=...";
    for (dsn, expected) in [
        ("file:secret", format!("file: without the full path of a file; {forms}")),
        ("credential:", format!("credential: without a credential's name; {forms}")),
        ("credential:../x", format!("credential: without a credential's name; {forms}")),
        (
            "credential:none",
            "credential:none cannot be read: No such file or directory (os error 2)".to_owned(),
        ),
        ("credential:empty", "credential:empty is empty".to_owned()),
        ("credential:binary", "credential:binary is not text".to_owned()),
        ("credential:long", "credential:long is larger than 65536 bytes".to_owned()),
        ("file:/", "file:/ is not a file".to_owned()),
        ("credential:wrong", format!("what credential:wrong holds cannot be used here; {dsns}")),
    ] {
        let found = problems(&format!("database:\n  dsn: \"{dsn}\"\n"), &[credentials]);
        assert_eq!(found, [format!("config.yaml:2:8: database.dsn: {expected}")], "{dsn}");
    }
    let url = problems(&format!("{DSN}nats:\n  url: credential:wrong\n"), &[credentials]);
    let expected =
        "what credential:wrong holds cannot be used here; allowed: nats://host:4222 or tls://host:4222";
    assert_eq!(url, [format!("config.yaml:4:8: nats.url: {expected}")]);
    // Without systemd, where it would take them from. No machine has this one.
    let unset = problems("database:\n  dsn: credential:no-such-secret\n", &[]);
    let (start, why) = unset[0].split_once(" cannot be read: ").unwrap();
    assert_eq!(
        start,
        "config.yaml:2:8: database.dsn: credential:no-such-secret (/etc/credstore/pg-outbox.no-such-secret)"
    );
    assert!(why.contains("os error") && unset.len() == 1, "{unset:?}");
}

#[test]
fn commands_beside_the_service_find_its_credentials() {
    let units =
        [include_str!("../../systemd/pg-outbox.service"), include_str!("../../systemd/pg-outbox@.service")];
    for (unit, config, instance) in
        [(units[0], "/etc/pg-outbox/config.yaml", ""), (units[1], "/etc/pg-outbox/orders.yaml", "orders")]
    {
        assert!(unit.contains(&config.replace("orders", "%i")));
        let mut seen = 0;
        for loaded in unit.lines().filter_map(|line| line.strip_prefix("LoadCredential=")) {
            let (name, source) = loaded.split_once(':').unwrap();
            let expected = Path::new("/etc/credstore").join(source.replace("%i", instance));
            assert_eq!(Credentials::of(config, |_| None).path(name), expected);
            let by_systemd = Credentials::of(config, |_| Some("/run/credentials/x".to_owned()));
            assert_eq!(by_systemd.path(name), Path::new("/run/credentials/x").join(name));
            seen += 1;
        }
        assert!(seen >= 5, "{unit}");
    }
}
