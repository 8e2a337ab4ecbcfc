-- emit, subscriptions and waits: an event starts executions, and answers executions that wait for it.
-- Called by clients, by save on behalf of handlers, and by SQL (emit); by settle and save when a wait is opened
-- (listen); by the timers and the sweep (deliver_events).
-- States: none -> ready (what an event starts); waiting -> ready (what an event answers).
--
-- **What starts** is enqueued in the emitter's own transaction: it is there when that commits, and never if it does not.
--
-- **What waits** is not touched by the emitter, whose transaction may stay open for long: it would hold the locks of
-- executions that it knows nothing of. It leaves the event and a row in event_pending, and whoever looks next delivers
-- it (a hint makes that soon; the claims and the sweep make it sure). A wait does the same when it is opened: it looks
-- back once, and leaves a row in event_pending. Each row stays until it was looked at *after its commit*. So of an event
-- and a wait, in whatever order they were made and committed, the one that is looked at last meets the other as
-- committed. An opened wait keeps its snapshot, so that its second look is only at what the first could not see.
-- The removal of the event_wait row, under the lock of its execution, decides: one event a wait, one wake-up.
--
-- **Which events** answer a wait: those whose payload contains its predicate, emitted after the execution was created,
-- or committed after the wait was opened; the earliest first, and none that answered another wait of the execution.
--
-- Locks: emitting takes none but those of enqueue. Delivering takes one advisory lock that is tried (key 1005) and the
-- rows of the executions that it answers, passing over those that others hold: they keep their row in event_pending.
-- So it waits for nobody, and may follow whatever else its transaction holds.
-- Errors: PC003 for a name, payload or predicate that cannot be.

-- ---------------------------------------------------------------- how events and waits find each other

create or replace function probe_of(p_key text, p_value jsonb) returns bigint
language sql immutable parallel safe return hashtextextended(p_key, 0) # jsonb_hash_extended(p_value, 0);

-- The probes of a payload: of each scalar member, and 0, the probe of a wait that names none.
create or replace function probes_of(p_payload jsonb) returns bigint[]
language sql immutable parallel safe set search_path from current as $$
  select array_agg(probe) from (
    select 0::bigint as probe
    union all
    select probe_of(m.key, m.value)
    from jsonb_each(case jsonb_typeof(p_payload) when 'object' then p_payload else '{}' end) m
    where jsonb_typeof(m.value) not in ('object', 'array')) p
$$;

-- The probe of what a wait asks for: any one of its own will do.
create or replace function probe_of_wait(p_predicate jsonb) returns bigint
language sql immutable parallel safe set search_path from current as $$
  select coalesce((probes_of(p_predicate))[2], 0)
$$;

-- ---------------------------------------------------------------- emitting

