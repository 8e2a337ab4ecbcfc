"""The fixtures of the tests with real workers."""

from tests.integration.conftest import app, working

__all__ = ["app", "working"]
