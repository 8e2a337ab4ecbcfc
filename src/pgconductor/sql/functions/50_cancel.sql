-- cancel and redrive: what people do to executions.
-- Locks: the tree exclusively, then the execution with its parent and its open descendants.
-- Rows move ready -> lease -> wait or timer -> ready; cancel looks for them against the stream's head and waits for a
-- move in flight, so that none slips past it.

-- Takes executions out of ready and the backlog; returns those that were there. A change of limits moves rows between
-- the two, either way, so ready is looked at twice.
create or replace function take_out(p_ids uuid[]) returns uuid[]
language plpgsql volatile set search_path from current as $$
declare
  v_taken uuid[] := take_out_of_ready(p_ids);
begin
  if not exists (select from backlog) then
    return v_taken;
  end if;
  with taken as (delete from backlog where execution_id = any(p_ids) returning execution_id)
  select v_taken || coalesce(array_agg(execution_id), '{}') into v_taken from taken;
  return v_taken || take_out_of_ready(p_ids);
end $$;

-- What was ready from the start is found by its place; what became ready later has another, and is looked for among
-- all of its kind. What runs is not looked for: only who holds the execution, as the caller does, could give it back.
create or replace function take_out_of_ready(p_ids uuid[]) returns uuid[]
language plpgsql volatile set search_path from current as $$
declare
  v_taken uuid[];
  v_missed uuid[];
begin
  with taken as (
    delete from ready r using execution e
    where e.id = any(p_ids) and r.lane_id = any(array[e.lane_id])
      and place_of(r.priority, r.ord) = place_of(e.priority, e.ord)
      and r.execution_id = e.id
    returning r.execution_id
  )
  select coalesce(array_agg(execution_id), '{}') into v_taken from taken;
  v_missed := array(select id from unnest(p_ids) id
                    where id <> all(v_taken) and not exists (select from lease where execution_id = id offset 0));
  return case when cardinality(v_missed) = 0 then v_taken else v_taken || take_out_of_late(v_missed) end;
end $$;

create or replace function take_out_of_late(p_ids uuid[]) returns uuid[]
language plpgsql volatile set search_path from current as $$
declare
  v_taken uuid[];
begin
  with taken as (
    delete from ready r
    using (select distinct lane_id, priority from execution where id = any(p_ids)) s, unnest(p_ids) id
    where r.lane_id = any(array[s.lane_id])
      and place_of(r.priority, r.ord) between place_of(s.priority, late_ord_min()) and place_of(s.priority, -1)
      and r.execution_id = id
    returning r.execution_id
  )
  select coalesce(array_agg(execution_id), '{}') into v_taken from taken;
  return v_taken;
end $$;

-- Requests the end of locked executions: those that do not run end at once, those that run are told.
create or replace function cancel_locked(p_ids uuid[], p_reason text, p_now timestamptz) returns effects
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[];
  v_stopped uuid[];
  v_told text[];
begin
  with flagged as (
    update execution set cancel_requested_at = p_now, cancel_reason = left(p_reason, 1000)
    where id = any(p_ids) and outcome is null and cancel_requested_at is null returning id
  )
  select array_agg(id) into v_ids from flagged;
  if v_ids is null then
    return row('{}'::int[], '{}'::text[])::effects;
  end if;
  with stopped as (delete from wait where execution_id = any(v_ids) returning execution_id)
  select coalesce(array_agg(execution_id), '{}') into v_stopped from stopped;
  with stopped as (delete from timer where execution_id = any(v_ids) returning execution_id)
  select v_stopped || coalesce(array_agg(execution_id), '{}') into v_stopped from stopped;
  v_stopped := v_stopped || take_out(array(select id from unnest(v_ids) id where id not in (select unnest(v_stopped))));

  with told as (
    insert into signal (orchestrator_id, execution_id)
    select orchestrator_id, execution_id from lease
    where execution_id = any(v_ids) and execution_id <> all(v_stopped)
    on conflict do nothing returning orchestrator_id
  )
  select coalesce(array_agg(distinct orchestrator_id::text), '{}') into v_told from told;
  return merge(row('{}', v_told)::effects,
               finish(cancelled(array(select distinct unnest(v_stopped))), p_now));
end $$;

-- Returns {result: cancelled | requested | ended | unknown, queues, watchers}.
create or replace function cancel(p_id uuid, p_reason text, p_now timestamptz default null) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_root uuid;
  v_parent uuid;
  v_effects effects;
  v_outcome outcome;
