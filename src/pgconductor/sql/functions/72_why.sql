-- why_not_running: what keeps an execution from running, in words and as facts. Called by people, from SQL or
-- `pgconductor runs why`. It reads, takes no locks, and is bounded: counts stop at 1,000, lists at 5.
-- Returns null for an unknown id, else {id, task, queue, state, summary, reasons: [{code, text, ...}]}: everything that
-- stands in the way now; summary is the text of the first. code is stable, text is not:
--
--   ended                 it has run; outcome, at             running               where, since when, in which steps
--   cancelling            told to stop, still unwinding       process_lost          its process shows no sign of life
--   cancelled_ancestor    which                               not_due, backing_off  due_at
--   held_in_fan_out       max_in_flight of which step         sleeping              step, due_at
--   waiting_for_child     step, child, its state, due_at      waiting_for_children  step, left, total, due_at
--   waiting_for_event     step, event, where, due_at          queue_paused          since
--   window_closed         opens_at                            concurrency_limit     max, key, holders
--   rate_limit            max, key, opens_at                  unknown_task          no code ever registered it
--   no_worker_for_queue   no live process works on it         no_worker_for_task    those that do lack its code
--   worker_blocked        processes: the event loops of all that would run it are blocked
--   next                  nothing: ahead, how many go first

create or replace function reason(p_code text, p_text text, p_facts jsonb default '{}') returns jsonb
language sql immutable parallel safe
return jsonb_build_object('code', p_code, 'text', p_text) || p_facts;

