"""Policies, limits and triggers are right when made, or not made."""

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from pgconductor import Conductor
from pgconductor.errors import ConfigurationError
from pgconductor.model import (
    Batch,
    Concurrency,
    Cron,
    EventDef,
    Invocable,
    OnChange,
    OnEvent,
    RateLimit,
    RetryPolicy,
    cron,
    event,
    invocable,
    table,
)

PAID: EventDef[Any] = EventDef("paid", dict)
CHANCE = random.Random(7)  # noqa: S311  (spreads retries, keeps no secret)


def waits(policy: RetryPolicy, count: int) -> list[float]:
    return [policy.delay(number, CHANCE) for number in range(1, count + 1)]


def test_backoff_doubles_from_15_seconds_to_two_hours() -> None:
    assert waits(RetryPolicy(jitter=0), 11) == [15, 30, 60, 120, 240, 480, 960, 1920, 3840, 7200, 7200]


def test_jitter_only_shortens() -> None:
    policy = RetryPolicy(first=100, jitter=0.1)

    delays = [policy.delay(1, CHANCE) for _ in range(1000)]

    assert 90 <= min(delays) < 91
    assert 99 < max(delays) <= 100


def test_listed_delays_are_taken_in_turn_and_the_last_repeats() -> None:
    assert waits(RetryPolicy(delays=["1s", "1m", 300], jitter=0), 5) == [1, 60, 300, 300, 300]


def test_very_late_attempt_waits_the_maximum() -> None:
    assert RetryPolicy(jitter=0, factor=10).delay(32_767, CHANCE) == 7200


def test_policy_gives_up_on_listed_errors_and_their_subclasses() -> None:
    policy = RetryPolicy(give_up_on=[LookupError])

    assert policy.gives_up_on(KeyError())
    assert not policy.gives_up_on(ValueError())


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: RetryPolicy(first=0), "RetryPolicy: first: 0 must be more than zero"),
        (lambda: RetryPolicy(first="3h"), "longer than max=7200; raise max="),
        (lambda: RetryPolicy(factor=0.5), "RetryPolicy: factor"),
        (lambda: RetryPolicy(factor=float("nan")), "RetryPolicy: factor"),
        (lambda: RetryPolicy(jitter=1.1), "RetryPolicy: jitter"),
        (lambda: RetryPolicy(delays=[]), "RetryPolicy: delays"),
        (lambda: RetryPolicy(delays="1s"), "RetryPolicy: delays"),
        (lambda: RetryPolicy(give_up_on=[KeyError()]), "RetryPolicy: give_up_on"),  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
        (lambda: Batch(0, 1), "Batch: size: 0 is out of bounds; give 1 to 10000"),
        (lambda: Batch(True, 1), "Batch: size"),
        (lambda: Batch(1, -1), "Batch: timeout"),
        (lambda: Concurrency(0), "Concurrency: limit"),
        (lambda: Concurrency(1, key="a..b"), "Concurrency: key"),
        (lambda: RateLimit(1, 0), "RateLimit: per"),
        (lambda: RateLimit(1, "1s", key=""), "RateLimit: key"),
        (lambda: cron(""), "cron"),
        (lambda: cron("@daily", tz="Mars/Olympus"), "not a known time zone"),
        (lambda: cron("@daily", tz="../../etc/passwd"), "not a known time zone"),
        (lambda: cron("@daily", catch_up="some"), "catch_up: 'some' is not known"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        (lambda: event("paid"), "pass what app.event"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        (lambda: event(PAID, fields=[]), "fields: is empty"),
        (lambda: event(PAID, fields="id"), "not a sequence of names"),
        (lambda: event(PAID, fields=["id", "id"]), "repeats a name"),
        (lambda: table("contact", "upsert", columns=["id"]), "op: 'upsert'"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        (lambda: table("contact", "insert", columns=[]), "columns: is empty"),
        (lambda: table("", "insert", columns=["id"]), "table"),
        (lambda: table("contact", "insert", columns=["id"], when="new.a = '\0'"), "NUL"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_place_and_remedy(attempt: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        attempt()

    assert message in str(caught.value)
    assert caught.value.remedy


def test_triggers_keep_what_was_written() -> None:
    assert invocable() == Invocable()
    assert cron("0 9 * * *", tz="Europe/Berlin") == Cron("0 9 * * *", "0 9 * * *", "Europe/Berlin", "latest")
    assert event(PAID, fields=["id"], where="$.id > 1") == OnEvent(PAID, ("id",), "$.id > 1")
    assert table("public.contact", "insert", columns=["id"]) == OnChange("public.contact", "insert", ("id",), None)


def test_values_are_frozen() -> None:
    policy: Any = RetryPolicy()

    with pytest.raises(AttributeError):
        policy.first = timedelta(0)


def test_equal_values_are_equal() -> None:
    assert RetryPolicy() == RetryPolicy(first="15s", max="2h")
    assert Concurrency(3) == Concurrency(3)


def test_an_event_has_one_type_of_payload() -> None:
    app = Conductor("postgresql://")
    first = app.event("order.paid", dict[str, int])
    assert app.event("order.paid", dict[str, int]) == first
    with pytest.raises(ConfigurationError, match=r"'order.paid'.*dict\[str, int\].*already.*list\[int\]") as refused:
        app.event("order.paid", list[int])
    assert "another name" in str(refused.value)
    assert Conductor("postgresql://").event("order.paid", list[int]).payload == list[int]
