-- Events: what was emitted, what it starts, and who waits for it. Additive.

-- A wait_for step: child_task holds the event's name, event_where what its payload must contain, event_id the event
-- that answered it. The index is the rule that an event goes to at most one wait of an execution.
alter table step
  add column event_id uuid,
  add column event_where jsonb;
-- No row has an event yet, and none can before the functions of this release are there.
-- squawk-ignore require-concurrent-index-creation
create unique index step_event on step (execution_id, event_id) where event_id is not null;

-- ord: drawn from the same sequence as that of executions, so that an event and an execution are before or after each
-- other without a clock. xact: who emitted it, to be compared with the snapshot of a wait. probes: hashes of the
-- payload's scalar members, by which events and waits find each other.
create table event (
  id uuid primary key,
  ord bigint not null default nextval('execution_ord'),
  name text not null check (octet_length(name) between 1 and 200),
  emitted_at timestamptz not null,
  xact xid8 not null default pg_current_xact_id(),
  probes bigint[] not null,
  payload json not null
);
create index event_name on event (name, ord);
create index event_xact on event (xact);

-- What events start, as the code of each deployment declares it. predicate: a jsonpath.
create table subscription (
  id int generated always as identity primary key,
  deployment text not null check (octet_length(deployment) between 1 and 200),
  task_id int not null,
  event text not null check (octet_length(event) between 1 and 200),
  signature text not null,
  fields text[],
  predicate text check (length(predicate) <= 4000),
  unique (deployment, task_id, event, signature)
);
create index subscription_event on subscription (event);

-- The open waits of executions that have not ended. predicate: what the payload must contain. probe: one of its scalar
-- members. since: the execution's own ord, from which on events count; snapshot: what the first look could see.
create table event_wait (
  execution_id uuid not null,
  name text not null,
  round smallint not null,
  event text not null,
  predicate jsonb,
  probe bigint not null,
  since bigint not null,
  snapshot pg_snapshot not null,
  ord bigint not null default nextval('execution_ord'),
  primary key (execution_id, name, round)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create index event_wait_probe on event_wait (event, probe);

-- What is still to be looked at: an event that was emitted, or a wait that was opened. Whichever of the two commits
-- later finds the other.
create table event_pending (
  ord bigint primary key default nextval('execution_ord'),
  event_id uuid,
  execution_id uuid,
  name text,
  round smallint,
  check ((event_id is null) = (execution_id is not null))
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

-- One row.
create table event_policy (
  keep_for interval not null check (keep_for > interval '0')
);
insert into event_policy (keep_for) values (interval '7 days');
