# SPDX-License-Identifier: Apache-2.0
"""The one thread that touches a backend: it does what the scheduler decides (docs/scheduler.md).

A step: some requests leave, are parked or placed; one piece of one prompt; one token for each
running answer. While there is nothing to do, what later prompts will begin with is read ahead.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgecascade.backends.base import Array, Backend, Parked, Snapshot
from edgecascade.errors import (
    BackendError,
    DeadlineExceeded,
    EdgeCascadeError,
    InvalidRequest,
    Overloaded,
)
from edgecascade.sampling import Logits, SampleRow
from edgecascade.scheduler import (
    BACKGROUND,
    Arrangement,
    Decode,
    End,
    Limits,
    Park,
    Place,
    Prefill,
    Request,
    Scheduler,
)
from edgecascade.snapshots import CacheStats, Entry, Path, PrefixCache

log = logging.getLogger(__name__)

CLOSED = "the LLM is closed; load the bundle again"
INSIDE = "on_event must not wait for the LLM that calls it: submit(), or ask from another thread"
FORKED = "the LLM works in the process that this one was forked from; load the bundle here, too"
MAX_AHEAD = 16  # conversations whose next turn waits to be read ahead
AHEAD_AFTER_S = 0.02  # of rest: who asks again at once is not held up by it


class Job(Protocol):
    """A request as the engine sees it. What it is told comes on the engine's thread and must not
    block; `accepted` comes on the submitting one.
    """

    prompt: Array  # int32
    max_tokens: int  # 0: only prefill

    def accepted(self, id: int, ahead: int) -> None:
        """It is queued, and `ahead` others are before it; nothing else is told earlier."""

    def placed(self, cached_tokens: int) -> None:
        """It has a slot, and so many tokens of its prompt need no prefill."""

    def prefilled(self) -> None:
        """Its prompt is in."""

    def row(self) -> SampleRow:
        """How to sample its next token."""

    def accept(self, token: int, logprob: float, logits: Logits) -> int | None:
        """Take a token; the one to continue with, or None when the answer is complete."""

    def ended(self, reason: str, error: EdgeCascadeError | None) -> None:
        """It is over and its slot free: "done", "cancelled", "deadline", or "failed" with an
        error.
        """


class _Silent:
    """A job that makes no tokens."""

    max_tokens = 0

    def __init__(self, prompt: Array) -> None:
        self.prompt = prompt
        self.id = 0
        self.over = threading.Event()
        self.error: BaseException | None = None

    def accepted(self, id: int, ahead: int) -> None:
        """See Job."""
        self.id = id

    def placed(self, cached_tokens: int) -> None:
        """Nobody is told."""

    def prefilled(self) -> None:
        """Nobody is told."""

    def row(self) -> SampleRow:
        """Never asked."""
        raise BackendError("this job makes no tokens")

    def accept(self, token: int, logprob: float, logits: Logits) -> int | None:
        """Never told."""
        raise BackendError("this job makes no tokens")

    def ended(self, reason: str, error: EdgeCascadeError | None) -> None:
        """See Job."""
        self.error = error
        self.over.set()


class Preparation(_Silent):
    """A prompt that is read so that its state is kept."""


class Call(_Silent):
    """Something else to do with the backend between two steps, with room for some tokens."""

    def __init__(self, do: Callable[[Backend], Any], tokens: int) -> None:
        super().__init__(np.zeros(tokens, np.int32))
        self._do = do
        self._value: Any = None

    def perform(self, backend: Backend) -> None:
        """Do it."""
        try:
            self._value = self._do(backend)
        except Exception as error:  # noqa: BLE001  it belongs to the caller, who waits in `result`
            self.error = error
        self.over.set()

    def result(self) -> Any:
        """Wait for what it returned, or raise what it raised."""
        self.over.wait()
        if self.error is not None:
            raise self.error
        return self._value


@dataclass(frozen=True)
class EngineStats:
    """What is going on, and what went on so far."""

    running: int
    waiting: int
    parked: int
    ahead: int  # prompts to be read ahead
    steps: int
    decoded_tokens: int
    prefilled_tokens: int
    snapshots: int
    snapshot_bytes: int
    reuse: CacheStats

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, and nothing to be read ahead."""
        return not (self.running or self.waiting or self.parked or self.ahead)


