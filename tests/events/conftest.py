"""The same app and workers as in the integration tests."""

from tests.integration.conftest import app, working

__all__ = ["app", "working"]
