# SPDX-License-Identifier: Apache-2.0
"""What the executor cannot do itself, done on this device: downloads, trials, the service."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from edgecascade.errors import FleetError, UpdateFailed
from edgecascade.files import canonical_json, write_file
from edgecascade.fleet import events as ev
from edgecascade.fleet import probation
from edgecascade.fleet.child import Child, ChildState, Command
from edgecascade.fleet.download import UpdateDownload
from edgecascade.fleet.executor import Evidence, Work
from edgecascade.fleet.fetch import DownloadStopped, Pace
from edgecascade.fleet.orders import Order
from edgecascade.fleet.release import Release
from edgecascade.fleet.settings import AgentSettings
from edgecascade.fleet.sources import Patience, Source
from edgecascade.fleet.state import Slot

log = logging.getLogger(__name__)

START_S = 120.0  # from the start of the program until its bundle begins to load
TURN_S = 0.5
CRASHES = 2  # so often in a row is no accident
ANSWER_S = 60.0  # to one question, over the broker
QUESTION = ({"role": "user", "content": "Are you there?"},)


class Voice(Protocol):
    """The agent, as the host needs it."""

    def now(self) -> float:
        """See executor.Host."""

    def report(self, report: ev.Report, revision: int) -> None:
        """See executor.Host."""

    def wake(self, at: float) -> None:
        """See executor.Host."""

    def progress(self, order: str, share: float) -> None:
        """So much of a download is done."""

    def ask(self, messages: tuple[Mapping[str, Any], ...], timeout_s: float) -> Evidence:
        """Ask the service a question as its clients do: `bundle` that answered, or `unasked`."""


class DeviceHost:
    """See executor.Host. `sticks` names the folder that an order to install came from."""

    def __init__(
        self,
        settings: AgentSettings,
        voice: Voice,
        release_of: Callable[[Slot], Release],
        source_at: Callable[[str], Source],
        on_change: Callable[[], None],
        patience: Patience = Patience(),  # noqa: B008  frozen
    ) -> None:
        self.sticks: dict[str, str] = {}
        self._settings, self._voice, self._release_of = settings, voice, release_of
        self._source_at, self._patience = source_at, patience
        self._root = settings.folder
        self._lock = threading.Lock()
        self._halts = 0
        self._mine = threading.local()
        self._stoppers: set[Callable[[], None]] = set()
        self.child = Child(grace_s=settings.drain_s, before=self._prepare, on_change=on_change)

    def close(self) -> None:
        """Stop what runs; the service drains."""
        self.halt()
        self.child.close()

    def spawn(self, work: Work, post: Callable[[Any], None]) -> None:
        """Do this on a thread of its own; a `halt` from now on concerns it."""
        halts = self._halts

        def run() -> None:
            self._mine.halts = halts
            post(work())

        threading.Thread(target=run, name="work", daemon=True).start()

    def now(self) -> float:
        """See executor.Host."""
        return self._voice.now()

    def report(self, report: ev.Report, revision: int) -> None:
        """See executor.Host."""
        self._voice.report(report, revision)

    def wake(self, at: float) -> None:
        """See executor.Host."""
        self._voice.wake(at)

    def halt(self) -> None:
        """See executor.Host."""
        with self._lock:
            self._halts += 1
            stoppers = list(self._stoppers)
        for stop in stoppers:
            stop()

    @contextmanager
    def _stoppable(self, stop: Callable[[], None]) -> Iterator[None]:
        """While this runs, `halt` calls `stop`."""
        with self._lock:
            if self._halts != self._mine.halts:
                raise UpdateFailed("halted before it began", reason="stopped")
            self._stoppers.add(stop)
        try:
            yield
        finally:
            with self._lock:
                self._stoppers.discard(stop)

    def download(
        self,
        order: Order,
        release: Release,
        missing: Mapping[str, int],
        keep: Callable[[str], None],
    ) -> None:
        """See executor.Host."""
        total = max(1, sum(missing.values()))

        def progress(came: int) -> None:
            self._voice.progress(order.order, min(1.0, max(0.0, came / total)))

        limits = order.limits
        rate = limits.kbit_s * 1000 / 8 if limits.kbit_s else None
        pull = UpdateDownload(
            self._root,
            self.sources(order),
            pace=Pace(bytes_per_s=rate, parallel=limits.parallel),
            patience=self._patience,
            keep=keep,
            on_bytes=progress,
        )
        try:
            with self._stoppable(pull.stop):
                pull.run(release, missing)
        except DownloadStopped as error:
            raise UpdateFailed(str(error), reason="stopped") from error

    def sources(self, order: Order) -> list[Source]:
        """Where blobs may be, the nearest first."""
        stick = self.sticks.get(order.order)
        places = [f"{stick}/blobs"] if stick else []
        places += [*self._settings.caches, *order.mirrors]
        for each in self._settings.repository:
            places.append(each + "blobs/" if each.endswith(("/", ":")) else each + "/blobs/")
        return [self._source_at(place) for place in dict.fromkeys(places)]

    def room_for_two(self, release: Release) -> bool:
        """See executor.Host."""
        return probation.room_for_two(release)

    def try_out(self, slot: Slot, release: Release) -> tuple[bool, Evidence]:
        """See executor.Host."""
        trial = probation.Trial(self.folder_of(slot), release.health)
        with self._stoppable(trial.stop):
            return trial.run()

    def soak(self, slot: Slot, release: Release) -> tuple[bool, Evidence]:
        """See executor.Host."""
        if not self._settings.mqtt and self._settings.service is None:
            return True, {"unasked": "no service is configured"}
        stopped = threading.Event()
        with self._stoppable(stopped.set):
            before, command = self.child.state, self._command(slot)
            self.child.want(command)
            allowed_s = START_S + release.health.load_s
            began = time.monotonic()

            def settled(state: ChildState) -> bool:
                loaded = state.command == command and state.loaded_at is not None
                return loaded or state.crashes >= CRASHES

            while not self.child.wait(settled, TURN_S):
                if stopped.is_set():
                    return False, {"reason": "stopped"}
                if time.monotonic() - began > allowed_s:
                    return False, {"reason": "hang", "message": f"not loaded in {allowed_s:g} s"}
            state = self.child.state
            if state.loaded_at is None:
                return False, {"reason": "crash-loop", "message": state.last_words}
            seen: dict[str, Any] = {"service_load_s": round(state.loaded_at - state.started_at, 2)}
            if before.command is None and before.ended_at:
                seen["down_s"] = round(state.loaded_at - before.ended_at, 2)
            answered = self._answers(slot, release, allowed_s - (time.monotonic() - began))
            seen |= answered
            if "reason" in answered:
                return False, seen
            good, watched = probation.soak(
                release.health, lambda: self._trouble(state), stopped.wait
            )
            return good, {**seen, **watched}

    def _answers(self, slot: Slot, release: Release, left_s: float) -> dict[str, Any]:
        """Ask over the broker, where there is one: what no client gets is no service."""
        ready = self.child.wait(lambda s: s.ready_at is not None, min(ANSWER_S, max(1.0, left_s)))
        if not ready:
            return {"unasked": "the service has not reached its broker"}
        prompts = [p.messages for p in release.health.prompts if p.messages]
        said = dict(self._voice.ask(prompts[0] if prompts else QUESTION, ANSWER_S))
        if said.get("bundle") not in (None, slot.manifest):
            message = f"bundle {said['bundle']} answered instead of {slot.manifest}"
            return {"reason": "wrong-bundle", "message": message}
        return said

    def _trouble(self, loaded: ChildState) -> str:
        """Why the run that was loaded is over; nothing while it goes on."""
        state = self.child.state
        # Not by the crashes: their count begins anew after a steady run.
        return "" if state.loaded_at == loaded.loaded_at else state.last_words or "it ended"

    def drain(self) -> None:
        """See executor.Host."""
        self.child.end(self._settings.drain_s + START_S)

    def start(self, slot: Slot | None) -> None:
        """See executor.Host."""
        if slot is None or not (self._settings.mqtt or self._settings.service):
            self.child.want(None)
        else:
            self.child.want(self._command(slot))

    def folder_of(self, slot: Slot) -> Path:
        """The bundle's folder."""
        return self._root / "bundles" / slot.manifest

    def _command(self, slot: Slot) -> Command:
        """`serve` with the device's own settings over the release's."""
        try:
            config = self._release_of(slot).config
        except FleetError as error:  # a damaged document must not keep the device silent
            log.error("%s; serving without its configuration", error)
            config = {}
        text = canonical_json(self._settings.service_values(config))  # JSON is YAML
        path = self._root / f"serve-{hashlib.sha256(text).hexdigest()[:16]}.yaml"
        if not path.exists() or path.read_bytes() != text:
            part = path.with_suffix(".part")
            part.unlink(missing_ok=True)
            write_file(part, text, mode=0o600)  # the broker's address may hold a password
            os.replace(part, path)
        words = (sys.executable, "-m", "edgecascade", "serve", str(self.folder_of(slot)))
        return (*words, "--config", str(path), *self._settings.serve_options)

    def _prepare(self, command: Command, stopped: threading.Event) -> None:
        """Before each start: JetPack may have changed meanwhile, and with it the engine."""
        found = probation.prepare(Path(command[4]), stopped=stopped)
        if found:
            log.warning("engine: %s", found)
