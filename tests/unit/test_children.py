"""What an operation's children are made of."""

import pytest

from pgconductor import Conductor, Context
from pgconductor.children import new_children
from pgconductor.errors import ConfigurationError
from pgconductor.written import AlikeChildren

app = Conductor("postgresql://nobody@nowhere/none")


@app.task()
async def child(ctx: Context, number: int) -> int:
    return number


@app.task()
async def other(ctx: Context, text: str) -> str:
    return text


def test_children_in_a_row_that_are_called_alike_are_one_entry() -> None:
    urgent = [child.with_options(priority=2).bind(number) for number in (2, 3)]  # options of their own, but the same
    calls = [child.bind(0), child.bind(1), *urgent, child.bind(4), other.bind("ä")]

    children = new_children(calls, "invoke_all 'all'")

    assert children.alike == [
        AlikeChildren(0, 2, "child"),
        AlikeChildren(0, 2, "child", priority=2),
        AlikeChildren(0, 1, "child"),
        AlikeChildren(0, 1, "other"),
    ]
    assert children.task is None
    assert [each.child_task for each in children.pending()] == ["child"] * 5 + ["other"]
    assert children.payloads == [*(f'{{"number":{number}}}' for number in range(5)), '{"text":"ä"}']
    assert children.ids == sorted(set(children.ids))
    assert children.weigh() == 6 * 100 + 5 * len('{"number":0}') + len('{"text":"ä"}'.encode())


def test_children_of_one_task_say_so_once() -> None:
    children = new_children([child.bind(0), child.with_options(priority=2).bind(1)], "invoke_all 'all'")

    assert children.task == "child"
    assert [(each.status, each.child_task) for each in children.pending()] == [("pending", None)] * 2


def test_an_option_that_an_attached_child_cannot_have_is_named_wherever_it_stands() -> None:
    with pytest.raises(ConfigurationError, match="invoke_all 'all': dedupe_key: cannot be given to a child"):
        new_children([child.bind(0), child.with_options(dedupe_key="k").bind(1)], "invoke_all 'all'")
