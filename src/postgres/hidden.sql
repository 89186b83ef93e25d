-- The tables of ours of which row-level security may hide rows from this role, as its policies are not simply true for
-- reading and changing.
SELECT name
  FROM unnest(ARRAY['outboxes', 'outbox_lanes']) AS name
 CROSS JOIN LATERAL (
       SELECT coalesce(bool_or(NOT polpermissive), false) AS restricted,
              coalesce(bool_or(is_true AND polcmd IN ('r', '*')), false) AS read,
              coalesce(bool_or(is_true AND polcmd IN ('w', '*')), false) AS changed
         FROM (SELECT polpermissive, polcmd, pg_get_expr(polqual, polrelid) = 'true' AS is_true
                 FROM pg_policy
                WHERE polrelid = name::regclass
                  AND EXISTS (SELECT FROM unnest(polroles) AS role WHERE role = 0 OR pg_has_role(role, 'USAGE'))) AS ours
       ) AS policies
 WHERE row_security_active(name::regclass) AND (restricted OR NOT read OR NOT changed)
