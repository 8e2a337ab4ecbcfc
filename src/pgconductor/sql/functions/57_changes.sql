-- note_row_change, note_row_changes: what native triggers on the user's tables call; next_trigger: how they follow code.
-- Called by Postgres for a writer, in the writer's transaction; next_trigger by an orchestrator that starts.
-- States: none -> ready. Locks: none that a second writer would wait for. Errors: PC003 from next_trigger; a trigger
-- function raises nothing, it records in trigger_error what went wrong, and the write goes on.
--
-- The trigger functions run with the rights of the engine's owner on behalf of a role that may have none here, so
-- nothing that a role can define is run by them:
--   * the condition of a subscription is the native WHEN of its trigger: Postgres evaluates it before the call, with
--     the writer's rights
--   * a value becomes JSON by to_json only if its type, or the type that its domain or array is made of, is built in.
--     For any other type to_json would look for a cast to json, which whoever owns the type may define. Such values
--     become JSON strings of what the type's output function prints; only a superuser can define one of those.
--   * the expression that does so was made of quoted names when the trigger was registered. It looks at the type again
--     when it runs, since a column may have been given another one since.
-- Settings of the session that change how a value is printed are pinned.

-- ---------------------------------------------------------------- a row as JSON

-- The type behind a type's domains and arrays.
create or replace function leaf_type(p_type oid) returns oid
language sql stable set search_path from current as $$
  with recursive leaf (id, depth) as (
    select p_type, 0
    union all
    select case when t.typtype = 'd' then t.typbasetype else t.typelem end, depth + 1
    from leaf join pg_type t on t.oid = leaf.id
    where t.typtype = 'd' or t.typcategory = 'A' and t.typelem <> 0 and t.oid >= 16384
  )
  select id from leaf order by depth desc limit 1
$$;

-- An expression for the JSON text of one value. Types below 16384 are those that Postgres is born with.
create or replace function value_expression(p_type oid, p_value text) returns text
language sql stable set search_path from current as $$
  select format(
    'coalesce(case when %s then cast(%s as text) when not (%s is null) then cast(to_json(format(''%%s'', %s)) as text) '
    'end, ''null'')',
    case when p_type < 16384 then format('cast(pg_typeof(%s) as oid) < 16384', p_value)
         else format('cast(pg_typeof(%s) as oid) = %s', p_value, p_type) || case when is_array or is_plain then ''
              else ' and false' end end,
    case when is_plain then format('to_json(%s)', p_value)
         when is_array then
           format('to_json(case when not (%s is null) then cast(format(''%%s'', %s) as text[]) end)', p_value, p_value)
         else 'null' end,
    p_value, p_value)
  from (select leaf_type(p_type) < 16384 as is_plain,
               exists (select from pg_type where oid = p_type and typcategory = 'A') as is_array) t
$$;

-- An expression for the JSON text of some columns of a row.
create or replace function row_expression(p_relation oid, p_columns text[], p_row text) returns text
language sql stable set search_path from current as $$
  select '''{''' || string_agg(
      format(' || %L || %s', case when c.place > 1 then ',' else '' end || to_json(c.name)::text || ':',
             value_expression(a.atttypid, format('%s.%I', p_row, c.name))), '' order by c.place) || ' || ''}'''
  from unnest(p_columns) with ordinality as c(name, place)
  join pg_attribute a on a.attrelid = p_relation and a.attname = c.name and a.attnum > 0 and not a.attisdropped
$$;

-- ---------------------------------------------------------------- what a change does

-- Keeps the first error of a trigger in a transaction, and the newest thousand in all. Waits for nobody.
create or replace function note_trigger_error(
  p_name text, p_table text, p_op text, p_state text, p_message text
) returns void
language plpgsql volatile set search_path from current as $$
begin
  if exists (select from trigger_error where transaction_id = pg_current_xact_id() and trigger_name = p_name) then
    return;
  end if;
  insert into trigger_error (at, transaction_id, trigger_name, task, table_name, op, sqlstate, message)
  select clock_timestamp(), pg_current_xact_id(), p_name,
         (select t.name from row_trigger r join task t on t.id = r.task_id where r.name = p_name),
         p_table, p_op, p_state, left(p_message, 1000);
  delete from trigger_error where id in (
    select id from trigger_error where id <= (select max(id) - 1000 from trigger_error)
    order by id limit 10 for update skip locked);
