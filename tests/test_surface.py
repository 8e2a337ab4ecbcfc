"""The public surface is the contract's: no name more, none less, each documented and in its place."""

import importlib
import inspect
import pkgutil

import pytest

import pgconductor

# Written out a second time on purpose: a name appears or disappears only where somebody meant it.
CONTRACT = [
    "AttemptTimeout",
    "Batch",
    "BatchContext",
    "Call",
    "Change",
    "Child",
    "ChildCancelled",
    "ChildFailed",
    "ChildTimeout",
    "Concurrency",
    "Conductor",
    "ConductorError",
    "Context",
    "DuplicateStep",
    "Duration",
    "EncodeError",
    "Event",
    "EventDef",
    "ExecutionCancelled",
    "ExecutionFailed",
    "ExecutionNotFound",
    "Expired",
    "Fail",
    "Operation",
    "Options",
    "Orchestrator",
    "RateLimit",
    "Retry",
    "RetryPolicy",
    "Run",
    "State",
    "StepMismatch",
    "SyncContext",
    "Task",
    "TaskOptions",
    "Tick",
    "Trigger",
    "WaitTimeout",
    "Worker",
    "WorkerLost",
    "cron",
    "event",
    "invocable",
    "table",
]

ERRORS = {
    "ChildCancelled": "ChildFailed",
    "ChildFailed": "ExecutionFailed",
    "ChildTimeout": "ChildFailed",
    "Fail": "Exception",
    "Retry": "Exception",
}


def documented() -> list[str]:
    values = {name: getattr(pgconductor, name, None) for name in CONTRACT}
    return [name for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value)]


def members(name: str) -> list[tuple[str, object]]:
    """Return the public methods and properties that a class defines itself."""
    value = getattr(pgconductor, name)
    own = vars(value).items() if inspect.isclass(value) else ()
    return [
        (key, each) for key, each in own if not key.startswith("_") and (callable(each) or isinstance(each, property))
    ]


def test_surface_is_the_contract() -> None:
    assert sorted(pgconductor.__all__) == CONTRACT


def test_names_are_sorted() -> None:
    assert pgconductor.__all__ == sorted(pgconductor.__all__)


@pytest.mark.parametrize("name", CONTRACT)
def test_name_is_importable(name: str) -> None:
    assert hasattr(pgconductor, name)


@pytest.mark.parametrize("name", documented())
def test_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(pgconductor, name))
    assert [key for key, each in members(name) if not inspect.getdoc(each)] == []


@pytest.mark.parametrize(("name", "parent"), ERRORS.items())
def test_error_stands_where_the_contract_says(name: str, parent: str) -> None:
    assert getattr(pgconductor, name).__base__.__name__ == parent


def test_no_module_hides_a_function_of_the_surface() -> None:
    for module in pkgutil.iter_modules(pgconductor.__path__):
        if module.name in CONTRACT:
            importlib.import_module(f"pgconductor.{module.name}")

    assert [name for name in pgconductor.__all__ if inspect.ismodule(getattr(pgconductor, name))] == []
