-- save: record finished steps and open waits of running executions, many executions at once (group commit).
-- Called by a worker while handlers run. States: none change; children that are started become ready.
-- Locks: the caller's orchestrator row; when children are created, their trees (shared) and parents.
-- A repetition after a lost reply changes nothing: a step is inserted once.
-- Returns {lost: [execution ids whose lease is gone], queues: [queue ids with new work], next_due: 0 when events are
-- to be delivered}.

-- Opens operations: a pending step each, and the children they ask for. Those that are there already are left alone.
-- The caller holds the tree locks and the rows of the parents, so that nobody else opens any of theirs meanwhile.
-- p_ops: [{id (execution), name, round, kind, due_at?, due_in? (seconds), keep, timeout_error?, window?, detached?, event?,
--          where?}]
-- p_children: [{op: its place in p_ops, from 1, index (from 1 in a fan-out, else 0), id, task, queue, payload, priority,
--               delay, run_at}], in their order; not within their operations, since what is nested is read once a level
-- p_ids: only the operations of these executions.
create or replace function open_operations(p_ops json, p_children json, p_ids uuid[], p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_read record;
begin
  perform check_sizes(p_ops);
  perform check_sizes(p_children);
  v_read := read_operations(p_ops, p_children, p_ids, p_now);
  -- an invocation or a start is the row of its one child; anything else has a row of its own
  if v_read.headers is not null then
    perform open_headers(v_read.headers, v_read.children, p_now);
  end if;
  if v_read.children is null then
    return '{}'::int[];
  end if;
  insert into step (execution_id, name, round, index, kind, status, keep_on_timeout, created_at, finished_at, due_at,
                    child_id, child_task, error)
  select c.parent_id, c.name, c.round, c.index, c.kind,
         case when c.detached then 'completed' else 'pending' end::step_status, c.keep, p_now,
         case when c.detached then p_now end, c.expires_at, c.id, c.task, c.timeout_error
  from unnest(v_read.children) c where c.index = 0;
  return insert_executions(child_executions(v_read.children), p_now);
end $$;

-- What operations ask for, read once: the children that are not there yet, and what is more than its one child. Children
-- beyond a fan-out's window are due at infinity until one before them ends.
create or replace function read_operations(
  p_ops json, p_children json, p_ids uuid[], p_now timestamptz, out children new_child[], out headers json
)
language plpgsql stable set search_path from current as $$
begin
  with o as materialized (
    select o.*, known.is_there, p.root_id, p.depth
    from rows from (json_to_recordset(p_ops) as (id uuid, name text, round smallint, kind step_kind,
      due_at timestamptz, due_in float8, keep boolean, detached boolean, timeout_error json, "window" int, event text,
      "where" jsonb)) with ordinality
      as o(id, name, round, kind, due_at, due_in, keep, detached, timeout_error, "window", event, "where", place)
    cross join lateral (
      select coalesce(root_id, id) as root_id, depth + 1 as depth from execution k where k.id = o.id offset 0) p
    left join lateral (
      select true as is_there from step k
      where k.execution_id = o.id and k.name = o.name and k.round = o.round and k.index = 0 offset 0) known on true
    where o.id in (select unnest(p_ids))
  )
  select (
    select array_agg(row(
      o.id, o.root_id, o.depth, o.name, o.round, coalesce(c.index, 0), o.kind, coalesce(o.detached, false), coalesce(o.keep, false),
      case when o.kind <> 'invoke_all' then coalesce(o.due_at, p_now + make_interval(secs => o.due_in)) end,
      o.timeout_error, c.id, c.task, c.queue, c.payload, coalesce(c.priority, 0),
      case when c.index > o."window" then 'infinity'
           else coalesce(c.run_at, p_now + make_interval(secs => c.delay)) end)::new_child order by c.place)
    from rows from (json_to_recordset(p_children) as (op int, index int, id uuid, task text, queue text, payload json,
      priority smallint, delay float8, run_at timestamptz)) with ordinality
      as c(op, index, id, task, queue, payload, priority, delay, run_at, place)
    join o on o.place = c.op
    where o.is_there is null), (
    select json_agg(json_build_object(
      'id', o.id, 'name', o.name, 'round', o.round, 'kind', o.kind, 'due_at', coalesce(o.due_at, p_now + make_interval(
        secs => o.due_in)), 'keep', o.keep, 'timeout_error', o.timeout_error, 'window', o."window", 'event', o.event,
      'where', o."where") order by o.place)
    from o where o.kind not in ('invoke', 'start'))
  into children, headers;
end $$;

-- The rows of what is more than its one child: fan-outs with their counters, sleeps and waits. A fan-out of nobody is over.
create or replace function open_headers(p_headers json, p_children new_child[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
begin
  with fan_out as (
    select parent_id, name, round, array_agg(id order by index) as ids,
           case when min(task) = max(task) then min(task) end as task
    from unnest(p_children) where index > 0 group by 1, 2, 3
  ), opened as (
    insert into step (execution_id, name, round, index, kind, status, keep_on_timeout, created_at, finished_at, due_at,
                      error, child_task, event_where, child_ids)
    select o.id, o.name, o.round, 0, o.kind, case when f.is_over then 'completed' else 'pending' end::step_status,
           coalesce(o.keep, false), p_now, case when f.is_over then p_now end, o.due_at, o.timeout_error,
           coalesce(o.event, c.task), o."where", c.ids
    from json_to_recordset(p_headers) as o(id uuid, name text, round smallint, kind step_kind, due_at timestamptz,
      keep boolean, timeout_error json, event text, "where" jsonb)
    left join fan_out c on c.parent_id = o.id and c.name = o.name and c.round = o.round
    cross join lateral (select o.kind = 'invoke_all' and c.ids is null as is_over) f
    on conflict do nothing
    returning execution_id, name, round, kind, cardinality(child_ids) as count
  )
  insert into wait_item (execution_id, name, round, kind, left_count, next_index)
  select n.execution_id, n.name, n.round, n.kind, n.count, o."window" + 1
  from opened n join json_to_recordset(p_headers) as o(id uuid, name text, round smallint, "window" int)
    on n.execution_id = o.id and n.name = o.name and n.round = o.round
  where n.count > 0
  on conflict do nothing;
  if cardinality(p_children) > 10000 then
    perform check_fan_outs(p_children);
  end if;
  perform listen(waits_of(p_headers), p_now);
end $$;

-- Refuses a fan-out of more children than there may be.
create or replace function check_fan_outs(p_children new_child[]) returns void
language plpgsql stable set search_path from current as $$
declare
  v_most int;
begin
  select max(n.count) into v_most
  from (select count(*) from unnest(p_children) where index > 0 group by parent_id, name, round) n;
  if v_most > 10000 then
    raise exception '% children of one operation, at most 10000 are allowed', v_most using errcode = 'PC003';
  end if;
end $$;

-- The executions of new children.
create or replace function child_executions(p_children new_child[]) returns new_execution[]
language plpgsql volatile set search_path from current as $$
declare
  v_tasks text[];
  v_queues text[];
  v_lanes int[];
begin
  select array_agg(x.task), array_agg(x.queue) into v_tasks, v_queues
  from (select distinct c.task, c.queue from unnest(p_children) c) x;
  v_lanes := lanes_of(v_tasks, v_queues);
  return (
    select array_agg(row(
      c.id, c.lane, nextval('execution_ord'), c.priority, case when c.detached then 0 else c.depth end,
      case when not c.detached then c.parent_id end, case when not c.detached then c.name end,
      case when not c.detached then c.round end, case when not c.detached then c.index end,
      case when not c.detached then c.root_id end,
      null, null, c.payload, c.due_at, null, null)::new_execution)
    from (select c.*, x.lane
          from unnest(p_children) with ordinality as c
          join unnest(v_tasks, v_queues, v_lanes) as x(task, queue, lane)
            on x.task = c.task and x.queue is not distinct from c.queue
          order by c.ordinality) c);
end $$;

-- p_steps: [{id, token, name, round, kind, value, event?: {id, name, payload}}]; p_ops and p_children: as open_operations
-- takes them, operations with token. A step with an event emits it: the two are there together, once.
create or replace function save(
  p_orchestrator uuid, p_steps json, p_ops json, p_now timestamptz default null, p_children json default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_lost uuid[];
  v_lanes int[] := '{}'::int[];
  v_has_events boolean;
begin
  if not hold_alive(p_orchestrator) then
    return null;
  end if;
  perform check_sizes(p_steps);
  -- in one statement, since reading the steps costs nearly as much as writing them
  with given as materialized (
    select s.*, l.execution_id is not null as is_held
    from json_to_recordset(p_steps)
      as s(id uuid, token bigint, name text, round smallint, kind step_kind, value json, event json)
    left join lateral (select * from lease k where k.execution_id = s.id offset 0) l
      on l.token = s.token and l.orchestrator_id = p_orchestrator
  ), saved as (
    insert into step (execution_id, name, round, kind, status, value, created_at, finished_at)
    select id, name, round, kind, 'completed', value, v_now, v_now from given where is_held
    on conflict do nothing
  )
  select array_agg(distinct id) filter (where not is_held), bool_or(event is not null) into v_lost, v_has_events from given;

  if json_array_length(p_ops) > 0 then
    v_lost := lost_among(p_orchestrator, p_ops, v_lost);
    v_lanes := start_children(p_orchestrator, p_ops, p_children, v_lost, v_now);
  end if;
  if v_has_events then
    v_lanes := v_lanes || emit_of_steps(p_steps, v_now);
  end if;
  return json_build_object(
    'lost', to_json(v_lost), 'queues', queues_of(v_lanes),
    'next_due', (select 0 from event_pending order by ord limit 1));
end $$;

-- Adds the executions of operations whose leases are gone to those that are known to be lost; null is none.
-- p_ops: [{id, token, ...}]
create or replace function lost_among(p_orchestrator uuid, p_ops json, p_lost uuid[]) returns uuid[]
language plpgsql stable set search_path from current as $$
begin
  return (
    select array_agg(distinct g.id) from (
      select unnest(p_lost) as id
      union all
      select o.id from json_to_recordset(p_ops) as o(id uuid, token bigint)
      left join lateral (select * from lease k where k.execution_id = o.id offset 0) l
        on l.token = o.token and l.orchestrator_id = p_orchestrator
      where l.execution_id is null) g);
end $$;

-- Emits the events of the steps that were recorded with them. Returns the lanes that have new work.
create or replace function emit_of_steps(p_steps json, p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_events json;
begin
  select json_agg(s.event) into v_events
  from json_to_recordset(p_steps) as s(id uuid, name text, round smallint, event json)
  join step r on r.execution_id = s.id and r.name = s.name and r.round = s.round and r.index = 0
  where s.event is not null and r.value #>> '{}' = s.event ->> 'id';
  return case when v_events is null then '{}' else write_events(v_events, p_now) end;
end $$;

-- Opens operations of executions that go on running. A parent with a cancel request creates nothing: its worker is
-- told by signal. Nor does one that a settle of the same process ended before the locks were had.
create or replace function start_children(
  p_orchestrator uuid, p_ops json, p_children json, p_lost uuid[], p_now timestamptz
) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_parents uuid[];
  v_roots uuid[];
begin
  select array_agg(e.id), array_agg(coalesce(e.root_id, e.id)) into v_parents, v_roots
  from (select distinct o.id from json_to_recordset(p_ops) as o(id uuid)) o cross join lateral (select * from execution k where k.id = o.id offset 0) e
  where p_lost is null or o.id <> all(p_lost);
  perform lock_trees(v_roots, '{}');
  perform lock_executions(v_parents);
  return open_operations(p_ops, p_children, array(
    select distinct o.id from json_to_recordset(p_ops) as o(id uuid, token bigint)
    cross join lateral (select * from lease k where k.execution_id = o.id offset 0) l
    cross join lateral (select * from execution k where k.id = o.id offset 0) e
    where l.token = o.token and l.orchestrator_id = p_orchestrator and e.cancel_requested_at is null), p_now);
end $$;

-- Records a step in the caller's own transaction, beside the user's writes (ctx.transaction).
-- Returns saved; lost: the lease is gone; exists: an earlier try of the same run committed. For the last two the
-- caller rolls back.
create or replace function save_transaction(
  p_orchestrator uuid, p_id uuid, p_token bigint, p_name text, p_round smallint, p_value json,
  p_now timestamptz default null
) returns text
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
begin
  if not hold_alive(p_orchestrator) or not exists (
    select from lease where execution_id = p_id and token = p_token and orchestrator_id = p_orchestrator
  ) then
    return 'lost';
  end if;
  perform check_size('value of step ' || p_name, p_value);
  insert into step (execution_id, name, round, kind, status, value, created_at, finished_at)
  values (p_id, p_name, p_round, 'transaction', 'completed', p_value, v_now, v_now)
  on conflict do nothing;
  return case when found then 'saved' else 'exists' end;
end $$;
