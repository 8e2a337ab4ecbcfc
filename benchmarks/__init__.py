"""What the engine costs, measured on a Postgres that starts itself, beside what that Postgres does with no engine."""
