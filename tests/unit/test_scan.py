"""Where claims begin to look, and what is left of a lane behind the places that they came to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgconductor.scan import (
    AGE_SECONDS,
    EXPLAINED_SEARCH_SECONDS,
    EXPLAINED_SECONDS,
    EXPLAINED_SECONDS_EACH,
    PART_SECONDS,
    PAUSE_FACTOR,
    SECTION_BITS,
    WIDTH_FIRST,
    Cost,
    Range,
    Scan,
    Start,
    ToldPlaces,
    ranges_behind,
)

SECTION = 2**SECTION_BITS
places = st.integers(-4 * SECTION, 4 * SECTION - 1)


def holds(ranges: list[Range], lane_id: int, place: int) -> int:
    return sum(each.lane_id == lane_id and each.after_place < place < each.before_place for each in ranges)


@given(st.lists(st.tuples(st.integers(1, 3), places), min_size=1), st.data())
def test_the_ranges_leave_out_what_was_passed_in_a_section_and_nothing_else(
    taken: list[tuple[int, int]], data: st.DataObject
) -> None:
    last: dict[tuple[int, int], int] = {(lane, place // SECTION): place for lane, place in sorted(taken)}
    ranges = ranges_behind(last)
    lane: int = data.draw(st.sampled_from(sorted({lane for lane, _ in taken})))
    looked_at: list[int] = [data.draw(places), *(place + n for _, place in taken for n in (-1, 0, 1))]
    for place in looked_at:
        key = (lane, place // SECTION)
        assert holds(ranges, lane, place) == (key not in last or place > last[key])


def test_the_best_priority_s_late_work_comes_first() -> None:
    assert ranges_behind({(7, 0): 5, (7, -1): -9}) == [
        Range(7, -(2**63), -SECTION),
        Range(7, -9, 0),
        Range(7, 5, 2**63 - 1),
    ]


def losing(seconds: float = 0.0) -> Cost:
    return Cost(EXPLAINED_SECONDS + 100 * EXPLAINED_SECONDS_EACH + seconds, 0, 10, 90)


def noted(scan: Scan, start: Start, now: float, *, lost: float = 0.0, place: int = 1) -> None:
    scan.note(start, [(1, place)], losing(lost), now)


@pytest.mark.parametrize(
    ("cost", "lost"),
    [
        (Cost(0, 0, 0, 0), 0),
        (Cost(EXPLAINED_SECONDS + 500 * EXPLAINED_SECONDS_EACH, 0.0005, 100, 400), 0),
        # before the first row, where 400 rows would explain it, and behind it
        (Cost(0.02, EXPLAINED_SEARCH_SECONDS + 10 * EXPLAINED_SECONDS_EACH + 0.004, 10, 400), 0.004),
        (Cost(EXPLAINED_SECONDS + 50 * EXPLAINED_SECONDS_EACH + 0.1, 0.0005, 10, 40), 0.1),
    ],
)
def test_what_is_lost_is_what_neither_rows_nor_lanes_explain(cost: Cost, lost: float) -> None:
    assert cost.lost_seconds == pytest.approx(lost)


def test_while_nothing_is_lost_every_claim_begins_at_the_head() -> None:
    scan = Scan()
    for now in range(10):
        assert scan.start(now) is Start.HEAD
        noted(scan, Start.HEAD, now)
    assert scan.ranges(Start.HEAD) is None


def test_a_start_that_cost_too_much_is_not_used_again_for_twenty_times_of_that() -> None:
    scan = Scan()
    for now in (98, 99):
        noted(scan, Start.HEAD, now)
    noted(scan, Start.HEAD, 100, lost=0.5)
    assert scan.head_at == pytest.approx(100 + 0.5 * PAUSE_FACTOR)
    assert [scan.start(now) for now in (100, scan.head_at - 0.01, scan.head_at)] == [
        Start.EARLIER, Start.EARLIER, Start.HEAD,
    ]  # fmt: skip
    noted(scan, Start.EARLIER, 101, lost=0.05)
    assert [scan.start(now) for now in (101, 101.9, 102.1)] == [Start.LAST, Start.LAST, Start.EARLIER]


def test_the_earlier_start_is_where_claims_had_come_a_second_ago() -> None:
    scan = Scan()
    for now, place in [(100, 10), (100 + AGE_SECONDS, 20), (100 + 1.5 * AGE_SECONDS, 30)]:
        noted(scan, Start.LAST, now, place=place)
    assert scan.ranges(Start.EARLIER) == ranges_behind({(1, 0): 10})
    assert scan.ranges(Start.LAST) == ranges_behind({(1, 0): 30})


def test_a_place_that_was_passed_before_moves_nothing_back() -> None:
    scan = Scan()
    for place in (30, 10):
        noted(scan, Start.HEAD, 100, place=place)
    assert scan.ranges(Start.LAST) == ranges_behind({(1, 0): 30})


def test_after_a_loss_claims_begin_at_the_heads() -> None:
    scan = Scan()
    noted(scan, Start.HEAD, 100, lost=5)
    scan.forget()
    assert scan.start(100) is Start.HEAD
    assert scan.ranges(Start.LAST) == []


def test_nothing_is_told_of_places_while_it_is_cheap_to_begin_at_the_head() -> None:
    scan = Scan()
    assert scan.told(100) is None
    for now in range(100, 104):
        noted(scan, Start.HEAD, now)
    assert scan.told(104) is None


def test_what_is_told_is_where_claims_had_come_a_second_ago_and_when_the_head_may_be_used() -> None:
    scan = Scan()
    for now, place in [(100, 10), (101, 20), (102, 30)]:
        noted(scan, Start.HEAD, now, place=place, lost=0.04)
    told = scan.told(102.5)
    assert told is not None
    assert told.head_in == pytest.approx(0.3)
    assert (told.last, told.looked) == ([(1, 20)], None)
    assert scan.told(103) is None


def test_a_process_that_starts_begins_behind_what_it_is_told_until_the_head_may_be_used() -> None:
    scan = Scan()
    scan.begin_behind(ToldPlaces(8, [(1, 20), (1, -9)]), 100)
    for start in (Start.EARLIER, Start.LAST):
        assert scan.ranges(start) == ranges_behind({(1, 0): 20, (1, -1): -9})
    assert [scan.start(now) for now in (100, 107.9, 108)] == [Start.EARLIER, Start.EARLIER, Start.HEAD]


def test_what_a_process_knows_itself_counts_before_what_it_is_told() -> None:
    scan = Scan()
    noted(scan, Start.HEAD, 100, place=30)
    scan.begin_behind(ToldPlaces(8, [(1, 20)]), 100)
    assert scan.start(100) is Start.HEAD
    assert scan.ranges(Start.LAST) == ranges_behind({(1, 0): 30})


def test_an_old_word_lets_a_process_begin_at_the_head() -> None:
    scan = Scan()
    scan.begin_behind(ToldPlaces(-3, [(1, 20)]), 100)
    assert scan.start(100) is Start.HEAD


LOOK_LOST = 2 * PART_SECONDS


def dear(scan: Scan, *, place: int = 100_000) -> float:
    """Let whole looks become dear; return when the first part of a pass is due."""
    for now in (97, 98, 99):
        noted(scan, Start.HEAD, now, place=place)
    noted(scan, Start.HEAD, 100, place=place, lost=LOOK_LOST)
    return scan.head_at


def parts(scan: Scan) -> list[tuple[int, int]]:
    """Return the bounds of what is looked through beside what stands behind the known places."""
    behind = ranges_behind({(1, 0): 100_000})
    return [(each.after_place, each.before_place) for each in scan.ranges(Start.HEAD) or () if each not in behind]


def looked(scan: Scan, now: float, *, lost: float = PART_SECONDS, is_full: bool = False) -> None:
    scan.note(Start.HEAD, [], losing(lost), now, is_full=is_full)


def test_a_look_that_took_long_is_made_in_parts_from_then_on() -> None:
    scan = Scan()
    now = dear(scan)
    assert scan.start(now) is Start.HEAD
    found = parts(scan)
    while scan.is_in_pass or len(found) == 1:
        looked(scan, now)
        found += parts(scan)
    assert found[0] == (-1, WIDTH_FIRST)
    ends = [end for _, end in found[:-1]]
    assert [after + 1 for after, _ in found[1:-1]] == ends[:-1]  # nothing is left out, nothing comes twice
    assert ends[-1] == 100_001
    assert found[-1] == found[0]  # and the next pass begins


def test_a_part_that_takes_long_is_followed_by_a_shorter_one() -> None:
    scan = Scan()
    now = dear(scan)
    looked(scan, now, lost=LOOK_LOST)
    ((after, before),) = parts(scan)
    assert before - after - 1 == WIDTH_FIRST // 2
    for _ in range(2):
        looked(scan, now, lost=0)
    ((after, before),) = parts(scan)
    assert before - after - 1 == 2 * WIDTH_FIRST


def test_a_part_in_which_something_may_be_left_is_looked_through_again() -> None:
    scan = Scan()
    now = dear(scan)
    first = parts(scan)
    looked(scan, now, is_full=True)
    assert parts(scan) == first
    scan.note(Start.HEAD, [(1, WIDTH_FIRST - 1)], losing(PART_SECONDS), now, is_full=True)
    assert parts(scan) == first
    # what it took last stands behind the part
    scan.note(Start.HEAD, [(1, WIDTH_FIRST)], losing(), now, is_full=True)
    assert parts(scan)[0][0] == WIDTH_FIRST - 1


def test_a_part_is_passed_where_only_what_stands_behind_it_was_taken_from_other_sections_and_lanes() -> None:
    scan = Scan()
    for now in (97, 98, 99, 100):
        scan.note(Start.HEAD, [(1, 50_000), (1, -10), (2, 40_000)], losing(LOOK_LOST * (now == 100)), now)
    scan.note(Start.HEAD, [(1, 60_000)], losing(), scan.head_at, is_full=True)
    begins = {(each.lane_id, each.after_place >> SECTION_BITS) for each in scan.ranges(Start.HEAD) or ()}
    assert begins >= {(1, 0), (2, 0)}
    assert not [each for each in scan.ranges(Start.HEAD) or () if each.after_place in (-1, -SECTION - 1)]


def test_a_cheap_pass_is_followed_by_whole_looks() -> None:
    scan = Scan()
    now = dear(scan)
    while True:
        looked(scan, now, lost=0)
        if not scan.is_in_pass:
            break
    assert scan.ranges(Start.HEAD) is None


def test_a_process_that_starts_goes_on_with_the_pass_of_others() -> None:
    scan, other = Scan(), Scan()
    now = dear(scan)
    looked(scan, now)
    told = scan.told(scan.head_at + 5)  # the next part has been due for a while
    assert told is not None
    assert told.head_in == 0
    other.begin_behind(told, now)
    assert parts(other) == parts(scan) != []
