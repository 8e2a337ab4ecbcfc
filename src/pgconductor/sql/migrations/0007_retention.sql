-- Retention, and what the database knows of processes, for those who ask why something does not run. Additive.

-- How far the search for what is due has come, for each length of retention in use. Ids are time-ordered, so nothing
-- behind the cursor is looked at again until the search begins anew, once a day.
create table prune_cursor (
  keep interval primary key,
  after_id uuid not null,
  began_at timestamptz not null
);

-- What a cursor met before its time: it had not ended, or ended late.
create table prune_later (
  execution_id uuid primary key,
  look_at timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 5000);
create index prune_later_look_at on prune_later (look_at);

-- What is left of trees too large for one transaction; their roots are gone.
create table prune_rest (
  execution_id uuid primary key
);

-- Young executions that were removed: an enqueue that is repeated after a lost reply must not bring them back.
create table removed (
  execution_id uuid primary key,
  removed_at timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 5000);

-- The tasks that keep nothing of some end; while there is none, no end pays for it.
create table keeps_nothing (
  task_id int primary key
);

-- What a process can run, and when it was asked to stop for a migration that breaks it.
alter table orchestrator
  add column task_ids int[],
  add column stop_requested_at timestamptz;
