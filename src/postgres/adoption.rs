//! What it takes to make an outbox of a table `outboxes` that another program made, while its writers go on.
//!
//! Pure: what was found goes in, reasons to refuse or steps come out. What a complete outbox is stands in the schema's
//! own file, which is read here as text, so that it is written down once. A step either needs a lock for an instant,
//! which is asked for with a short timeout and again after a pause, or takes long and no lock that a writer meets. Each
//! is there only while what it makes is missing: an adoption that was interrupted goes on where it stopped, and one
//! that is done has no steps.
//!
//! Rows that are there may be what a check would refuse. An UPDATE of such a row, which is how it is settled, would be
//! refused as well, so the checks leave out every row up to the last `seq` before them. And where writers have written
//! such rows lately, the check is not added at all: their INSERTs would begin to fail.

use std::fmt::Write;

use super::migrate::{SCHEMA_VERSION, check_version};
use super::sequence::SequenceFault;

/// Longest name that PostgreSQL keeps, in bytes.
const NAME_MAX_BYTES: usize = 63;

/// What the application's part of the table must be: column, types it may have, whether it must be NOT NULL.
const COLUMNS: [(&str, &[&str], bool); 9] = [
    ("id", &["uuid"], true),
    ("seq", &["bigint"], true),
    ("created_at", &["timestamp with time zone"], true),
    ("topic", &["text", "character varying"], true),
    ("metadata", &["jsonb"], false),
    ("payload", &["jsonb"], true),
    ("published_at", &["timestamp with time zone"], false),
    ("attempts", &["integer"], false),
    ("last_error", &["text"], false),
];

/// What the schema's file says of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Schema {
    /// Name, and type with what follows.
    columns: Vec<(String, String)>,
    /// Name and condition.
    checks: Vec<(String, String)>,
    /// Name, and what follows the table's name.
    indexes: Vec<(String, String)>,
    /// Storage parameters of a partition, in parentheses.
    storage: String,
}

impl Schema {
    /// Reads the text of `schema/001_outbox.sql`.
    pub(super) fn read(text: &str) -> Schema {
        let between = |from: &str, to: &str| {
            let rest = text.split_once(from).map_or("", |(_, rest)| rest);
            rest.split_once(to).map_or("", |(part, _)| part)
        };
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let column = |line: &str| {
            let (name, rest) = line.trim().trim_end_matches(',').split_once(' ')?;
            Some((name.to_owned(), words(rest)))
        };
        let check = |part: &str| {
            let (name, rest) = part.split_once(|c: char| c.is_whitespace())?;
            let condition = rest.trim().strip_prefix("CHECK (")?.lines().next()?;
            Some((name.to_owned(), condition.trim_end_matches(',').strip_suffix(')')?.to_owned()))
        };
        let index = |part: &str| {
            let (statement, _) = part.split_once(';')?;
            let (name, rest) = statement.split_once(|c: char| c.is_whitespace())?;
            Some((name.to_owned(), words(rest.trim().strip_prefix("ON outboxes")?)))
        };
        Schema {
            columns: between("CREATE TABLE outboxes (", "PRIMARY KEY").lines().filter_map(column).collect(),
            checks: between("CREATE TABLE outboxes (", "PARTITION BY")
                .split("CONSTRAINT ")
                .skip(1)
                .filter_map(check)
                .collect(),
            indexes: text.split("CREATE INDEX ").skip(1).filter_map(index).collect(),
            storage: words(between("PARTITION OF outboxes DEFAULT\n        WITH ", ";")),
        }
    }

    /// The checks: name and condition.
    pub(super) fn checks(&self) -> &[(String, String)] {
        &self.checks
    }

    /// The one storage parameter that the present shape lives from, as `fillfactor = 70`.
    fn fillfactor(&self) -> &str {
        self.storage.trim_matches(['(', ')']).split(',').next().unwrap_or_default()
    }
}

/// What is called `outboxes`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing.
    #[default]
    Missing,
    /// A table without partitions.
    Plain,
    /// A partitioned table, with its key as PostgreSQL prints it.
    Partitioned(String),
    /// A view or the like.
    Other,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    /// Its name.
    pub(super) name: String,
    /// Its type as PostgreSQL prints it.
    pub(super) type_name: String,
    /// It is NOT NULL.
    pub(super) not_null: bool,
    /// It has a default.
    pub(super) has_default: bool,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FoundPartition {
    /// Its schema, quoted where it must be.
    pub(super) schema: String,
    /// Its name.
    pub(super) name: String,
    /// It is a table, and not itself partitioned or foreign.
    pub(super) is_table: bool,
    /// Somebody has chosen how full its pages may be.
    pub(super) fillfactor_is_set: bool,
    /// Its size, for people.
    pub(super) size: String,
    /// Its indexes.
    pub(super) indexes: Vec<PartIndex>,
}

