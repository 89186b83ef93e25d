-- How many events were ever written, those of transactions that were rolled back included. It takes no lock on the sequence:
-- who has that is taken for a writer.
SELECT greatest(last_value, 0)
  FROM outbox_sequence()