exception when others then
  raise log 'pgconductor: trigger % of % on %: % (not recorded: %)', p_name, p_op, p_table, p_message, sqlerrm;
end $$;

-- Makes the executions of changes: p_data are what their handlers are told. Nothing of a whole without the others.
create or replace function start_by_changes(p_trigger row_trigger, p_data text[]) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_lane lane;
begin
  select l.* into strict v_lane from task t join lane l on l.task_id = t.id and l.queue_id = t.queue_id
  where t.id = p_trigger.task_id;
  perform insert_executions(array(
    select row(uuid7(), v_lane.id, nextval('execution_ord'), 0, 0, null, null, null, null, null, null,
               p_trigger.table_name || '.' || p_trigger.op, '{}', null, 'change', d)::new_execution
    from unnest(p_data) d), instant(null));
  perform pg_notify(current_schema(), 'ready ' || v_lane.queue_id);
end $$;

-- How what a handler is told begins; the old row, `,"new":`, the new row and `}` follow.
create or replace function change_head(p_trigger row_trigger) returns text
language sql stable set search_path from current as $$
  select format('{"name":%s,"op":"%s","old":', to_json(p_trigger.table_name || '.' || p_trigger.op), p_trigger.op)
$$;

create or replace function note_too_large(p_name text, p_table text, p_op text, p_size int) returns void
language sql volatile set search_path from current as $$
  select note_trigger_error(p_name, p_table, p_op, '54000',
    format('%s bytes of JSON, at most 1048576 are allowed; hand on fewer columns', p_size))
$$;

-- Refuses a table that lacks a column of the trigger: row.name of a name that is no column calls the function of that name,
-- with the owner's rights, on whatever the row holds.
create or replace function check_columns(p_trigger row_trigger, p_relation oid) returns void
language plpgsql stable set search_path from current as $$
declare
  v_column text := (
    select c.name from unnest(p_trigger.columns) as c(name) where not exists (
      select from pg_attribute a
      where a.attrelid = p_relation and a.attname = c.name::name and a.attnum > 0 and not a.attisdropped) limit 1);
begin
  if v_column is not null then
    raise exception 'column "%" does not exist in %, and trigger % hands it on', v_column, p_relation::regclass, p_trigger.name
      using errcode = '42703';
  end if;
end $$;

-- For each row: what has a condition, updates, and tables whose rows also come in other ways (partitions).
-- An update without a condition of its own counts if a column that is handed on has changed.
create or replace function note_row_change() returns trigger
language plpgsql security definer set search_path from current
set timezone = 'UTC' set datestyle = 'ISO, YMD' set intervalstyle = 'postgres' set bytea_output = 'hex'
set extra_float_digits = 1 set enable_seqscan = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  v_table text := format('%I.%I', tg_table_schema, tg_table_name);
  v_trigger row_trigger;
  v_old text := 'null';
  v_new text := 'null';
  v_data text;
begin
  select * into v_trigger from row_trigger where name = tg_argv[0];
  if not found then
    return null;
  end if;
  perform check_columns(v_trigger, tg_relid);
  if tg_op <> 'INSERT' then
    execute 'select ' || v_trigger.expression into v_old using old;
  end if;
  if tg_op <> 'DELETE' then
    execute 'select ' || v_trigger.expression into v_new using new;
  end if;
  if tg_op = 'UPDATE' and v_trigger.condition is null and v_old = v_new then
    return null;
  end if;
  v_data := change_head(v_trigger) || v_old || ',"new":' || v_new || '}';
  if octet_length(v_data) > 1048576 then
    perform note_too_large(v_trigger.name, v_table, lower(tg_op), octet_length(v_data));
  else
    perform start_by_changes(v_trigger, array[v_data]);
  end if;
  return null;
