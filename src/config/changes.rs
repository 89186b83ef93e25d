//! What differs between the configuration that is running and one read anew, and which of it can change while
//! running.
//!
//! Pure, on the main thread, for a reload. Every field of the configuration stands in one of two lists; the
//! patterns below have no `..`, so a new field does not compile until somebody has decided where it belongs.

use super::{
    Config, Database, Dispatcher, DsnParts, JetStream, Logging, Metrics, Nats, NatsTls, Ordering, Partitions,
};

/// What a reload found, as names of keys in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Changed, and in force from the next claim on.
    pub applied: Vec<&'static str>,
    /// Changed in the file; the running service keeps the value it started with until it is restarted.
    pub need_restart: Vec<&'static str>,
}

/// Compares the fields of one section. A field in `live` is taken over; one in `fixed` is only named. The
/// name of a key is its section's and the field's, or the one written after `as`.
macro_rules! compare {
    ($changes:ident, $old:expr, $new:expr, $type:ident, $section:literal,
     live { $($live:ident),* $(,)? } fixed { $($fixed:ident $(as $name:literal)?),* $(,)? } nested { $($nested:ident),* }) => {{
        let $type { $($live: _,)* $($fixed: _,)* $($nested: _,)* } = $new;
        $(if $old.$live != $new.$live {
            $old.$live = $new.$live.clone();
            $changes.applied.push(concat!($section, ".", stringify!($live)));
        })*
        $(if $old.$fixed != $new.$fixed {
            $changes.need_restart.push(compare!(@name $section, $fixed $(, $name)?));
        })*
    }};
    (@name $section:literal, $field:ident) => { concat!($section, ".", stringify!($field)) };
    (@name $section:literal, $field:ident, $name:literal) => { $name };
}

impl Config {
    /// Takes over from `new` what can change while running, and says what differs.
    pub fn take_live(&mut self, new: &Config) -> Changes {
        let mut changes = Changes::default();
        let Config { dispatcher, ordering, database, nats, partitions, logging, metrics } = self;
        compare!(changes, dispatcher, &new.dispatcher, Dispatcher, "dispatcher",
            live { batch_size, max_attempts, backoff_initial, backoff_max }
            fixed { instance_id, poll_interval, fallback_interval, workers, shutdown_grace, claim_budget,
                    max_in_flight_bytes, stuck_after }
            nested {});
        compare!(changes, ordering, &new.ordering, Ordering, "ordering",
            live {} fixed { enabled, on_dead } nested {});
        compare!(changes, database, &new.database, Database, "database",
            live {}
            fixed { dsn, schema, max_connections, max_idle, connect_timeout, listen, listen_dsn, prepared_statements,
                    synchronous_commit }
            nested { parts });
        compare!(changes, database.parts, &new.database.parts, DsnParts, "database",
            live {} fixed { user, password, sslrootcert, sslcert, sslkey } nested {});
        compare!(changes, nats, &new.nats, Nats, "nats",
            live { allow_headers, dead_letter_subject, topic_map }
            fixed { servers as "nats.url", auth as "nats credentials", max_retries, retry_delay, connect_timeout,
                    ack_timeout, inbox_prefix }
            nested { jetstream, tls });
        compare!(changes, nats.tls, &new.nats.tls, NatsTls, "nats.tls", live {} fixed { ca, cert, key } nested {});
        compare!(changes, nats.jetstream, &new.nats.jetstream, JetStream, "nats.jetstream",
            live {}
            fixed { enabled, atomic_batches, stream_name, create, subjects, storage, replicas, duplicate_window }
            nested {});
        compare!(changes, partitions, &new.partitions, Partitions, "partitions",
            live { premake, retention } fixed {} nested {});
        compare!(changes, logging, &new.logging, Logging, "logging", live { level } fixed { format } nested {});
        compare!(changes, metrics, &new.metrics, Metrics, "metrics",
            live {} fixed { enabled, address, port, path } nested {});
        changes
    }
}
