//! The outbox as it was before the first release (version 1), and what an adoption takes away of it.
//!
//! Its lanes came from md5, and its indexes had predicates that every settle touched. It is adopted like a table that another
//! program made, once what stands in the way of the present shape is gone: indexes, lanes, trigger and functions go in one
//! transaction, with locks that writers meet for an instant. Rows stay as they are, and so does `outbox_key`, which remembers
//! the order that was chosen; the version stays recorded until the next one is.
//!
//! A daemon of that time does not ask for the version of the schema, and would pass events over whose lane has changed. So
//! nothing is done while any daemon is connected, and `outbox_lanes` goes first: without it every claim fails, loudly,
//! until the adoption is done. Pure, as `adoption.rs` is.

use super::adoption::{AdoptionStep, FoundTable, StepPace, part_name, quoted};
use super::migrate::SCHEMA_VERSION;

/// Its indexes of which the present shape has none, or another one by that name.
const INDEXES: [&str; 4] =
    ["outboxes_fresh_by_lane", "outboxes_retry_by_lane", "outboxes_retry_by_key", "outboxes_dead_by_key"];
/// What its last step added; the present shape's adds the same names.
const ADDED_LAST: &str = "DROP TABLE IF EXISTS outbox_lanes; LOCK TABLE outboxes IN ACCESS EXCLUSIVE MODE; \
     DROP TRIGGER IF EXISTS outboxes_notify ON outboxes; \
     DROP FUNCTION IF EXISTS outbox_notify(), outbox_hold_lanes(), create_monthly_partition(text, date), \
     cleanup_old_outbox_events(int), outbox_partitions(), outbox_partition_holds(name), outbox_partition_state(), \
     outbox_missing_partitions(int), outbox_create_partition(date), outbox_drop_partition(name, interval), \
     outbox_clean_partition(name, bigint, interval); ";

/// Daemons may have worked on this shape.
pub(super) fn was_at_work(found: &FoundTable) -> bool {
    (1..SCHEMA_VERSION).contains(&found.version)
}

/// Its own indexes go, and need no remark.
pub(super) fn forget_its_indexes(found: &mut FoundTable) {
    if found.lanes_by_md5 {
        found.touched.retain(|name| !INDEXES.contains(&name.as_str()));
    }
}

/// Takes away what is in the way of the present shape; `None` where nothing is.
pub(super) fn retiring(found: &FoundTable) -> Option<AdoptionStep> {
    if !found.lanes_by_md5 {
        return None;
    }
    let whole = INDEXES.iter().filter(|name| found.indexes.iter().any(|index| index == *name));
    // What an adoption of that time had built and not attached.
    let parts = found.partitions.iter().flat_map(|partition| {
        let lone = partition.indexes.iter().filter(|index| index.part_of.is_none());
        let ours = lone.filter(|index| INDEXES.iter().any(|of| part_name(&partition.name, of) == index.name));
        ours.map(|index| format!("{}.{}", partition.schema, quoted(&index.name)))
    });
    let indexes: Vec<String> = whole.map(ToString::to_string).chain(parts).collect();
    let mut sql = String::new();
    if was_at_work(found) {
        sql.push_str(ADDED_LAST);
    }
    if !indexes.is_empty() {
        sql.push_str(&format!("DROP INDEX {}; ", indexes.join(", ")));
    }
    sql.push_str("DROP FUNCTION outbox_lane(text, jsonb)");
    Some(AdoptionStep {
        what: "take away what the former shape had: its indexes, lanes, trigger and functions".into(),
        sql,
        how: StepPace::Instantly,
    })
}

/// What is found once that is done.
pub(super) fn retired(found: FoundTable) -> FoundTable {
    if !found.lanes_by_md5 {
        return found;
    }
    let is_former = |name: &str| INDEXES.contains(&name);
    let functions = if was_at_work(&found) { Vec::new() } else { found.functions };
    let mut partitions = found.partitions;
    for partition in &mut partitions {
        let name = partition.name.clone();
        partition.indexes.retain(|index| match index.part_of.as_deref() {
            Some(whole) => !is_former(whole),
            None => INDEXES.iter().all(|of| part_name(&name, of) != index.name),
        });
    }
    FoundTable {
        indexes: found.indexes.into_iter().filter(|name| !is_former(name)).collect(),
        lanes_by_md5: false,
        functions,
        partitions,
        ..found
    }
}

