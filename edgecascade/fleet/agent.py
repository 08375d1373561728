# SPDX-License-Identifier: Apache-2.0
"""A device's agent: hears orders, keeps the service on the right bundle, says how it stands.

    broker, stick --> intake --> executor (updater) --> host: downloads, trials, the service
                                      |
    broker <---- reports, standing ---+

One thread decides and writes state; what blocks has threads of its own and comes back through the
inbox. The agent may be killed anywhere: it goes on from the device's folder, and the service, which
ends with it, is started again on the bundle that the state names.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from edgecascade.device.facts import facts
from edgecascade.errors import InvalidRequest, NetworkError
from edgecascade.files import replace_file
from edgecascade.fleet import events as ev
from edgecascade.fleet import stick
from edgecascade.fleet.executor import Answer, Executor
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.host import DeviceHost
from edgecascade.fleet.identity import own_key
from edgecascade.fleet.intake import (
    NOT_YET,
    Held,
    Intake,
    Offer,
    Refusal,
    Result,
    Skipped,
    said_order,
)
from edgecascade.fleet.jobs import Job, first_to_forget
from edgecascade.fleet.line import Line
from edgecascade.fleet.locked import lock_within
from edgecascade.fleet.orders import MAX_ENVELOPE_BYTES
from edgecascade.fleet.refresh import (
    MAX_ROOT_BYTES,
    TRUST_ROOT,
    Fetch,
    Trust,
    check_root,
    folder_fetch,
)
from edgecascade.fleet.relay import SCHEME, MqttSource
from edgecascade.fleet.release import Release
from edgecascade.fleet.settings import AgentSettings, foreign_config
from edgecascade.fleet.sources import Patience, Source, SourceFault, read_file, source_of
from edgecascade.fleet.standing import Refused, Standing
from edgecascade.fleet.state import MAX_VERDICTS, DeviceState, Slot
from edgecascade.fleet.stick import Outcome
from edgecascade.service import units
from edgecascade.service.service import next_boot
from edgecascade.version import package_version

log = logging.getLogger(__name__)

TICK_S = 30.0  # windows open and orders expire without a message
TURN_S = 1.0
STATUS_S = 1.0
PROGRESS_STEP = 0.05  # of a download, between two reports
LOCK_S = 0.5  # `agent status` may be looking
MAX_INBOX = 1000


class Agent:
    """`run` blocks until `stop`, which a signal handler may call."""

    def __init__(
        self,
        settings: AgentSettings,
        *,
        patience: Patience = Patience(),  # noqa: B008  frozen
    ) -> None:
        self._settings = settings
        self._root = settings.folder
        self._lock = own(self._root)
        self._boot = next_boot(self._root / "service", settings.name)
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue(MAX_INBOX)
        self._jobs: dict[str, Job] = {}
        self._status_at = self._wake_at = self._tick_at = 0.0
        self._refusal: Refusal | None = None
        self.outcomes: dict[str, Outcome] = {}  # of the latest stick's orders
        self._offered: dict[str, Offer] = {}  # those of them that may be obeyed
        self._stopping = False
        self._line: Line | None = None
        self._root_json = trusted_root(self._root, settings.trust)
        self._patience = patience
        trusts = [self._trust_in(address) for address in settings.repository]
        self._clock = trusts[0] if trusts else self._trust_in(str(self._root))
        self._proven = self._clock.now(time.time())
        files = RealFiles(self._root)
        self._host = DeviceHost(
            settings, self, self._release_of, self._source, self._changed, patience
        )
        self._executor = Executor(files, self._host, spawn=self._spawn)
        self._intake = Intake(
            trusts,
            self._trust_in,
            settings.device_id,
            settings.groups,
            self._judge,
            lambda result: self._post(partial(self._taken, result)),
            settings.refresh_s,
        )
        key = own_key(self._root)
        if settings.mqtt:
            self._line = Line(settings, self._standing, self._intake.put, key.signer)

    def stop(self) -> None:
        """Make `run` end. No lock is taken: a signal handler may call this."""
        self._stopping = True

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Work until stop(), or until `until` says so.

        Raises:
            NetworkError: when another client took the agent's name at the broker.
        """
        try:
            self._executor.boot()
            self._intake.start()
            if self._line is not None:
                self._line.start()
            self._loop(until)
        finally:
            self._intake.close()
            self._host.close()
            if self._line is not None:
                self._line.close()
            self._lock.close()

    def install(self, folder: str) -> None:
        """Take the orders of a published folder for this device's groups, if it has any."""
        self.outcomes, self._offered = {}, {}
        for done in [name for name in self._host.sticks if self.state.verdict(name) is not None]:
            del self._host.sticks[done]
        for group in self._settings.groups:
            path = f"orders/{group}.json"
            try:
                data = folder_fetch(folder)(path, MAX_ENVELOPE_BYTES)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                self.outcomes[path] = Outcome(True, f"{folder}/{path} cannot be read: {error}")
                continue
            said = said_order(data)
            self.outcomes["" if said is None else said.order] = Outcome()
            self._intake.put(data, folder)
        if not self.outcomes:
            self.outcomes[folder] = Outcome(True, stick.no_order(folder, self._settings.groups))
        stick.answer(self._root, self.outcomes)

    @property
    def state(self) -> DeviceState:
        """What the device has, and what became of orders."""
        return self._executor.state

    def _loop(self, until: Callable[[], bool]) -> None:
        period_s, alive_at, told = units.watchdog_period_s(), 0.0, False
        while not self._stopping and not until():
            told = told or units.notify("READY=1")
            now = time.monotonic()
            wake_s = self._wake_at - self.now() if self._wake_at else TURN_S
            with contextlib.suppress(queue.Empty):
                self._inbox.get(timeout=max(0.01, min(TURN_S, wake_s)))()
            if self._line is not None and self._line.fatal:
                raise NetworkError(self._line.fatal)
            turns = self._line is None or self._line.alive
            if period_s is not None and now >= alive_at and turns:
                units.notify("WATCHDOG=1")
                alive_at = now + period_s
            self._periodic()

    def _periodic(self) -> None:
        if (self._wake_at and self.now() >= self._wake_at) or time.monotonic() >= self._tick_at:
            self._wake_at, self._tick_at = 0.0, time.monotonic() + TICK_S
            self._executor.tick()
        self._requested()
        self._follow()
        if time.monotonic() >= self._status_at:
            self._status_at = time.monotonic() + STATUS_S
            if self._line is not None:
                self._line.tell_standing()

    def _post(self, work: Callable[[], None]) -> None:
        self._inbox.put(work)

    def _spawn(self, work: Callable[[], Answer]) -> None:
        self._host.spawn(work, lambda answer: self._post(partial(self._executor.post, answer)))

    def _changed(self) -> None:
        # On the child's thread. The loop looks by itself; a full inbox loses nothing.
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(lambda: None)

    def _requested(self) -> None:
        try:
            folder = stick.take(self._root)
        except OSError as error:
            log.error("a request to install cannot be read: %s", error)
            why = f"the agent cannot read the request: {error}; give the command as its user"
            self.outcomes, self._offered = {stick.REQUEST: Outcome(True, why)}, {}
            stick.answer(self._root, self.outcomes)
            return
        if folder is not None:
            self.install(folder)

    def _taken(self, result: Result) -> None:
        match result:
            case Offer(order, document, refusal, source):
                if source and order.action == "install" and not refusal:
                    self._host.sticks[order.order] = source
                self._refusal = None
                self._executor.offer(order, document, refusal)
                if source and order.order in self.outcomes:
                    self._offered[order.order] = result
            case Skipped(order, source):
                text = f"order {order.order!r} is not for {self._settings.device_id}"
                self._answer(source, order.order, Outcome(True, text))
            case Held(order, reason, message, source):
                waits = f"order {order.order!r} waits: {message}"
                self._answer(source, order.order, Outcome(False, waits))
                if not self._known(order.order):
                    evidence = {"reason": reason, "message": message}
                    held = ev.Report(order.order, order.seq, "QUEUED", evidence=evidence)
                    self.report(replace(held, group=order.group, release=order.release_sha256))
            case Refusal(name, seq, reason, message, source, group):
                self._refusal = result
                self._answer(source, name, Outcome(True, f"order {name!r} is refused: {message}"))
                if name and reason not in NOT_YET and not self._known(name):
                    evidence = {"reason": reason, "message": message}
                    # It names no release: anybody may have written this order.
                    self.report(ev.Report(name, seq, "REJECTED", group=group, evidence=evidence))

    def _follow(self) -> None:
        """Say what the orders of the latest stick have come to meanwhile."""
        for name, offer in self._offered.items():
            pending, trouble = self._executor.pending(name), self._executor.trouble
            now = stick.outcome(offer.order, self.state, pending=pending, trouble=trouble)
            self._answer(offer.source, name, now)

    def _answer(self, source: str, order: str, outcome: Outcome) -> None:
        """Say what an order has come to, if it is of the latest stick and that is news."""
        if source and self.outcomes.get(order, outcome) != outcome:
            self.outcomes[order] = outcome
            stick.answer(self._root, self.outcomes)

    def _known(self, order: str) -> bool:
        """Whether the device has a state of its own for an order of this name."""
        state = self._executor.state
        current = state.update is not None and state.update.order.order == order
        return current or state.verdict(order) is not None

    def _judge(self, release: Release) -> str:
        """Why a release is nothing for this device, or nothing."""
        known = facts()
        total = known.memory.total_bytes
        missing = release.requires.unmet(
            chip=known.identity.chip,
            jetpack=known.identity.jetpack,
            memory_mb=total >> 20 if total else None,
            agent=package_version(),
        )
        foreign = foreign_config(release.config)
        return "; ".join([*missing, foreign] if foreign else missing)

    def _trust_in(self, address: str) -> Trust:
        folder = ":" not in address
        fetch = (
            folder_fetch(address) if folder else fetch_from(self._source(address), self._patience)
        )
        return Trust(self._root, self._root_json, fetch)

    def _source(self, place: str) -> Source:
        if place.startswith(SCHEME):
            return MqttSource(self, place)
        return source_of(place, patience=self._patience, redirects=self._settings.redirects)

    def exchange(self, name: str, question: bytes, timeout_s: float) -> bytes | None:
        """See relay.Asker."""
        return None if self._line is None else self._line.exchange(name, question, timeout_s)

    def _release_of(self, slot: Slot) -> Release:
        return self._executor.store.release(slot.release)

    def now(self) -> float:
        """Seconds since 1970, never before what is proven."""
        with contextlib.suppress(OSError):  # a disk that fails now and then stops no clock
            self._proven = self._clock.now(time.time())
        return max(self._proven.time, time.time())

    def wake(self, at: float) -> None:
        """See executor.Host."""
        self._wake_at = min(self._wake_at or at, at)

    def progress(self, order: str, share: float) -> None:
        """So much of a download is done; from any thread."""
        job = self._jobs.get(order)
        if job is not None and abs(share - job.progress) >= PROGRESS_STEP:
            with contextlib.suppress(queue.Full):
                self._inbox.put_nowait(partial(self._progressed, order, share))

    def _progressed(self, order: str, share: float) -> None:
        job = self._jobs.get(order)
        if job is not None and job.phase == "downloading" and job.progress != share:
            self._tell(replace(job, progress=round(share, 3), **self._stamp(job)))

    def ask(self, messages: tuple[Mapping[str, Any], ...], timeout_s: float) -> dict[str, Any]:
        """See host.Voice."""
        if self._line is None:
            return {"unasked": "no broker is configured"}
        return self._line.ask(messages, timeout_s)

    def report(self, report: ev.Report, revision: int = 0) -> None:
        """See executor.Host; what the executor does not know of has no revision."""
        before = self._jobs.get(report.order)
        job = Job(
            report.order,
            report.seq,
            self._settings.device_id,
            report.state,
            report.phase,
            group=report.group,
            release=report.release,
            progress=1.0 if report.state == "SUCCEEDED" else 0.0,
            bundle_from=report.bundle_from,
            bundle_to=report.bundle_to,
            evidence=dict(report.evidence),
        )
        self._tell(replace(job, **self._stamp(before, revision)))

    def _stamp(self, before: Job | None, revision: int = 0) -> dict[str, Any]:
        now = self.now()
        least = before.version + 1 if before is not None else 1
        return {"version": max(least, revision * 1000, int(now * 1000)), "ts": round(now, 3)}

    def _tell(self, job: Job) -> None:
        log.info("%s: %s %s %s", job.order, job.state, job.phase, dict(job.evidence))
        self._jobs.pop(job.order, None)
        self._jobs[job.order] = job
        while len(self._jobs) > MAX_VERDICTS + 1:
            del self._jobs[first_to_forget(self._jobs)]
        if self._line is not None:
            self._line.tell(job)

    def _standing(self, *, leaving: bool = False) -> Standing:
        active, update = self._executor.state.active, self._executor.state.update
        system = time.time()
        now, refusal = self.now(), self._refusal
        return Standing(
            self._settings.device_id,
            self._boot,
            "offline" if leaving else "updating" if update else "online",
            ts=round(now, 3),
            bundle=f"{active.name} {active.version}" if active else "",
            manifest=active.manifest if active else "",
            order=update.order.order if update else "",
            phase=update.phase.value if update else "",
            service=self._service_word(),
            update_stale=self._intake.is_stale(system),
            fresh_until=self._intake.fresh_until,
            repository=self._intake.outlook.message,
            clock_suspect=self._proven.suspect,
            refused=None
            if refusal is None
            else Refused(refusal.order, refusal.reason, refusal.message),
        )

    def _service_word(self) -> str:
        state = self._host.child.state
        if state.ready_at is not None:
            return "up"
        return "starting" if state.pid is not None else "down"


