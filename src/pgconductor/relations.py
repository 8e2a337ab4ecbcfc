"""What code and the database tell each other of the user's tables: their triggers, and the shape of their rows."""

from collections.abc import Sequence

from msgspec import Struct


class TriggerStep(Struct):
    """The next thing in which the triggers on tables differ from the code; see 57_changes.sql, `next_trigger`."""

    name: str
    task: str
    table: str
    op: str
    when: str | None
    statements: list[str]
    otherwise: list[str]
    comment: str | None


class TriggerRow(Struct, omit_defaults=True):
    """A subscription of a task to changes of a table's rows."""

    task: str
    table: str
    op: str
    columns: Sequence[str]
    when: str | None = None


class ColumnShape(Struct):
    """A column as its values arrive with a row change; `type` is that of an element if `dimensions` is above 0."""

    name: str
    type: str
    dimensions: int
    nullable: bool


class TableShape(Struct):
    """A table or view as its rows arrive with a change."""

    name: str
    columns: list[ColumnShape]
