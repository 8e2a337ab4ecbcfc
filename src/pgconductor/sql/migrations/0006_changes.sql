-- What row changes start. Additive.

-- A subscription of a task to changes of a table's rows, and the native trigger that serves it.
--   name        the trigger's; a hash of engine, deployment, task, table and operation, so it fits any table
--   expression  the JSON text of the chosen columns, for a row called $1 (row triggers) or r (statement triggers)
--   definition  the statement that made the trigger
create table row_trigger (
  name text primary key check (octet_length(name) <= 63),
  deployment text not null check (octet_length(deployment) <= 200),
  task_id int not null,
  table_name text not null check (octet_length(table_name) <= 200),
  op text not null check (op in ('insert', 'update', 'delete')),
  columns text[] not null,
  condition text check (octet_length(condition) <= 16000),
  is_set_based boolean not null,
  expression text not null,
  definition text not null,
  created_at timestamptz not null
);
create index row_trigger_deployment on row_trigger (deployment);

-- Changes that started nothing because of an error of the engine's own; the newest thousand, one a trigger and
-- transaction of a writer.
create table trigger_error (
  id bigint generated always as identity primary key,
  at timestamptz not null,
  transaction_id xid8 not null,
  trigger_name text not null,
  task text,
  table_name text not null,
  op text not null,
  sqlstate text not null,
  message text not null check (octet_length(message) <= 4096)
);
create index trigger_error_transaction on trigger_error (transaction_id, trigger_name);
