-- What vacuum left behind of the large tables. Additive.

-- One row a table that had very many dead rows: how many there still were after its latest vacuum. Statistics alone
-- do not tell dead rows that no vacuum may remove from those that none has looked at yet.
create table vacuum_mark (
  name text primary key,
  vacuum_count bigint not null,
  left_count bigint not null
);
