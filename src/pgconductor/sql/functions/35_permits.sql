-- put_ready, admit, release_permits: the way into ready, and what holds limited work before it.
-- Called by every function that makes work ready. States: backlog → ready (both are "ready" to the reader).
--
-- A permit is taken when work enters ready and given back when its lease ends, so a claim never meets work that may
-- not run, and a limited task costs the others nothing. Permits are rows, counted: there is no counter to drift, and
-- the sweep removes a permit whose execution is neither ready nor running.
--
-- Locks: after all execution rows, one advisory lock a limited task, in the order of task ids, held to the commit. All
-- admission of a task happens under it. admit is the last thing that a top-level function does.

-- Enters work into ready; that of limited lanes into the backlog. Returns the lanes.
create or replace function put_ready(p_rows ready[]) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_count int;
begin
  insert into ready (lane_id, priority, ord, execution_id, cached_by, cached_seq)
  select r.lane_id, r.priority, r.ord, r.execution_id, r.cached_by, r.cached_seq
  from unnest(p_rows) r join lane l on l.id = r.lane_id
  where not l.is_limited;
  get diagnostics v_count = row_count;
  if v_count < coalesce(cardinality(p_rows), 0) then
    perform hold_back(array(select r from unnest(p_rows) r join lane l on l.id = r.lane_id where l.is_limited));
  end if;
  return array(select distinct lane_id from unnest(p_rows));
end $$;

