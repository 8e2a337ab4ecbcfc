-- prune: remove what has been kept long enough. Called by the sweep's process, again while there is more; and by settle
-- and finish for tasks that keep nothing. States: ended -> gone. Ended work only, so no claim ever waits for it.
--
-- Whole trees go. A tree is due when its root is, by the options of the root's task, and only if all of it has ended:
-- a redriven child, or one that was kept running at a timeout, keeps its whole tree. A tree of up to 10,001
-- executions goes in one transaction. Of a larger one the root goes first, then the rest in batches.
--
-- Locks: one process at a time, by a lock that is tried and never waited for; then the root, passing over what others
-- hold. A redrive holds its root, so nothing comes alive in a tree whose root is locked here. A dedupe key goes with
-- its execution; who enqueues with it meanwhile waits for this transaction and is first.
-- Returns {removed: how many, more: whether to call again now, gave_up: in which statement it met a lock that others
-- held on to}. Errors: none of its own.
-- Source: docs/guide/retention.md

-- The smallest id that is made at an instant.
create or replace function first_id(p_at timestamptz) returns uuid
language sql immutable parallel safe
return (lpad(to_hex(greatest((extract(epoch from p_at) * 1000)::bigint, 0)), 12, '0') || repeat('0', 20))::uuid;

-- Up to where a cursor goes. It looks at what was made long enough ago that most of it has also ended long enough ago:
-- of the rest a note must be written and read. Where nothing is kept the ends see to it; a cursor finds what they missed.
create or replace function cursor_end(p_keep interval, p_now timestamptz) returns uuid
language sql immutable parallel safe
return first_id(p_now - case when p_keep = interval '0' then interval '1 minute'
                             else p_keep + least(p_keep / 10, interval '30 seconds') end);

-- An execution that has not ended is looked at again after an eighth of its age, or the length of its retention.
create or replace function look_again_at(p_created_at timestamptz, p_keep interval, p_now timestamptz)
returns timestamptz
language sql immutable parallel safe
return p_now + greatest(p_keep, (p_now - p_created_at) / 8, interval '1 minute');

-- Of these roots, those that are due; those that will be are noted. p_keep: pass over what is kept for other lengths,
-- which has a cursor of its own; null looks at all.
create or replace function due_roots(p_ids uuid[], p_keep interval, p_now timestamptz) returns uuid[]
language plpgsql volatile set search_path from current as $$
declare
  v_due uuid[];
begin
  if cardinality(p_ids) = 0 then
    return p_ids;
  end if;
  with kept as materialized (
    select e.id, e.outcome is not null as has_ended, case when e.outcome is null
      then look_again_at(e.created_at, least(t.keep_completed_for, t.keep_failed_for), p_now) else e.finished_at + k.keep end as at
    from execution e join lane l on l.id = e.lane_id join task t on t.id = l.task_id
    cross join lateral (
      select case e.outcome when 'completed' then t.keep_completed_for else t.keep_failed_for end as keep) k
    where e.id = any(p_ids) and case
      when e.outcome is not null then p_keep is null or k.keep = p_keep
      when p_keep is null then num_nonnulls(t.keep_completed_for, t.keep_failed_for) > 0
      else p_keep > interval '0' and p_keep in (t.keep_completed_for, t.keep_failed_for) end
  ), noted as (
    insert into prune_later (execution_id, look_at)
    select id, at from kept where not has_ended or at > p_now order by id on conflict do nothing
  )
  select array_agg(id order by id) into v_due from kept where has_ended and at <= p_now;
  return coalesce(v_due, '{}');
end $$;

-- Locks those of these roots that are due still and that nobody else holds.
create or replace function lock_due(p_ids uuid[], p_now timestamptz) returns uuid[]
language plpgsql volatile set search_path from current as $$
begin
  return array(
    select e.id from execution e join lane l on l.id = e.lane_id join task t on t.id = l.task_id
    where e.id = any(p_ids) and e.finished_at
      + case e.outcome when 'completed' then t.keep_completed_for else t.keep_failed_for end <= p_now
    for update of e skip locked);
end $$;

-- An execution and all below it that is attached.
create or replace function tree_of(p_root uuid) returns setof uuid
language sql stable set search_path from current as $$
  with recursive tree (id) as (
    select p_root
    union all
    select e.id from tree t
    cross join lateral (select child_id from child_link k where k.execution_id = t.id offset 0) c
    cross join lateral (select id, parent_id from execution k where k.id = c.child_id offset 0) e
    where e.parent_id = t.id
  )
  select id from tree
$$;

