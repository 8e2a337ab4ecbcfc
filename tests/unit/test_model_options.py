"""Options of calls and tasks are checked once, and completed."""

from datetime import UTC, datetime, time, timedelta
from typing import Any

import pytest

from pgconductor.errors import ConfigurationError
from pgconductor.model import Batch, Concurrency, RateLimit, RetryPolicy, Window, cron, invocable
from pgconductor.options import NO_OPTIONS, CallOptions, Options, TaskConfig, TaskOptions, configure_task, parse_options

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def test_task_without_options_has_the_documented_defaults() -> None:
    config = configure_task("charge", is_async=True)

    assert config == TaskConfig("charge")
    assert (config.queue, config.max_attempts, config.max_crashes, config.executor) == ("default", 3, 5, "loop")
    assert (config.keep_completed, config.keep_failed) == (timedelta(days=7), timedelta(days=30))
    assert config.retry == RetryPolicy()
    assert config.invocable


def test_plain_function_runs_in_a_thread() -> None:
    assert configure_task("charge", is_async=False).executor == "thread"


def test_task_options_are_parsed() -> None:
    config = configure_task(
        "charge",
        is_async=True,
        options={
            "name": "pay",
            "on": cron("@daily"),
            "timeout": "30s",
            "concurrency": [Concurrency(2), Concurrency(1, key="tenant.id")],
            "rate_limit": RateLimit(10, "1m"),
            "window": ("22:00", "06:00", "Europe/Berlin"),
            "batch": Batch(10, 1),
            "keep_completed": False,
            "keep_failed": True,
        },
    )

    assert (config.name, config.timeout, config.invocable) == ("pay", timedelta(seconds=30), False)
    assert config.concurrency == (Concurrency(2), Concurrency(1, key="tenant.id"))
    assert config.window == Window(time(22), time(6), "Europe/Berlin")
    assert (config.keep_completed, config.keep_failed) == (timedelta(0), None)


def test_number_as_concurrency_is_a_limit_without_key() -> None:
    assert configure_task("charge", is_async=True, options={"concurrency": 1}).concurrency == (Concurrency(1),)


def test_window_without_zone_is_in_utc() -> None:
    config = configure_task("charge", is_async=True, options={"window": ("08:30", "17:00")})

    assert config.window == Window(time(8, 30), time(17), "UTC")


@pytest.mark.covers("F62")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "task 'charge': max_attempts: 0 is out of bounds; give 1 to 32767"),
        ({"max_attempts": 32_768}, "give 1 to 32767"),
        ({"max_attempts": True}, "not a whole number"),
        ({"max_crashes": 0}, "max_crashes"),
        ({"retries": 3}, "unknown option 'retries'; check its spelling"),
        ({"queue": ""}, "queue"),
        ({"queue": " a"}, "begins or ends with a space"),
        ({"queue": "ä" * 101}, "202 bytes"),
        ({"name": "a\nb"}, "not printable"),
        ({"timeout": 0}, "timeout: 0 must be more than zero"),
        ({"expires": "never"}, "expires: 'never' is not a duration"),
        ({"retry": 3}, "write RetryPolicy(...)"),
        ({"on": []}, "nothing would start the task"),
        ({"on": ["@daily"]}, "not a trigger"),
        ({"on": [cron("@daily"), cron("@daily")]}, "give each cron(...) its own name="),
        ({"concurrency": 0}, "concurrency: 0"),
        ({"concurrency": True}, "not a whole number"),
        ({"concurrency": [Concurrency(1), Concurrency(2)]}, "two limits have the same key"),
        ({"concurrency": "3"}, "not a sequence of limits"),
        ({"window": ("22:00",)}, "not a window"),
        ({"window": ("22:00", "24:00")}, "not a time of day"),
        ({"window": ("22:00", "22:00")}, "drop it to be always open"),
        ({"window": ("22:00", "06:00", "Berlin")}, "not a known time zone"),
        ({"executor": "gpu"}, "'loop', 'thread', 'process'"),
        ({"executor": "thread"}, "an async def runs on the loop"),
        ({"keep_failed": -1}, "keep_failed: -1 is negative"),
    ],
)
def test_task_option_out_of_bounds_is_refused_at_registration(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configure_task("charge", is_async=True, options=options)

    assert message in str(caught.value)


@pytest.mark.parametrize("options", [TaskOptions(executor="loop"), TaskOptions(batch=Batch(1, 1))])
def test_plain_function_can_neither_block_the_loop_nor_take_batches(options: TaskOptions) -> None:
    with pytest.raises(ConfigurationError):
        configure_task("charge", is_async=False, options=options)


def test_task_that_only_a_schedule_starts_is_not_invocable() -> None:
    assert not configure_task("report", is_async=True, options={"on": cron("@daily")}).invocable
    assert configure_task("report", is_async=True, options={"on": [invocable(), cron("@daily")]}).invocable


def test_call_options_are_parsed() -> None:
    options = parse_options("task 'charge'", delay="1h", dedupe_key="order-7", priority=-32_768)

    assert options == CallOptions(delay=timedelta(hours=1), dedupe_key="order-7", priority=-32_768)


def test_options_of_the_call_win_and_the_rest_is_filled_in() -> None:
    call = parse_options("call", priority=1, run_at=NOON)
    many = parse_options("invoke_many", priority=5, delay="1h", queue="slow")

    assert call.over(many) == CallOptions(priority=1, run_at=NOON, queue="slow")
    assert call.over(NO_OPTIONS) is call
    assert NO_OPTIONS.over(many) == many


@pytest.mark.covers("F62")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 32_768}, "priority: 32768 is out of bounds; give -32768 to 32767"),
        ({"run_at": datetime(2030, 1, 1)}, "has no time zone"),  # noqa: DTZ001
        ({"run_at": "tomorrow"}, "not a datetime"),
        ({"run_at": NOON, "delay": 1}, "run_at= and delay= contradict each other"),
        ({"throttle": 1, "debounce": 1}, "throttle= and debounce= contradict each other"),
        ({"debounce": 1, "delay": 1}, "debounce= sets the start itself"),
        ({"throttle": 0}, "must be more than zero"),
        ({"on_duplicate": "replace"}, "give dedupe_key="),
        ({"on_duplicate": "drop", "dedupe_key": "a"}, "'keep', 'replace'"),
        ({"on_duplicate": "keep", "dedupe_key": "a", "throttle": 1}, "drop on_duplicate="),
        ({"dedupe_key": ""}, "dedupe_key"),
        ({"prio": 1}, "unknown option 'prio'"),
    ],
)
def test_call_option_that_cannot_hold_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_options("task 'charge'", **options)

    assert message in str(caught.value)
    assert str(caught.value).startswith("task 'charge'")


def test_option_given_as_none_is_unset() -> None:
    unset: Any = {"delay": None, "priority": None}
    options: Options = unset

    assert parse_options("task 'charge'", **options) is NO_OPTIONS