-- The values that an execution's payload has for its task's limits, in the order of the limits.
create or replace function limit_keys(p_task int, p_payload json) returns text
language sql stable set search_path from current as $$
  select coalesce(json_agg(case when key_path is null then ''
                                else coalesce(p_payload::jsonb #>> string_to_array(key_path, '.'), '') end
                           order by id), '[]')::text
  from task_limit where task_id = p_task
$$;

create or replace function hold_back(p_rows ready[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  insert into backlog (execution_id, task_id, keys, lane_id, priority, ord, is_start, cached_by, cached_seq)
  select r.execution_id, l.task_id, limit_keys(l.task_id, e.payload), r.lane_id, r.priority, r.ord, r.ord >= 0,
         r.cached_by, r.cached_seq
  from unnest(p_rows) r join lane l on l.id = r.lane_id join execution e on e.id = r.execution_id;
  insert into backlog_key (task_id, keys, turn)
  select b.task_id, b.keys, nextval('execution_ord')
  from (select distinct x.task_id, x.keys from unnest(p_rows) r join backlog x on x.execution_id = r.execution_id) b
  order by 1, 2
  on conflict do nothing;
end $$;

-- Gives back the permits of executions; returns the lanes whose tasks may admit more.
create or replace function release_permits(p_ids uuid[]) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_tasks int[];
begin
  if not exists (select from permit) then
    return '{}'::int[];
  end if;
  with given as (delete from permit where execution_id = any(p_ids) returning execution_id),
  freed as (
    insert into freed_key (task_id, keys)
    select l.task_id, limit_keys(l.task_id, e.payload)
    from (select distinct execution_id from given) g
    join execution e on e.id = g.execution_id join lane l on l.id = e.lane_id
    returning task_id
  )
  select array_agg(distinct task_id) into v_tasks from freed;
  return array(select id from lane where task_id = any(v_tasks) and is_limited);
end $$;

-- Admits what may run of the limited tasks among these lanes. Returns the queues that have new work.
create or replace function announce(p_lanes int[], p_now timestamptz) returns json
language plpgsql volatile set search_path from current as $$
declare
  v_task int;
begin
  for v_task in select distinct task_id from lane where id = any(p_lanes) and is_limited order by 1 loop
    perform admit(v_task, p_now);
  end loop;
  return queues_of(p_lanes);
end $$;

-- How much more one limit lets in for a key, now.
create or replace function limit_left(p_limit task_limit, p_key text, p_now timestamptz) returns int
language sql stable set search_path from current as $$
  select coalesce(p_limit.operator_max, p_limit.declared_max) - case p_limit.kind
    when 'concurrency' then (select count(*) from permit where limit_id = p_limit.id and key = p_key)
    else (select count(*) from rate_use
          where limit_id = p_limit.id and key = p_key and used_at > p_now - p_limit.period) end::int
$$;

-- How much more the limits let in together: those of the whole task, or those with a key. A rate counts starts only.
create or replace function limits_left(
  p_limits task_limit[], p_keys text, p_keyed boolean, p_is_start boolean, p_now timestamptz
) returns int
language sql stable set search_path from current as $$
  select coalesce(min(limit_left(p_limits[i], p_keys::json ->> (i - 1), p_now)), 1000000)
  from generate_subscripts(p_limits, 1) i
  where (p_limits[i].key_path is not null) = p_keyed and (p_is_start or p_limits[i].kind <> 'rate')
$$;

-- Moves work of one limited task from its backlog into ready, key after key in turn, as far as its limits allow.
create or replace function admit(p_task int, p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_limits task_limit[];
  v_key text;
  v_head backlog;
begin
  perform pg_advisory_xact_lock(hashtext(current_schema() || '.limit'), p_task);
  v_limits := array(select t from task_limit t where task_id = p_task order by id);
  perform reopen_keys(p_task, v_limits);
  for v_turn in 1..10000 loop
    select keys into v_key from backlog_key where task_id = p_task and not is_full order by turn limit 1;
    exit when not found;
    select * into v_head from backlog where task_id = p_task and keys = v_key order by priority desc, ord limit 1;
    if not found then
      delete from backlog_key where task_id = p_task and keys = v_key;
      continue;
    end if;
    exit when limits_left(v_limits, v_key, false, v_head.is_start, p_now) <= 0;
    if limits_left(v_limits, v_key, true, v_head.is_start, p_now) <= 0 then
      update backlog_key set is_full = true where task_id = p_task and keys = v_key;
    else
      perform admit_one(v_head, v_limits, p_now);
    end if;
  end loop;
  perform set_gate(p_task, v_limits, p_now);
end $$;

-- Lets keys that gave back a permit have a turn again. With several keyed limits a permit may concern other keys too.
create or replace function reopen_keys(p_task int, p_limits task_limit[]) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_freed text[];
begin
  with freed as (delete from freed_key where task_id = p_task returning keys)
  select array_agg(distinct keys) into v_freed from freed;
  if v_freed is not null then
    update backlog_key set is_full = false
    where task_id = p_task and is_full
      and (keys = any(v_freed) or (select count(key_path) > 1 from unnest(p_limits)));
  end if;
end $$;

-- Gives one execution its permits and its place in ready, behind what was admitted before it.
create or replace function admit_one(p_head backlog, p_limits task_limit[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_ord bigint := nextval('execution_ord');
begin
  delete from backlog where execution_id = p_head.execution_id;
  update backlog_key set turn = v_ord where task_id = p_head.task_id and keys = p_head.keys;
  insert into permit (execution_id, limit_id, key, ord)
  select p_head.execution_id, p_limits[i].id, p_head.keys::json ->> (i - 1), v_ord
  from generate_subscripts(p_limits, 1) i;
  insert into rate_use (limit_id, key, used_at)
  select p_limits[i].id, p_head.keys::json ->> (i - 1), p_now
  from generate_subscripts(p_limits, 1) i where p_limits[i].kind = 'rate' and p_head.is_start;
  insert into ready (lane_id, priority, ord, execution_id, cached_by, cached_seq)
  values (p_head.lane_id, p_head.priority, v_ord - case when p_head.ord < 0 then 4611686018427387904 else 0 end,
          p_head.execution_id, p_head.cached_by, p_head.cached_seq);
end $$;

-- Sets the alarm for the moment at which a rate limit lets the next one in.
create or replace function set_gate(p_task int, p_limits task_limit[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_opens_at timestamptz;
begin
  if not exists (select from unnest(p_limits) l where l.kind = 'rate') then
    return;
  end if;
  select min(u.used_at + l.period) into v_opens_at
  from unnest(p_limits) l
  cross join lateral (select used_at from rate_use
                      where limit_id = l.id and used_at > p_now - l.period order by used_at limit 1) u
  where l.kind = 'rate' and exists (select from backlog where task_id = p_task);
  delete from gate where task_id = p_task;
  insert into gate (task_id, opens_at) select p_task, v_opens_at where v_opens_at is not null;
end $$;

-- Opens the gates that are due. Returns how many.
create or replace function open_gates(p_now timestamptz) returns int
language plpgsql volatile set search_path from current as $$
declare
  v_tasks int[] := array(select task_id from gate where opens_at <= p_now order by task_id);
  v_task int;
begin
  foreach v_task in array v_tasks loop
    perform pg_advisory_xact_lock(hashtext(current_schema() || '.limit'), v_task);
    update backlog_key set is_full = false where task_id = v_task and is_full;
    perform admit(v_task, p_now);
  end loop;
  return cardinality(v_tasks);
end $$;

-- Looks at all limits afresh: permits without work go, keys get a turn, old starts are forgotten.
create or replace function sweep_limits(p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_task int;
begin
  if not exists (select from task_limit) then
    return;
  end if;
  delete from rate_use u using task_limit l where l.id = u.limit_id and u.used_at <= p_now - l.period;
  for v_task in select distinct task_id from lane where is_limited order by 1 loop
    perform pg_advisory_xact_lock(hashtext(current_schema() || '.limit'), v_task);
    delete from permit p using execution e, lane l
    where e.id = p.execution_id and l.id = e.lane_id and l.task_id = v_task
      and not exists (select from lease where execution_id = p.execution_id)
      and not exists (select from ready r where r.lane_id = e.lane_id and r.priority = e.priority
                      and r.ord in (p.ord, p.ord - 4611686018427387904) and r.execution_id = p.execution_id);
    update backlog_key set is_full = false where task_id = v_task and is_full;
    perform admit(v_task, p_now);
  end loop;
end $$;

-- Declares the limits of tasks as code has them, and sends their work through the backlog from now on.
-- p_limits: [{task, kind, key_path, max, seconds}]; p_tasks: the tasks whose code is speaking.
create or replace function declare_limits(p_tasks text[], p_limits json, p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_task int;
begin
  insert into task_limit as t (task_id, kind, key_path, declared_max, period)
  select k.id, d.kind, d.key_path, d.max, make_interval(secs => d.seconds)
  from json_to_recordset(p_limits) as d(task text, kind text, key_path text, max int, seconds float8)
  join task k on k.name = d.task
  order by 1, 2, 3
  on conflict (task_id, kind, key_path) do update
  set declared_max = excluded.declared_max, period = excluded.period
  where (t.declared_max, t.period) is distinct from (excluded.declared_max, excluded.period);
  delete from task_limit t using task k
  where k.id = t.task_id and k.name = any(p_tasks) and t.operator_max is null and not exists (
    select from json_to_recordset(p_limits) as d(task text, kind text, key_path text)
    where d.task = k.name and d.kind = t.kind and d.key_path is not distinct from t.key_path);
  for v_task in select id from task where name = any(p_tasks) order by id loop
    perform apply_limits(v_task, p_now);
  end loop;
end $$;

-- Brings a task's lanes and waiting work in line with its limits.
create or replace function apply_limits(p_task int, p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_limited boolean := exists (select from task_limit where task_id = p_task);
  v_moved ready[];
begin
  if not exists (select from lane where task_id = p_task and is_limited <> v_limited)
     and not exists (select from backlog where task_id = p_task) then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtext(current_schema() || '.limit'), p_task);
  update lane set is_limited = v_limited where task_id = p_task and is_limited <> v_limited;
  if v_limited then
    with moved as (
      delete from ready r using lane l
      where l.task_id = p_task and r.lane_id = l.id
        and not exists (select from permit p where p.execution_id = r.execution_id)
      returning row(r.lane_id, r.priority, r.ord, r.execution_id, r.cached_by, r.cached_seq)::ready as row
    )
    select array_agg(row) into v_moved from moved;
    perform hold_back(v_moved);
  end if;
  update backlog b set keys = limit_keys(p_task, e.payload) from execution e
  where b.task_id = p_task and e.id = b.execution_id and b.keys <> limit_keys(p_task, e.payload);
  delete from backlog_key where task_id = p_task;
  insert into backlog_key (task_id, keys, turn)
  select p_task, b.keys, min(b.ord) from backlog b where b.task_id = p_task group by b.keys;
  perform admit(p_task, p_now);
end $$;

-- Changes a limit while everything runs; null gives it back to the code. Returns false for an unknown task.
create or replace function set_limit(
  p_task text, p_max int, p_kind text default 'concurrency', p_key_path text default null,
  p_period interval default null, p_now timestamptz default null
) returns boolean
language plpgsql volatile set search_path from current as $$
declare
  v_task int := (select id from task where name = p_task);
begin
  if v_task is null then
    return false;
  end if;
  if p_max is null then
    update task_limit set operator_max = null
    where task_id = v_task and kind = p_kind and key_path is not distinct from p_key_path and declared_max is not null;
    delete from task_limit
    where task_id = v_task and kind = p_kind and key_path is not distinct from p_key_path and declared_max is null;
  else
    insert into task_limit as t (task_id, kind, key_path, operator_max, period)
    values (v_task, p_kind, p_key_path, p_max, p_period)
    on conflict (task_id, kind, key_path) do update
    set operator_max = excluded.operator_max, period = coalesce(excluded.period, t.period);
  end if;
  perform apply_limits(v_task, instant(p_now));
  perform pg_notify(current_schema(), 'ready ' || (select string_agg(distinct queue_id::text, ' ') from lane
                                                   where task_id = v_task));
  return true;
end $$;
