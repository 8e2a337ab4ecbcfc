-- Inspection: how an execution stands, and waiting for its end. Reads, but for the row that asks to be told.

-- Returns null for an unknown id, else {state, result, error, task}; an execution that has not ended is watched.
create or replace function watch_result(p_id uuid, p_watcher text default null) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_result json;
begin
  if p_watcher is not null then
    -- the share lock waits for an end that is being written: it could not see the new row
    insert into watch (execution_id, watcher)
    select e.id, p_watcher from (select id from execution where id = p_id and outcome is null for share) e
    on conflict do nothing;
  end if;
  select json_build_object('outcome', e.outcome, 'result', e.result, 'error', e.error, 'task', t.name,
                           'reason', e.cancel_reason)
  into v_result
  from execution e join lane l on l.id = e.lane_id join task t on t.id = l.task_id
  where e.id = p_id;
  return v_result;
end $$;

create or replace function state_of(p_id uuid) returns text
language sql stable set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
  select state from executions where id = p_id
$$;

-- What a drain waits for: how much this set of queues and tasks could run now or is running for this process.
-- p_next: also count what is only scheduled or asleep.
create or replace function outstanding(
  p_orchestrator uuid, p_queues int[], p_tasks int[], p_now timestamptz default null
) returns json
language sql stable set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
  select json_build_object(
    'ready', (select count(*) from (
      select from lane l join queue q on q.id = l.queue_id and q.paused_at is null
      join task k on k.id = l.task_id and (k.window_start is null or closes_in(k, instant(p_now)) is not null)
      cross join lateral (
        select from ready r where r.lane_id = l.id and not l.is_limited
        union all
        select from (select from look where lane_id = l.id limit 1) k, (select from backlog where lane_id = l.id limit 1) b
        where l.is_limited limit 1) r
      where l.queue_id = any(p_queues) and l.task_id = any(p_tasks)) n),
    'leased', (select count(*) from lease where orchestrator_id = p_orchestrator),
    'next_due', instant(p_now) + make_interval(secs => next_due(instant(p_now))))
$$;

-- As watch_result, for many: a row {id, outcome, result, error, task, reason} for each that has ended; of an unknown id
-- only {id}. In rows, since one value may not hold them all. The share lock waits for an end that is being written, which
-- could not see the new watch row; the commit is asynchronous, since a lost watch row costs a poll.
create or replace function watch_results(p_ids uuid[], p_watcher text default null) returns setof json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
begin
  if p_watcher is not null then
    perform set_config('synchronous_commit', 'off', true);
    insert into watch (execution_id, watcher)
    select e.id, p_watcher
    from (select id from execution
          where id = any(p_ids) and outcome is null
            and not exists (select from watch w where w.execution_id = execution.id and w.watcher = p_watcher)
          order by depth desc, id for share) e
    on conflict do nothing;
  end if;
  return query
    select case when e.id is null then json_build_object('id', i.id) else json_build_object(
      'id', e.id, 'outcome', e.outcome, 'result', e.result, 'error', e.error, 'reason', e.cancel_reason,
      'task', (select t.name from lane l join task t on t.id = l.task_id where l.id = e.lane_id)) end
    from unnest(p_ids) as i(id) left join execution e on e.id = i.id
    where e.id is null or e.outcome is not null;
end $$;
