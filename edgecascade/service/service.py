# SPDX-License-Identifier: Apache-2.0
"""An LLM behind a broker: one thread moves messages and events between link, core and engine.

with Service(llm, config) as service:
    service.run()           # until stop(), which drains
"""

from __future__ import annotations

import logging
import os
import platform
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edgecascade.completion import Event
from edgecascade.device.monitor import Monitor
from edgecascade.errors import BackendError, InvalidRequest, NetworkError
from edgecascade.files import replace_file
from edgecascade.service import report, units, wire
from edgecascade.service.config import ServiceConfig, state_folder
from edgecascade.service.core import Core, Live, Model
from edgecascade.service.inbox import Inbox
from edgecascade.service.mqtt import MAX_CROWD, Link, LinkOptions
from edgecascade.service.protocol import Incoming, Limits
from edgecascade.service.replies import MAX_MESSAGE_BYTES, Outgoing
from edgecascade.service.topics import Topics
from edgecascade.version import package_version

log = logging.getLogger(__name__)

STATUS_PERIOD_S = 1.0
LAST_WORDS_S = 2.0
HASTY_S = 0.5
TURN_S = 0.25  # so soon stop() is seen
CROWDED_S = 0.005  # so soon it is seen that requests may be read again
SLICE_S = 0.01  # requests are read for so long before chunks are sent, whatever a client floods
DEFAULT_MODEL = "default"
MAX_FAILURES = 8  # in a row; one that succeeds begins the count anew


class Served(Model, Protocol):
    """What the service needs of an LLM."""

    @property
    def bundle(self) -> Any:
        """The loaded bundle."""

    @property
    def slots(self) -> int:
        """Requests that run at the same time."""