exception when others then
  perform note_trigger_error(tg_argv[0], v_table, lower(tg_op), sqlstate, sqlerrm);
  return null;
end $$;

-- For each statement: all rows that it inserted or deleted, in parts of some megabytes.
create or replace function note_row_changes() returns trigger
language plpgsql security definer set search_path from current
set timezone = 'UTC' set datestyle = 'ISO, YMD' set intervalstyle = 'postgres' set bytea_output = 'hex'
set extra_float_digits = 1 set enable_seqscan = off set enable_mergejoin = off set enable_hashagg = off set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  v_table text := format('%I.%I', tg_table_schema, tg_table_name);
  v_trigger row_trigger;
  v_data text[];
  v_size_max int;
begin
  select * into v_trigger from row_trigger where name = tg_argv[0];
  if not found then
    return null;
  end if;
  perform check_columns(v_trigger, tg_relid);
  for v_data, v_size_max in execute format(
    'select array_agg(data order by place) filter (where size <= 1048576) as data, max(size) as size_max from ('
    '  select data, size, row_number() over () as place,'
    '         sum(size + 200) over (rows unbounded preceding) / 8000000 as part from ('
    '    select data, octet_length(data) as size from ('
    '      select $1 || %s || '',"new":'' || %s || ''}'' as data from changed_rows r offset 0) d offset 0) s offset 0) p'
    ' group by part order by part',
    case when tg_op = 'DELETE' then v_trigger.expression else '''null''' end,
    case when tg_op = 'INSERT' then v_trigger.expression else '''null''' end) using change_head(v_trigger)
  loop
    if v_size_max > 1048576 then
      perform note_too_large(v_trigger.name, v_table, lower(tg_op), v_size_max);
    end if;
    if v_data is not null then
      perform start_by_changes(v_trigger, v_data);
    end if;
  end loop;
  return null;
exception when others then
  perform note_trigger_error(tg_argv[0], v_table, lower(tg_op), sqlstate, sqlerrm);
  return null;
end $$;

-- ---------------------------------------------------------------- how triggers follow the code

create or replace function refuse_trigger(p_task text, p_table text, p_op text, p_reason text, p_remedy text)
returns void language plpgsql set search_path from current as $$
declare
  v_place text := format('task ''%s'': table(''%s'', ''%s'')', p_task, p_table, p_op);
begin
  raise exception '%: %; %', v_place, p_reason, p_remedy
  using errcode = 'PC003', detail = json_build_object('place', v_place, 'reason', p_reason, 'remedy', p_remedy)::text;
end $$;

-- Finds the table that code names, and the columns; refuses what cannot have a trigger.
create or replace function find_table(p_task text, p_table text, p_op text, p_columns text[]) returns pg_class
language plpgsql stable set search_path from current as $$
declare
  v_class pg_class;
  v_column text;
begin
  begin
    if cardinality(parse_ident(p_table)) = 2 then
      select * into v_class from pg_class where oid = to_regclass(p_table);
    end if;
  exception
    when invalid_parameter_value or invalid_name or syntax_error then
      null;
    when insufficient_privilege then
      perform refuse_trigger(p_task, p_table, p_op, format('the role %I may not use its schema', current_user),
                             format('its owner can say: grant usage on schema %I to %I',
                                    (parse_ident(p_table))[1], current_user));
  end;
  if v_class.oid is null then
    perform refuse_trigger(p_task, p_table, p_op, 'there is no such table', 'name it with its schema, as SQL writes it: '
                           'public.contact, or "Shop"."Order line"');
  elsif v_class.relkind not in ('r', 'p', 'f') or v_class.relpersistence = 't' then
    perform refuse_trigger(p_task, p_table, p_op, 'it is not a table that others write', 'name the table behind it');
  elsif v_class.relnamespace = quote_ident(current_schema())::regnamespace then
    perform refuse_trigger(p_task, p_table, p_op, 'it is a table of the engine', 'use events or results instead');
  end if;
  foreach v_column in array p_columns loop
    if not exists (select from pg_attribute where attrelid = v_class.oid and attname = v_column and attnum > 0
                   and not attisdropped) then
      perform refuse_trigger(p_task, p_table, p_op, format('the table has no column ''%s''', v_column),
                             'check columns=; they are written as they are stored, without quotes');
    end if;
  end loop;
  return v_class;
