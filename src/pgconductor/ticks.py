"""When a cron expression fires, in a zone, and which ticks run after an outage. Pure: the clock is an argument.

cronsim matches an expression against *local* time, told of no zone; what a clock that is put forward and back makes of
it is decided here. cronsim's own rules leave out expressions with seconds, lose ticks near shifts by other than whole
hours, and answer a search that begins in a repeated hour with an instant before it.

    fixed      no star in seconds, minutes and hours: each matching local time is one tick. Where it occurs twice, the
               first occurrence; where it does not occur, the first instant after the gap, once for all times in it
    wildcard   every instant whose local time matches: a repeated hour fires twice, a skipped one not at all

Between two shifts of its clock a zone is a constant distance from UTC, so both come down to matching local time.

Source: settled question 33; Debian's cron(8) draws the same line between fixed and wildcard jobs.
"""

import copy
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from pgconductor.checks import check_zone
from pgconductor.errors import ConfigurationError
from pgconductor.model import CatchUp

NAMED: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
EXPRESSION_BYTES_MAX: Final = 200
TICKS_MAX: Final = 1000
"""How many missed ticks `catch_up="all"` runs at most: the newest."""
MISSED_AFTER: Final = timedelta(minutes=1)
"""How late a tick may run in ordinary work. When the next one is later than that, nothing ran: an outage."""

_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_SAMPLE: Final = datetime(2000, 1, 1)  # noqa: DTZ001 - a local time, as all that is matched


class Recurrence:
    """A cron expression in a zone.

    Args:
        expr: Five fields, six with seconds first, or one of `NAMED`.
        zone: The IANA zone whose clock the fields mean.

    Raises:
        ConfigurationError: The expression cannot be read or never fires, or the zone is not known here.
    """

    __slots__ = ("_is_fixed", "_matcher", "_zone")

    def __init__(self, expr: str, zone: str = "UTC") -> None:
        place = f"cron({expr[:80]!r})"
        self._zone = ZoneInfo(check_zone(zone, f"{place}: tz"))
        self._matcher = _parse(_spelt_out(expr, place), place)
        self._is_fixed = not any(part.startswith("*") for part in self._matcher.parts[:3])
        if self._match(_SAMPLE) is None:
            raise ConfigurationError(place, "it never fires", "check the day and the month")

    def next_after(self, instant: datetime) -> datetime | None:
        """Return the first tick after an instant, in UTC; None when there is none before the year 10000.

        Args:
            instant: Aware.
        """
        try:
            return self._next_fixed(instant) if self._is_fixed else self._next_elapsed(instant)
        except OverflowError:
            return None

    def between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """Yield the ticks after one instant, up to and with another."""
        tick = self.next_after(after)
        while tick is not None and tick <= until:
            yield tick
            tick = self.next_after(tick)

    def newest(self, after: datetime, until: datetime, count: int) -> list[datetime]:
        """Return the last ticks after one instant, up to and with another, oldest first: at most so many.

        It looks backwards from the end, so that a year without a scheduler costs as little as a day.
        """
        found: list[datetime] = []
        end, width = until, MISSED_AFTER
        while len(found) < count and end > after:
            start = max(after, end - width)
            chunk = list(self.between(start, end))
            found[:0] = chunk
            end = start
            if len(chunk) < 100:
                width = min(2 * width, _DAY)
        return found[-count:]

    # ------------------------------------------------------------ the two kinds

    def _next_fixed(self, after: datetime) -> datetime | None:
        wall = self._match(_wall(after, self._zone))
        while wall is not None:
            tick = _first_occurrence(wall, self._zone)
            if tick > after:
                return tick
            wall = self._match(wall)
        return None

    def _next_elapsed(self, after: datetime) -> datetime | None:
        at, start = after, _wall(after, self._zone)
        while (wall := self._match(start)) is not None:
            tick = (wall - _offset(at, self._zone)).replace(tzinfo=UTC)
            shift = _first_shift(at, tick, self._zone)
            if shift is None:
                return tick
            # go on under the new offset, and let the instant of the shift itself match
            at, start = shift, _wall(shift, self._zone) - _SECOND
        return None

    def _match(self, wall: datetime) -> datetime | None:
        """Return the next local time that matches, whether or not any clock ever shows it."""
        matcher = copy.copy(self._matcher)
        matcher.dt = wall.replace(microsecond=0)
        return next(matcher, None)


