-- fan-out: the children of an invoke_all, counted and read without a row for each of them.
-- Called by whatever opens, answers, cancels, reads or removes children. States and locks: those of the callers.
--
-- The step of an invoke_all has the ids of its children, in their order, and their task, if they are of one; wait_item
-- counts those that are still to end. What became of a child its own execution says, so that a child costs its parent
-- nothing but that count. A row of its own in step, by its index, has only the answer of which the execution tells no
-- more: of one that was redriven after its parent had the answer (its parent_index is below zero from then on, and it
-- answers nobody), and of those that were still open when the whole timed out. Such a row wins.

-- Which children operations have, whatever became of them.
create or replace view child_link as
select execution_id, name, round, 0 as index, child_id, status, dropped, created_at
from step where child_id is not null and index = 0
union all
select s.execution_id, s.name, s.round, c.index::int, c.child_id, s.status, s.dropped, s.created_at
from step s cross join lateral unnest(s.child_ids) with ordinality as c(child_id, index);

-- The children that operations are open for: attached, and unfinished.
create or replace view open_child as
select l.execution_id, l.name, l.round, l.index, l.child_id
from child_link l
cross join lateral (select parent_index, outcome from execution k where k.id = l.child_id offset 0) e
where l.status = 'pending' and e.parent_index = l.index and e.outcome is null;

-- The children of fan-outs with their answers.
create or replace view fan_out_child as
select s.execution_id, s.name, s.round, c.index::int as index, s.kind,
       coalesce((e.own).status, e.outcome::text::step_status, 'pending') as status,
       case when (e.own).status is null then e.result else (e.own).value end as value,
       case when (e.own).status is not null then (e.own).error when e.outcome is not null then e.error end as error,
       c.child_id, coalesce(s.child_task, e.task) as child_task,
       s.dropped, s.seq, s.created_at, coalesce((e.own).finished_at, e.finished_at) as finished_at,
       null::timestamptz as due_at
from step s
cross join lateral unnest(s.child_ids) with ordinality as c(child_id, index)
left join lateral (
  select outcome, result, error, finished_at,
         case when k.parent_index < 0 or s.status = 'timed_out' then (
           select row(o.status, o.value, o.error, o.finished_at)::kept_answer from step o
           where o.execution_id = s.execution_id and o.name = s.name and o.round = s.round and o.index = c.index) end as own,
         case when s.child_task is null then (
           select t.name from lane l join task t on t.id = l.task_id where l.id = k.lane_id) end as task
  from execution k where k.id = c.child_id offset 0
) e on true;

-- All that is recorded of executions: their operations, and each child of a fan-out.
create or replace view recorded_step as
select execution_id, name, round, index, kind, status, value, error, child_id, child_task, dropped, seq, created_at,
       finished_at, due_at
from step where index = 0
union all
select execution_id, name, round, index, kind, status, value, error, child_id, child_task, dropped, seq, created_at,
       finished_at, due_at
from fan_out_child;

-- Counts ended children of fan-outs; answers the fan-outs that are complete and returns their executions.
create or replace function count_fan_outs(p_ended ended_children[], p_now timestamptz) returns uuid[]
language plpgsql volatile set search_path from current as $$
declare
  v_full answer[];
begin
  with counted as (
    update wait_item i set left_count = i.left_count - cardinality(w.indexes)
    from unnest(p_ended) w
    where i.execution_id = w.execution_id and i.name = w.name and i.round = w.round
    returning i.execution_id, i.name, i.round, i.left_count
  )
  select array_agg(row(execution_id, name, round, 'completed', null, null)::answer) into v_full
  from counted where left_count <= 0;
  if v_full is null then
    return '{}'::uuid[];
  end if;
  delete from wait_item i using unnest(v_full) f
  where i.execution_id = f.execution_id and i.name = f.name and i.round = f.round;
  return (write_answers(v_full, p_now)).p_answered;
end $$;

