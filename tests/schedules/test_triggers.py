"""What a trigger hands over goes by what the engine recorded (P42), to the parameter that admits it (settled 20)."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from pgconductor import (
    Batch,
    BatchContext,
    Change,
    Conductor,
    ConductorError,
    Context,
    Event,
    Tick,
    Trigger,
    cron,
    event,
    invocable,
    table,
)
from pgconductor.claimed import Claimed, TriggerKind
from pgconductor.errors import ConfigurationError, DecodeError
from pgconductor.triggers import handed_over

AT = datetime(2026, 5, 4, 12, tzinfo=UTC)


@dataclass
class Paid:
    cents: int


def claimed(kind: TriggerKind | None, data: Any) -> Claimed:
    row: list[Any] = ["1", 1, 1, {}, 0, None, None, 0, 0, None, None, None, kind, data]
    return msgspec.json.decode(json.dumps(row), type=Claimed)


def test_a_tick_goes_to_the_parameter_for_ticks() -> None:
    parameters = {"tick": Tick | None, "event": Event[Paid] | None, "change": Change[Paid]}
    data = {"name": "nightly", "scheduled_at": "2026-05-04T14:00:00+02:00"}
    (tick,) = handed_over(parameters, claimed("schedule", data)).values()
    assert (tick, tick.scheduled_at.tzinfo) == (Tick("nightly", AT), UTC)


def test_an_event_is_decoded_to_its_type() -> None:
    data = {"name": "paid", "payload": {"cents": 5}}
    assert handed_over({"event": Tick | Event[Paid]}, claimed("event", data)) == {"event": Event("paid", Paid(5))}
    assert handed_over({"event": Event[Any]}, claimed("event", data)) == {"event": Event("paid", {"cents": 5})}


def test_a_change_is_decoded_to_its_type() -> None:
    data = {"name": "public.bill.update", "op": "update", "old": {"cents": 4}, "new": {"cents": 5}}
    wanted = Change("public.bill.update", "update", Paid(4), Paid(5))
    assert handed_over({"change": Change[Paid]}, claimed("change", data)) == {"change": wanted}


def test_the_missing_row_of_a_change_is_none() -> None:
    data = {"name": "public.bill.insert", "op": "insert", "old": None, "new": {"cents": 5}}
    wanted = Change("public.bill.insert", "insert", None, Paid(5))
    assert handed_over({"change": Change[Paid] | None}, claimed("change", data)) == {"change": wanted}


def test_an_event_that_no_longer_fits_is_refused_with_its_path() -> None:
    with pytest.raises(ConductorError, match="cents"):
        handed_over({"event": Event[Paid]}, claimed("event", {"name": "paid", "payload": {"cents": "five"}}))


def test_nothing_is_handed_over_without_a_trigger() -> None:
    assert handed_over({"tick": Tick}, claimed(None, {"name": "nightly"})) == {}


# ---------------------------------------------------------------- refused where it is declared


def test_an_expression_that_cannot_be_read_is_refused_at_registration() -> None:
    app = Conductor("postgresql://nowhere")
    for expr in ("@reboot", "0 0 30 2 *", "61 * * * *", "soon"):
        with pytest.raises(ConfigurationError, match="cron"):

            @app.task(on=cron(expr))
            async def nightly(ctx: Context) -> None: ...

    assert not app.tasks


def test_two_schedules_of_a_task_need_two_names() -> None:
    app = Conductor("postgresql://nowhere")
    with pytest.raises(ConfigurationError, match="same name"):

        @app.task(on=[cron("0 9 * * *", tz="Europe/Berlin"), cron("0 9 * * *", tz="Asia/Tokyo")])
        async def morning(ctx: Context) -> None: ...


paid = Conductor("postgresql://nowhere").event("paid", Paid)


@pytest.mark.parametrize(
    ("trigger", "place", "reason"),
    [
        (cron("@daily"), "cron('@daily')", "a schedule brings no payload for a batch"),
        (event(paid), "event('paid')", "an event brings no payload for a batch"),
        (table("bill", "insert", columns=["cents"]), "table('bill', 'insert')", "a row change brings no payload for a"),
    ],
)
def test_a_batch_is_started_by_calls_alone(trigger: Trigger, place: str, reason: str) -> None:
    app = Conductor("postgresql://nowhere")

    async def index(ctx: BatchContext, items: list[Paid]) -> None: ...

    with pytest.raises(ConfigurationError, match=reason) as refused:
        app.task(on=[invocable(), trigger], batch=Batch(10, 1))(index)
    assert refused.value.place == f"task 'index': {place}"
    assert app.task(on=invocable(), batch=Batch(10, 1))(index).name == "index"


def test_a_required_tick_needs_a_schedule() -> None:
    app = Conductor("postgresql://nowhere")
    with pytest.raises(ConfigurationError, match="'tick'"):

        @app.task(on=[cron("@daily"), invocable()])
        async def report(ctx: Context, tick: Tick) -> None: ...


def test_a_parameter_without_default_is_refused_where_nothing_is_handed_over() -> None:
    parameters = {"tick": Tick, "event": Event[Paid] | None}
    started = claimed(None, {})
    assert handed_over(parameters, started) == {}
    with pytest.raises(
        DecodeError, match="parameter 'tick': a trigger hands it over, but a call started this execution"
    ):
        handed_over(parameters, started, frozenset({"tick"}))
