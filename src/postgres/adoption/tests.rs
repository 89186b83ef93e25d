//! What an adoption refuses, does and says, from what was found of a table.
//!
//! Cases are a table as another program makes it, with one thing changed each.

use super::*;
use crate::postgres::sequence::FaultKind;

fn schema() -> Schema {
    Schema::read(include_str!("../../../schema/001_outbox.sql"))
}

fn column(name: &str, type_name: &str) -> Column {
    let not_null = ["id", "seq", "created_at", "topic", "payload"].contains(&name);
    Column { name: name.into(), type_name: type_name.into(), not_null, has_default: name == "seq" }
}

fn fault(kind: FaultKind, sequence: Option<&str>) -> SequenceFault {
    SequenceFault { kind, sequence: sequence.map(str::to_owned) }
}

/// As the seed's program makes it.
fn seed() -> FoundTable {
    FoundTable {
        kind: Kind::Partitioned("RANGE (created_at)".into()),
        columns: COLUMNS
            .iter()
            .map(|(name, types, _)| {
                column(name, if *name == "topic" { "character varying(255)" } else { types[0] })
            })
            .collect(),
        primary_key: vec!["id".into(), "created_at".into()],
        partitions: vec![FoundPartition {
            schema: "public".into(),
            name: "outboxes_2024_02".into(),
            is_table: true,
            fillfactor_is_set: false,
            size: "1 MB".into(),
            indexes: Vec::new(),
        }],
        functions: vec!["cleanup_old_outbox_events(integer)".into()],
        ..FoundTable::default()
    }
}

#[test]
fn the_schema_s_file_says_what_an_outbox_has() {
    let schema = schema();
    let names = |pairs: &[(String, String)]| pairs.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let columns = names(&schema.columns);
    for (name, ..) in COLUMNS {
        assert!(columns.contains(&name.to_owned()), "{columns:?}");
    }
    assert!(schema.columns.contains(&("dead_at".into(), "timestamptz".into())), "{:?}", schema.columns);
    assert_eq!(names(&schema.checks), ["outboxes_metadata_is_object", "outboxes_topic_is_literal_subject"]);
    assert_eq!(schema.checks[0].1, "published_at IS NOT NULL OR jsonb_typeof(metadata) = 'object'");
    assert!(schema.checks[1].1.ends_with(")*$'"), "{}", schema.checks[1].1);
    let text = include_str!("../../../schema/001_outbox.sql");
    assert_eq!(schema.indexes.len(), text.matches("CREATE INDEX ").count());
    assert!(schema.indexes.len() >= 4);
    for (name, rest) in &schema.indexes {
        assert!(name.starts_with("outboxes_") && rest.starts_with('('), "{name} {rest}");
        assert_eq!(rest.contains("WHERE"), name != "outboxes_by_lane", "{name} {rest}");
    }
    assert!(
        schema.storage.starts_with('(')
            && schema.storage.ends_with(')')
            && schema.storage.contains("autovacuum")
    );
    assert_eq!(schema.fillfactor(), "fillfactor = 70");
    let of_a_month = text.split("' WITH (").nth(1).and_then(|rest| rest.split("',").next()).unwrap();
    let words = |text: &str| text.replace('\'', "").split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(
        format!("({}", words(of_a_month)),
        schema.storage,
        "a month's partition is like the DEFAULT one"
    );
}

