-- settle: give up leases, each with an outcome. One call for everything that finished since the last one.
-- Called by a worker's settler. States: running -> completed, failed, cancelled; ready (released, retried at once);
-- scheduled (retried later); waiting (parked), or ready again when what it waits for has already been answered.
-- Locks, in the order of 00_locks.sql: the caller's orchestrator row, trees, executions with their parents and open
-- descendants. A plain completion (no open child, nothing left behind) locks its own row and that of its parent. Where
-- all are plain, and of one depth, writing them locks them in that order, and their parents follow.
-- Fence: an outcome counts only while the lease (execution, orchestrator, token) exists; else its id is returned in
-- lost and nothing of it happens. A repetition after a lost reply is therefore harmless.
-- A cancel request wins: whatever the outcome says, the execution ends cancelled.
-- Returns {lost, queues: [queue ids with new work], watchers: [who is to be told], next_due: seconds}.

-- Completes executions whose children have all answered. They and their parents are locked, or they are all of one depth,
-- and p_parents are to be locked behind them.
create or replace function settle_plain(
  p_orchestrator uuid, p_completed uuid[], p_tokens bigint[], p_results json, p_parents uuid[], p_now timestamptz,
  inout p_lost uuid[], out p_lanes int[], out p_watchers text[]
)
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[];
  v_tokens bigint[];
  v_claimed timestamptz[];
  v_results json[];
  v_fleeting int[];
  v_cancelled uuid[];
  v_gone uuid[];
  v_answers answer[];
  v_counted ended_children[];
  v_effects effects := row('{}'::int[], '{}'::text[]);
begin
  select array_agg(l.execution_id order by l.execution_id), array_agg(l.token order by l.execution_id),
         array_agg(l.claimed_at order by l.execution_id)
  into v_ids, v_tokens, v_claimed
  from lease l where l.execution_id = any(p_completed) and l.orchestrator_id = p_orchestrator;
  if v_ids = p_completed and v_tokens = p_tokens then  -- all are held, and came in the order of their ids
    v_results := array(select json_array_elements(p_results));
  else  -- something was lost, sent twice, or out of order: each by itself
    select array_agg(l.execution_id order by l.execution_id), array_agg(l.claimed_at order by l.execution_id),
           array_agg(g.result order by l.execution_id)
    into v_ids, v_claimed, v_results
    -- unfolded in the select list: after from, their rows would be stored before they are read
    from (select unnest(p_completed) as id, unnest(p_tokens) as token, json_array_elements(p_results) as result) g
    cross join lateral (select * from lease k where k.execution_id = g.id offset 0) l
    where l.token = g.token and l.orchestrator_id = p_orchestrator;
  end if;

  -- whose ends may be kept not at all: few look further, kept_not decides
  v_fleeting := array(select l.id from keeps_nothing n join lane l on l.task_id = n.task_id);
  select * into v_cancelled, v_answers, v_gone, v_counted
  from write_completions(v_ids, v_claimed, v_results, v_fleeting, p_now);

  if cardinality(p_parents) > 0 then
    perform lock_executions(p_parents);
  end if;
  if v_cancelled is not null then
    v_effects := finish(cancelled(v_cancelled), p_now);
  end if;
  if v_answers is not null or v_counted is not null then
    v_effects := merge(v_effects, answer(v_answers, v_counted, p_now));
  end if;
  if v_gone is not null then
    v_gone := kept_not(v_gone, p_now);
  end if;
  p_lanes := v_effects.lane_ids || release_permits(v_ids);
  p_watchers := v_effects.watchers || watchers_of(v_ids);
  delete from lease where execution_id = any(v_ids);
  if cardinality(v_gone) > 0 then
    perform remove_ended(v_gone, p_now);
  end if;
  if coalesce(cardinality(v_ids), 0) < cardinality(p_completed) then
    p_lost := p_lost || array(select id from unnest(p_completed) id where v_ids is null or id <> all(v_ids));
  end if;
end $$;