@lru_cache(maxsize=4096)
def recurrence(expr: str, zone: str) -> Recurrence:
    """Return the recurrence of an expression in a zone, made once."""
    return Recurrence(expr, zone)


def due_ticks(recurrence: Recurrence, decided_at: datetime, now: datetime, catch_up: CatchUp) -> list[datetime]:
    """Return the ticks to run now, oldest first.

    Args:
        recurrence: When it fires.
        decided_at: Up to where ticks have been dealt with.
        now: The database's clock.
        catch_up: What becomes of the ticks of an outage, which shows in the first of them being older than
            `MISSED_AFTER`: `latest` runs the newest, `all` the newest `TICKS_MAX`, `skip` none but a newest one that
            is not that old itself. Without an outage every tick runs.
    """
    first = recurrence.next_after(decided_at)
    if first is None or first > now:
        return []
    if now - first <= MISSED_AFTER:
        return list(recurrence.between(decided_at, now))
    newest = recurrence.newest(decided_at, now, TICKS_MAX if catch_up == "all" else 1)
    if catch_up == "skip":
        return [tick for tick in newest if now - tick <= MISSED_AFTER]
    return newest


# ---------------------------------------------------------------- reading an expression


def _spelt_out(expr: str, place: str) -> str:
    """Replace a name by the fields it stands for."""
    text = expr.strip().lower()
    if not text.startswith("@"):
        return expr
    if text == "@reboot":
        raise ConfigurationError(place, "a start of a process is not an instant", "invoke the task where you start")
    if text not in NAMED:
        raise ConfigurationError(place, "there is no such name", f"use one of {', '.join(NAMED)}, or fields")
    return NAMED[text]


def _parse(expr: str, place: str) -> CronSim:
    remedy = 'give five fields "minute hour day month weekday", or six with seconds first'
    if len(expr.encode(errors="replace")) > EXPRESSION_BYTES_MAX:
        raise ConfigurationError(place, f"it is longer than {EXPRESSION_BYTES_MAX} bytes", remedy)
    try:
        return CronSim(expr, _SAMPLE)
    except (CronSimError, ValueError, AssertionError, TypeError) as error:
        raise ConfigurationError(place, str(error) or "it cannot be read", remedy) from None


# ---------------------------------------------------------------- zones


def _wall(instant: datetime, zone: ZoneInfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def _offset(instant: datetime, zone: ZoneInfo) -> timedelta:
    offset = instant.astimezone(zone).utcoffset()
    return timedelta(0) if offset is None else offset


def _first_occurrence(wall: datetime, zone: ZoneInfo) -> datetime:
    """Return the first instant at which a clock shows a local time; if it never does, the first after the gap."""
    instant = wall.replace(tzinfo=zone).astimezone(UTC)
    if _wall(instant, zone) == wall:
        return instant
    before = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    return _shift_between(before, instant, zone)


def _first_shift(after: datetime, until: datetime, zone: ZoneInfo) -> datetime | None:
    """Return the first instant, after one and up to another, at which a zone's clock is put forward or back."""
    for year in range(after.astimezone(UTC).year, until.year + 1):
        for shift in _shifts(zone, year):
            if after < shift <= until:
                return shift
    return None


@lru_cache(maxsize=4096)
def _shifts(zone: ZoneInfo, year: int) -> tuple[datetime, ...]:
    """The instants of a year at which a zone's distance from UTC changes. No zone ever did so twice in a day."""
    start = datetime(year, 1, 1, tzinfo=UTC)
    days = [start + day * _DAY for day in range(366 if year < 9999 else 364)]
    if year < 9999:
        days.append(datetime(year + 1, 1, 1, tzinfo=UTC))
    return tuple(
        _shift_between(earlier, later, zone)
        for earlier, later in pairwise(days)
        if _offset(earlier, zone) != _offset(later, zone)
    )


def _shift_between(earlier: datetime, later: datetime, zone: ZoneInfo) -> datetime:
    """Return the first instant with the offset of the later end, to the second."""
    offset = _offset(earlier, zone)
    while later - earlier > _SECOND:
        middle = earlier + ((later - earlier) // 2 // _SECOND) * _SECOND
        if _offset(middle, zone) == offset:
            earlier = middle
        else:
            later = middle
    return later
