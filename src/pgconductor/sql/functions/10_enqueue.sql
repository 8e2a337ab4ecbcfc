-- enqueue: create executions, from anywhere. Called by the client (its own connection or the caller's), and by SQL.
-- States: none -> ready, or scheduled when a time is given. Locks: dedupe keys; the execution that a replace changes; for a
-- hint, an advisory lock that is tried and not waited for.
-- Returns {queues: [queue ids with new work], ids: in the order of the calls, null where they are those that were sent,
-- hinted: whether the commit sends the hint}. A repeated id (a reply was lost) is accepted once.
-- Errors: PC003 a payload is too large; a name that is none violates the tables' checks. A replace of an execution that
-- has started is no error: the earlier id is returned.

-- Finds the lanes of (task, queue) pairs and makes what is missing. A null queue is the task's own.
create or replace function ensure_lanes(p_tasks text[], p_queues text[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  insert into queue (name)
  select distinct x.name from (select unnest(p_queues || array['default']) as name) x
  where x.name is not null and not exists (select from queue where queue.name = x.name)
  order by 1 on conflict do nothing;
  insert into task (name, queue_id)
  select distinct x.name, q.id from (select unnest(p_tasks) as name) x
  join queue q on q.name = 'default'
  where not exists (select from task where task.name = x.name)
  order by 1 on conflict do nothing;
  insert into lane (queue_id, task_id, is_limited)
  select distinct coalesce(q.id, t.queue_id), t.id, exists (select from task_limit where task_id = t.id)
  from (select unnest(p_tasks) as name, unnest(p_queues) as queue) x
  join task t on t.name = x.name
  left join queue q on q.name = x.queue
  order by 1, 2 on conflict do nothing;
end $$;

-- The lanes of the pairs, one a pair, in their order.
create or replace function lanes_of(p_tasks text[], p_queues text[]) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_lanes int[];
begin
  for v_try in 1..2 loop
    select array_agg(l.id order by x.place) into v_lanes
    from unnest(p_tasks, p_queues) with ordinality as x(task, queue, place)
    left join task t on t.name = x.task
    left join queue q on q.name = x.queue
    left join lane l on l.task_id = t.id and l.queue_id = case when x.queue is null then t.queue_id else q.id end;
    exit when array_position(v_lanes, null) is null;
    perform ensure_lanes(p_tasks, p_queues);
  end loop;
  return v_lanes;
end $$;

-- Writes executions and the row that makes each of them ready or scheduled. Returns the lanes that have new work.
create or replace function insert_executions(p_new new_execution[], p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_is_delayed boolean;
  v_is_expiring boolean;
  v_lanes int[];
  v_limited int[];
begin
  insert into execution (id, ord, created_at, lane_id, priority, depth, parent_id, parent_step, parent_round,
                         parent_index, root_id, dedupe_key, trigger, payload, run_at, trigger_kind, trigger_data)
  select n.id, n.ord, p_now, n.lane_id, n.priority, n.depth, n.parent_id, n.parent_step, n.parent_round,
         n.parent_index, n.root_id, n.dedupe_key, n.trigger, n.payload, nullif(n.due_at, 'infinity'),
         n.trigger_kind, n.trigger_data
  from unnest(p_new) n;
  select bool_or(n.is_delayed), bool_or(t.expires_in is not null), coalesce(array_agg(l.id) filter (where n.is_ready), '{}'),
         coalesce(array_agg(l.id) filter (where l.is_limited), '{}')
  into v_is_delayed, v_is_expiring, v_lanes, v_limited
  from (select lane_id, bool_or(due_at > p_now) as is_delayed, bool_or(due_at is null or due_at <= p_now) as is_ready
        from unnest(p_new) group by 1) n
  cross join lateral (select * from lane k where k.id = n.lane_id offset 0) l
  cross join lateral (select expires_in from task k where k.id = l.task_id offset 0) t;
  if v_is_delayed then
    insert into timer (execution_id, due_at)
    select n.id, n.due_at from unnest(p_new) n where n.due_at > p_now;
  end if;
  if v_is_expiring then
    insert into expiry (execution_id, due_at)
    select n.id, coalesce(n.due_at, p_now) + t.expires_in
    from unnest(p_new) n join lane l on l.id = n.lane_id join task t on t.id = l.task_id
    where t.expires_in is not null and n.due_at is distinct from 'infinity';
  end if;
  -- as put_ready does, without a row in between for each of so many
  insert into ready (lane_id, priority, ord, execution_id)
  select n.lane_id, n.priority, n.ord, n.id from unnest(p_new) n
  where (n.due_at is null or n.due_at <= p_now) and n.lane_id <> all(v_limited);
  if cardinality(v_limited) > 0 then
    perform hold_back(array(
      select row(n.lane_id, n.priority, n.ord, n.id, null, null, null)::ready from unnest(p_new) n
      where (n.due_at is null or n.due_at <= p_now) and n.lane_id = any(v_limited)));
  end if;
  return v_lanes;
end $$;

-- Keeps the first execution of each (task, key); returns (new id, kept id) for the calls that lost.
create or replace function claim_keys(p_new new_execution[]) returns table (new_id uuid, kept_id uuid)
language plpgsql volatile set search_path from current as $$
declare
  v_new uuid[];
  v_kept uuid[];
begin
  loop
    insert into dedupe (task_id, key, execution_id)
    select l.task_id, n.dedupe_key, n.id
    from unnest(p_new) with ordinality as n join lane l on l.id = n.lane_id
    where n.dedupe_key is not null
    order by l.task_id, n.dedupe_key, n.ordinality
    on conflict do nothing;
    select array_agg(n.id), array_agg(d.execution_id) into v_new, v_kept
    from unnest(p_new) n join lane l on l.id = n.lane_id
    left join dedupe d on d.task_id = l.task_id and d.key = n.dedupe_key
    where n.dedupe_key is not null;
    -- a key that stood in the way and was removed with its execution is free
    exit when array_position(v_kept, null) is null;
  end loop;
  return query select k.id, k.kept from unnest(v_new, v_kept) as k(id, kept) where k.id <> k.kept;
end $$;

create or replace function has_started(p_execution execution) returns boolean
language sql immutable parallel safe
return p_execution.outcome is not null or p_execution.started_at is not null
  or p_execution.failures + p_execution.crashes > 0;

-- Gives an execution that has not started the payload, priority and time of a later call with the same key. Returns
-- whether it could.
create or replace function replace_unstarted(p_id uuid, p_with new_execution, p_now timestamptz) returns boolean
language plpgsql volatile set search_path from current as $$
declare
  v_old execution;
  v_found boolean;
begin
  -- looked at first without a lock: the caller's transaction may stay open for long, and timers would wait for its locks
  if has_started(e) or exists (select from lease where execution_id = p_id) from execution e where e.id = p_id then
    return false;
  end if;
  select * into v_old from execution where id = p_id for no key update;
  if has_started(v_old) then
    return false;
  end if;
  delete from timer where execution_id = p_id;
  v_found := found;
  v_found := v_found or take_out(array[p_id]) = array[p_id];
  if not v_found then
    return false;
  end if;
  update execution
  set payload = p_with.payload, priority = p_with.priority, run_at = p_with.due_at where id = p_id;
  if p_with.due_at > p_now then
    insert into timer values (p_id, p_with.due_at);
  else
    perform put_ready(array[row(v_old.lane_id, p_with.priority, v_old.ord, p_id, null, null, null)::ready]);
  end if;
  update expiry x set due_at = coalesce(p_with.due_at, p_now) + t.expires_in
  from lane l join task t on t.id = l.task_id
  where x.execution_id = p_id and l.id = v_old.lane_id and t.expires_in is not null;
  return true;
end $$;

-- Says which execution a throttled or debounced call means: its own when it is the one that its period lets in, else
-- that one. A debounced call that comes in time changes it; the period stays as it began.
create or replace function thin(
  p_task int, p_key text, p_with new_execution, p_until timestamptz, p_is_debounce boolean, p_now timestamptz
) returns uuid
language plpgsql volatile set search_path from current as $$
declare
  v_earlier throttle;
begin
  insert into throttle as t (task_id, key, execution_id, until) values (p_task, p_key, p_with.id, p_until)
  on conflict (task_id, key) do update
  set execution_id = excluded.execution_id, until = excluded.until where t.until <= p_now;
  if found then
    return p_with.id;
  end if;
  select * into v_earlier from throttle where task_id = p_task and key = p_key;
  p_with.due_at := v_earlier.until;
  if p_is_debounce and v_earlier.execution_id <> p_with.id
     and not replace_unstarted(v_earlier.execution_id, p_with, p_now) then
    update throttle set execution_id = p_with.id, until = p_until where task_id = p_task and key = p_key;
    return p_with.id;
  end if;
  return v_earlier.execution_id;
end $$;

-- Which of these ids is there already, or was: of a first try whose reply was lost.
create or replace function first_try(p_ids uuid[]) returns uuid
language plpgsql stable set search_path from current as $$
begin
  return (select id from (select id from execution where id = any(p_ids)
                          union all select execution_id from removed where execution_id = any(p_ids)) t limit 1);
end $$;

-- Of a repetition, the calls with keys whose first try is there or was, by itself or as another call with the same key:
-- {id: the id that it means}. Else a second call with a key that has been removed since would begin afresh.
create or replace function done_before(p_calls json) returns jsonb
language plpgsql stable set search_path from current as $$
begin
  return (
    select jsonb_object_agg(i.id, g.first_id)
    from (select first_try(array_agg(c.id order by c.place)) as first_id, array_agg(c.id) as ids
          from rows from (json_to_recordset(p_calls) as (id uuid, task text, dedupe_key text, throttle float8, debounce float8))
            with ordinality as c(id, task, dedupe_key, throttle, debounce, place)
          where c.dedupe_key is not null and num_nonnulls(c.throttle, c.debounce) = 0
          group by c.task, c.dedupe_key) g
    cross join lateral unnest(g.ids) as i(id)
    where g.first_id is not null);
end $$;

-- The same for many calls: {id: the id that it means}, of all that are throttled or debounced. Of equal calls the first
-- stands for all in a throttle, the last in a debounce. Keys in order, so that two batches do not deadlock.
create or replace function thin_calls(p_calls json, p_new new_execution[], p_now timestamptz) returns jsonb
language plpgsql volatile set search_path from current as $$
declare
  v_group record;
  v_id uuid;
  v_kept jsonb;
begin
  for v_group in
    select t.id as task_id, coalesce(c.dedupe_key, '') as key, c.debounce is not null as is_debounce,
           (array_agg(coalesce(c.throttle, c.debounce) order by c.place))[1] as seconds,
           array_agg(c.id order by c.place) as ids
    from rows from (json_to_recordset(p_calls) as (id uuid, task text, dedupe_key text, throttle float8,
      debounce float8)) with ordinality as c(id, task, dedupe_key, throttle, debounce, place)
    join task t on t.name = c.task
    where c.throttle is not null or c.debounce is not null
    group by 1, 2, 3 order by 1, 2, 3
  loop
    v_id := first_try(v_group.ids);
    if v_id is null then
      select thin(v_group.task_id, v_group.key, n, p_now + make_interval(secs => v_group.seconds),
                  v_group.is_debounce, p_now) into v_id
      from unnest(p_new) n
      where n.id = v_group.ids[case when v_group.is_debounce then cardinality(v_group.ids) else 1 end];
    end if;
    v_kept := coalesce(v_kept, '{}') || (select jsonb_object_agg(id, v_id) from unnest(v_group.ids) id);
  end loop;
  return v_kept;
end $$;

-- Gives kept executions what later calls with their keys ask for: after the insert, since the kept call may be of the
-- same batch; by id, so that two batches do not deadlock.
create or replace function replace_kept(p_calls json, p_new new_execution[], p_kept jsonb, p_now timestamptz)
returns void
language plpgsql volatile set search_path from current as $$
declare
  v_again record;
begin
  for v_again in
    select (p_kept ->> n.id::text)::uuid as id, n as call
    from unnest(p_new) n
    join json_to_recordset(p_calls) as c(id uuid, replace boolean) on c.id = n.id
    where c.replace and p_kept ->> n.id::text <> n.id::text
    order by 1, n.ord
  loop
    perform replace_unstarted(v_again.id, v_again.call, p_now);
  end loop;
end $$;

-- Sends the hint for lanes with new work at the commit, as enqueue's p_hint says; returns whether it does. A NOTIFY makes all others
-- of the server wait until its commit is on the disk. So one at a time has it, and the callers of the others send theirs.
create or replace function send_hint(p_hint text, p_lanes int[]) returns boolean
language plpgsql volatile set search_path from current as $$
declare
  v_queues text;
begin
  if cardinality(p_lanes) > 0 and (
    p_hint = 'always' or p_hint is not null and pg_try_advisory_xact_lock(hashtext(current_schema()), 1006))
  then
    select string_agg(distinct queue_id::text, ' ') into v_queues from lane where id = any(p_lanes);
    -- more than a hint can name concerns everybody
    perform pg_notify(current_schema(), case when length(v_queues) > 7900 then 'ready' else 'ready ' || v_queues end);
    return true;
  end if;
  return false;
end $$;

-- Names executions of one lane at the commit, which waits for no disk, so that a worker begins meanwhile: the call is
-- unconfirmed, and counts as accepted when confirm has been answered. One at a time, as send_hint. Returns whether it is
-- so; a hint holds 200 names.
create or replace function send_names(p_queue int, p_task int, p_ids uuid[]) returns boolean
language plpgsql volatile set search_path from current as $$
begin
  if cardinality(p_ids) > 200 or not pg_try_advisory_xact_lock(hashtext(current_schema()), 1006) then
    return false;
  end if;
  perform pg_notify(current_schema(), concat_ws(' ', 'named', p_queue, p_task, array_to_string(p_ids, ' '))),
          set_config('synchronous_commit', 'off', true);
  return true;
end $$;

-- p_calls: [{id, task, queue?, payload, priority?, run_at?, delay? (seconds), dedupe_key?, replace?, trigger? (cut after
--            500 characters), throttle? (seconds), debounce? (seconds)}]
-- p_hint: 'queue': send the hint with this commit, if nobody else sends one; 'always': send it. hinted says whether it does.
-- What enqueue_alike leaves to it comes with 'named', too, and is hinted by its queue.
-- p_lock_seconds: how long to wait for each lock, such as a key that another transaction has named and which is not over;
-- for a call that is a transaction of its own.
-- p_again: the call is a repetition after a lost reply; executions that exist already are left alone.
create or replace function enqueue(
  p_calls json, p_hint text default null, p_lock_seconds float8 default null, p_again boolean default false,
  p_now timestamptz default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_tasks text[];
  v_queues text[];
  v_lanes int[];
  v_new new_execution[];
  v_ids json;
  v_kept jsonb;
  v_thinned boolean;
  v_keyed boolean;
begin
  if p_lock_seconds is not null then
    perform set_config('lock_timeout', (1000 * p_lock_seconds)::int::text, true);
  end if;
  perform check_sizes(p_calls);
  v_kept := case when p_again then done_before(p_calls) end;
  select array_agg(x.task), array_agg(x.queue) into v_tasks, v_queues
  from (select distinct c.task, c.queue from json_to_recordset(p_calls) as c(task text, queue text)) x;
  v_lanes := lanes_of(v_tasks, v_queues);

  select array_agg(row(c.id, c.lane, nextval('execution_ord'), coalesce(c.priority, 0), 0, null, null, null, null,
                       null, case when c.throttle is null and c.debounce is null then c.dedupe_key end, left(c.trigger, 500),
                       c.payload, coalesce(c.run_at, v_now + make_interval(secs => coalesce(c.debounce, c.delay))),
                       null, null)::new_execution),
         bool_or(coalesce(c.throttle, c.debounce) is not null), bool_or(c.dedupe_key is not null)
  into v_new, v_thinned, v_keyed
  from (select c.*, x.lane
        from rows from (json_to_recordset(p_calls) as (id uuid, task text, queue text, payload json,
          priority smallint, run_at timestamptz, delay float8, dedupe_key text, trigger text, throttle float8,
          debounce float8)) with ordinality as c
        join unnest(v_tasks, v_queues, v_lanes) as x(task, queue, lane)
          on x.task = c.task and x.queue is not distinct from c.queue
        where not p_again or (first_try(array[c.id]) is null and (v_kept ->> c.id::text) is null)
        order by c.ordinality) c;

  if v_thinned then
    v_kept := coalesce(v_kept, '{}') || thin_calls(p_calls, v_new, v_now);
  end if;
  if v_keyed then
    v_kept := coalesce(v_kept, '{}') || coalesce((
      select jsonb_object_agg(k.new_id, k.kept_id) from claim_keys(v_new) k), '{}');
  end if;
  if v_kept is null then
    v_lanes := insert_executions(v_new, v_now);
  else
    select json_agg(coalesce(v_kept ->> c.id::text, c.id::text)) into v_ids
    from json_to_recordset(p_calls) as c(id uuid);
    v_lanes := insert_executions(array(
      select n from unnest(v_new) n where coalesce(v_kept ->> n.id::text, n.id::text) = n.id::text), v_now);
    perform replace_kept(p_calls, v_new, v_kept, v_now);
  end if;
  return json_build_object('queues', queues_of(v_lanes), 'ids', v_ids, 'hinted', send_hint(p_hint, v_lanes));
end $$;

-- The plain call, as most calls are: no key, time, throttle or debounce, for a lane that is there and has neither limit
-- nor expiry. Everything else, a repetition after a lost reply, and what is to be refused, is left to enqueue: the
-- effect is the same.
-- Two inserts and one lookup, two where a queue is named; half the cost of enqueue. An escaped character may be one that text
-- cannot hold (NUL, half of a pair): type json takes it, but enqueue does not, since whatever reads it as jsonb would fail.
-- p_hint: 'queue', as enqueue takes it, or 'named': see send_names. What is left to enqueue is not hinted.
create or replace function enqueue_one(
  p_id uuid, p_task text, p_queue text, p_priority smallint, p_payload json, p_hint text default null,
  p_again boolean default false, p_now timestamptz default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_queue int;
  v_lane record;
  v_ord bigint;
begin
  if p_queue is not null then
    v_queue := coalesce((select id from queue where name = p_queue), 0);  -- 0: there is none, and so no lane
  end if;
  select l.id, l.queue_id, t.id as task_id, t.window_start is null as is_open into v_lane
  from task t join lane l on l.task_id = t.id
  where t.name = p_task and not l.is_limited and t.expires_in is null
    and l.queue_id = coalesce(v_queue, t.queue_id);
  if p_again or not found or octet_length(p_payload::text) > 1048576 or position(E'\\u' in p_payload::text) > 0 then
    return enqueue(json_build_array(json_build_object(
      'id', p_id, 'task', p_task, 'queue', p_queue, 'priority', p_priority, 'payload', p_payload)),
      p_lock_seconds => 2, p_again => p_again, p_now => p_now);
  end if;
  v_ord := nextval('execution_ord');
  insert into execution (id, ord, created_at, lane_id, priority, payload)
  values (p_id, v_ord, instant(p_now), v_lane.id, p_priority, p_payload);
  insert into ready (lane_id, priority, ord, execution_id) values (v_lane.id, p_priority, v_ord, p_id);
  if p_hint is not distinct from 'named' and v_lane.is_open and send_names(v_lane.queue_id, v_lane.task_id, array[p_id]) then
    return ('{"queues":[' || v_lane.queue_id || '],"hinted":true,"unconfirmed":true}')::json;
  end if;
  if p_hint is null or not pg_try_advisory_xact_lock(hashtext(current_schema()), 1006) then
    return ('{"queues":[' || v_lane.queue_id || ']}')::json;
  end if;
  perform pg_notify(current_schema(), 'ready ' || v_lane.queue_id);
  return ('{"queues":[' || v_lane.queue_id || '],"hinted":true}')::json;
end $$;

-- Makes sure that an execution which was enqueued without waiting for the disk is there to stay, and all that were
-- enqueued in the same call with it: the commit of this call waits for the disk, or the standby, and what was committed
-- before it is there with it. Returns whether it is there, or was: a server that went down in between may have lost it.
create or replace function confirm(p_id uuid) returns boolean
language plpgsql volatile set search_path from current set enable_seqscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
begin
  perform pg_logical_emit_message(true, 'pgconductor', '');  -- without a change, nothing would be waited for
  return exists (select from execution where id = p_id) or exists (select from removed where execution_id = p_id);
end $$;

-- enqueue_one for calls that differ in nothing but their payloads: p_payloads is an array, in the order of p_ids. All
-- of them are named, or none.
create or replace function enqueue_alike(
  p_ids uuid[], p_task text, p_queue text, p_priority smallint, p_payloads json, p_hint text default null,
  p_again boolean default false, p_now timestamptz default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_queue int;
  v_lane record;
  v_now timestamptz := instant(p_now);
  v_ords bigint[];
begin
  if p_queue is not null then
    v_queue := coalesce((select id from queue where name = p_queue), 0);  -- 0: there is none, and so no lane
  end if;
  select l.id, l.queue_id, t.id as task_id, t.window_start is null as is_open into v_lane
  from task t join lane l on l.task_id = t.id
  where t.name = p_task and not l.is_limited and t.expires_in is null
    and l.queue_id = coalesce(v_queue, t.queue_id);
  if p_again or not found or octet_length(p_payloads::text) > 1048576 and exists (
    select from json_array_elements(p_payloads) p where octet_length(p.value::text) > 1048576)
    or position(E'\\u' in p_payloads::text) > 0
  then
    return enqueue((
      select json_agg(json_build_object(
        'id', c.id, 'task', p_task, 'queue', p_queue, 'priority', p_priority, 'payload', c.payload) order by c.place)
      from rows from (unnest(p_ids), json_array_elements(p_payloads)) with ordinality as c(id, payload, place)),
      p_hint => p_hint, p_lock_seconds => 2, p_again => p_again, p_now => p_now);
  end if;
  -- arrays are unfolded in the select list: after from, their rows would be stored before they are read
  v_ords := draw_ords(cardinality(p_ids));
  insert into execution (id, ord, created_at, lane_id, priority, payload)
  select unnest(p_ids), unnest(v_ords), v_now, v_lane.id, p_priority, json_array_elements(p_payloads);
  insert into ready (lane_id, priority, ord, execution_id)
  select v_lane.id, p_priority, unnest(v_ords), unnest(p_ids);
  if p_hint is not distinct from 'named' and v_lane.is_open and send_names(v_lane.queue_id, v_lane.task_id, p_ids) then
    return json_build_object('queues', array[v_lane.queue_id], 'hinted', true, 'unconfirmed', true);
  end if;
  return json_build_object('queues', array[v_lane.queue_id], 'hinted', send_hint(p_hint, array[v_lane.id]));
end $$;

-- For psql, triggers and other languages: one execution, in the caller's transaction.
create or replace function invoke(
  task text, payload jsonb default '{}', queue text default null, priority int default 0,
  run_at timestamptz default null, delay interval default null, dedupe_key text default null,
  on_duplicate text default 'keep', throttle interval default null, debounce interval default null
) returns uuid
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_id uuid := uuid7();
begin
  if coalesce(on_duplicate, '') not in ('keep', 'replace') then
    raise exception 'on_duplicate must be keep or replace, not %', on_duplicate using errcode = 'PC003';
  end if;
  if on_duplicate = 'replace' and (dedupe_key is null or num_nonnulls(throttle, debounce) > 0) then
    raise exception 'on_duplicate => replace needs a dedupe_key, and no throttle or debounce' using errcode = 'PC003';
  end if;
  if coalesce(task, '') = '' or queue = '' or dedupe_key = '' then
    raise exception 'task, queue and dedupe_key are names of 1 to 200 bytes, not empty' using errcode = 'PC003';
  end if;
  if delay < interval '0' or throttle <= interval '0' or debounce <= interval '0' then
    raise exception 'delay must not be negative, throttle and debounce must be more than zero' using errcode = 'PC003';
  end if;
  if num_nonnulls(throttle, debounce) = 2 or debounce is not null and num_nonnulls(run_at, delay) > 0 then
    raise exception 'throttle, debounce and, for debounce, run_at and delay exclude each other' using errcode = 'PC003';
  end if;
  if jsonb_typeof(payload) is distinct from 'object' then
    raise exception 'the payload of % must be a JSON object with one entry a parameter', task using errcode = 'PC003';
  end if;
  if not isfinite(run_at) then
    raise exception 'run_at must be finite, not %', run_at using errcode = 'PC003';
  end if;
  return coalesce((enqueue(json_build_array(json_build_object(
    'id', v_id, 'task', task, 'queue', queue, 'payload', payload, 'priority', priority, 'run_at', run_at,
    'delay', extract(epoch from delay), 'dedupe_key', dedupe_key, 'replace', on_duplicate = 'replace',
    'throttle', extract(epoch from throttle), 'debounce', extract(epoch from debounce))),
    p_hint => 'always') -> 'ids' ->> 0)::uuid, v_id);
end $$;