-- Writes that executions are completed; their leases are held. Says which were to be cancelled, and are written as that, for
-- finish to end them; and of the others, what their parents are to be told, and which ends may be kept not at all
-- (p_fleeting: their lanes).
-- The rows are found in one scan of the index, not each by a descent from its root, and merged with their results in the
-- order of their ids, which is that of locks. No other plan is left: nothing else is read in here.
create or replace function write_completions(
  p_ids uuid[], p_claimed timestamptz[], p_results json[], p_fleeting int[], p_now timestamptz,
  out p_cancelled uuid[], out p_answers answer[], out p_gone uuid[], out p_counted ended_children[]
)
language plpgsql volatile set search_path from current set enable_nestloop = off set enable_hashjoin = off set enable_mergejoin = on set enable_bitmapscan = off as $$
begin
  with done as (
    update execution e
    set outcome = case when e.cancel_requested_at is null then 'completed'::outcome else 'cancelled' end, result = h.result,
        error = null, finished_at = p_now, started_at = coalesce(e.started_at, h.claimed_at)
    from (select unnest(p_ids) as id, unnest(p_claimed) as claimed_at, unnest(p_results) as result) h
    where e.id = h.id and e.id = any(p_ids) and e.outcome is null
    returning e.outcome, e.id, e.lane_id, e.parent_id, e.parent_step, e.parent_round, e.parent_index, h.result
  )
  select array_agg(d.id) filter (where d.outcome = 'cancelled'),
         array_agg(row(d.parent_id, d.parent_step, d.parent_round, 'completed', d.result, null)::answer)
            filter (where d.parent_index = 0 and d.outcome = 'completed'),
         array_agg(d.id) filter (where d.lane_id = any(p_fleeting) and d.outcome = 'completed'),
         (select array_agg(row(m.*)::ended_children) from (
           select parent_id, parent_step, parent_round, array_agg(parent_index) from done
           where parent_index > 0 and outcome = 'completed' group by 1, 2, 3) m)
  into p_cancelled, p_answers, p_gone, p_counted from done d;
end $$;

-- What a cancel request makes of executions, whatever they returned.
create or replace function cancelled(p_ids uuid[]) returns ended[]
language plpgsql stable set search_path from current as $$
begin
  return (
    select array_agg(row(id, 'cancelled', null, json_build_object(
      'type', 'pgconductor.errors.ExecutionCancelled', 'message', cancel_reason))::ended)
    from execution where id = any(p_ids));
end $$;

-- Locks, in one look, what outcomes and plain completions touch: their executions and parents, and the open descendants
-- of those that end. p_opening: who opens operations; p_plain: plain completions, and their parents.
create or replace function lock_for_settle(p_held settlement[], p_opening uuid[], p_plain uuid[]) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_creating uuid[];
  v_ending uuid[];
  v_cancelling uuid[];
  v_ids uuid[];
begin
  v_ending := array(
    select h.id from unnest(p_held) h where h.outcome in ('completed', 'failed', 'crashed') and (
      select true from step s where s.execution_id = h.id and s.status = 'pending'
        and num_nonnulls(s.child_id, s.child_ids) > 0 limit 1));
  select array_agg(coalesce(e.root_id, e.id)) filter (where h.outcome = 'parked' and h.id in (select unnest(p_opening))),
         array_agg(coalesce(e.root_id, e.id)) filter (where h.id = any(v_ending)),
         array_agg(h.id) || array_agg(e.parent_id) filter (where e.parent_id is not null)
  into v_creating, v_cancelling, v_ids
  from unnest(p_held) h cross join lateral (select * from execution k where k.id = h.id offset 0) e;
  perform lock_trees(v_creating, v_cancelling);
  perform lock_executions(v_ids || array(select open_descendants(v_ending)) || p_plain);
end $$;

-- Parks: opens what is new, then waits, unless something awaited has been answered already.
-- awaits: [{name, round, kind, awaited, members?: [step names], count?}]
create or replace function park(
  p_orchestrator uuid, p_parked settlement[], p_ops json, p_alike json, p_children uuid[], p_payloads json, p_now timestamptz
) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_lanes int[] := '{}'::int[];
  v_found record;
