-- The tables of one engine. Applied once, with search_path set to the engine's schema.
--
-- The execution row is the truth and the history. What the engine scans to find work stands in small tables beside
-- it, and an execution that has not ended is in exactly one of them:
--
--   ready   may run now                 timer   becomes ready at an instant (delay, back-off)
--   lease   runs, and who settles it    wait    is parked until a child, a sleep or an event answers
--
-- A parked execution with a deadline has a timer row as well. There is no foreign key and no trigger on these tables:
-- the functions beside this file are the only writers.

create type outcome as enum ('completed', 'failed', 'cancelled');
create type step_kind as enum ('step', 'transaction', 'sleep', 'invoke', 'invoke_all', 'start', 'wait', 'wait_for', 'call');
create type step_status as enum ('pending', 'completed', 'failed', 'cancelled', 'timed_out');

-- Names are interned: hot rows carry a lane, a lane is a task in a queue.
create table queue (
  id int generated always as identity primary key,
  name text not null unique check (octet_length(name) between 1 and 200 and name !~ '[[:cntrl:]]'),
  paused_at timestamptz
);

create table task (
  id int generated always as identity primary key,
  name text not null unique check (octet_length(name) between 1 and 200 and name !~ '[[:cntrl:]]'),
  queue_id int not null,
  deployment text check (octet_length(deployment) <= 200),
  max_attempts smallint not null default 3 check (max_attempts > 0),
  max_crashes smallint not null default 5 check (max_crashes > 0),
  keep_completed_for interval default interval '7 days',
  keep_failed_for interval default interval '30 days',
  registered_at timestamptz
);

create table lane (
  id int generated always as identity primary key,
  queue_id int not null,
  task_id int not null,
  unique (queue_id, task_id)
);

create sequence execution_ord as bigint increment by 8;  -- draw_ords fills the gaps
create sequence step_seq as bigint;

-- No checks: each is read and planned anew by every statement that writes a row, and three of them were a tenth of what
-- the server does for a call. The databases of the tests have them. The names that users choose are checked where they
-- are kept, in dedupe and step.
create table execution (
  id uuid primary key,
  ord bigint not null default nextval('execution_ord'),
  created_at timestamptz not null,
  lane_id int not null,
  priority smallint not null default 0,
  depth smallint not null default 0,
  failures smallint not null default 0,
  crashes smallint not null default 0,
  parent_index int,  -- 0 for a single child, 1 to n in a fan-out; below 0 once that one was redriven: its answer stays
  parent_round smallint,
  outcome outcome,
  run_at timestamptz,
  started_at timestamptz,
  finished_at timestamptz,
  cancel_requested_at timestamptz,
  parent_id uuid,
  root_id uuid,
  parent_step text,
  dedupe_key text,
  trigger text,
  cancel_reason text,
  payload json not null,
  result json,
  error json
) with (fillfactor = 45, autovacuum_vacuum_insert_scale_factor = 0.2);

create table ready (
  lane_id int not null,
  priority smallint not null,
  ord bigint not null,
  execution_id uuid not null,
  cached_by uuid,
  cached_seq bigint,
  cached_open json
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0);
-- The expression is place_of(priority, ord), written out.
create unique index ready_order on ready (lane_id, (ord - priority::bigint * 140737488355328));

-- While dead rows stay (a snapshot is held), leases are appended, so that those of a process stand behind the place where
-- the table ended when it registered. Its number, which grows from one registration to the next, finds them there.
create table lease (
  execution_id uuid primary key,
  orchestrator_id uuid not null,
  token bigint not null,
  claimed_at timestamptz not null,
  orchestrator_number int not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0);
create index lease_number on lease using brin (orchestrator_number) with (pages_per_range = 32);

