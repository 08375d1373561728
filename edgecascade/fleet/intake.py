# SPDX-License-Identifier: Apache-2.0
"""From what a broker or a stick brings to orders that may be obeyed. One thread, which may block.

    envelope -> metadata refreshed -> signatures, epoch, time -> does it concern us? -> the release

An order that cannot be judged yet, because the repository is out of reach, is tried again until it
expires. One that was refused is reported, under the name it gives itself, but never obeyed.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from edgecascade.errors import (
    EdgeCascadeError,
    FleetError,
    NetworkError,
    UpdateFailed,
    UpdateRefused,
)
from edgecascade.fleet import orders
from edgecascade.fleet.orders import MAX_ENVELOPE_BYTES, Order
from edgecascade.fleet.refresh import Trust
from edgecascade.fleet.release import Release

log = logging.getLogger(__name__)

MAX_WAITING = 64
REST_S = 1.0  # between two refreshes, however many envelopes come
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0
NOT_YET = frozenset({"too-early", "expired-metadata"})  # time may mend it


@dataclass(frozen=True)
class Offer:
    """An order to obey. `document` is the release it installs; `source` a folder it came from."""

    order: Order
    document: bytes | None = None
    refusal: str = ""
    source: str = ""


@dataclass(frozen=True)
class Refusal:
    """Something that was not obeyed. The names are what it says of itself, and prove nothing."""

    order: str
    seq: int
    reason: str
    message: str
    source: str = ""
    group: str = ""


@dataclass(frozen=True)
class Held:
    """An order that waits for the repository."""

    order: Order
    reason: str
    message: str
    source: str = ""


@dataclass(frozen=True)
class Skipped:
    """An order of a stick that is for others."""

    order: Order
    source: str


Result = Offer | Refusal | Held | Skipped


@dataclass(frozen=True)
class Envelope:
    """Bytes from anywhere. `source` is the folder of a stick, which is then the repository, too."""

    data: bytes
    source: str = ""
    tries: int = 0  # that the repository answered
    due: float = 0.0
    pause_s: float = FIRST_PAUSE_S


@dataclass(frozen=True)
class Outlook:
    """What the last refresh showed."""

    reached: bool = False
    message: str = "not asked yet"


@dataclass
class Intake:
    """The thread. `judge` says why a release is nothing for this device, or nothing."""

    trusts: Sequence[Trust]
    folder_trust: Callable[[str], Trust]
    device: str
    groups: Sequence[str]
    judge: Callable[[Release], str]
    post: Callable[[Result], None]
    refresh_s: float = 3600.0
    rest_s: float = REST_S
    outlook: Outlook = field(default_factory=Outlook, init=False)
    # When the metadata of the last good refresh expire; 0 when there was none. Kept in memory: it
    # is told every second, and a disk that fails must not keep a device from that.
    fresh_until: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._waiting: deque[Envelope] = deque(maxlen=MAX_WAITING)
        self._changed = threading.Condition()
        self._closing = False
        self._asked_at = -1e9
        self._next_refresh = 0.0
        self._current: Trust | None = None
        with contextlib.suppress(OSError):
            belief = self.trusts[0].belief if self.trusts else None
            self.fresh_until = 0.0 if belief is None else belief.fresh_until
        self._thread = threading.Thread(target=self._run, name="orders", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End after what is being done; a refresh that hangs is left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(5.0)

    def put(self, data: bytes, source: str = "") -> None:
        """Take an envelope; may be called from any thread. What is there already is not doubled."""
        with self._changed:
            if all((each.data, each.source) != (data, source) for each in self._waiting):
                self._waiting.append(Envelope(data, source))
            else:
                self._waiting = deque(
                    (replace(e, due=0.0) if e.data == data else e for e in self._waiting),
                    MAX_WAITING,
                )
            self._changed.notify_all()

    def is_stale(self, now: float) -> bool:
        """Whether the repository may be hiding news."""
        return not self.trusts or self.trusts[0].now(now).time >= self.fresh_until

    # From here on everything runs on the thread.

    def _run(self) -> None:
        while True:
            envelope = self._next()
            if self._closing:
                return
            try:
                if envelope is None:
                    self._refresh(self.trusts)
                else:
                    self.take(envelope)
            except OSError as error:
                log.error("an order waits for the disk: %s", error)
                if envelope is not None:
                    self._again(envelope)
            except Exception:  # a thread that is gone would be a device that no order reaches
                log.exception("an order is not handled")

    def _next(self) -> Envelope | None:
        """The next envelope to look at; None when it is time to refresh."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                ready = next((each for each in self._waiting if each.due <= now), None)
                if ready is not None:
                    self._waiting.remove(ready)
                    return ready
                if self.trusts and now >= self._next_refresh:
                    return None
                due = [each.due for each in self._waiting]
                due += [self._next_refresh] if self.trusts else []
                self._changed.wait(max(0.05, min(due) - now) if due else None)
            return None

    def take(self, envelope: Envelope) -> None:
        """Judge an envelope here and now. On the thread; a test without one may call it."""
        trusts = [self.folder_trust(envelope.source)] if envelope.source else self.trusts
        trouble = self._refresh(trusts)
        trust = self._current or trusts[0]
        system = time.time()
        try:
            keys = trust.order_keys(system)
            order = orders.verify(envelope.data, keys, trust.now(system).time)
        except UpdateRefused as error:
            self._refused(envelope, error)
            return
        except FleetError as error:
            self._refused(envelope, UpdateRefused(str(error), reason=error.reason))
            return
        if not order.concerns(self.device, self.groups):
            log.info("order %s does not concern %s", order.order, self.device)
            if envelope.source:
                self.post(Skipped(order, envelope.source))
            return
        if order.action != "install":
            self.post(Offer(order, source=envelope.source))
        elif trouble is not None:
            self._hold(envelope, order, trouble)
        else:
            self._resolve(envelope, order, trust)

    def _resolve(self, envelope: Envelope, order: Order, trust: Trust) -> None:
        try:
            release, document = trust.release(order.bundle, order.version, order.release_sha256)
        except EdgeCascadeError as error:
            self._hold(envelope, order, error)
            return
        self.post(Offer(order, document, self.judge(release), envelope.source))

    def _hold(self, envelope: Envelope, order: Order, trouble: EdgeCascadeError) -> None:
        """Try again later: a few times where the answer is wrong, for ever without one.

        A disk that fails here is no answer.
        """
        answered = not isinstance(trouble, NetworkError | UpdateFailed)
        tries = envelope.tries + answered
        if tries > order.policy.retries:
            self.post(Offer(order, None, f"{_reason(trouble)}: {trouble}", envelope.source))
            return
        self.post(Held(order, _reason(trouble), str(trouble), envelope.source))
        self._again(replace(envelope, tries=tries))

    def _refused(self, envelope: Envelope, error: UpdateRefused) -> None:
        log.warning("an order is not obeyed: %s", error)
        said = said_order(envelope.data)
        name, seq, group = (said.order, said.seq, said.group) if said else ("", 0, "")
        self.post(Refusal(name, seq, error.reason, str(error), envelope.source, group))
        if error.reason in NOT_YET:
            self._again(envelope)

    def _again(self, envelope: Envelope) -> None:
        pause_s = min(envelope.pause_s, LONGEST_PAUSE_S)
        due = time.monotonic() + pause_s * random.uniform(0.75, 1.0)
        with self._changed:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(replace(envelope, due=due, pause_s=2 * pause_s))

    def _refresh(self, trusts: Sequence[Trust]) -> EdgeCascadeError | None:
        """Ask for news, since a key may have been revoked; what went wrong if there was no answer.

        Before each envelope, and not more often than once in `rest_s`: a flood of envelopes must
        not become a flood of questions.
        """
        with self._changed:
            left_s = self._asked_at + self.rest_s - time.monotonic()
            self._changed.wait_for(lambda: self._closing, max(0.0, left_s))
        self._asked_at = time.monotonic()
        self._current = None
        trouble: EdgeCascadeError = NetworkError("no repository is named; set `repository`")
        for trust in trusts:
            try:
                self.fresh_until = trust.refresh(time.time()).fresh_until
            except EdgeCascadeError as error:
                log.warning("repository: %s", error)
                trouble = error
                continue
            self._current = trust
            break
        reached = self._current is not None
        if trusts is self.trusts:
            self.outlook = Outlook(reached, "" if reached else f"{_reason(trouble)}: {trouble}")
            pause_s = self.refresh_s if reached else min(self.refresh_s, 60.0)
            self._next_refresh = time.monotonic() + pause_s * random.uniform(0.8, 1.0)
        return None if reached else trouble


def said_order(envelope: bytes) -> Order | None:
    """The order in an envelope, unproven; None for none."""
    if len(envelope) <= MAX_ENVELOPE_BYTES:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            return orders.unverified(envelope)
    return None


def _reason(error: EdgeCascadeError) -> str:
    return error.reason if isinstance(error, FleetError) else error.code
