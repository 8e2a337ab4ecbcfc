"""What an execution has recorded so far, by the name of the operation: its memory over runs.

An operation may have several rounds: one that timed out and failed its attempt is *dropped*, and the next attempt does
it afresh, a round higher. Only the latest round counts.
"""

from collections.abc import Iterable

from msgspec import Raw

from pgconductor.claimed import Claimed, Recorded

_ROW_BYTES = 200
_TIED = ("invoke_all", "wait_for")


class Memos:
    """The recorded operations of one execution.

    Attributes:
        operations: By name, the operation's own row of its latest round.
        open: Those of them that are not answered, and those that the next attempt does afresh.
        is_tied: Whether any of them is a fan-out or a wait for an event, which have rows beside their own. A single
            child that has answered leaves nothing behind.
        children: By name, the rows of a fan-out's children of its latest round, by index from 1.
        input: The payload and what the trigger handed over, of an execution that was parked.
        size: About how many bytes they take in memory.
    """

    __slots__ = ("children", "input", "is_tied", "open", "operations", "size")

    def __init__(self) -> None:
        self.operations: dict[str, Recorded] = {}
        self.open: dict[str, Recorded] = {}
        self.is_tied = False
        self.children: dict[str, dict[int, Recorded]] = {}
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
        for step in steps or ():
            if step.index:
                self._add_child(step)
            else:
                self.add(step)

    def add(self, step: Recorded) -> None:
        """Take in one operation; a row of an earlier round than the known one is ignored."""
        known = self.operations.get(step.name)
        if known is None or step.round >= known.round:
            self.operations[step.name] = own = _own(step)
            self.size += _ROW_BYTES + len(bytes(step.value))
            self.is_tied = self.is_tied or step.kind in _TIED
            if step.status == "pending" or step.dropped:
                self.open[step.name] = own
            else:
                self.open.pop(step.name, None)

    def keep_input(self, claimed: Claimed) -> None:
        """Keep the input of an execution that is being parked, in bytes of its own."""
        if self.input is None:
            self.input = (claimed.payload.copy(), claimed.trigger_data.copy())
            self.size += len(bytes(claimed.payload)) + len(bytes(claimed.trigger_data))

    def _add_child(self, step: Recorded) -> None:
        rows = self.children.setdefault(step.name, {})
        known = next(iter(rows.values()), None)
        if known is not None and step.round > known.round:
            rows.clear()
        if known is None or step.round >= known.round:
            rows[step.index] = _own(step)
            self.size += _ROW_BYTES + len(bytes(step.value))


def _own(step: Recorded) -> Recorded:
    """Let a row hold its own bytes: as decoded it keeps the whole reply alive that it came in."""
    step.value, step.error = step.value.copy(), step.error.copy()
    return step
