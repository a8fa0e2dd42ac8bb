"""The nouns of a scaling decision: what is seen, what is configured, what is remembered, what is ordered.

Everything is a frozen dataclass with an exact JSON form (codec.py), so that a stored decision can be replayed
by its id. Observed by observe.py, decided on by policy/, applied by act.py. Pure: standard library only.
Instants (`…_at_s`) are Unix seconds on the control plane's clock; ids are the bare 32-hex form of the wire.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from autoscaler.policy.comeback import Stopping, StopTimes
from autoscaler.policy.forecast import ForecastMemory
from autoscaler.policy.ladder import Rung, Stakes
from autoscaler.policy.poolrest import RestMemory
from autoscaler.policy.usual import UsualMemory


class ReplicaPhase(StrEnum):
    """Phases of a replica that still counts; one that stopped or failed is not observed."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"  # ordered to; takes no place, serves nobody, and wakes in a moment
    WAKING = "waking"
    DRAINING = "draining"


class MachineState(StrEnum):
    """States of a machine that still exists."""

    PENDING = "pending"
    ENROLLED = "enrolled"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One live replica. `used`, `slots_now` and `beat_seq` are None when Redis could not be asked.

    slots: what its engine batches; slots_now: what it is given at present to keep its promise on latency.
    """

    id: str
    machine_id: str
    phase: ReplicaPhase
    created_at_s: float
    phase_at_s: float  # when it entered this phase
    slots: int
    used: int | None = None
    slots_now: int | None = None
    beat_seq: int | None = None
    n_requests_total: int = 0  # as its heartbeat counts
    outdated: bool = False  # runs another model or engine profile than the deployment now wants
    canary: bool = False  # runs what a rollout tries out: beside the wanted number, and no part of it


@dataclass(frozen=True, slots=True)
class MachineView:
    """One machine of the pool. `n_free` replicas (of any deployment) still fit on it."""

    id: str
    state: MachineState
    n_free: int
    n_replicas: int
    created_at_s: float
    empty_since_s: float | None = None  # since when no replica lives on it
    ends_at_s: float | None = None  # its provider takes it away then
    leaves_because: str = ""  # where it is not its provider who takes it away
    ready_at_s: float | None = None  # since when its agent takes replicas
    n_beds: int = 0  # replicas that may yet sleep on it
    # Whether it holds the weights that this deployment would start, and would send them to a sibling; bytes that its
    # links have yet to carry for others.
    in_ram: bool = False
    on_disk: bool = False
    sends: bool = False
    resumes: bool = False  # it was stopped, and is being started again
    # Of the reserve of stopped machines, even while it serves: it takes no place of the pool.
    in_reserve: bool = False
    nic_bytes: float = 0.0
    disk_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Loading:
    """What it takes to load a deployment's weights: their size, bytes a second as measured, and the rest of a start."""

    size_bytes: int
    ram_bps: float
    disk_bps: float
    nic_bps: float
    store_bps: float
    store_bytes: float = 0.0  # that the object store is sending already
    init_s: float = 0.0
    boot_s: float = 0.0  # of a machine that was ordered a moment ago


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica or a machine that did not come up, or died. `ready_s` is how long it had served before."""

    subject_id: str
    at_s: float
    code: str
    message: str
    ready_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """One deployment and the pool it may use, at one instant.

    machines: those its replicas live on, and the first candidates for new ones (policy/pool.py).
    n_queued: requests in the fair queue; None when Redis could not be asked.
    n_machines: machines of the whole pool, whoever uses them; those that are being taken away do not count.
    failures: replicas of the present generation, bounded, oldest first; those before `last_good_at_s`, when
    one had served for `proven_s`, do not count. machine_failures, last_machine_good_at_s: the same of
    the pool.
    """

    now_s: float
    deployment_id: str
    n_queued: int | None
    replicas: tuple[ReplicaView, ...] = ()
    machines: tuple[MachineView, ...] = ()
    n_machines: int = 0
    failures: tuple[Failure, ...] = ()
    last_good_at_s: float | None = None
    machine_failures: tuple[Failure, ...] = ()
    last_machine_good_at_s: float | None = None
    last_request_at_s: float | None = None
    # Machines of the pool that are stopped and may be started again, by id.
    stopped: tuple[str, ...] = ()
    # Those that are still being stopped, and what stops, starts and boots take.
    stopping: tuple[Stopping, ...] = ()
    stop_times: StopTimes = field(default_factory=StopTimes)
    # None: nothing to load, or not known how much.
    loading: Loading | None = None
    # Why no machine may be bought for this tenant now ('' = one may).
    quota: str = ""
    # Why it may have fewer replicas than its owner allows: its money (autoscaler/means.py; '' = it may have all).
    means: str = ""


@dataclass(frozen=True, slots=True)
class ScalerSpec:
    """What the owner asked for and how the house scales. Defaults next to their reasons."""

    generation: int
    min_replicas: int
    max_replicas: int
    idle_timeout_s: float
    slots: int  # requests a replica runs at once
    deleted: bool = False
    n_canary: int = 0  # replicas of what a rollout tries out, while the deployment serves
    # Its owner is suspended since then: nothing new is started, and after the grace nothing is kept.
    suspended_at_s: float | None = None
    suspension_grace_s: float = 300.0

    # However far latency shrinks the slots of replicas, scaling reckons with this share of the profile's at least: what
    # slows them may be the host they share, and more of them would slow them further.
    min_slots_ratio: float = 0.25
    target_ratio: float = 0.7  # share of slots to be busy; the rest absorbs what comes during a start
    stable_window_s: float = 60.0  # Knative's default
    panic_window_s: float = 6.0  # 10 % of it
    panic_ratio: float = 2.0  # panic when the short window wants this many times what is ready
    scale_down_delay_s: float = 30.0  # wants the highest wish of this long before it shrinks
    # Looks as far ahead as a start takes (0: not at all), and keeps room for so many deviations of what it foretells.
    # Once that has proven itself, load seen now needs no reserve of its own beyond `proven_ratio`. No deviations: what
    # is usual keeps the room.
    lead_s: float = 0.0
    n_deviations: float = 0.0
    proven_ratio: float = 0.95
    # Keeps room for the load that is exceeded in 1 - usual_share of the time and so many deviations (square roots)
    # more, as far as the last usual_s show it (0: not at all), and gives a replica up only when spare_ratio of it is
    # free beyond that. Tuned on the first days of ServeGen m-mid (`manage.py study scaling`).
    usual_s: float = 0.0
    usual_share: float = 0.8
    usual_deviations: float = 1.6
    spare_ratio: float = 0.6
    # A tick comes every 5 s at the latest, so a beat unchanged between two of them is this old.
    beat_stale_s: float = 4.0
    start_timeout_s: float = 300.0  # weights of some GB from a cold disk
    machine_timeout_s: float = 300.0  # a replica waits this long for a machine that does not come up
    drain_timeout_s: float = 120.0
    # What a machine under notice runs moves on so long before its end, replaced or not: 10 s for short requests to
    # finish, 5 s to hand the rest back, 5 s to spare.
    hand_over_s: float = 20.0
    max_failures: int = 5
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    cooldown_s: float = 300.0  # after max_failures: one more attempt per cool-down
    proven_s: float = 30.0  # a replica that served this long clears the failures before it
    max_machines: int = 1
    # Rungs between serving and nothing that a replica may rest on when the idle timeout is over, at their prices of now
    # (none: it ends), and what a request that waits is worth.
    rungs: tuple[Rung, ...] = ()
    stakes: Stakes | None = None
    no_room_patience_s: float = 20.0  # clients wait this long for room before they are told there is none

    def __post_init__(self) -> None:
        for knob, value, low, high in (
            ("min_replicas", self.min_replicas, 0, 10_000),
            ("max_replicas", self.max_replicas, max(self.min_replicas, 0), 10_000),
            ("slots", self.slots, 1, 100_000),
            ("target_ratio", self.target_ratio, 0.01, 1.0),
            ("proven_ratio", self.proven_ratio, 0.01, 1.0),
            ("lead_s", self.lead_s, 0, 3600),
            ("n_deviations", self.n_deviations, 0, 10),
            ("usual_s", self.usual_s, 0, 7 * 86400),
            ("usual_share", self.usual_share, 0.01, 1.0),
            ("usual_deviations", self.usual_deviations, 0, 10),
            ("spare_ratio", self.spare_ratio, 0, 1),
            ("idle_timeout_s", self.idle_timeout_s, 0, 1e9),
            ("max_failures", self.max_failures, 1, 1000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{knob} = {value} is out of range; allowed: {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Sample:
    """Load at one instant in requests: what we are sure of, and what it may be; what was wanted then; and the slots
    of one replica (0: as the spec says).
    """

    at_s: float
    known: float
    possible: float
    wanted: int
    slots: float = 0.0


@dataclass(frozen=True, slots=True)
class Beat:
    """A replica's last heartbeat number and since when it has been this one, on our clock."""

    replica_id: str
    seq: int
    since_s: float


