"""Durable execution for Python that needs only Postgres."""
