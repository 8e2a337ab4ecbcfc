"""What must be true of an engine's tables in every snapshot, as queries that return no row.

The numbers are those of the guarantees. Those that speak of the past (3 to 7) read a history that triggers write, which
`attach_audit` adds to a test database, with checks of every row of an execution that is written; in production there
is neither, and nobody pays for them. A test that lowers a limit
under running work makes a table `audit.lowered`, and 12 is passed over.

The history holds one row per change of state that a commit made visible: its triggers are deferred to the commit, so a
function may move an execution through several tables and counts as one move.
"""

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.rows import tuple_row

Connection = psycopg.Connection[Any]

AUDIT = """
create schema audit;
create table audit.history (
  seq bigint generated always as identity primary key,
  execution_id uuid not null,
  at timestamptz not null default clock_timestamp(),
  op text not null,
  from_state text,
  to_state text not null,
  orchestrator_id uuid,
  token bigint
);
create index on audit.history (execution_id, seq);

create function audit.state_of(p_id uuid) returns text language sql stable as $$
  select case when e.outcome is not null then e.outcome::text
              when exists (select from lease where execution_id = e.id) then 'running'
              when exists (select from wait where execution_id = e.id) then 'waiting'
              when exists (select from timer where execution_id = e.id) then 'scheduled'
              when exists (select from ready where execution_id = e.id)
                or exists (select from backlog where execution_id = e.id) then 'ready'
              else 'nowhere' end
  from execution e where e.id = p_id
$$;

create function audit.note_move() returns trigger language plpgsql as $$
declare
  v_id uuid := case tg_table_name when 'execution' then (to_jsonb(new) ->> 'id')::uuid
    else (coalesce(to_jsonb(new), to_jsonb(old)) ->> 'execution_id')::uuid end;
  v_state text := audit.state_of(v_id);
  v_lease lease;
  v_last audit.history;
begin
  if v_state is null then
    return null;
  end if;
  select * into v_lease from lease where execution_id = v_id;
  select * into v_last from audit.history where execution_id = v_id and op = 'move' order by seq desc limit 1;
  if (v_last.to_state, v_last.orchestrator_id, v_last.token)
     is distinct from (v_state, v_lease.orchestrator_id, v_lease.token) then
    insert into audit.history (execution_id, op, from_state, to_state, orchestrator_id, token)
    values (v_id, 'move', v_last.to_state, v_state, v_lease.orchestrator_id, v_lease.token);
  end if;
  return null;
end $$;

-- An ending that is undone counts as a redrive if it begins a new life, else as the fault that it is.
create function audit.note_ending() returns trigger language plpgsql as $$
begin
  insert into audit.history (execution_id, op, from_state, to_state)
  values (new.id,
    case when old.outcome is null then 'end'
         when new.outcome is null and old.outcome <> 'completed' and new.failures + new.crashes = 0
              and new.cancel_requested_at is null and new.error is null then 'redrive'
         else 'rewrite' end,
    old.outcome::text, coalesce(new.outcome::text, 'reopened'));
  return null;
end $$;

create function audit.note_step() returns trigger language plpgsql as $$
begin
  insert into audit.history (execution_id, op, from_state, to_state)
  select new.execution_id, 'step', 'running', audit.state_of(new.execution_id)
  where audit.state_of(new.execution_id) is distinct from 'running';
  return null;
end $$;

create constraint trigger audit_move after insert or update of outcome on execution
  deferrable initially deferred for each row execute function audit.note_move();
create constraint trigger audit_move after insert or delete on lease
  deferrable initially deferred for each row execute function audit.note_move();
create constraint trigger audit_move after insert or delete on ready
  deferrable initially deferred for each row execute function audit.note_move();
create constraint trigger audit_move after insert or delete on backlog
  deferrable initially deferred for each row execute function audit.note_move();
create constraint trigger audit_move after insert or delete on timer
  deferrable initially deferred for each row execute function audit.note_move();
create constraint trigger audit_move after insert or delete on wait
  deferrable initially deferred for each row execute function audit.note_move();
create trigger audit_ending after update of outcome on execution for each row
  when (old.outcome is distinct from new.outcome) execute function audit.note_ending();
create trigger audit_step after insert on step for each row
  when (new.index = 0) execute function audit.note_step();  -- the rest are answers of children

-- what production does not check: see 0001_core.sql
alter table execution
  add constraint an_end_is_whole check (
    (outcome is null) = (finished_at is null) and (outcome <> 'failed' or error is not null)),
  add constraint a_parent_is_whole check (num_nulls(parent_id, parent_step, root_id) in (0, 3)),
  add constraint depth_and_trigger_are_bounded check (depth between 0 and 100 and length(trigger) <= 500);

alter function audit.state_of set search_path from current;
-- before Postgres 18, deferred triggers run as whoever commits: a writer of a table with a row trigger has no
-- rights here
alter function audit.note_move set search_path from current security definer;
alter function audit.note_ending set search_path from current security definer;
alter function audit.note_step set search_path from current security definer;
"""

