-- schedules: what starts executions because a clock says so. When an expression fires is computed by the processes
-- (src/pgconductor/ticks.py), in the zone of the schedule, from the instants that this file hands out: the database's.
-- Called by every process: its claim is told of schedules that are due (due_schedules), it computes the ticks, and says
-- so (fire_schedules). Whoever says so first wins: the revision of the schedule rises with every change, an answer to
-- an earlier one changes nothing, and the key of the tick holds should all else fail.
-- States: an execution none -> ready. Locks: an advisory lock of all that register (key 1008); schedule rows by id,
-- otherwise. Errors: PC003 a schedule that cannot be stored.

-- The schedules that are to be looked at now: [{id, revision, expr, zone, catch_up, decided_at, now}]; null for none.
create or replace function due_schedules(p_now timestamptz, p_limit int default 100) returns json
language plpgsql stable set search_path from current as $$
begin
  return (
    select json_agg(json_build_object('id', s.id, 'revision', s.revision, 'expr', s.expr, 'zone', s.zone,
                                      'catch_up', s.catch_up, 'decided_at', s.decided_at, 'now', p_now))
    from (select * from schedule where next_at <= p_now order by next_at limit p_limit) s);
end $$;

-- Stores what the processes computed. p_fired: [{id, revision, until, slots: [instants], next_at?, error?}]; slots are
-- the ticks to run, until is the instant up to which that decides. With an error, nothing was decided: another process
-- may know better, and this one looks again a minute later.
-- Returns {queues, next_due, due}: what has new work, and what is left to look at.
create or replace function fire_schedules(p_fired json, p_now timestamptz default null) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_ids int[];
  v_lanes int[] := '{}'::int[];
begin
  v_ids := array(
    select s.id from schedule s
    join json_to_recordset(p_fired) as f(id int, revision bigint) on f.id = s.id and f.revision = s.revision
    where s.paused_at is null order by s.id for update of s);
  update schedule s
  set revision = s.revision + 1, error = f.error,
      decided_at = case when f.error is null then greatest(s.decided_at, f."until") else s.decided_at end,
      next_at = case when f.error is null then f.next_at else v_now + interval '1 minute' end
  from json_to_recordset(p_fired) as f(id int, "until" timestamptz, next_at timestamptz, error text)
  where s.id = any(v_ids) and f.id = s.id;
  v_lanes := start_ticks((
    select array_agg(row(f.id, x.slot_at, uuid7())::tick order by x.slot_at, f.id)
    from json_to_recordset(p_fired) as f(id int, slots json)
    cross join lateral (select value::timestamptz as slot_at from json_array_elements_text(f.slots)) x
    where f.id = any(v_ids)), v_now);
  return json_build_object('queues', queues_of(v_lanes), 'next_due', next_due(v_now),
                           'due', due_schedules(v_now));
end $$;

