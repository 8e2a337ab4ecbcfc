-- What a trigger hands to the execution that it starts, and the schedules. Additive.

-- trigger_kind says what started an execution, trigger_data what its handler is told of it. They stand beside the
-- payload, so that no payload, whatever its shape, is taken for a trigger's.
--   schedule  {name, scheduled_at}      event  {name, payload}      change  {name, op, old, new}
create type trigger_kind as enum ('schedule', 'event', 'change');
alter table execution
  add column trigger_kind trigger_kind,
  add column trigger_data json;
alter type new_execution
  add attribute trigger_kind trigger_kind,
  add attribute trigger_data json;

-- A schedule: when it starts which task with what. A null deployment: made by a handler or by SQL, not declared in code.
--   decided_at  what happens at ticks up to this instant has been decided; it never goes back
--   next_at     when to look at it again: its next tick, or at once where nobody has computed that yet; null: never
--   revision    rises with every change, so that whoever computed ticks from an earlier state fires nothing
create table schedule (
  id int generated always as identity primary key,
  task_id int not null,
  deployment text check (octet_length(deployment) <= 200),
  name text not null check (octet_length(name) between 1 and 200),
  expr text not null check (octet_length(expr) between 1 and 200),
  zone text not null check (octet_length(zone) between 1 and 100),
  catch_up text not null check (catch_up in ('skip', 'latest', 'all')),
  queue text check (octet_length(queue) <= 200),
  priority smallint not null default 0,
  payload json not null,
  revision bigint not null default 0,
  created_at timestamptz not null,
  decided_at timestamptz not null,
  next_at timestamptz,
  paused_at timestamptz,
  last_tick_at timestamptz,
  last_execution_id uuid,
  error text check (octet_length(error) <= 2000),
  unique nulls not distinct (task_id, name, deployment),
  check (paused_at is null or next_at is null)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
create index schedule_next_at on schedule (next_at);

-- One row a tick that started an execution: the key by which there is never a second. The newest are kept.
create table tick (
  schedule_id int not null,
  slot_at timestamptz not null,
  execution_id uuid not null,
  primary key (schedule_id, slot_at)
);
