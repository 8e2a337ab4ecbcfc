-- finish, answer, wake: the one way in which an execution ends and its parent hears of it.
-- Called by settle, cancel, the timers and the sweep, which hold the locks: the executions that end, their parents and
-- their open descendants. States: any live state -> completed, failed, cancelled; a waiting parent -> ready.
-- Return effects: the lanes that have new work, and who sleeps until one of these executions ends.

-- Makes executions ready before fresh work of the same priority.
create or replace function make_ready(p_ids uuid[]) returns int[]
language plpgsql volatile set search_path from current as $$
begin
  return put_ready(array(
    select row(e.lane_id, e.priority, late_ord(), e.id, null, null, null)::ready
    from execution e where e.id = any(p_ids)));
end $$;

-- Those of executions that have not begun, nor recorded anything.
create or replace function unstarted_of(p_ids uuid[]) returns setof uuid
language plpgsql stable set search_path from current as $$
begin
  return query
    select e.id from execution e
    where e.id = any(p_ids) and e.started_at is null and e.failures = 0 and e.crashes = 0
      and (select true from step s where s.execution_id = e.id limit 1) is null;
end $$;

-- Makes executions ready again that were claimed: those that have begun, or have recorded anything, before fresh work, as
-- make_ready does; the others stand where they stood, and have not started yet.
create or replace function put_back(p_ids uuid[]) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_fresh uuid[] := array(select unstarted_of(p_ids));
  v_lanes int[] := make_ready(array(select id from unnest(p_ids) id where id <> all(v_fresh)));
begin
  if cardinality(v_fresh) = 0 then
    return v_lanes;
  end if;
  perform forget_starts(v_fresh);
  return v_lanes || put_ready(array(
    select row(e.lane_id, e.priority, e.ord, e.id, null, null, null)::ready from execution e where e.id = any(v_fresh)));
end $$;