@dataclass(frozen=True, slots=True)
class ScalerMemory:
    """What one tick leaves to the next. Bounded: samples by the windows, beats by the replicas.

    born_at_s and n_commands make command ids: unique as long as either differs.
    """

    born_at_s: float = 0.0
    n_commands: int = 0
    samples: tuple[Sample, ...] = ()
    beats: tuple[Beat, ...] = ()
    panic_until_s: float | None = None
    panic_wanted: int = 0
    last_busy_at_s: float | None = None
    n_requests_total: int = 0
    no_room_since_s: float | None = None
    # Machines that are being stopped, and are started instead of buying as soon as they can be.
    awaited: tuple[str, ...] = ()
    forecast: ForecastMemory | None = None
    usual: UsualMemory | None = None
    rest: RestMemory | None = None


@dataclass(frozen=True, slots=True)
class LaunchMachine:
    """Buy one machine. `n_replicas` found no room: what it would hold beyond them is no gain."""

    KIND: ClassVar[str] = "launch_machine"
    command_id: str
    n_replicas: int = 1


@dataclass(frozen=True, slots=True)
class StartMachine:
    """Start a machine that was stopped: sooner there than a new one, with its disk."""

    KIND: ClassVar[str] = "start_machine"
    command_id: str
    machine_id: str


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start one replica on a machine that has room."""

    KIND: ClassVar[str] = "start_replica"
    command_id: str
    machine_id: str
    canary: bool = False  # of what a rollout tries out
    # Where its weights should come from (policy/startup.py: Tier; '': not weighed), and in how long it should serve.
    source: str = ""
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """Give it nothing new; it finishes what it runs, then stops."""

    KIND: ClassVar[str] = "drain_replica"
    command_id: str
    replica_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopReplica:
    """End it now; what it runs resumes elsewhere. With a `failure_code` it counts as a failed start."""

    KIND: ClassVar[str] = "stop_replica"
    command_id: str
    replica_id: str
    reason: str
    failure_code: str = ""


@dataclass(frozen=True, slots=True)
class SleepReplica:
    """Give it nothing new; when it is done it frees the accelerator's memory, and keeps its process and its weights."""

    KIND: ClassVar[str] = "sleep_replica"
    command_id: str
    replica_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class WakeReplica:
    """Have a sleeping replica serve again."""

    KIND: ClassVar[str] = "wake_replica"
    command_id: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class TerminateMachine:
    """Give a machine back. Ordered for the pool (reconcile), never for one deployment."""

    KIND: ClassVar[str] = "terminate_machine"
    command_id: str
    machine_id: str
    reason: str


