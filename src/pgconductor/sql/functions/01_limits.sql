-- What a call may bring: values of at most 1 MiB, fan-outs of at most 10,000 children.
-- Called by whatever stores values, before it stores any. States, locks: none. Returns nothing.
-- Errors: PC003, and nothing of the call has happened.
--
-- Clients refuse the same earlier, with the path of the fault. This is for those who call functions directly. A call
-- as a whole is nearly always smaller than one value may be, and then nothing need be looked at. Names are bounded by
-- the tables that intern them, depth where children are opened.

-- p_items: any array of objects that functions here take; an event within one is looked into.
create or replace function check_sizes(p_items json) returns void
language plpgsql volatile set search_path from current as $$
declare
  v_found record;
  v_event json;
  v_large json;
begin
  if p_items is null or octet_length(p_items::text) <= 1048576 then
    return;
  end if;
  -- what is larger than allowed stands in an item that is: of thousands of items none need be taken apart
  select json_agg(i) into v_large from json_array_elements(p_items) i where octet_length(i::text) > 1048576;
  if v_large is null then
    return;
  end if;
  select f.key, octet_length(f.value::text) as size into v_found
  from json_array_elements(v_large) i cross join lateral json_each(i) f
  where f.key not in ('awaits', 'fresh', 'event') and octet_length(f.value::text) > 1048576 limit 1;
  if found then
    raise exception 'a % is % bytes of JSON, at most 1048576 are allowed', v_found.key, v_found.size
    using errcode = 'PC003';
  end if;
  for v_event in select i -> 'event' from json_array_elements(v_large) i where json_typeof(i -> 'event') = 'object' loop
    perform check_sizes(json_build_array(v_event));
  end loop;
end $$;

-- p_values: an array of values that stand alone, each of which is called p_what.
create or replace function check_values(p_what text, p_values json) returns void
language plpgsql volatile set search_path from current as $$
begin
  if octet_length(p_values::text) > 1048576 then
    perform check_size(p_what, v) from json_array_elements(p_values) v where octet_length(v::text) > 1048576;
  end if;
end $$;

create or replace function check_size(p_what text, p_value json) returns void
language plpgsql volatile set search_path from current as $$
begin
  if octet_length(p_value::text) > 1048576 then
    raise exception 'the % is % bytes of JSON, at most 1048576 are allowed', p_what, octet_length(p_value::text)
    using errcode = 'PC003';
  end if;
end $$;
