-- register: what code and processes tell the database of themselves.
-- Called at start. Locks: the limits of tasks that nobody knows yet or whose limits change, before any row that set_limit
-- takes; then the tasks' rows. Errors: of register_orchestrator alone.

-- Writes the options of tasks; the last code to register wins. p_tasks: [{name, queue, max_attempts, max_crashes,
-- keep_completed?, keep_failed? (seconds; below zero is for ever), and what flow_as_declared takes}]
-- Returns [{name, id}]. Ready work that was enqueued for a task before its first registration moves to its queue.
create or replace function register_tasks(p_deployment text, p_tasks json, p_now timestamptz default null)
returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
begin
  insert into queue (name)
  select distinct t.queue from json_to_recordset(p_tasks) as t(queue text) order by 1 on conflict do nothing;
  -- so that what somebody else is enqueueing for the first time is seen below
  insert into task (name, queue_id)
  select t.name, q.id from json_to_recordset(p_tasks) as t(name text, queue text) join queue q on q.name = t.queue
  where not exists (select from task k where k.name = t.name) order by t.name on conflict do nothing;
  perform lock_limits(limits_to_change(p_tasks) || array(
    select k.id from json_to_recordset(p_tasks) as t(name text) join task k on k.name = t.name
    where k.registered_at is null and exists (select from lane l where l.task_id = k.id)));
  -- what was enqueued before anybody knew the task's queue moves with its lane
  update lane l set queue_id = q.id
  from json_to_recordset(p_tasks) as t(name text, queue text)
  join task k on k.name = t.name and k.registered_at is null
  join queue q on q.name = t.queue
  where l.task_id = k.id and l.queue_id = k.queue_id
    and not exists (select from lane o where o.task_id = k.id and o.queue_id = q.id);
  perform from task where name in (select t.name from json_to_recordset(p_tasks) as t(name text)) order by name for no key update;
  update task k
  set queue_id = q.id, deployment = p_deployment, max_attempts = t.max_attempts, max_crashes = t.max_crashes,
      registered_at = v_now
  from json_to_recordset(p_tasks) as t(name text, queue text, max_attempts smallint, max_crashes smallint)
  join queue q on q.name = t.queue
  where k.name = t.name and (k.queue_id, k.deployment, k.max_attempts, k.max_crashes, k.registered_at is null)
    is distinct from (q.id, p_deployment, t.max_attempts, t.max_crashes, false);
  perform keep_as_declared(p_tasks);
  perform flow_as_declared(p_tasks);
  insert into lane (queue_id, task_id, is_limited)
  select k.queue_id, k.id, exists (select from task_limit where task_id = k.id) from task k
  where k.name in (select t.name from json_to_recordset(p_tasks) as t(name text))
    and not exists (select from lane l where l.queue_id = k.queue_id and l.task_id = k.id)
  order by 1, 2 on conflict do nothing;
  return (select json_agg(json_build_object('name', k.name, 'id', k.id)) from task k
          where k.name in (select t.name from json_to_recordset(p_tasks) as t(name text)));
end $$;

-- Makes queues that do not exist yet; returns [{name, id}].
create or replace function register_queues(p_names text[]) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
begin
  insert into queue (name)
  select n from unnest(p_names) n where not exists (select from queue q where q.name = n) order by 1
  on conflict do nothing;
  return (select json_agg(json_build_object('name', name, 'id', id)) from queue where name = any(p_names));
end $$;

-- Returns what told_places has to tell, for a process that has no places of its own yet. p_migration: the last one that it
-- knows; null asks for nothing. Errors: PC011 for a process that a later migration breaks; it is not registered. One that
-- is under way is waited for, by the insert: it holds this table against it.
create or replace function register_orchestrator(
  p_id uuid, p_name text, p_version text, p_host text, p_pid int, p_queues text[], p_now timestamptz default null,
  p_migration int default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_release text;
begin
  insert into orchestrator (id, name, version, host, pid, queues, started_at, beat_at)
  values (p_id, p_name, p_version, p_host, p_pid, p_queues, v_now, v_now)
  on conflict (id) do nothing;
  select release into v_release from migration where breaking and version > p_migration order by version desc limit 1;
  if found then
    raise exception 'the schema was migrated by release %, with which % cannot work; upgrade pgconductor in this process',
      v_release, p_version using errcode = 'PC011';
  end if;
  return told_places(v_now);
end $$;

-- Notes which tasks a process can run, so that others can say who is missing. Called after each registration.
create or replace function note_tasks(p_orchestrator uuid, p_tasks int[]) returns void
language sql volatile set search_path from current as $$
  update orchestrator set task_ids = p_tasks where id = p_orchestrator
$$;
