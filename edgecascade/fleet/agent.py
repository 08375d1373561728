# SPDX-License-Identifier: Apache-2.0
"""A device's agent: hears orders, keeps the service on the right bundle, says how it stands.

    broker, stick --> intake --> executor (updater) --> host: downloads, trials, the service
                                      |
    broker <------ reports, status ---+

One thread decides and writes state; what blocks has threads of its own and comes back through the
inbox. The agent may be killed anywhere: it goes on from the device's folder, and the service, which
ends with it, is started again on the bundle that the state names.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import logging
import os
import queue
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from edgecascade.device.facts import facts
from edgecascade.errors import InvalidRequest, NetworkError
from edgecascade.files import write_file
from edgecascade.fleet import events as ev
from edgecascade.fleet.executor import Answer, Executor
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.host import DeviceHost
from edgecascade.fleet.intake import NOT_YET, Held, Intake, Offer, Refusal, Result
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.orders import MAX_ENVELOPE_BYTES
from edgecascade.fleet.refresh import MAX_ROOT_BYTES, Fetch, Trust, folder_fetch
from edgecascade.fleet.release import Release
from edgecascade.fleet.settings import AgentSettings, foreign_config
from edgecascade.fleet.sources import Patience, Source, SourceFault, read_file, source_of
from edgecascade.fleet.state import MAX_VERDICTS, Slot, Verdict
from edgecascade.service import units, wire
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Failed, Final, Outgoing, read_reply
from edgecascade.service.service import next_boot
from edgecascade.service.topics import Topics

log = logging.getLogger(__name__)

TICK_S = 30.0  # windows open and orders expire without a message
TURN_S = 1.0
STATUS_S = 1.0
PROGRESS_STEP = 0.05  # of a download, between two reports
RESEND_S = 2.0  # a question that was not answered
LAST_WORDS_S = 2.0
LOCK_S = 0.5
MAX_INBOX = 1000
MAX_PACKET_BYTES = 128 << 10
REQUEST = "install.request"  # what `agent install` leaves for a running agent
ANSWER = "install.answer"  # why that was not even tried
TRUST_ROOT = "root.json"


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
        self._topics = Topics(settings.prefix)
        self._boot = next_boot(self._root / "service", settings.name)
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue(MAX_INBOX)
        self._jobs: dict[str, Job] = {}
        self._told = b""
        self._status_at = self._wake_at = self._tick_at = 0.0
        self._refusal: Refusal | None = None
        self._pending: dict[str, queue.SimpleQueue[bytes]] = {}
        self._stopping = False
        self._root_json = trusted_root(self._root, settings.trust)
        self._patience = patience
        trusts = [self._trust_in(address) for address in settings.repository]
        self._clock = trusts[0] if trusts else self._trust_in(str(self._root))
        self._proven = self._clock.now(time.time())
        files = RealFiles(self._root)
        self._host = DeviceHost(settings, self, self._release_of, self._changed, patience)
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
        self._link = self._connection() if settings.mqtt else None

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
            if self._link is not None:
                self._link.start()
            self._loop(until)
        finally:
            self._intake.close()
            self._host.close()
            if self._link is not None:
                self._publish_status("offline")
                self._link.flush(LAST_WORDS_S)
                self._link.stop()
            self._lock.close()

    def install(self, folder: str) -> int:
        """Take the orders of a published folder; how many there were for this device's groups."""
        found = 0
        for group in self._settings.groups:
            path = Path(folder, "orders", f"{group}.json")
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as source:
                self._intake.put(source.read(MAX_ENVELOPE_BYTES + 1), folder)
                found += 1
        return found

    @property
    def refusal(self) -> str:
        """Why the last order that came was not obeyed; empty if it was."""
        return "" if self._refusal is None else self._refusal.message

    def verdict(self, order: str) -> Verdict | None:
        """What became of an order."""
        return self._executor.state.verdict(order)

    # ---- the loop -----------------------------------------------------------------------------

    def _loop(self, until: Callable[[], bool]) -> None:
        period_s, alive_at = units.watchdog_period_s(), 0.0
        units.notify("READY=1")
        while not self._stopping and not until():
            now = time.monotonic()
            wake_s = self._wake_at - self.now() if self._wake_at else TURN_S
            with contextlib.suppress(queue.Empty):
                self._inbox.get(timeout=max(0.01, min(TURN_S, wake_s)))()
            if self._link is not None and self._link.fatal:
                raise NetworkError(self._link.fatal)
            if period_s is not None and now >= alive_at:
                units.notify("WATCHDOG=1")
                alive_at = now + period_s
            self._periodic()

    def _periodic(self) -> None:
        if (self._wake_at and self.now() >= self._wake_at) or time.monotonic() >= self._tick_at:
            self._wake_at, self._tick_at = 0.0, time.monotonic() + TICK_S
            self._executor.tick()
        self._requested()
        if time.monotonic() >= self._status_at:
            self._status_at = time.monotonic() + STATUS_S
            self._publish_status()

    def _post(self, work: Callable[[], None]) -> None:
        self._inbox.put(work)

    def _spawn(self, work: Callable[[], Answer]) -> None:
        self._host.spawn(work, lambda answer: self._post(partial(self._executor.post, answer)))

    def _changed(self) -> None:
        # On the child's thread. The loop looks by itself; a full inbox loses nothing.
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(lambda: None)

    def _requested(self) -> None:
        path = self._root / REQUEST
        try:
            folder = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.error("%s: %s", path, error)
            folder = ""
        path.unlink(missing_ok=True)
        if folder:
            self.install(folder)

    # ---- orders -------------------------------------------------------------------------------

    def _taken(self, result: Result) -> None:
        match result:
            case Offer(order, document, refusal, source):
                if source:
                    self._host.sticks = {order.order: source}
                self._refusal = None
                self._executor.offer(order, document, refusal)
            case Held(order, reason, message):
                if not self._known(order.order):
                    evidence = {"reason": reason, "message": message}
                    self._report(ev.Report(order.order, order.seq, "QUEUED", evidence=evidence))
            case Refusal(name, seq, reason, message, source):
                self._refusal = result
                if source:
                    self._answer_request(f"order {name!r} is refused: {message}")
                if name and reason not in NOT_YET and not self._known(name):
                    evidence = {"reason": reason, "message": message}
                    self._report(ev.Report(name, seq, "REJECTED", evidence=evidence))

    def _answer_request(self, text: str) -> None:
        with contextlib.suppress(OSError):
            (self._root / ANSWER).write_text(text, encoding="utf-8")

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
            agent=importlib.metadata.version("edgecascade"),
        )
        foreign = foreign_config(release.config)
        return "; ".join([*missing, foreign] if foreign else missing)

    def _trust_in(self, address: str) -> Trust:
        if "://" not in address:
            return Trust(self._root, self._root_json, folder_fetch(address))
        source = source_of(address, patience=self._patience, redirects=self._settings.redirects)
        return Trust(self._root, self._root_json, fetch_from(source, self._patience))

    def _release_of(self, slot: Slot) -> Release:
        return self._executor.store.release(slot.release)

    # ---- what the host asks of us -------------------------------------------------------------

    def now(self) -> float:
        """Seconds since 1970, never before what is proven."""
        with contextlib.suppress(OSError):  # a disk that fails now and then stops no clock
            self._proven = self._clock.now(time.time())
        return max(self._proven.time, time.time())

    def wake(self, at: float) -> None:
        """See executor.Host."""
        self._wake_at = min(self._wake_at or at, at)

    def report(self, report: ev.Report, revision: int) -> None:
        """See executor.Host."""
        self._report(report, revision)

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
        """Ask the service as a client; blocks. Which bundle answered, or why it was not asked."""
        if self._link is None or not self._link.up:
            return {"unasked": "the agent is not connected to a broker"}
        name, device = secrets.token_hex(8), self._settings.device_id
        body = {"id": name, "messages": list(messages), "max_completion_tokens": 8,
                "temperature": 0, "timeout_s": timeout_s}  # fmt: skip
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._pending[name] = answers
        began = time.monotonic()
        said = "no answer"
        try:
            while time.monotonic() - began < timeout_s:
                topic = self._topics.chat(device, self._settings.name)
                self._link.publish(Outgoing(topic, wire.encode(body)))
                with contextlib.suppress(queue.Empty):
                    reply = read_reply(answers.get(timeout=RESEND_S))
                    if isinstance(reply, Final):
                        taken_s = round(time.monotonic() - began, 3)
                        return {"bundle": reply.body.get("bundle"), "answered_s": taken_s}
                    if isinstance(reply, Failed):
                        said = reply.problem.code
                        if 400 <= reply.problem.status < 500 and reply.problem.status != 429:
                            return {"answered": said}  # it is there, and not for us
        finally:
            del self._pending[name]
        if not self._link.up:
            return {"unasked": "the connection to the broker was lost"}
        return {"reason": "no-answer", "message": f"{said} within {timeout_s:g} s"}

    # ---- messages -----------------------------------------------------------------------------

    def _connection(self) -> Link:
        settings, name = self._settings, self._settings.name
        filters = self._topics.agent_filters(name, settings.groups)
        return Link(
            LinkOptions(
                settings.address(),
                name,
                (*filters, self._topics.reply(name, settings.device_id, "+")),
                will=self._status("offline"),
                session_expiry_s=settings.session_expiry_s,
                max_packet_bytes=MAX_PACKET_BYTES,
            ),
            self._received,
            births=self._births,
        )

    def _received(self, message: Incoming) -> None:
        # On the network thread.
        address = self._topics.parse(message.topic)
        if address is None:
            return
        if address.kind in ("announce", "command") and message.payload:
            if len(message.payload) <= MAX_ENVELOPE_BYTES:
                self._intake.put(message.payload)
        elif address.kind == "reply" and address.request in self._pending:
            self._pending[address.request].put(message.payload)

    def _births(self) -> list[Outgoing]:
        # On the network thread, at every connection: what was retained may be gone.
        jobs = [self._retained(job) for job in list(self._jobs.values())]
        return [self._status(), *jobs]

    def _retained(self, job: Job) -> Outgoing:
        topic = self._topics.job(self._settings.name, job.order)
        return Outgoing(topic, job.to_bytes(), retain=True)

    def _report(self, report: ev.Report, revision: int = 0) -> None:
        before = self._jobs.get(report.order)
        job = Job(
            report.order,
            report.seq,
            self._settings.device_id,
            report.state,
            report.phase,
            progress=1.0 if report.state == "SUCCEEDED" else 0.0,
            bundle_from=report.bundle_from,
            bundle_to=report.bundle_to,
            evidence=report.evidence,
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
        self._send(self._retained(job))
        while len(self._jobs) > MAX_VERDICTS + 1:
            oldest = next(iter(self._jobs))
            del self._jobs[oldest]
            topic = self._topics.job(self._settings.name, oldest)
            self._send(Outgoing(topic, b"", retain=True))

    def _send(self, message: Outgoing) -> None:
        if self._link is not None and self._link.up:  # else the births say it
            self._link.publish(message)

    def _status(self, word: str = "") -> Outgoing:
        topic = self._topics.status(self._settings.name)
        return Outgoing(topic, wire.encode(self._standing(word)), retain=True)

    def _standing(self, word: str = "", ts: int | None = None) -> dict[str, Any]:
        """What the retained status says. `accepts` is for clients: an agent answers no request."""
        active, update = self._executor.state.active, self._executor.state.update
        system = time.time()
        self.now()
        refusal = self._refusal
        return {
            "kind": "agent",
            "status": word or ("updating" if update else "online"),
            "boot": self._boot,
            "accepts": False,
            "device": self._settings.device_id,
            "groups": list(self._settings.groups),
            "bundle": f"{active.name} {active.version}" if active else "",
            "manifest": active.manifest if active else "",
            "order": update.order.order if update else "",
            "phase": update.phase.value if update else "",
            "service": self._service_word(),
            "update_stale": self._intake.is_stale(system),
            "repository": self._intake.outlook.message,
            "clock_suspect": self._proven.suspect,
            "refused": None if refusal is None else
            {"order": refusal.order, "reason": refusal.reason, "message": refusal.message[:500]},
            "ts": int(system) if ts is None else ts,
        }  # fmt: skip

    def _service_word(self) -> str:
        state = self._host.child.state
        if state.ready_at is not None:
            return "up"
        return "starting" if state.pid is not None else "down"

    def _publish_status(self, word: str = "") -> None:
        told = wire.encode(self._standing(word, ts=0))
        if told != self._told and self._link is not None and self._link.up:
            self._told = told
            self._link.publish(self._status(word))


def own(root: Path) -> IO[bytes]:
    """Take a device's folder for this process alone, until the file is closed.

    Raises:
        InvalidRequest: when another agent has it, or it cannot be written.
    """
    end = time.monotonic() + LOCK_S  # `agent status` may be looking
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / "lock", "ab")  # noqa: SIM115  held as long as the agent runs
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError as error:
                if time.monotonic() > end:
                    lock.close()
                    raise InvalidRequest(f"another agent works in {root}") from error
                time.sleep(0.05)
    except OSError as error:
        raise InvalidRequest(f"root {str(root)!r} cannot be written: {error.strerror}") from error


def trusted_root(folder: Path, given: str | None) -> bytes:
    """The root.json that all trust begins with: kept at the first start, and never replaced.

    Raises:
        InvalidRequest: when there is none.
    """
    kept = folder / TRUST_ROOT
    if not kept.exists():
        if given is None:
            raise InvalidRequest("trust is missing; give the repository's root.json, once")
        data = Path(given).read_bytes()
        part = folder / f"{TRUST_ROOT}.part"
        part.unlink(missing_ok=True)
        write_file(part, data)
        os.replace(part, kept)
    data = kept.read_bytes()
    if len(data) > MAX_ROOT_BYTES:
        raise InvalidRequest(f"{kept} has {len(data)} bytes and is no root.json")
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
