"""For how long a process may believe in its leases."""

import time

from pgconductor.membership import Membership, Timing


def test_an_answered_beat_prolongs_the_trust() -> None:
    membership = Membership(Timing(expiry=60))
    membership.join("a", time.monotonic() - 40)
    membership.confirm("a", time.monotonic())
    assert membership.seconds_left() > 40
    assert not membership.is_fenced()


def test_trust_that_has_ended_does_not_come_back_with_a_late_beat() -> None:
    membership = Membership(Timing(expiry=60))
    membership.join("a", time.monotonic() - 50)
    membership.confirm("a", time.monotonic())
    assert membership.is_fenced()
    assert membership.seconds_left() <= 0


def test_the_end_of_trust_is_final_for_whoever_has_seen_it() -> None:
    membership = Membership(Timing(expiry=60))
    membership.join("a", time.monotonic() - 50)
    assert membership.is_fenced()
    membership.confirm("a", time.monotonic())
    assert membership.is_fenced()
    membership.join("b", time.monotonic())
    assert not membership.is_fenced()
