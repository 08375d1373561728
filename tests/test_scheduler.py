# SPDX-License-Identifier: Apache-2.0
"""What the scheduler promises, on a simulated device that checks every decision it performs."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.errors import ContextExceeded, InvalidRequest, Overloaded
from edgecascade.scheduler import BACKGROUND, Limits, Request, Scheduler

CHUNK = 64


def cuts(prompt_tokens: int) -> tuple[int, ...]:
    return (*range(CHUNK, prompt_tokens, CHUNK), prompt_tokens)


def request(id: int, prompt_tokens: int = 10, max_tokens: int = 5, **options) -> Request:
    return Request(id, cuts(prompt_tokens), max_tokens, **options)


@dataclass
class Device:
    """Does what it is told, and objects to anything that could not be done."""

    limits: Limits
    slots: dict[int, int] = field(default_factory=dict)  # slot -> request
    held: dict[int, int] = field(default_factory=dict)  # request -> tokens in its state
    parked: set[int] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)
    answers: dict[int, int] = field(default_factory=dict)  # request -> tokens made
    first_token: dict[int, float] = field(default_factory=dict)
    over: dict[int, str] = field(default_factory=dict)
    reuse: int = 0  # tokens that every prompt finds kept
    now: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self.requests: dict[int, Request] = {}

    def submit(self, asked: Request) -> int:
        ahead = self.scheduler.submit(asked, self.now)
        self.requests[asked.id] = asked
        return ahead

    def step(self, seconds: float = 1.0) -> bool:
        """One step; whether anything was computed."""
        self.steps += 1
        self._arrange()
        busy = self._foreground() or list(self.slots.values())
        streaming = [id for id in busy if self._is_answering(id)]
        work = self.scheduler.work()
        if work is None:
            return False
        assert work.prefill or work.decode
        if work.prefill:
            self._prefill(work.prefill)
        decoded = work.decode.ids if work.decode else ()
        if work.decode:
            assert len(set(work.decode.slots)) == len(work.decode.slots)
            for id, slot in zip(work.decode.ids, work.decode.slots, strict=True):
                assert self.slots[slot] == id
                self.held[id] += 1
                self.scheduler.grew(id)
                self._token(id)
        # A running answer waits for one piece of a prompt at most, never for two, unless the
        # prompt is more urgent than it is.
        urgency = self.requests[work.prefill.id].priority if work.prefill else math.inf
        served = (id for id in streaming if self.requests[id].priority <= urgency)
        assert sorted(decoded) == sorted(served)
        self._check_room()
        self.now += seconds
        return True

    def run(self, steps: int = 10_000) -> None:
        for _ in range(steps):
            if not self.step():
                return
        raise AssertionError(f"still busy after {steps} steps")

    def _arrange(self) -> None:
        arrangement = self.scheduler.arrange(self.now)
        for end in arrangement.ends:
            assert end.slot is None or self.slots.pop(end.slot) == end.id
            self._over(end.id, end.reason)
        for park in arrangement.parks:
            assert self.slots.pop(park.slot) == park.id
            self.parked.add(park.id)
        for place in arrangement.places:
            assert place.slot not in self.slots, "a slot in two places"
            assert place.id not in self.slots.values(), "a request in two slots"
            assert place.resumed == (place.id in self.parked)
            self.slots[place.slot] = place.id
            self.parked.discard(place.id)
            if not place.resumed:
                prompt = self.requests[place.id].cuts
                self.held[place.id] = max((c for c in prompt[:-1] if c <= self.reuse), default=0)
                self.scheduler.reused(place.id, self.held[place.id])
        assert set(self.slots) <= set(range(self.limits.slots))

    def _prefill(self, piece) -> None:
        asked = self.requests[piece.id]
        assert self.slots[piece.slot] == piece.id
        assert self.held[piece.id] == piece.begin < piece.end <= asked.prompt_tokens
        assert piece.end in asked.cuts
        self.held[piece.id] = piece.end
        self.scheduler.prefilled(piece.id, piece.end)
        if piece.end == asked.prompt_tokens:
            if asked.max_tokens:
                self._token(piece.id)
            else:
                self._finish(piece.id)

    def _foreground(self) -> list[int]:
        return [id for id in self.slots.values() if self.requests[id].priority < BACKGROUND]

    def _is_answering(self, id: int) -> bool:
        return self.held[id] >= self.requests[id].prompt_tokens

    def _token(self, id: int) -> None:
        self.answers[id] = self.answers.get(id, 0) + 1
        self.first_token.setdefault(id, self.steps)
        if self.answers[id] == self.requests[id].max_tokens:
            self._finish(id)

    def _finish(self, id: int) -> None:
        self.slots = {slot: other for slot, other in self.slots.items() if other != id}
        self.scheduler.finished(id, self.now)
        self._over(id, "finished")

    def _over(self, id: int, how: str) -> None:
        assert id not in self.over, "a request that ended twice"
        self.over[id] = how
        self.parked.discard(id)

    def _check_room(self) -> None:
        used = sum(self.limits.room(self.held[id]) for id in self.slots.values())
        assert used <= self.limits.kv_tokens, "more pages than there are"


def small(**options) -> Limits:
    values = {"slots": 2, "kv_tokens": 2048, "max_context": 1024, "promise_tokens": 64, **options}
    return Limits(**values)


events = st.lists(
    st.one_of(
        st.builds(
            dict,
            kind=st.just("submit"),
            prompt_tokens=st.integers(1, 300),
            max_tokens=st.integers(0, 200),
            priority=st.sampled_from([0, 1, 1, 2, BACKGROUND]),
            client=st.sampled_from("abc"),
            in_s=st.one_of(st.none(), st.integers(0, 300)),
        ),
        st.builds(dict, kind=st.just("cancel"), which=st.integers(0, 1000)),
        st.builds(dict, kind=st.just("steps"), count=st.integers(1, 40)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(
    events,
    st.integers(1, 4),
    st.integers(8, 40),
    st.integers(1, 200),
    st.integers(0, 200),
)
def test_every_request_ends_exactly_once_and_nothing_leaks(script, slots, pages, promise, reuse):
    limits = Limits(
        slots=slots,
        kv_tokens=pages * 64,
        max_context=512,
        promise_tokens=promise,
        max_queue=20,
        max_queue_per_client=10,
    )
    device = Device(limits, reuse=reuse)
    accepted = []
    for event in script:
        if event["kind"] == "submit":
            deadline = None if event["in_s"] is None else device.now + event["in_s"]
            asked = request(
                len(accepted),
                event["prompt_tokens"],
                event["max_tokens"],
                priority=event["priority"],
                client=event["client"],
                deadline_s=deadline,
            )
            with suppress(Overloaded):
                device.submit(asked)
                accepted.append(asked)
        elif event["kind"] == "cancel" and accepted:
            device.scheduler.cancel(accepted[event["which"] % len(accepted)].id)
        elif event["kind"] == "steps":
            for _ in range(event["count"]):
                device.step()
    device.run()
    assert sorted(device.over) == [asked.id for asked in accepted]
    for asked in accepted:
        if device.over[asked.id] == "finished":
            assert device.answers.get(asked.id, 0) == asked.max_tokens
    scheduler = device.scheduler
    assert (scheduler.running, scheduler.waiting, scheduler.parked) == (0, 0, 0)
    assert scheduler.ids == ()
    assert scheduler.next_deadline() is None
    assert scheduler.free_tokens == limits.kv_tokens
    device.submit(request(10_000, max_tokens=3))
    device.run()
    assert device.over[10_000] == "finished"


def test_a_request_starts_at_once_when_a_slot_is_free():
    device = Device(small())
    assert device.submit(request(1)) == 0
    device.step()
    assert device.answers == {1: 1}


def test_prompts_are_read_in_turn_so_that_a_short_one_passes_a_long_one():
    device = Device(small())
    device.submit(request(1, prompt_tokens=640))
    device.step()
    device.submit(request(2, prompt_tokens=100))
    device.run()
    assert device.first_token[2] < device.first_token[1]


def test_clients_of_one_priority_take_turns_whatever_one_of_them_floods():
    device = Device(small(slots=1))
    for id in range(20):
        device.submit(request(id, client="flood", max_tokens=10))
    device.step()
    device.submit(request(100, client="quiet"))
    device.run()
    started = sorted(device.first_token, key=device.first_token.__getitem__)
    assert started.index(100) == 2


def test_one_client_cannot_fill_the_queue_of_the_others():
    device = Device(small(max_queue=10, max_queue_per_client=4))
    for id in range(4):
        device.submit(request(id, client="flood"))
    with pytest.raises(Overloaded, match="4 requests of this client wait") as refused:
        device.submit(request(4, client="flood"))
    assert refused.value.code == "overloaded"
    assert refused.value.retry_after_s > 0
    device.submit(request(50, client="quiet"))


def test_a_full_queue_refuses_and_says_so():
    device = Device(small(max_queue=3))
    for id in range(3):
        device.submit(request(id, client=str(id)))
    with pytest.raises(Overloaded, match="3 requests in all wait"):
        device.submit(request(3, client="another"))
    device.run()
    assert len(device.over) == 3


def test_background_work_and_the_rest_have_a_queue_each():
    device = Device(small(max_queue=1))
    for id, priority in ((1, 1), (2, BACKGROUND)):
        device.submit(request(id, priority=priority))
    for id, priority in ((3, 1), (4, BACKGROUND)):
        with pytest.raises(Overloaded, match="1 requests in all wait"):
            device.submit(request(id, priority=priority))


@pytest.mark.parametrize("slots", [1, 2])
def test_who_is_refused_is_told_how_long_the_others_hold_a_slot(slots):
    device = Device(small(slots=slots, max_queue=1))
    for id in range(0, 120, 3):
        device.submit(request(id, max_tokens=5))  # it holds a slot for four steps
        for _ in range(5):
            device.step(seconds=2.0)
        device.submit(request(id + 1, priority=BACKGROUND, max_tokens=50))  # these do not count
        device.submit(request(id + 2, deadline_s=device.now + 0.5))
        device.now += 1.0
        device.run()
    assert Counter(device.over.values()) == {"finished": 80, "deadline": 40}
    device.submit(request(1000))
    with pytest.raises(Overloaded, match="1 requests in all wait") as refused:
        device.submit(request(1001))
    assert refused.value.retry_after_s == pytest.approx(8.0 / slots, rel=0.01)


def test_the_position_counts_those_who_go_first():
    device = Device(small(slots=1))
    assert device.submit(request(1)) == 0
    device.step()
    assert [device.submit(request(id)) for id in (2, 3)] == [1, 2]
    assert device.submit(request(4, priority=0)) == 1


def test_a_high_priority_starts_within_one_step_and_the_low_one_goes_on_where_it_was():
    device = Device(small(slots=1))
    device.submit(request(1, max_tokens=100, priority=2))
    for _ in range(20):
        device.step()
    device.submit(request(2, priority=0))
    device.step()
    assert device.answers[2] == 1
    assert device.parked == {1}
    made = device.answers[1]
    device.run()
    assert device.over == {1: "finished", 2: "finished"}
    assert made == 20
    assert device.answers[1] == 100


def test_a_high_priority_with_a_long_prompt_needs_its_own_pieces_and_no_more_steps():
    device = Device(small(slots=2, kv_tokens=4096))
    for id in (1, 2):
        device.submit(request(id, prompt_tokens=640, max_tokens=300, priority=1))
    for _ in range(5):
        device.step()
    device.submit(request(3, prompt_tokens=320, priority=0))
    before = device.steps
    while 3 not in device.first_token:
        device.step()
    assert device.steps - before == 320 // CHUNK


def test_answers_wait_while_a_more_urgent_prompt_is_read_and_not_for_their_like():
    for priority, made_meanwhile in ((0, 0), (1, 5), (2, 5)):
        device = Device(small(slots=2, kv_tokens=4096))
        device.submit(request(1, max_tokens=100, priority=1))
        for _ in range(10):
            device.step()
        made = device.answers[1]
        device.submit(request(2, prompt_tokens=320, max_tokens=50, priority=priority))
        for _ in range(320 // CHUNK):
            device.step()
        assert device.answers[2] == 1
        assert device.answers[1] - made == made_meanwhile
        device.run()
        assert device.over == {1: "finished", 2: "finished"}


def test_the_victim_is_the_latest_of_the_lowest_priority():
    device = Device(small(slots=3, kv_tokens=4096))
    for id, priority in ((1, 2), (2, 2), (3, 1)):
        device.submit(request(id, max_tokens=50, priority=priority))
        device.step()
    device.submit(request(4, priority=0))
    device.step()
    assert device.parked == {2}


def test_equal_priorities_do_not_preempt_each_other():
    device = Device(small(slots=1))
    device.submit(request(1, max_tokens=50))
    device.step()
    device.submit(request(2))
    device.step()
    assert device.parked == set()
    assert 2 not in device.first_token


def test_what_was_parked_goes_on_before_what_waits():
    device = Device(small(slots=1))
    device.submit(request(1, max_tokens=30))
    device.step()
    device.submit(request(2))
    device.submit(request(3, priority=0))
    device.run()
    assert device.first_token[3] < device.first_token[2]
    assert list(device.over) == [3, 1, 2]


def test_of_what_was_parked_the_oldest_goes_on_first():
    device = Device(small(slots=2))
    for id, priority, tokens in ((1, 2, 50), (2, 2, 50), (3, 0, 5), (4, 0, 20)):
        device.submit(request(id, priority=priority, max_tokens=tokens))
        device.step()
    assert device.parked == {1, 2}
    while 3 not in device.over:
        device.step()
    device.step()
    assert device.parked == {2}


def test_parking_is_bounded():
    device = Device(small(slots=1, max_parked=1))
    for id, priority in ((1, 3), (2, 2), (3, 1)):
        device.submit(request(id, max_tokens=30, priority=priority))
        device.step()
    assert device.parked == {1}
    assert device.slots == {0: 2}


def test_a_deadline_ends_what_waits_and_what_runs():
    device = Device(small(slots=1))
    device.submit(request(1, max_tokens=100, deadline_s=10.0))
    device.submit(request(2, max_tokens=1, deadline_s=5.0))
    assert device.scheduler.next_deadline() == 5.0
    device.run()
    assert device.over == {2: "deadline", 1: "deadline"}
    assert 0 < device.answers[1] < 100
    assert 2 not in device.answers


def test_a_cancel_takes_effect_at_the_next_token_and_twice_is_once():
    device = Device(small())
    device.submit(request(1, max_tokens=100))
    device.step()
    assert device.scheduler.cancel(1)
    assert device.scheduler.cancel(1)
    device.run()
    assert device.over == {1: "cancelled"}
    assert device.answers[1] == 1
    assert not device.scheduler.cancel(1)


def test_a_parked_request_can_be_cancelled_and_can_time_out():
    device = Device(small(slots=2))
    device.submit(request(1, max_tokens=100, priority=2))
    device.submit(request(2, max_tokens=100, priority=2, deadline_s=8.0))
    device.step()
    for id in (3, 4):
        device.submit(request(id, max_tokens=100))
    device.step()
    assert device.parked == {1, 2}
    device.scheduler.cancel(1)
    device.run()
    assert device.over == {1: "cancelled", 2: "deadline", 3: "finished", 4: "finished"}


def test_answers_that_outgrow_the_memory_are_parked_and_all_of_them_end():
    limits = small(slots=4, kv_tokens=1024, max_context=1024, promise_tokens=64)
    device = Device(limits)
    for id in range(4):
        device.submit(request(id, prompt_tokens=100, max_tokens=900))
    parked = 0
    while device.step():
        parked = max(parked, len(device.parked))
    assert parked == 3  # the first needs all of the memory in the end
    assert device.over == dict.fromkeys(range(4), "finished")


def test_what_does_not_fit_now_waits_and_is_not_overtaken_by_its_like():
    device = Device(small(slots=4, kv_tokens=1024))
    device.submit(request(1, prompt_tokens=600, max_tokens=20))
    device.step()
    device.submit(request(2, prompt_tokens=600, client="big"))
    device.submit(request(3, prompt_tokens=10, client="small"))
    for _ in range(10):
        device.step()
    assert list(device.slots.values()) == [1]
    device.run()
    assert len(device.over) == 3


def test_what_can_never_fit_is_refused_with_both_numbers():
    device = Device(small())
    with pytest.raises(ContextExceeded, match=r"1000 tokens of prompt and 50 of answer .* 1024"):
        device.submit(request(1, prompt_tokens=1000, max_tokens=50))
    device.submit(request(2, prompt_tokens=1024, max_tokens=1))
    device.run()
    assert device.over == {2: "finished"}


def test_background_work_runs_alone_and_leaves_when_its_place_is_needed():
    device = Device(small(slots=1))
    device.submit(request(1, prompt_tokens=640, max_tokens=0, priority=BACKGROUND))
    device.step()
    assert device.held[1] == CHUNK
    device.submit(request(2))
    device.run()
    assert device.over == {1: "cancelled", 2: "finished"}
    assert device.first_token[2] == 2


def test_background_work_stands_still_while_others_run():
    device = Device(small(slots=2))
    device.submit(request(1, prompt_tokens=640, max_tokens=0, priority=BACKGROUND))
    device.step()
    device.submit(request(2, max_tokens=30))
    for _ in range(20):
        device.step()
    assert device.held[1] == CHUNK
    device.run()
    assert device.over == {2: "finished", 1: "finished"}


def test_a_kept_prefix_is_not_read_again():
    device = Device(small(), reuse=2 * CHUNK)
    device.submit(request(1, prompt_tokens=3 * CHUNK))
    device.step()
    assert device.answers == {1: 1}


@pytest.mark.parametrize("name", ["slots", "kv_tokens", "max_context", "promise_tokens"])
def test_limits_that_cannot_be_are_refused_by_name(name):
    with pytest.raises(InvalidRequest, match=name):
        small(**{name: 0})


def test_one_whole_context_has_to_fit():
    with pytest.raises(InvalidRequest, match="kv_tokens is 1000; one context of 1024"):
        small(kv_tokens=1000)