/// An index of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PartIndex {
    /// Its name.
    pub(super) name: String,
    /// Its building was finished.
    pub(super) valid: bool,
    /// The index of the whole table that it is a part of.
    pub(super) part_of: Option<String>,
}

/// Rows of the last days that a check would refuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Violated {
    /// The check.
    pub(super) check: String,
    /// How many.
    pub(super) rows: i64,
    /// The first one.
    pub(super) seq: i64,
}

/// What is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FoundTable {
    /// The relation.
    pub(super) kind: Kind,
    /// The schema's version that is recorded; 0: none.
    pub(super) version: i32,
    /// Lanes are those of the former shape (`former.rs`).
    pub(super) lanes_by_md5: bool,
    /// The order of events that was chosen.
    pub(super) order: Option<String>,
    /// Columns, without dropped ones.
    pub(super) columns: Vec<Column>,
    /// Columns of the primary key.
    pub(super) primary_key: Vec<String>,
    /// What is wrong with the sequence behind `seq`.
    pub(super) sequence_faults: Vec<SequenceFault>,
    /// Names of CHECK constraints.
    pub(super) checks: Vec<String>,
    /// There is a DEFAULT partition.
    pub(super) has_default_partition: bool,
    /// Something else is called as ours would be.
    pub(super) default_name_is_taken: bool,
    /// Names of indexes of the whole table.
    pub(super) indexes: Vec<String>,
    /// Partitions.
    pub(super) partitions: Vec<FoundPartition>,
    /// Functions that have the names of ours, as `name(types)`.
    pub(super) functions: Vec<String>,
    /// Checks that writers do not keep.
    pub(super) violated: Vec<Violated>,
    /// Indexes of others that mention a column which every settle changes.
    pub(super) touched: Vec<String>,
}

impl FoundTable {
    /// The present version is recorded: everything but what [`steps`] says is there.
    pub(super) fn is_complete(&self) -> bool {
        self.version == SCHEMA_VERSION
    }
}

/// How a step is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StepPace {
    /// In a transaction, with a lock that writers meet: asked for during a moment, and again.
    Instantly,
    /// Outside of a transaction, for as long as it takes; writers go on.
    Beside,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AdoptionStep {
    /// What, for people.
    pub(super) what: String,
    /// The statement.
    pub(super) sql: String,
    /// How.
    pub(super) how: StepPace,
}

/// Why this table cannot be adopted in this order (empty: in whatever there is), each with what to do; empty when it can.
// Long: a list of what can be wrong with a table, each with its words.
pub(super) fn refusals(found: &FoundTable, order: &str) -> Vec<String> {
    match &found.kind {
        Kind::Missing => {
            return vec!["there is no table outboxes: run pg-outbox migrate, without --adopt".into()];
        }
        Kind::Other => return vec!["outboxes is not a table".into()],
        Kind::Plain => {
            return vec![
                "table outboxes is not partitioned, and cannot become so in place: rename it, run pg-outbox migrate, and \
                 copy its unpublished rows into the new table in the order of seq; README.md has the statements"
                    .into(),
            ];
        }
        Kind::Partitioned(key) if key != "RANGE (created_at)" => {
            return vec![format!("table outboxes is partitioned by {key}; it must be RANGE (created_at)")];
        }
        Kind::Partitioned(_) => {}
    }
    let mut refused = Vec::new();
    if let Some(chosen) = found.order.as_ref().filter(|chosen| !order.is_empty() && *chosen != order) {
        refused.push(format!(
            "events are ordered by {chosen:?} here, and {order:?} was asked for: the order is chosen once"
        ));
    }
    if found.version > SCHEMA_VERSION {
        refused.extend(check_version(found.version).err().map(|problem| problem.to_string()));
    }
    for (name, types, not_null) in COLUMNS {
        let Some(column) = found.columns.iter().find(|column| column.name == name) else {
            refused.push(format!("column {name} is missing; it must be {}", types[0]));
            continue;
        };
        let base = column.type_name.split('(').next().unwrap_or_default();
        if !types.contains(&base) {
            refused.push(format!("column {name} is {}; it must be {}", column.type_name, types.join(" or ")));
        }
        if not_null && !column.not_null {
            refused.push(format!(
                "column {name} may be NULL; add CHECK ({name} IS NOT NULL) NOT VALID, validate it, then SET NOT NULL"
            ));
        }
    }
    let mut key = found.primary_key.clone();
    key.sort();
    if key != ["created_at", "id"] {
        refused.push(format!(
            "the primary key is ({}); it must be (id, created_at)",
            found.primary_key.join(", ")
        ));
    }
    let not_mended = found.sequence_faults.iter().filter(|fault| fault.mending().is_none());
    refused.extend(not_mended.map(SequenceFault::problem));
    for partition in found.partitions.iter().filter(|partition| !partition.is_table) {
        refused.push(format!("partition {} is not an ordinary table", partition.name));
    }
    if found.default_name_is_taken && !found.has_default_partition {
        refused
            .push("a table outboxes_default is there that is not a partition of outboxes: rename it".into());
    }
    refused
}

