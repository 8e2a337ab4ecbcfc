"""Where in their lanes the claims of a process begin to look for work.

A claim that begins at the head of a lane passes by the rows of everything that was claimed there, until vacuum removes
them. Vacuum may be late, and while a snapshot is held open it removes none: then each claim costs more than the last.
So a process remembers the last place that it came to in each section of a lane, and may begin behind it. Sections grow
at their ends, so what stands before such a place is only what came late to it: what a long transaction committed, what
a change of a limit or of a payload put back. It must be found too, before long.

A claim therefore begins at the earliest of three starts that its process can afford: at the head, where it had come a
second or two ago, where it came last. A start that cost more than its rows and lanes explain is not used again for
twenty times of what was lost there. While vacuum keeps up, little is lost and most claims begin at the head; else the
looks that begin early take a twentieth of the time each.

A look from the head that took long is not made whole again, since no other claim goes on meanwhile. What was passed is
then looked through in parts, from each section's beginning to where claims had come when the pass began, and again.

While heads are dear, a process tells with its beats where its claims have come, how far its pass is, and when it goes
on. One that starts begins with what the others told, and so does not find it out anew.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final, TypeAlias

from msgspec import Struct

SECTION_BITS: Final = 46  # see place_of in 02_places.sql
PLACE_MIN: Final = -(2**63)
PLACE_MAX: Final = 2**63 - 1
AGE_SECONDS: Final = 1.0
PAUSE_FACTOR: Final = 20.0
EXPLAINED_SECONDS: Final = 0.001
EXPLAINED_SECONDS_EACH: Final = 50e-6
EXPLAINED_SEARCH_SECONDS: Final = 0.0005
PART_SECONDS: Final = 0.05
"""What a part of a pass may lose; a look that loses more is made in parts from then on."""
WIDTH_FIRST: Final = 16_384
WIDTH_MIN: Final = 4_096
WIDTH_MAX: Final = 2**SECTION_BITS

Places: TypeAlias = Mapping[tuple[int, int], int]
"""The last known place of each (lane, section)."""


class Start(IntEnum):
    """Where a claim begins in the lanes of which a place is known; the deepest first."""

    HEAD = 0
    EARLIER = 1
    LAST = 2


class Cost(Struct, frozen=True):
    """What a claim cost the database, and what explains it.

    Attributes:
        seconds: How long it looked for work and took it.
        search_seconds: How much of that it took to find the first row of each range. A walk past what was claimed is
            mostly here, where it shows; it may also stand between two sections, where the rows that are taken hide it.
        lane_count: In about how many lanes it looked.
        row_count: How many rows it took.
    """

    seconds: float
    search_seconds: float
    lane_count: int
    row_count: int

    @property
    def lost_seconds(self) -> float:
        """How much of the time nothing explains."""
        lanes, rows = (EXPLAINED_SECONDS_EACH * count for count in (self.lane_count, self.row_count))
        search = self.search_seconds - EXPLAINED_SEARCH_SECONDS - lanes
        return max(0.0, search, self.seconds - EXPLAINED_SECONDS - lanes - rows)


class Range(Struct):
    """A part of a lane; neither end belongs to it."""

    lane_id: int
    after_place: int
    before_place: int


class ToldPlaces(Struct):
    """What processes tell of places, each with its lane: the last of each section, and when the head may be used.

    `looked`: the first place of each section that the pass has not come to yet; None: the next look is whole.
    """

    head_in: float
    last: list[tuple[int, int]] | None = None
    looked: list[tuple[int, int]] | None = None


class Scan:
    """The places that the claims of one process have come to, and what it cost to begin before them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin at the heads: what was claimed may stand again where it stood."""
        self._last: dict[tuple[int, int], int] = {}
        self._aging: Places = {}
        self._earlier: Places = {}
        self._aging_since = 0.0
        self._usable_at = [0.0, 0.0, 0.0]
        self._looked: dict[tuple[int, int], int] | None = None
        self._pass_end: Places = {}
        self._pass_lost = 0.0
        self._width = WIDTH_FIRST

    def told(self, now: float) -> ToldPlaces | None:
        """Return what to tell the others; None while it is cheap to begin at the head. Safe to call from a thread."""
        head_in, places, looked = self._usable_at[Start.HEAD] - now, self._earlier, self._looked
        if not places or (head_in <= 0 and looked is None):
            return None
        return ToldPlaces(max(head_in, 0.0), _written(places), None if looked is None else _written(looked))

    def begin_behind(self, told: ToldPlaces, now: float) -> None:
        """Begin where others have come, if nothing is known."""
        if not self._last:
            self._last = _by_section(told.last)
            self._earlier = self._aging = self._last.copy()
            self._aging_since = now
            self._usable_at[Start.HEAD] = now + max(0.0, told.head_in)
            if told.looked is not None:
                self._begin_pass(_by_section(told.looked))

    @property
    def head_at(self) -> float:
        """When a claim may begin at the head, on the monotonic clock."""
        return self._usable_at[Start.HEAD]

    @property
    def is_in_pass(self) -> bool:
        """Whether a look from the head has been begun and is not at its end."""
        return bool(self._looked)

    def start(self, now: float) -> Start:
        """Return the earliest start that may be used."""
        starts = [Start.HEAD, Start.EARLIER] if self._earlier else [Start.HEAD]
        return next((each for each in starts if self._usable_at[each] <= now), Start.LAST)

    def ranges(self, start: Start) -> list[Range] | None:
        """Return what to look through in the lanes of which places are known; None: every lane, from its head."""
        if start is Start.HEAD:
            return None if self._looked is None else ranges_behind(self._earlier) + list(self._parts().values())
        return ranges_behind(self._last if start is Start.LAST else self._earlier)

    def note(
        self,
        start: Start,
        last: Iterable[tuple[int, int]],
        cost: Cost,
        now: float,
        *,
        is_full: bool = False,
    ) -> None:
        """Remember what a claim came to and what it cost.

        Args:
            start: Where it began.
            last: The lane and the place of the last row it took of each section.
            cost: What it cost.
            now: The monotonic clock, as for `start`.
            is_full: Whether it brought as much as was asked for, and so may have left something where it looked.
        """
        lost = cost.lost_seconds
        taken = _by_section(last)
        self._usable_at[start] = now + PAUSE_FACTOR * lost
        if start is Start.HEAD:
            self._note_look(taken, lost, is_full=is_full)
        for key, place in taken.items():
            self._last[key] = max(place, self._last.get(key, place))
        if now - self._aging_since >= AGE_SECONDS:
            self._earlier, self._aging, self._aging_since = self._aging, self._last.copy(), now

    def _note_look(self, taken: Places, lost: float, *, is_full: bool) -> None:
        if self._looked is None:
            if lost > PART_SECONDS and self._earlier:
                self._begin_pass({})
            return
        furthest = {lane_id: place for (lane_id, _), place in sorted(taken.items())}  # the last section counts
        anywhere = max(furthest.values(), default=PLACE_MIN)  # lanes share what is asked for in the order of places
        for key, part in self._parts().items():
            if not is_full or furthest.get(key[0], anywhere) >= part.before_place:
                self._looked[key] = part.before_place
        self._pass_lost += lost
        if lost > PART_SECONDS:
            self._width = max(WIDTH_MIN, self._width // 2)
        elif lost < PART_SECONDS / 2:
            self._width = min(WIDTH_MAX, self._width * 2)
        if not self._parts():
            self._begin_pass(None if self._pass_lost < PART_SECONDS else {})

    def _begin_pass(self, looked: dict[tuple[int, int], int] | None) -> None:
        """Look up to where claims have come by now: on from places, or whole (None)."""
        self._looked, self._pass_end, self._pass_lost = looked, self._earlier, 0.0

    def _parts(self) -> dict[tuple[int, int], Range]:
        """Return what of each section the next part of the pass looks through."""
        parts: dict[tuple[int, int], Range] = {}
        for (lane_id, section), place in self._pass_end.items():
            begin = (self._looked or {}).get((lane_id, section), section << SECTION_BITS)
            if begin <= place:
                parts[lane_id, section] = Range(lane_id, begin - 1, min(begin + self._width, place + 1))
        return parts


def _by_section(places: Iterable[tuple[int, int]] | None) -> dict[tuple[int, int], int]:
    return {(lane_id, place >> SECTION_BITS): place for lane_id, place in places or ()}


def _written(places: Places) -> list[tuple[int, int]]:
    return [(lane_id, place) for (lane_id, _), place in places.items()]


def ranges_behind(places: Places) -> list[Range]:
    """Return what is left of lanes without what stands in a section up to its place."""
    ranges: list[Range] = []
    for (lane_id, section), place in sorted(places.items()):
        if not ranges or ranges[-1].lane_id != lane_id:
            ranges.append(Range(lane_id, PLACE_MIN, PLACE_MAX))
        ranges[-1].before_place = section << SECTION_BITS
        ranges.append(Range(lane_id, place, PLACE_MAX))
    return ranges
