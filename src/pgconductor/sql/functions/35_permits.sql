-- put_ready, admissible, admit, release_permits: limits, and what holds limited work until there is room.
-- Called by every function that makes work ready, and by claim; insert_executions enters into ready itself. States: none of its own; work in the backlog is "ready".
--
-- The ready work of a limited lane stands in the backlog. A claim takes from it only what the limits let in, and writes
-- a permit a concurrency limit beside the lease, and the start for a rate. So a permit is a row that lives and goes with
-- its lease: there is no counter to drift, what does not run holds nothing, and the sweep removes a permit without a
-- lease. Keys take turns; a key whose own limits are full stands aside until one of them has room again.
--
-- A claim looks at a limited lane only if a row in look says why, so that a full task costs the others nothing. Whoever
-- brings work or gives a permit back writes such a row and waits for nobody, not even in a user's long transaction.
--
-- So what such a transaction brings knows the limits as they were. Its keys say which limits they are for, and its look
-- comes with them: a claim that meets others than the task's makes them anew. Its new lane is put right by the sweep.
--
-- Locks: one advisory lock a limited task, taken in the order of task ids by claim, the sweep and whoever changes
-- limits, as the last of their locks. backlog_key is written under it alone, and so is whether a lane that others can see
-- is limited. Whoever holds it waits for no row of work.

-- Enters work into ready; that of limited lanes into the backlog. Returns the lanes.
-- p_late: it is ready later than it was made, and its order number is old.
create or replace function put_ready(p_rows ready[], p_late boolean default false) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_lanes int[] := array(select distinct lane_id from unnest(p_rows));
  v_limited int[] := array(select id from lane where id = any(v_lanes) and is_limited);
begin
  insert into ready (lane_id, priority, ord, execution_id, cached_by, cached_seq, cached_open)
  select r.lane_id, r.priority, case when p_late then late_ord() else r.ord end, r.execution_id, r.cached_by, r.cached_seq,
         r.cached_open
  from unnest(p_rows) r where r.lane_id <> all(v_limited);
  if cardinality(v_limited) > 0 then
    perform hold_back(array(select r from unnest(p_rows) r where r.lane_id = any(v_limited)));
  end if;
  return v_lanes;
end $$;

