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
-- p_alike: [{op: its place in p_ops, count, task, queue?, priority?, delay?, run_at?}], operation after operation: how so
--          many of its children in a row are called. They differ in p_children, their ids, and p_payloads alone, which stand
--          beside each other: ten thousand objects cost the server three times as much to read.
-- p_ids: only the operations of these executions.
create or replace function open_operations(
  p_ops json, p_alike json, p_children uuid[], p_payloads json, p_ids uuid[], p_now timestamptz
) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_ops new_operation[];
  v_alike alike_children[];
  v_lanes int[];
begin
  perform check_sizes(p_ops);
  perform check_values('payload', p_payloads);
  v_ops := new_operations(p_ops, p_ids, p_now);
  if v_ops is null then
    return '{}'::int[];
  end if;
  v_alike := read_alike(p_alike, v_ops, cardinality(p_children), p_now);
  perform open_steps(v_ops, v_alike, p_children, p_now);
  if v_alike is null then
    return '{}'::int[];
  end if;
  if are_plain(v_ops, v_alike) then
    return insert_plain_children(v_ops, v_alike, p_children, p_payloads, p_now);
  end if;
  v_lanes := insert_executions(child_executions(v_ops, v_alike, p_children, p_payloads), p_now);
  if exists (select from unnest(v_ops) where "window" is not null) and exists (
    select from unnest(v_alike) where due_at is not null
  ) then
    perform note_times(v_ops, v_alike, p_children);
  end if;
  return v_lanes;
end $$;

