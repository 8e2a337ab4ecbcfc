"""Every workload, in the order in which they are run."""

from benchmarks.measure import Workload
from benchmarks.workloads import backlog, children, drain, enqueue, floors, flow, idle, latency, retention, steps

ALL: list[Workload] = [
    *floors.WORKLOADS,
    *enqueue.WORKLOADS,
    *drain.WORKLOADS,
    *latency.WORKLOADS,
    *children.WORKLOADS,
    *steps.WORKLOADS,
    *idle.WORKLOADS,
    *backlog.WORKLOADS,
    *flow.WORKLOADS,
    *retention.WORKLOADS,
]