@dataclass
class _Task:
    job: Job
    path: Path
    end: int  # of what is to be read of the prompt
    reuse: bool
    keep: frozenset[int] = frozenset()  # cuts at which to keep the state
    read: int = 0  # tokens of the prompt, up to a cut
    parked: Parked | None = None
    token: int = 0  # to be fed next


class Engine:
    """Runs jobs on a backend. All methods may be called from any thread."""

    def __init__(self, backend: Backend, cache: PrefixCache, limits: Limits) -> None:
        self._backend = backend
        self._cache = cache
        self._scheduler = Scheduler(limits)
        self._tasks: dict[int, _Task] = {}
        self._ids = itertools.count(1)
        self._ahead: deque[Callable[[], Array]] = deque(maxlen=MAX_AHEAD)
        self._reading_ahead: tuple[int, bytes] | None = None  # a job, and the key of its end
        self._at_hand: tuple[bytes, Parked] | None = None  # a kept state that need not be restored
        self._make_locks()
        # Not started before it is needed: until then a process may fork.
        self._thread: threading.Thread | None = None
        self._accepting: threading.Thread | None = None  # who tells a job that it is accepted
        self._closed: str | None = None  # why nothing is taken any more
        self._steps = self._decoded = self._prefilled = 0
        self._worked_at = 0.0  # when there was something to do

    def submit(
        self,
        job: Job,
        *,
        priority: int = 1,
        client: str = "",
        deadline_s: float | None = None,
        reuse: bool = True,
        wait: bool = False,
    ) -> int:
        """Queue a job; its id. `deadline_s` counts from now; `wait` rather than be refused.

        Without `reuse` it neither starts from a kept state nor leaves one.

        Raises:
            Overloaded: when the queue is full.
            ContextExceeded: when prompt and answer cannot fit.
            DeadlineExceeded: when the time was up before there was room.
            InvalidRequest: when a callback wants to wait.
            BackendError: when the engine is closed.
        """
        if wait:
            self.check_may_wait()
        if isinstance(job, Call):
            path = Path(job.prompt, (len(job.prompt),), ())
        else:
            path = self._cache.rule.path(job.prompt)
        cuts = path.cuts
        # Without an answer to make, what follows the last state worth keeping need not be read.
        pieces = cuts if job.max_tokens or len(cuts) == 1 else cuts[:-1]
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        with self._wake:
            id = next(self._ids)
            if reuse:
                self._overtake(path)
            request = Request(id, pieces, job.max_tokens, priority, client, deadline)
            ahead = self._enqueue(request, wait=wait)
            self._tasks[id] = _Task(job, path, pieces[-1], reuse and not isinstance(job, Call))
            outer, self._accepting = self._accepting, threading.current_thread()
            try:
                job.accepted(id, ahead)
            except BaseException:
                self._scheduler.finished(id, time.monotonic())
                del self._tasks[id]
                raise
            finally:
                self._accepting = outer
            self._begin()
        return id

    def check_may_wait(self) -> None:
        """Nothing goes on while a callback runs, so what it waits for would never come.

        Raises:
            InvalidRequest: inside of one.
            BackendError: in a forked child, where nothing goes on at all.
        """
        if self._closed is FORKED:
            raise BackendError(FORKED)
        if threading.current_thread() in (self._thread, self._accepting):
            raise InvalidRequest(INSIDE)

    def cancel(self, id: int) -> None:
        """End a job at the next step; nothing happens if it is over."""
        with self._wake:
            if self._scheduler.cancel(id):
                self._wake.notify()

    def call(self, do: Callable[[Backend], Any], *, tokens: int = 1) -> Any:
        """Do something with the backend between two steps, with room for so many more tokens."""
        call = Call(do, tokens)
        self.submit(call, wait=True)
        return call.result()

    def prepare(self, tokens: Array, *, priority: int = BACKGROUND) -> Preparation:
        """Read a prompt that is likely to be asked, by default while nothing else is to be done."""
        job = Preparation(tokens)
        self.submit(job, priority=priority, wait=priority < BACKGROUND)
        return job

    def read_ahead(self, tokens: Callable[[], Array]) -> None:
        """Keep the state after the beginning of a later prompt, once nothing else is to be done.

        `tokens` is called then, on the engine's thread. The latest goes first, and takes the place
        of the oldest where there are too many.
        """
        with self._wake:
            if self._closed is None and self._cache.max_bytes:
                self._ahead.append(tokens)
                self._begin()

    def kept(self, tokens: Array) -> Snapshot | None:
        """The longest kept state along these tokens."""

        def find(backend: Backend) -> Snapshot | None:
            entry = self._cache.find(self._cache.rule.path(tokens))
            return None if entry is None else entry.snapshot  # entries change with their cache

        state: Snapshot | None = self.call(find)
        return state

    def keep(self, tokens: Array, snapshot: Snapshot) -> bool:
        """Take over a state; False when there is no room for it.

        Raises:
            SnapshotError: when the backend keeps keys and values of another type.
        """
        snapshot.check(self._backend.kv_type)
        return bool(self.call(lambda _: self._cache.put(self._cache.rule.path(tokens), snapshot)))

    def stats(self) -> EngineStats:
        """Counters."""
        with self._wake:
            scheduler, cache = self._scheduler, self._cache
            return EngineStats(
                scheduler.running,
                scheduler.waiting,
                scheduler.parked,
                len(self._ahead),
                self._steps,
                self._decoded,
                self._prefilled,
                len(cache),
                cache.nbytes,
                CacheStats(**vars(cache.stats)),
            )

    def close(self) -> None:
        """Fail every job and stop the thread; the backend stays open.

        Raises:
            InvalidRequest: inside of `accepted`, which the thread waits for.
        """
        if threading.current_thread() is self._accepting:
            raise InvalidRequest(INSIDE)
        with self._wake:
            self._closed = self._closed or CLOSED
            self._wake.notify_all()
            self._room.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def orphan(self) -> None:
        """In a forked child: the thread is the parent's, and who held the locks is not here."""
        self._make_locks()
        self._thread = self._accepting = None
        self._closed = FORKED

    def _make_locks(self) -> None:
        lock = threading.RLock()  # a callback may cancel or submit
        self._wake = threading.Condition(lock)  # for the engine: there is something to do
        self._room = threading.Condition(lock)  # for who waits to submit: the queue got shorter

    def _begin(self) -> None:
        """Wake the thread, which is only started now."""
        if self._thread is None:
            name = "edgecascade-engine"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
            _RUNNING.add(self)
        self._wake.notify()

    def _overtake(self, path: Path) -> None:
        """Whoever asks for what is being read ahead goes on where that is."""
        if self._reading_ahead is not None and self._reading_ahead[1] in path.keys:
            self._scheduler.cancel(self._reading_ahead[0])

    def _enqueue(self, request: Request, *, wait: bool) -> int:
        while True:
            if self._closed is not None:
                raise BackendError(self._closed)
            now = time.monotonic()
            if request.deadline_s is not None and now >= request.deadline_s:
                raise DeadlineExceeded("the time was up before the request was queued")
            try:
                return self._scheduler.submit(request, now)
            except Overloaded:
                if not wait:
                    raise
            self._room.wait(None if request.deadline_s is None else request.deadline_s - now)

    def _run(self) -> None:
        try:
            while self._step():
                pass
            self._end_all(BackendError(CLOSED))
        except Exception as error:
            log.exception("the engine stopped")
            with self._wake:
                self._closed = CLOSED
                self._room.notify_all()
            failure = BackendError(f"the engine stopped: {error!r}; load the bundle again")
            self._end_all(failure)

    def _step(self) -> bool:
        """One step, or a wait for the next; False once closed."""
        with self._wake:
            if self._closed:
                return False
            arrangement = self._scheduler.arrange(time.monotonic())
        if arrangement.ends or arrangement.parks or arrangement.places:
            self._perform(arrangement)
        with self._wake:
            work = self._scheduler.work()
            if work is None and not self._rested():
                return True
        if work is None:
            self._read_ahead(self._ahead[-1])
            return True
        self._steps += 1
        self._worked_at = time.monotonic()
        if work.prefill:
            self._do_prefill(work.prefill)
        if work.decode:
            self._do_decode(work.decode)
        return True

    def _rested(self) -> bool:
        """Sleep until there is something to do; True when it is to read ahead."""
        if self._closed or self._scheduler.has_changed:
            return False
        deadline, now = self._scheduler.next_deadline(), time.monotonic()
        if self._ahead:
            due = self._worked_at + AHEAD_AFTER_S
            if now >= due:
                return True
            deadline = due if deadline is None else min(due, deadline)
        self._wake.wait(None if deadline is None else max(deadline - now, 0))
        return False

    def _read_ahead(self, tokens: Callable[[], Array]) -> None:
        """Queue the preparation of a later prompt, unless its state is kept."""
        try:
            path = self._cache.rule.path(tokens())
            if len(path.cuts) > 1 and not self._cache.has(path.upto(path.cuts[-2])):
                job = self.prepare(path.tokens)
                self._reading_ahead = job.id, path.keys[-2]
        except EdgeCascadeError as error:
            log.debug("a prompt is not read ahead: %s", error)
        except Exception:
            log.exception("a prompt could not be read ahead")
        finally:
            with self._wake, suppress(ValueError):  # too many newer ones
                self._ahead.remove(tokens)

    def _perform(self, arrangement: Arrangement) -> None:
        for end in arrangement.ends:
            self._end(end)
        for park in arrangement.parks:
            self._park(park)
        for place in arrangement.places:
            self._place(place)
        with self._room:
            self._room.notify_all()

    def _end(self, end: End) -> None:
        task = self._forget(end.id)
        if end.slot is not None:
            self._leave(task, end.slot)
        self._tell(task.job, end.reason, None)

    def _forget(self, id: int) -> _Task:
        """A task that is over, with what it left in the backend when it was parked."""
        task = self._tasks.pop(id)
        if task.parked is not None:
            self._backend.drop(task.parked)
        return task

    def _park(self, park: Park) -> None:
        try:
            self._tasks[park.id].parked = self._backend.park(park.slot)
        except Exception as error:  # noqa: BLE001  a failing device must not end the thread
            self._fail(park.id, error, None)
            self._reset(park.slot)

    def _place(self, place: Place) -> None:
        task = self._tasks.get(place.id)
        if task is None:  # it failed while being parked
            return
        try:
            if place.resumed:
                parked, task.parked = task.parked, None
                assert parked is not None
                self._backend.resume(place.slot, parked)
                return
            task.read = reused = self._reuse(place.slot, task) if task.reuse else 0
            task.job.placed(reused)
        except Exception as error:  # noqa: BLE001  a failing device must not end the thread
            self._fail(place.id, error, place.slot)
            return
        with self._wake:
            self._scheduler.reused(place.id, reused)
        if reused >= task.end:
            self._finish([(place.id, place.slot)])

    def _reuse(self, slot: int, task: _Task) -> int:
        """Fill the slot from the longest kept prefix of the prompt; how many tokens that saved."""
        with self._cache.longest(task.path) as entry:
            reused = 0 if entry is None else len(entry.tokens)
            if entry is not None:
                try:
                    self._restore(slot, entry)
                except Exception:
                    log.exception("a kept state could not be restored; the prompt is read instead")
                    self._backend.reset(slot)
                    reused = 0
        task.keep = self._cache.worth_keeping(task.path, reused)
        return reused

    def _restore(self, slot: int, entry: Entry) -> None:
        if self._at_hand is not None and self._at_hand[0] == entry.key:
            parked, self._at_hand = self._at_hand[1], None
            self._backend.resume(slot, parked)
        else:
            self._backend.restore(slot, entry.snapshot)

    def _leave(self, task: _Task, slot: int) -> None:
        """Empty a slot. What was read ahead stays at hand: it is asked for next."""
        if not isinstance(task.job, Preparation) or not task.read:
            self._reset(slot)
            return
        path = task.path.upto(task.read)
        self._keep(path, slot)
        entry = self._cache.find(path)
        if entry is None or entry.key != path.keys[-1]:
            self._reset(slot)
            return
        try:
            self._at_hand = entry.key, self._backend.park(slot, entry.snapshot)
        except Exception:
            log.exception("a kept state could not stay in its slot")
            self._reset(slot)

    def _do_prefill(self, piece: Prefill) -> None:
        task = self._tasks[piece.id]
        job = task.job
        if isinstance(job, Call):
            job.perform(self._backend)
            self._finish([(piece.id, piece.slot)])
            return
        try:
            logits = self._backend.prefill(piece.slot, job.prompt[piece.begin : piece.end])
            self._prefilled += piece.end - piece.begin
            task.read = piece.end
            if piece.end in task.keep:
                self._keep(task.path.upto(piece.end), piece.slot)
            with self._wake:
                self._scheduler.prefilled(piece.id, piece.end)
            if piece.end < task.end:
                return
            job.prefilled()
        except Exception as error:  # noqa: BLE001  a failing device must not end the thread
            self._fail(piece.id, error, piece.slot)
            return
        if job.max_tokens == 0:
            self._finish([(piece.id, piece.slot)])
        else:
            self._sample((piece.id,), (piece.slot,), logits[None])

    def _keep(self, path: Path, slot: int) -> None:
        """Keep a slot's state for later prompts; a failure costs them time, this one nothing."""
        try:
            if not self._cache.has(path):
                self._cache.put(path, self._backend.save(slot))
        except Exception:
            log.exception("a state could not be kept")

    def _do_decode(self, decode: Decode) -> None:
        tokens = [self._tasks[id].token for id in decode.ids]
        try:
            logits = self._backend.decode(decode.slots, tokens)
        except Exception as error:  # noqa: BLE001  a failing device must not end the thread
            for id, slot in zip(decode.ids, decode.slots, strict=True):
                self._fail(id, error, slot)
            return
        self._decoded += len(tokens)
        with self._wake:
            for id in decode.ids:
                self._scheduler.grew(id)
        self._sample(decode.ids, decode.slots, logits)

    def _sample(self, ids: Sequence[int], slots: Sequence[int], logits: Logits) -> None:
        """A token for each row of logits, handed to its job."""
        done = []
        for at, drawn in enumerate(self._draw(ids, logits)):
            id, slot = ids[at], slots[at]
            task = self._tasks[id]
            try:
                if isinstance(drawn, Exception):
                    raise drawn
                token = task.job.accept(*drawn, logits[at])
            except Exception as error:  # noqa: BLE001  one job's failure is not its neighbours'
                self._fail(id, error, slot)
                continue
            if token is None:
                done.append((id, slot))
            else:
                task.token = token
        if done:
            self._finish(done)

    def _draw(self, ids: Sequence[int], logits: Logits) -> list[tuple[int, float] | Exception]:
        """A token and its log probability for each row, or the error of that row alone."""
        rows = [self._tasks[id].job.row() for id in ids]
        try:
            return list(self._backend.sample(logits, rows))
        except Exception as error:  # noqa: BLE001  a failing row must not end its neighbours
            if len(rows) == 1:
                return [error]
        drawn: list[tuple[int, float] | Exception] = []
        for at, row in enumerate(rows):
            try:
                drawn += self._backend.sample(logits[at : at + 1], [row])
            except Exception as error:  # noqa: BLE001  handed to the job it belongs to
                drawn.append(error)
        return drawn

    def _finish(self, done: Sequence[tuple[int, int]]) -> None:
        for id, slot in done:
            task = self._tasks.pop(id)
            self._leave(task, slot)
            with self._wake:
                self._scheduler.finished(id, time.monotonic())
            if not isinstance(task.job, Call):
                self._tell(task.job, "done", None)

    def _fail(self, id: int, error: Exception, slot: int | None) -> None:
        """End a job with an error, and go on with the others."""
        if not isinstance(error, EdgeCascadeError):
            log.error("a step failed", exc_info=error)
            error = BackendError(f"a step failed: {error!r}")
        if slot is not None:
            self._reset(slot)
        task = self._tasks.pop(id)
        with self._wake:
            self._scheduler.finished(id, time.monotonic())
        self._tell(task.job, "failed", error)

    def _reset(self, slot: int) -> None:
        try:
            self._backend.reset(slot)
        except Exception:
            log.exception("slot %d could not be emptied", slot)

    def _tell(self, job: Job, reason: str, error: EdgeCascadeError | None) -> None:
        try:
            job.ended(reason, error)
        except Exception:
            log.exception("a job could not be told that it was %s", reason)

    def _end_all(self, error: EdgeCascadeError) -> None:
        with self._wake:
            ids = self._scheduler.ids
            now = time.monotonic()
            for id in ids:
                self._scheduler.finished(id, now)
        for id in ids:
            self._tell(self._forget(id).job, "failed", error)


_RUNNING: weakref.WeakSet[Engine] = weakref.WeakSet()


def _orphan_all() -> None:
    for engine in list(_RUNNING):
        engine.orphan()


os.register_at_fork(after_in_child=_orphan_all)


@atexit.register
def _close_all() -> None:
    """The library must not be computing while the process takes it down."""
    for engine in list(_RUNNING):
        engine.close()
