# SPDX-License-Identifier: Apache-2.0
"""The controller of a rollout: how wide the order may be, given what the devices report.

Pure. `step` maps (plan, progress, what was heard, time) to progress, and the order that is retained
at the broker is a function of plan and progress alone, so a controller that is killed anywhere says
the same again when it comes back.

    running -> first device -> 1 % -> 5 % -> 25 % -> 100 % -> done
       |          next: 95 % of the stage's devices succeeded and the soak passed
       +-- paused     by the operator, or by a stage that can no longer reach its share
       +-- aborted    failed >= max(2, 5 %), a device lost on trial, or nobody succeeded
       +-- rolled-back  by the operator, from any of them

A stage is a share of the devices that the operator enrolled, and only what they signed widens it.
Who is there chooses the first device and says whom to wait for. A silent device is no failure, but
no success either: whoever owns the broker could silence those that failed. One order id serves the
whole rollout; every change of it is a higher sequence number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from edgecascade.errors import InvalidRequest
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.standing import Standing
from edgecascade.fleet.state import ON_TRIAL

Trouble = Literal["", "silent", "stale", "undated"]
State = Literal["running", "paused", "aborted", "rolled-back", "done"]
STATES: tuple[State, ...] = get_args(State)
FIRST = 0.0  # the stage of one device
STAGES = (FIRST, 1.0, 5.0, 25.0, 100.0)
# Silence in one of these phases means that the new bundle took the device down.
RISKY = frozenset(phase.value for phase in ON_TRIAL)
# Why a device that believes the order cannot have the bundle, as it finds by itself. All other
# reasons can be brought about by whoever owns the broker or the mirror.
UNFIT = frozenset({"requirements", "disk-full", "downgrade"})
SILENT = "silent"
MAX_VALID_S = 3653 * 86_400.0  # an order that is held back is as good as new for so long
# What an operator who resumes accepts, device by device, until it does something else.
ACCEPTABLE = frozenset({SILENT, "failed", "lost", "rejected", "canceled"})


@dataclass(frozen=True)
class Thresholds:
    """When a stage passes and when the rollout ends.

    `success` is a share of the stage's devices, `failed` of those that can be judged.
    """

    success: float = 0.95
    failed: float = 0.05
    failed_min: int = 2
    lost: int = 1
    lost_s: float = 900.0
    soak_s: float = 300.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("success", 0.5, 1.0),
            ("failed", 0.0, 1.0),
            ("failed_min", 1, 1_000_000),
            ("lost", 1, 1_000_000),
            ("lost_s", 1.0, 86_400.0),
            ("soak_s", 0.0, 30 * 86_400.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidRequest(f"{name} is {value:g}; it must be in [{low:g}, {high:g}]")


@dataclass(frozen=True)
class Plan:
    """What the operator asked for; it does not change while the rollout runs.

    `bytes` is what one device has to fetch at most, `egress_kbit_s` what all mirrors together give.
    """

    order: str
    stages: tuple[float, ...] = STAGES
    thresholds: Thresholds = field(default_factory=Thresholds)
    first: str | None = None
    bytes: int = 0
    egress_kbit_s: float | None = None
    valid_s: float = 7 * 86_400.0

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.stages, self.stages[1:], strict=False))
        if not (self.stages and rising and self.stages[0] >= 0 and self.stages[-1] <= 100):
            raise InvalidRequest(f"stages are {self.stages}; give rising percentages up to 100")
        if self.egress_kbit_s is not None and self.egress_kbit_s <= 0:
            raise InvalidRequest(f"egress is {self.egress_kbit_s:g} kbit/s; it must be above 0")
        if not 60 <= self.valid_s <= MAX_VALID_S:
            raise InvalidRequest(
                f"orders are valid for {self.valid_s:g} s; give a minute to ten years"
            )


@dataclass(frozen=True)
class Progress:
    """Where the rollout stands. `seq` grows whenever the order that is to be retained changes.

    `accepted` has the devices whose failure or silence the operator knows, by what it was: while
    that does not change they are not counted. `kbit_s` is each device's share of the egress in this
    stage.
    """

    seq: int
    stage: int = 0
    first: str = ""
    state: State = "running"
    reason: str = ""
    since: float = 0.0
    signed_at: float = 0.0
    good_since: float | None = None
    accepted: dict[str, str] = field(default_factory=dict)
    kbit_s: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing will change by itself any more."""
        return self.state != "running"


@dataclass(frozen=True)
class Seen:
    """What is known of an enrolled device: its place in cohorts, its last report and its last word
    on how it stands that were proven to be its own, with its present `key`.

    `online`: that word is not old, and the broker does not say that the device has gone. `heard` is
    when the report came in, by the controller's clock: a device's own may be wrong.
    """

    point: float
    online: bool = False
    standing: Standing | None = None
    job: Job | None = None
    heard: float = 0.0
    key: str = ""

    def trouble(self, now: float) -> Trouble:
        """What keeps a device's operator from knowing that all is well with it."""
        if not self.online or self.standing is None:
            return "silent"
        if self.standing.expired(now):
            return "stale"
        return "undated" if self.standing.clock_suspect else ""


