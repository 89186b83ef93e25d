//! Dashboard and alert rules: they name what the program exposes and all of it, each alert fires when it should and at
//! no other time, and what they tell the operator to read is there.
//!
//! Debian's `promtool` judges: it reads the rules, and evaluates rules and panels over series that begin with what the
//! program itself renders. There is no Grafana here: the dashboard is checked as far as its own words go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pg_outbox::ops::metrics::Metrics;
use serde_json::{Value, json};

use super::harness::{Config, Daemon, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

/// Exposed, and in neither dashboard nor alerts: why.
const UNUSED: [(&str, &str); 1] = [(
    "process_threads",
    "how many there are is fixed by the configuration, and a lost one ends the process",
)];

/// What Prometheus itself brings.
const OF_PROMETHEUS: [&str; 2] = ["up", "ALERTS"];

/// Minutes of the series: somewhat over a day.
const MINUTES: u32 = 1600;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(file(name)).unwrap()
}

/// Runs promtool; it must be content.
#[track_caller]
fn promtool(arguments: &[&str]) {
    let program = std::env::var("PG_OUTBOX_PROMTOOL").unwrap_or_else(|_| "promtool".to_owned());
    let output =
        Command::new(&program).args(arguments).stdin(Stdio::null()).output().unwrap_or_else(|error| {
            panic!("{program}: {error}; tests/run.sh fetches it from Debian's prometheus")
        });
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "promtool {}: {said}", arguments.join(" "));
}

/// Runs promtool over a file with this content. JSON is YAML.
#[track_caller]
fn promtool_over(arguments: &[&str], content: &Value) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input.yaml");
    fs::write(&path, content.to_string()).unwrap();
    promtool(&[arguments, &[path.to_str().unwrap()]].concat());
}

/// An alert of etc/prometheus-alerts.yaml, as text.
struct Alert {
    name: String,
    fields: BTreeMap<String, String>,
}

/// Reads the rules by their lines: a key, and its value on the same line or on those indented below it.
fn alerts() -> Vec<Alert> {
    let text = read("etc/prometheus-alerts.yaml");
    let alerts: Vec<Alert> = text
        .split("      - alert: ")
        .skip(1)
        .map(|block| {
            let (name, rest) = block.split_once('\n').unwrap();
            let mut fields: BTreeMap<String, String> = BTreeMap::new();
            let mut last = String::new();
            for line in rest.lines() {
                match line.trim_start().split_once(':') {
                    Some((key, value)) if key.chars().all(|c| c.is_ascii_lowercase()) => {
                        last = key.to_owned();
                        fields.insert(last.clone(), value.trim().to_owned());
                    }
                    _ => {
                        let field = fields.get_mut(&last).unwrap();
                        field.push(' ');
                        field.push_str(line.trim());
                    }
                }
            }
            Alert { name: name.to_owned(), fields }
        })
        .collect();
    assert!(alerts.len() > 10, "{}", alerts.len());
    alerts
}

/// Everything the dashboard asks Prometheus: of panels, and of the rest.
struct Questions {
    panels: Vec<String>,
    others: Vec<String>,
}

fn dashboard() -> Value {
    serde_json::from_str(&read("etc/grafana-dashboard.json")).unwrap()
}

fn questions() -> Questions {
    let dashboard = dashboard();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let targets = list(&dashboard["panels"]).into_iter().filter(|panel| panel["type"] != "row");
    let panels =
        targets.flat_map(|panel| list(&panel["targets"])).map(|target| text(&target["expr"])).collect();
    let annotations = list(&dashboard["annotations"]["list"]).into_iter().map(|each| text(&each["expr"]));
    let variables = list(&dashboard["templating"]["list"]).into_iter().filter(|each| each["type"] == "query");
    // label_values(series, label)
    let series = variables.map(|each| {
        let query = text(&each["query"]["query"]);
        query.strip_prefix("label_values(").unwrap().rsplit_once(',').unwrap().0.to_owned()
    });
    Questions { panels, others: annotations.chain(series).collect() }
}

/// With a value for each of Grafana's variables.
fn filled(question: &str) -> String {
    let filled =
        question.replace("$__rate_interval", "5m").replace("$job", "orders").replace("$instance", ".+");
    assert!(!filled.contains('$'), "{question}");
    filled
}

