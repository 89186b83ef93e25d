       ) AS picked) AS sized) AS e
 WHERE e.stored_so_far - e.stored <= $6::bigint / cardinality($1) OR e.place <= 2
OFFSET 0) AS printed) AS judged
OFFSET 0) AS texts) AS counted
 WHERE bytes_so_far - bytes <= $6::bigint OR place <= 2