create table timer (
  execution_id uuid primary key,
  due_at timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create index timer_due_at on timer (due_at);

create table wait (
  execution_id uuid primary key,
  parked_at timestamptz not null,
  cached_by uuid,
  cached_seq bigint,
  cached_open json
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

-- What is waited for by count: the fan-out of an invoke_all, and a wait on started children.
create table wait_item (
  execution_id uuid not null,
  name text not null,
  round smallint not null,
  kind step_kind not null,
  left_count int not null,
  next_index int,
  primary key (execution_id, name, round)
);

-- Which started children a wait counts.
create table wait_link (
  execution_id uuid not null,
  child_step text not null,
  item_name text not null,
  item_round smallint not null,
  primary key (execution_id, child_step, item_name)
);

-- Index 0 is the operation itself. What became of the children of an invoke_all (child_ids) their executions say; 1 to n
-- are for those of which they no longer do, see 24_fan_out.sql.
create table step (
  execution_id uuid not null,
  name text not null check (octet_length(name) between 1 and 220),
  round smallint not null default 0,
  index int not null default 0,
  kind step_kind not null,
  status step_status not null,
  keep_on_timeout boolean not null default false,
  dropped boolean not null default false,
  seq bigint not null default nextval('step_seq'),
  created_at timestamptz not null,
  finished_at timestamptz,
  due_at timestamptz,
  child_id uuid,
  child_ids uuid[],
  child_task text check (octet_length(child_task) <= 200),
  value json,
  error json,
  primary key (execution_id, name, round, index),
  check ((status = 'pending') = (finished_at is null))
) with (fillfactor = 85);
-- Ten thousand ids are not worth compressing: it took a tenth of opening them.
alter table step alter column child_ids set storage external;

create table orchestrator (
  id uuid primary key,
  number int not null generated always as identity,
  name text not null check (octet_length(name) <= 200),
  version text not null check (octet_length(version) <= 100),
  host text not null check (octet_length(host) <= 300),
  pid int not null,
  queues text[] not null,
  started_at timestamptz not null,
  beat_at timestamptz not null,
  stopping_at timestamptz,
  -- how far its claims have come, while it is dear to begin at the heads of lanes: {head_in: seconds, last: [[lane, place]]}
  places json,
  -- what it runs for longer than a moment, as of beat_at: [[execution, step, seconds | null, try, tries, error, next_in]]
  steps json,
  blocked json  -- what blocks its event loop, as of beat_at: {seconds, by}
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- What a process must be told of an execution it runs; read and removed by its heartbeat.
create table signal (
  orchestrator_id uuid not null,
  execution_id uuid not null,
  primary key (orchestrator_id, execution_id)
);

create table dedupe (
  task_id int not null,
  key text not null check (octet_length(key) between 1 and 200),
  execution_id uuid not null,
  primary key (task_id, key)
);

-- Who sleeps until an execution ends.
create table watch (
  execution_id uuid not null,
  watcher text not null check (octet_length(watcher) <= 60),
  primary key (execution_id, watcher)
);

-- What the functions hand to each other.
create type new_execution as (
  id uuid, lane_id int, ord bigint, priority smallint, depth smallint, parent_id uuid, parent_step text,
  parent_round smallint, parent_index int, root_id uuid, dedupe_key text, trigger text, payload json, due_at timestamptz
);
create type new_operation as (
  place int, execution_id uuid, root_id uuid, depth smallint, name text, round smallint, kind step_kind,
  due_at timestamptz, keep boolean, detached boolean, timeout_error json, "window" int, event text, event_where jsonb
);
-- Children in a row that are called alike: the places of the first and the last among all children that are opened
-- together, and how many of their own operation (op: its place) stand before them.
create type alike_children as (
  op int, first int, last int, before int, lane_id int, task text, priority smallint, due_at timestamptz
);
create type settlement as (
  id uuid, outcome text, result json, error json, delay float8, awaits json, fresh json, cached boolean, long boolean,
  claimed_at timestamptz
);
create type ended as (id uuid, outcome outcome, result json, error json);
create type answer as (
  execution_id uuid, name text, round smallint, status step_status, value json, error json
);
create type kept_answer as (status step_status, value json, error json, finished_at timestamptz);
create type ended_children as (execution_id uuid, name text, round smallint, indexes int[]);
create type effects as (lane_ids int[], watchers text[]);
-- Part of a lane: what stands between two places in it.
create type scan_range as (lane_id int, after_place bigint, before_place bigint);
