"""Classes for the rows of tables, so that `Change[Contact]` is typed. Pure; the database describes its tables.

Each type is that of the JSON in which a value arrives with a change. A table becomes a dataclass. Where a column's name
cannot be that of an attribute, the table becomes a `msgspec.Struct`, whose attributes may have other names than the
members that they are read from. The output is the same for the same tables, and formatted as `ruff format` would.
"""

import keyword
import re
import unicodedata
from collections.abc import Sequence
from typing import Final

from pgconductor.relations import ColumnShape, TableShape

_TYPES: Final = {
    "bool": "bool",
    "int2": "int",
    "int4": "int",
    "int8": "int",
    "float4": "float",
    "float8": "float",
    "numeric": "Decimal",
    "json": "Any",
    "jsonb": "Any",
    "uuid": "UUID",
    "date": "dt.date",
    "time": "dt.time",
    "timestamp": "dt.datetime",
    "timestamptz": "dt.datetime",
}
_IMPORTS: Final = (
    ("dt.", "import datetime as dt"),
    ("@dataclass", "from dataclasses import dataclass"),
    ("Decimal", "from decimal import Decimal"),
    ("Any", "from typing import Any"),
    ("UUID", "from uuid import UUID"),
)
# Inside a class body an attribute of such a name would stand for the type of those after it.
_TAKEN: Final = frozenset({"Any", "Decimal", "UUID", "Struct", "dataclass", "dt", "field", "None", "True", "False"})
_BUILT_IN: Final = frozenset({"bool", "int", "float", "str", "list"})
_LINE_LENGTH: Final = 88


def render_types(schema: str, tables: Sequence[TableShape]) -> str:
    """Return a module with a class for each table.

    Args:
        schema: Where the tables are, for the docstrings.
        tables: As `describe_rows` in `sql/functions/57_changes.sql` describes them.

    Returns:
        Python source.
    """
    names: set[str] = set()
    classes = [_render_class(schema, table, names) for table in tables]
    body = "".join(f"\n\n{each}" for each in classes)
    imports = [line for mark, line in _IMPORTS if re.search(rf"(?<!\w){re.escape(mark)}", body)]
    parts = [f'"""Rows of the tables in schema {_quoted_text(schema)}, made by `pgconductor gen types`."""\n']
    if imports:
        parts.append("\n" + "\n".join(imports) + "\n")
    if "(Struct)" in body:
        parts.append("\nfrom msgspec import Struct, field\n")
    return "".join(parts) + body


def type_of(column: ColumnShape) -> str:
    """Return the annotation for a column's value."""
    name = _TYPES.get(column.type, "str")
    for depth in range(column.dimensions):
        name = f"list[{name}]" if depth or name == "Any" else f"list[{name} | None]"
    return f"{name} | None" if column.nullable and name != "Any" else name


def _render_class(schema: str, table: TableShape, names: set[str]) -> str:
    name = _distinct(_class_name(table.name), names)
    title = f'    """{_quoted_text(f"{schema}.{table.name}")}"""\n'
    if all(_is_attribute(column.name) for column in table.columns):
        fields = [_line(f"{column.name}: {type_of(column)}") for column in table.columns]
        head = f"@dataclass\nclass {name}:\n"
    else:
        taken: set[str] = {column.name for column in table.columns if _is_attribute(column.name)}
        fields = [_render_member(column, taken) for column in table.columns]
        head = f"class {name}(Struct):\n"
    return head + title + ("\n" + "".join(fields) if fields else "")


def _render_member(column: ColumnShape, taken: set[str]) -> str:
    if _is_attribute(column.name):
        return _line(f"{column.name}: {type_of(column)}")
    if not _is_readable(column.name):
        return f"    # left out, since msgspec reads no member of this name: {_literal(column.name)}\n"
    name = _distinct(_attribute_name(column.name), taken)
    return _line(f"{name}: {type_of(column)} = field(name={_literal(column.name)})")


def _line(field: str) -> str:
    """Write a field. One that is too long stays as it is: formatters differ in where they break it."""
    return f"    {field}\n" if _width(field) + 4 <= _LINE_LENGTH else f"    {field}  # fmt: skip\n"


def _is_readable(name: str) -> bool:
    return not any(char in '\\"' or char < " " for char in name)


def _is_attribute(name: str) -> bool:
    """Tell whether an attribute may have the name: Python changes some, and some would hide a type."""
    return (
        name.isidentifier()
        and unicodedata.normalize("NFKC", name) == name
        and not keyword.iskeyword(name)
        and not name.startswith("__")
        and name not in _TAKEN | _BUILT_IN
    )


def _attribute_name(name: str) -> str:
    plain = re.sub(r"\W", "_", unicodedata.normalize("NFKC", name))
    if plain.startswith("__"):
        plain = "_" + plain.lstrip("_")
    if not plain.isidentifier():
        plain = "_" + plain
    return plain if _is_attribute(plain) else plain + "_"


def _class_name(name: str) -> str:
    words = re.split(r"[\W_]+", unicodedata.normalize("NFKC", name))
    joined = "".join(word[:1].upper() + word[1:] for word in words)
    if not joined.isidentifier():
        joined = "Row" + joined
    return joined + "Row" if joined in _TAKEN or keyword.iskeyword(joined) or joined in _BUILT_IN else joined


def _distinct(name: str, taken: set[str]) -> str:
    """Return the name, or the first with a number behind it, that is not taken yet; take it."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def _quoted_text(text: str) -> str:
    """Write text so that it can stand in a docstring."""
    return "".join(char if char.isprintable() and char not in '\\"' else f"\\x{ord(char):02x}" for char in text)


def _literal(text: str) -> str:
    """Write a string as `ruff format` does: double quotes, unless single ones need fewer escapes."""
    quote = "'" if text.count('"') > text.count("'") else '"'
    escaped = "".join(
        f"\\{char}" if char in {"\\", quote} else char if char.isprintable() else _escape(char) for char in text
    )
    return f"{quote}{escaped}{quote}"


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)
