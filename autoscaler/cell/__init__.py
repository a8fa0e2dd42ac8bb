"""The cell's Redis as the autoscaler sees it: load, heartbeats, desired replicas, routing, machine users.

Used by the tick, reconcile, enrolment and the watcher, on the trusted side and synchronously; every call waits 2 s at
most and is not retried here (redis.RedisError passes through). Postgres has the facts; what is written here can always
be written again from them. Must never be given a machine's credentials.
"""

from autoscaler.cell.adapters import CellAdapters
from autoscaler.cell.desired import Desired
from autoscaler.cell.readings import DeploymentReading, Readings, ReplicaReading, parse_status
from autoscaler.cell.routing import Routing
from autoscaler.cell.stages import Stages
from autoscaler.cell.users import Users
from autoscaler.cell.watching import Watching


class Cell(Readings, Routing, Desired, CellAdapters, Stages, Users, Watching):
    """One cell, whole."""


__all__ = ["Cell", "DeploymentReading", "ReplicaReading", "parse_status"]
