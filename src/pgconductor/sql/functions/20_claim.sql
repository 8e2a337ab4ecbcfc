-- claim: take what may run now, for all the free slots of one process, in one round trip.
-- Called by the claimer of a worker process. States: ready -> running. Locks: the caller's orchestrator row; what timers
-- need; the limits of limited tasks that are to be looked at; the rows it takes, skipping those that another process is
-- taking. The commit is asynchronous: a claim that is lost in a crash of the server is simply claimed again.
-- Returns null when the process was declared dead, else {next_due, schedules, closing, more, last, seconds, search_seconds,
-- claimed: [[...]]}; closing: for tasks with a window, in how many seconds it closes; schedules: those that are due, as
-- due_schedules tells of them; more: queues that it did not come to, since it had enough (2,000) before, or whose limited
-- work was not all looked at; last: [[lane, place]], how far this claim came in either kind of each priority; seconds: how
-- long it looked for work and took it; search_seconds: how much of that it took to find the first row of each range.
--
-- A claim looks through its lanes from their heads, past the rows of what others have claimed, until vacuum removes them.
-- That may be never: while a snapshot is held open, or vacuum is late. So a process that sees its claims become slow
-- names the places that it came to before, in p_from, and the claim looks only behind them.

-- Splits a limit over ranges so that the best rows of all of them are taken, in the order of their places.
-- p_held: what limited lanes may add, as ranges without bounds.
create or replace function share_limit(p_ranges scan_range[], p_limit int, p_held ready[])
returns table (range scan_range, take int)
language plpgsql stable set search_path from current as $$
#variable_conflict use_column
begin
  return query
    select n.range, count(*)::int
    from (select f.range
          from (select x::scan_range as range, r.place from unnest(p_ranges) x cross join lateral (
                  select place_of(r.priority, r.ord) as place from ready r
                  where r.lane_id = x.lane_id and place_of(r.priority, r.ord) > x.after_place
                    and place_of(r.priority, r.ord) < x.before_place
                  order by place_of(r.priority, r.ord) limit p_limit) r
                union all
                select row(h.lane_id, null, null)::scan_range, place_of(h.priority, h.ord) from unnest(p_held) h) f
          order by f.place limit p_limit) n
    group by n.range;
end $$;