end $$;

-- A statement trigger sees all rows at once, but neither a condition nor rows that come by a partitioned parent.
create or replace function takes_sets(p_class pg_class, p_op text, p_condition text) returns boolean
language sql immutable set search_path from current
return p_condition is null and p_op <> 'update' and p_class.relkind = 'r' and not p_class.relispartition
  and not p_class.relhassubclass;

-- The condition stands on a line of its own, so that a comment in it ends there. An update that rewrites a row as it
-- was is left out before the call; naming the columns would forbid the table's owner to drop them or change their type.
create or replace function trigger_definition(
  p_name text, p_class pg_class, p_op text, p_condition text
) returns text
language sql stable set search_path from current as $$
  select format('create or replace trigger %I after %s on %I.%I ', p_name, p_op, n.nspname, p_class.relname)
    || case when takes_sets(p_class, p_op, p_condition) then
         format('referencing %s table as changed_rows for each statement ',
                case p_op when 'insert' then 'new' else 'old' end)
       else 'for each row ' || case
         when p_condition is not null then E'when (\n' || p_condition || E'\n) '
         when p_op = 'update' then 'when (old.* operator(pg_catalog.*<>) new.*) ' else '' end end
    || format('execute function %I.%s(%L)', current_schema(),
              case when takes_sets(p_class, p_op, p_condition) then 'note_row_changes' else 'note_row_change' end, p_name)
  from pg_namespace n where n.oid = p_class.relnamespace
$$;

-- The rows of row_trigger as code wants them. p_triggers: [{task, table, op, columns, when?}]
create or replace function wanted_triggers(p_deployment text, p_triggers json) returns setof row_trigger
language plpgsql stable set search_path from current as $$
declare
  v_want record;
  v_class pg_class;
  v_name text;
begin
  for v_want in
    select x.task, x."table", x.op, array(select json_array_elements_text(x.columns)) as columns, x."when", k.id as task_id,
           row_number() over (partition by x.task, x."table", x.op order by x.place) as place
    from rows from (json_to_recordset(p_triggers) as (task text, "table" text, op text, columns json, "when" text))
      with ordinality as x(task, "table", op, columns, "when", place)
    join task k on k.name = x.task
    order by x.place
  loop
    v_class := find_table(v_want.task, v_want."table", v_want.op, v_want.columns);
    v_name := 'pgconductor_' || md5(json_build_array(current_schema(), p_deployment, v_want.task, v_want."table", v_want.op,
                                                     v_want.place)::text);
    return next row(
      v_name, p_deployment, v_want.task_id, v_want."table", v_want.op, v_want.columns, v_want."when",
      takes_sets(v_class, v_want.op, v_want."when"),
      expression_of(v_class.oid, v_want.columns, takes_sets(v_class, v_want.op, v_want."when")),
      trigger_definition(v_name, v_class, v_want.op, v_want."when"), instant(null))::row_trigger;
  end loop;
end $$;

-- Where a trigger of ours stands, if it does; by its argument, since the table's owner may have renamed it. If there are
-- two, the one that is out of place.
create or replace function trigger_place(p_name text) returns pg_trigger
language sql stable set search_path from current as $$
  select t from pg_trigger t join pg_proc p on p.oid = t.tgfoid
  where p.pronamespace = quote_ident(current_schema())::regnamespace and p.proname in ('note_row_change', 'note_row_changes')
    and t.tgparentid = 0 and t.tgargs = convert_to(p_name, getdatabaseencoding()) || '\x00'
  order by t.tgname = p_name limit 1
$$;