/// What is missing around the table, in order.
pub(super) fn steps(found: &FoundTable, schema: &Schema) -> Vec<AdoptionStep> {
    let mut steps: Vec<AdoptionStep> = alter(found, schema).into_iter().collect();
    for (what, sql) in found.sequence_faults.iter().filter_map(SequenceFault::mending) {
        steps.push(AdoptionStep { what, sql, how: StepPace::Instantly });
    }
    for (name, rest) in schema.indexes.iter().filter(|(name, _)| !found.indexes.contains(name)) {
        steps.push(AdoptionStep {
            what: format!("declare index {name}, without building it"),
            sql: format!("CREATE INDEX {name} ON ONLY outboxes {rest}"),
            how: StepPace::Instantly,
        });
    }
    if !found.has_default_partition {
        steps.push(AdoptionStep {
            what: "add an empty DEFAULT partition, so that no insert fails for want of one".into(),
            sql: format!(
                "CREATE TABLE outboxes_default (LIKE outboxes INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE \
                 INCLUDING COMPRESSION INCLUDING GENERATED) WITH {}; \
                 ALTER TABLE outboxes ATTACH PARTITION outboxes_default DEFAULT",
                schema.storage
            ),
            how: StepPace::Instantly,
        });
    }
    for partition in &found.partitions {
        steps.extend(leave_room(partition, schema));
        for (name, rest) in &schema.indexes {
            steps.extend(build(partition, name, rest));
        }
    }
    steps
}

/// What is done last: the names of ours are freed, and the schema's file adds the rest.
pub(super) fn renames(found: &FoundTable) -> Vec<AdoptionStep> {
    let rename = |function: &String| {
        let name = function.split('(').next().unwrap_or_default();
        let name = name.rsplit('.').next().unwrap_or_default();
        AdoptionStep {
            what: format!("rename function {function}, as ours of this name takes its place"),
            sql: format!("ALTER FUNCTION {function} RENAME TO {name}_before_adoption"),
            how: StepPace::Instantly,
        }
    };
    found.functions.iter().map(rename).collect()
}

/// What the operator should know, one line each.
pub(super) fn remarks(found: &FoundTable, schema: &Schema) -> Vec<String> {
    let missing = |check: &str| !found.checks.iter().any(|name| name == check);
    let mut remarks: Vec<String> = found
        .violated
        .iter()
        .filter(|violated| missing(&violated.check))
        .map(|Violated { check, rows, seq }| {
            format!(
                "check {check} is left out: {rows} rows of the last 7 days would have been refused, the first one is \
                 seq={seq}; such events become dead letters. Mend their writers, then run this again"
            )
        })
        .collect();
    let kept = |name: &str| !found.violated.iter().any(|violated| violated.check == name);
    if schema.checks.iter().any(|(name, _)| missing(name) && kept(name)) {
        remarks.push(
            "checks hold for new rows; rows that are there now are left out, whatever they hold".into(),
        );
    }
    if !found.is_complete() {
        remarks.extend(found.touched.iter().map(|index| {
            format!(
                "index {index} mentions a column that every settle changes, so each settle writes to every index of its row, and \
                 to none without it: drop it if nothing needs it"
            )
        }));
    }
    remarks
}

