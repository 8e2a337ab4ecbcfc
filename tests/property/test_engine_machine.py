"""Lives of the engine, drawn by hypothesis; `make machine EXAMPLES=2000` draws more of them."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.conftest import connect
from tests.databases import Databases
from tests.property.engine_machine import EngineMachine

EXAMPLES = int(os.environ.get("PGCONDUCTOR_MACHINE_EXAMPLES", "6"))
STEPS = int(os.environ.get("PGCONDUCTOR_MACHINE_STEPS", "40"))


@pytest.fixture
def machine(databases: Databases) -> Iterator[type[EngineMachine]]:
    """A machine each of whose lives has a database that looks new."""
    taken: list[str] = []

    class Machine(EngineMachine):
        def __init__(self) -> None:
            taken.append(databases.take())
            type(self).connection = connect(databases.address(taken[-1]))
            type(self).connection.prepare_threshold = 0  # the invariants are asked after each step
            super().__init__()

        def teardown(self) -> None:
            try:
                super().teardown()
            finally:
                self.db.close()
                databases.give_back(taken.pop())

    yield Machine
    for name in taken:
        databases.give_back(name)


@pytest.mark.property
@pytest.mark.timeout(0)
def test_whatever_order_the_functions_are_called_in_every_rule_holds(machine: type[EngineMachine]) -> None:
    chosen = settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, print_blob=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=chosen)
