# SPDX-License-Identifier: Apache-2.0
"""Performs what the updater asks for. Killed anywhere, it goes on from the state file.

    events --> update() --> store the state --> perform the effects --> events

The state is durable before any effect of it begins. What takes long (fetching, hashing, trying)
goes through `spawn`, which the agent gives a thread and a test runs at once.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from edgecascade.errors import EdgeCascadeError, FleetError, UpdateFailed, UpdateRefused
from edgecascade.fleet import events as ev
from edgecascade.fleet import release as releases
from edgecascade.fleet.floor import raise_floor, read_floor
from edgecascade.fleet.fs import Files, replace_file
from edgecascade.fleet.orders import Order
from edgecascade.fleet.release import Release
from edgecascade.fleet.state import (
    MAX_STATE_BYTES,
    DeviceState,
    Phase,
    Slot,
    read_slot,
    read_state,
    slot_to_bytes,
)
from edgecascade.fleet.store import Store
from edgecascade.fleet.updater import update

log = logging.getLogger(__name__)

STATE = "state.json"
GOLDEN = "golden.json"
REST_S = 30.0  # after the disk failed, before it is tried again

Evidence = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What came of an effect, with when it was asked for: a late one is told from a present one."""

    event: ev.Event | OSError
    boots: int
    halts: int | None


Work = Callable[[], Answer]


class Host(Protocol):
    """What the executor cannot do itself: networks, processes, clocks.

    `download`, `try_out`, `drain` and `soak` block, and are called where `spawn` runs them; all
    others return at once. A failure is an OSError or an EdgeCascadeError.
    """

    def now(self) -> float:
        """Seconds since 1970, never below what was known before."""

    def report(self, report: ev.Report, revision: int) -> None:
        """Publish a report; a later one has a higher or the same revision."""

    def wake(self, at: float) -> None:
        """Call `tick` at this time or soon after."""

    def download(
        self,
        order: Order,
        release: Release,
        missing: Mapping[str, int],
        keep: Callable[[str], None],
    ) -> None:
        """Bring the missing blobs to partial/, and `keep` each when it is whole."""

    def halt(self) -> None:
        """Make a running `download`, `try_out` or `soak` end; nobody waits for its answer."""

    def room_for_two(self, release: Release) -> bool:
        """Whether memory has room for a trial beside the running service."""

    def try_out(self, slot: Slot, release: Release) -> tuple[bool, Evidence]:
        """Load the bundle in a child process and hold it against its health checks."""

    def drain(self) -> None:
        """End the service, after its requests or after a bounded time."""

    def start(self, slot: Slot | None) -> None:
        """See that the service runs on this bundle and on no other."""

    def soak(self, slot: Slot, release: Release) -> tuple[bool, Evidence]:
        """Run the service on the bundle and watch it for the release's soak time."""


