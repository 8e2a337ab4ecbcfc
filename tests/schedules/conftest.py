"""An app on a fresh database, and workers for it in this process."""

from tests.integration.conftest import Working, app, working

__all__ = ["Working", "app", "working"]