/// Columns, defaults and checks: one statement, so that their lock is needed once.
fn alter(found: &FoundTable, schema: &Schema) -> Option<AdoptionStep> {
    let has = |name: &str| found.columns.iter().any(|column| column.name == name);
    let without_default =
        |name: &str| found.columns.iter().any(|column| column.name == name && !column.has_default);
    let mut what = Vec::new();
    let mut parts = Vec::new();
    for (name, definition) in schema.columns.iter().filter(|(name, _)| !has(name)) {
        what.push(format!("column {name}"));
        parts.push(format!("'ADD COLUMN {name} {definition}'"));
    }
    let id = "coalesce(to_regprocedure('outbox_uuid()')::text, 'pg_catalog.uuidv7()')";
    for (name, default) in [("id", id), ("created_at", "'now()'"), ("attempts", "'0'")] {
        if without_default(name) {
            what.push(format!("a default of {name}"));
            parts.push(format!("'ALTER COLUMN {name} SET DEFAULT ' || {default}"));
        }
    }
    for (name, condition) in &schema.checks {
        let left_out = found.violated.iter().any(|violated| violated.check == *name);
        if !found.checks.contains(name) && !left_out {
            what.push(format!("check {name} for new rows"));
            parts.push(format!(
                "'ADD CONSTRAINT {name} CHECK (({}) OR seq <= ' || last || ') NOT VALID'",
                condition.replace('\'', "''")
            ));
        }
    }
    if parts.is_empty() {
        return None;
    }
    let mut sql = String::from(
        "DO $adopt$ DECLARE last bigint; BEGIN LOCK TABLE outboxes IN ACCESS EXCLUSIVE MODE; \
         last := coalesce(pg_sequence_last_value(pg_get_serial_sequence('outboxes', 'seq')::regclass), 0); \
         EXECUTE 'ALTER TABLE outboxes ' || ",
    );
    let _ = write!(sql, "{}; END $adopt$", parts.join(" || ', ' || "));
    Some(AdoptionStep { what: format!("add {}", what.join(", ")), sql, how: StepPace::Instantly })
}

/// Rows written from now on leave room for the versions that their settles make; those that are there have what vacuum
/// frees. The lock is one that vacuum meets and writers do not.
fn leave_room(partition: &FoundPartition, schema: &Schema) -> Option<AdoptionStep> {
    let FoundPartition { schema: home, name, fillfactor_is_set, .. } = partition;
    (!fillfactor_is_set).then(|| AdoptionStep {
        what: format!("leave room for settles on the pages of {name}"),
        sql: format!("ALTER TABLE {home}.{} SET ({})", quoted(name), schema.fillfactor()),
        how: StepPace::Beside,
    })
}

/// The part of an index that a partition lacks.
fn build(partition: &FoundPartition, index: &str, rest: &str) -> Vec<AdoptionStep> {
    let FoundPartition { schema, name: table, size, indexes, .. } = partition;
    if indexes.iter().any(|found| found.part_of.as_deref() == Some(index)) {
        return Vec::new();
    }
    let name = part_name(table, index);
    let (quoted_name, quoted_table) = (quoted(&name), quoted(table));
    let there = indexes.iter().find(|found| found.name == name);
    let mut steps = Vec::new();
    if there.is_some_and(|found| !found.valid) {
        steps.push(AdoptionStep {
            what: format!("drop index {name}, which was not built to its end"),
            sql: format!("DROP INDEX CONCURRENTLY {schema}.{quoted_name}"),
            how: StepPace::Beside,
        });
    }
    if there.is_none_or(|found| !found.valid) {
        steps.push(AdoptionStep {
            what: format!("build index {name} on {table} ({size})"),
            sql: format!("CREATE INDEX CONCURRENTLY {quoted_name} ON {schema}.{quoted_table} {rest}"),
            how: StepPace::Beside,
        });
    }
    steps.push(AdoptionStep {
        what: format!("make it a part of {index}"),
        sql: format!("ALTER INDEX {index} ATTACH PARTITION {schema}.{quoted_name}"),
        how: StepPace::Instantly,
    });
    steps
}

/// What the part of an index on this partition is called; long names end in a number that tells them apart.
pub(super) fn part_name(table: &str, index: &str) -> String {
    let kind = index.strip_prefix("outboxes_").unwrap_or(index);
    let name = format!("{table}_{kind}");
    if name.len() <= NAME_MAX_BYTES {
        return name;
    }
    // FNV-1a
    let number =
        table.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let end = format!("_{number:08x}_{kind}");
    let mut start = table.to_owned();
    while start.len() + end.len() > NAME_MAX_BYTES && start.pop().is_some() {}
    start + &end
}

/// A name as an identifier.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests;
