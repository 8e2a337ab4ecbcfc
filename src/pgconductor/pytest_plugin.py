"""The pytest plugin: a real database per test, a drained queue, a clock that the test moves."""
