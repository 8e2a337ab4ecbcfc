"""Every workload, in the order in which they are run."""

from benchmarks.measure import Workload
from benchmarks.workloads import (
    backlog,
    bare,
    beside,
    children,
    content,
    drain,
    enqueue,
    floors,
    flow,
    idle,
    latency,
    retention,
    steady,
    steps,
)

ALL: list[Workload] = [
    *floors.WORKLOADS,
    *bare.WORKLOADS,
    *enqueue.WORKLOADS,
    *drain.WORKLOADS,
    *latency.WORKLOADS,
    *children.WORKLOADS,
    *steps.WORKLOADS,
    *idle.WORKLOADS,
    *backlog.WORKLOADS,
    *flow.WORKLOADS,
    *retention.WORKLOADS,
    *content.WORKLOADS,
    *steady.WORKLOADS,
    *beside.WORKLOADS,
]