/// The metrics that an expression names: words of ours, and all that have a selector.
fn metrics_of(expression: &str) -> BTreeSet<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = BTreeSet::new();
    let mut rest = expression;
    while let Some(at) = rest.find(is_word) {
        let word = &rest[at..];
        let end = word.find(|c: char| !is_word(c)).unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        let ours = word.starts_with("outbox_") || word.starts_with("process_");
        if ours || after.starts_with('{') || after.starts_with('[') {
            found.insert(word.to_owned());
        }
        rest = after;
    }
    found
}

/// The program's metrics, by name and kind.
fn exposed() -> BTreeMap<String, String> {
    let rendered = Metrics::new().render();
    let types = rendered.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect()
}

#[test]
fn dashboard_and_alerts_name_every_metric_and_no_other() {
    let exposed = exposed();
    let Questions { panels, others } = questions();
    let mut named = BTreeSet::new();
    let expressions = alerts().into_iter().map(|alert| alert.fields["expr"].clone());
    for name in expressions.chain(panels).chain(others).flat_map(|question| metrics_of(&question)) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
            let family = name.strip_suffix(suffix)?;
            exposed.get(family).filter(|kind| *kind == "histogram").map(|_| family.to_owned())
        });
        named.insert(family.unwrap_or(name));
    }
    assert!(named.contains("outbox_publish_duration_seconds"), "{named:?}");
    let unknown: Vec<&String> = named
        .iter()
        .filter(|name| !exposed.contains_key(*name) && !OF_PROMETHEUS.contains(&name.as_str()))
        .collect();
    assert_eq!(unknown, Vec::<&String>::new(), "named, but not exposed");
    let unused = UNUSED.map(|(name, _)| name);
    let missing: Vec<&String> =
        exposed.keys().filter(|name| !named.contains(*name) && !unused.contains(&name.as_str())).collect();
    assert_eq!(missing, Vec::<&String>::new(), "exposed, but neither used nor listed as unused");
    for name in unused {
        assert!(exposed.contains_key(name) && !named.contains(name), "{name} is not unused");
    }
}

#[test]
fn each_alert_says_what_it_means_and_what_to_do() {
    let readme = read("README.md");
    let is_there = |section: &str| {
        readme.lines().any(|line| {
            line.trim_start_matches("- ").starts_with(&format!("**{section}"))
                || (line.starts_with('#') && line.trim_start_matches('#').trim() == section)
        })
    };
    for Alert { name, fields } in alerts() {
        assert!(readme.contains(&format!("`{name}`")), "{name} is not in the README");
        let field = |key: &str| fields.get(key).unwrap_or_else(|| panic!("{name} has no {key}"));
        assert!(["critical", "warning", "info"].contains(&field("severity").as_str()), "{name}");
        for key in ["summary", "description", "runbook"] {
            assert!(field(key).len() > 20, "{name}: {key}");
        }
        let (_, sections) = field("runbook").split_once("README, ").unwrap_or_else(|| panic!("{name}"));
        let sections: Vec<&str> = sections.split('"').skip(1).step_by(2).collect();
        assert!(!sections.is_empty(), "{name}");
        for section in sections {
            assert!(is_there(section), "{name} sends to {section:?}, which the README does not have");
        }
    }
}

/// Values over [`MINUTES`], as promtool writes them.
fn steady(value: f64) -> String {
    format!("{value}+0x{MINUTES}")
}

fn growing(a_minute: u32) -> String {
    format!("0+{a_minute}x{MINUTES}")
}

/// What the program renders, as it would look where all is well.
fn healthy() -> BTreeMap<String, String> {
    let mut series: BTreeMap<String, String> = BTreeMap::new();
    for line in Metrics::new().render().lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        series.insert(name.to_owned(), steady(value.parse().unwrap()));
    }
    for (name, values) in [
        ("up", steady(1.0)),
        ("outbox_ready", steady(1.0)),
        ("outbox_nats_connected", steady(1.0)),
        ("outbox_pending_events", steady(5.0)),
        ("outbox_events_published_total", growing(60)),
        ("outbox_attempts_total{outcome=\"published\"}", growing(60)),
        // promtool's clock begins at 0.
        ("outbox_last_publish_timestamp_seconds", growing(60)),
        ("outbox_backlog_last_success_timestamp_seconds", growing(60)),
        ("outbox_upkeep_last_success_timestamp_seconds", growing(60)),
        ("outbox_sweep_last_pass_timestamp_seconds", growing(60)),
        ("outbox_partitions_ahead_days", steady(100.0)),
        ("outbox_pool_connections{state=\"busy\"}", steady(6.0)),
        ("outbox_pool_max_connections", steady(20.0)),
        ("process_start_time_seconds", steady(1.0)),
        ("process_open_fds", steady(40.0)),
        ("process_max_fds", steady(1024.0)),
    ] {
        let before = series.insert(name.to_owned(), values);
        assert!(before.is_some() || name == "up", "the program does not expose {name}");
    }
    series
}