def own(root: Path) -> IO[bytes]:
    """Take a device's folder for this process alone, until the file is closed.

    Raises:
        InvalidRequest: when another agent has it, or it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / "lock", "ab")  # noqa: SIM115  held as long as the agent runs
        if lock_within(lock, LOCK_S):
            return lock
    except OSError as error:
        raise InvalidRequest(f"root {str(root)!r} cannot be written: {error.strerror}") from error
    lock.close()
    raise InvalidRequest(f"another agent works in {root}")


def trusted_root(folder: Path, given: str | None) -> bytes:
    """The root.json that all trust begins with: kept at the first start, and never replaced.

    One that was damaged since keeps no service from starting: each refresh says so.

    Raises:
        InvalidRequest: when there is none.
        UpdateRefused: when what is given is none.
    """
    kept = folder / TRUST_ROOT
    if kept.exists():
        return kept.read_bytes()
    if given is None:
        raise InvalidRequest("trust is missing; give the repository's root.json, once")
    with open(given, "rb") as source:
        data = source.read(MAX_ROOT_BYTES + 1)
    check_root(data, given)
    replace_file(kept, data)
    return data


def fetch_from(source: Source, patience: Patience) -> Fetch:
    """Metadata and small documents of a repository."""

    def fetch(path: str, limit: int) -> bytes:
        try:
            return read_file(source, path, limit + 1, patience)
        except SourceFault as fault:
            if fault.reason == "absent":
                raise FileNotFoundError(path) from fault
            raise NetworkError(f"{source.name}{path}: {fault}") from fault

    return fetch