-- Writes events and enqueues what they start; one that exists already (a reply was lost) is left alone.
-- p_events: [{id, name, payload}]. Returns the lanes that have new work.
create or replace function write_events(p_events json, p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_fresh uuid[];
begin
  with fresh as (
    insert into event (id, name, emitted_at, probes, payload)
    select e.id, e.name, p_now, probes_of(e.payload::jsonb), coalesce(e.payload, 'null')
    from rows from (json_to_recordset(p_events) as (id uuid, name text, payload json)) with ordinality
      as e(id, name, payload, place)
    order by e.place
    on conflict do nothing returning id
  )
  select array_agg(id) into v_fresh from fresh;
  if v_fresh is null then
    return '{}'::int[];
  end if;
  insert into event_pending (event_id) select unnest(v_fresh);
  return insert_executions(started_by(v_fresh), p_now);
end $$;

-- One execution for each event and each subscription that it fulfils. What several deployments declare in the same
-- words counts once. The predicate decides as @@ does, and cannot raise. Sorted below, and not in the aggregate: before
-- Postgres 16 that sorts what has its number already.
create or replace function started_by(p_events uuid[]) returns new_execution[]
language sql volatile set search_path from current as $$
  select array_agg(row(
    uuid7(), f.lane_id, nextval('execution_ord'), 0, 0, null, null, null, null, null, null, f.name, '{}', null, 'event',
    json_build_object('name', f.name, 'payload', pick_fields(f.payload, f.fields)))::new_execution)
  from (
    select l.id as lane_id, e.name, e.payload, s.fields
    from event e
    cross join lateral (
      select distinct task_id, fields, predicate from subscription where subscription.event = e.name) s
    join task t on t.id = s.task_id
    join lane l on l.task_id = t.id and l.queue_id = t.queue_id
    where e.id = any(p_events)
      and (s.predicate is null or jsonb_path_match_tz(e.payload::jsonb, s.predicate::jsonpath, '{}', true))
    order by e.ord, s.task_id) f
$$;

-- The named members of an object, as they stand in it; null stands for all.
create or replace function pick_fields(p_payload json, p_fields text[]) returns json
language sql stable set search_path from current as $$
  select case when p_fields is null or json_typeof(p_payload) <> 'object' then p_payload else
    (select coalesce(json_object_agg(m.key, m.value), '{}') from json_each(p_payload) m where m.key = any(p_fields)) end
$$;

create or replace function is_awaited(p_names text[]) returns boolean
language sql stable set search_path from current as $$
  select exists (select from unnest(p_names) n where exists (select from event_wait w where w.event = n offset 0))
$$;

-- p_events: [{id, name, payload}]; p_notify: send the hint with the commit.
-- Returns {queues: [queue ids with new work], awaited: whether somebody waits for such events}.
create or replace function emit_events(p_events json, p_notify boolean default false, p_now timestamptz default null)
returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_lanes int[];
  v_awaited boolean;
begin
  perform check_sizes(p_events);
  v_lanes := write_events(p_events, v_now);
  v_awaited := is_awaited(array(select e.name from json_to_recordset(p_events) as e(name text)));
  if p_notify and v_awaited then
    perform pg_notify(current_schema(), 'ready');
  elsif p_notify then
    perform send_hint('always', v_lanes);
  end if;
  return json_build_object('queues', queues_of(v_lanes), 'awaited', v_awaited);
end $$;

-- For psql, triggers and other languages: one event, in the caller's transaction. Returns its id.
create or replace function emit(event text, payload jsonb default '{}') returns uuid
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_id uuid := uuid7();
begin
  if event is null or octet_length(event) not between 1 and 200 or event ~ '[[:cntrl:]]' then
    raise exception 'an event''s name is 1 to 200 bytes of printable UTF-8, not %', quote_nullable(left(event, 100))
      using errcode = 'PC003';
  end if;
  if payload is null or octet_length(payload::text) > 1048576 then
    raise exception 'the payload of event % must be JSON of at most 1048576 bytes', quote_literal(event)
      using errcode = 'PC003';
  end if;
  perform emit_events(json_build_array(json_build_object('id', v_id, 'name', event, 'payload', payload)), true);
  return v_id;
end $$;

-- ---------------------------------------------------------------- subscriptions

-- Makes the subscriptions of one deployment those that its code declares; the others' are not touched. Returns which went, as
-- register_schedules does.
-- p_subscriptions: [{task, event, fields, where}]. Locks: one advisory lock a deployment.
create or replace function register_subscriptions(p_deployment text, p_subscriptions json) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_gone text[];
begin
  perform check_predicate(s.task, s.event, s."where")
  from json_to_recordset(p_subscriptions) as s(task text, event text, "where" text) where s."where" is not null;
  perform pg_advisory_xact_lock(hashtext(current_schema() || '.subscription'), hashtext(p_deployment));
  with gone as (
    delete from subscription s using task t
    where s.deployment = p_deployment and t.id = s.task_id and not exists (
      select from json_to_recordset(p_subscriptions) as d(task text, event text, fields json, "where" text)
      where d.task = t.name and d.event = s.event and s.signature = signature_of(d.fields, d."where"))
    returning s.event, t.name as task
  )
  select array_agg(distinct format('of task %L to %L', g.task, g.event)) into v_gone from gone g
  where not exists (
    select from json_to_recordset(p_subscriptions) as d(task text, event text) where d.task = g.task and d.event = g.event);
  insert into subscription (deployment, task_id, event, signature, fields, predicate)
  select p_deployment, t.id, d.event, signature_of(d.fields, d."where"),
         case when json_typeof(d.fields) = 'array' then array(select json_array_elements_text(d.fields)) end, d."where"
  from json_to_recordset(p_subscriptions) as d(task text, event text, fields json, "where" text)
  join task t on t.name = d.task
  order by 2, 3, 4
  on conflict do nothing;
  return to_json(v_gone);
end $$;

create or replace function signature_of(p_fields json, p_where text) returns text
language sql stable set search_path from current as $$
  select md5(json_build_array(nullif(p_fields::text, 'null'), p_where)::text)
$$;

-- Raises what Postgres itself says of a jsonpath that it cannot read.
create or replace function check_predicate(p_task text, p_event text, p_where text) returns void
language plpgsql stable set search_path from current as $$
begin
  perform p_where::jsonpath;
exception when others then
  raise exception 'task %: event(%): where: %', quote_literal(p_task), quote_literal(p_event), sqlerrm
    using errcode = 'PC003', detail = json_build_object(
      'place', format('task %L: event(%L): where', p_task, p_event), 'reason', sqlerrm,
      'remedy', 'write a jsonpath predicate over the payload, such as $.cents > 1000');
end $$;

-- ---------------------------------------------------------------- waiting

-- Opens waits of locked executions: those that an event answers already are answered, the others stay. A wait that is
-- open is left as it is. Nothing can be emitted unseen between the look and the commit: see above.
create or replace function listen(p_waits event_wait[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_snapshot pg_snapshot := pg_current_snapshot();
  v_wait event_wait;
  v_event event;
begin
  foreach v_wait in array coalesce(p_waits, '{}') loop
    insert into event_wait (execution_id, name, round, event, predicate, probe, since, snapshot)
    values (v_wait.execution_id, v_wait.name, v_wait.round, v_wait.event, v_wait.predicate,
            probe_of_wait(v_wait.predicate), v_wait.since, v_snapshot)
    on conflict do nothing returning * into v_wait;
    continue when not found;
    v_event := event_since(v_wait);
    if v_event.id is not null then
      perform give_event(v_event, array[v_wait], p_now);
    else
      insert into event_pending (execution_id, name, round) values (v_wait.execution_id, v_wait.name, v_wait.round);
    end if;
  end loop;
end $$;

-- The waits among new operations.
create or replace function waits_of(p_ops new_operation[]) returns event_wait[]
language plpgsql stable set search_path from current as $$
begin
  return (
    select array_agg(row(o.execution_id, o.name, o.round, o.event, o.event_where, 0, e.ord, null, 0)::event_wait
                     order by o.place)
    from unnest(p_ops) o
    cross join lateral (select ord from execution k where k.id = o.execution_id offset 0) e
    where o.kind = 'wait_for');
end $$;

-- The waits that an execution left open when it ended.
create or replace function waits_left_by(p_execution uuid) returns event_wait[]
language sql stable set search_path from current as $$
  select array_agg(row(s.execution_id, s.name, s.round, s.child_task, s.event_where, 0, e.ord, null, 0)::event_wait
                   order by s.seq)
  from step s join execution e on e.id = s.execution_id
  where s.execution_id = p_execution and s.kind = 'wait_for' and s.status = 'pending' and not s.dropped
$$;

-- The first event since the execution's creation that answers a wait.
create or replace function event_since(p_wait event_wait) returns event
language sql stable set search_path from current as $$
  select e from event e
  where e.name = p_wait.event and e.ord > p_wait.since
    and case when p_wait.probe = any(e.probes) then coalesce(e.payload::jsonb @> p_wait.predicate, true) end
    and not exists (select from step s where s.execution_id = p_wait.execution_id and s.event_id = e.id)
  order by e.ord limit 1
$$;

-- The first event that answers a wait and that its first look could not see: of a transaction that was under way then,
-- or came later. Few events are that young, so only the index on transactions leads to them: that on names leads to all,
-- and all since the oldest transaction of that time may be many, too, beside one that takes hours. What came with a
-- restore from a server that had counted its transactions further is not young: no snapshot of this one can have missed it.
create or replace function event_unseen(p_wait event_wait) returns event
language sql stable set search_path from current as $$
  select e::event
  from (select * from event where xact >= pg_snapshot_xmax(p_wait.snapshot)
        and xact < pg_snapshot_xmax(pg_current_snapshot())
        union all
        select * from event where xact = any(array(select pg_snapshot_xip(p_wait.snapshot))) offset 0) e
  where e.name = p_wait.event
    and case when p_wait.probe = any(e.probes) then coalesce(e.payload::jsonb @> p_wait.predicate, true) end
    and not exists (select from step s where s.execution_id = p_wait.execution_id and s.event_id = e.id)
  order by e.ord limit 1
$$;

-- The open waits that an event answers.
create or replace function waits_for(p_event event) returns setof event_wait
language sql stable set search_path from current as $$
  with it as materialized (select p_event.payload::jsonb as payload)
  select w::event_wait
  from it cross join (select distinct unnest(p_event.probes) as probe) p
  cross join lateral (select * from event_wait k where k.event = p_event.name and k.probe = p.probe offset 0) w
  cross join lateral (select outcome from execution k where k.id = w.execution_id offset 0) e
  where e.outcome is null
    and coalesce(it.payload @> w.predicate, true)
    and (p_event.ord > w.since or not pg_visible_in_snapshot(p_event.xact, w.snapshot)
                                  and p_event.xact < pg_snapshot_xmax(pg_current_snapshot()))
    and not exists (select from step s where s.execution_id = w.execution_id and s.event_id = p_event.id)
$$;

-- Answers waits of locked executions with an event and wakes those that are parked. Returns their lanes.
create or replace function give_event(p_event event, p_waits event_wait[], p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_given uuid[];
begin
  delete from event_wait where ctid = any(array(
    select w.ctid from unnest(p_waits) g cross join lateral (
      select ctid from event_wait k
      where k.execution_id = g.execution_id and k.name = g.name and k.round = g.round offset 0) w));
  with given as (
    update step s
    set status = 'completed', value = p_event.payload, error = null, event_id = p_event.id, finished_at = p_now,
        seq = nextval('step_seq')
    from unnest(p_waits) g
    where s.execution_id = g.execution_id and s.name = g.name and s.round = g.round and s.index = 0
      and s.status = 'pending'
    returning s.execution_id
  )
  select array_agg(execution_id) into v_given from given;
  return (wake(v_given)).lane_ids;
end $$;

-- ---------------------------------------------------------------- delivering

-- Brings events and waits together. Returns the lanes that have new work.
create or replace function deliver_events(p_now timestamptz, p_limit int default 1000) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_next event_pending;
  v_met record;
  v_done bigint[] := '{}'::bigint[];
  v_lanes int[] := '{}'::int[];
begin
  if not exists (select from event_pending order by ord limit 1)
     or not pg_try_advisory_xact_lock(hashtext(current_schema()), 1005) then
    return v_lanes;
  end if;
  perform drop_unanswered(p_limit * 10);
  for v_next in select * from event_pending order by ord limit p_limit loop
    if v_next.event_id is not null then
      select * into v_met from deliver_event(v_next.event_id, p_limit, p_now);
    else
      select * into v_met from look_again(v_next, p_now);
    end if;
    v_lanes := v_lanes || v_met.lanes;
    v_done := v_done || case when v_met.is_done then v_next.ord end;
  end loop;
  delete from event_pending where ord = any(v_done);
  return v_lanes;
end $$;

-- Drops at once what meets nothing: events that nobody can be waiting for, and waits for which nothing new has come.
create or replace function drop_unanswered(p_limit int) returns void
language sql volatile set search_path from current as $$
  delete from event_pending where ord = any(array(
    select p.ord from (select * from event_pending order by ord limit p_limit) p
    where p.event_id is not null and not exists (
        select from (select * from event k where k.id = p.event_id offset 0) e
        cross join lateral unnest(e.probes) b
        cross join lateral (select from event_wait w where w.event = e.name and w.probe = b offset 0) w)
      or p.event_id is null and not exists (
        select from (
          select * from event_wait k
          where k.execution_id = p.execution_id and k.name = p.name and k.round = p.round offset 0) w
        cross join lateral (
          select name from event where xact >= pg_snapshot_xmax(w.snapshot)
          and xact < pg_snapshot_xmax(pg_current_snapshot())
          union all
          select name from event where xact = any(array(select pg_snapshot_xip(w.snapshot))) offset 0) e
        where e.name = w.event offset 0)))
$$;

-- Gives one event to the first wait of each execution that it answers. is_done: nobody is left.
create or replace function deliver_event(p_id uuid, p_limit int, p_now timestamptz, out lanes int[], out is_done boolean)
language plpgsql volatile set search_path from current as $$
declare
  v_event event;
  v_ids uuid[];
  v_locked uuid[];
  v_waits event_wait[];
begin
  select * into v_event from event where id = p_id;
  v_ids := array(select distinct execution_id from waits_for(v_event) limit p_limit);
  v_locked := lock_free(v_ids);
  select array_agg(f.wait) into v_waits
  from (select distinct on (w.execution_id) w::event_wait as wait from waits_for(v_event) w
        where w.execution_id = any(v_locked) order by w.execution_id, w.ord) f;
  lanes := give_event(v_event, v_waits, p_now);
  is_done := cardinality(v_locked) = cardinality(v_ids) and cardinality(v_ids) < p_limit;
end $$;

-- Looks for the event that came while a wait was being opened. is_done: it has looked.
create or replace function look_again(p_at event_pending, p_now timestamptz, out lanes int[], out is_done boolean)
language plpgsql volatile set search_path from current as $$
declare
  v_wait event_wait;
  v_event event;
begin
  lanes := '{}';
  is_done := cardinality(lock_free(array[p_at.execution_id])) = 1;
  select * into v_wait from event_wait
  where execution_id = p_at.execution_id and name = p_at.name and round = p_at.round;
  if not is_done or not found then
    is_done := is_done or not found;
    return;
  end if;
  v_event := event_unseen(v_wait);
  if v_event.id is not null then
    lanes := give_event(v_event, array[v_wait], p_now);
  end if;
end $$;

-- Locks those executions that nobody else holds, and returns them.
create or replace function lock_free(p_ids uuid[]) returns uuid[]
language plpgsql volatile set search_path from current as $$
begin
  return array(select id from execution where id = any(p_ids) order by depth desc, id for no key update skip locked);
end $$;

-- The last look before waits of locked, parked executions time out: an event that is there and has not been delivered
-- yet comes first. Returns the lanes of those that it answers.
create or replace function look_before_timeout(p_parked uuid[], p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_wait event_wait;
  v_event event;
  v_lanes int[] := '{}'::int[];
begin
  for v_wait in
    select w.* from event_wait w
    join step s on s.execution_id = w.execution_id and s.name = w.name and s.round = w.round and s.index = 0
    where w.execution_id = any(p_parked) and s.status = 'pending' and s.due_at <= p_now
    order by w.ord
  loop
    v_event := event_since(v_wait);
    if v_event.id is null then
      v_event := event_unseen(v_wait);
    end if;
    if v_event.id is not null then
      v_lanes := v_lanes || give_event(v_event, array[v_wait], p_now);
    end if;
  end loop;
  return v_lanes;
end $$;

-- Forgets waits that were answered otherwise.
create or replace function stop_listening(p_answered answer[]) returns void
language sql volatile set search_path from current as $$
  delete from event_wait where ctid = any(array(
    select w.ctid from unnest(p_answered) a cross join lateral (
      select ctid from event_wait k
      where k.execution_id = a.execution_id and k.name = a.name and k.round = a.round offset 0) w))
$$;

-- ---------------------------------------------------------------- keeping and showing

-- Removes events that are older than they are kept, oldest first, a bounded number at a time. A wait looks back no
-- further than that. Called by the sweep.
create or replace function prune_events(p_now timestamptz, p_limit int default 5000) returns void
language sql volatile set search_path from current as $$
  delete from event where id = any(array(
    select o.id from (select id, emitted_at from event order by xact limit p_limit) o
    where o.emitted_at < p_now - (select keep_for from event_policy)
    except select event_id from event_pending))
$$;

-- Changes how long events are kept.
create or replace function keep_events(p_for interval) returns void
language sql volatile set search_path from current as $$
  update event_policy set keep_for = p_for
$$;

create or replace view events as
select id, name, payload::jsonb as payload, emitted_at from event;

-- The newest events, of one name or of all: [{id, name, payload, emitted_at}]; long payloads are cut to text.
create or replace function list_events(p_name text, p_limit int) returns json
language sql stable set search_path from current as $$
  select coalesce(json_agg(json_build_object('id', n.id, 'name', n.name, 'payload', n.payload,
                                             'emitted_at', n.emitted_at) order by n.ord desc), '[]')
  from (select id, name, emitted_at, ord, case when length(payload::text) <= 2000 then payload::json
                  else to_json(left(payload::text, 2000)) end as payload
        from event where p_name is null or name = p_name order by ord desc limit least(p_limit, 10000)) n
$$;

-- Every kind of event that starts or answers something: [{event, tasks: [...], waiting_count}].
create or replace function list_subscriptions() returns json
language sql stable set search_path from current as $$
  select coalesce(json_agg(row_to_json(k) order by k.event), '[]')
  from (select n.event,
               (select coalesce(json_agg(json_build_object('task', t.name, 'deployment', s.deployment,
                  'fields', s.fields, 'where', s.predicate) order by t.name, s.id), '[]')
                from subscription s join task t on t.id = s.task_id where s.event = n.event) as tasks,
               (select count(*) from event_wait w where w.event = n.event) as waiting_count
        from (select event from subscription union select event from event_wait) n limit 10000) k
$$;
