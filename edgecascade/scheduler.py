# SPDX-License-Identifier: Apache-2.0
"""Who runs next: a state machine without threads, clock or backend (docs/scheduler.md).

What happens is told by `submit`, `cancel`, `reused`, `prefilled`, `grew` and `finished`; what to do
is asked for in two parts, once per step: `arrange` says who gets which slot, `work` what the slots
compute.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edgecascade.errors import ContextExceeded, InvalidRequest, Overloaded

BACKGROUND = 1 << 30  # the priority of work that runs only while there is none other
MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0


@dataclass(frozen=True)
class Limits:
    """What there is to share out. `promise_tokens`: room that a growing answer is given ahead."""

    slots: int
    kv_tokens: int  # for all slots together
    max_context: int
    page_tokens: int = 64
    promise_tokens: int = 512
    max_queue: int = 256
    max_queue_per_client: int = 64
    max_parked: int = 16

    def __post_init__(self) -> None:
        for name in ("slots", "kv_tokens", "max_context", "page_tokens", "promise_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.room(self.max_context) > self.kv_tokens:
            raise InvalidRequest(
                f"kv_tokens is {self.kv_tokens}; one context of {self.max_context} tokens must fit"
            )

    def room(self, tokens: int) -> int:
        """The tokens of the pages that `tokens` tokens occupy."""
        return -(-tokens // self.page_tokens) * self.page_tokens


@dataclass(frozen=True)
class Request:
    """A prompt to prefill and an answer to decode.

    `cuts` are the ends of the prompt's pieces, the last one its length.
    """

    id: int
    cuts: tuple[int, ...]
    max_tokens: int  # 0: only prefill
    priority: int = 1  # lower runs first
    client: str = ""
    deadline_s: float | None = None  # on the clock that `now` comes from

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.cuts[-1]

    @property
    def total_tokens(self) -> int:
        """What its slot holds at most: the last token of an answer is never fed back."""
        return self.prompt_tokens + max(self.max_tokens, 1) - 1


@dataclass(frozen=True)
class End:
    """A request is over before its answer is."""

    id: int
    slot: int | None
    reason: str  # "cancelled" or "deadline"


@dataclass(frozen=True)
class Park:
    """Save the slot's state; somebody else gets the slot."""

    id: int
    slot: int


@dataclass(frozen=True)
class Place:
    """Give a request a slot: empty, or with the state it was parked with."""

    id: int
    slot: int
    resumed: bool


