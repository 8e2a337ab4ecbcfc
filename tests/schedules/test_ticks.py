"""F5 51 and 55: when an expression fires, over ten years and in every zone, against a scan of the clock itself."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

import pytest

from pgconductor.errors import ConfigurationError
from pgconductor.ticks import NAMED, Recurrence

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
YEARS = range(2020, 2030)

# hour shifts north and south, half an hour, at midnight, twice in Ramadan, and zones that never shift
ZONES = [
    "Europe/Berlin",
    "Europe/London",
    "America/New_York",
    "America/St_Johns",
    "America/Santiago",
    "Australia/Sydney",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Asia/Beirut",
    "Africa/Casablanca",
    "Africa/Cairo",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "UTC",
]
# (expression, its minutes, its hours, whether it is fixed); all days match
EXPRESSIONS = [
    ("30 2 * * *", {30}, {2}, True),
    ("0 0 * * *", {0}, {0}, True),
    ("15 0,1,2,3 * * *", {15}, {0, 1, 2, 3}, True),
    ("0,20,40 1-3 * * *", {0, 20, 40}, {1, 2, 3}, True),
    ("0 30 2 * * *", {30}, {2}, True),
    ("*/15 * * * *", {0, 15, 30, 45}, set(range(24)), False),
    ("*/10 2 * * *", {0, 10, 20, 30, 40, 50}, {2}, False),
    ("30 */2 * * *", {30}, set(range(0, 24, 2)), False),
    ("5 * * * *", {5}, set(range(24)), False),
    ("0 */20 0-3 * * *", {0, 20, 40}, {0, 1, 2, 3}, False),
]


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


def shown(ticks: Iterator[datetime] | list[datetime], zone: str) -> list[str]:
    return [tick.astimezone(ZoneInfo(zone)).isoformat() for tick in ticks]


def some(expr: str, zone: str, after: str, count: int) -> list[str]:
    """The next ticks as the zone's clock shows them."""
    found: list[datetime] = []
    at: datetime | None = instant(after)
    while len(found) < count and at is not None:
        at = Recurrence(expr, zone).next_after(at)
        found += [] if at is None else [at]
    return shown(found, zone)


@cache
def shifts(zone: str) -> list[datetime]:
    """The days on which a zone's clock is put forward or back, within the years."""
    at = datetime(YEARS[0], 1, 1, tzinfo=UTC)
    found: list[datetime] = []
    while at.year < YEARS[-1] + 1:
        if at.astimezone(ZoneInfo(zone)).utcoffset() != (at + DAY).astimezone(ZoneInfo(zone)).utcoffset():
            found.append(at)
        at += DAY
    return found


@cache
def clock(zone: str, around: datetime) -> list[tuple[datetime, datetime]]:
    """Every minute of four days, and what the zone's clock shows in it."""
    instants = [around - DAY + minute * MINUTE for minute in range(4 * 24 * 60)]
    return [(each, each.astimezone(ZoneInfo(zone)).replace(tzinfo=None)) for each in instants]


def scanned(zone: str, around: datetime, minutes: set[int], hours: set[int], is_fixed: bool) -> list[datetime]:
    """What the rules say, read off the clock: settled question 33."""
    seen: set[datetime] = set()
    found: set[datetime] = set()
    before: datetime | None = None
    for at, wall in clock(zone, around):
        gap_start = wall if before is None or wall < before else before + MINUTE
        walls = [gap_start + n * MINUTE for n in range(int((wall - gap_start) / MINUTE))] if is_fixed else []
        for each in [*walls, wall]:
            if each.minute in minutes and each.hour in hours and not (is_fixed and each in seen):
                found.add(at)
        seen.add(wall)
        before = wall
    return sorted(found)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize(("expr", "minutes", "hours", "is_fixed"), EXPRESSIONS, ids=[each[0] for each in EXPRESSIONS])
