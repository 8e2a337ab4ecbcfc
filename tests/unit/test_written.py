"""How operations and completions are written: what is alike once, the ids and the values beside each other."""

import json

from msgspec import Raw

from pgconductor.ids import new_ids
from pgconductor.written import AlikeChildren, Children, Completion, Operation, apart, are_level, in_columns, parents_of


def test_children_go_apart_from_their_operations() -> None:
    ids = new_ids(5)
    children = Children(ids[:4], ['{"i":0}', '{"i":1}', '{"i":2}', '{"i":3}'], [
        AlikeChildren(0, 2, "child"), AlikeChildren(0, 1, "child", priority=2), AlikeChildren(0, 1, "child"),
    ])  # fmt: skip
    nap = Operation("e", "nap", 0, "sleep", due_in=1)
    all_ = Operation("e", "all", 0, "invoke_all", children=children)
    one = Operation("f", "one", 0, "invoke", children=Children(ids[4:], ['{"i":4}'], [AlikeChildren(0, 1, "child")]))

    operations, alike, written_ids, payloads = apart([nap, all_, one])

    assert [each["name"] for each in json.loads(operations)] == ["nap", "all", "one"]
    assert not any("children" in each for each in json.loads(operations))
    assert json.loads(alike) == [
        {"op": 2, "count": 2, "task": "child"},
        {"op": 2, "count": 1, "task": "child", "priority": 2},
        {"op": 2, "count": 1, "task": "child"},
        {"op": 3, "count": 1, "task": "child"},
    ]
    assert list(written_ids) == ids
    assert json.loads(payloads) == [{"i": number} for number in range(5)]
    assert all_.children == children  # what is sent again is whole


def test_completions_go_in_columns_and_name_each_parent_once() -> None:
    first, second, third, parent = new_ids(4)
    completed = [
        Completion(third, 3, Raw(b"[1]"), parent, 1),
        Completion(first, 1, Raw(b"null"), parent, 1),
        Completion(second, 22, Raw(b'"x"')),
    ]
    ids, tokens, results = in_columns(completed)
    assert (list(ids), tokens, json.loads(results)) == ([first, second, third], "{1,22,3}", [None, "x", [1]])
    assert parents_of(completed) == [parent]
    assert not are_level(completed)
    assert are_level(completed[:2])


def test_nothing_is_written_as_nothing() -> None:
    assert apart([]) == ("[]", "[]", [], "[]")
    assert in_columns([]) == ([], "{}", "[]")
    assert parents_of([]) == []
    assert are_level([])