class Service:
    """Serves a loaded LLM. `run` blocks; `stop` may be called from a signal handler."""

    def __init__(
        self, llm: Served, config: ServiceConfig, *, monitor: Monitor | None = None
    ) -> None:
        self._config = config
        self._topics = Topics(config.prefix)
        self._monitor = monitor or Monitor()
        self._own_monitor = monitor is None
        self._events: deque[tuple[Live, Event]] = deque()
        self._inbox = Inbox()
        self._wake = threading.Event()
        self._stopping = False
        name = config.model or Path(os.path.abspath(llm.bundle.path)).name
        identity = report.Identity(
            device=config.device_id,
            model=name,
            bundle=llm.bundle.id,
            slots=llm.slots,
            boot=next_boot(state_folder(config), config.device_id),
        )
        self._core = Core(
            llm,
            identity,
            self._topics,
            _limits(config, name),
            self._post,
            requests_per_minute=config.requests_per_minute,
            prompt_tokens_per_minute=config.prompt_tokens_per_minute,
            max_requests_per_client=config.max_requests_per_client,
            monitor=self._monitor,
            wall_clock=time.time,
        )
        versions = {"edgecascade": package_version(), "python": platform.python_version()}
        self._info = report.info(
            identity, self._core.limits, versions, self._monitor.facts().description()
        )
        self._address = config.address()
        self._link = Link(
            LinkOptions(
                self._address,
                config.device_id,
                self._topics.device_filters(config.device_id, config.pool),
                will=self._status("offline"),
                session_expiry_s=config.session_expiry_s,
                receive_maximum=max(16, 2 * llm.slots),
                # Room to receive what is too large, so that it can be answered.
                max_packet_bytes=config.max_request_bytes + (4 << 10),
            ),
            self._deliver,
            births=self._births,
        )
        self._told_end = False
        self._told_status: tuple[bool, int] | None = None
        self._told_reason = self._link.reason
        self._status_at = 0.0
        self._telemetry_at = time.monotonic() + config.telemetry_s

    def __enter__(self) -> Service:
        if self._own_monitor:
            self._monitor.start()
        self._link.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._told_end and self._link.up:
            # It was interrupted. The broker speaks no last will for who disconnects in order.
            self._say_goodbye(HASTY_S)
        self._link.stop()
        if self._own_monitor:
            self._monitor.close()

    @property
    def model(self) -> str:
        """The name it is served under."""
        return self._core.identity.model

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether the broker has accepted the connection, within a time."""
        return self._link.wait_up(timeout_s)

    def stop(self) -> None:
        """Ask `run` to drain and return. No lock is taken: a signal handler may call this."""
        self._stopping = True

    def run(self) -> None:
        """Serve until stop().

        Raises:
            NetworkError: when another client took this device's name at the broker.
            BackendError: when no request succeeds any more: only a new start may help.
        """
        units.notify("STATUS=loaded")  # though the broker may be out of reach
        drained_at: float | None = None
        period_s = units.watchdog_period_s()
        alive_at, told = 0.0, False
        while True:
            now = self._turn()
            if self._stopping:
                if drained_at is None:
                    drained_at = now + self._config.drain_s
                    self._core.draining = True
                    log.info("draining: %d requests", self._core.busy)
                if not self._core.busy:
                    break
                if now >= drained_at:
                    self._core.take_back_all()
                    drained_at = now + LAST_WORDS_S + self._config.drain_s
            if self._link.fatal:
                raise NetworkError(self._link.fatal)
            if self._core.failures >= MAX_FAILURES:
                raise BackendError(
                    f"{self._core.failures} requests in a row failed; start the service again"
                )
            if self._link.up and not told:
                told = units.notify("READY=1")
            if period_s is not None and now >= alive_at and self._link.alive:
                units.notify("WATCHDOG=1")
                alive_at = now + period_s
            self._sleep(now)
        self._say_goodbye()

    def _turn(self) -> float:
        """Everything that is to be done now."""
        self._core.max_message_bytes = min(MAX_MESSAGE_BYTES, self._link.max_payload_bytes)
        told = self._hear()
        now = time.monotonic()
        told += self._core.tick(now, can_stream=self._can_stream)
        self._link.publish(*told)  # at once: the network thread wakes for all of them
        self._report(now)
        return now

    def _hear(self) -> list[Outgoing]:
        """What the engine tells; then requests, for as long as running streams can wait."""
        now = time.monotonic()
        told: list[Outgoing] = []
        for _ in range(len(self._events)):
            told += _decided(partial(self._core.tell, *self._events.popleft(), now))
        while time.monotonic() < now + SLICE_S and len(told) < MAX_CROWD and self._may_read():
            if (arrived := self._inbox.take()) is None:
                break
            told += _decided(partial(self._core.receive, *arrived))
        return told

    def _may_read(self) -> bool:
        # A request of some bytes may ask for an answer of megabytes again, and again.
        return not self._link.crowded

    def _can_stream(self) -> bool:
        return self._link.can_stream

    def _sleep(self, now: float) -> None:
        if self._events or (self._inbox and self._may_read()):
            return
        turn_s = CROWDED_S if self._inbox and self._link.up else TURN_S
        due = min(self._core.next_due(now), self._telemetry_at, now + turn_s)
        self._wake.wait(max(0.0, due - time.monotonic()))
        self._wake.clear()

    def _deliver(self, message: Incoming) -> None:
        # On the network thread.
        self._inbox.put(message, time.monotonic())
        self._wake.set()

    def _post(self, live: Live, event: Event) -> None:
        # On the engine's thread.
        self._events.append((live, event))
        self._wake.set()

    def _births(self) -> list[Outgoing]:
        # On the network thread, at every connection: the will may have spoken meanwhile.
        self._told_status = None
        self._wake.set()
        topic = self._topics.info(self._config.device_id)
        return [self._status(), Outgoing(topic, wire.encode(self._info), retain=True)]

    def _status(self, state: str | None = None) -> Outgoing:
        state = state or ("draining" if self._core.draining else "online")
        live = 0 if state == "offline" else self._core.busy
        told = report.status(self._core.identity, live, state, int(time.time()))
        return Outgoing(self._topics.status(self._config.device_id), told.to_bytes(), retain=True)

    def _report(self, now: float) -> None:
        if not self._link.up and (reason := self._link.reason) != self._told_reason:
            self._told_reason = reason
            log.warning("the broker at %s: %s", self._address.shown, reason)
        if now >= self._status_at and self._link.up:
            told = self._core.draining, self._core.busy
            if told != self._told_status:
                self._told_status = told
                self._status_at = now + STATUS_PERIOD_S
                self._link.publish(self._status())
        if now >= self._telemetry_at:
            self._telemetry_at = now + self._config.telemetry_s * random.uniform(0.8, 1.2)
            if self._link.can_stream:
                self._link.publish(self._telemetry())

    def _telemetry(self) -> Outgoing:
        live, slots = self._core.busy, self._core.identity.slots
        values = {
            "ts": int(time.time()),
            "boot": self._core.identity.boot,
            "busy": min(live, slots),
            "queue": max(0, live - slots),
            **self._core.figures.telemetry(),
            "net": {**asdict(self._link.counters), "lost_incoming": self._inbox.lost},
            **self._monitor.facts().telemetry(),
        }
        return Outgoing(self._topics.telemetry(self._config.device_id), wire.encode(values), qos=0)

    def _say_goodbye(self, patience_s: float = LAST_WORDS_S) -> None:
        self._told_end = True
        self._link.flush(patience_s)
        self._link.publish(self._status("offline"))
        self._link.flush(patience_s)


def _decided(decide: Callable[[], list[Outgoing]]) -> list[Outgoing]:
    try:
        return decide()
    except Exception:  # one message must not silence the device for all others
        log.exception("a message is not handled")
        return []


def next_boot(folder: Path, device: str) -> int:
    """A number that grows at every start, so that a late last will of the past is told from news.

    Raises:
        InvalidRequest: when the folder cannot be written.
    """
    path = folder / f"{device}.boot"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            boot = int(path.read_text(encoding="ascii")) + 1
        except FileNotFoundError:
            boot = 1
        except ValueError:
            boot = int(time.time())  # beyond any count that was lost
            log.warning("%s holds no number; the boot counter goes on from %d", path, boot)
        _write_count(path, boot)
    except OSError as error:
        raise InvalidRequest(
            f"state folder {str(folder)!r} cannot be written ({error.strerror}); give --state-dir"
        ) from error
    return boot


def _write_count(path: Path, count: int) -> None:
    data = b"%d\n" % count
    try:
        replace_file(path, data)
    except OSError:
        # A full disk takes what needs no more room.
        with suppress(OSError), open(path, "r+b", buffering=0) as file:
            file.write(data)
            file.truncate()  # what held no number may have been longer
            os.fsync(file)
            return
        raise


def _limits(config: ServiceConfig, model: str) -> Limits:
    return Limits(
        max_request_bytes=config.max_request_bytes,
        max_timeout_s=config.max_timeout_s,
        max_completion_tokens=config.max_completion_tokens,
        flush_ms=config.flush_ms,
        min_flush_ms=config.min_flush_ms,
        models=(model, DEFAULT_MODEL) if model != DEFAULT_MODEL else (model,),
        clients=None if config.clients is None else frozenset(config.clients),
        priority_clients=frozenset(config.priority_clients),
    )