#[test]
fn what_cannot_be_adopted_is_told_what_to_do() {
    let edit = |what: &dyn Fn(&mut FoundTable)| {
        let mut found = seed();
        what(&mut found);
        refusals(&found, "topic").join("\n")
    };
    let retype = |name: &'static str, type_name: &'static str| {
        edit(&|found| {
            found.columns.iter_mut().filter(|column| column.name == name).for_each(|column| {
                column.type_name = type_name.into();
            });
        })
    };
    let cases = [
        (edit(&|found| found.kind = Kind::Missing), "run pg-outbox migrate, without --adopt"),
        (edit(&|found| found.kind = Kind::Other), "not a table"),
        (edit(&|found| found.kind = Kind::Plain), "rename it, run pg-outbox migrate"),
        (edit(&|found| found.kind = Kind::Partitioned("LIST (topic)".into())), "must be RANGE (created_at)"),
        (retype("id", "text"), "column id is text; it must be uuid"),
        (retype("payload", "json"), "column payload is json; it must be jsonb"),
        (retype("created_at", "timestamp without time zone"), "it must be timestamp with time zone"),
        (retype("topic", "integer"), "it must be text or character varying"),
        (edit(&|found| found.columns.truncate(8)), "column last_error is missing; it must be text"),
        (edit(&|found| found.columns[3].not_null = false), "column topic may be NULL"),
        (edit(&|found| found.primary_key = vec!["id".into()]), "the primary key is (id)"),
        (
            edit(&|found| found.sequence_faults = vec![fault(FaultKind::Missing, None)]),
            "CREATE SEQUENCE outboxes_seq_seq",
        ),
        (
            edit(&|found| found.sequence_faults = vec![fault(FaultKind::Missing, Some("s"))]),
            "ALTER SEQUENCE s OWNED BY",
        ),
        (
            edit(&|found| found.sequence_faults = vec![fault(FaultKind::Elsewhere, Some("s"))]),
            "does not draw from its own",
        ),
        (
            edit(&|found| found.sequence_faults = vec![fault(FaultKind::Falling, Some("s"))]),
            "sequence s counts down",
        ),
        (
            edit(&|found| found.order = Some("key".into())),
            "ordered by \"key\" here, and \"topic\" was asked for",
        ),
        (edit(&|found| found.version = SCHEMA_VERSION + 1), "install the pg-outbox that belongs to it"),
        (edit(&|found| found.partitions[0].is_table = false), "partition outboxes_2024_02 is not"),
        (edit(&|found| found.default_name_is_taken = true), "a table outboxes_default is there"),
    ];
    for (refused, part) in cases {
        assert!(refused.contains(part) && !refused.contains('\n'), "{part}: {refused}");
    }
    let fine = [
        edit(&|_| {}),
        retype("topic", "text"),
        edit(&|found| found.primary_key = vec!["created_at".into(), "id".into()]),
        edit(&|found| found.columns.push(column("tenant", "integer"))),
        edit(&|found| found.sequence_faults = vec![fault(FaultKind::Cached, Some("s"))]),
        edit(&|found| found.version = 1),
        edit(&|found| found.order = Some("topic".into())),
    ];
    assert_eq!(fine, [""; 7]);
}

#[test]
fn a_sequence_that_a_statement_mends_is_mended() {
    let mut found = seed();
    found.sequence_faults = vec![fault(FaultKind::Cached, Some("s")), fault(FaultKind::Cycling, Some("s"))];
    let sql: Vec<String> = steps(&found, &schema())
        .into_iter()
        .filter(|step| step.how == StepPace::Instantly && step.sql.starts_with("ALTER SEQUENCE"))
        .map(|step| step.sql)
        .collect();
    assert_eq!(sql, ["ALTER SEQUENCE s CACHE 1", "ALTER SEQUENCE s NO CYCLE"]);
}

#[test]
fn an_index_that_every_settle_would_touch_is_told_of_once() {
    let mut found = seed();
    found.touched = vec!["own_index".into()];
    let said = |found: &FoundTable| remarks(found, &schema()).join("\n").contains("index own_index mentions");
    assert!(said(&found));
    found.version = SCHEMA_VERSION;
    assert!(!said(&found), "whoever adopted it knows");
}

fn what(steps: &[AdoptionStep]) -> Vec<&str> {
    steps.iter().map(|step| step.what.as_str()).collect()
}