/// Why it cannot be done now, given the instances that are connected, each with its connections; `None` where none is.
pub(super) fn still_at_work(instances: &[(String, i64)]) -> Option<String> {
    let shown: Vec<String> =
        instances.iter().map(|(name, connections)| format!("{name} ({connections} connections)")).collect();
    (!shown.is_empty()).then(|| {
        format!(
            "pg-outbox is connected to this database: {}; stop every instance, as its claims go by the former shape, and run \
             this again",
            shown.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::adoption::{FoundPartition, PartIndex};
    use super::*;

    fn index(name: &str, part_of: Option<&str>) -> PartIndex {
        PartIndex { name: name.into(), valid: true, part_of: part_of.map(str::to_owned) }
    }

    fn found(version: i32) -> FoundTable {
        FoundTable {
            version,
            lanes_by_md5: true,
            indexes: ["outboxes_pkey", "own_index", "outboxes_discarded_by_time"]
                .into_iter()
                .chain(INDEXES)
                .map(str::to_owned)
                .collect(),
            functions: vec!["create_monthly_partition(text,date)".into()],
            partitions: vec![FoundPartition {
                schema: "shop".into(),
                name: "outboxes_2024_02".into(),
                is_table: true,
                fillfactor_is_set: false,
                size: "1 MB".into(),
                indexes: vec![
                    index("a", Some("outboxes_fresh_by_lane")),
                    index("b", Some("outboxes_discarded_by_time")),
                    index("own", None),
                    index("outboxes_2024_02_dead_by_key", None),
                ],
            }],
            ..FoundTable::default()
        }
    }

    #[test]
    fn what_the_former_shape_had_goes_and_nothing_of_others() {
        let step = retiring(&found(1)).unwrap();
        assert_eq!(step.how, StepPace::Instantly);
        assert!(step.sql.starts_with("DROP TABLE IF EXISTS outbox_lanes;"), "{}", step.sql);
        assert!(step.sql.ends_with(
            "DROP INDEX outboxes_fresh_by_lane, outboxes_retry_by_lane, outboxes_retry_by_key, outboxes_dead_by_key, \
             shop.\"outboxes_2024_02_dead_by_key\"; DROP FUNCTION outbox_lane(text, jsonb)"
        ));
        for kept in ["outbox_key", "outbox_uuid", "own", "discarded_by_time", "outbox_schema", "CASCADE"] {
            assert!(!step.sql.contains(kept), "{kept}: {}", step.sql);
        }
        let rest = retired(found(1));
        assert_eq!(rest.indexes, ["outboxes_pkey", "own_index", "outboxes_discarded_by_time"]);
        let names: Vec<&str> = rest.partitions[0].indexes.iter().map(|index| index.name.as_str()).collect();
        assert_eq!(names, ["b", "own"]);
        assert!(rest.functions.is_empty() && !rest.lanes_by_md5 && rest.version == 1);
        assert_eq!(retiring(&rest), None, "once");
    }

    #[test]
    fn a_former_adoption_that_was_interrupted_leaves_functions_of_others() {
        let step = retiring(&found(0)).unwrap();
        assert!(step.sql.starts_with("DROP INDEX") && !step.sql.contains("create_monthly_partition"));
        assert_eq!(retired(found(0)).functions.len(), 1);
        assert!(!was_at_work(&found(0)) && was_at_work(&found(1)) && !was_at_work(&found(SCHEMA_VERSION)));
    }

    #[test]
    fn instances_that_are_connected_are_named() {
        assert_eq!(still_at_work(&[]), None);
        let said = still_at_work(&[("north".into(), 3), ("south".into(), 1)]).unwrap();
        assert!(said.contains("north (3 connections), south (1 connections)"), "{said}");
    }
}
