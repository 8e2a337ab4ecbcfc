-- Where work stands in its lane: by priority (higher first), then what became ready late before what was ready from the
-- start, then by order number. One number says it, so that a claim can go on behind a place that it knows.
-- Called by whatever reads or writes ready. States, locks, errors: none.
--
-- Order numbers come from one sequence, in steps of eight. What is ready from the start keeps the number that it was made
-- with. What becomes ready late (woken, retried, due, released) draws one that is as new as that, moved below zero. So
-- each of the two kinds of a priority grows at its end alone, but for what is given back before it has begun: it stands
-- where it stood, and a claim that begins further on finds it with its next look at the heads.

-- The index of ready is by this expression, written out: a priority's kinds have 2^46 numbers each.
create or replace function place_of(p_priority smallint, p_ord bigint) returns bigint
language sql immutable parallel safe
return p_ord - p_priority::bigint * 140737488355328;

create or replace function late_ord_min() returns bigint
language sql immutable parallel safe
return -70368744177664;

create or replace function late_ord() returns bigint
language sql volatile
return nextval('execution_ord') + late_ord_min();

-- The numbers of so many rows, eight for each one drawn: to draw all of them would be a tenth of an enqueue of thousands.
create or replace function draw_ords(p_count int) returns bigint[]
language plpgsql volatile set search_path from current as $$
begin
  return array(
    select n.first + generate_series(0, 7)
    from (select nextval('execution_ord') as first from generate_series(1, (p_count + 7) / 8)) n limit p_count);
end $$;

-- The first and the last place that there can be.
create or replace function whole_lane(p_lane int) returns scan_range
language sql immutable parallel safe
return row(p_lane, -9223372036854775808, 9223372036854775807)::scan_range;

-- The furthest place of each section that processes have told under a name.
create or replace function furthest_told(p_name text) returns json
language sql stable set search_path from current as $$
  select json_agg(json_build_array(n.lane_id, n.place))
  from (select (t.value->>0)::int as lane_id, max((t.value->>1)::bigint) as place
        from orchestrator o
        cross join json_array_elements(case when json_typeof(o.places->p_name) = 'array' then o.places->p_name end) t
        group by 1, (t.value->>1)::bigint >> 46) n
$$;

-- What processes, living or not yet swept, have told with their beats: how far claims have come, how far a pass through
-- what they left behind, and in how many seconds one may look there. Null where none finds that dear. So one that starts
-- need not find it out.
create or replace function told_places(p_now timestamptz) returns json
language sql stable set search_path from current as $$
  select json_build_object(
    'head_in', max(extract(epoch from o.beat_at - p_now) + (o.places->>'head_in')::float8),
    'last', furthest_told('last'),
    'looked', case when bool_or(json_typeof(o.places->'looked') = 'array') then coalesce(furthest_told('looked'), '[]') end)
  from orchestrator o where o.places is not null having count(*) > 0
$$;