-- Starts the executions of ticks that had none, and forgets the ticks of earlier days. Returns the lanes.
create or replace function start_ticks(p_ticks tick[], p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_new tick[];
begin
  if p_ticks is null then
    return '{}'::int[];
  end if;
  with started as (
    insert into tick (schedule_id, slot_at, execution_id)
    select t.schedule_id, t.slot_at, t.execution_id from unnest(p_ticks) t
    on conflict do nothing returning *
  )
  select array_agg(row(n.schedule_id, n.slot_at, n.execution_id)::tick order by n.slot_at, n.schedule_id) into v_new
  from started n;
  delete from tick t using schedule s
  where s.id in (select n.schedule_id from unnest(v_new) n) and t.schedule_id = s.id
    and t.slot_at < s.decided_at - interval '1 day' and t.slot_at not in (select n.slot_at from unnest(v_new) n);
  update schedule s set last_tick_at = n.slot_at, last_execution_id = n.execution_id
  from (select distinct on (schedule_id) * from unnest(v_new) order by schedule_id, slot_at desc) n
  where s.id = n.schedule_id;
  return insert_executions(tick_executions(v_new), p_now);
end $$;

-- The executions of ticks: the payload is the schedule's, and what the tick says stands beside it.
create or replace function tick_executions(p_ticks tick[]) returns new_execution[]
language plpgsql volatile set search_path from current as $$
declare
  v_tasks text[];
  v_queues text[];
  v_lanes int[];
begin
  select array_agg(x.task), array_agg(x.queue) into v_tasks, v_queues
  from (select distinct k.name as task, s.queue
        from schedule s join task k on k.id = s.task_id
        where s.id in (select t.schedule_id from unnest(p_ticks) t)) x;
  v_lanes := lanes_of(v_tasks, v_queues);
  return (
    select array_agg(row(
      t.execution_id, x.lane, nextval('execution_ord'), s.priority, 0, null, null, null, null, null, null, s.name,
      s.payload, null, 'schedule', json_build_object('name', s.name, 'scheduled_at', t.slot_at))::new_execution)
    from (select n.* from unnest(p_ticks) with ordinality n order by n.ordinality) t
    join schedule s on s.id = t.schedule_id
    join task k on k.id = s.task_id
    join unnest(v_tasks, v_queues, v_lanes) as x(task, queue, lane)
      on x.task = k.name and x.queue is not distinct from s.queue);
end $$;

-- Makes schedules, or changes them. One that stands already as it should be goes on as it is; with a new expression or
-- zone its ticks begin anew, from now. A paused one stays paused.
-- p_schedules: [{task, name, expr, zone, catch_up, queue?, priority?, payload?}]
create or replace function put_schedules(p_deployment text, p_schedules json, p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
begin
  perform check_sizes(p_schedules);
  perform lanes_of(array_agg(n.task), array_agg(n.queue))
  from (select distinct s.task, s.queue from json_to_recordset(p_schedules) as s(task text, queue text)) n;
  insert into schedule as o (task_id, deployment, name, expr, zone, catch_up, queue, priority, payload, created_at,
                             decided_at, next_at)
  select k.id, p_deployment, n.name, n.expr, n.zone, n.catch_up, n.queue, coalesce(n.priority, 0),
         coalesce(n.payload, '{}'), p_now, p_now, p_now
  from json_to_recordset(p_schedules) as n(task text, name text, expr text, zone text, catch_up text, queue text,
                                           priority smallint, payload json)
  join task k on k.name = n.task
  order by k.id, n.name
  on conflict (task_id, name, deployment) do update
  set expr = excluded.expr, zone = excluded.zone, catch_up = excluded.catch_up, queue = excluded.queue,
      priority = excluded.priority, payload = excluded.payload, revision = o.revision + 1, error = null,
      decided_at = case when (o.expr, o.zone) = (excluded.expr, excluded.zone) then o.decided_at
                        else greatest(o.decided_at, excluded.decided_at) end,
      next_at = case when o.paused_at is null then excluded.next_at end
  where (o.expr, o.zone, o.catch_up, o.queue, o.priority, o.payload::text, o.error is null)
    is distinct from (excluded.expr, excluded.zone, excluded.catch_up, excluded.queue, excluded.priority,
                      excluded.payload::text, true);
end $$;

-- Lets every process look at the schedules now.
create or replace function hint_schedules() returns void
language plpgsql volatile set search_path from current as $$
begin
  perform pg_notify(current_schema(), 'ready');
end $$;

-- The schedules of a deployment as its code declares them: others that it declared earlier go. Returns the names of these, for
-- the log: they may be those of another service that has not been given a name of its own. Called at start.
-- p_schedules: as put_schedules takes them. All of them are looked at again, since this process' zones may be newer.
create or replace function register_schedules(p_deployment text, p_schedules json, p_now timestamptz default null)
returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_gone record;
begin
  perform pg_advisory_xact_lock(hashtext(current_schema()), 1008);
  perform from schedule where deployment = p_deployment order by id for update;
  with gone as (
    delete from schedule s using task k
    where k.id = s.task_id and s.deployment = p_deployment
      and not exists (select from json_to_recordset(p_schedules) as n(task text, name text)
                      where n.task = k.name and n.name = s.name)
    returning s.id, format('%L of task %L', s.name, k.name) as label
  )
  select array_agg(id) as ids, array_agg(label order by label) as labels into v_gone from gone;
  delete from tick where schedule_id = any(v_gone.ids);
  if json_array_length(p_schedules) = 0 then
    return to_json(v_gone.labels);
  end if;
  perform put_schedules(p_deployment, p_schedules, v_now);
  update schedule set next_at = v_now, revision = revision + 1
  where deployment = p_deployment and paused_at is null and next_at is distinct from v_now;
  perform hint_schedules();
  return to_json(v_gone.labels);
end $$;

-- Makes or changes a schedule that no code declares. For psql and other languages; an expression that no process can
-- read shows in the view `schedules` as an error. Returns nothing.
create or replace function schedule(
  task text, name text, cron text, payload jsonb default '{}', tz text default 'UTC', catch_up text default 'latest',
  queue text default null, priority int default 0
) returns void
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
begin
  if catch_up not in ('skip', 'latest', 'all') then
    raise exception 'catch_up must be skip, latest or all, not %', catch_up using errcode = 'PC003';
  end if;
  if jsonb_typeof(payload) is distinct from 'object' then
    raise exception 'the payload of % must be a JSON object with one entry a parameter', task using errcode = 'PC003';
  end if;
  perform put_schedules(null, json_build_array(json_build_object(
    'task', task, 'name', name, 'expr', cron, 'zone', tz, 'catch_up', catch_up, 'queue', queue, 'priority', priority,
    'payload', payload)), instant(null));
  perform hint_schedules();
end $$;

-- Removes a schedule that no code declares. Returns whether there was one; its executions go on.
create or replace function unschedule(task text, name text) returns boolean
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_id int;
begin
  delete from schedule s using task k
  where k.name = unschedule.task and s.task_id = k.id and s.name = unschedule.name and s.deployment is null
  returning s.id into v_id;
  delete from tick where schedule_id = v_id;
  return v_id is not null;
end $$;

-- Schedules on behalf of a handler and records that it did, as one step. Returns false when the lease is gone.
-- p_schedules: one of those that put_schedules takes.
create or replace function schedule_as_step(
  p_orchestrator uuid, p_id uuid, p_token bigint, p_name text, p_schedules json, p_now timestamptz default null
) returns boolean
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_is_held boolean;
  v_is_new boolean;
begin
  select * into v_is_held, v_is_new from record_call(p_orchestrator, p_id, p_token, p_name, instant(p_now));
  if v_is_new then
    perform put_schedules(null, p_schedules, instant(p_now));
    perform hint_schedules();
  end if;
  return v_is_held;
end $$;

-- Unschedules on behalf of a handler and records that it did, as one step. Returns false when the lease is gone.
create or replace function unschedule_as_step(
  p_orchestrator uuid, p_id uuid, p_token bigint, p_name text, p_task text, p_schedule text,
  p_now timestamptz default null
) returns boolean
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_is_held boolean;
  v_is_new boolean;
begin
  select * into v_is_held, v_is_new from record_call(p_orchestrator, p_id, p_token, p_name, instant(p_now));
  if v_is_new then
    perform unschedule(p_task, p_schedule);
  end if;
  return v_is_held;
end $$;

-- Records, under its lease, that a run does something that answers nothing. p_is_held: whether the lease is there; p_is_new:
-- whether it is recorded by this call, and not by a first try whose reply was lost.
create or replace function record_call(
  p_orchestrator uuid, p_id uuid, p_token bigint, p_name text, p_now timestamptz, out p_is_held boolean,
  out p_is_new boolean
)
language plpgsql volatile set search_path from current as $$
begin
  if not hold_alive(p_orchestrator) or not exists (
    select from lease where execution_id = p_id and token = p_token and orchestrator_id = p_orchestrator
  ) then
    p_is_held := false;
    p_is_new := false;
    return;
  end if;
  insert into step (execution_id, name, kind, status, value, created_at, finished_at)
  values (p_id, p_name, 'call', 'completed', 'null', p_now, p_now)
  on conflict do nothing;
  p_is_held := true;
  p_is_new := found;
end $$;

-- Stops a task's schedules of a name (null: all of its schedules), whoever made them, or lets them go on: the ticks
-- that fell meanwhile do not run. Returns the number that it changed.
create or replace function pause_schedules(
  p_task text, p_schedule text, p_paused boolean, p_now timestamptz default null
) returns int
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_ids int[];
begin
  v_ids := array(
    select s.id from schedule s join task k on k.id = s.task_id
    where k.name = p_task and (p_schedule is null or s.name = p_schedule)
      and (s.paused_at is not null) is distinct from p_paused
    order by s.id for update of s);
  update schedule
  set revision = revision + 1, paused_at = case when p_paused then v_now end, next_at = case when not p_paused then v_now end,
      decided_at = case when p_paused then decided_at else greatest(decided_at, v_now) end
  where id = any(v_ids);
  perform hint_schedules();
  return cardinality(v_ids);
end $$;

-- Starts the execution of a tick now, beside those that the schedules say, which it changes nothing about; of paused
-- ones too. Returns {ids, queues}.
create or replace function fire_now(p_task text, p_schedule text, p_now timestamptz default null) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_ticks tick[];
  v_lanes int[];
begin
  select array_agg(row(s.id, v_now, uuid7())::tick) into v_ticks
  from schedule s join task k on k.id = s.task_id
  where k.name = p_task and (p_schedule is null or s.name = p_schedule);
  if v_ticks is null then
    return json_build_object('ids', '[]'::json, 'queues', '[]'::json);
  end if;
  v_lanes := insert_executions(tick_executions(v_ticks), v_now);
  return json_build_object('ids', (select json_agg(t.execution_id) from unnest(v_ticks) t),
                           'queues', queues_of(v_lanes));
end $$;

-- Every schedule, for people: [{task, name, deployment, cron, ...}].
create or replace function list_schedules() returns json
language sql stable set search_path from current as $$
  select coalesce(json_agg(row_to_json(s)), '[]')
  from (select * from schedules order by task, name, deployment nulls first limit 10000) s
$$;

-- deployment: whose code declares it; null for one that a handler or SQL made. last_tick_at: the tick, not when it ran.
create or replace view schedules as
select s.id, k.name as task, s.name, s.deployment, s.expr as cron, s.zone as tz, s.catch_up,
       coalesce(s.queue, q.name) as queue, s.priority, s.payload::jsonb as payload, s.next_at, s.last_tick_at,
       s.last_execution_id, s.paused_at, s.error, s.created_at
from schedule s
join task k on k.id = s.task_id
join queue q on q.id = k.queue_id;
