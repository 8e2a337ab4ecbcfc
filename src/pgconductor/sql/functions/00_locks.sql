-- The instant, ids and locks that every operation shares.
--
-- Lock order, the same in every function, so that no two of them deadlock:
--   1. the caller's orchestrator row, for key share (the sweep alone takes it for update: a process that was declared
--      dead can no longer settle, and one that is settling cannot be declared dead)
--   2. tree locks, by bucket: shared for whoever creates children, exclusive for whoever cancels descendants, so that
--      no child appears under a cancelled ancestor
--   3. execution rows by (depth descending, id): child before parent
--   4. everything else, which is only touched under its execution's lock or is removed by one winner
--
-- What is called for every batch is in plpgsql even where it is one query: that keeps its plan, while a function in sql
-- that is not inlined is planned anew by each statement that calls it (up to Postgres 17).
--
-- A plan that is kept may have been made while the tables were nearly empty, and going through all of one costs nothing
-- then. It stays until somebody has analyzed them. So no statement leaves that open: what is looked up is `cross join
-- lateral (... offset 0)`, what must not be there `not exists (... offset 0)`, and what is changed without having been
-- locked is found by `id = any(array[x.id])`, which goes by the key, and from x to it only. Where claims and settles go
-- through hundreds of rows, `id = any(all of them)` reads the key once, in a function that has no nested loops to offer.

-- Another instant than the clock's, for tests. Only those who may create in the schema can have one: whoever could move
-- the clock could end leases and periods. session_user: in a function that runs as the owner, everybody is the owner.
create or replace function moved_instant(p_now timestamptz) returns timestamptz
language plpgsql stable parallel safe set search_path from current as $$
begin
  if not has_schema_privilege(session_user, current_schema(), 'create') then
    raise exception 'only the owner of schema % may say what time it is', quote_ident(current_schema())
      using errcode = '42501';
  end if;
  return p_now;
end $$;

-- The database's clock, unless a test moves it.
create or replace function instant(p_now timestamptz) returns timestamptz
language sql volatile parallel safe
return case when p_now is null then clock_timestamp() else moved_instant(p_now) end;

-- A time-ordered id for executions that are created in SQL.
create or replace function uuid7() returns uuid
language sql volatile parallel safe
return encode(
  set_bit(set_bit(overlay(
    uuid_send(gen_random_uuid())
    placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
    from 1 for 6), 52, 1), 53, 1), 'hex')::uuid;

create or replace function merge(p_left effects, p_right effects) returns effects
language plpgsql immutable parallel safe set search_path from current as $$
begin
  return row(p_left.lane_ids || p_right.lane_ids, p_left.watchers || p_right.watchers)::effects;
end $$;

create or replace function queues_of(p_lanes int[]) returns json
language plpgsql stable set search_path from current as $$
begin
  return (select coalesce(json_agg(distinct queue_id), '[]') from lane where id = any(p_lanes));
end $$;

-- Sends a hint to those who watch, from functions whose caller does not pass it on. A hint, never the truth.
create or replace function tell(p_watchers text[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  if cardinality(p_watchers) > 0 then
    perform pg_notify(current_schema(), left('told ' || array_to_string(p_watchers, ' '), 7900));
  end if;
end $$;

-- Returns false when the process was declared dead; else holds it alive until the transaction ends.
create or replace function hold_alive(p_orchestrator uuid) returns boolean
language plpgsql volatile set search_path from current as $$
begin
  perform from orchestrator where id = p_orchestrator for key share;
  return found;
end $$;

create or replace function lock_trees(p_creating uuid[], p_cancelling uuid[]) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_tree record;
begin
  for v_tree in
    select uuid_hash(root) & 63 as bucket, bool_or(cancelling) as cancelling
    from (select unnest(p_creating) as root, false as cancelling
          union all select unnest(p_cancelling), true) t
    group by bucket order by bucket
  loop
    if v_tree.cancelling then
      perform pg_advisory_xact_lock(hashtext(current_schema()), v_tree.bucket);
    else
      perform pg_advisory_xact_lock_shared(hashtext(current_schema()), v_tree.bucket);
    end if;
  end loop;
end $$;

create or replace function lock_executions(p_ids uuid[]) returns void
language plpgsql volatile set search_path from current as $$
begin
  perform from execution where id = any(p_ids) order by depth desc, id for no key update;
end $$;

-- Unfinished attached children, at any depth. Stable while the tree lock is held exclusively.
create or replace function open_descendants(p_ids uuid[]) returns setof uuid
language plpgsql stable set search_path from current as $$
begin
  return query
    with recursive tree (id) as (
      select child_id from open_child where execution_id = any(p_ids)
      union
      select o.child_id from tree t cross join lateral (
        select child_id from open_child k where k.execution_id = t.id offset 0) o
    )
    select id from tree;
end $$;

-- In how many seconds the next thing is due that only time brings; below zero when it is overdue. Schedules that are
-- due already do not count: the claims bring them.
create or replace function next_due(p_now timestamptz) returns float8
language plpgsql stable set search_path from current as $$
begin
  return (
    select extract(epoch from least(
      (select due_at from timer where due_at < 'infinity' order by due_at limit 1),
      (select due_at from expiry order by due_at limit 1),
      (select next_at from schedule where next_at > p_now order by next_at limit 1),
      next_gate(),
      (select p_now from event_pending order by ord limit 1)) - p_now));
end $$;

-- The instant of a local time; one that comes twice counts at its first occurrence.
create or replace function first_instant(p_local timestamp, p_zone text) returns timestamptz
language plpgsql stable set search_path from current as $$
declare
  v_instant timestamptz := p_local at time zone p_zone;
begin
  return case when (v_instant - interval '1 hour') at time zone p_zone = p_local then v_instant - interval '1 hour'
    else v_instant end;
end $$;

-- In how many seconds a task's window closes; null while it is closed. The hours are local; a window that ends before it
-- begins, or then, ends on the next day. One that begins in an hour that is left out begins after it.
create or replace function closes_in(p_task task, p_now timestamptz) returns float8
language plpgsql stable set search_path from current as $$
declare
  v_local timestamp := p_now at time zone p_task.window_zone;
  v_start timestamp;
  v_end timestamptz;
begin
  for v_days_ago in 0..1 loop
    v_start := v_local::date - v_days_ago + p_task.window_start;
    v_end := first_instant(v_local::date - v_days_ago + p_task.window_end + case
      when p_task.window_end <= p_task.window_start then interval '1 day' else interval '0' end, p_task.window_zone);
    if (v_local >= v_start or p_now >= first_instant(v_start, p_task.window_zone)) and p_now < v_end then
      return extract(epoch from v_end - p_now);
    end if;
  end loop;
  return null;
end $$;