-- Makes the next held children of fan-outs with a window ready, one for each that ended inside the window; those that were
-- called for later wait for their time. From now, or from then, on they may expire.
create or replace function release_next(p_ended ended_children[], p_now timestamptz) returns int[]
language plpgsql volatile set search_path from current as $$
declare
  v_item record;
  v_next record;
  v_lanes int[] := '{}'::int[];
begin
  for v_item in
    select i.execution_id, i.name, i.round, i.next_index, s.child_ids,
           (select count(*)::int from unnest(f.indexes) ended where ended < i.next_index) as count
    from unnest(p_ended) f
    cross join lateral (
      select * from wait_item k
      where k.execution_id = f.execution_id and k.name = f.name and k.round = f.round and k.next_index is not null offset 0) i
    cross join lateral (
      select child_ids from step k
      where k.execution_id = f.execution_id and k.name = f.name and k.round = f.round and k.index = 0 offset 0) s
    where i.next_index <= cardinality(s.child_ids)
  loop
    select * into v_next from next_held(v_item.child_ids, v_item.next_index, v_item.count);
    delete from timer where execution_id = any(v_next.ids);
    v_lanes := v_lanes || put_ready(array(
      select row(lane_id, priority, ord, id, null, null, null)::ready from execution
      where id = any(v_next.ids) and (run_at is null or run_at <= p_now)), true);
    insert into timer (execution_id, due_at)
    select id, run_at from execution where id = any(v_next.ids) and run_at > p_now;
    insert into expiry (execution_id, due_at)
    select e.id, greatest(p_now, e.run_at) + t.expires_in
    from execution e join lane l on l.id = e.lane_id join task t on t.id = l.task_id
    where e.id = any(v_next.ids) and t.expires_in is not null;
    update wait_item set next_index = v_next.next_index
    where execution_id = v_item.execution_id and name = v_item.name and round = v_item.round;
  end loop;
  return v_lanes;
end $$;

-- The first of these children from an index on that are held still, and the index behind them. Those that were cancelled
-- while they were held are passed over.
create or replace function next_held(p_all uuid[], p_from int, p_count int, out ids uuid[], out next_index int)
language plpgsql stable set search_path from current as $$
declare
  v_left int := p_count;
begin
  ids := '{}';
  next_index := p_from;
  while v_left > 0 and next_index <= cardinality(p_all) loop
    ids := ids || array(
      select t.execution_id from unnest(p_all[next_index : next_index + v_left - 1]) as c(id)
      join timer t on t.execution_id = c.id and t.due_at = 'infinity');
    next_index := next_index + v_left;
    v_left := p_count - cardinality(ids);
  end loop;
end $$;

-- Records for the children of fan-outs that timed out, and that have not ended, that they did not: whatever becomes of them
-- later, their parent has had this answer.
create or replace function keep_timeouts(p_due answer[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
begin
  insert into step (execution_id, name, round, index, kind, status, created_at, finished_at, child_id, child_task)
  select c.execution_id, c.name, c.round, c.index, c.kind, 'timed_out', c.created_at, p_now, c.child_id, c.child_task
  from unnest(p_due) d
  cross join lateral (
    select * from fan_out_child k where k.execution_id = d.execution_id and k.name = d.name and k.round = d.round offset 0) c
  where d.status = 'timed_out' and c.status = 'pending';
end $$;

-- Records the answer that a child of a fan-out gave, before a redrive makes its execution forget it.
create or replace function keep_answer(p_child execution) returns void
language plpgsql volatile set search_path from current as $$
begin
  insert into step (execution_id, name, round, index, kind, status, value, error, created_at, finished_at, child_id,
                    child_task)
  select c.execution_id, c.name, c.round, c.index, c.kind, c.status, c.value, c.error, c.created_at, c.finished_at,
         c.child_id, c.child_task
  from fan_out_child c
  where c.execution_id = p_child.parent_id and c.name = p_child.parent_step and c.round = p_child.parent_round
    and c.index = p_child.parent_index
  on conflict do nothing;
end $$;
