-- The order of events that was chosen, by what outbox_key makes of an event.
SELECT CASE outbox_key('t', '{"ordering-key": "k"}') WHEN 'k' THEN 'key' WHEN 't' THEN 'topic' ELSE 'all' END