def test_ticks_are_what_a_scan_of_the_clock_finds(
    expr: str, minutes: set[int], hours: set[int], is_fixed: bool, zone: str
) -> None:
    recurrence = Recurrence(expr, zone)
    for around in shifts(zone) or [datetime(2026, 1, 1, tzinfo=UTC)]:
        expected = [at for at in scanned(zone, around, minutes, hours, is_fixed) if around - DAY / 2 < at]
        found = list(recurrence.between(around - DAY / 2, clock(zone, around)[-1][0]))
        assert shown(found, zone) == shown(expected, zone)


@pytest.mark.covers("F51")
@pytest.mark.parametrize("first", range(0, 600, 100))
def test_a_daily_tick_comes_once_a_day_in_every_zone(first: int) -> None:
    for zone in sorted(available_timezones())[first : first + 100]:
        recurrence = Recurrence("30 2 * * *", zone)
        for around in shifts(zone):
            ticks = recurrence.between(around - DAY, around + 2 * DAY)
            days = [tick.astimezone(ZoneInfo(zone)).date() for tick in ticks]
            assert len(days) >= 2, zone
            assert days == [days[0] + n * DAY for n in range(len(days))], zone


@pytest.mark.covers("F51")
@pytest.mark.parametrize("zone", ZONES)
def test_a_daily_tick_comes_on_every_day_of_ten_years(zone: str) -> None:
    start, end = datetime(YEARS[0], 1, 1, tzinfo=ZoneInfo(zone)), datetime(YEARS[-1] + 1, 1, 1, tzinfo=ZoneInfo(zone))
    days = [tick.astimezone(ZoneInfo(zone)).date() for tick in Recurrence("30 2 * * *", zone).between(start, end)]
    assert days == [(start + day * DAY).date() for day in range(3653)]


# ---------------------------------------------------------------- single days, written out


def short(ticks: list[str]) -> list[str]:
    return [datetime.fromisoformat(tick).strftime("%m-%d %H:%M:%S%z") for tick in ticks]


@pytest.mark.covers("F51", "P35")
@pytest.mark.parametrize(
    ("expr", "zone", "after", "expected"),
    [
        # Berlin: 2:00 to 3:00 is skipped in spring and repeated in autumn
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-29 03:00:00+0200", "03-30 02:30:00+0200"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00Z", ["10-25 02:30:00+0200", "10-26 02:30:00+0100"]),
        ("0,30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-29 03:00:00+0200", "03-30 02:00:00+0200"]),
        ("*/30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-30 02:00:00+0200", "03-30 02:30:00+0200"]),
        (
            "*/30 2 * * *", "Europe/Berlin", "2026-10-24T12:00Z",
            ["10-25 02:00:00+0200", "10-25 02:30:00+0200", "10-25 02:00:00+0100", "10-25 02:30:00+0100"],
        ),
        ("15 30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", ["03-29 03:00:00+0200", "03-30 02:30:15+0200"]),
        # asked for in the repeated hour, a fixed time of its first run is over
        ("50 2 * * *", "Europe/Berlin", "2026-10-25T01:15Z", ["10-26 02:50:00+0100"]),
        # Lord Howe: half an hour
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00Z", ["10-04 02:30:00+1100", "10-05 02:15:00+1100"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T00:00Z", ["04-05 01:45:00+1100", "04-06 01:45:00+1030"]),
        # Santiago: midnight itself is skipped
        ("0 0 * * *", "America/Santiago", "2026-09-05T12:00Z", ["09-06 01:00:00-0300", "09-07 00:00:00-0300"]),
        ("*/20 0 * * *", "America/Santiago", "2026-09-05T12:00Z", ["09-07 00:00:00-0300", "09-07 00:20:00-0300"]),
        # Samoa left out the 30th of December 2011
        ("0 9 * * *", "Pacific/Apia", "2011-12-29T20:00Z", ["12-31 00:00:00+1400", "12-31 09:00:00+1400"]),
    ],
)  # fmt: skip
def test_days_on_which_the_clock_is_changed(expr: str, zone: str, after: str, expected: list[str]) -> None:
    assert short(some(expr, zone, after, len(expected))) == expected