begin
  select coalesce(root_id, id), parent_id into v_root, v_parent from execution where id = p_id;
  if not found then
    return json_build_object('result', 'unknown');
  end if;
  perform lock_trees('{}', array[v_root]);
  perform lock_executions(array[p_id, v_parent] || array(select open_descendants(array[p_id])));
  select outcome into v_outcome from execution where id = p_id;
  if v_outcome is not null then
    return json_build_object('result', 'ended');
  end if;
  v_effects := cancel_locked(array[p_id] || array(select open_descendants(array[p_id])), p_reason, v_now);
  select outcome into v_outcome from execution where id = p_id;
  return json_build_object(
    'result', case when v_outcome is null then 'requested' else 'cancelled' end,
    'queues', queues_of(v_effects.lane_ids), 'watchers', v_effects.watchers);
end $$;

-- Cancels the execution that a task's dedupe key names.
create or replace function cancel_by_key(p_task text, p_key text, p_reason text, p_now timestamptz default null)
returns json
language sql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
  select coalesce(
    (select cancel(d.execution_id, p_reason, p_now) from dedupe d join task t on t.id = d.task_id
     where t.name = p_task and d.key = p_key),
    json_build_object('result', 'unknown'))
$$;

-- Opens a new life of an execution that failed or was cancelled: its recorded steps stay, its budgets begin anew.
-- Its parent, if any, has had its answer and hears nothing more. Returns {result: ready | refused | unknown, queues}.
create or replace function redrive(p_id uuid) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_execution execution;
begin
  select * into v_execution from execution where id = p_id for no key update;
  if found and v_execution.root_id is not null then
    perform from execution where id = v_execution.root_id for key share;
  end if;
  if not found then
    return json_build_object('result', 'unknown');
  end if;
  if v_execution.outcome is null or v_execution.outcome = 'completed' then
    return json_build_object('result', 'refused');
  end if;
  -- its first life has been passed over by retention, or noted
  insert into prune_later (execution_id, look_at) values (coalesce(v_execution.root_id, p_id), instant(null))
  on conflict do nothing;
  if v_execution.parent_index > 0 then
    perform keep_answer(v_execution);
  end if;
  update execution
  set outcome = null, finished_at = null, error = null, failures = 0, crashes = 0,
      cancel_requested_at = null, cancel_reason = null, parent_index = -abs(parent_index)
  where id = p_id;
  -- its fan-outs lost their counters when it ended: count again what is still open, and answer those that are not
  insert into wait_item (execution_id, name, round, kind, left_count)
  select o.execution_id, o.name, o.round, 'invoke_all', count(*) from open_child o
  where o.execution_id = p_id and o.index > 0
  group by 1, 2, 3;
  update step s set status = 'completed', finished_at = instant(null), seq = nextval('step_seq')
  where s.execution_id = p_id and s.kind = 'invoke_all' and s.index = 0 and s.status = 'pending'
    and not exists (select from wait_item i where i.execution_id = p_id and i.name = s.name and i.round = s.round);
  perform listen(waits_left_by(p_id), instant(null));
  return json_build_object('result', 'ready', 'queues', queues_of(make_ready(array[p_id])));
end $$;

-- Cancels on behalf of a handler and records that it did, as one step. Returns null when the lease is gone.
create or replace function cancel_as_step(
  p_orchestrator uuid, p_id uuid, p_token bigint, p_name text, p_target uuid, p_reason text,
  p_now timestamptz default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_now timestamptz := instant(p_now);
  v_answer json;
begin
  if not hold_alive(p_orchestrator) or not exists (
    select from lease where execution_id = p_id and token = p_token and orchestrator_id = p_orchestrator
  ) then
    return null;
  end if;
  select json_build_object('result', case when value::text = 'true' then 'requested' else 'ended' end) into v_answer
  from step where execution_id = p_id and name = p_name;
  if found then  -- an earlier try of this call committed, and its answer stands
    return v_answer;
  end if;
  begin
    v_answer := cancel(p_target, p_reason, p_now);
    perform from lease
    where execution_id = p_id and token = p_token and orchestrator_id = p_orchestrator for key share;
    if not found then  -- it waited for locks for longer than the lease lasted: nothing of it has happened
      raise exception 'the lease is gone' using errcode = 'PC000';
    end if;
  exception when sqlstate 'PC000' then
    return null;
  end;
  perform tell(array(select json_array_elements_text(v_answer -> 'watchers')));
  insert into step (execution_id, name, kind, status, value, created_at, finished_at)
  values (p_id, p_name, 'call', 'completed',
          to_json(v_answer ->> 'result' in ('cancelled', 'requested')), v_now, v_now)
  on conflict do nothing;
  return v_answer;
end $$;

create or replace function pause_queue(p_queue text, p_now timestamptz default null) returns void
language sql volatile set search_path from current as $$
  insert into queue (name, paused_at) values (p_queue, instant(p_now))
  on conflict (name) do update set paused_at = coalesce(queue.paused_at, excluded.paused_at)
$$;

create or replace function resume_queue(p_queue text) returns void
language sql volatile set search_path from current as $$
  update queue set paused_at = null where name = p_queue
$$;