#[test]
fn the_steps_are_what_is_missing() {
    let schema = schema();
    let all = steps(&seed(), &schema);
    let indexes = schema.indexes.len();
    // One ALTER, an index of the whole and of the part each, its attaching, DEFAULT, and the part's fillfactor.
    assert_eq!(all.len(), 1 + indexes * 3 + 1 + 1, "{:?}", what(&all));
    assert!(all[0].what.contains("column next_attempt_at") && all[0].what.contains("a default of id"));
    assert!(
        all[0].sql.contains(
            "CHECK ((published_at IS NOT NULL OR jsonb_typeof(metadata) = ''object'') OR seq <= ' || last"
        ),
        "{}",
        all[0].sql
    );
    let beside: Vec<&AdoptionStep> = all.iter().filter(|step| step.how == StepPace::Beside).collect();
    let (room, built) = beside.split_first().unwrap();
    assert_eq!(room.sql, "ALTER TABLE public.\"outboxes_2024_02\" SET (fillfactor = 70)");
    assert!(built.len() == indexes && built.iter().all(|step| step.sql.contains("CONCURRENTLY")));
    let default = all.iter().find(|step| step.what.contains("DEFAULT partition")).unwrap();
    assert!(default.sql.contains("WITH (fillfactor = 70, autovacuum"), "{}", default.sql);

    // Interrupted while the second index was built.
    let mut later = seed();
    later.columns.iter_mut().for_each(|column| column.has_default = true);
    later.columns.extend(schema.columns.iter().skip(9).map(|(name, _)| column(name, "x")));
    later.checks = schema.checks.iter().map(|(name, _)| name.clone()).collect();
    later.indexes = schema.indexes.iter().map(|(name, _)| name.clone()).collect();
    later.has_default_partition = true;
    let part = |index: usize, valid, part_of: bool| PartIndex {
        name: part_name("outboxes_2024_02", &schema.indexes[index].0),
        valid,
        part_of: part_of.then(|| schema.indexes[index].0.clone()),
    };
    later.partitions[0].indexes = vec![part(0, true, true), part(1, false, false), part(2, true, false)];
    later.partitions[0].fillfactor_is_set = true;
    let rest = steps(&later, &schema);
    let expected = ["drop index", "build index", "make it a part", "make it a part"];
    assert!(rest.iter().zip(expected).all(|(step, start)| step.what.starts_with(start)), "{:?}", what(&rest));

    // Done.
    later.partitions[0].indexes = (0..indexes).map(|index| part(index, true, true)).collect();
    assert_eq!(what(&steps(&later, &schema)), [""; 0]);
    assert_eq!(
        renames(&seed())[0].sql,
        "ALTER FUNCTION cleanup_old_outbox_events(integer) RENAME TO cleanup_old_outbox_events_before_adoption"
    );
}

#[test]
fn a_check_that_writers_do_not_keep_is_left_out_and_said() {
    let mut found = seed();
    let check = "outboxes_metadata_is_object".to_owned();
    found.violated = vec![Violated { check: check.clone(), rows: 7, seq: 42 }];
    let alter = &steps(&found, &schema())[0];
    assert!(!alter.sql.contains(&check) && alter.sql.contains("outboxes_topic_is_literal_subject"));
    let said = remarks(&found, &schema());
    assert!(said[0].contains("7 rows") && said[0].contains("seq=42"), "{said:?}");
    assert!(said[1].contains("new rows"), "{said:?}");
}

#[test]
fn names_of_parts_fit_and_differ() {
    assert_eq!(part_name("outboxes_2024_02", "outboxes_dead_by_key"), "outboxes_2024_02_dead_by_key");
    let long = |end: &str| part_name(&format!("{}{end}", "p".repeat(58)), "outboxes_retry_by_lane");
    assert!(long("a").len() <= NAME_MAX_BYTES && long("a") != long("b"), "{}", long("a"));
    assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
}