/// A series of the scrape job, of instance `a` unless it says which.
fn scraped(name: &str) -> String {
    let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
    let labels = labels.trim_end_matches('}');
    let instance = if labels.contains("instance=") { "" } else { ",instance=\"a\"" };
    let comma = if labels.is_empty() { "" } else { "," };
    format!("{name}{{job=\"orders\"{instance}{comma}{labels}}}")
}

fn input(series: &BTreeMap<String, String>) -> Value {
    series.iter().map(|(name, values)| json!({"series": scraped(name), "values": values})).collect()
}

/// An alert, what differs from where all is well, when nothing fires yet, and when the alert does, and nothing else.
type Case = (&'static str, Vec<(&'static str, String)>, &'static str, &'static str);

fn cases() -> Vec<Case> {
    let version = concat!("outbox_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}");
    let text = str::to_owned;
    vec![
        (
            "OutboxStalled",
            vec![("outbox_pending_events", steady(50.0)), ("outbox_events_published_total", steady(7.0))],
            "4m",
            "12m",
        ),
        ("OutboxLagHigh", vec![("outbox_lag_seconds", steady(90.0))], "4m", "6m"),
        ("OutboxOutage", vec![("outbox_outage", steady(1.0)), ("outbox_ready", steady(0.0))], "1m", "12m"),
        ("OutboxNotReady", vec![("outbox_ready", steady(0.0))], "4m", "6m"),
        (
            "OutboxInstanceGone",
            vec![
                ("up{instance=\"b\"}", text("1+0x9 0+0x60")),
                ("outbox_build_info{instance=\"b\"}", text("1+0x9 _x60")),
            ],
            "14m",
            "16m",
        ),
        ("OutboxAbsent", vec![(version, text("1+0x2 _x60"))], "11m", "14m"),
        (
            "OutboxRestarting",
            vec![("process_start_time_seconds", text("1+0x5 400+0x5 800+0x5 1200+0x60"))],
            "17m",
            "18m",
        ),
        ("OutboxDeadLetters", vec![("outbox_dead_letters_total", text("0+0x20 1+0x60"))], "20m", "22m"),
        ("OutboxDeadLettersKept", vec![("outbox_dead_events", steady(3.0))], "23h", "25h"),
        ("OutboxRejections", vec![("outbox_events_failed_total", growing(6))], "9m", "13m"),
        ("OutboxNoAcks", vec![("outbox_attempts_total{outcome=\"unanswered\"}", growing(1))], "9m", "13m"),
        ("OutboxOutagesOften", vec![("outbox_outages_total", growing(1))], "3m", "10m"),
        ("OutboxPostgresErrors", vec![("outbox_postgres_errors_total", growing(1))], "9m", "13m"),
        (
            "OutboxBacklogUnknown",
            vec![("outbox_backlog_last_success_timestamp_seconds", steady(0.0))],
            "14m",
            "17m",
        ),
        ("OutboxPoolExhausted", vec![("outbox_pool_connections{state=\"busy\"}", steady(20.0))], "9m", "11m"),
        ("OutboxPartitionsShort", vec![("outbox_partitions_ahead_days", steady(10.0))], "59m", "61m"),
        ("OutboxDefaultPartition", vec![("outbox_default_partition_rows", steady(5.0))], "59m", "61m"),
        (
            "OutboxUpkeepLate",
            vec![("outbox_upkeep_last_success_timestamp_seconds", steady(0.0))],
            "419m",
            "422m",
        ),
        ("OutboxOldSnapshot", vec![("outbox_oldest_transaction_seconds", steady(4000.0))], "4m", "6m"),
        ("OutboxSweepFound", vec![("outbox_sweep_found_total", text("0+0x5 3+0x60"))], "5m", "7m"),
        ("OutboxHeadersAltered", vec![("outbox_headers_altered_total", text("0+0x5 1+0x60"))], "5m", "7m"),
        (
            "OutboxVersionsMixed",
            vec![("outbox_build_info{version=\"0.0.1\",instance=\"b\"}", steady(1.0))],
            "23h",
            "25h",
        ),
        ("OutboxFilesShort", vec![("process_open_fds", steady(900.0))], "9m", "11m"),
    ]
}

