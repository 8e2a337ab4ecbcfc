-- beat, timers and sweep: what happens because time passes. Each looks at what is, never at what it heard.
-- Called by every process; the work itself is done by one at a time (a lock that is tried, never waited for).
-- Locks: as in 00_locks.sql; the sweep takes the row of a dead orchestrator for update.

-- p_places, p_steps, p_blocked: what the process has to tell, as the columns of its row have it.
-- Returns {alive, cancel: [execution ids to tell], stop: a migration that breaks this release waits for the process}.
-- A process that is not alive must stop what it runs.
create or replace function beat(
  p_orchestrator uuid, p_stopping boolean default false, p_now timestamptz default null, p_places json default null,
  p_steps json default null, p_blocked json default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_told json;
  v_alive boolean;
  v_stop boolean;
begin
  update orchestrator
  set beat_at = v_now, places = p_places, steps = p_steps, blocked = p_blocked,
      stopping_at = case when p_stopping then coalesce(stopping_at, v_now) end
  where id = p_orchestrator
  returning stop_requested_at is not null into v_stop;
  v_alive := found;
  -- a signal stays until the lease is gone: this answer may be lost, or come before the reply of the claim
  delete from signal s
  where s.orchestrator_id = p_orchestrator and not exists (
    select from lease l where l.execution_id = s.execution_id and l.orchestrator_id = p_orchestrator offset 0);
  select json_agg(execution_id) into v_told from signal where orchestrator_id = p_orchestrator;
  return json_build_object('alive', v_alive, 'cancel', coalesce(v_told, '[]'), 'stop', coalesce(v_stop, false));
end $$;

-- Makes due work ready and answers due waits, a bounded number at a time. Returns how many.
create or replace function fire_timers(p_now timestamptz default null, p_limit int default 1000) returns int
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_due uuid[];
  v_parked uuid[];
  v_woken int[];
  v_expiry timestamptz;
  v_expired record;
  v_count int := 0;
  v_effects effects := row('{}'::int[], '{}'::text[]);
begin
  if not exists (select from timer where due_at <= v_now)
     and not exists (select from expiry where due_at <= v_now)
     and coalesce(next_gate() > v_now, true)
     and not exists (select from event_pending order by ord limit 1)
     or not pg_try_advisory_xact_lock(hashtext(current_schema()), 1000) then
    return 0;
  end if;
  v_parked := array(
    select t.execution_id from (select execution_id from timer where due_at <= v_now order by due_at limit p_limit) t
    where exists (select from wait w where w.execution_id = t.execution_id offset 0));
  -- one of the two a call, since each locks executions in order: what is due longer, but what others hold holds up nobody
  v_expiry := (select due_at from expiry where due_at <= v_now order by due_at limit 1);
  if v_expiry <= coalesce((select due_at from timer where execution_id = v_parked[1]), 'infinity') then
    select * into v_expired from expire_unstarted(v_now, p_limit);
    v_count := v_expired.p_count;
    v_effects := row(v_expired.p_lanes, v_expired.p_watchers)::effects;
  end if;
  if v_count = 0 and cardinality(v_parked) > 0 then
    v_effects := expire_waits(v_parked, v_now);
    v_count := cardinality(v_parked);
  end if;
  v_woken := deliver_events(v_now, p_limit);

  -- last, and passing over what a cancel holds: no lock on a timer is held while waiting for trees and executions
  v_due := array(
    select t.execution_id from timer t
    where t.due_at <= v_now and not exists (select from wait w where w.execution_id = t.execution_id offset 0)
    order by t.due_at limit p_limit for update skip locked);
  delete from timer where execution_id = any(v_due);
  perform put_ready(array(
    select row(lane_id, priority, ord, id, null, null, null)::ready from execution where id = any(v_due)), true);
  perform tell(v_effects.watchers);
  perform open_gates(v_now);
  perform hint_at(v_woken);
  return cardinality(v_due) + cardinality(v_woken) + v_count;
end $$;

-- Sends the hint that these lanes have new work, where the caller hands on nothing.
create or replace function hint_at(p_lanes int[]) returns void
language sql volatile set search_path from current as $$
  select pg_notify(current_schema(), 'ready ' || string_agg(distinct queue_id::text, ' '))
  from lane where id = any(p_lanes) having count(*) > 0
$$;

-- Fails what should have started by now and has not. What a process has claimed may still be given back unstarted: it is
-- looked at again. p_count: how many executions it has locked; what others hold it passes over.
create or replace function expire_unstarted(
  p_now timestamptz, p_limit int, out p_count int, out p_lanes int[], out p_watchers text[]
)
language plpgsql volatile set search_path from current as $$
declare
  v_due uuid[] := array(select execution_id from expiry where due_at <= p_now order by due_at limit p_limit);
  v_locked uuid[];
  v_unstarted uuid[];
  v_late uuid[];
  v_effects effects;
begin
  -- a call that replaces one holds it until its transaction ends, and may have moved its expiry
  v_locked := lock_free(v_due || array(select parent_id from execution where id = any(v_due) and parent_id is not null));
  v_due := array(
    select x.execution_id from expiry x join execution e on e.id = x.execution_id
    where x.execution_id = any(v_due) and x.due_at <= p_now
      and e.id = any(v_locked) and (e.parent_id is null or e.parent_id = any(v_locked)));
  v_unstarted := array(select id from execution where id = any(v_due) and outcome is null and started_at is null);
  v_late := take_out(v_unstarted) || array(select execution_id from timer where execution_id = any(v_unstarted));
  delete from timer where execution_id = any(v_late);
  delete from expiry where execution_id = any(v_due) and (execution_id <> all(v_unstarted) or execution_id = any(v_late));
  update expiry set due_at = p_now + interval '10 seconds' where execution_id = any(v_due);
  p_count := cardinality(v_locked);
  v_effects := finish(array(
    select row(e.id, 'failed', null, json_build_object('type', 'pgconductor.errors.Expired', 'message',
      format('task %L was not started within %s', t.name, t.expires_in)))::ended
    from execution e join lane l on l.id = e.lane_id join task t on t.id = l.task_id where e.id = any(v_late)), p_now);
  p_lanes := v_effects.lane_ids;
  p_watchers := v_effects.watchers;
end $$;

-- Answers what is due of parked executions: sleeps end; invocations and fan-outs time out, and their children are
-- cancelled unless they are to be kept; waits on started children return what there is.
create or replace function expire_waits(p_parked uuid[], p_now timestamptz) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_roots uuid[];
  v_due answer[];
  v_doomed uuid[];
  v_effects effects;
begin
  v_roots := array(select coalesce(root_id, id) from execution where id = any(p_parked));
  perform lock_trees('{}', v_roots);
  v_doomed := due_children(p_parked, p_now);
  perform lock_executions(p_parked || v_doomed || array(select open_descendants(v_doomed)));
  v_effects := row(look_before_timeout(p_parked, p_now), '{}')::effects;

  select array_agg(row(s.execution_id, s.name, s.round,
                       case when s.kind in ('sleep', 'wait') then 'completed' else 'timed_out' end,
                       case when s.kind = 'wait' then done_members(s.execution_id, s.name, s.round) end,
                       null)::answer) into v_due
  from step s join wait w on w.execution_id = s.execution_id
  where s.execution_id = any(p_parked) and s.status = 'pending' and s.index = 0 and s.due_at <= p_now;
  v_doomed := due_children(p_parked, p_now);
  v_effects := merge(v_effects, answer(v_due, null, p_now));
  perform stop_listening(v_due);
  if cardinality(v_doomed) > 0 then
    v_effects := merge(v_effects, time_out_children(v_due, v_doomed, p_now));
  end if;
  -- what is parked still had only a timer that came too early
  update timer t set due_at = n.due_at
  from (select s.execution_id, min(s.due_at) as due_at from step s
        where s.execution_id = any(p_parked) and s.status = 'pending' and s.index = 0 and s.due_at > p_now
        group by 1) n
  where t.execution_id = n.execution_id and t.due_at <= p_now;
  delete from timer t using wait w
  where t.execution_id = any(p_parked) and w.execution_id = t.execution_id and t.due_at <= p_now;
  return v_effects;
end $$;

-- The unfinished children of due operations that are not to be kept.
create or replace function due_children(p_parked uuid[], p_now timestamptz) returns uuid[]
language sql stable set search_path from current as $$
  select coalesce(array_agg(c.child_id), '{}')
  from step s
  cross join lateral (
    select child_id from open_child k where k.execution_id = s.execution_id and k.name = s.name and k.round = s.round offset 0) c
  where s.execution_id = any(p_parked) and s.status = 'pending' and s.index = 0 and s.due_at <= p_now
    and s.kind in ('invoke', 'invoke_all') and not s.keep_on_timeout
$$;

-- Cancels the children of operations that timed out; a fan-out's are noted first, and no longer counted, so that they
-- wake nobody.
create or replace function time_out_children(p_due answer[], p_doomed uuid[], p_now timestamptz) returns effects
language plpgsql volatile set search_path from current as $$
begin
  perform keep_timeouts(p_due, p_now);
  delete from wait_item i using unnest(p_due) d
  where i.execution_id = any(array[d.execution_id]) and i.name = d.name and i.round = d.round;
  return cancel_locked(p_doomed || array(select open_descendants(p_doomed)), 'its parent stopped waiting', p_now);
end $$;

-- Takes over from processes that stopped beating. No lease expires before the server has been up for as long as a
-- lease lasts: an outage of the database is nobody's crash.
-- It waits no longer than its lock_timeout for any lock, and does nothing then: it shares a connection with the beats of
-- its process, and others may wait for what it holds itself.
-- Returns {lost: how many executions were taken over, queues, watchers, prune: whether a prune would find something,
-- futile: whether a vacuum would be in vain, and nobody holds it off,
-- gave_up: in which statement it met a lock that others held on to}.
create or replace function sweep(p_expiry interval default '20 seconds', p_now timestamptz default null) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan set lock_timeout = '1s' as $$
declare
  v_now timestamptz := instant(p_now);
  v_context text;
begin
  if not pg_try_advisory_xact_lock(hashtext(current_schema()), 1001)
     or (p_now is null and pg_postmaster_start_time() + p_expiry > v_now) then
    return json_build_object('lost', 0);
  end if;
  return take_over(p_expiry, v_now);
exception when lock_not_available then
  get stacked diagnostics v_context = pg_exception_context;
  return json_build_object('lost', 0, 'gave_up', left(regexp_replace(v_context, '\s+', ' ', 'g'), 300));
end $$;

-- The executions that these processes hold, found by the numbers of the processes: with a snapshot held open there are
-- many dead leases, of which only the young are looked at. p_known: leases with these tokens are left out.
create or replace function held_by(p_orchestrators uuid[], p_known bigint[] default '{}') returns uuid[]
language plpgsql stable set search_path from current set enable_indexscan = off set enable_indexonlyscan = off set enable_bitmapscan = on as $$
declare
  v_numbers int[] := array(select number from orchestrator where id = any(p_orchestrators));
begin
  return array(
    select execution_id from lease
    where orchestrator_number = any(v_numbers) and orchestrator_id = any(p_orchestrators) and token <> all(p_known));
end $$;

-- What the sweep does, of which there is one at a time.
create or replace function take_over(p_expiry interval, p_now timestamptz) returns json
language plpgsql volatile set search_path from current as $$
declare
  v_dead uuid[];
  v_lost uuid[] := '{}'::uuid[];
  v_places text[];
  v_lanes int[];
  v_effects effects := row('{}'::int[], '{}'::text[]);
begin
  v_dead := array(select id from orchestrator where beat_at < p_now - p_expiry order by id for update skip locked);
  if cardinality(v_dead) > 0 then
    v_lost := held_by(v_dead);
  end if;
  if cardinality(v_lost) > 0 then
    v_effects := lose(v_lost, p_now);
    v_places := array(select host || ':' || pid from orchestrator where id = any(v_dead) order by 1);
  end if;
  delete from signal where orchestrator_id = any(v_dead);
  delete from orchestrator where id = any(v_dead);
  perform prune_events(p_now);
  v_lanes := v_effects.lane_ids || deliver_events(p_now) || sweep_limits(p_now);
  return json_build_object('lost', cardinality(v_lost), 'first_lost', v_lost[1:5], 'dead', v_places,
                           'queues', queues_of(v_lanes), 'watchers', v_effects.watchers, 'prune', is_prune_due(p_now), 'futile', note_vacuums());
end $$;

-- The ends of those among crashed executions whose crash budget is used up.
create or replace function crashed_too_often(p_ids uuid[]) returns ended[]
language sql stable set search_path from current as $$
  select coalesce(array_agg(row(e.id, 'failed', null, json_build_object('type', 'pgconductor.errors.WorkerLost',
    'message', format('the process that ran it was lost %s times', e.crashes)))::ended), '{}')
  from execution e join lane l on l.id = e.lane_id join task t on t.id = l.task_id
  where e.id = any(p_ids) and e.crashes >= t.max_crashes
$$;

-- Counts a crash for executions whose process is gone: they run again, or end when the budget is used up.
create or replace function lose(p_lost uuid[], p_now timestamptz) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_over uuid[];
  v_flagged uuid[];
  v_parents uuid[];
  v_roots uuid[];
  v_ended ended[];
  v_lanes int[];
begin
  select array_agg(coalesce(root_id, id)), array_agg(parent_id) filter (where parent_id is not null)
  into v_roots, v_parents from execution where id = any(p_lost);
  perform lock_trees('{}', v_roots);
  perform lock_executions(p_lost || v_parents || array(select open_descendants(p_lost)));
  update execution e set crashes = e.crashes + 1, started_at = coalesce(e.started_at, l.claimed_at)
  from lease l where e.id = any(p_lost) and l.execution_id = e.id;
  perform put_unseen_behind(p_lost);
  delete from lease where execution_id = any(p_lost);
  v_lanes := release_permits(p_lost);
  v_flagged := array(select id from execution where id = any(p_lost) and cancel_requested_at is not null);
  v_ended := crashed_too_often(array(select id from unnest(p_lost) id where id <> all(v_flagged)));
  v_over := array(select id from unnest(v_ended));
  v_ended := v_ended || cancelled(v_flagged);
  v_lanes := v_lanes || make_ready(array(select id from unnest(p_lost) id where id <> all(v_over) and id <> all(v_flagged)));
  if coalesce(cardinality(v_ended), 0) = 0 then
    return row(v_lanes, '{}')::effects;
  end if;
  return merge(row(v_lanes, '{}')::effects, finish(v_ended, p_now));
end $$;

-- Gives back, at no cost, what a living process holds and does not know of: a claim whose reply was lost.
-- p_known: the tokens of the claims whose replies it has.
create or replace function reconcile(p_orchestrator uuid, p_known bigint[], p_now timestamptz default null) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
begin
  if not hold_alive(p_orchestrator) then
    return null;
  end if;
  return json_build_object('queues', queues_of(give_back(p_orchestrator, p_known, false, instant(p_now))));
end $$;

-- Makes what a process holds ready without counting anything against it; what is cancelled ends. p_known: as for held_by.
-- While it waits for locks another process may claim what this one held: only leases that are this one's still go.
-- p_may_have_begun: handlers may have been called; then a call that replaces or expires them comes too late.
create or replace function give_back(
  p_orchestrator uuid, p_known bigint[], p_may_have_begun boolean, p_now timestamptz
) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[] := held_by(array[p_orchestrator], p_known);
  v_held uuid[];
  v_flagged uuid[];
  v_effects effects := row('{}'::int[], '{}'::text[]);
begin
  perform lock_executions(v_ids || array(select parent_id from execution where id = any(v_ids)
                                         and parent_id is not null));
  v_held := array(select execution_id from lease where execution_id = any(v_ids)
                  and orchestrator_id = p_orchestrator and token <> all(p_known));
  v_flagged := array(select id from execution where id = any(v_held) and cancel_requested_at is not null);
  if cardinality(v_flagged) > 0 then
    v_effects := finish(cancelled(v_flagged), p_now);
  end if;
  if p_may_have_begun then
    update execution e set started_at = l.claimed_at
    from lease l where e.id = any(v_held) and e.started_at is null and l.execution_id = e.id;
    perform put_unseen_behind(v_held);
  end if;
  delete from lease where execution_id = any(v_held);
  perform tell(v_effects.watchers);
  return v_effects.lane_ids || release_permits(v_held) || make_ready(array(select id from unnest(v_held) id where id <> all(v_flagged)));
end $$;

-- Ends a process' membership; whatever it still holds goes back at no cost. Called at the end of a stop, and with
-- the old id by a process that fenced itself.
create or replace function retire(p_orchestrator uuid, p_now timestamptz default null) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_lanes int[];
begin
  perform from orchestrator where id = p_orchestrator for update;
  if not found then
    return json_build_object('queues', '[]'::json);
  end if;
  v_lanes := give_back(p_orchestrator, '{}', true, instant(p_now));
  delete from signal where orchestrator_id = p_orchestrator;
  delete from orchestrator where id = p_orchestrator;
  return json_build_object('queues', queues_of(v_lanes));
end $$;
