from tests.integration.conftest import app, working

__all__ = ["app", "working"]