/// That at `time` just these alerts fire.
fn firing(time: &str, alerts: &[&str]) -> Value {
    let samples: Vec<Value> = alerts
        .iter()
        .map(|name| json!({"labels": format!("{{alertname=\"{name}\"}}"), "value": 1}))
        .collect();
    json!({
        "expr": "group by (alertname) (ALERTS{alertstate=\"firing\"})", "eval_time": time, "exp_samples": samples,
    })
}

#[test]
fn each_alert_fires_when_it_should_and_at_no_other_time() {
    let rules = file("etc/prometheus-alerts.yaml");
    promtool(&["check", "rules", rules.to_str().unwrap()]);
    let (all, cases): (Vec<String>, _) = (alerts().into_iter().map(|alert| alert.name).collect(), cases());
    let tried: Vec<&str> = cases.iter().map(|(alert, ..)| *alert).collect();
    assert_eq!(
        all.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        tried.into_iter().collect(),
        "rules and cases"
    );
    let mut tests = vec![json!({
        "name": "all is well", "interval": "1m", "input_series": input(&healthy()),
        "promql_expr_test": [firing("10m", &[]), firing("25h", &[])],
    })];
    for (alert, changes, calm, fires) in cases {
        let mut series = healthy();
        series.extend(changes.into_iter().map(|(name, values)| (name.to_owned(), values)));
        tests.push(json!({
            "name": alert, "interval": "1m", "input_series": input(&series),
            "promql_expr_test": [firing(calm, &[]), firing(fires, &[alert])],
        }));
    }
    promtool_over(
        &["test", "rules"],
        &json!({"rule_files": [rules], "evaluation_interval": "1m", "tests": tests}),
    );
}

#[test]
fn each_panel_of_the_dashboard_shows_something() {
    let Questions { panels, others } = questions();
    assert!(panels.len() > 40, "{}", panels.len());
    let rules: Vec<Value> =
        others.iter().map(|question| json!({"record": "asked", "expr": filled(question)})).collect();
    promtool_over(&["check", "rules"], &json!({"groups": [{"name": "others", "rules": rules}]}));
    let answered: Vec<Value> = panels
        .iter()
        .map(|question| {
            json!({
                "expr": format!("count({}) > bool 0", filled(question)), "eval_time": "20m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            })
        })
        .collect();
    let test = json!({"interval": "1m", "input_series": input(&healthy()), "promql_expr_test": answered});
    promtool_over(
        &["test", "rules"],
        &json!({"rule_files": [], "evaluation_interval": "1m", "tests": [test]}),
    );
}

#[test]
fn the_dashboard_can_be_imported() {
    let dashboard = dashboard();
    // An id of a database that is not the importer's would replace another dashboard there.
    assert!(dashboard["id"].is_null() && dashboard["uid"] == "pg-outbox", "{}", dashboard["uid"]);
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is taken");
        let at = |side: &str| panel["gridPos"][side].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{title} is too wide");
        for cell in
            (at("y")..at("y") + at("h")).flat_map(|y| (at("x")..at("x") + at("w")).map(move |x| (x, y)))
        {
            assert!(cells.insert(cell), "{title} lies over another panel");
        }
        if panel["type"] != "row" {
            assert!(panel["description"].as_str().unwrap().len() > 5, "{title}");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        }
    }
}

#[test]
fn an_old_snapshot_shows_and_so_does_that_it_is_gone() {
    let (db, stream) = (database(), stream());
    // What other roles do is for those to see who have pg_read_all_stats, as an operator has.
    let daemon = Daemon::start(&Config::new(&db, &stream).set("database.dsn", db.operator_dsn()));
    daemon.wait_ready();
    assert_eq!(daemon.metric("outbox_ready"), 1.0);
    let age = || daemon.metric("outbox_oldest_transaction_seconds");
    let mut reader = db.client();
    reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM outboxes").unwrap();
    wait_until("the snapshot gets old", LIMIT, &[&daemon], || age() > 6.0);
    reader.batch_execute("COMMIT").unwrap();
    wait_until("it is gone", LIMIT, &[&daemon], || age() < 6.0);
    assert!(daemon.metric("outbox_backlog_last_success_timestamp_seconds") > 0.0);
}
