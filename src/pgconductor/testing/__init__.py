"""Test durable code: handlers alone with a fake context, applications with a real database and a clock of the test's.

async def test_order_is_charged_once(conductor_test):       the fixture of the pytest plugin
    t = await conductor_test(app, deps=Deps(fake_http))
    run = await checkout.invoke(7)
    await t.crash_after(run, step="charge")
    await t.advance(days=1)
    assert await run.result() == "paid"
"""

from pgconductor.testing.fake_context import FakeContext, FakeSyncContext
from pgconductor.testing.harness import ConductorTest, Harness
from pgconductor.testing.script import Asked

__all__ = ["Asked", "ConductorTest", "FakeContext", "FakeSyncContext", "Harness"]
