-- rights: who may call what. Applied last, whenever the functions are; called by whoever owns the schema.
-- States: none. Locks: the catalog's own. Errors: PC003 for a kind or role that does not exist.
--
-- Four kinds of role. The owner owns the schema and all that is in it: it migrates, and no process needs it to work.
-- The others own nothing, and have no right to write any table. They call functions, which run as the owner:
--
--   worker     what orchestrators call and operators do, and all of the other two
--   enqueuer   starts executions, emits events, and asks after an execution whose id it knows
--   reader     the public views, the reports, and why_not_running
--
-- A function that runs as the owner runs nothing that its caller wrote: its search_path is fixed with pg_temp last, no
-- other role can create anything in the schema, and no argument is ever run as SQL. Registering row triggers is
-- different. There the text of a condition becomes part of a statement, so all of it runs with the rights of the
-- caller, on tables where the caller may make triggers; only the entry in row_trigger is made by the owner, from names.
--
-- Who is a worker, an enqueuer or a reader is what the rights themselves say: whoever may call claim, enqueue or
-- why_not_running has the rest of its kind too, after each migration. Nothing else is kept of the roles.

-- One row a kind and sort of object. runs_as: whose rights the functions have.
create or replace function rights() returns table (kind text, object text, runs_as text, names text[])
language sql immutable set search_path from current as $$
  values
    ('enqueuer', 'function', 'owner', '{invoke,enqueue,enqueue_one,enqueue_alike,confirm,emit,emit_events,state_of,
      watch_result,watch_results}'::text[]),
    ('reader', 'view', 'owner', '{executions,failed_executions,steps,queues,workers,schedules,events,trigger_errors}'),
    ('reader', 'table', null, '{migration}'),
    ('reader', 'function', 'owner', '{why_not_running,state_of,list_runs,show_run,list_queues,list_tasks,list_workers,
      list_schedules,list_events,list_subscriptions,list_roles,overview,describe_rows}'),
    ('worker', 'function', 'owner', '{register_tasks,register_queues,register_orchestrator,note_tasks,register_schedules,
      register_subscriptions,claim,claim_named,save,save_transaction,settle,beat,sweep,hold_off_vacuum,prune,reconcile,retire,fire_timers,
      fire_schedules,load_executions,outstanding,cancel_as_step,schedule_as_step,unschedule_as_step}'),
    ('worker', 'function', 'owner', '{cancel,cancel_by_key,redrive,pause_queue,resume_queue,set_limit,schedule,unschedule,
      pause_schedules,fire_now,keep_events}'),
    ('worker', 'table', null, '{task,row_trigger}'),
    ('worker', 'function', 'caller', '{next_trigger,wanted_triggers,find_table,refuse_trigger,takes_sets,expression_of,
      row_expression,value_expression,leaf_type,trigger_definition,instant,trigger_place,mute_trigger,check_trigger_right,enter_trigger,
      remove_trigger}'),
    ('worker', 'function', 'owner', '{write_row_trigger,forget_row_trigger,note_row_change,note_row_changes}')
$$;

-- Which roles are of which kind, by the function that makes them so.
create or replace function granted_roles() returns table (kind text, role text)
language sql stable set search_path from current as $$
  select k.kind, r.rolname::text
  from (values ('worker', 'claim'), ('enqueuer', 'enqueue'), ('reader', 'why_not_running')) as k(kind, key)
  join pg_proc p on p.proname = k.key and p.pronamespace = quote_ident(current_schema())::regnamespace
  cross join lateral aclexplode(p.proacl) a
  join pg_roles r on r.oid = a.grantee
  where a.privilege_type = 'EXECUTE' and a.grantee <> p.proowner
    and (k.kind = 'worker' or not has_function_privilege(a.grantee, (
      select oid from pg_proc where proname = 'claim' and pronamespace = p.pronamespace), 'execute'))
  order by 1, 2
$$;

-- The owner and the granted roles, for people: [{kind, role}].
create or replace function list_roles() returns json
language sql stable set search_path from current as $$
  select json_agg(row_to_json(n)) from (
    select 'owner' as kind, pg_get_userbyid(nspowner)::text as role from pg_namespace where nspname = current_schema()
    union all
    (select kind, role from granted_roles() order by kind = 'worker' desc, kind, role)) n
$$;

-- Gives a role what its kind needs. Takes nothing away that was granted by hand.
create or replace function grant_rights(p_kind text, p_role text) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_schema oid := quote_ident(current_schema())::regnamespace;
  v_kinds text[] := case p_kind when 'worker' then '{worker,enqueuer,reader}' else array[p_kind] end;
begin
  if p_kind is null or p_kind not in ('worker', 'enqueuer', 'reader') then
    raise exception 'a role is a worker, an enqueuer or a reader, not %', quote_nullable(p_kind) using errcode = 'PC003';
  elsif not exists (select from pg_roles where rolname = p_role) then
    raise exception 'there is no role %', quote_nullable(p_role) using errcode = 'PC003';
  end if;
  execute format('grant usage on schema %I to %I', current_schema(), p_role);
  execute (
    select format('grant execute on routine %s to %I', string_agg(distinct p.oid::regprocedure::text, ', '), p_role)
    from rights() r cross join lateral unnest(r.names) n(name)
    join pg_proc p on p.pronamespace = v_schema and p.proname = n.name
    where r.kind = any(v_kinds) and r.object = 'function');
  execute coalesce((
    select format('grant select on %s to %I', string_agg(distinct c.oid::regclass::text, ', '), p_role)
    from rights() r cross join lateral unnest(r.names) n(name)
    join pg_class c on c.relnamespace = v_schema and c.relname = n.name
    where r.kind = any(v_kinds) and r.object <> 'function'
    having count(*) > 0), 'select');
end $$;

-- Makes a role the owner of the schema and of everything in it.
create or replace function hand_over(p_owner text) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_schema oid := quote_ident(current_schema())::regnamespace;
  v_owner oid := (select oid from pg_roles where rolname = p_owner);
  v_what text;
begin
  if v_owner is null then
    raise exception 'there is no role %', quote_nullable(p_owner) using errcode = 'PC003';
  end if;
  execute format('alter schema %I owner to %I', current_schema(), p_owner);
  for v_what in
    select format('%s %s', case c.relkind when 'v' then 'view' when 'S' then 'sequence' else 'table' end, c.oid::regclass)
    from pg_class c
    where c.relnamespace = v_schema and c.relowner <> v_owner and (c.relkind in ('r', 'v') or c.relkind = 'S' and not exists (
      select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype in ('a', 'i')))
    union all
    select format('type %s', t.oid::regtype) from pg_type t left join pg_class c on c.oid = t.typrelid
    where t.typnamespace = v_schema and t.typowner <> v_owner and (t.typtype = 'e' or t.typtype = 'c' and c.relkind = 'c')
    union all
    select format('routine %s', p.oid::regprocedure) from pg_proc p where p.pronamespace = v_schema and p.proowner <> v_owner
  loop
    execute format('alter %s owner to %I', v_what, p_owner);
  end loop;
end $$;

-- Lets the functions that others may call run as the owner, and grants what is new to the roles that are known.
do $rights$
begin
  execute (
    select coalesce(string_agg(format('alter routine %s security definer', p.oid::regprocedure), '; '), 'select')
    from pg_proc p
    where p.pronamespace = quote_ident(current_schema())::regnamespace and not p.prosecdef and p.proname in (
      select unnest(names) from rights() where object = 'function' and runs_as = 'owner'));
  perform grant_rights(kind, role) from granted_roles();
end $rights$;