class Executor:
    """The updates of one device. Its methods are called from one thread."""

    def __init__(
        self,
        files: Files,
        host: Host,
        *,
        store: Store | None = None,
        spawn: Callable[[Work], None] | None = None,
    ) -> None:
        self.files = files
        self.host = host
        self.store = store or Store(files)
        self.state = DeviceState()
        self._spawn = spawn or self._now
        self._events: deque[ev.Event] = deque()
        self._busy = False
        self._boots = self._halts = 0  # since which answers count
        self._stale = False  # the disk failed: what it holds is to be read anew
        self.trouble = ""  # what it said; nothing once it is read
        self._deferred: dict[str, ev.Ordered] = {}  # by group, until their turn or the disk comes
        self._documents: dict[str, bytes] = {}

    def boot(self) -> None:
        """Begin, or go on where the last process was stopped."""
        self._stale = True
        self.tick()

    def offer(self, order: Order, document: bytes | None = None, refusal: str = "") -> None:
        """An order that was verified, and the release document it names, if it installs one."""
        target = None
        if document is not None:
            release = releases.parse(document)
            sha256 = hashlib.sha256(document).hexdigest()
            target = Slot(
                release.name, release.version, release.seq, sha256, release.manifest.sha256
            )
            waiting = {each.target.release for each in self._deferred.values() if each.target}
            self._documents = {
                name: known for name, known in self._documents.items() if name in waiting
            }
            self._documents[sha256] = document
        self.post(ev.Ordered(order, target, refusal))

    def pending(self, order: str) -> bool:
        """Whether something is still to come of an order that was offered."""
        current = self.state.update
        if current is not None and current.order.order == order:
            return not current.paused
        return any(waits.order.order == order for waits in self._deferred.values())

    def tick(self) -> None:
        """Time has passed."""
        self.post(ev.Ticked())

    def post(self, news: ev.Event | Answer) -> None:
        """Take an event, and all that follows from it here and now."""
        event = news.event if isinstance(news, Answer) else news
        if isinstance(news, Answer):
            late = news.boots != self._boots or news.halts not in (None, self._halts)
            if late:
                return
        if isinstance(event, OSError):
            self._rest(event)
            return
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            if self._stale:
                self._events.appendleft(self._read())
                self._take_deferred()
            while self._events:
                event = self._events.popleft()
                try:
                    self._step(event)
                except OSError:
                    self._events.appendleft(event)
                    raise
        except OSError as error:
            self._rest(error)
        finally:
            self._busy = False

    def _rest(self, error: OSError) -> None:
        """The disk failed: nothing is known of the last write, so begin again, a little later."""
        log.error("updates rest for %.0f s: %s", REST_S, error)
        for event in self._events:
            if isinstance(event, ev.Ordered):  # nobody says it again; all else follows from a state
                self._defer(event)
        self._events.clear()
        self._stale, self.trouble = True, str(error)
        self._boots += 1
        self.host.halt()
        update = self.state.update
        unproven = update is not None and update.phase is Phase.PROBATION
        try:
            self.host.start(self.state.previous if unproven else self.state.active)
        except OSError as failed:  # what runs goes on; after the rest it is asked for again
            log.error("the service is left as it is: %s", failed)
        self.host.wake(self.host.now() + REST_S)

    def _read(self) -> ev.Booted:
        """Read the state; where it is lost, begin from the golden bundle and the floor."""
        self.store.prepare()
        self.state, note = self._recovered()
        self._stale, self.trouble = False, ""
        self._keep_golden()
        return ev.Booted(note)

    def _recovered(self) -> tuple[DeviceState, str]:
        kept, note = self._sound(STATE, read_state)
        if kept is not None:
            return kept, ""
        golden, more = self._sound(GOLDEN, read_slot)
        floor = read_floor(self.files)
        if golden is None and not note and not floor.orders:
            return DeviceState(), ""  # a new device
        log.error("state lost: %s", note or "no state file")
        state = DeviceState(
            active=golden, golden=golden, seqs=dict(floor.orders), floors=dict(floor.releases)
        )
        return state, "; ".join(filter(None, ("the state file was lost", note, more)))

    def _sound(self, path: str, reader: Callable[[bytes], T]) -> tuple[T | None, str]:
        """What a file holds, or why it is not known."""
        try:
            data = self.files.read(path, MAX_STATE_BYTES)
            return (None if data is None else reader(data)), ""
        except UpdateFailed as error:
            return None, str(error)
        except OSError as error:
            if error.errno != errno.EIO:  # of a passing trouble nothing follows
                raise
            return None, str(error)

    def _step(self, event: ev.Event) -> None:
        state, effects = update(self.state, event, self.host.now())
        if state != self.state:
            self._store(state)
        for effect in effects:
            self._perform(effect)
        if self.state.update is None and not self._stale:
            self._take_deferred()

    def _defer(self, event: ev.Ordered) -> None:
        """Keep an order for later, unless a newer one of its group is kept."""
        kept = self._deferred.setdefault(event.order.key, event)
        if kept.order.seq <= event.order.seq:
            self._deferred[event.order.key] = event

    def _take_deferred(self) -> None:
        self._events.extend(self._deferred.values())
        self._deferred = {}

    def _store(self, state: DeviceState) -> None:
        documents = {slot.release for slot in state.slots} & self._documents.keys()
        for sha256 in documents:
            self.store.put_release(sha256, self._documents[sha256])
        # The clock makes it grow even past the loss of the file.
        state = state.revised(max(self.state.revision + 1, int(self.host.now())))
        replace_file(self.files, STATE, state.to_bytes())
        for sha256 in documents:  # not before: a disk that fails here has the order taken anew
            del self._documents[sha256]
        self.state = state
        self._keep_golden()

    def _keep_golden(self) -> None:
        if self.state.golden is not None:
            wanted = slot_to_bytes(self.state.golden)
            if self.files.read(GOLDEN, MAX_STATE_BYTES) != wanted:
                replace_file(self.files, GOLDEN, wanted)

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Report():
                self.host.report(effect, self.state.revision)
            case ev.Wake():
                self.host.wake(effect.at)
            case ev.Halt():
                self._halts += 1
                self.host.halt()
            case ev.Start():
                self.host.start(effect.slot)
            case ev.Defer():
                self._defer(effect.event)
            case ev.RaiseFloor():
                raise_floor(self.files, orders=effect.seqs, releases=effect.floors)
            case ev.Collect():
                self._collect(effect)
            case ev.Check():
                boots = self._boots
                self._spawn(lambda: Answer(self._check(effect), boots, None))
            case ev.Download():
                self._begin(effect.order.order, lambda: self._download(effect))
            case ev.Drain():
                self._begin(effect.order, lambda: self._drain(effect))
            case _:
                self._begin(effect.order, lambda: self._for_target(effect))

    def _begin(self, order: str, work: Callable[[], ev.Event]) -> None:
        boots, halts = self._boots, self._halts
        self._spawn(lambda: Answer(_attempt(order, work), boots, halts))

    def _now(self, work: Work) -> None:
        self.post(work())

    def _download(self, effect: ev.Download) -> ev.Event:
        release = self.store.release(effect.target.release)
        missing = self.store.missing(release)
        if missing:
            self.host.download(effect.order, release, missing, self.store.adopt)
        still = self.store.missing(release)
        if still:
            raise UpdateFailed(f"blobs did not come: {', '.join(still)}", reason="incomplete")
        return ev.Downloaded(effect.order.order)

    def _drain(self, effect: ev.Drain) -> ev.Event:
        self.host.drain()
        return ev.Drained(effect.order)

    def _for_target(self, effect: ev.Measure | ev.Verify | ev.Stage | ev.Try | ev.Soak) -> ev.Event:
        order, target = effect.order, effect.target
        release = self.store.release(target.release)
        match effect:
            case ev.Measure():
                others = [slot for slot in self.state.slots if slot != self.state.previous]
                return ev.Measured(
                    order,
                    self.store.need_bytes(release),
                    self.files.free_bytes(),
                    self.store.spare_bytes(self.state.previous, others),
                )
            case ev.Verify():
                return ev.Verified(order, self.store.verify(release))
            case ev.Stage():
                self.store.stage(release)
                known = self._known(target, release)
                return ev.Staged(order, self.host.room_for_two(release), known)
            case ev.Try():
                return ev.Tried(order, *self.host.try_out(target, release))
            case ev.Soak():
                return ev.Soaked(order, *self.host.soak(target, release))

    def _known(self, target: Slot, release: Release) -> bool:
        """Whether the active release is the same bundle and had to show the same."""
        active = self.state.active
        if active is None or active.manifest != target.manifest:
            return False
        try:
            return self.store.release(active.release).health == release.health
        except (UpdateFailed, OSError):  # its document is lost: a trial will tell
            return False

    def _check(self, effect: ev.Check) -> ev.Event | OSError:
        try:
            reason = self.store.check(effect.slot)
        except OSError as error:  # of a passing trouble nothing follows for the bundle
            return error
        except Exception as error:  # without an answer no service would start
            log.exception("%s is not checked", effect.slot.manifest)
            return OSError(f"{effect.slot.manifest} is not checked: {error!r}")
        return ev.Checked(effect.slot.manifest, not reason, reason)

    def _collect(self, effect: ev.Collect) -> None:
        try:
            self.store.collect(effect.keep)
        except OSError as error:  # what stays is collected after the next update
            log.error("cannot remove what is not needed any more: %s", error)


def _attempt(order: str, work: Callable[[], ev.Event]) -> ev.Event:
    try:
        return work()
    except FleetError as error:
        final = isinstance(error, UpdateRefused) or getattr(error, "final", False)
        return ev.Failed(order, error.reason, str(error), final=final)
    except EdgeCascadeError as error:
        return ev.Failed(order, error.code, str(error))
    except OSError as error:
        return ev.Failed(order, "disk-failed", str(error))
    except Exception as error:  # an answer that never comes is an update that never ends
        log.exception("a step of %s failed", order)
        return ev.Failed(order, "unexpected", repr(error))
