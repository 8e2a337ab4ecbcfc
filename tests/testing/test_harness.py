"""An application on a database of its own, run on a clock that the test moves. These tests double as examples."""

from datetime import timedelta

import psycopg
import pytest

from pgconductor import ExecutionFailed
from pgconductor.testing import ConductorTest
from tests.testing.orders_app import (
    Bank,
    Deps,
    Receipt,
    app,
    archive,
    charge,
    checkout,
    close_day,
    place,
    ship,
    ship_soon,
)


async def test_checkout_charges_and_cools_off(conductor_test: ConductorTest) -> None:
    bank = Bank()
    t = await conductor_test(app, deps=Deps(bank))

    run = await checkout.invoke(7)
    await t.drain()

    t.assert_step(run, "price")
    t.assert_invoked(charge.bind(700))
    assert await run.state() == "waiting"

    await t.advance(days=1)
    assert await run.result() == "charge-1"
    assert bank.charged == [700]


async def test_charge_is_retried_with_back_off(conductor_test: ConductorTest) -> None:
    bank = Bank(failures_left=2)
    t = await conductor_test(app, deps=Deps(bank))

    run = await charge.invoke(500)
    await t.drain()
    assert await run.state() == "scheduled"

    await t.advance("10s")
    assert await run.state() == "scheduled"

    await t.advance("20s")
    assert await run.result() == Receipt("charge-1", 500)


async def test_charge_gives_up_after_three_attempts(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app, deps=Deps(Bank(failures_left=3)))

    run = await charge.invoke(500)
    await t.drain()
    await t.advance()
    with pytest.raises(ExceptionGroup) as caught:
        await t.advance()

    assert [type(error) for error in caught.value.exceptions] == [ConnectionError]
    with pytest.raises(ExecutionFailed, match="the bank does not answer"):
        await run.result()


async def test_shipping_that_takes_too_long_is_apologised_for(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)

    run = await ship_soon.invoke(7)
    await t.advance(hours=1)

    assert await run.result() == "sent an apology"
    t.assert_invoked(ship.bind(7))


async def test_a_crash_does_not_charge_twice(conductor_test: ConductorTest) -> None:
    bank = Bank()
    t = await conductor_test(app, deps=Deps(bank))

    run = await charge.invoke(500)
    await t.crash_after(run, step="bank")

    assert await run.result() == Receipt("charge-1", 500)
    assert bank.charged == [500]


async def test_a_crash_does_not_place_an_order_twice(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)

    run = await place.invoke(7)
    await t.crash_after(run, step="insert")

    assert await run.result() == 7
    with psycopg.connect(t.dsn) as conn:
        assert conn.execute("select * from placed").fetchall() == [(7,)]


async def test_all_orders_of_a_day_are_charged(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)

    run = await close_day.invoke([1, 2, 3])
    await t.drain()

    assert sorted(await run.result()) == ["charge-1", "charge-2", "charge-3"]
    for order_id in (1, 2, 3):
        t.assert_invoked(charge.bind(order_id * 100))


async def test_a_plain_function_sleeps_and_crashes_like_any_other(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)

    run = await archive.invoke(3)
    await t.crash_after(run, step="print")
    assert await run.state() == "waiting"

    await t.advance(timedelta(minutes=1))
    assert await run.result() == 8
