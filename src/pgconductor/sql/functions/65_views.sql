-- The public reading surface. Names and columns are stable; what is behind them is not.

create or replace view executions as
select e.id, t.name as task, q.name as queue,
       case when e.outcome is not null then e.outcome::text
            when l.execution_id is not null then 'running'
            when w.execution_id is not null then 'waiting'
            when m.execution_id is not null then 'scheduled'
            else 'ready' end as state,
       case when e.outcome = 'failed' then greatest(e.failures, 1) else e.failures + 1 end as attempt,
       e.priority, e.parent_id, coalesce(e.root_id, e.id) as root_id, e.dedupe_key, e.payload::jsonb as payload,
       e.result::jsonb as result, e.error::jsonb as error, e.created_at,
       coalesce(nullif(m.due_at, 'infinity'), e.run_at, e.created_at) as run_at,
       coalesce(e.started_at, l.claimed_at) as started_at, e.finished_at,
       e.crashes, e.depth, e.parent_step, e.trigger, e.cancel_requested_at, e.cancel_reason,
       l.orchestrator_id
from execution e
join lane n on n.id = e.lane_id
join task t on t.id = n.task_id
join queue q on q.id = n.queue_id
left join lease l on l.execution_id = e.id
left join wait w on w.execution_id = e.id
left join timer m on m.execution_id = e.id;

create or replace view failed_executions as
select * from executions where state = 'failed';

create or replace view steps as
select execution_id, name, kind::text as kind, status::text as status, value::jsonb as value,
       case when status <> 'pending' then error::jsonb end as error,  -- while it is open, what it would be if it timed out
       child_id, created_at, finished_at, due_at, round, index
from recorded_step;

create or replace view queues as
select q.name, q.paused_at,
       coalesce(sum(r.count), 0)::bigint as ready_count,
       (select count(*) from lease l join execution e on e.id = l.execution_id join lane n on n.id = e.lane_id
        where n.queue_id = q.id) as running_count
from queue q
left join lane n on n.queue_id = q.id
left join lateral (select (select count(*) from ready r where r.lane_id = n.id)
                        + (select count(*) from backlog b where b.lane_id = n.id) as count) r on true
group by q.id, q.name, q.paused_at;

create or replace view workers as
select o.id, o.name, o.version, o.host, o.pid, o.queues, o.started_at, o.beat_at, o.stopping_at,
       (select count(*) from lease l where l.orchestrator_id = o.id) as running_count,
       case when o.task_ids is not null then
         array(select t.name from task t where t.id = any(o.task_ids) order by t.name) end as tasks,
       o.stop_requested_at, (o.blocked ->> 'seconds')::float8 as blocked_seconds, o.blocked ->> 'by' as blocked_by
from orchestrator o;