-- Which limited lanes of the wanted queues the claim should look at. Their tasks' locks are taken, in order.
create or replace function limited_lanes(p_wants json, p_tasks int[], p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_lanes int[];
  v_locked int[];
begin
  select array_agg(l.id), array_agg(l.task_id) into v_lanes, v_locked
  from json_to_recordset(p_wants) as w(queue int)
  join queue q on q.id = w.queue and q.paused_at is null
  join lane l on l.queue_id = q.id and l.is_limited and l.task_id = any(p_tasks)
  join task k on k.id = l.task_id
  cross join lateral (select from look where lane_id = l.id limit 1) seen
  where (k.window_start is null or closes_in(k, p_now) is not null);
  if v_lanes is not null then
    perform lock_limits(v_locked);
  end if;
  return v_lanes;
end $$;

-- Takes the best of a queue: what stands in ready, and what the limits of its limited lanes let in: of these no more than
-- there are slots for (p_free).
create or replace function take_best(
  p_ranges scan_range[], p_limited int[], p_limit int, p_free int, p_now timestamptz
) returns ready[]
language plpgsql volatile set search_path from current as $$
declare
  v_lane int;
  v_share record;
  v_held ready[] := '{}'::ready[];
  v_taken ready[] := '{}'::ready[];
begin
  if p_limited is null and cardinality(p_ranges) = 1 then
    return take_ready(p_ranges[1], p_limit);
  end if;
  if p_free > 0 then
    foreach v_lane in array coalesce(p_limited, '{}') loop
      v_held := v_held || admissible(v_lane, least(p_free, p_limit), p_now);
    end loop;
  end if;
  for v_share in select * from share_limit(p_ranges, p_limit, v_held) loop
    v_lane := (v_share.range).lane_id;
    if v_lane = any(p_limited) then
      v_taken := v_taken || admit(v_lane, array(
        select h from unnest(v_held) h where h.lane_id = v_lane
        order by h.priority desc, h.ord limit v_share.take), p_now);
    else
      v_taken := v_taken || take_ready(v_share.range, v_share.take);
    end if;
  end loop;
  return v_taken;
end $$;

-- Removes and returns the first ready rows of a range. The inner statement can only be an index scan and the outer one
-- goes to the very rows, whatever the planner believes of the table: believed empty, a join would scan the whole backlog.
create or replace function take_ready(p_range scan_range, p_take int) returns ready[]
language plpgsql volatile set search_path from current as $$
declare
  v_taken ready[];
begin
  with taken as (
    delete from ready where ctid = any(array(
      select ctid from ready
      where lane_id = p_range.lane_id and place_of(priority, ord) > p_range.after_place
        and place_of(priority, ord) < p_range.before_place
      order by place_of(priority, ord) limit p_take for update skip locked))
    returning *
  )
  select coalesce(array_agg(row(t.lane_id, t.priority, t.ord, t.execution_id, t.cached_by, t.cached_seq,
                                t.cached_open)::ready), '{}')
  into v_taken from taken t;
  return v_taken;
end $$;

-- How far a claim came in either kind of each priority of a lane: [[lane, place]]. Limited lanes have no such places.
create or replace function last_places(p_taken ready[], p_limited int[]) returns json
language plpgsql stable set search_path from current as $$
begin
  return (
    select json_agg(json_build_array(lane_id, place))
    from (select lane_id, max(place_of(priority, ord)) as place from unnest(p_taken)
          where p_limited is null or lane_id <> all(p_limited)
          group by lane_id, place_of(priority, ord) >> 46) n);
end $$;

-- What is large does not go with a claim, which is one value for up to 2,000 executions: runs load it, in rows, when they
-- begin (load_executions). Large is what Postgres compresses or stores apart, from some 2 KB on. Below, what it costs to
-- copy a byte some fifteen times is less than a statement; and a value need not be read to be told from a large one.
create or replace function is_in_row(p_value json) returns boolean
language sql stable parallel safe
return p_value is null or (pg_column_compression(p_value) is null and pg_column_size(p_value) <= 2048);

-- What the children of a fan-out returned, each in an array of its own, in their order; null where that is not all that their
-- parent is to be told, or a value is large. They are found in one scan of the key.
create or replace function results_of(p_children uuid[]) returns json
language plpgsql stable set search_path from current as $$
begin
  return (
    select case when count(*) = cardinality(p_children)
                     and bool_and(outcome = 'completed' and parent_index > 0 and is_in_row(result))
           then json_agg(json_build_array(result) order by parent_index) end
    from execution where id = any(p_children));
end $$;

-- The recorded operations of a resumed execution, newest rounds included, as arrays, in the order in which they were recorded
-- or answered; only those after p_since. A fan-out
-- has the answers of its children as the last member; where all are of one task, a completed one tells its value alone.
-- p_open: the names that can have any; without it all that is recorded is looked through. Where a value is large, or all of it is
-- more than p_bytes_max, it is p_since instead: load those after it. Nested loops are on, since handed_out has them off.
create or replace function recorded_steps(p_execution uuid, p_since bigint, p_open json, p_bytes_max int) returns json
language plpgsql stable set search_path from current set enable_nestloop = on as $$
declare
  v_steps json;
  v_fans_out boolean;
begin
  if p_open is null then
    select case when bool_and(is_in_row(value) and is_in_row(error))
      then json_agg(json_build_array(name, round, index, kind::text, status::text, case when is_in_row(value) then value end,
                                     case when is_in_row(error) then error end, child_id, child_task, dropped) order by seq)
      when count(*) > 0 then to_json(p_since) end, bool_or(child_ids is not null)
    into v_steps, v_fans_out
    from step where execution_id = p_execution and seq > p_since and index = 0;
  else
    select case when bool_and(is_in_row(value) and is_in_row(error))
      then json_agg(json_build_array(s.name, round, index, kind::text, status::text, case when is_in_row(value) then value end,
                                     case when is_in_row(error) then error end, child_id, child_task, dropped) order by seq)
      when count(*) > 0 then to_json(p_since) end, bool_or(child_ids is not null)
    into v_steps, v_fans_out
    from json_array_elements_text(p_open) as o(name) cross join lateral (
      select * from step k where k.execution_id = p_execution and k.name = o.name and k.seq > p_since and k.index = 0 offset 0) s;
  end if;
  if v_fans_out or p_bytes_max = 0 then  -- 0: so that it is planned
    select case when bool_and(is_in_row(value) and is_in_row(error) and coalesce(c.are_in_row, true))
      then json_agg(json_build_array(s.name, s.round, index, kind::text, status::text, case when is_in_row(value) then value end,
                                     case when is_in_row(error) then error end, child_id, child_task, dropped,
                                     coalesce(a.answers, c.answers)) order by seq)
      else to_json(p_since) end
    into v_steps
    from step s
    cross join lateral (
      select case when s.status = 'completed' and s.child_task is not null then results_of(s.child_ids) end as answers offset 0) a
    left join lateral (
      select json_agg(
               case when k.status = 'completed' and s.child_task is not null
               then json_build_array(case when is_in_row(value) then value end)
               else json_build_array(case when is_in_row(value) then value end, status::text,
                                     case when is_in_row(error) then error end, child_id, child_task) end order by index) as answers,
             bool_and(is_in_row(value) and is_in_row(error)) as are_in_row
      from fan_out_child k
      where s.child_ids is not null and a.answers is null
        and k.execution_id = p_execution and k.name = s.name and k.round = s.round offset 0) c on true
    where s.execution_id = p_execution and s.seq > p_since and s.index = 0;
  end if;
  return case when pg_column_size(v_steps) > p_bytes_max then to_json(p_since) else v_steps end;
end $$;

-- What claims left out. p_missing: [{id, with_input, since?}]. A row with the payload and what the trigger handed over, if
-- with_input; one with each operation recorded after since, if given, and with each child of a fan-out. In rows, since one
-- value may not hold them all.
create or replace function load_executions(p_missing json)
returns table (execution_id uuid, payload json, trigger_data json, step json)
language plpgsql stable set search_path from current set enable_seqscan = off set enable_mergejoin = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return query
    select e.id, e.payload, e.trigger_data, null::json
    from json_to_recordset(p_missing) as m(id uuid, with_input boolean)
    cross join lateral (select * from execution k where k.id = m.id and m.with_input offset 0) e
    union all
    select s.execution_id, null, null, json_build_array(
      name, round, index, kind::text, status::text, value, error, child_id, child_task, dropped)
    from json_to_recordset(p_missing) as m(id uuid, since bigint)
    cross join lateral (
      select * from recorded_step k where k.execution_id = m.id and k.seq > m.since order by k.seq, k.index offset 0) s;
end $$;

-- What the worker is told of what it was given, in the order in which it stands. To a process that keeps the memos of
-- an execution, only what is new is told; it has the input, too. Of a call that has not run yet, the first four values say all,
-- and of such a child the first seven.
-- Executions and lanes are found in one scan each of their index, not each by a descent from its root, and joined by
-- hash: without nested loops no other plan is left.
create or replace function handed_out(p_taken ready[], p_orchestrator uuid) returns json
language plpgsql stable set search_path from current set enable_nestloop = off as $$
declare
  v_bytes_max int := 64 * 1024 * 1024 / greatest(cardinality(p_taken), 1);
  v_ids uuid[];
  v_lanes int[];
begin
  select array_agg(execution_id), array_agg(lane_id) into v_ids, v_lanes from unnest(p_taken);
  return (
    select json_agg(
      case when t.ord >= 0 and e.started_at is null and e.failures = 0 and e.crashes = 0 and e.trigger is null
                and e.trigger_kind is null
      then case when e.depth = 0
        then json_build_array(e.id, l.task_id, l.queue_id, case when i.is_told then e.payload end)
        else json_build_array(
          e.id, l.task_id, l.queue_id, case when i.is_told then e.payload end, e.depth, e.parent_id, e.root_id) end
      else json_build_array(
        e.id, l.task_id, l.queue_id, case when i.is_told then e.payload end, e.depth, e.parent_id, e.root_id,
        e.failures, e.crashes, e.trigger, t.cached_by = p_orchestrator,
        case when t.ord < 0 or e.started_at is not null then
          case when t.cached_by = p_orchestrator then recorded_steps(e.id, t.cached_seq, t.cached_open, v_bytes_max)
          else recorded_steps(e.id, 0, null, v_bytes_max) end end,
        e.trigger_kind, case when i.is_told then e.trigger_data end) end
      order by place_of(t.priority, t.ord))
    from unnest(p_taken) t
    join execution e on e.id = t.execution_id and e.id = any(v_ids)
    join lane l on l.id = t.lane_id and l.id = any(v_lanes)
    cross join lateral (
      select t.cached_by is distinct from p_orchestrator and is_in_row(e.payload)
        and is_in_row(e.trigger_data) as is_told) i);
end $$;

-- In how many seconds the windows of the tasks that were taken of close.
create or replace function closings(p_taken ready[], p_now timestamptz) returns json
language plpgsql stable set search_path from current as $$
begin
  return (
    select json_object_agg(k.id, closes_in(k, p_now)) from task k
    where k.window_start is not null and k.id in (
      select l.task_id from lane l where l.id = any(array(select t.lane_id from unnest(p_taken) t))));
end $$;

-- The queues that a claim which ended with the want p_seen did not come to, and those of which the limits are to be
-- looked at again.
create or replace function left_to_claim(p_wants json, p_seen bigint, p_taken ready[], p_limited int[]) returns json
language plpgsql stable set search_path from current as $$
begin
  return (
    select json_agg(distinct n.queue_id) from (
      select l.queue_id from unnest(p_taken) t join lane l on l.id = t.lane_id
      where p_limited is not null and l.id = any(p_limited) and exists (select from look k where k.lane_id = l.id)
      union all
      select (w.value->>'queue')::int from json_array_elements(p_wants) with ordinality w
      where p_seen is not null and w.ordinality > p_seen) n);
end $$;

-- p_wants: [{queue, limit, free? (of the limit, how many limited ones there are slots for)}]; null takes nothing, but has the
-- server plan what a claim that finds something does: a process says so as it begins. p_tasks: the task ids that this
-- process knows.
-- p_token: the process' own number of this claim, part of every lease it makes. p_from: [{lane_id, after_place,
-- before_place}], the ranges to look through in lanes that are named; the others are looked through from their heads.
create or replace function claim(
  p_orchestrator uuid, p_token bigint, p_wants json, p_tasks int[], p_fire boolean default false,
  p_now timestamptz default null, p_from json default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_number int;
  v_want record;
  v_seen bigint;
  v_limited int[];
  v_taken ready[] := '{}'::ready[];
  v_is_windowed boolean := false;
  v_found boolean;
  v_began_at timestamptz;
  v_found_at timestamptz;
  v_taking interval := interval '0';
  v_looking interval;
begin
  select number into v_number from orchestrator where id = p_orchestrator for key share;  -- as hold_alive does
  if not found then
    return null;
  end if;
  -- what timers have ended or answered is seen by others, so it waits for the disk
  if not p_fire or fire_timers(p_now) = 0 then
    perform set_config('synchronous_commit', 'off', true);
  end if;

  if exists (select from look) then
    v_limited := limited_lanes(p_wants, p_tasks, v_now);
  end if;
  v_began_at := clock_timestamp();
  for v_want in
    -- of each range, what begins with its first row; queue by queue, so that no more is looked at than is taken
    select w.n, w."limit", coalesce(w.free, w."limit") as free, f.ranges, f.limited, f.is_windowed
    from (select * from rows from (json_to_recordset(p_wants) as (queue int, "limit" int, free int))
          with ordinality as w(queue, "limit", free, n) order by n) w
    cross join lateral (
      select array_agg(row(l.id, r.place - 1, f.before_place)::scan_range) filter (where not l.is_limited) as ranges,
             array_agg(l.id order by l.id) filter (where l.is_limited) as limited,
             bool_or(k.window_start is not null) as is_windowed
      from queue q
      join lane l on l.queue_id = q.id and l.task_id = any(p_tasks)
      join task k on k.id = l.task_id
      left join json_populate_recordset(null::scan_range, p_from) s on s.lane_id = l.id and not l.is_limited
      cross join lateral (select (coalesce(s, whole_lane(l.id))).*) f
      cross join lateral (
        select * from (
          select place_of(priority, ord) as place from ready
          where lane_id = l.id and not l.is_limited and place_of(priority, ord) > f.after_place
            and place_of(priority, ord) < f.before_place
          order by place_of(priority, ord) limit 1) k
        union all select null where l.is_limited and l.id = any(v_limited)) r
      where q.id = w.queue and q.paused_at is null and (k.window_start is null or closes_in(k, v_now) is not null)) f
    where f.ranges is not null or f.limited is not null
  loop
    v_is_windowed := v_is_windowed or v_want.is_windowed;
    v_found_at := clock_timestamp();
    v_taken := v_taken || take_best(v_want.ranges, v_want.limited, v_want."limit", v_want.free, v_now);
    v_taking := v_taking + (clock_timestamp() - v_found_at);
    if cardinality(v_taken) >= 2000 then
      v_seen := v_want.n;
      exit;
    end if;
  end loop;
  v_looking := clock_timestamp() - v_began_at;
  if p_wants is null then
    v_taken := take_ready(whole_lane(0), 0);
    perform recorded_steps(p_orchestrator, 0, null, 0), results_of('{}');
  end if;
  insert into lease (execution_id, orchestrator_id, token, claimed_at, orchestrator_number)
  select t.execution_id, p_orchestrator, p_token, v_now, v_number from unnest(v_taken) t;
  v_found := cardinality(v_taken) > 0 or p_wants is null;
  return json_build_object(
    'seconds', extract(epoch from v_looking), 'search_seconds', extract(epoch from v_looking - v_taking),
    'next_due', next_due(v_now),
    'schedules', case when p_fire then due_schedules(v_now) end,
    'more', case when v_seen is not null or v_limited is not null then
      left_to_claim(p_wants, v_seen, v_taken, v_limited) end,
    'last', case when v_found then last_places(v_taken, v_limited) end,
    'closing', case when v_found and v_is_windowed then closings(v_taken, v_now) end,
    'claimed', case when v_found then handed_out(v_taken, p_orchestrator) end);
end $$;

-- Takes executions that their enqueue named, of one lane, when there is nothing else to look for: a claim of few
-- statements, since after a silence each of them is dear. Calls alone that have not run yet, of lanes without limits or
-- windows; where anything stands in the way of one, others take it, or a poll finds it. Returns as claim does: null, or
-- {claimed: [[...]]} or {}.
create or replace function claim_named(
  p_orchestrator uuid, p_token bigint, p_queue int, p_task int, p_executions uuid[], p_now timestamptz default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_number int;
  v_claimed json;
begin
  select number into v_number from orchestrator where id = p_orchestrator for key share;  -- as hold_alive does
  if not found then
    return null;
  end if;
  perform set_config('synchronous_commit', 'off', true);
  with named as materialized (
    select e.id, e.ord, case when is_in_row(e.payload) then e.payload end as payload, r.row_at
    from lane l
    join queue q on q.id = l.queue_id and q.paused_at is null
    join task k on k.id = l.task_id and k.window_start is null
    cross join unnest(p_executions) as x(id)
    cross join lateral (select * from execution k where k.id = x.id offset 0) e
    cross join lateral (
      select ctid as row_at from ready
      where lane_id = l.id and place_of(priority, ord) = place_of(e.priority, e.ord)
      for update skip locked) r
    where l.queue_id = p_queue and l.task_id = p_task and not l.is_limited and e.lane_id = l.id
      and e.started_at is null and e.failures = 0 and e.crashes = 0 and e.depth = 0 and e.trigger is null
  ), taken as (
    delete from ready where ctid = any(array(select row_at from named)) returning execution_id
  ), leased as (
    insert into lease (execution_id, orchestrator_id, token, claimed_at, orchestrator_number)
    select execution_id, p_orchestrator, p_token, instant(p_now), v_number from taken
  )
  select json_agg(json_build_array(n.id, p_task, p_queue, n.payload) order by n.ord) into v_claimed
  from named n join taken t on t.execution_id = n.id;
  return case when v_claimed is null then '{}' else json_build_object('claimed', v_claimed) end;
end $$;