-- Makes a trigger that never fires of one that the role may not drop.
create or replace function mute_trigger(p_place pg_trigger, p_op text) returns text
language sql stable set search_path from current as $$
  select format('create or replace trigger %I after %s on %s for each row when (false) execute function %I.note_row_change('''')',
                p_place.tgname, p_op, p_place.tgrelid::regclass, current_schema())
$$;

-- Refuses, naming the right that is missing, where the connection's role may not make a trigger.
create or replace function check_trigger_right(p_task text, p_table text, p_op text) returns void
language plpgsql stable set search_path from current as $$
begin
  if not has_table_privilege(to_regclass(p_table), 'trigger') then
    perform refuse_trigger(p_task, p_table, p_op, format('the role %I may not make triggers on it', current_user),
                           format('its owner can say: grant trigger on table %s to %I', p_table, current_user));
  end if;
end $$;

-- Enters into row_trigger the first thing in which the triggers differ from the code, and returns what has to be done
-- to the tables for it; null if nothing differs. One at a time, each in a transaction with its statements, which go
-- to the server as they are: a definition holds a condition that only the server can read.
-- p_apply: do it, under the lock of all that register; else look, changing nothing.
-- Returns {name, task, table, op, when, statements, otherwise}; otherwise: for roles that may make triggers and not
-- drop them; comment: says whose it is, if the role may write one.
create or replace function next_trigger(p_deployment text, p_triggers json, p_apply boolean default false) returns json
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
  v_want row_trigger;
  v_have row_trigger;
  v_place pg_trigger;
  v_wanted text[] := '{}'::text[];
begin
  if p_apply then
    perform set_config('lock_timeout', '2s', true);
    perform pg_advisory_xact_lock(hashtext(current_schema()), 1003);
  end if;
  for v_want in select * from wanted_triggers(p_deployment, p_triggers) loop
    v_wanted := v_wanted || v_want.name;
    select * into v_have from row_trigger where name = v_want.name;
    v_place := trigger_place(v_want.name);
    continue when v_place.tgname = v_want.name
      and (v_have.definition, v_have.expression, v_have.columns, v_place.tgrelid)
      is not distinct from (v_want.definition, v_want.expression, v_want.columns, to_regclass(v_want.table_name)::oid);
    return enter_trigger(v_want, v_place, p_apply, v_have.definition is distinct from v_want.definition);
  end loop;
  select * into v_have from row_trigger
  where deployment = p_deployment and name <> all (v_wanted) order by name limit 1;
  return remove_trigger(v_have, p_apply);
end $$;

-- The expression for the JSON text of a subscription's columns, as note_row_change and note_row_changes run it.
create or replace function expression_of(p_relation oid, p_columns text[], p_is_set_based boolean) returns text
language sql stable set search_path from current as $$
  select row_expression(p_relation, p_columns, case when p_is_set_based then 'r' else '$1' end)
$$;

-- Enters a subscription. The expression, which is run with the owner's rights, is made here of names, whatever the
-- caller says of it; the definition is only compared, and run by nobody.
create or replace function write_row_trigger(p_want row_trigger, p_relation oid) returns void
language plpgsql volatile set search_path from current as $$
begin
  p_want.expression := expression_of(p_relation, p_want.columns, p_want.is_set_based);
  p_want.created_at := clock_timestamp();
  insert into row_trigger select p_want.*
  on conflict (name) do update
  set columns = excluded.columns, condition = excluded.condition, is_set_based = excluded.is_set_based,
      expression = excluded.expression, definition = excluded.definition;
end $$;

create or replace function forget_row_trigger(p_name text) returns void
language sql volatile set search_path from current as $$
  delete from row_trigger where name = p_name
$$;

-- Makes or changes one trigger. One that stands elsewhere, since tables were exchanged or it was renamed, goes.
create or replace function enter_trigger(p_want row_trigger, p_place pg_trigger, p_apply boolean, p_differs boolean)
returns json
language plpgsql volatile set search_path from current as $$
declare
  v_table regclass := to_regclass(p_want.table_name);
  v_task text := (select name from task where id = p_want.task_id);
  v_there boolean := coalesce(p_place.tgrelid = v_table and p_place.tgname = p_want.name, false);
  v_makes text[] := case when p_differs or not v_there then array[p_want.definition] else '{}'::text[] end;
  v_drops boolean := p_place.tgrelid is not null and not v_there;
begin
  if p_apply then
    perform write_row_trigger(p_want, v_table);
  end if;
  if cardinality(v_makes) > 0 then
    perform check_trigger_right(v_task, p_want.table_name, p_want.op);
  end if;
  return json_build_object(
    'name', p_want.name, 'task', v_task, 'table', p_want.table_name, 'op', p_want.op, 'when', p_want.condition,
    'statements', case when v_drops then array[format('drop trigger %I on %s', p_place.tgname, p_place.tgrelid::regclass)]
                       else '{}'::text[] end || v_makes,
    'otherwise', case when v_drops then mute_trigger(p_place, p_want.op) || v_makes else '{}'::text[] end,
    'comment', case when cardinality(v_makes) > 0 then
      format('comment on trigger %I on %s is %L', p_want.name, v_table,
             format('pgconductor: starts task %s of deployment %s; its workers make, change and remove it', v_task,
                    p_want.deployment)) end);
end $$;

-- Removes what code no longer declares.
create or replace function remove_trigger(p_have row_trigger, p_apply boolean) returns json
language plpgsql volatile set search_path from current as $$
declare
  v_place pg_trigger := trigger_place(p_have.name);
  v_is_there boolean := v_place.tgrelid is not null;
begin
  if p_have.name is null then
    return null;
  end if;
  if p_apply then
    perform forget_row_trigger(p_have.name);
  end if;
  return json_build_object(
    'name', p_have.name, 'task', (select name from task where id = p_have.task_id), 'table', p_have.table_name,
    'op', p_have.op, 'when', null,
    'statements', case when v_is_there then array[format('drop trigger %I on %s', v_place.tgname,
                                                         v_place.tgrelid::regclass)] else '{}'::text[] end,
    'otherwise', case when v_is_there then array[mute_trigger(v_place, p_have.op)] else '{}'::text[] end,
    'comment', null);
end $$;

-- What row changes did not start, and why; the newest thousand.
create or replace view trigger_errors as
select id, at, task, table_name as "table", op, sqlstate, message from trigger_error;

-- ---------------------------------------------------------------- what arrives, for gen types

-- Describes the tables and views of a schema as their rows arrive with a change; for `pgconductor gen types`. Partitions
-- only by name. p_tables: names as they are stored; null for all.
-- Returns [{name, columns: [{name, type, dimensions, nullable}]}]; type: of what the value is made of, if that is built in.
create or replace function describe_rows(p_schema text, p_tables text[]) returns json
language sql stable set search_path from current set enable_seqscan = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan as $$
  select coalesce(json_agg(json_build_object('name', c.relname, 'columns', (
    select coalesce(json_agg(json_build_object(
      'name', a.attname,
      'type', case when leaf.id < 16384 then coalesce(e.typname, leaf.typname) else 'text' end,
      'dimensions', case when t.typcategory = 'A' then greatest(a.attndims, t.typndims, 1) else 0 end,
      'nullable', not (a.attnotnull or t.typnotnull) or c.relkind in ('v', 'm')) order by a.attnum), '[]')
    from pg_attribute a
    join pg_type t on t.oid = a.atttypid
    cross join lateral (select oid as id, typname, typelem, typcategory from pg_type
                        where oid = leaf_type(a.atttypid)) leaf
    left join pg_type e on e.oid = leaf.typelem and leaf.typcategory = 'A'
    where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)) order by c.relname collate "C"), '[]')
  from pg_class c
  where c.relnamespace = (select oid from pg_namespace where nspname = p_schema)
    and c.relkind in ('r', 'p', 'v', 'm', 'f')
    and case when p_tables is null then not c.relispartition else c.relname = any(p_tables) end
$$;