-- Puts answers that the runs of executions have not seen behind what these have recorded: tasks of a handler are given answers
-- in the order in which it could see them. p_steps: where they stand; their executions are locked.
create or replace function put_behind(p_steps tid[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  update step s set seq = nextval('step_seq')
  from (select ctid as row_at from step where ctid = any(p_steps) order by seq) k
  where s.ctid = k.row_at;
end $$;

-- Does so with what was answered since executions were claimed. Their leases are still there.
create or replace function put_unseen_behind(p_ids uuid[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  perform put_behind(array(
    select k.row_at from unnest(p_ids) as x(id)
    cross join lateral (select claimed_at from lease k where k.execution_id = x.id offset 0) l
    cross join lateral (
      select ctid as row_at from step k where k.execution_id = x.id and k.index = 0
        and k.finished_at >= l.claimed_at and k.kind not in ('step', 'transaction', 'call') offset 0) k));
end $$;

-- Makes parked executions ready; those that are not parked are left alone.
create or replace function wake(p_ids uuid[]) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_woken wait[];
  v_ids uuid[];
  v_lanes int[];
begin
  if coalesce(cardinality(p_ids), 0) = 0 then
    return row('{}'::int[], '{}'::text[])::effects;
  end if;
  with woken as (delete from wait where execution_id = any(p_ids) returning *)
  select array_agg(w::wait), array_agg(w.execution_id) into v_woken, v_ids
  from (select * from woken) w;
  v_lanes := put_ready(array(
    select row(e.lane_id, e.priority, late_ord(), e.id, w.cached_by, w.cached_seq, w.cached_open)::ready
    from unnest(v_woken) w cross join lateral (select * from execution k where k.id = w.execution_id offset 0) e));
  delete from timer where execution_id = any(v_ids);
  delete from wait_item where execution_id = any(v_ids) and kind <> 'invoke_all';
  delete from wait_link where execution_id = any(v_ids);
  return row(v_lanes, '{}')::effects;
end $$;

-- The members of a wait that have answered, by step name, as they stand now.
create or replace function done_members(p_execution uuid, p_name text, p_round smallint) returns json
language plpgsql stable set search_path from current as $$
begin
  return (
    select coalesce(json_agg(distinct s.name), '[]')
    from wait_link l join step s on s.execution_id = l.execution_id and s.name = l.child_step and s.index = 0
    where l.execution_id = p_execution and l.item_name = p_name and l.item_round = p_round and s.status <> 'pending');
end $$;

-- Writes outcomes into pending steps, each once. Returns what it wrote by who counts it: answered are executions that
-- may wait for the operation itself, started are children that a wait may name.
-- Each row is found by its key and written where it stands: nothing moves it, since the caller holds the execution. The
-- settings leave no other plan, such as a scan of all steps, made while there were few.
create or replace function write_answers(
  p_answers answer[], p_now timestamptz, out p_answered uuid[], out p_started answer[]
)
language plpgsql volatile set search_path from current set enable_hashjoin = off set enable_memoize = off as $$
begin
  with written as (
    update step s
    set status = a.status, value = a.value, finished_at = p_now, seq = nextval('step_seq'),
        error = case when a.status = 'timed_out' then s.error else a.error end
    from (select a.status, a.value, a.error, k.row_at
          from unnest(p_answers) a
          cross join lateral (
            select ctid as row_at from step k where k.execution_id = a.execution_id and k.name = a.name
              and k.round = a.round and k.index = 0 and k.status = 'pending' offset 0) k) a
    where s.ctid = a.row_at and s.status = 'pending'
    returning s.execution_id, s.kind,
              row(s.execution_id, s.name, s.round, s.status, null, null)::answer as answer
  )
  select coalesce(array_agg(w.execution_id) filter (where w.kind <> 'start'), '{}'),
         array_agg(w.answer) filter (where w.kind = 'start')
  into p_answered, p_started from written w;
end $$;

-- Answers operations, counts the ended children of fan-outs, and wakes the executions that need no more.
create or replace function answer(p_answers answer[], p_ended ended_children[], p_now timestamptz) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_written record;
  v_ids uuid[];
  v_lanes int[] := '{}'::int[];
begin
  select * into v_written from write_answers(p_answers, p_now);
  v_ids := v_written.p_answered;
  if p_ended is not null then
    v_lanes := release_next(p_ended, p_now);
    v_ids := v_ids || count_fan_outs(p_ended, p_now);
  end if;
  if v_written.p_started is not null then
    v_ids := v_ids || count_links(v_written.p_started, p_now);
  end if;
  return merge(row(v_lanes, '{}')::effects, wake(v_ids));
end $$;

-- Counts answered children for the waits that name them; answers the waits that are full.
create or replace function count_links(p_started answer[], p_now timestamptz) returns uuid[]
language plpgsql volatile set search_path from current as $$
declare
  v_full answer[];
begin
  with counted as (
    update wait_item i set left_count = i.left_count - w.count
    from (select l.execution_id, l.item_name, l.item_round, count(*)::int as count
          from unnest(p_started) a cross join lateral (
            select * from wait_link l where l.execution_id = a.execution_id and l.child_step = a.name offset 0) l
          group by 1, 2, 3) w
    where i.execution_id = any(array[w.execution_id]) and i.name = w.item_name and i.round = w.item_round
    returning i.execution_id, i.name, i.round, i.left_count
  )
  select array_agg(row(execution_id, name, round, 'completed', done_members(execution_id, name, round),
                       null)::answer) into v_full
  from counted where left_count <= 0;
  if v_full is null then
    return '{}'::uuid[];
  end if;
  return (write_answers(v_full, p_now)).p_answered;
end $$;

-- Ends executions: writes the outcome, cancels open descendants, answers the parents.
create or replace function finish(p_ended ended[], p_now timestamptz) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[] := array(select id from unnest(p_ended));
  v_open uuid[];
  v_answers answer[];
  v_counted ended_children[];
  v_effects effects := row('{}'::int[], '{}'::text[]);
begin
  with done as (
    update execution e
    set outcome = x.outcome, result = x.result, error = x.error, finished_at = p_now,
        started_at = coalesce(e.started_at, l.claimed_at)
    from (select x.*, k.row_at from unnest(p_ended) x
          cross join lateral (select ctid as row_at from execution k where k.id = x.id offset 0) k) x
    left join lateral (select claimed_at from lease k where k.execution_id = x.id offset 0) l on true
    where e.ctid = x.row_at
    returning e.parent_id, e.parent_step, e.parent_round, e.parent_index, x.outcome, x.result, x.error
  )
  select array_agg(row(d.parent_id, d.parent_step, d.parent_round, d.outcome::text::step_status,
                       d.result, d.error)::answer) filter (where d.parent_index = 0),
         (select array_agg(row(m.*)::ended_children) from (
           select parent_id, parent_step, parent_round, array_agg(parent_index) from done where parent_index > 0
           group by 1, 2, 3) m)
  into v_answers, v_counted from done d;
  delete from wait_item where execution_id = any(v_ids);
  delete from wait_link where execution_id = any(v_ids);
  delete from event_wait where execution_id = any(v_ids);

  v_open := array(select open_descendants(v_ids));
  if cardinality(v_open) > 0 then
    v_effects := cancel_locked(v_open, 'its parent ended', p_now);
  end if;
  if v_answers is not null or v_counted is not null then
    v_effects := merge(v_effects, answer(v_answers, v_counted, p_now));
  end if;
  perform remove_soon(v_ids, p_now);
  return merge(v_effects, row('{}', watchers_of(v_ids))::effects);
end $$;

-- Removes and returns who watches executions that ended. Whether anybody does is asked of the table's size: to look for a
-- row would be to pass by all that were deleted since the oldest snapshot began.
create or replace function watchers_of(p_ids uuid[]) returns text[]
language plpgsql volatile set search_path from current as $$
declare
  v_watchers text[];
begin
  if pg_relation_size('watch'::regclass) = 0 then
    return '{}'::text[];
  end if;
  with told as (delete from watch where execution_id = any(p_ids) returning watcher)
  select array_agg(distinct watcher) into v_watchers from told;
  return coalesce(v_watchers, '{}');
end $$;
