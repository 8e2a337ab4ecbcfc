"""pgconductor beside other Postgres-backed queues and durable engines: one server, the same work, in one run."""