-- Removes ended executions, with their keys and, where a task ever expires, the times by which they should have started.
create or replace function remove_rows(p_ids uuid[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_gone record;
begin
  with gone as (delete from execution where id = any(p_ids) returning id, created_at, lane_id, dedupe_key)
  select array_agg(id order by id) filter (where created_at > p_now - interval '1 hour') as young,
         array_agg(id) filter (where dedupe_key is not null) as keyed,
         array_agg(lane_id) filter (where dedupe_key is not null) as lanes,
         array_agg(dedupe_key) filter (where dedupe_key is not null) as keys
  into v_gone from gone;
  insert into removed (execution_id, removed_at) select unnest(v_gone.young), p_now on conflict do nothing;
  if v_gone.keyed is not null then
    delete from dedupe d using unnest(v_gone.keyed, v_gone.lanes, v_gone.keys) as g(id, lane_id, key), lane l
    where l.id = g.lane_id and d.task_id = l.task_id and d.key = g.key and d.execution_id = g.id;
  end if;
  if exists (select from task where expires_in is not null) then
    delete from expiry where execution_id = any(p_ids);
  end if;
end $$;

-- Removes ended executions with all that belongs to them.
create or replace function remove(p_ids uuid[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
begin
  perform remove_rows(p_ids, p_now);
  delete from step where execution_id = any(p_ids);
  if found then
    delete from wait_item where execution_id = any(p_ids);
    delete from wait_link where execution_id = any(p_ids);
  end if;
  delete from watch where execution_id = any(p_ids);
  delete from prune_later where execution_id = any(p_ids);
end $$;

-- Removes roots that have just ended and that nobody watches. Those that had children go together with them, at the
-- next prune. Of those that had no steps there is nothing but their rows, and now and then a note for prune, which finds
-- nothing and goes.
create or replace function remove_ended(p_ids uuid[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_parents uuid[];
  v_has_steps boolean;
begin
  select array_agg(s.execution_id) filter (where s.has_child), count(*) > 0 into v_parents, v_has_steps
  from (select p.execution_id, bool_or(c.is_there or p.child_ids is not null) as has_child
        from step p
        left join lateral (
          select true as is_there from execution k where k.id = p.child_id and k.parent_id = p.execution_id offset 0) c on true
        where p.execution_id = any(p_ids) group by 1) s;
  if not v_has_steps then
    perform remove_rows(p_ids, p_now);
    return;
  end if;
  insert into prune_later (execution_id, look_at) select id, p_now from unnest(v_parents) id order by id
  on conflict (execution_id) do update set look_at = excluded.look_at;
  perform remove(array(select id from unnest(p_ids) id where id not in (select unnest(v_parents))), p_now);
end $$;

-- Removes a tree whose root is locked. Returns how many executions went; none if some of it has not ended.
create or replace function remove_tree(p_root uuid, p_now timestamptz, p_size_max int) returns int
language plpgsql volatile set search_path from current as $$
declare
  v_tree uuid[] := array(select tree_of(p_root));
begin
  if exists (select from execution where id = any(v_tree) and outcome is null) then
    return 0;
  end if;
  if cardinality(v_tree) > p_size_max then
    insert into prune_rest (execution_id) select id from children_of(array[p_root]) as id on conflict do nothing;
    v_tree := array[p_root];
  end if;
  -- whoever holds a member may be about to lock the root, which is held here: it is not waited for, but looked at later
  if (select count(*) from (
        select from execution where id = any(v_tree) and outcome is not null for update skip locked) m) < cardinality(v_tree) then
    return 0;
  end if;
  perform remove(v_tree, p_now);
  return cardinality(v_tree);
end $$;

create or replace function children_of(p_ids uuid[]) returns setof uuid
language sql stable set search_path from current as $$
  select e.id from child_link c
  cross join lateral (select id, parent_id from execution k where k.id = c.child_id offset 0) e
  where c.execution_id = any(p_ids) and e.parent_id = c.execution_id
$$;

-- Removes some of what is left of large trees.
create or replace function remove_rest(p_limit int, p_now timestamptz) returns int
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[] := array(select execution_id from prune_rest order by execution_id limit p_limit);
begin
  if cardinality(v_ids) > 0 then
    insert into prune_rest (execution_id) select id from children_of(v_ids) as id on conflict do nothing;
    perform remove(v_ids, p_now);
    delete from prune_rest where execution_id = any(v_ids);
  end if;
  return cardinality(v_ids);
end $$;

-- Removes roots that are due with their trees; those that cannot go now are noted.
create or replace function remove_roots(p_roots uuid[], p_now timestamptz, p_size_max int) returns int
language plpgsql volatile set search_path from current as $$
declare
  v_locked uuid[] := lock_due(p_roots, p_now);
  v_trees uuid[];
  v_plain uuid[];
  v_root uuid;
  v_count int;
begin
  v_trees := array(select id from unnest(v_locked) id where exists (
    select from step s where s.execution_id = id and num_nonnulls(s.child_id, s.child_ids) > 0 offset 0));
  v_plain := array(select id from unnest(v_locked) id where id not in (select unnest(v_trees)));
  perform remove(v_plain, p_now);
  v_count := cardinality(v_plain);
  foreach v_root in array v_trees loop
    v_count := v_count + remove_tree(v_root, p_now, p_size_max);
  end loop;
  insert into prune_later (execution_id, look_at)
  select e.id, look_again_at(case when e.id = any(v_locked) then e.finished_at else p_now end, null, p_now)
  from execution e where e.id = any(p_roots) order by e.id
  on conflict do nothing;
  return v_count;
end $$;

-- Takes the next ids behind the cursor of one length of retention, up to ten times as many until there are roots of tasks
-- that keep for that length. Returns those roots, and whether more ids follow.
create or replace function advance_cursor(
  p_keep interval, p_limit int, p_now timestamptz, out p_roots uuid[], out p_more boolean
)
language plpgsql volatile set search_path from current as $$
declare
  v_began_at timestamptz;
  v_first uuid;
  v_last uuid;
  v_some record;
begin
  insert into prune_cursor (keep, after_id, began_at) values (p_keep, first_id('epoch'), p_now) on conflict do nothing;
  select after_id, began_at into v_first, v_began_at from prune_cursor where keep = p_keep;
  v_last := v_first;
  for v_round in 1..10 loop
    select coalesce(array_agg(s.id) filter (where s.parent_id is null and s.lane_id in (
             select l.id from lane l join task t on t.id = l.task_id
             where p_keep in (t.keep_completed_for, t.keep_failed_for))), '{}') as roots,
           count(*) as seen, (array_agg(s.id order by s.id desc))[1] as last
    into v_some
    from (select id, parent_id, lane_id from execution
          where id > v_last and id < cursor_end(p_keep, p_now)
          order by id limit p_limit) s;
    p_roots := v_some.roots;
    p_more := v_some.seen = p_limit;
    v_last := coalesce(v_some.last, v_last);
    exit when cardinality(p_roots) > 0 or not p_more;
  end loop;
  if v_began_at <= p_now - interval '1 day' and not p_more then
    update prune_cursor set after_id = first_id('epoch'), began_at = p_now where keep = p_keep;
  elsif v_last > v_first then
    update prune_cursor set after_id = v_last where keep = p_keep;
  end if;
end $$;

-- p_limit: of how many executions one call takes care at most, a tree counting as one; those it passes over do not count.
-- p_size_max: of a tree that goes whole.
-- Gives up at a lock that others hold on to, as the sweep does.
create or replace function prune(
  p_limit int default 1000, p_size_max int default 10001, p_now timestamptz default null
) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan set lock_timeout = '1s' as $$
declare
  v_now timestamptz := instant(p_now);
  v_context text;
begin
  if not pg_try_advisory_xact_lock(hashtext(current_schema() || '.prune'), 0) then
    return json_build_object('removed', 0, 'more', false);
  end if;
  perform set_config('synchronous_commit', 'off', true);
  return remove_due(p_limit, p_size_max, v_now);
exception when lock_not_available then
  get stacked diagnostics v_context = pg_exception_context;
  return json_build_object('removed', 0, 'more', false, 'gave_up', left(regexp_replace(v_context, '\s+', ' ', 'g'), 300));
end $$;

-- What prune does, of which there is one at a time.
create or replace function remove_due(p_limit int, p_size_max int, p_now timestamptz) returns json
language plpgsql volatile set search_path from current as $$
declare
  v_keep interval;
  v_some record;
  v_due uuid[];
  v_removed int;
  v_more boolean;
begin
  delete from removed where execution_id = any(array(
    select execution_id from removed
    where execution_id < first_id(p_now - interval '1 hour') and removed_at < p_now - interval '1 hour'
    order by execution_id limit p_limit * 10));
  v_removed := remove_rest(p_limit, p_now);
  v_due := array(select execution_id from prune_later where look_at <= p_now order by look_at limit p_limit);
  v_more := v_removed > 0 or cardinality(v_due) = p_limit;
  delete from prune_later where execution_id = any(v_due);
  v_due := due_roots(v_due, null, p_now);
  for v_keep in
    select keep_completed_for from task where keep_completed_for is not null
    union select keep_failed_for from task where keep_failed_for is not null
  loop
    select * into v_some from advance_cursor(v_keep, p_limit, p_now);
    v_more := v_more or v_some.p_more;
    v_due := v_due || due_roots(v_some.p_roots, v_keep, p_now);
  end loop;
  v_removed := v_removed + remove_roots(v_due, p_now, p_size_max);
  return json_build_object('removed', v_removed, 'more', v_more or exists (select from prune_rest));
end $$;

-- Whether a prune would have anything to look at. Asked by the sweep, so that an idle process asks nothing more.
create or replace function is_prune_due(p_now timestamptz) returns boolean
language sql stable set search_path from current as $$
  select exists (select from prune_later where look_at <= p_now)
    or exists (select from prune_rest)
    or exists (select from removed where execution_id < first_id(p_now - interval '1 hour')
               and removed_at < p_now - interval '1 hour')
    or exists (
      select from (select keep_completed_for as keep from task union select keep_failed_for from task) k
      left join prune_cursor c on c.keep = k.keep
      where k.keep is not null and (
        c.keep is null or c.began_at <= p_now - interval '1 day'
        or exists (select from execution where id > c.after_id
                   and id < cursor_end(k.keep, p_now))))
$$;

-- Of executions that have just ended, the roots whose tasks keep nothing of such an end. One that somebody waits for
-- stays for a minute, so that its value arrives.
create or replace function kept_not(p_ids uuid[], p_now timestamptz) returns uuid[]
language plpgsql volatile set search_path from current as $$
declare
  v_ids uuid[];
  v_watched uuid[];
begin
  v_ids := array(
    select e.id from execution e join lane l on l.id = e.lane_id
    join keeps_nothing n on n.task_id = l.task_id join task t on t.id = l.task_id
    where e.id = any(p_ids) and e.parent_id is null and e.outcome is not null and interval '0'
      = case e.outcome when 'completed' then t.keep_completed_for else t.keep_failed_for end);
  v_watched := array(select distinct execution_id from watch where execution_id = any(v_ids) order by 1);
  if cardinality(v_watched) = 0 then
    return v_ids;
  end if;
  insert into prune_later (execution_id, look_at) select id, p_now + interval '1 minute' from unnest(v_watched) id
  on conflict (execution_id) do update set look_at = excluded.look_at;
  return array(select id from unnest(v_ids) id where id <> all(v_watched));
end $$;

-- Notes the same executions for the next prune; for ends that are written among others.
create or replace function remove_soon(p_ids uuid[], p_now timestamptz) returns void
language plpgsql volatile set search_path from current as $$
begin
  if exists (select from keeps_nothing) then
    insert into prune_later (execution_id, look_at)
    select id, p_now from unnest(kept_not(p_ids, p_now)) id order by id
    on conflict (execution_id) do update set look_at = excluded.look_at;
  end if;
end $$;

-- Writes how long tasks keep what has ended. p_tasks: [{name, keep_completed, keep_failed}] in seconds; below zero is
-- for ever, none is the default. A length that a task has newly is searched for from the beginning.
create or replace function keep_as_declared(p_tasks json) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_new interval[];
begin
  with declared as (
    select d.name, case when d.keep_completed >= 0 then make_interval(secs => d.keep_completed) end as completed,
           case when d.keep_failed >= 0 then make_interval(secs => d.keep_failed) end as failed
    from (select t.name, coalesce(t.keep_completed, 604800) as keep_completed,
                 coalesce(t.keep_failed, 2592000) as keep_failed
          from json_to_recordset(p_tasks) as t(name text, keep_completed float8, keep_failed float8)) d
  ), changed as (
    update task t set keep_completed_for = d.completed, keep_failed_for = d.failed
    from declared d
    where t.name = d.name and (t.keep_completed_for, t.keep_failed_for) is distinct from (d.completed, d.failed)
    returning array[t.keep_completed_for, t.keep_failed_for] as keeps
  )
  select array_agg(keep) into v_new from changed cross join lateral unnest(keeps) keep;
  delete from prune_cursor where keep = any(v_new);
  delete from keeps_nothing where task_id in (
    select id from task where keep_completed_for is distinct from interval '0'
      and keep_failed_for is distinct from interval '0');
  insert into keeps_nothing (task_id)
  select id from task where keep_completed_for = interval '0' or keep_failed_for = interval '0'
  order by id on conflict do nothing;
end $$;
