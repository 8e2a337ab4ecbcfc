"""Apps and workers, as the integration tests have them."""

from tests.integration.conftest import app, working

__all__ = ["app", "working"]
