-- What holds work back: limits, windows, expiry, throttles. Paid for only by the tasks that use them.

alter table task
  add column window_start time,
  add column window_end time,
  add column window_zone text check (octet_length(window_zone) <= 100)
    constraint window_is_whole check (num_nulls(window_start, window_end, window_zone) in (0, 3)),
  add column expires_in interval;

-- A limited lane's ready work stands in the backlog; every other lane never hears of limits.
alter table lane
  add column is_limited boolean not null default false,
  add column limits_changed_at timestamptz;

-- How much of a task may run (concurrency) or start within a period (rate): for the task, or for each value of a
-- payload path. What an operator sets beats what code declares.
create table task_limit (
  id int generated always as identity primary key,
  task_id int not null,
  kind text not null check (kind in ('concurrency', 'rate')),
  key_path text check (octet_length(key_path) between 1 and 200),
  declared_max int check (declared_max > 0),
  operator_max int check (operator_max >= 0),
  declared_period interval check (declared_period > interval '0'),
  operator_period interval check (operator_period > interval '0'),
  period interval generated always as (coalesce(operator_period, declared_period)) stored,
  unique nulls not distinct (task_id, kind, key_path),
  check ((kind = 'rate') = (period is not null)),
  check (num_nonnulls(declared_max, operator_max) > 0)
);

-- The right of one running execution to count against a concurrency limit: it lives and goes with the lease.
create table permit (
  execution_id uuid not null,
  limit_id int not null,
  key text not null,
  primary key (execution_id, limit_id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create index permit_limit on permit (limit_id, key);

-- Starts under a rate limit, kept for its period.
create table rate_use (
  limit_id int not null,
  key text not null,
  used_at timestamptz not null,
  execution_id uuid not null,
  primary key (limit_id, key, used_at, execution_id)
);
create index rate_use_at on rate_use (limit_id, used_at);

-- The ready work of limited lanes. keys: a JSON array in text of the ids of the limits that it was made for, and of its
-- value for each of them: ["3 7","","acme"]
create table backlog (
  execution_id uuid primary key,
  lane_id int not null,
  is_start boolean not null,
  keys text not null,
  priority smallint not null,
  ord bigint not null,
  cached_by uuid,
  cached_seq bigint,
  cached_open json
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create unique index backlog_order on backlog (lane_id, is_start, keys, priority desc, ord);

-- The keys that have a backlog, served in turn; a full one stands aside until one of its permits is given back.
create table backlog_key (
  lane_id int not null,
  is_start boolean not null,
  keys text not null,
  turn bigint not null,
  is_full boolean not null default false,
  primary key (lane_id, is_start, keys)
) with (fillfactor = 70);
create index backlog_key_turn on backlog_key (lane_id, is_start, turn) where not is_full;

-- Why the next claim should look at a limited lane: work came for a key, a limit has room again, or the last claim
-- left work behind. A lane without such a row costs a claim nothing.
create table look (
  lane_id int not null,
  is_start boolean,
  keys text,
  limit_id int,
  key text
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create index look_lane on look (lane_id);

create type key_room as (is_start boolean, keys text, turn bigint, room int);

-- Until when an execution must have started.
create table expiry (
  execution_id uuid primary key,
  due_at timestamptz not null
);
create index expiry_due_at on expiry (due_at);

-- The accepted call of a throttle's period, or the pending one of a debounce's.
create table throttle (
  task_id int not null,
  key text not null check (octet_length(key) <= 200),
  execution_id uuid not null,
  until timestamptz not null,
  primary key (task_id, key)
);
create index throttle_until on throttle (until);
