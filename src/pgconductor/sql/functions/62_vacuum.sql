-- hold_off_vacuum: keep autovacuum from reading, minute after minute, the dead rows that it may not remove.
-- Called by one process at a time, in a transaction that it keeps open for a moment, and then again. States: none.
-- Locks: one advisory lock; tables of this schema in share update exclusive mode, taken only where that is possible at
-- once. The lock is in the way of vacuum, analyze and changes of a table's definition, and of nothing else.
--
-- While a snapshot is held open anywhere in the database, what has been deleted or updated since cannot be removed.
-- Autovacuum goes by how many dead rows there are, so it reads all of them once a minute, however often it was in vain:
-- with 15 million of each kind it took a fifth of two processors. It passes by a table whose lock it does not get at
-- once. A vacuum that must come, against wraparound, waits for the lock and gets it after the moment; so does anybody.
-- A holder that is not heard of any more, since its machine was lost or stands still, loses it within five seconds.

-- The tables with so many dead rows that looking at all of them is dear, with what the server's statistics say.
create or replace function many_dead(p_least bigint)
returns table (name text, dead_count bigint, vacuum_count bigint, vacuumed_at timestamptz)
language plpgsql stable set search_path from current as $$
#variable_conflict use_column
begin
  return query
    select c.relname::text, pg_stat_get_dead_tuples(c.oid),
           pg_stat_get_vacuum_count(c.oid) + pg_stat_get_autovacuum_count(c.oid),
           greatest(pg_stat_get_last_vacuum_time(c.oid), pg_stat_get_last_autovacuum_time(c.oid))
    from pg_class c
    where c.relname in ('ready', 'lease', 'execution', 'step', 'timer', 'wait', 'wait_item')
      and c.relnamespace = quote_ident(current_schema())::regnamespace
      and pg_stat_get_dead_tuples(c.oid) >= p_least;
end $$;

-- How long a vacuum that left p_left_count dead rows is not repeated: two minutes for each million, so that what reading
-- them again takes is the same small share of a processor, be there many or few; at least ten minutes.
create or replace function vacuum_rest(p_left_count bigint) returns interval
language sql immutable set search_path from current as $$
  select greatest(interval '10 minutes', interval '2 minutes' * (p_left_count / 1000000.0));
$$;

-- The tables of which another vacuum would be in vain: the latest one left much behind, less than half as much has come
-- since, and it was not long ago. So all vacuums together read no more than a few times what there is, and when the
-- snapshot is gone, the first one that removes something comes after p_longest at the latest. None is null.
create or replace function futile_vacuums(p_least bigint, p_longest interval) returns text[]
language plpgsql stable set search_path from current as $$
begin
  return (
    select array_agg(d.name order by d.name)
    from many_dead(p_least) d join vacuum_mark m on m.name = d.name and m.vacuum_count = d.vacuum_count
    where m.left_count >= p_least and d.dead_count < m.left_count * 1.5
      and d.vacuumed_at > clock_timestamp() - least(p_longest, vacuum_rest(m.left_count)));
end $$;

-- Notes what vacuums that came since the last look have left. Returns whether one is to be held off, and nobody does it.
create or replace function note_vacuums(p_least bigint default 250000, p_longest interval default '1 hour')
returns boolean
language plpgsql volatile set search_path from current as $$
begin
  -- of all that have a mark: one that left little must be noted, too, before much dies again
  update vacuum_mark m set vacuum_count = d.vacuum_count, left_count = d.dead_count
  from many_dead(0) d where d.name = m.name and d.vacuum_count <> m.vacuum_count;
  insert into vacuum_mark (name, vacuum_count, left_count)
  select d.name, d.vacuum_count, 0 from many_dead(p_least) d
  where not exists (select from vacuum_mark m where m.name = d.name);
  return futile_vacuums(p_least, p_longest) is not null and pg_try_advisory_xact_lock(hashtext(current_schema()), 1007);
end $$;

-- Locks, until the transaction ends, the tables whose vacuum would be in vain. Returns their names; none is null, and so
-- it is while another process does it. A table that is being vacuumed, or changed, is named and not locked.
create or replace function hold_off_vacuum(p_least bigint default 250000, p_longest interval default '1 hour')
returns json
language plpgsql volatile set search_path from current as $$
declare
  v_names text[];
  v_name text;
begin
  if not pg_try_advisory_xact_lock(hashtext(current_schema()), 1007) then
    return null;
  end if;
  perform set_config('idle_in_transaction_session_timeout', '5s', true);
  v_names := futile_vacuums(p_least, p_longest);
  foreach v_name in array coalesce(v_names, '{}') loop
    begin
      execute format('lock table %I.%I in share update exclusive mode nowait', current_schema(), v_name);
    exception when lock_not_available then
      null;  -- the next call tries again
    end;
  end loop;
  return to_json(v_names);
end $$;