create or replace function words_for(p_at timestamptz) returns text
language sql stable parallel safe
return to_char(p_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS') || ' UTC';

create or replace function why_not_running(
  p_id uuid, p_expiry interval default '20 seconds', p_now timestamptz default null
) returns json
language plpgsql stable set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := coalesce(p_now, statement_timestamp());
  v_run executions;
  v_reasons jsonb;
begin
  select * into v_run from executions where id = p_id;
  if not found then
    return null;
  end if;
  v_reasons := why_cancelled(v_run) || case
    when v_run.state in ('completed', 'failed', 'cancelled') then jsonb_build_array(reason('ended', format('it %s at %s',
      case v_run.state when 'cancelled' then 'was cancelled' else v_run.state end, words_for(v_run.finished_at))
        || case when v_run.state = 'failed' then coalesce(': ' || left(v_run.error ->> 'message', 300), '') else '' end,
      jsonb_build_object('outcome', v_run.state, 'at', v_run.finished_at)))
    when v_run.state = 'running' then why_leased(p_id, p_expiry, v_now)
    when v_run.state = 'waiting' then why_parked(p_id, p_expiry, v_now)
    when v_run.state = 'scheduled' then why_scheduled(p_id, v_now)
    else why_ready(p_id, p_expiry, v_now) end;
  return json_build_object('id', v_run.id, 'task', v_run.task, 'queue', v_run.queue, 'state', v_run.state,
                           'summary', v_reasons -> 0 ->> 'text', 'reasons', v_reasons);
end $$;

-- The nearest ancestor whose end was requested.
create or replace function why_cancelled(p_run executions) returns jsonb
language sql stable set search_path from current as $$
  with recursive above (id, parent_id, requested_at, level) as (
    select e.id, e.parent_id, e.cancel_requested_at, 1 from execution e where e.id = p_run.parent_id
    union all
    select e.id, e.parent_id, e.cancel_requested_at, a.level + 1 from above a join execution e on e.id = a.parent_id
  )
  select coalesce(jsonb_agg(reason('cancelled_ancestor', format('its ancestor %s is or was cancelled', a.id),
                                   jsonb_build_object('ancestor', a.id, 'requested_at', a.requested_at))), '[]')
  from (select * from above where requested_at is not null order by level limit 1) a
  where p_run.state not in ('completed', 'failed')
$$;

-- The steps whose code runs, or that pause between two tries, as its process told with its last beat; those that are
-- recorded since are left out, and all that an earlier run did. began_at: of this try; null while it pauses. number: of
-- this try, or of the one that has failed; most: null where none has failed.
create or replace function running_steps(p_id uuid)
returns table (step text, began_at timestamptz, number int, most int, error text, next_at timestamptz)
language sql stable set search_path from current as $$
  select t.told ->> 1, o.beat_at - make_interval(secs => (t.told ->> 2)::float8), (t.told ->> 3)::int,
         (t.told ->> 4)::int, t.told ->> 5, o.beat_at + make_interval(secs => (t.told ->> 6)::float8)
  from lease l
  join orchestrator o on o.id = l.orchestrator_id and o.beat_at >= l.claimed_at
  cross join lateral json_array_elements(o.steps) with ordinality as t(told, place)
  where l.execution_id = p_id and (t.told ->> 0)::uuid = p_id
    and not exists (select from step s where s.execution_id = p_id and s.name = t.told ->> 1 and s.index = 0 and not s.dropped)
  order by t.place
$$;

create or replace function why_leased(p_id uuid, p_expiry interval, p_now timestamptz) returns jsonb
language sql stable set search_path from current as $$
  select jsonb_build_array(reason(
    case when o.beat_at <= p_now - p_expiry then 'process_lost'
         when e.cancel_requested_at is not null then 'cancelling' else 'running' end,
    format(case when o.beat_at <= p_now - p_expiry then 'its process, %s:%s, shows no sign of life; a sweep takes it over'
                when e.cancel_requested_at is not null then 'it runs on %s:%s since %s, and was told to stop'
                else 'it runs on %s:%s since %s' end, o.host, o.pid, words_for(l.claimed_at)) || coalesce(s.words, ''),
    jsonb_build_object('orchestrator', o.id, 'host', o.host, 'pid', o.pid, 'since', l.claimed_at, 'beat_at', o.beat_at,
                       'steps', s.facts)))
  from lease l join orchestrator o on o.id = l.orchestrator_id join execution e on e.id = l.execution_id
  cross join lateral (
    select string_agg(case
             when r.next_at is not null then format('; step %L failed (try %s of %s: %s), again at %s', r.step, r.number,
                                                    r.most, r.error, words_for(r.next_at))
             when r.most is null then format('; step %L runs since %s', r.step, words_for(r.began_at))
             else format('; step %L runs since %s (try %s of %s, after %s)', r.step, words_for(r.began_at), r.number,
                         r.most, r.error) end, '') as words,
           coalesce(jsonb_agg(to_jsonb(r)), '[]') as facts
    from (select * from running_steps(p_id) limit 5) r) s
  where l.execution_id = p_id
$$;

create or replace function why_scheduled(p_id uuid, p_now timestamptz) returns jsonb
language sql stable set search_path from current as $$
  select jsonb_build_array(case
    when m.due_at = 'infinity' then reason('held_in_fan_out', format(
      'max_in_flight of step %L of its parent lets it begin when one before it has ended', e.parent_step),
      jsonb_build_object('parent', e.parent_id, 'step', e.parent_step))
    when e.failures + e.crashes > 0 then reason('backing_off',
      format(case when e.failures > 0 then 'attempt %s failed; the next one is due at %s'
                  else 'its process died; it runs again at %2$s' end, e.failures, words_for(m.due_at)),
      jsonb_build_object('due_at', m.due_at, 'failures', e.failures, 'error', e.error ->> 'message'))
    else reason('not_due', format('it is due at %s', words_for(m.due_at)), jsonb_build_object('due_at', m.due_at)) end)
  from timer m join execution e on e.id = m.execution_id where m.execution_id = p_id
$$;

-- What a parked execution has open. Started children count only where nothing else is waited for.
create or replace function why_parked(p_id uuid, p_expiry interval, p_now timestamptz) returns jsonb
language sql stable set search_path from current as $$
  select coalesce(jsonb_agg(why_open(s, p_expiry, p_now) order by s.created_at, s.name), '[]')
  from (select * from step s
        where s.execution_id = p_id and s.index = 0 and s.status = 'pending' and not s.dropped
          and (s.kind <> 'start' or not exists (
            select from step o where o.execution_id = p_id and o.index = 0 and o.status = 'pending'
              and o.kind <> 'start' and not o.dropped))
        order by s.created_at, s.name limit 5) s
$$;

-- What one operation waits for; of a child that runs nowhere, what keeps it from that.
create or replace function why_open(p_step step, p_expiry interval, p_now timestamptz) returns jsonb
language sql stable set search_path from current as $$
  select case
    when p_step.kind = 'sleep' then reason('sleeping',
      format('step %L sleeps until %s', p_step.name, words_for(p_step.due_at)), facts)
    when p_step.kind = 'wait_for' then reason('waiting_for_event',
      format('step %L waits for event %L', p_step.name, p_step.child_task)
        || coalesce(' where ' || left(p_step.event_where::text, 200), '') || until,
      facts || jsonb_build_object('event', p_step.child_task, 'where', p_step.event_where))
    when p_step.child_id is not null then (
      select reason('waiting_for_child', format('step %L waits%s for its child %s, task %L, which is %s', p_step.name,
        ltrim(until, ','), p_step.child_id, p_step.child_task, coalesce(c.state, 'gone')) || coalesce(': ' || case c.state
          when 'ready' then why_ready(c.id, p_expiry, p_now) -> 0 ->> 'text'
          when 'scheduled' then why_scheduled(c.id, p_now) -> 0 ->> 'text' end, ''),
        jsonb_build_object('step', p_step.name, 'due_at', p_step.due_at, 'child', p_step.child_id,
                          'child_task', p_step.child_task, 'child_state', c.state))
      from (select 1) one left join executions c on c.id = p_step.child_id)
    else (
      select reason('waiting_for_children', format('step %L waits for %s more of %s children', p_step.name,
        i.left_count, case p_step.kind when 'wait' then m.linked else m.total end)
          || case when c.failed > 0 then format(', of which %s failed', c.failed) else '' end || until
          || coalesce(format('; the first that is open is %s, which is %s', f.id, f.state), ''),
        jsonb_build_object('step', p_step.name, 'due_at', p_step.due_at, 'left', i.left_count, 'failed', c.failed,
                          'first', f.id, 'total', case p_step.kind when 'wait' then m.linked else m.total end))
      from wait_item i
      cross join lateral (
        select count(*) filter (where e.outcome = 'failed') as failed,
               (array_agg(e.id order by e.parent_index) filter (where e.outcome is null))[1] as first
        from execution e where e.id = any(p_step.child_ids)) c
      left join executions f on f.id = c.first
      cross join lateral (
        select (select count(*) from wait_link k where k.execution_id = i.execution_id and k.item_name = i.name
                and k.item_round = i.round) as linked,
               cardinality(p_step.child_ids) as total) m
      where i.execution_id = p_step.execution_id and i.name = p_step.name and i.round = p_step.round) end
  from (select jsonb_build_object('step', p_step.name, 'due_at', p_step.due_at) as facts,
               coalesce(', until ' || words_for(p_step.due_at), '') as until) f
$$;

-- What keeps ready work from being claimed: what is closed, what is full, and who is not there.
create or replace function why_ready(p_id uuid, p_expiry interval, p_now timestamptz) returns jsonb
language plpgsql stable set search_path from current as $$
declare
  v_run execution;
  v_lane lane;
  v_task task;
  v_queue queue;
  v_reasons jsonb;
begin
  select * into v_run from execution where id = p_id;
  select * into v_lane from lane where id = v_run.lane_id;
  select * into v_task from task where id = v_lane.task_id;
  select * into v_queue from queue where id = v_lane.queue_id;
  v_reasons := why_unserved(v_task, v_queue, p_expiry, p_now);
  if v_queue.paused_at is not null then
    v_reasons := v_reasons || reason('queue_paused', format('queue %L is paused since %s', v_queue.name,
      words_for(v_queue.paused_at)), jsonb_build_object('since', v_queue.paused_at));
  end if;
  if v_task.window_start is not null and closes_in(v_task, p_now) is null then
    v_reasons := v_reasons || reason('window_closed', format('its window, %s to %s %s, opens at %s', v_task.window_start,
      v_task.window_end, v_task.window_zone, words_for(opens_at(v_task, p_now))),
      jsonb_build_object('opens_at', opens_at(v_task, p_now)));
  end if;
  v_reasons := v_reasons || why_limited(v_run, v_task, p_now);
  v_reasons := v_reasons || why_blocked(v_task, v_queue, p_expiry, p_now);
  return case when v_reasons = '[]' then jsonb_build_array(why_next(v_run)) else v_reasons end;
end $$;

-- When a closed window opens next.
create or replace function opens_at(p_task task, p_now timestamptz) returns timestamptz
language sql stable set search_path from current as $$
  select min(start) from (
    select ((p_now at time zone p_task.window_zone)::date + days + p_task.window_start)
      at time zone p_task.window_zone as start
    from generate_series(0, 2) days) s
  where start > p_now
$$;

create or replace function why_unserved(p_task task, p_queue queue, p_expiry interval, p_now timestamptz) returns jsonb
language sql stable set search_path from current as $$
  select case
    when p_task.registered_at is null then jsonb_build_array(reason('unknown_task',
      format('no process has ever registered task %L', p_task.name)))
    when w.serving = 0 then jsonb_build_array(reason('no_worker_for_queue',
      format('no live process works on queue %L', p_queue.name)))
    when w.knowing = 0 then jsonb_build_array(reason('no_worker_for_task', format(
      case when w.serving = 1 then 'the one live process that works on queue %2$L lacks the code of task %3$L'
           else 'none of the %s live processes that work on queue %L has the code of task %L' end,
      w.serving, p_queue.name, p_task.name)))
    else '[]' end
  from (select count(*) as serving,
               count(*) filter (where o.task_ids is null or p_task.id = any(o.task_ids)) as knowing
        from orchestrator o
        where o.beat_at > p_now - p_expiry and o.stopping_at is null and p_queue.name = any(o.queues)) w
$$;

-- That the event loop of each process which would run it is blocked, if it is; of which one, and by what.
create or replace function why_blocked(p_task task, p_queue queue, p_expiry interval, p_now timestamptz) returns jsonb
language sql stable set search_path from current as $$
  select case when count(*) > 0 and count(*) = count(o.blocked) then jsonb_build_array(reason('worker_blocked',
    format('the event loop of %s has been blocked for %s s by %s', (array_agg(o.host || ':' || o.pid order by o.id))[1],
      (array_agg(o.blocked ->> 'seconds' order by o.id))[1], (array_agg(o.blocked ->> 'by' order by o.id))[1])
      || case when count(*) > 1 then format(', and those of %s more that work on it are, too', count(*) - 1) else '' end,
    jsonb_build_object('processes', jsonb_agg(o.id order by o.id)))) else '[]' end
  from orchestrator o
  where o.beat_at > p_now - p_expiry and o.stopping_at is null and p_queue.name = any(o.queues)
    and (o.task_ids is null or p_task.id = any(o.task_ids))
$$;

-- The limits that let nothing in for this execution now.
create or replace function why_limited(p_run execution, p_task task, p_now timestamptz) returns jsonb
language sql stable set search_path from current as $$
  select coalesce(jsonb_agg(case t.kind
    when 'concurrency' then reason('concurrency_limit',
      format('the limit of %s running at once', f.max) || f.for_key || ' is full', jsonb_build_object(
        'max', f.max, 'key_path', t.key_path, 'key', f.key, 'holders', (
          select json_agg(h.execution_id) from (
            select execution_id from permit where limit_id = t.id and key = f.key order by 1 limit 5) h)))
    else reason('rate_limit',
      format('the limit of %s starts in %s s', f.max, trim_scale(extract(epoch from t.period))) || f.for_key
        || coalesce(' lets the next one in at ' || words_for(u.opens_at), ' lets nothing in'), jsonb_build_object(
        'max', f.max, 'key_path', t.key_path, 'key', f.key, 'opens_at', u.opens_at)) end order by t.id), '[]')
  from task_limit t
  cross join lateral (
    select coalesce(t.operator_max, t.declared_max) as max, limit_key(t.key_path, p_run.payload) as key,
           case when t.key_path is null then ''
                else format(' for %s %L', t.key_path, limit_key(t.key_path, p_run.payload)) end as for_key) f
  left join lateral (
    select r.used_at + t.period as opens_at from rate_use r
    where t.kind = 'rate' and r.limit_id = t.id and r.key = f.key and r.used_at > p_now - t.period
    order by r.used_at desc offset greatest(f.max - 1, 0) limit 1) u on f.max > 0
  where t.task_id = p_task.id and limit_left(t, f.key, p_now) <= 0
    and (t.kind = 'concurrency' or p_run.started_at is null)
$$;

-- Nothing stands in the way but what goes first: of the same task in the same queue, up to 1,000 are counted.
create or replace function why_next(p_run execution) returns jsonb
language sql stable set search_path from current as $$
  select reason('next', case ahead when 0 then 'nothing stands in its way: the next free slot takes it'
    else format('%s of its task go first', case when ahead < 1000 then ahead::text else '1,000 or more' end) end,
    jsonb_build_object('ahead', ahead))
  from (select count(*) as ahead from (
    select from ready r
    where r.lane_id = p_run.lane_id and place_of(r.priority, r.ord) < coalesce(
      (select place_of(o.priority, o.ord) from ready o
       where o.lane_id = p_run.lane_id and place_of(o.priority, o.ord) between
         place_of(p_run.priority, late_ord_min()) and place_of(p_run.priority, -1) and o.execution_id = p_run.id),
      place_of(p_run.priority, p_run.ord))
    limit 1000) a) n
$$;

-- Every process with what it works on: [{id, name, version, host, pid, queues, tasks, running_count, live, ...}].
create or replace function list_workers(p_expiry interval default '20 seconds', p_now timestamptz default null)
returns json
language sql stable set search_path from current as $$
  select coalesce(json_agg(row_to_json(w) order by w.started_at, w.id), '[]')
  from (select *, beat_at > instant(p_now) - p_expiry as live from workers order by started_at limit 10000) w
$$;
