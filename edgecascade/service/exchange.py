# SPDX-License-Identifier: Apache-2.0
"""A client's side of one request: when to send it again, to whom, and which stream to believe.

Pure: replies and time in; what to send and what to show out. The same id is sent until the final
comes or the deadline passes: a device that knows it answers the retry without running it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgecascade.errors import Cancelled, DeadlineExceeded, EdgeCascadeError, RemoteError
from edgecascade.service.parameters import Problem
from edgecascade.service.replies import Chunk, Failed, Final, Part, Queued, Reply, Status

ACKNOWLEDGE_S = 2.0  # without a word for so long, send it again, elsewhere if there is a choice
STALL_S = 5.0  # the same after a word
ABSENT_S = 0.5  # nobody listens: the device may be about to come back
GRACE_S = 1.0  # a device's own word on the deadline may take so long
MAX_STREAM = 16 << 20  # characters; a million tokens have fewer
MAX_ENGINE_ERRORS = 3  # an error that comes back each time is no accident
NO_MATCHING_SUBSCRIBERS = 0x10


@dataclass(frozen=True)
class Send:
    """Publish the request: to a device, or to the pool where there is none yet."""

    device: str | None
    remaining_s: float


@dataclass(frozen=True)
class Shown:
    """What to show. `restart` voids what was shown before: the run that it came from was lost."""

    text: str = ""
    reasoning: str = ""
    restart: bool = False


@dataclass
class _Run:
    """One generation at one device: its stream is trusted as long as it has no hole."""

    device: str = ""
    number: int = -1
    next_seq: int = 0
    whole: bool = True
    text: str = ""
    reasoning: str = ""


@dataclass
class Exchange:
    """One request until its last word. `choose` names a device, given those to avoid."""

    deadline: float
    choose: Callable[[frozenset[str]], str | None]
    device: str | None = None
    pool: bool = False
    over: bool = False
    final: dict[str, Any] | None = None
    answered_by: str = ""
    error: EdgeCascadeError | None = None
    sends: int = 0
    due: float = 0.0
    cancelled: bool = False
    _fixed: bool = False
    _avoid: set[str] = field(default_factory=set)
    _asked: set[str] = field(default_factory=set)
    _boot: int | None = None
    _run: _Run = field(default_factory=_Run)
    _shown: str = ""
    _shown_reasoning: str = ""
    _parts: dict[int, str] = field(default_factory=dict)
    _torn: bool = False  # an answer came without some of its parts
    _engine_errors: int = 0
    _last: str = "nothing was heard"

    def __post_init__(self) -> None:
        self._fixed = self.device is not None

    def step(self, now: float, *, away: str | None = None) -> Send | None:
        """What to send now, if anything; `due` says when to ask again.

        `away`: why there is no connection, None where there is one.
        """
        if now > self.deadline + GRACE_S:
            self._end(error=DeadlineExceeded(f"no answer within the deadline; {self._last}"))
        self.take_back(now)
        if self.over or now < self.due:
            return None
        if away is not None or now >= self.deadline:
            self._last = self._last if away is None else f"the broker cannot be reached ({away})"
            self.due = min(now + ABSENT_S, self.deadline + GRACE_S + 0.01)
            return None
        if self.device is None and not self.pool:
            self.device = self.choose(frozenset(self._avoid))
            if self.device is None and self._avoid:
                self._avoid.clear()
                self.device = self.choose(frozenset())
            if self.device is None:
                self._last = "no device says that it accepts requests"
                self.due = now + ABSENT_S
                return None
        self.due = now + ACKNOWLEDGE_S
        if self.cancelled and self.device is None:
            return None  # whoever of the pool has it will say so
        self.sends += 1
        if self.device is not None:
            self._asked.add(self.device)
        return Send(self.device, self.deadline - now)

    def take_back(self, now: float) -> None:
        """End at once if it is cancelled and no device can have it."""
        if self.cancelled and not (self.sends and (self.device or self.pool)):
            self.fail(Cancelled("the request was taken back before a device had begun to answer"))

    def hear(self, device: str, reply: Reply, now: float) -> Shown | None:
        """A reply to this request; what to show of it."""
        if self.over or not (device in self._asked or (self.pool and not self._fixed)):
            return None  # an id may be known to others: only who was asked has a word
        found = self.pool and self.device is None and not isinstance(reply, Failed)
        if found:
            self.device = device
        shown = self._hear(device, reply, now)
        if found and self.cancelled:
            self.due = now  # only now it is known whom to tell
        return shown

    def _hear(self, device: str, reply: Reply, now: float) -> Shown | None:
        if isinstance(reply, Final):
            return self._final(device, reply, now)
        if device != self.device and not (self.pool and self.device is None):
            return None  # of a device that was given up
        match reply:
            case Queued():
                self._last = f"{device} has it queued"
                self.due = now + STALL_S
            case Part():
                self._parts[reply.part] = reply.text
                self.due = now + STALL_S
            case Failed(problem):
                self._failed(device, problem, now)
            case Chunk():
                self.due = now + STALL_S
                self._last = f"{device} has begun to answer"
                return self._chunk(device, reply)
        return None

    def seen(self, device: str, status: Status, now: float) -> None:
        """A device's state changed."""
        if device != self.device:
            return
        if status.status == "offline" and (self._boot is None or status.boot >= self._boot):
            self._last = f"{device} is offline"
            self._elsewhere(device)
            self.due = now if not self._fixed else self.due
        elif self._boot is not None and status.boot != self._boot and status.status != "offline":
            self.due = now  # restarted, perhaps without its counter: it has forgotten
        if status.status != "offline":
            self._boot = status.boot

    def sent(self, reason: int, now: float) -> None:
        """The broker's word on what was sent."""
        if reason == NO_MATCHING_SUBSCRIBERS:
            self._last = f"{self.device or 'the pool'} does not listen"
            if self.device is not None:
                self._elsewhere(self.device)
            self.due = min(self.due, now + ABSENT_S)
        elif reason >= 0x80:
            message = (
                f"the broker refuses the request with reason 0x{reason:02x}; check its ACL, and "
                "that the client id is the name of the user or of the certificate"
            )
            self._end(error=RemoteError(message, status=403, reason="denied", param=None))

    def connected(self, now: float) -> None:
        """The connection is new: what was sent before may be lost."""
        self.due = now

    def fail(self, error: EdgeCascadeError) -> None:
        """Nothing can come any more."""
        if not self.over:
            self._end(error)

    def _elsewhere(self, device: str) -> None:
        if not self._fixed:
            self._avoid.add(device)
            self.device = None

    def _final(self, device: str, final: Final, now: float) -> Shown | None:
        if final.parts:
            joined = final.with_choice(self._parts)
            if joined is None:  # a part is missing: the retry brings all of them again
                self._parts.clear()
                self._last = f"parts of {device}'s answer were lost"
                self.due = now + ACKNOWLEDGE_S * self._torn
                self._torn = True
                return None
            final = joined
        self.final, self.answered_by = final.body, device
        message = final.body["choices"][0]["message"]
        text = str(message.get("content") or "")
        reasoning = str(message.get("reasoning_content") or "")
        self._end()
        return self._show(text, reasoning)

    def _failed(self, device: str, problem: Problem, now: float) -> None:
        if self.cancelled and problem.code == "not_found":
            return  # it began anew, and forgot: the retry, which is cancelled at once, ends it
        retryable = problem.retryable or problem.status in (429, 503)
        self._engine_errors += problem.status >= 500 and problem.status != 503
        if problem.code == "deadline_exceeded":
            self._end(error=DeadlineExceeded(f"{device}: {problem.message}"))
            return
        if not retryable or self._engine_errors >= MAX_ENGINE_ERRORS:
            self._end(
                error=RemoteError(
                    f"{device}: {problem.message}",
                    status=problem.status,
                    reason=problem.code,
                    param=problem.param,
                )
            )
            return
        self._last = f"{device} says {problem.code}: {problem.message}"
        self._run = _Run()
        self._elsewhere(device)
        pause_s = 1.0 if problem.retry_after_ms is None else problem.retry_after_ms / 1000
        if not (self._fixed or self.pool or self.choose(frozenset(self._avoid)) is None):
            pause_s = min(pause_s, ABSENT_S)  # another one may have room
        self.due = now + pause_s

    def _chunk(self, device: str, chunk: Chunk) -> Shown | None:
        run = self._run
        if (device, chunk.run) != (run.device, run.number):
            run = self._run = _Run(device, chunk.run, whole=chunk.seq == 0)
        held = len(run.text) + len(run.reasoning) + len(chunk.text) + len(chunk.reasoning)
        if not run.whole or chunk.seq != run.next_seq or held > MAX_STREAM:
            run.whole = False  # a hole, or no end: nothing more is believed until the final
            return None
        run.next_seq += 1
        run.text += chunk.text
        run.reasoning += chunk.reasoning
        if not (
            run.text.startswith(self._shown) and run.reasoning.startswith(self._shown_reasoning)
        ):
            return None  # behind what an earlier run has shown, or different: the final tells
        return self._show(run.text, run.reasoning)

    def _show(self, text: str, reasoning: str) -> Shown | None:
        """What is to be added to what was shown so that it becomes this."""
        old, old_reasoning = self._shown, self._shown_reasoning
        self._shown, self._shown_reasoning = text, reasoning
        if not (text.startswith(old) and reasoning.startswith(old_reasoning)):
            return Shown(text, reasoning, restart=True)
        shown = Shown(text[len(old) :], reasoning[len(old_reasoning) :])
        return shown if shown != Shown() else None

    def _end(self, error: EdgeCascadeError | None = None) -> None:
        self.over, self.error = True, error