Fleet = Mapping[str, Seen]


@dataclass(frozen=True)
class Tally:
    """The devices of a stage by what they did.

    `unfit` ones cannot have the bundle and say so themselves; `accepted` ones failed or were
    silent, and the operator has gone on without them.
    """

    members: int = 0
    silent: int = 0
    waiting: int = 0
    active: int = 0
    succeeded: int = 0
    failed: int = 0
    lost: int = 0
    rejected: int = 0
    canceled: int = 0
    unfit: int = 0
    accepted: int = 0

    @property
    def asked(self) -> int:
        """Devices of which a share must succeed: a report has to say so, silence does not."""
        return self.members - self.unfit - self.accepted

    @property
    def reachable(self) -> int:
        """Devices that did or can do what the order asks, as far as the broker shows."""
        return self.waiting + self.active + self.succeeded + self.failed + self.lost

    @property
    def settled(self) -> bool:
        """Whether nobody is on the way."""
        return not self.waiting and not self.active


def members(plan: Plan, progress: Progress, fleet: Fleet, stage: int | None = None) -> list[str]:
    """The devices an order of this stage concerns."""
    percent = plan.stages[progress.stage if stage is None else stage]
    return [name for name, seen in fleet.items() if seen.point < percent or name == progress.first]


def tally(plan: Plan, progress: Progress, fleet: Fleet, now: float) -> Tally:
    """Count the devices of the current stage."""
    fates = fates_of(plan, progress, fleet, now)
    counts = Counter(
        "accepted" if progress.accepted.get(name) == fate else fate for name, fate in fates.items()
    )
    return Tally(members=len(fates), **counts)


def fates_of(plan: Plan, progress: Progress, fleet: Fleet, now: float) -> dict[str, str]:
    """What each device of the current stage has come to."""
    lost_s = plan.thresholds.lost_s
    return {name: _fate(fleet[name], lost_s, now) for name in members(plan, progress, fleet)}


def _fate(seen: Seen, lost_s: float, now: float) -> str:
    job = seen.job
    if job is not None and job.ended:
        unfit = job.state == "REJECTED" and job.release and job.evidence.get("reason") in UNFIT
        return "unfit" if unfit else job.state.lower()
    if job is not None and job.phase in RISKY:
        return "lost" if now - seen.heard >= lost_s else "active"
    if not seen.online:
        return SILENT
    return "waiting" if job is None or job.state == "QUEUED" else "active"


def step(plan: Plan, progress: Progress, fleet: Fleet, now: float) -> Progress:
    """What is to be the case now. The same progress if nothing changes."""
    if progress.ended:
        return progress
    alone = plan.stages[progress.stage] == FIRST
    if not progress.first or (alone and progress.first not in fleet):
        return _begin(plan, progress, fleet, now)
    count = tally(plan, progress, fleet, now)
    if reason := too_bad(plan.thresholds, count):
        return _turn(progress, now, state="aborted", reason=reason)
    if not _passes(plan.thresholds, count):
        if count.settled and count.succeeded and not _may_pass(plan.thresholds, count):
            reason = f"{count.succeeded} of {count.asked} succeeded; resume accepts the others"
            return _turn(progress, now, state="paused", reason=reason)
        return _keep(plan, replace(progress, good_since=None), now)
    # A clock that was set back must not make the soak longer than it is.
    good_since = min(now, progress.good_since if progress.good_since is not None else now)
    if now - good_since < plan.thresholds.soak_s:
        return _keep(plan, replace(progress, good_since=good_since), now)
    return _widen(plan, replace(progress, good_since=good_since), fleet, count, now)


def too_bad(limits: Thresholds, count: Tally) -> str:
    """Why the rollout must end, or nothing."""
    failed = count.failed + count.lost
    if count.lost >= limits.lost:
        return f"{count.lost} of {count.reachable} lost on trial"
    most = max(limits.failed_min, limits.failed * count.reachable)
    if failed >= most:
        return f"{count.failed} of {count.reachable} failed"
    if count.members and count.settled and not count.succeeded and _judged(count):
        return f"nobody succeeded: {count.failed} failed, {count.rejected + count.unfit} rejected"
    return ""


def _judged(count: Tally) -> int:
    return count.failed + count.lost + count.rejected + count.canceled + count.unfit


def _passes(limits: Thresholds, count: Tally) -> bool:
    return count.succeeded > 0 and count.succeeded >= limits.success * count.asked


def _may_pass(limits: Thresholds, count: Tally) -> bool:
    """Whether the share would be reached if all who are silent succeeded."""
    return count.succeeded + count.silent >= limits.success * count.asked


