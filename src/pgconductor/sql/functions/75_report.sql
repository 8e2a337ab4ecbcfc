-- Reports: what the command line shows. Called by people. They read, take no locks, and are bounded.

-- The newest executions, filtered: [{id, task, queue, state, ...}]. Those that have not ended are found by the small
-- tables that hold them, so that a long history costs nothing.
create or replace function list_runs(p_state text, p_task text, p_queue text, p_limit int) returns json
language plpgsql stable set search_path from current as $$
declare
  v_ids uuid[];
begin
  if p_state in ('ready', 'running', 'waiting', 'scheduled') then
    select coalesce(array_agg(id), '{}') into v_ids from (
      select execution_id as id from ready where p_state = 'ready'
      union all select execution_id from backlog where p_state = 'ready'
      union all select execution_id from lease where p_state = 'running'
      union all select execution_id from wait where p_state = 'waiting'
      union all select execution_id from timer where p_state = 'scheduled') held;
  end if;
  return (
    select coalesce(json_agg(row_to_json(r)), '[]')
    from (select id, task, queue, state, attempt, priority, dedupe_key, parent_id, created_at, run_at, started_at,
                 finished_at, left(error ->> 'message', 300) as error
          from executions
          where (p_state is null or state = p_state) and (v_ids is null or id = any(v_ids))
            and (p_task is null or task = p_task) and (p_queue is null or queue = p_queue)
          order by id desc limit least(p_limit, 10000)) r);
end $$;

-- An execution with all that is known of it, its steps, and its descendants: {run, steps, running, tree}; null if unknown.
-- running: {host, pid, since, steps}, while it runs.
-- tree: [{id, parent_id, step, level, task, state, ...}], parents first, at most p_limit.
create or replace function show_run(p_id uuid, p_limit int) returns json
language sql stable set search_path from current set enable_seqscan = off as $$
  with recursive tree (id, parent_id, step, level, place) as (
    select p_id, null::uuid, null::text, 0, array[]::text[] || p_id::text
    union all
    select c.child_id, t.id, c.name, t.level + 1, t.place || (c.created_at::text || c.child_id::text)
    from tree t
    cross join lateral (
      select s.child_id, s.name, s.created_at from child_link s
      where s.execution_id = t.id and not s.dropped
      order by s.created_at, s.index limit p_limit) c
    where t.level < 100
  ), shown as (
    select * from tree limit p_limit
  )
  select json_build_object(
    'run', row_to_json(e),
    'steps', (select coalesce(json_agg(row_to_json(s)), '[]') from (
      select name, kind, status, round, index, child_id, created_at, finished_at, due_at,
             left(value::text, 2000) as value, error
      from steps where execution_id = p_id order by created_at, name, index limit p_limit) s),
    'running', (select json_build_object('host', o.host, 'pid', o.pid, 'since', l.claimed_at, 'steps', (
        select coalesce(json_agg(row_to_json(r)), '[]') from running_steps(p_id) r))
      from lease l join orchestrator o on o.id = l.orchestrator_id where l.execution_id = p_id),
    'tree', (select json_agg(row_to_json(n)) from (
      select t.id, t.parent_id, t.step, t.level, d.task, d.queue, d.state, d.attempt, d.created_at, d.started_at,
             d.finished_at, left(d.error ->> 'message', 300) as error
      from shown t join executions d on d.id = t.id order by t.place) n))
  from executions e where e.id = p_id
$$;

-- Every queue with its counts: [{name, paused_at, ready_count, running_count}].
create or replace function list_queues() returns json
language sql stable set search_path from current as $$
  select coalesce(json_agg(row_to_json(q)), '[]')
  from (select name, paused_at, ready_count, running_count from queues order by name limit 10000) q
$$;

-- Where everything stands: counts of what has not ended, processes, and work that nobody alive can run.
-- stranded: tasks with ready work that no live process would run, and why. closed: tasks with a limit of none.
create or replace function overview(p_expiry interval default '20 seconds') returns json
language sql stable set search_path from current as $$
  select json_build_object(
    'now', clock_timestamp(),
    'ready', (select count(*) from ready) + (select count(*) from backlog), 'running', (select count(*) from lease),
    'waiting', (select count(*) from wait), 'scheduled', (select count(*) from timer t
      where not exists (select from wait w where w.execution_id = t.execution_id)),
    'oldest_ready_at', (select min(e.created_at) from execution e
      where e.id in (select execution_id from ready order by ord limit 100)),
    'paused', (select coalesce(json_agg(name order by name), '[]') from queue where paused_at is not null),
    'paused_schedules', (select coalesce(json_agg(json_build_object('task', s.task, 'name', s.name) order by s.task, s.name), '[]')
      from (select * from schedules where paused_at is not null limit 20) s),
    'closed', (select coalesce(json_agg(distinct t.name), '[]') from task_limit m join task t on t.id = m.task_id
      where coalesce(m.operator_max, m.declared_max) = 0),
    'workers', (select coalesce(json_agg(row_to_json(w) order by w.started_at), '[]') from (
      select w.id, w.name, w.version, w.host, w.pid, w.queues, w.started_at, w.beat_at, w.stopping_at, w.running_count,
             w.blocked_seconds, w.blocked_by,
             w.beat_at > clock_timestamp() - p_expiry as live
      from workers w limit 1000) w),
    'stranded', (select coalesce(json_agg(json_build_object('task', t.name, 'queue', q.name,
        'registered', t.registered_at is not null, 'reason', u.reasons -> 0 ->> 'text') order by t.name), '[]')
      from lane l join task t on t.id = l.task_id join queue q on q.id = l.queue_id
      cross join lateral (select why_unserved(t, q, p_expiry, clock_timestamp()) as reasons) u
      where (exists (select from ready r where r.lane_id = l.id) or exists (select from backlog b where b.lane_id = l.id))
        and u.reasons <> '[]'))
$$;

-- Every task with its limits: [{name, queue, registered, ready_count, running_count, window, expires, limits: [{kind, key,
-- max, per (seconds), declared_max, operator_max}]}].
create or replace function list_tasks() returns json
language sql stable set search_path from current as $$
  select coalesce(json_agg(json_build_object(
    'name', t.name, 'queue', q.name, 'registered', t.registered_at is not null,
    'ready_count', (select count(*) from lane l join ready r on r.lane_id = l.id where l.task_id = t.id)
      + (select count(*) from lane l join backlog b on b.lane_id = l.id where l.task_id = t.id),
    'running_count', (select count(*) from lease s join execution e on e.id = s.execution_id
                      join lane l on l.id = e.lane_id where l.task_id = t.id),
    'window', case when t.window_start is not null then
      format('%s to %s %s', to_char(t.window_start, 'HH24:MI'), to_char(t.window_end, 'HH24:MI'), t.window_zone) end,
    'expires', extract(epoch from t.expires_in),
    'limits', (select coalesce(json_agg(json_build_object(
        'kind', m.kind, 'key', m.key_path, 'max', coalesce(m.operator_max, m.declared_max),
        'per', extract(epoch from m.period), 'declared_max', m.declared_max, 'operator_max', m.operator_max)
        order by m.id), '[]')
      from task_limit m where m.task_id = t.id)) order by t.name), '[]')
  from (select * from task order by name limit 10000) t join queue q on q.id = t.queue_id
$$;