-- Writes when the children that a window holds are to run, once it lets them.
create or replace function note_times(p_ops new_operation[], p_alike alike_children[], p_children uuid[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  update execution e set run_at = c.due_at
  from (select p_children[c.place] as id, a.due_at
        from unnest(p_alike) a
        join unnest(p_ops) o on o.place = a.op
        cross join lateral generate_series(greatest(a.first, a.first + o."window" - a.before), a.last) as c(place)
        where a.due_at is not null and o."window" is not null) c
  where e.id = c.id;
end $$;

-- The operations that are not there yet.
create or replace function new_operations(p_ops json, p_ids uuid[], p_now timestamptz) returns new_operation[]
language plpgsql stable set search_path from current as $$
begin
  return (
    select array_agg(row(
      o.place, o.id, p.root_id, p.depth, o.name, o.round, o.kind, coalesce(o.due_at, p_now + make_interval(secs => o.due_in)),
      coalesce(o.keep, false), coalesce(o.detached, false), o.timeout_error, o."window", o.event, o."where")::new_operation
      order by o.place)
    from rows from (json_to_recordset(p_ops) as (id uuid, name text, round smallint, kind step_kind,
      due_at timestamptz, due_in float8, keep boolean, detached boolean, timeout_error json, "window" int, event text,
      "where" jsonb)) with ordinality
      as o(id, name, round, kind, due_at, due_in, keep, detached, timeout_error, "window", event, "where", place)
    cross join lateral (
      select coalesce(root_id, id) as root_id, depth + 1 as depth from execution k where k.id = o.id offset 0) p
    left join lateral (
      select true as is_there from step k
      where k.execution_id = o.id and k.name = o.name and k.round = o.round and k.index = 0 offset 0) known on true
    where o.id in (select unnest(p_ids)) and known.is_there is null);
end $$;

-- Which children are called alike, and how; null where new operations have none. Refuses what does not fit the so many
-- ids that there are, more children than an operation may have, and those too far below the root.
create or replace function read_alike(
  p_alike json, p_ops new_operation[], p_count int, p_now timestamptz
) returns alike_children[]
language plpgsql volatile set search_path from current as $$
declare
  v_tasks text[];
  v_queues text[];
  v_lanes int[];
  v_read record;
begin
  select array_agg(x.task), array_agg(x.queue) into v_tasks, v_queues
  from (select distinct a.task, a.queue from json_to_recordset(p_alike) as a(op int, task text, queue text)
        where a.op in (select place from unnest(p_ops))) x;
  if v_tasks is null then
    return null;
  end if;
  v_lanes := lanes_of(v_tasks, v_queues);
  select array_agg(row(
           a.op, a.last - a.count + 1, a.last, a.last_of_op - a.count, x.lane, a.task, coalesce(a.priority, 0),
           coalesce(a.run_at, p_now + make_interval(secs => a.delay)))::alike_children order by a.place) as alike,
         max(a.last_of_op) as most, max(a.total) as total, max(o.depth) filter (where not o.detached) as deepest,
         bool_or(a.is_astray or (a.last_of_op > 1 and o.kind <> 'invoke_all')) as is_astray
  into v_read
  from (select a.*, sum(a.count) over (order by a.place)::int as last, sum(a.count) over () as total,
               sum(a.count) over (partition by a.op order by a.place)::int as last_of_op,
               a.count < 1 or a.op < lag(a.op) over (order by a.place) as is_astray
        from rows from (json_to_recordset(p_alike) as (op int, count int, task text, queue text, priority smallint,
          delay float8, run_at timestamptz)) with ordinality
          as a(op, count, task, queue, priority, delay, run_at, place)) a
  left join unnest(p_ops) o on o.place = a.op
  left join unnest(v_tasks, v_queues, v_lanes) as x(task, queue, lane)
    on x.task = a.task and x.queue is not distinct from a.queue;
  if v_read.is_astray or v_read.total <> p_count then
    raise exception 'what is said of children does not fit them: % of % ids', v_read.total, p_count using errcode = 'PC003';
  end if;
  if v_read.most > 10000 then
    raise exception '% children of one operation, at most 10000 are allowed', v_read.most using errcode = 'PC003';
  end if;
  if v_read.deepest > 100 then
    raise exception 'a child % levels below its root, at most 100 are allowed', v_read.deepest using errcode = 'PC003';
  end if;
  return v_read.alike;
end $$;

-- The rows of new operations: steps, and the counters of fan-outs. A fan-out of nobody is over, and so is the start of
-- what is detached.
create or replace function open_steps(
  p_ops new_operation[], p_alike alike_children[], p_children uuid[], p_now timestamptz
) returns void
language plpgsql volatile set search_path from current as $$
begin
  with flat as materialized (select p_children as ids)  -- else each slice of the variable copies all of it
  insert into step (execution_id, name, round, index, kind, status, keep_on_timeout, created_at, finished_at, due_at,
                    error, child_id, child_task, event_where, child_ids)
  select o.execution_id, o.name, o.round, 0, o.kind, case when f.is_over then 'completed' else 'pending' end::step_status,
         o.keep, p_now, case when f.is_over then p_now end, o.due_at, o.timeout_error,
         case when not f.fans_out then k.ids[c.first] end, coalesce(o.event, c.task), o.event_where,
         case when f.fans_out then k.ids[c.first : c.last] end
  from flat k cross join unnest(p_ops) o
  left join (
    select op, min(first) as first, max(last) as last, case when min(task) = max(task) then min(task) end as task
    from unnest(p_alike) group by op) c on c.op = o.place
  cross join lateral (
    select o.kind = 'invoke_all' as fans_out, o.detached or (o.kind = 'invoke_all' and c.op is null) as is_over) f;
  if exists (select from unnest(p_ops) where kind in ('invoke_all', 'wait_for')) then
    insert into wait_item (execution_id, name, round, kind, left_count, next_index)
    select o.execution_id, o.name, o.round, o.kind, c.count, o."window" + 1
    from unnest(p_ops) o
    join (select op, sum(last - first + 1) as count from unnest(p_alike) group by op) c on c.op = o.place
    where o.kind = 'invoke_all';
    perform listen(waits_of(p_ops), p_now);
  end if;
end $$;

-- Whether all children of new operations are attached, ready at once, and of tasks that ask for nothing besides.
create or replace function are_plain(p_ops new_operation[], p_alike alike_children[]) returns boolean
language plpgsql stable set search_path from current as $$
begin
  return not exists (select from unnest(p_ops) o where o.detached or o."window" is not null)
    and not exists (select from unnest(p_alike) a where a.due_at is not null)
    and not exists (
      select from lane l join task t on t.id = l.task_id
      where l.id = any(array(select a.lane_id from unnest(p_alike) a)) and (l.is_limited or t.expires_in is not null));
end $$;

-- Writes children that are plain, without a row in between for each of so many. Returns the lanes that have new work.
create or replace function insert_plain_children(
  p_ops new_operation[], p_alike alike_children[], p_children uuid[], p_payloads json, p_now timestamptz
) returns int[]
language plpgsql volatile set search_path from current as $$
begin
  with written as (
    insert into execution (id, ord, created_at, lane_id, priority, depth, parent_id, parent_step, parent_round, parent_index,
                           root_id, payload)
    select c.id, c.ord, p_now, a.lane_id, a.priority, a.depth, a.parent_id, a.name, a.round,
           case when a.fans_out then c.place - a.places_before else 0 end, a.root_id, c.payload
    -- arrays are unfolded in the select list: after from, their rows would be stored before they are read
    from (select unnest(p_children) as id, unnest(draw_ords(cardinality(p_children))) as ord,
                 generate_subscripts(p_children, 1) as place, json_array_elements(p_payloads) as payload) c
    join (select a.entry, a.lane_id, a.priority, a.first - a.before - 1 as places_before, o.depth, o.execution_id as parent_id,
                 o.name, o.round, o.root_id, o.kind = 'invoke_all' as fans_out
          from unnest(p_alike) with ordinality as a(op, first, last, before, lane_id, task, priority, due_at, entry)
          join unnest(p_ops) o on o.place = a.op) a on a.entry = width_bucket(c.place, array(select f.first from unnest(p_alike) f))
    returning lane_id, priority, ord, id
  )
  insert into ready (lane_id, priority, ord, execution_id) select lane_id, priority, ord, id from written;
  return array(select distinct a.lane_id from unnest(p_alike) a join unnest(p_ops) o on o.place = a.op);
end $$;

-- The executions of the children of new operations. Those beyond a fan-out's window are due at infinity until one before
-- them ends; note_times writes what else they are to wait for.
create or replace function child_executions(
  p_ops new_operation[], p_alike alike_children[], p_children uuid[], p_payloads json
) returns new_execution[]
language plpgsql volatile set search_path from current as $$
begin
  return (
    select array_agg(row(
      c.id, c.lane_id, nextval('execution_ord'), c.priority, case when c.detached then 0 else c.depth end,
      case when not c.detached then c.parent_id end, case when not c.detached then c.name end,
      case when not c.detached then c.round end, case when not c.detached then c.index end,
      case when not c.detached then c.root_id end, null, null, c.payload,
      case when c.index > c."window" then 'infinity' else c.due_at end, null, null)::new_execution)
    from (
      select c.id, c.payload, a.lane_id, a.priority, a.due_at, o.depth, o.execution_id as parent_id, o.name, o.round,
             o.root_id, o.detached, o."window",
             case when o.kind = 'invoke_all' then a.before + c.place - a.first + 1 else 0 end as index
      -- arrays are unfolded in the select list: after from, their rows would be stored before they are read
      from (select unnest(p_children) as id, json_array_elements(p_payloads) as payload,
                   generate_subscripts(p_children, 1) as place) c
      join unnest(p_alike) with ordinality as a(op, first, last, before, lane_id, task, priority, due_at, entry)
        on a.entry = width_bucket(c.place, array(select f.first from unnest(p_alike) f))
      join unnest(p_ops) o on o.place = a.op
      order by c.place) c);
end $$;

-- p_steps: [{id, token, name, round, kind, value, event?: {id, name, payload}, seconds?: how long it took}]; p_ops and what
-- goes with them: as open_operations takes them, operations with token. A step with an event emits it: the two are there
-- together, once.
create or replace function save(
  p_orchestrator uuid, p_steps json, p_ops json, p_now timestamptz default null, p_alike json default null,
  p_children uuid[] default null, p_payloads json default null
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
      as s(id uuid, token bigint, name text, round smallint, kind step_kind, value json, event json,
           seconds float8)
    left join lateral (select * from lease k where k.execution_id = s.id offset 0) l
      on l.token = s.token and l.orchestrator_id = p_orchestrator
  ), saved as (
    insert into step (execution_id, name, round, kind, status, value, created_at, finished_at)
    select id, name, round, kind, 'completed', value,
           case when seconds is null then v_now else v_now - make_interval(secs => seconds) end, v_now
    from given where is_held
    on conflict do nothing
  )
  select array_agg(distinct id) filter (where not is_held), bool_or(event is not null) into v_lost, v_has_events from given;

  if json_array_length(p_ops) > 0 then
    v_lost := lost_among(p_orchestrator, p_ops, v_lost);
    v_lanes := start_children(p_orchestrator, p_ops, p_alike, p_children, p_payloads, v_lost, v_now);
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
  p_orchestrator uuid, p_ops json, p_alike json, p_children uuid[], p_payloads json, p_lost uuid[], p_now timestamptz
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
  return open_operations(p_ops, p_alike, p_children, p_payloads, array(
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
  p_now timestamptz default null, p_seconds float8 default 0
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
  values (p_id, p_name, p_round, 'transaction', 'completed', p_value, v_now - make_interval(secs => p_seconds), v_now)
  on conflict do nothing;
  return case when found then 'saved' else 'exists' end;
end $$;