def _begin(plan: Plan, progress: Progress, fleet: Fleet, now: float) -> Progress:
    """Choose the first device: the one that every later stage holds first, too."""
    if plan.first is not None:
        first = plan.first if plan.first in fleet else None
    else:
        online = [(seen.point, name) for name, seen in fleet.items() if seen.online]
        first = min(online)[1] if online else None
    if first is None:
        return progress
    begun = replace(progress, first=first)
    stage = 0 if plan.stages[0] == FIRST else _next_stage(plan, begun, fleet, -1)
    return _enter(plan, begun, fleet, stage, now)


def _widen(plan: Plan, progress: Progress, fleet: Fleet, count: Tally, now: float) -> Progress:
    if progress.stage + 1 < len(plan.stages):
        stage = _next_stage(plan, progress, fleet, progress.stage)
        return _enter(plan, progress, fleet, stage, now)
    late = now - progress.since >= 2 * stage_s(plan, count.members) + plan.thresholds.lost_s
    if count.settled or late:
        reason = f"{count.succeeded} of {count.members} succeeded"
        return _turn(progress, now, state="done", reason=reason)
    return _keep(plan, progress, now)


def _next_stage(plan: Plan, progress: Progress, fleet: Fleet, stage: int) -> int:
    """The next stage that holds a device more; in a small fleet 1 % is nobody."""
    held = len(members(plan, progress, fleet, stage)) if stage >= 0 else 0
    for later in range(stage + 1, len(plan.stages) - 1):
        if len(members(plan, progress, fleet, later)) > held:
            return later
    return len(plan.stages) - 1


def _enter(plan: Plan, progress: Progress, fleet: Fleet, stage: int, now: float) -> Progress:
    names = members(plan, progress, fleet, stage)
    fetching = sum(not _has_it(fleet.get(name)) for name in names)
    kbit_s = int(plan.egress_kbit_s / max(1, fetching)) if plan.egress_kbit_s else 0
    entered = replace(
        progress, stage=stage, good_since=None, kbit_s=max(kbit_s, bool(plan.egress_kbit_s))
    )
    return _turn(entered, now, state="running", reason="")


def _has_it(seen: Seen | None) -> bool:
    return seen is not None and seen.job is not None and seen.job.state == "SUCCEEDED"


def _turn(progress: Progress, now: float, *, state: State, reason: str) -> Progress:
    return replace(
        progress, seq=progress.seq + 1, state=state, reason=reason, since=now, signed_at=now
    )


def _keep(plan: Plan, progress: Progress, now: float) -> Progress:
    """Sign anew in good time, or devices that come late would find an expired order."""
    if now - progress.signed_at < plan.valid_s / 2:
        return progress
    return replace(progress, seq=progress.seq + 1, signed_at=now)


def at_least(progress: Progress, first_seq: int, now: float) -> Progress:
    """Within the epoch of the keys, in which sequence numbers begin at `first_seq`."""
    if progress.seq >= first_seq:
        return progress
    return replace(progress, seq=first_seq + int(now), signed_at=now)


def pause(progress: Progress, now: float) -> Progress:
    """Hold everything that has not been activated."""
    if progress.state not in ("running", "paused"):
        raise InvalidRequest(f"the rollout is {progress.state}; only a running one can be paused")
    return _said(progress, now, "paused")


def resume(plan: Plan, progress: Progress, fleet: Fleet, now: float) -> Progress:
    """Go on from where it was paused, without those that have failed or are silent."""
    if progress.state != "paused":
        raise InvalidRequest(f"the rollout is {progress.state}; only a paused one can be resumed")
    fates = fates_of(plan, progress, fleet, now)
    accepted = {name: fate for name, fate in fates.items() if fate in ACCEPTABLE}
    resumed = replace(progress, accepted=accepted, good_since=None)
    return _turn(resumed, now, state="running", reason="")


def abort(progress: Progress, now: float) -> Progress:
    """Nobody activates the new bundle any more; who has it keeps it."""
    if progress.state == "rolled-back":
        raise InvalidRequest("the rollout is rolled-back already")
    return _said(progress, now, "aborted")


def rollback(progress: Progress, now: float) -> Progress:
    """Who has the new bundle goes back to what it had."""
    return _said(progress, now, "rolled-back")


def _said(progress: Progress, now: float, state: State) -> Progress:
    # Again, too: a broker may have lost the order, and its signature runs out.
    reason = progress.reason if progress.state == state else "by the operator"
    return _turn(progress, now, state=state, reason=reason)


def going_back(fleet: Fleet) -> tuple[int, int]:
    """After a rollback: devices that have not said that they are off the new bundle.

    First those that the broker shows, then those that are silent and go back when they come. One
    that is queued has not begun, and what it waits for comes too late.
    """
    left = [
        seen.online
        for seen in fleet.values()
        if seen.job and (seen.job.state == "IN_PROGRESS" or _has_it(seen))
    ]
    return sum(left), len(left) - sum(left)


def stage_s(plan: Plan, devices: int) -> float:
    """How long so many devices take: the download at the egress given, then soak."""
    download = devices * plan.bytes * 8 / (plan.egress_kbit_s * 1000) if plan.egress_kbit_s else 0.0
    return download + plan.thresholds.soak_s