begin
  if json_array_length(p_ops) > 0 then
    v_lanes := open_operations(p_ops, p_alike, p_children, p_payloads, array(select id from unnest(p_parked)), p_now);
  end if;
  perform count_waits(p_parked, p_now);

  for v_look in 1..2 loop
    select array_agg(f.id) as ids, array_agg(f.is_cached) as is_cached, array_agg(f.unseen_since) as unseen_since,
           array_agg(f.due_at) as due_at, array_agg(f.open_names) as open_names,
           coalesce(array_agg(f.id) filter (where f.is_answered), '{}') as answered,
           bool_or(f.due_at is not null) as has_due, bool_or(f.has_unseen) as has_unseen
    into v_found from found_at_park(p_parked) f;
    exit when v_look = 2 or not v_found.has_unseen;
    perform put_behind(array(
      select k.row_at from unnest(p_parked) p
      cross join lateral json_to_recordset(p.awaits) as a(name text, round smallint)
      cross join lateral (
        select ctid as row_at from step k where k.execution_id = p.id and k.name = a.name and k.round = a.round
          and k.index = 0 and k.status <> 'pending' offset 0) k));
  end loop;
  insert into wait (execution_id, parked_at, cached_by, cached_seq, cached_open)
  select f.id, p_now, case when f.is_cached then p_orchestrator end, f.unseen_since, f.open_names
  from unnest(v_found.ids, v_found.is_cached, v_found.unseen_since, v_found.open_names)
    as f(id, is_cached, unseen_since, open_names);
  if v_found.has_due then
    insert into timer (execution_id, due_at)
    select f.id, f.due_at from unnest(v_found.ids, v_found.due_at) as f(id, due_at)
    where f.due_at is not null and f.id <> all(v_found.answered);
  end if;
  update execution e set started_at = p.claimed_at
  from (select p.claimed_at, k.row_at from unnest(p_parked) p cross join lateral (
          select ctid as row_at from execution k where k.id = p.id and k.started_at is null offset 0) k) p
  where e.ctid = p.row_at;
  return merge(row(v_lanes, '{}')::effects, wake(v_found.answered));
end $$;

-- What stands in the database of operations that parked executions have open: whether one that is awaited has been
-- answered, when the first is due, and after which position in step_seq the worker has seen nothing. Operations that it
-- thought open may have been answered while it ran. Only what is open can be answered, so a few names say where to look;
-- that pays where much is recorded (long).
create or replace function found_at_park(p_parked settlement[])
returns table (
  id uuid, is_cached boolean, is_answered boolean, has_unseen boolean, due_at timestamptz, unseen_since bigint, open_names json)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
begin
  return query
    select p.id, p.cached, coalesce(f.is_answered, false), f.first_answer is not null, f.due_at,
           least((select last_value from step_seq), f.first_answer - 1),
           case when p.cached and p.long and json_array_length(p.awaits) <= 10 then
             (select json_agg(a.name) from json_to_recordset(p.awaits) as a(name text)) end
    from unnest(p_parked) p
    cross join lateral (
      select bool_or(a.awaited and s.status <> 'pending') as is_answered,
             min(s.due_at) filter (where a.awaited) as due_at,
             min(s.seq) filter (where s.status <> 'pending') as first_answer
      from json_to_recordset(p.awaits) as a(name text, round smallint, awaited boolean)
      cross join lateral (
        select status, due_at, seq from step k
        where k.execution_id = p.id and k.name = a.name and k.round = a.round and k.index = 0 offset 0) s) f;
end $$;