ALWAYS: Mapping[str, str] = {
    "1 a lease means running, for a process that is known": """
        select l.execution_id from lease l left join execution e on e.id = l.execution_id
        where e.id is null or e.outcome is not null
           or not exists (select from orchestrator o where o.id = l.orchestrator_id)
           or exists (select from ready r where r.execution_id = l.execution_id)
           or exists (select from wait w where w.execution_id = l.execution_id)
           or exists (select from timer t where t.execution_id = l.execution_id)""",
    "2 ended means finished, and gone from the tables of work": """
        select e.id from execution e
        where (e.outcome is null) <> (e.finished_at is null)
           or e.outcome is not null and (
             exists (select from ready r where r.execution_id = e.id)
             or exists (select from wait w where w.execution_id = e.id)
             or exists (select from timer t where t.execution_id = e.id)
             or exists (select from wait_item i where i.execution_id = e.id)
             or exists (select from wait_link l where l.execution_id = e.id))""",
    "3 an ending is final": """
        select execution_id, from_state, to_state from audit.history where op = 'rewrite'""",
    "4 one ending per life": """
        select execution_id from (
          select execution_id, op, count(*) filter (where op = 'redrive') over (
            partition by execution_id order by seq) as life from audit.history) h
        where op = 'end' group by execution_id, life having count(*) > 1""",
    "5 states follow each other as drawn, and no claim happens twice": """
        select execution_id, from_state, to_state from audit.history h where op = 'move' and not (
          case coalesce(from_state, 'none')
            -- one settle may open a child for one outcome and end its grandparent by another
            when 'none' then to_state in ('ready', 'scheduled', 'cancelled')
            when 'scheduled' then to_state in ('ready', 'running', 'cancelled', 'scheduled', 'failed')
            when 'ready' then to_state in ('running', 'cancelled', 'scheduled', 'failed')
            when 'running' then to_state in ('ready', 'scheduled', 'waiting', 'completed', 'failed', 'cancelled')
            when 'waiting' then to_state in ('ready', 'running', 'cancelled')
            else to_state = 'ready' and from_state <> 'completed' end)
        union all
        select execution_id, orchestrator_id::text, token::text from audit.history
        where op = 'move' and token is not null group by 1, 2, 3 having count(*) > 1""",
    "5b nothing but expiry fails what does not run": """
        select h.execution_id from audit.history h join execution e on e.id = h.execution_id
        where h.op = 'move' and h.to_state = 'failed' and h.from_state in ('ready', 'scheduled')
          and e.error ->> 'type' is distinct from 'pgconductor.errors.Expired' and not exists (
            select from audit.history r where r.execution_id = e.id and r.op = 'redrive')""",
    "6 the row is where its history ends": """
        select e.id, audit.state_of(e.id), h.to_state from execution e left join lateral (
          select to_state from audit.history h where h.execution_id = e.id and h.op = 'move' order by seq desc limit 1
        ) h on true where h.to_state is distinct from audit.state_of(e.id)""",
    "7 no step but by who holds the lease": """
        select execution_id, to_state from audit.history where op = 'step'""",
    "8 waiting means parked, with something to wait for": """
        select w.execution_id from wait w left join execution e on e.id = w.execution_id
        where e.id is null or e.outcome is not null or not exists (
          select from step s where s.execution_id = w.execution_id and s.status = 'pending' and s.index = 0
            and s.kind <> 'start')
        union all
        select i.execution_id from wait_item i left join execution e on e.id = i.execution_id
        where e.outcome is not null or i.left_count <= 0
           or i.kind = 'invoke_all' and i.left_count <> (
             select count(*) from execution c where c.parent_id = i.execution_id and c.parent_step = i.name
               and c.parent_round = i.round and c.parent_index > 0 and c.outcome is null)""",
    "9 no lost wake-up": """
        select s.execution_id, s.name, s.index from step s left join execution c on c.id = s.child_id
        where s.status = 'pending' and s.child_id is not null and (c.id is null or c.outcome is not null)
        union all
        select h.execution_id, h.name, h.index from step h join execution e on e.id = h.execution_id
        where e.outcome is null and h.kind = 'invoke_all' and h.index = 0 and h.status = 'pending' and not exists (
          select from execution c where c.parent_id = h.execution_id and c.parent_step = h.name
            and c.parent_round = h.round and c.parent_index > 0 and c.outcome is null)
        union all
        select s.execution_id, s.name, s.index from wait w join step s on s.execution_id = w.execution_id
        where s.kind = 'sleep' and s.status = 'pending'
          and not exists (select from timer t where t.execution_id = w.execution_id and t.due_at <= s.due_at)""",
    "9b no event waited for in vain": """
        select s.execution_id, s.name, s.round from step s join execution e on e.id = s.execution_id
        where s.kind = 'wait_for' and s.status = 'pending' and e.outcome is null and not exists (
          select from event_wait w where w.execution_id = s.execution_id and w.name = s.name and w.round = s.round)
        union all
        select w.execution_id, w.name, w.round from event_wait w
        left join step s on s.execution_id = w.execution_id and s.name = w.name and s.round = w.round and s.index = 0
        left join execution e on e.id = w.execution_id
        where s.status is distinct from 'pending' or e.id is null or e.outcome is not null
        union all
        select w.execution_id, w.name, w.round from event_wait w cross join lateral event_since(w) v
        where v.id is not null and not exists (
          select from event_pending p where p.event_id = v.id
            or p.execution_id = w.execution_id and p.name = w.name and p.round = w.round)""",
    "9c a fan-out has its children, in their order": """
        select h.execution_id, h.name, m.index from step h
        cross join lateral unnest(h.child_ids) with ordinality as m(child_id, index)
        left join execution c on c.id = m.child_id
        where (c.parent_id, c.parent_step, c.parent_round, abs(c.parent_index))
          is distinct from (h.execution_id, h.name, h.round, m.index)
        union all
        select c.parent_id, c.parent_step, c.parent_index from execution c
        join execution p on p.id = c.parent_id
        left join step h on h.execution_id = c.parent_id and h.name = c.parent_step and h.round = c.parent_round
          and h.index = 0
        where c.parent_index <> 0 and h.child_ids[abs(c.parent_index)] is distinct from c.id""",
    "10 one child per parent, step, round and index": """
        select parent_id, parent_step from execution where parent_id is not null
        group by parent_id, parent_step, parent_round, parent_index having count(*) > 1""",
    "11 no live child of an ended parent without a cancel request": """
        select c.id from execution c join execution p on p.id = c.parent_id
        where p.outcome is not null and c.outcome is null and c.cancel_requested_at is null
          and not exists (select from step s where s.execution_id = p.id and s.child_id = c.id
                          and s.status = 'timed_out' and s.keep_on_timeout)
          and not exists (select from step s join step h using (execution_id, name, round)
                          where s.execution_id = p.id and s.child_id = c.id and h.index = 0
                            and h.status = 'timed_out' and h.keep_on_timeout)
          and not exists (select from audit.history h where h.execution_id = c.id and h.op = 'redrive')""",
    "12 limit kept": """
        select t.task_id, t.kind, p.key from permit p join task_limit t on t.id = p.limit_id
        group by t.id, p.key
        having count(*) > coalesce(t.operator_max, t.declared_max)
          and to_regclass('audit.lowered') is null
        union all
        select t.task_id, t.kind, u.key from rate_use u join task_limit t on t.id = u.limit_id
        where to_regclass('audit.lowered') is null
        group by t.id, u.key
        having (select count(*) from rate_use o where o.limit_id = t.id and o.key = u.key
                and o.used_at > max(u.used_at) - t.period) > coalesce(t.operator_max, t.declared_max)""",
    "13 a permit for every limit of what runs, and for nothing else": """
        select p.execution_id, p.limit_id from permit p
        where not exists (select from lease l where l.execution_id = p.execution_id)
           or not exists (select from task_limit t where t.id = p.limit_id and t.kind = 'concurrency')
        union all
        select e.id, t.id from lease l join execution e on e.id = l.execution_id
        join lane n on n.id = e.lane_id and n.is_limited
        join task_limit t on t.task_id = n.task_id and t.kind = 'concurrency'
        where not exists (select from permit p where p.execution_id = e.id and p.limit_id = t.id)""",
    "14 budgets": """
        select e.id, e.failures, e.crashes
        from execution e join lane n on n.id = e.lane_id join task t on t.id = n.task_id
        where e.failures > t.max_attempts or e.crashes > t.max_crashes
           or e.outcome is null and (e.failures >= t.max_attempts or e.crashes >= t.max_crashes)""",
    "15 one execution per key": """
        select min(e.id::text) from execution e join lane n on n.id = e.lane_id
        where e.dedupe_key is not null group by n.task_id, e.dedupe_key having count(*) > 1
        union all
        select d.key from dedupe d left join execution e on e.id = d.execution_id
        where e.id is null or e.dedupe_key is distinct from d.key""",
    "16 everything that has not ended is reachable, at one place": """
        select e.id::text from execution e
        left join (select execution_id, count(*) from (
          select execution_id from ready union all select execution_id from backlog) a group by 1) r
          on r.execution_id = e.id
        left join lease l on l.execution_id = e.id
        left join wait w on w.execution_id = e.id
        left join timer t on t.execution_id = e.id
        where e.outcome is null and coalesce(r.count, 0) + (l.execution_id is not null)::int
          + (w.execution_id is not null or t.execution_id is not null)::int <> 1
        union all
        select r.execution_id::text from ready r left join execution e on e.id = r.execution_id
        where e.id is null or e.outcome is not null or (r.lane_id, r.priority) is distinct from (e.lane_id, e.priority)
           or r.ord >= 0 and r.ord <> e.ord
        union all
        select b.execution_id::text from backlog b left join execution e on e.id = b.execution_id
        where e.id is null or e.outcome is not null or (b.lane_id, b.priority) is distinct from (e.lane_id, e.priority)
           or b.ord >= 0 and b.ord <> e.ord or b.is_start <> (b.ord >= 0)
           or not exists (select from backlog_key k where k.lane_id = b.lane_id and k.is_start = b.is_start
                          and k.keys = b.keys)
              and not exists (select from look k where k.lane_id = b.lane_id and k.is_start = b.is_start
                              and k.keys = b.keys)
        union all
        select b.execution_id::text from backlog b join lane n on n.id = b.lane_id and n.is_limited
        where not starts_with(b.keys, keys_begin(array(select t from task_limit t where t.task_id = n.task_id)))
          and not exists (select from look k where k.lane_id = b.lane_id and k.is_start = b.is_start
                          and k.keys = b.keys)
        union all
        select t.execution_id::text from timer t left join execution e on e.id = t.execution_id
        where e.id is null or not isfinite(t.due_at) and not exists (
          select from wait_item i where i.execution_id = e.parent_id and i.name = e.parent_step
            and i.round = e.parent_round and i.next_index <= e.parent_index
            and exists (select from execution s where s.parent_id = e.parent_id and s.parent_step = e.parent_step
                        and s.parent_round = e.parent_round and s.parent_index < i.next_index
                        and s.outcome is null))""",
    "17 children stand one below their parent, in its tree, at most 100 deep": """
        select c.id from execution c left join execution p on p.id = c.parent_id
        where c.depth > 100 or c.parent_id is null and c.depth <> 0
           or p.id is not null and (c.depth <> p.depth + 1 or c.root_id is distinct from coalesce(p.root_id, p.id))""",
}