-- A payload's value for a limit's key; a long one by its digest, so that an index can hold it.
create or replace function limit_key(p_path text, p_payload json) returns text
language sql immutable parallel safe
return case when p_path is null then ''
  when octet_length(p_payload #>> string_to_array(p_path, '.')) > 64
    then md5(p_payload #>> string_to_array(p_path, '.'))
  else coalesce(p_payload #>> string_to_array(p_path, '.'), '') end;

-- How the keys of work begin that are for these limits, and no others.
create or replace function keys_begin(p_limits task_limit[]) returns text
language plpgsql immutable parallel safe set search_path from current as $$
begin
  return '["' || array_to_string(array(select id from unnest(p_limits) order by id), ' ') || '"';
end $$;

-- Puts ready work into the backlog. Work that comes back (a place before all fresh ones) is no start.
create or replace function hold_back(p_rows ready[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  with held as (
    insert into backlog (execution_id, lane_id, is_start, keys, priority, ord, cached_by, cached_seq, cached_open)
    select r.execution_id, r.lane_id, r.ord >= 0, k.keys, r.priority, r.ord, r.cached_by, r.cached_seq,
           r.cached_open
    from unnest(p_rows) r
    cross join lateral (select * from execution k where k.id = r.execution_id offset 0) e
    cross join lateral (
      select to_json(array[coalesce(string_agg(t.id::text, ' ' order by t.id), '')]
                     || array_agg(limit_key(t.key_path, e.payload) order by t.id))::text as keys
      from lane l join task_limit t on t.task_id = l.task_id where l.id = r.lane_id) k
    returning lane_id, is_start, keys
  )
  insert into look (lane_id, is_start, keys) select distinct lane_id, is_start, keys from held;
end $$;

-- Gives back the permits of executions whose leases go; returns the lanes that may admit more.
create or replace function release_permits(p_ids uuid[]) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_lanes int[];
begin
  if pg_relation_size('permit'::regclass) = 0 then  -- see watchers_of
    return '{}'::int[];
  end if;
  with given as (delete from permit where execution_id = any(p_ids) returning limit_id, key),
  looks as (
    insert into look (lane_id, limit_id, key)
    select l.id, g.limit_id, g.key
    from (select distinct limit_id, key from given) g
    join task_limit t on t.id = g.limit_id join lane l on l.task_id = t.task_id and l.is_limited
    returning lane_id
  )
  select array_agg(distinct lane_id) into v_lanes from looks;
  return coalesce(v_lanes, '{}');
end $$;

-- Takes starts out of the rates that they count against: they have been given back before they were any.
create or replace function forget_starts(p_ids uuid[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  if not exists (select from rate_use) then
    return;
  end if;
  delete from rate_use
  where limit_id = any(array(
      select t.id from task_limit t where t.kind = 'rate' and t.task_id = any(array(
        select l.task_id from execution e join lane l on l.id = e.lane_id where e.id = any(p_ids) and l.is_limited))))
    and execution_id = any(p_ids);
end $$;

-- ---------------------------------------------------------------- room

create or replace function lock_limits(p_tasks int[]) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_task int;
begin
  for v_task in select distinct unnest(p_tasks) order by 1 loop
    perform pg_advisory_xact_lock(hashtext(current_schema() || '.limit'), v_task);
  end loop;
end $$;

-- How much more one limit lets in for a key, now.
create or replace function limit_left(p_limit task_limit, p_key text, p_now timestamptz) returns int
language plpgsql stable set search_path from current as $$
declare
  v_used int;
begin
  if p_limit.kind = 'concurrency' then
    select count(*) into v_used from permit where limit_id = p_limit.id and key = p_key;
  else
    select count(*) into v_used from rate_use
    where limit_id = p_limit.id and key = p_key and used_at > p_now - p_limit.period;
  end if;
  return coalesce(p_limit.operator_max, p_limit.declared_max) - v_used;
end $$;

-- How much more the limits let in together: those of the whole task, or those with a key. A rate counts starts only.
create or replace function limits_left(
  p_limits task_limit[], p_keys text, p_keyed boolean, p_is_start boolean, p_now timestamptz
) returns int
language plpgsql stable set search_path from current as $$
declare
  v_left int := 1000000;
begin
  for v_place in 1..coalesce(cardinality(p_limits), 0) loop
    if (p_limits[v_place].key_path is not null) = p_keyed
       and (p_is_start or p_limits[v_place].kind = 'concurrency') then
      v_left := least(v_left, limit_left(
        p_limits[v_place], case when p_keyed then p_keys::json ->> v_place else '' end, p_now));
    end if;
  end loop;
  return v_left;
end $$;

-- Makes the keys of work anew that these looks name and that are not for the limits of its task. What somebody else is
-- moving keeps its own, and a look. Returns the looks for the new ones. The caller holds the tasks' locks.
create or replace function fit_keys(p_looks look[]) returns look[]
language plpgsql volatile set search_path from current as $$
declare
  v_fitting look[];
begin
  with held as materialized (
    select b.execution_id
    from (select distinct lane_id, is_start, keys from unnest(p_looks)) k
    join backlog b on b.lane_id = k.lane_id and b.is_start = k.is_start and b.keys = k.keys
    for update of b skip locked
  ), fitted as (
    update backlog b set keys = k.keys
    from held h
    cross join lateral (select * from execution k where k.id = h.execution_id offset 0) e
    cross join lateral (
      select to_json(array[coalesce(string_agg(t.id::text, ' ' order by t.id), '')]
                     || array_agg(limit_key(t.key_path, e.payload) order by t.id))::text as keys
      from lane l join task_limit t on t.task_id = l.task_id where l.id = e.lane_id) k
    where b.execution_id = any(array[h.execution_id])
    returning b.lane_id, b.is_start, b.keys
  )
  select array_agg(row(f.lane_id, f.is_start, f.keys, null, null)::look) into v_fitting
  from (select distinct lane_id, is_start, keys from fitted) f;
  insert into look (lane_id, is_start, keys)
  select distinct b.lane_id, b.is_start, b.keys
  from unnest(p_looks) k join backlog b on b.lane_id = k.lane_id and b.is_start = k.is_start and b.keys = k.keys;
  return v_fitting;
end $$;

-- Takes notice of why a lane is to be looked at: keys with new work get a turn, and those whose limit has room again.
create or replace function take_looks(p_lane int, p_limits task_limit[]) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_begin text := keys_begin(p_limits);
  v_looks look[];
  v_strange look[];
begin
  with taken as (delete from look where lane_id = p_lane returning *)
  select array_agg(row(t.*)::look) filter (where starts_with(t.keys, v_begin) is not false),
         array_agg(row(t.*)::look) filter (where not starts_with(t.keys, v_begin))
  into v_looks, v_strange from taken t;
  if v_strange is not null then
    v_looks := v_looks || fit_keys(v_strange);
  end if;
  insert into backlog_key as k (lane_id, is_start, keys, turn)
  select p_lane, l.is_start, l.keys, b.ord
  from (select distinct is_start, keys from unnest(v_looks) where keys is not null) l
  cross join lateral (
    select ord from backlog where lane_id = p_lane and is_start = l.is_start and keys = l.keys
    order by priority desc, ord limit 1) b
  on conflict (lane_id, is_start, keys) do update set is_full = false where k.is_full;
  update backlog_key k set is_full = false
  from unnest(v_looks) l
  join unnest(p_limits) with ordinality as t(id, task_id, kind, key_path, declared_max, operator_max, declared_period,
                                             operator_period, period, place)
    on t.id = l.limit_id and t.key_path is not null
  where k.lane_id = p_lane and k.is_full and k.keys::json ->> t.place::int = l.key;
end $$;

-- The next keys of a lane to have a turn, those of resumed work first. The full ones that it meets stand aside.
create or replace function open_keys(
  p_lane int, p_limits task_limit[], p_starts boolean, p_count int, p_now timestamptz
) returns key_room[]
language plpgsql volatile set search_path from current as $$
declare
  v_keys key_room[];
begin
  loop
    select array_agg(row(k.is_start, k.keys, k.turn,
                         limits_left(p_limits, k.keys, true, k.is_start, p_now))::key_room)
    into v_keys
    from (select * from backlog_key where lane_id = p_lane and not is_full and (p_starts or not is_start)
          order by is_start, turn limit p_count) k;
    update backlog_key b set is_full = true
    from unnest(v_keys) k
    where k.room <= 0 and b.lane_id = p_lane and b.is_start = k.is_start and b.keys = k.keys;
    exit when not found;
  end loop;
  return v_keys;
end $$;

-- ---------------------------------------------------------------- admission, by a claim that holds the task's lock

-- What of a lane's backlog the limits let in now, at most p_limit, key after key in turn. The rows stay where they are,
-- locked; those that somebody else is moving are passed over.
create or replace function admissible(p_lane int, p_limit int, p_now timestamptz) returns ready[]
language plpgsql volatile set search_path from current as $$
declare
  v_limits task_limit[];
  v_room int;
  v_starts int;
  v_keys key_room[];
begin
  v_limits := array(select t from task_limit t join lane l on l.task_id = t.task_id where l.id = p_lane order by t.id);
  perform take_looks(p_lane, v_limits);
  v_room := limits_left(v_limits, null, false, false, p_now);
  v_starts := limits_left(v_limits, null, false, true, p_now);
  if v_room <= 0 then
    return '{}'::ready[];
  end if;
  loop
    v_keys := open_keys(p_lane, v_limits, v_starts > 0, least(p_limit, v_room), p_now);
    delete from backlog_key k using unnest(v_keys) v
    where k.lane_id = p_lane and k.is_start = v.is_start and k.keys = v.keys and not exists (
      select from backlog b where b.lane_id = p_lane and b.is_start = k.is_start and b.keys = k.keys);
    exit when not found;
  end loop;
  if v_keys is not null then
    insert into look (lane_id) values (p_lane);  -- there may be more, for the next claim
  end if;
  return choose(p_lane, v_limits, v_keys, least(p_limit, v_room), p_now);
end $$;

-- The first of each key's work, then the second, and so on, as far as every limit lets it in.
create or replace function choose(
  p_lane int, p_limits task_limit[], p_keys key_room[], p_limit int, p_now timestamptz
) returns ready[]
language plpgsql volatile set search_path from current as $$
begin
  return (
    with candidate as materialized (
      select b.*, k.turn, row_number() over (partition by b.is_start, b.keys order by b.priority desc, b.ord) as place
      from unnest(p_keys) k
      cross join lateral (
        select * from backlog b
        where b.lane_id = p_lane and b.is_start = k.is_start and b.keys = k.keys
        order by b.priority desc, b.ord
        limit least(k.room, ceil(p_limit::numeric / cardinality(p_keys))) for update skip locked) b
    ), counted as (
      select c.execution_id, t.place as limit_place, c.keys::json ->> t.place::int as key,
             row_number() over (partition by t.place, c.keys::json ->> t.place::int
                                order by c.place, c.is_start, c.turn) as nth
      from candidate c
      cross join unnest(p_limits) with ordinality
        as t(id, task_id, kind, key_path, declared_max, operator_max, declared_period, operator_period, period, place)
      where c.is_start or t.kind = 'concurrency'
    ), room as materialized (
      select limit_place, key, limit_left(p_limits[limit_place], key, p_now) as room
      from (select distinct limit_place, key from counted) d
    ), refused as materialized (
      select execution_id from counted join room using (limit_place, key) where nth > room.room
    )
    select coalesce(array_agg(row(c.lane_id, c.priority, c.ord, c.execution_id, c.cached_by, c.cached_seq,
                                  c.cached_open)::ready
                              order by c.place, c.is_start, c.turn), '{}')
    from (select * from candidate c where not exists (select from refused r where r.execution_id = c.execution_id)
          order by c.place, c.is_start, c.turn limit p_limit) c);
end $$;

-- Takes chosen work out of the backlog: it gets its permits, its starts count, and its keys go to the end of the turns.
create or replace function admit(p_lane int, p_chosen ready[], p_now timestamptz) returns ready[]
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[] := array(select execution_id from unnest(p_chosen));
  v_taken backlog[];
begin
  with taken as (delete from backlog where execution_id = any(v_ids) returning *)
  select array_agg(row(t.*)::backlog) into v_taken from taken t;
  insert into permit (execution_id, limit_id, key)
  select b.execution_id, t.id, b.keys::json ->> t.place::int
  from unnest(v_taken) b cross join (
    select id, kind, row_number() over (order by id) as place from task_limit
    where task_id = (select task_id from lane where id = p_lane)) t
  where t.kind = 'concurrency';
  insert into rate_use (limit_id, key, used_at, execution_id)
  select t.id, b.keys::json ->> t.place::int, p_now, b.execution_id
  from unnest(v_taken) b cross join (
    select id, kind, row_number() over (order by id) as place from task_limit
    where task_id = (select task_id from lane where id = p_lane)) t
  where t.kind = 'rate' and b.is_start
  on conflict do nothing;
  update backlog_key k set turn = nextval('execution_ord')
  from (select distinct is_start, keys from unnest(v_taken)) b
  where k.lane_id = p_lane and k.is_start = b.is_start and k.keys = b.keys;
  return array(select row(b.lane_id, b.priority, b.ord, b.execution_id, b.cached_by, b.cached_seq, b.cached_open)::ready
               from unnest(v_taken) b);
end $$;

-- ---------------------------------------------------------------- time

-- When the next start of a rate limit that holds work back is forgotten.
create or replace function next_gate() returns timestamptz
language plpgsql stable set search_path from current as $$
begin
  if not exists (select from rate_use) then
    return null;
  end if;
  return (
    select min(u.used_at + t.period)
    from task_limit t
    cross join lateral (select used_at from rate_use where limit_id = t.id order by used_at limit 1) u
    where t.kind = 'rate' and exists (
      select from lane l cross join lateral (select from backlog b where b.lane_id = l.id limit 1) held
      where l.task_id = t.task_id));
end $$;

-- Forgets starts that no longer count and has their lanes looked at; passes over those that somebody else is forgetting.
-- Returns the lanes.
create or replace function open_gates(p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_lanes int[];
begin
  if not exists (select from rate_use) then
    return '{}'::int[];
  end if;
  with gone as (
    delete from rate_use where ctid = any(array(
      select u.ctid from task_limit t join rate_use u on u.limit_id = t.id and u.used_at <= p_now - t.period
      where t.kind = 'rate' for update of u skip locked))
    returning limit_id, key
  ), looks as (
    insert into look (lane_id, limit_id, key)
    select l.id, g.limit_id, g.key
    from (select distinct limit_id, key from gone) g
    join task_limit t on t.id = g.limit_id join lane l on l.task_id = t.task_id and l.is_limited
    returning lane_id
  )
  select array_agg(distinct lane_id) into v_lanes from looks;
  return coalesce(v_lanes, '{}');
end $$;

-- Looks at all limits afresh: permits without a lease go; lanes and work that slipped past a change of limits are put
-- right. Waits for no call that is throttled in an open transaction. Returns the lanes that may admit more.
create or replace function sweep_limits(p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_tasks int[];
begin
  delete from throttle where (task_id, key) in (
    select task_id, key from throttle where until <= p_now for update skip locked);
  if not exists (select from task_limit) and not exists (select from backlog)
     and not exists (select from lane where is_limited) and not exists (select from look) then
    return '{}'::int[];
  end if;
  v_tasks := array(select distinct task_id from lane where is_limited
                   or exists (select from task_limit t where t.task_id = lane.task_id)
                   or exists (select from backlog b where b.lane_id = lane.id offset 0)
                   or exists (select from look k where k.lane_id = lane.id offset 0));
  perform lock_limits(v_tasks);
  -- a lane that was made while the limits changed
  update lane set is_limited = not is_limited, limits_changed_at = clock_timestamp() where id in (
    select l.id from lane l
    where l.task_id = any(v_tasks) and l.is_limited <> exists (select from task_limit t where t.task_id = l.task_id)
    for no key update skip locked);
  perform align(v_tasks);
  return open_gates(p_now) || release_permits(array(
    select distinct p.execution_id from permit p
    where not exists (select from lease l where l.execution_id = p.execution_id offset 0)));
end $$;

-- ---------------------------------------------------------------- changing limits

-- Brings ready rows, backlog and permits of tasks in line with their lanes. The caller holds their locks. What somebody
-- else is moving is left to the next sweep.
create or replace function align(p_tasks int[]) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_limited int[] := array(select id from lane where task_id = any(p_tasks) and is_limited);
  v_free int[] := array(select id from lane where task_id = any(p_tasks) and not is_limited);
  v_lane int;
  v_moved ready[];
begin
  foreach v_lane in array v_limited loop
    v_moved := take_ready(whole_lane(v_lane), 2147483647);
    perform hold_back(v_moved);
  end loop;
  with moved as (
    delete from backlog where execution_id in (
      select execution_id from backlog where lane_id = any(v_free) for update skip locked) returning *
  )
  select array_agg(row(m.lane_id, m.priority, m.ord, m.execution_id, m.cached_by, m.cached_seq, m.cached_open)::ready)
  into v_moved from moved m;
  perform put_ready(v_moved);
  delete from look where lane_id = any(v_free);
  -- What runs already counts. Only a claim that was under way when the limits changed can have taken it without.
  v_limited := array(select id from lane where id = any(v_limited)
                     and limits_changed_at > clock_timestamp() - interval '1 minute');
  if cardinality(v_limited) = 0 then
    return;
  end if;
  insert into permit (execution_id, limit_id, key)
  select e.id, t.id, limit_key(t.key_path, e.payload)
  from lease s cross join lateral (select * from execution k where k.id = s.execution_id offset 0) e
  join lane l on l.id = e.lane_id join task_limit t on t.task_id = l.task_id and t.kind = 'concurrency'
  where e.lane_id = any(v_limited)
    and not exists (select from permit p where p.execution_id = e.id and p.limit_id = t.id offset 0)
  on conflict do nothing;
end $$;

-- Brings everything of a task in line with its limits as they are now. What others commit meanwhile must be seen.
create or replace function apply_limits(p_task int) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_lanes int[];
  v_begin text;
begin
  if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
    raise exception 'limits are changed in a transaction at read committed, not %',
      current_setting('transaction_isolation') using errcode = 'PC003';
  end if;
  perform lock_limits(array[p_task]);
  with changed as (
    update lane l
    set is_limited = exists (select from task_limit t where t.task_id = l.task_id),
        limits_changed_at = clock_timestamp()
    where task_id = p_task returning id
  )
  select array_agg(id) into v_lanes from changed;
  delete from permit p where not exists (select from task_limit t where t.id = p.limit_id);
  delete from rate_use u where not exists (select from task_limit t where t.id = u.limit_id);
  perform align(array[p_task]);
  -- the keys of what waits are those of the limits as they are now
  v_begin := keys_begin(array(select t from task_limit t where t.task_id = p_task));
  perform fit_keys(array(
    select row(s.lane_id, s.is_start, s.keys, null, null)::look
    from (select distinct lane_id, is_start, keys from backlog
          where lane_id = any(v_lanes) and not starts_with(keys, v_begin)) s));
  delete from backlog_key where lane_id = any(v_lanes);
  insert into look (lane_id, is_start, keys)
  select distinct lane_id, is_start, keys from backlog where lane_id = any(v_lanes);
end $$;

-- Writes what code says of its tasks' flow. p_tasks: [{name, expires? (seconds), window_start?, window_end?,
-- window_zone?, limits?: [{kind, key_path, max, seconds}]}]
create or replace function flow_as_declared(p_tasks json) returns void
language plpgsql volatile set search_path from current as $$
begin
  update task k
  set expires_in = make_interval(secs => t.expires), window_start = t.window_start, window_end = t.window_end,
      window_zone = t.window_zone
  from json_to_recordset(p_tasks)
    as t(name text, expires float8, window_start time, window_end time, window_zone text)
  where k.name = t.name and (k.expires_in, k.window_start, k.window_end, k.window_zone)
    is distinct from (make_interval(secs => t.expires), t.window_start, t.window_end, t.window_zone);
  perform declare_limits(p_tasks);
end $$;

-- The tasks whose limits code declares otherwise than they are. p_tasks: as for flow_as_declared.
create or replace function limits_to_change(p_tasks json) returns int[]
language plpgsql stable set search_path from current as $$
begin
  return array(
    select k.id from json_to_recordset(p_tasks) as n(name text, limits json) join task k on k.name = n.name
    cross join lateral (
      select count(*) filter (where l.id is null or (l.declared_max, l.declared_period)
                              is distinct from (d.max, make_interval(secs => d.seconds))) as changed, count(*) as declared
      from json_to_recordset(case when json_typeof(n.limits) = 'array' then n.limits else '[]' end)
        as d(kind text, key_path text, max int, seconds float8)
      left join task_limit l on l.task_id = k.id and l.kind = d.kind and l.key_path is not distinct from d.key_path) d
    where d.changed > 0
      or d.declared <> (select count(*) from task_limit l where l.task_id = k.id and l.declared_max is not null));
end $$;

-- Declares the limits of tasks as code has them.
create or replace function declare_limits(p_tasks json) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_task int;
  v_changed int[];
  v_more int[];
begin
  with changed as (
    insert into task_limit as t (task_id, kind, key_path, declared_max, declared_period)
    select k.id, d.kind, d.key_path, d.max, make_interval(secs => d.seconds)
    from json_to_recordset(p_tasks) as n(name text, limits json)
    join task k on k.name = n.name
    cross join lateral json_to_recordset(n.limits) as d(kind text, key_path text, max int, seconds float8)
    where json_typeof(n.limits) = 'array'
    order by 1, 2, 3
    on conflict (task_id, kind, key_path) do update
    set declared_max = excluded.declared_max, declared_period = excluded.declared_period
    where (t.declared_max, t.declared_period) is distinct from (excluded.declared_max, excluded.declared_period)
    returning task_id
  )
  select array_agg(distinct task_id) into v_changed from changed;
  with gone as (
    select t.id, t.task_id, t.operator_max from task_limit t join task k on k.id = t.task_id
    join json_to_recordset(p_tasks) as n(name text, limits json) on n.name = k.name
    where t.declared_max is not null and (json_typeof(n.limits) is distinct from 'array' or not exists (
      select from json_to_recordset(n.limits) as d(kind text, key_path text)
      where d.kind = t.kind and d.key_path is not distinct from t.key_path))
  ), forgotten as (
    update task_limit t set declared_max = null from gone g where t.id = g.id and g.operator_max is not null
    returning t.task_id
  ), removed as (
    delete from task_limit t using gone g where t.id = g.id and g.operator_max is null returning t.task_id
  )
  select array_agg(task_id) into v_more from (select * from forgotten union select * from removed) c;
  for v_task in select distinct unnest(v_changed || v_more) order by 1 loop
    perform apply_limits(v_task);
  end loop;
end $$;

-- Changes a limit while everything runs; null gives it back to the code. Zero stops the task's starts.
-- Returns false for an unknown task, or for null where there is no such limit. Errors: PC003 for what no limit can be,
-- and above read committed.
create or replace function set_limit(
  p_task text, p_max int, p_kind text default 'concurrency', p_key_path text default null,
  p_period interval default null
) returns boolean
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_task int := (select id from task where name = p_task);
  v_found boolean := true;
begin
  if v_task is null then
    return false;
  end if;
  perform lock_limits(array[v_task]);  -- before any row, as register_tasks does
  if p_max is null then
    update task_limit set operator_max = null, operator_period = null
    where task_id = v_task and kind = p_kind and key_path is not distinct from p_key_path and declared_max is not null;
    v_found := found;
    delete from task_limit
    where task_id = v_task and kind = p_kind and key_path is not distinct from p_key_path and declared_max is null;
    v_found := v_found or found;
  elsif p_max < 0 then
    raise exception 'a limit is at least 0, not %', p_max using errcode = 'PC003';
  else
    update task_limit set operator_max = p_max, operator_period = coalesce(p_period, operator_period)
    where task_id = v_task and kind = p_kind and key_path is not distinct from p_key_path;
    if not found and p_kind = 'rate' and p_period is null then
      raise exception 'task % has no such rate limit: say its period', p_task using errcode = 'PC003';
    elsif not found then
      insert into task_limit as t (task_id, kind, key_path, operator_max, operator_period)
      values (v_task, p_kind, p_key_path, p_max, p_period)
      on conflict (task_id, kind, key_path) do update
      set operator_max = excluded.operator_max, operator_period = coalesce(excluded.operator_period, t.operator_period);
    end if;
  end if;
  perform apply_limits(v_task);
  perform pg_notify(current_schema(), 'ready ' || (select string_agg(distinct queue_id::text, ' ') from lane
                                                   where task_id = v_task));
  return v_found;
end $$;