Command = (
    LaunchMachine
    | StartMachine
    | StartReplica
    | DrainReplica
    | StopReplica
    | SleepReplica
    | WakeReplica
    | TerminateMachine
)
COMMANDS: tuple[type[Command], ...] = (
    LaunchMachine,
    StartMachine,
    StartReplica,
    DrainReplica,
    StopReplica,
    SleepReplica,
    WakeReplica,
    TerminateMachine,
)


class DeploymentPhase(StrEnum):
    """Where a deployment stands, as its owner sees it."""

    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    DELETED = "deleted"


class StageName(StrEnum):
    """What waiting clients are told."""

    WAKING = "waking"
    LAUNCHING_MACHINE = "launching_machine"
    STARTING_MACHINE = "starting_machine"  # one that was stopped
    STARTING_REPLICA = "starting_replica"
    LOADING_MODEL = "loading_model"
    WAKING_REPLICA = "waking_replica"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Status:
    """The decision in the owner's and the waiting client's words. `stage` None: nobody has to wait."""

    phase: DeploymentPhase
    last_error: str = ""
    stage: StageName | None = None
    stage_since_s: float | None = None
    code: str = ""
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Answer of `decide`: orders, what to remember, why (one sentence each, with numbers), and the status."""

    commands: tuple[Command, ...]
    memory: ScalerMemory
    reasons: tuple[str, ...]
    wanted: int
    status: Status


@dataclass(frozen=True, slots=True)
class Wish:
    """How many replicas the load wants, before room and failures are considered."""

    n: int
    memory: ScalerMemory
    reasons: tuple[str, ...] = ()