@dataclass(frozen=True)
class Arrangement:
    """To be done in this order."""

    ends: tuple[End, ...]
    parks: tuple[Park, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Prefill:
    """Append the prompt's tokens [begin, end)."""

    id: int
    slot: int
    begin: int
    end: int


@dataclass(frozen=True)
class Decode:
    """Append one token to each of these."""

    ids: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """At most one piece of one prompt, then one token for every running answer that is not less
    urgent.
    """

    prefill: Prefill | None
    decode: Decode | None


@dataclass(eq=False)
class _Sequence:
    """A request with what became of it so far."""

    request: Request
    order: int  # of arrival
    slot: int | None = None
    held: int = 0  # tokens in its state
    promised: int = 0  # tokens its pages may grow to
    served: int = 0  # when it last got a piece, in steps
    started_s: float = 0.0

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first, and is preempted last."""
        return self.request.priority, self.order

    @property
    def prefilling(self) -> bool:
        return self.held < self.request.prompt_tokens

    @property
    def background(self) -> bool:
        return self.request.priority >= BACKGROUND


class Scheduler:
    """Continuous batching over slots: priorities, deadlines, fair clients, no broken promises."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._all: dict[int, _Sequence] = {}
        self._waiting: dict[int, OrderedDict[str, deque[_Sequence]]] = {}  # priority -> client
        self._parked: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self._free_room = limits.kv_tokens // limits.page_tokens * limits.page_tokens
        self._cancelled: list[int] = []
        self._changed = True  # something may be placed, parked or ended
        self._deadline_s = math.inf  # the earliest
        self._orders = 0
        self._steps = 0
        self._service_s = 1.0  # mean time that a request holds a slot
        self._decode: Decode | None = None

    def submit(self, request: Request, now: float) -> int:
        """Queue a request: how many are before it.

        Raises:
            Overloaded: when the queue, or this client's share of it, is full.
            ContextExceeded: when it can never fit.
        """
        self._check(request)
        ahead = sum(
            len(queue)
            for priority, clients in self._waiting.items()
            if priority <= request.priority
            for queue in clients.values()
        )
        sequence = _Sequence(request, self._orders)
        self._orders += 1
        self._all[request.id] = sequence
        clients = self._waiting.setdefault(request.priority, OrderedDict())
        clients.setdefault(request.client, deque()).append(sequence)
        if request.deadline_s is not None:
            self._deadline_s = min(request.deadline_s, self._deadline_s)
        self._changed = True
        return ahead if self._free_slots else ahead + 1

    def cancel(self, id: int) -> bool:
        """End a request at the next step; False if it is over already."""
        if id not in self._all:
            return False
        self._cancelled.append(id)
        self._changed = True
        return True

    def reused(self, id: int, tokens: int) -> None:
        """A placed request's slot holds the first `tokens` tokens of its prompt already."""
        self._all[id].held = tokens

    def prefilled(self, id: int, end: int) -> None:
        """A piece of the prompt is in."""
        sequence = self._all[id]
        sequence.held = end
        if not sequence.prefilling:
            self._decode = None

    def grew(self, id: int) -> None:
        """A token of the answer is in."""
        sequence = self._all[id]
        sequence.held += 1
        if sequence.held >= sequence.promised:
            self._changed = True

    def finished(self, id: int, now: float) -> None:
        """The answer is complete, or failed; the slot is free."""
        sequence = self._all[id]
        if sequence.slot is not None and not sequence.background:
            self._service_s += 0.2 * (now - sequence.started_s - self._service_s)
        self._drop(sequence)

    def arrange(self, now: float) -> Arrangement:
        """Who leaves, who is parked, who gets a slot. Performed before `work` is asked."""
        if not self._changed and now < self._deadline_s:
            return _NOTHING
        self._changed = False
        ends = self._end_due(now)
        parks: list[Park] = []
        self._extend_promises(parks, ends)
        places: list[Place] = []
        while (candidate := self._candidate()) is not None and self._clear_for(
            candidate, parks, ends
        ):
            places.append(self._place(candidate, now))
        self._decode = None
        return Arrangement(tuple(ends), tuple(parks), tuple(places))

    def work(self) -> Work | None:
        """What to compute in this step; None if there is nothing."""
        self._steps += 1
        busy = [s for s in self._running if not s.background] or self._running
        prompts = [s for s in busy if s.prefilling]
        prefill = None
        if prompts:
            chosen = min(prompts, key=lambda s: (s.request.priority, s.served, s.order))
            chosen.served = self._steps
            end = next(cut for cut in chosen.request.cuts if cut > chosen.held)
            prefill = Prefill(chosen.request.id, _slot(chosen), chosen.held, end)
        if self._decode is None:
            self._decode = _decode(s for s in busy if not s.prefilling)
        decode = self._decode
        if prefill and decode:
            # An urgent prompt does not wait for a token of every less urgent answer at each piece.
            urgency = chosen.request.priority
            if any(self._all[id].request.priority > urgency for id in decode.ids):
                decode = _decode(
                    s for s in busy if not s.prefilling and s.request.priority <= urgency
                )
        return Work(prefill, decode) if prefill or decode else None

    def next_deadline(self) -> float | None:
        """When `arrange` has to be called again even if nothing happens."""
        return None if self._deadline_s == math.inf else self._deadline_s

    @property
    def has_changed(self) -> bool:
        """Whether `arrange` has something to look at now."""
        return self._changed

    @property
    def waiting(self) -> int:
        """Requests without a slot that never had one."""
        return sum(1 for _ in self._queued())

    @property
    def parked(self) -> int:
        """Requests whose state waits in memory for a slot."""
        return len(self._parked)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def ids(self) -> tuple[int, ...]:
        """All requests that are not over."""
        return tuple(self._all)

    @property
    def free_tokens(self) -> int:
        """Room that nobody was promised."""
        return self._free_room

    def _check(self, request: Request) -> None:
        limits = self.limits
        if request.total_tokens > limits.max_context:
            raise ContextExceeded(
                f"{request.prompt_tokens} tokens of prompt and {request.max_tokens} of answer "
                f"exceed the context of {limits.max_context}"
            )
        background = request.priority >= BACKGROUND  # it has a queue of its own
        waiting = [s for s in self._queued() if s.background == background]
        own = sum(1 for s in waiting if s.request.client == request.client)
        if len(waiting) < limits.max_queue and own < limits.max_queue_per_client:
            return
        whose = "in all" if len(waiting) >= limits.max_queue else "of this client"
        retry_s = min(max(self._service_s / limits.slots, MIN_RETRY_S), MAX_RETRY_S)
        count = len(waiting) if whose == "in all" else own
        raise Overloaded(
            f"{count} requests {whose} wait already; try again in {retry_s:.1f} s", retry_s
        )

    def _queued(self) -> Iterator[_Sequence]:
        for clients in self._waiting.values():
            for queue in clients.values():
                yield from queue

    def _end_due(self, now: float) -> list[End]:
        ends = []
        for id in self._cancelled:
            if id in self._all:
                ends.append(self._end(self._all[id], "cancelled"))
        self._cancelled.clear()
        if now >= self._deadline_s:
            for sequence in list(self._all.values()):
                deadline = sequence.request.deadline_s
                if deadline is not None and now >= deadline:
                    ends.append(self._end(sequence, "deadline"))
        deadlines = (s.request.deadline_s for s in self._all.values())
        self._deadline_s = min((d for d in deadlines if d is not None), default=math.inf)
        return ends

    def _extend_promises(self, parks: list[Park], ends: list[End]) -> None:
        """Room for the next token of every answer; if there is none, the last in rank leave."""
        for sequence in sorted(self._running, key=lambda s: s.rank):
            if sequence.slot is None or sequence.held < sequence.promised:
                continue
            if sequence.held >= sequence.request.total_tokens:
                continue
            more = self._need(sequence) - sequence.promised
            while self._free_room < more and sequence.slot is not None:
                self._evict(max(self._running, key=lambda s: s.rank), parks, ends)
            if sequence.slot is not None:
                sequence.promised += more
                self._free_room -= more

    def _need(self, sequence: _Sequence) -> int:
        """Room to promise now: all of the prompt, and some of the answer beyond what is held."""
        request, limits = sequence.request, self.limits
        ahead = max(sequence.held, request.prompt_tokens) + limits.promise_tokens
        return limits.room(min(ahead, request.total_tokens))

    def _candidate(self) -> _Sequence | None:
        """Best priority first; what was parked before what waits; clients in turn."""
        best = min(self._parked, key=lambda s: s.rank, default=None)
        priority = min((p for p, clients in self._waiting.items() if clients), default=None)
        if priority is not None and (best is None or priority < best.request.priority):
            best = next(iter(self._waiting[priority].values()))[0]
        if best is not None and best.background and self._running:
            return None
        return best

    def _clear_for(self, candidate: _Sequence, parks: list[Park], ends: list[End]) -> bool:
        """Make a slot and room free by parking requests of lower priority, if that is enough."""
        need = self._need(candidate)
        lower = [s for s in self._running if s.request.priority > candidate.request.priority]
        may_park = max(self.limits.max_parked - len(self._parked), 0)
        lower.sort(key=lambda s: s.rank)
        victims: list[_Sequence] = []
        room, slots = self._free_room, len(self._free_slots)
        while room < need or not slots:
            if not lower:
                return False
            victims.append(lower.pop())
            room, slots = room + victims[-1].promised, slots + 1
        if sum(not victim.background for victim in victims) > may_park:
            return False
        for victim in victims:
            self._evict(victim, parks, ends)
        return True

    def _evict(self, victim: _Sequence, parks: list[Park], ends: list[End]) -> None:
        if victim.background:
            ends.append(self._end(victim, "cancelled"))
            return
        parks.append(Park(victim.request.id, _slot(victim)))
        self._leave_slot(victim)
        self._parked.append(victim)

    def _place(self, sequence: _Sequence, now: float) -> Place:
        resumed = sequence in self._parked
        if resumed:
            self._parked.remove(sequence)
        else:
            self._unqueue(sequence, turn_over=True)
            sequence.started_s = now
        sequence.slot = self._free_slots.pop()
        sequence.promised = self._need(sequence)
        self._free_room -= sequence.promised
        self._running.append(sequence)
        return Place(sequence.request.id, sequence.slot, resumed)

    def _end(self, sequence: _Sequence, reason: str) -> End:
        end = End(sequence.request.id, sequence.slot, reason)
        self._drop(sequence)
        return end

    def _drop(self, sequence: _Sequence) -> None:
        del self._all[sequence.request.id]
        if sequence.slot is not None:
            self._leave_slot(sequence)
        elif sequence in self._parked:
            self._parked.remove(sequence)
        else:
            self._unqueue(sequence, turn_over=False)
        self._changed = True

    def _leave_slot(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        self._free_slots.append(_slot(sequence))
        self._free_room += sequence.promised
        sequence.slot, sequence.promised = None, 0
        self._decode = None

    def _unqueue(self, sequence: _Sequence, *, turn_over: bool) -> None:
        """Take a request out of the queue; after its turn a client is behind all others."""
        request = sequence.request
        clients = self._waiting[request.priority]
        queue = clients[request.client]
        queue.remove(sequence)
        if not queue:
            del clients[request.client]
        elif turn_over:
            clients.move_to_end(request.client)
        if not clients:
            del self._waiting[request.priority]


_NOTHING = Arrangement((), (), ())


def _decode(answers: Iterable[_Sequence]) -> Decode | None:
    by_slot = sorted(answers, key=_slot)
    if not by_slot:
        return None
    return Decode(tuple(s.request.id for s in by_slot), tuple(map(_slot, by_slot)))


def _slot(sequence: _Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
