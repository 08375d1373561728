# SPDX-License-Identifier: Apache-2.0
"""A submitted request: a job of the engine on one side, its caller's handle on the other."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field, fields
from functools import cache, partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from edgecascade.backends.base import Array
from edgecascade.completion import Accepted, Completion, Event, Failure, Piece
from edgecascade.errors import (
    BackendError,
    DeadlineExceeded,
    EdgeCascadeError,
    InvalidRequest,
)
from edgecascade.sampling import Logits, SampleRow
from edgecascade.scheduler import BACKGROUND
from edgecascade.sequence import Running

if TYPE_CHECKING:
    from edgecascade.engine import Engine


@dataclass(frozen=True)
class Queueing:
    """How a request is queued.

    `priority`: lower runs first, and may interrupt what is higher. `client`: those who ask take
    turns. `deadline_s`: from `since`, which time.monotonic() tells and is now if not given; what is
    not done by then ends as it is. `reuse` False: neither start from a kept state nor leave one.
    `read_ahead` False: do not read a conversation's answer for its next turn.
    """

    priority: int = 1
    client: str = ""
    deadline_s: float | None = None
    reuse: bool = True
    read_ahead: bool = True
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise InvalidRequest(f"priority is {self.priority!r}; it must be an integer")
        if self.priority >= BACKGROUND:
            raise InvalidRequest(
                f"priority is {self.priority}; from {BACKGROUND} on it is what the library does "
                "in the background: give less"
            )
        if not isinstance(self.client, str):
            raise InvalidRequest(f"client is {self.client!r}; it must be a string")
        late = self.deadline_s
        if late is not None and not (isinstance(late, int | float) and 0 < late < 1e9):
            raise InvalidRequest(f"deadline_s is {late!r}; it must be seconds above 0")
        for name in ("reuse", "read_ahead"):
            if not isinstance(getattr(self, name), bool):
                value = getattr(self, name)
                raise InvalidRequest(f"{name} is {value!r}; it must be True or False")
        since = self.since
        if isinstance(since, bool) or not isinstance(since, int | float) or not since < math.inf:
            raise InvalidRequest(f"since is {since!r}; give a time of time.monotonic()")

    def left_s(self) -> float | None:
        """Seconds until the deadline, below 0 after it."""
        late = self.deadline_s
        return None if late is None else self.since + late - time.monotonic()

    @classmethod
    @cache
    def names(cls) -> frozenset[str]:
        """What a caller may give by keyword."""
        return frozenset(field.name for field in fields(cls))


class Ticket:
    """A request under way. `on_event` is told Accepted, pieces, then a Completion or a Failure.

    Accepted comes on the submitting thread, the rest on the engine's: it must not block. `owner` is
    kept alive until then. `goes_on` says with which tokens the next turn begins after an answer.
    """

    def __init__(
        self,
        engine: Engine,
        running: Running,
        on_event: Callable[[Event], None] | None = None,
        *,
        owner: object = None,
        goes_on: Callable[[Completion], Array] | None = None,
    ) -> None:
        self.prompt: Array = running.prompt.tokens
        self.max_tokens = running.room
        self._engine = engine
        self._owner, self._goes_on = owner, goes_on
        self._running = running
        self._tell = on_event or _ignore
        self._id: int | None = None
        self._placed = self._cancelled = False
        self._over = threading.Event()
        self._completion: Completion | None = None  # known, but not told yet
        self._outcome: Completion | Failure | None = None

    def submit(self, how: Queueing, *, wait: bool) -> Ticket:
        """Queue it; `wait` for room in the queue rather than be refused."""
        if not (how.reuse and how.read_ahead):
            self._goes_on = None
        self._engine.submit(
            self,
            priority=how.priority,
            client=how.client,
            deadline_s=how.left_s(),
            reuse=how.reuse,
            wait=wait,
        )
        return self

    def cancel(self) -> None:
        """End it at the next token, with the text so far; nothing happens if it is over."""
        self._cancelled = True
        if self._id is not None:
            self._engine.cancel(self._id)

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for the completion, or raise what it failed with.

        Raises:
            TimeoutError: when it goes on after `timeout_s`.
            InvalidRequest: when a callback wants to wait.
            BackendError: in a forked child of the process that asked.
        """
        if not self.done:
            self.check_may_wait()
        if not self._over.wait(timeout_s):
            raise TimeoutError(f"the request goes on after {timeout_s} s")
        if isinstance(self._outcome, Completion):
            return self._outcome
        raise self._outcome.error if self._outcome else BackendError("the request has no outcome")

    def check_may_wait(self) -> None:
        """See Engine."""
        self._engine.check_may_wait()

    def accepted(self, id: int, ahead: int) -> None:
        """See Job."""
        self._id = id
        self._tell(Accepted(ahead))
        if self._cancelled:  # while it waited for room in the queue
            self._engine.cancel(id)

    def placed(self, cached_tokens: int) -> None:
        """See Job."""
        self._placed = True
        self._running.admit(cached_tokens)

    def prefilled(self) -> None:
        """See Job."""
        self._running.prefilled()

    def row(self) -> SampleRow:
        """See Job."""
        return self._running.row()

    def accept(self, token: int, logprob: float, logits: Logits) -> int | None:
        """See Job."""
        piece = self._running.accept(token, logprob, logits)
        self._tell(piece)
        self._completion = piece.completion
        return None if piece.completion else piece.token_ids[-1]

    def ended(self, reason: str, error: EdgeCascadeError | None) -> None:
        """See Job."""
        if error is not None:
            self._end(Failure(error))
        elif self._completion is not None:
            self._end(self._completion)
        elif reason == "deadline" and not self._placed:
            self._end(Failure(DeadlineExceeded("the time was up while the request was queued")))
        else:
            piece = self._running.stop("deadline" if reason == "deadline" else "cancelled")
            assert piece.completion is not None
            self._end(piece.completion, piece)

    def _end(self, outcome: Completion | Failure, *before: Event) -> None:
        self._outcome = outcome
        self._over.set()  # first: a listener that fails must not keep others waiting
        for event in (*before, outcome):
            self._tell(event)
        if self._goes_on and isinstance(outcome, Completion) and outcome.finished:
            self._engine.read_ahead(partial(self._goes_on, outcome))


def pieces(
    ticket: Ticket, how: Queueing, events: SimpleQueue[Event]
) -> Generator[Piece, None, None]:
    """Submit a ticket whose events arrive in a queue, and yield its pieces as they come."""
    ticket.submit(how, wait=True)
    try:
        while not isinstance(event := events.get(), Completion):
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, Piece):
                yield event
            if events.empty():
                ticket.check_may_wait()
    finally:
        ticket.cancel()


async def apieces(
    make: Callable[[Callable[[Event], None]], Ticket], how: Queueing
) -> AsyncGenerator[Piece, None]:
    """As pieces(), without blocking the event loop."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def tell(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody listens any more
            ticket.cancel()

    ticket = make(tell)
    try:
        await asyncio.to_thread(ticket.submit, how, wait=True)
        while not isinstance(event := await events.get(), Completion):
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, Piece):
                yield event
    finally:
        ticket.cancel()


def _ignore(event: Any) -> None:
    pass
