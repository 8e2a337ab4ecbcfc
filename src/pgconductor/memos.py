"""What an execution has recorded so far, by the name of the operation: its memory over runs.

An operation may have several rounds: one that timed out and failed its attempt is *dropped*, and the next attempt does
it afresh, a round higher. Only the latest round counts.
"""

from collections.abc import Iterable

from msgspec import Raw

from pgconductor.claimed import NULL, ChildAnswer, Claimed, Recorded, read_answers

_ROW_BYTES = 200
_TIED = ("invoke_all", "wait_for")


class Memos:
    """The recorded operations of one execution.

    Attributes:
        operations: By name, the operation's own row of its latest round; those that are answered in the order in which
            that became known.
        open: Those of them that are not answered, and those that the next attempt does afresh.
        is_tied: Whether any of them is a fan-out or a wait for an event, which have rows beside their own. A single
            child that has answered leaves nothing behind.
        children: By name, what became of a fan-out's children of its latest round, in their order.
        input: The payload and what the trigger handed over, of an execution that was parked.
        size: About how many bytes they take in memory.
    """

    __slots__ = ("children", "input", "is_tied", "open", "operations", "size")

    def __init__(self) -> None:
        self.operations: dict[str, Recorded] = {}
        self.open: dict[str, Recorded] = {}
        self.is_tied = False
        self.children: dict[str, list[ChildAnswer]] = {}
        self.input: tuple[Raw, Raw] | None = None
        self.size = 0

    @classmethod
    def of(cls, steps: Iterable[Recorded] | int | None) -> "Memos":
        """Return the memos of what a claim brought; a number says that it brought nothing, see `Claimed`."""
        memos = cls()
        if steps and not isinstance(steps, int):
            memos.merge(steps)
        return memos

    def merge(self, steps: Iterable[Recorded] | None) -> None:
        """Take in what became known later; it replaces what was known."""
        rows: dict[str, list[Recorded]] = {}
        for step in steps or ():
            if step.index:
                rows.setdefault(step.name, []).append(step)
            else:
                self.add(step)
        for name, children in rows.items():
            self._add_rows(name, children)

    def add(self, step: Recorded) -> None:
        """Take in one operation; a row of an earlier round than the known one is ignored."""
        known = self.operations.get(step.name)
        if known is None or step.round >= known.round:
            if step.answers != NULL:
                self.add_children(step.name, read_answers(step.answers), len(bytes(step.answers)))
                step.answers = NULL
            if known is not None and step.name != next(reversed(self.operations)):
                del self.operations[step.name]  # what is told now stands behind what was told before
            self.operations[step.name] = own = _own(step, known)
            self.size += _ROW_BYTES + len(bytes(step.value))
            self.is_tied = self.is_tied or step.kind in _TIED
            if step.status == "pending" or step.dropped:
                self.open[step.name] = own
            else:
                self.open.pop(step.name, None)

    def answered(self) -> dict[str, Recorded]:
        """Return the operations that have an answer, by name; the caller may change what it gets."""
        answered = self.operations.copy()
        for name in self.open:
            del answered[name]
        return answered

    def keep_input(self, claimed: Claimed) -> None:
        """Keep the input of an execution that is being parked, in bytes of its own."""
        if self.input is None:
            self.input = (claimed.payload.copy(), claimed.trigger_data.copy())
            self.size += len(bytes(claimed.payload)) + len(bytes(claimed.trigger_data))

    def add_children(self, name: str, children: list[ChildAnswer], size: int = 0) -> None:
        """Take in all children of a fan-out; their values have so many bytes."""
        self.children[name] = children
        self.size += _ROW_BYTES * len(children) + size

    def rows(self) -> list[Recorded]:
        """Return all that is recorded, each child of a fan-out as a row."""
        return [
            *self.operations.values(),
            *(
                Recorded(name, own.round, index, own.kind, each.status, each.value, each.error, each.child_id,
                         each.child_task, own.dropped)
                for name, children in self.children.items()
                for own in [self.operations[name]]
                for index, each in enumerate(children, 1)
            ),
        ]  # fmt: skip

    def _add_rows(self, name: str, rows: list[Recorded]) -> None:
        latest = self.operations[name].round
        rows = sorted((row for row in rows if row.round == latest), key=lambda row: row.index)
        if rows:
            answers = [ChildAnswer(row.value, row.status, row.error, row.child_id, row.child_task) for row in rows]
            self.add_children(name, answers, sum(len(bytes(row.value)) for row in rows))


def _own(step: Recorded, known: Recorded | None) -> Recorded:
    """Let a row hold its own bytes: as decoded it keeps the whole reply alive that it came in.

    What it has in common with what was known is held once: a replay looks at all of it, and memory is far away then.
    """
    step.value = step.value.copy()
    step.error = NULL if step.error == NULL else step.error.copy()
    if known is not None:
        step.name = known.name
        if step.child_task == known.child_task:
            step.child_task = known.child_task
        if step.child_id == known.child_id:
            step.child_id = known.child_id
    return step