AT_REST: Mapping[str, str] = {
    "nothing is due": "select execution_id from timer where due_at <= clock_timestamp() - interval '1 second'",
    "nothing runs": "select execution_id from lease",
    "nobody waits for what cannot come": """
        select w.execution_id from wait w where not exists (
          select from child_link s join execution c on c.id = s.child_id
          where s.execution_id = w.execution_id and s.status = 'pending' and c.outcome is null)
          and not exists (select from timer t where t.execution_id = w.execution_id)""",
    "nobody is to be told": "select execution_id from signal",
    "no session sits in a transaction": """
        select pid, query from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
          and state like 'idle in transaction%' and state_change < clock_timestamp() - interval '5 seconds'""",
    "no advisory lock is left": """
        select pid, classid, objid from pg_locks where locktype = 'advisory' and pid <> pg_backend_pid()
          and database = (select oid from pg_database where datname = current_database())""",
}


def attach_audit(conn: Connection, schema: str = "pgconductor") -> None:
    """Add the history, its triggers, and the checks of each write to a fresh engine."""
    with conn.transaction():
        _enter(conn, schema)
        conn.execute(AUDIT.encode())


def check_invariants(conn: Connection, schema: str = "pgconductor") -> None:
    """Raise AssertionError for the first invariant that does not hold, with the rows that break it."""
    _check(conn, schema, ALWAYS)


def check_quiescent(conn: Connection, schema: str = "pgconductor") -> None:
    """Check what must be true besides when the load has stopped and every bound has passed."""
    _check(conn, schema, ALWAYS)
    _check(conn, schema, AT_REST)


def _check(conn: Connection, schema: str, queries: Mapping[str, str]) -> None:
    with conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        _enter(conn, schema)
        for name, query in queries.items():
            rows = conn.cursor(row_factory=tuple_row).execute(query.encode()).fetchmany(10)
            assert not rows, f"invariant {name!r} does not hold for {rows}"


def _enter(conn: Connection, schema: str) -> None:
    conn.execute("select set_config('search_path', format('%%I, pg_temp', %s::text), true)", (schema,))