@pytest.mark.covers("F55")
@pytest.mark.parametrize(
    ("expr", "after", "expected"),
    [
        ("0 0 29 2 *", "2096-03-01T00:00Z", "2104-02-29T00:00:00+00:00"),
        ("0 0 31 * *", "2026-01-31T00:00Z", "2026-03-31T00:00:00+00:00"),
        ("0 0 30 * *", "2026-01-31T00:00Z", "2026-03-30T00:00:00+00:00"),
        ("0 0 L 2 *", "2026-01-31T00:00Z", "2026-02-28T00:00:00+00:00"),
        ("0 9 * * mon#1", "2026-01-06T00:00Z", "2026-02-02T09:00:00+00:00"),
        ("0 0 1 1 *", "2038-01-19T03:14:08Z", "2039-01-01T00:00:00+00:00"),
        ("* * * * *", "2038-01-19T03:14:07Z", "2038-01-19T03:15:00+00:00"),
        ("0 0 1 12 *", "9998-12-31T00:00Z", "9999-12-01T00:00:00+00:00"),
        ("*/10 * * * * *", "2026-01-01T00:00:55.5Z", "2026-01-01T00:01:00+00:00"),
        ("0 0 13 * 5", "2026-01-01T00:00Z", "2026-01-02T00:00:00+00:00"),
    ],
)
def test_days_that_some_months_and_years_lack(expr: str, after: str, expected: str) -> None:
    assert some(expr, "UTC", after, 1) == [expected]


@pytest.mark.covers("F55")
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Pacific/Kiritimati"])
def test_there_is_no_tick_after_the_last_year(zone: str) -> None:
    assert Recurrence("0 0 1 12 *", zone).next_after(instant("9999-12-30T00:00Z")) is None
    assert Recurrence("* * * * *", zone).next_after(datetime(9999, 12, 31, 23, 59, 30, tzinfo=UTC)) is None


def test_names_stand_for_fields() -> None:
    for name, fields in NAMED.items():
        assert some(name, "Asia/Tokyo", "2026-05-05T05:05Z", 3) == some(fields, "Asia/Tokyo", "2026-05-05T05:05Z", 3)
    assert some("@Daily", "Europe/Berlin", "2026-01-01T00:00Z", 1) == ["2026-01-02T00:00:00+01:00"]


@pytest.mark.covers("F55")
@pytest.mark.parametrize(
    ("expr", "reason"),
    [
        ("@reboot", "not an instant"),
        ("@every 5m", "no such name"),
        ("", "fields"),
        ("* * * *", "fields"),
        ("* * * * * * *", "fields"),
        ("60 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 32 * *", "day"),
        ("* * * 13 *", "month"),
        ("* * * * 8", "day-of-week"),
        ("*/0 * * * *", "minute"),
        ("5-1 * * * *", "minute"),
        ("\u0661 * * * *", "minute"),
        ("0 0 30 2 *", "day"),
        ("0 0 31 4,6,9,11 *", "day"),
        ("every day", "fields"),
        ("0 0 * * mon#6", "day-of-week"),
        ("0 " * 200, "longer"),
        ("99999999999999999999 * * * *", "minute"),
    ],
)
def test_what_cannot_be_read_or_never_fires_is_refused(expr: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as refusal:
        Recurrence(expr)
    assert refusal.value.place.startswith("cron(")
    assert refusal.value.remedy


@pytest.mark.covers("F51")
def test_an_unknown_zone_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Mars/Olympus"):
        Recurrence("* * * * *", "Mars/Olympus")


def test_the_newest_ticks_of_a_long_time_are_found_from_its_end() -> None:
    start, end = instant("1990-01-01T00:00Z"), instant("2026-01-01T00:00Z")
    assert Recurrence("* * * * * *").newest(start, end, 3) == [end - n * timedelta(seconds=1) for n in (2, 1, 0)]
    assert shown(Recurrence("0 0 29 2 *").newest(start, end, 2), "UTC") == [
        "2020-02-29T00:00:00+00:00",
        "2024-02-29T00:00:00+00:00",
    ]
    assert len(Recurrence("0 0 1 1 *").newest(start, end, 1000)) == 36
