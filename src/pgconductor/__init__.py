"""Durable execution for Python that needs only Postgres."""

from pgconductor.conductor import Conductor
from pgconductor.context import BatchContext, Context
from pgconductor.durations import Duration
from pgconductor.errors import (
    AttemptTimeout,
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    ConductorError,
    DuplicateStep,
    EncodeError,
    ExecutionCancelled,
    ExecutionFailed,
    ExecutionNotFound,
    Expired,
    Fail,
    Retry,
    StepMismatch,
    WaitTimeout,
    WorkerLost,
)
from pgconductor.model import (
    Batch,
    Change,
    Concurrency,
    Event,
    EventDef,
    Operation,
    RateLimit,
    RetryPolicy,
    State,
    Tick,
    Trigger,
    cron,
    event,
    invocable,
    table,
)
from pgconductor.operations import Child
from pgconductor.options import Options, TaskOptions
from pgconductor.orchestrator import Orchestrator
from pgconductor.run import Run
from pgconductor.sync_context import SyncContext
from pgconductor.task import Call, Task
from pgconductor.worker import Worker

__all__ = [
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