-- Makes a row a wait on started children, with how many of them are still to answer.
create or replace function count_waits(p_parked settlement[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_full answer[];
begin
  if not exists (select from unnest(p_parked) p where position('"members"' in p.awaits::text) > 0) then
    return;
  end if;
  insert into wait_link (execution_id, child_step, item_name, item_round)
  select p.id, m.value, a.name, a.round
  from unnest(p_parked) p
  cross join lateral json_to_recordset(p.awaits) as a(name text, round smallint, kind step_kind, members json)
  cross join lateral json_array_elements_text(a.members) m
  on conflict do nothing;
  insert into wait_item (execution_id, name, round, kind, left_count)
  select p.id, a.name, a.round, a.kind, a.count - count(s.name) filter (where s.status <> 'pending')
  from unnest(p_parked) p
  cross join lateral json_to_recordset(p.awaits)
    as a(name text, round smallint, kind step_kind, members json, count int)
  cross join lateral (select distinct value from json_array_elements_text(a.members)) m
  left join step s on s.execution_id = p.id and s.name = m.value and s.index = 0
    and s.round = (select max(r.round) from step r where r.execution_id = p.id and r.name = m.value)
  group by p.id, a.name, a.round, a.kind, a.count
  on conflict (execution_id, name, round) do update set left_count = excluded.left_count;

  select array_agg(row(i.execution_id, i.name, i.round, 'completed', done_members(i.execution_id, i.name, i.round),
                       null)::answer) into v_full
  from unnest(p_parked) p join wait_item i on i.execution_id = p.id
  where i.kind = 'wait' and i.left_count <= 0;
  perform write_answers(v_full, p_now);
end $$;

-- Makes executions ready again, at once or after their delay. Those released keep their place before fresh work; those
-- unstarted stand where they stood, since nothing has happened to them but what kept them from it (error).
create or replace function requeue(p_again settlement[], p_now timestamptz) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_fresh record;
  v_later uuid[] := array(select id from unnest(p_again) where outcome = 'unstarted' and delay > 0);
begin
  update execution e
  set failures = e.failures + (a.outcome = 'retried')::int, error = coalesce(a.error, e.error),
      started_at = coalesce(e.started_at, case when a.outcome <> 'unstarted' then a.claimed_at end)
  from (select a.outcome, a.error, a.claimed_at, k.row_at from unnest(p_again) a
        cross join lateral (select ctid as row_at from execution k where k.id = a.id offset 0) k
        where a.outcome <> 'unstarted' or a.error is not null) a
  where e.ctid = a.row_at;
  for v_fresh in
    select a.id, f.name, f.round
    from unnest(p_again) a cross join lateral json_to_recordset(a.fresh) as f(name text, round smallint)
  loop
    update step set dropped = true, seq = nextval('step_seq')
    where execution_id = v_fresh.id and name = v_fresh.name and round = v_fresh.round;
  end loop;
  perform put_unseen_behind(array(select id from unnest(p_again) where outcome <> 'unstarted'));
  insert into timer (execution_id, due_at)
  select id, p_now + make_interval(secs => delay) from unnest(p_again) where delay > 0;
  if cardinality(v_later) > 0 then  -- put_back does so for those that go back at once
    perform forget_starts(array(select unstarted_of(v_later)));
  end if;
  return row(put_back(array(
    select id from unnest(p_again) where coalesce(delay, 0) <= 0)), '{}')::effects;
end $$;

-- p_completed: plain completions, with p_tokens and p_results beside them, since objects cost three times as much to read;
-- in any order, and their leases are read once if it is that of the ids, and all are held;
-- p_parents: their parents; p_level: they are all of one depth.
-- p_outcomes: [{id, token, outcome: completed | failed | retried | released | unstarted (claimed, and given back before its
--               handler was called) | crashed | parked, result, error, delay (seconds),
--               awaits, fresh: [{name, round}] (timed out operations that a retry does afresh), cached, long}]; null has the
--               server plan what a settle does to parents and children: a process says so as it begins
-- p_ops, p_alike, p_children, p_payloads: what the parked ones open, as open_operations takes it.
create or replace function settle(
  p_orchestrator uuid, p_completed uuid[], p_tokens bigint[], p_results json, p_outcomes json,
  p_now timestamptz default null, p_ops json default null, p_alike json default null, p_children uuid[] default null,
  p_payloads json default null, p_parents uuid[] default null, p_level boolean default false
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_memoize = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_plain record;
  v_lost uuid[] := '{}'::uuid[];
  v_held settlement[];
  v_effects effects := row('{}'::int[], '{}'::text[]);
begin
  if not hold_alive(p_orchestrator) then
    return null;
  end if;
  if p_outcomes is null then
    perform plan_settle(p_orchestrator, v_now);
  end if;
  perform check_values('result', p_results);
  perform check_sizes(p_outcomes);
  if json_array_length(p_outcomes) > 0 then
    select array_agg(row(o.id, o.outcome, o.result, o.error, o.delay, o.awaits, o.fresh, o.cached, o.long,
                         l.claimed_at)::settlement) filter (where l.execution_id is not null),
           v_lost || coalesce(array_agg(o.id) filter (where l.execution_id is null), '{}')
    into v_held, v_lost
    from json_to_recordset(p_outcomes) as o(id uuid, token bigint, outcome text, result json, error json,
      delay float8, awaits json, fresh json, cached boolean, long boolean)
    left join lateral (select * from lease k where k.execution_id = o.id offset 0) l
      on l.token = o.token and l.orchestrator_id = p_orchestrator;
  end if;
  if v_held is not null or not p_level then
    perform lock_for_settle(v_held, array(select id from json_to_recordset(p_ops) as o(id uuid)), p_completed || p_parents);
    p_parents := null;
  end if;
  if cardinality(p_completed) > 0 then
    select * into v_plain from settle_plain(
      p_orchestrator, p_completed, p_tokens, p_results, p_parents, v_now, v_lost);
    v_lost := v_plain.p_lost;
    v_effects := row(v_plain.p_lanes, v_plain.p_watchers)::effects;
  end if;
  if v_held is not null then
    v_effects := merge(v_effects, settle_held(p_orchestrator, v_held, p_ops, p_alike, p_children, p_payloads, v_now));
  end if;
  return json_build_object(
    'lost', v_lost, 'queues', queues_of(v_effects.lane_ids), 'watchers', v_effects.watchers,
    'next_due', next_due(v_now));
end $$;

-- Settles outcomes whose leases are held; the caller has locked what they touch.
create or replace function settle_held(
  p_orchestrator uuid, p_held settlement[], p_ops json, p_alike json, p_children uuid[], p_payloads json, p_now timestamptz
) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[];
  v_flagged uuid[];
  v_again settlement[];
  v_parked settlement[];
  v_crashed uuid[];
  v_over ended[];
  v_ended ended[];
  v_effects effects := row('{}'::int[], '{}'::text[]);
begin
  -- a first try of this very call may have gone on while its sender had given it up
  select array_agg(h.id), coalesce(array_agg(h.id) filter (where h.is_flagged), '{}'),
         array_agg(h.held) filter (where not h.is_flagged and h.outcome in ('retried', 'released', 'unstarted', 'crashed')),
         array_agg(h.held) filter (where not h.is_flagged and h.outcome = 'parked'),
         array_agg(row(h.id, h.outcome, (h.held).result, (h.held).error)::ended)
           filter (where not h.is_flagged
                   and (h.outcome = 'completed' or h.outcome = 'failed' and (h.held).error is not null))
  into v_ids, v_flagged, v_again, v_parked, v_ended
  from (select distinct on (p.id) p.id, p.outcome, e.cancel_requested_at is not null as is_flagged, p as held
        from unnest(p_held) p
        cross join lateral (select orchestrator_id, claimed_at from lease k where k.execution_id = p.id offset 0) l
        cross join lateral (select cancel_requested_at from execution k where k.id = p.id offset 0) e
        where l.orchestrator_id = p_orchestrator and l.claimed_at = p.claimed_at) h;
  if coalesce(cardinality(v_again), 0) + coalesce(cardinality(v_parked), 0) + coalesce(cardinality(v_ended), 0)
     + cardinality(v_flagged) < coalesce(cardinality(v_ids), 0) then
    raise exception 'an outcome is not one of those that settle knows, or a failure has no error' using errcode = 'PC003';
  end if;

  update execution e set failures = e.failures + 1
  where e.id = any(array(select x.id from unnest(v_ended) x where x.outcome = 'failed'));
  if v_again is not null then
    v_crashed := array(select a.id from unnest(v_again) a where a.outcome = 'crashed');
    update execution e set crashes = e.crashes + 1 where e.id = any(v_crashed);
    v_over := crashed_too_often(v_crashed);
    v_again := array(select a from unnest(v_again) a where not exists (select from unnest(v_over) o where o.id = a.id));
    v_ended := v_ended || v_over;
  end if;
  if cardinality(v_again) > 0 then
    v_effects := merge(v_effects, requeue(v_again, p_now));
  end if;
  if v_parked is not null then
    v_effects := merge(v_effects, park(p_orchestrator, v_parked, p_ops, p_alike, p_children, p_payloads, p_now));
  end if;
  if cardinality(v_flagged) > 0 then
    v_ended := v_ended || cancelled(v_flagged);
  end if;
  if cardinality(v_ended) > 0 then
    v_effects := merge(v_effects, finish(v_ended, p_now));
  end if;
  delete from lease where execution_id = any(v_ids);
  v_effects := merge(v_effects, row(release_permits(v_ids), '{}')::effects);
  return v_effects;
end $$;

-- Has the server plan most of what a settle does to parents and children: for an execution that is not there, and which so
-- has neither children nor timers to read of.
create or replace function plan_settle(p_orchestrator uuid, p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_id uuid := '00000000-0000-0000-0000-000000000000'::uuid;
  v_held settlement[] := array[row(v_id, 'parked', null, null, null, '[]', null, null, null, null)::settlement];
  v_none new_operation[] := '{}'::new_operation[];
begin
  perform lock_for_settle(v_held, '{}', '{}');
  perform settle_held(p_orchestrator, v_held, null, null, null, null, p_now);
  perform park(p_orchestrator, '{}', '[]', null, null, null, p_now);
  perform new_operations('[]', '{}', p_now), read_alike('[]', v_none, 0, p_now), are_plain(v_none, '{}');
  perform open_steps(v_none, '{}', '{}', p_now), insert_plain_children(v_none, '{}', '{}', '[]', p_now);
  perform answer(array[row(v_id, '', 0, null, null, null)::answer], array[row(v_id, '', 0, '{}')::ended_children], p_now);
  perform wake(array[v_id]);
end $$;
