# SPDX-License-Identifier: Apache-2.0
"""Requests from many sides: events, deadlines, priorities, asyncio, and reuse that is exact."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from golden import Build

from edgecascade import LLM, Completion, Piece
from edgecascade.completion import Accepted, Event, Failure
from edgecascade.errors import (
    BackendError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
)
from edgecascade.ticket import Ticket

ENDLESS: dict[str, Any] = {"ignore_eos": True, "seed": 1}
SHORT: dict[str, Any] = {"ignore_eos": True, "seed": 1, "max_tokens": 8}
Load = Callable[..., LLM]


@pytest.fixture
def load(build: Build) -> Iterator[Load]:
    """load(options) -> an LLM on the CPU backend, closed at the end."""
    opened: list[LLM] = []

    def open_one(**options: Any) -> LLM:
        opened.append(LLM.load(build("tiny", "speed"), "cpu", **options))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


class Listener:
    """Remembers what a request is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Completion | Failure):
            self.over.set()

    def outcome(self) -> Completion:
        assert self.over.wait(60), self.events
        accepted, *pieces, outcome = self.events
        assert isinstance(accepted, Accepted)
        assert all(isinstance(piece, Piece) for piece in pieces)
        if isinstance(outcome, Failure):
            raise outcome.error
        assert isinstance(outcome, Completion)
        tokens = [
            token for piece in pieces if isinstance(piece, Piece) for token in piece.token_ids
        ]
        assert tuple(tokens) == outcome.token_ids
        return outcome


def test_a_submitted_request_is_told_all_in_order_and_gives_the_tokens_of_a_lone_one(
    load: Load,
) -> None:
    llm = load()
    heard = Listener()
    ticket = llm.submit([5, 6, 7], on_event=heard, client="a", priority=0, **SHORT)
    answer = heard.outcome()
    assert ticket.done
    assert ticket.result() == answer
    assert answer.token_ids == llm.generate([5, 6, 7], **SHORT).token_ids
    ticket.cancel()
    assert len(heard.events) == 1 + 8 + 1


def test_a_cancelled_request_ends_with_its_text_so_far(load: Load) -> None:
    llm = load(slots=1)
    heard, behind = Listener(), Listener()
    ticket = llm.submit("Go.", on_event=heard, **ENDLESS)
    waiting = llm.submit("Go.", on_event=behind, **ENDLESS)
    while len(heard.events) < 5:
        time.sleep(0.001)
    for one in (ticket, waiting, ticket):
        one.cancel()
    answer, nothing = heard.outcome(), behind.outcome()
    assert (answer.finish_reason, nothing.finish_reason) == ("cancelled", "cancelled")
    whole = llm.generate("Go.", max_tokens=len(answer.token_ids), **ENDLESS)
    assert answer.token_ids == whole.token_ids
    assert answer.reasoning == whole.reasoning
    assert (nothing.token_ids, nothing.text, nothing.usage.completion_tokens) == ((), "", 0)


def test_a_deadline_gives_what_there_is_or_says_that_nothing_began(load: Load) -> None:
    llm = load(slots=1)
    heard, behind = Listener(), Listener()
    llm.submit(
        [5], on_event=lambda event: heard(event) or time.sleep(0.01), deadline_s=1, **ENDLESS
    )
    llm.submit([5], on_event=behind, deadline_s=0.05, **ENDLESS)
    with pytest.raises(DeadlineExceeded, match="queued"):
        behind.outcome()
    assert heard.outcome().finish_reason == "deadline"
    assert llm.generate([5], deadline_s=30, **SHORT).finish_reason == "length"


def slow_to_read(llm: LLM, monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    """Reading a prompt takes so much longer."""
    for name in ("from_text", "from_messages"):
        real = getattr(llm.prompter, name)

        def late(*args: Any, real: Any = real, **options: Any) -> Any:
            time.sleep(delay_s)
            return real(*args, **options)

        monkeypatch.setattr(llm.prompter, name, late)


def test_a_deadline_counts_from_the_call_whatever_the_prompt_takes_to_read(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load()
    slow_to_read(llm, monkeypatch, 0.3)
    options: dict[str, Any] = {"deadline_s": 0.2, **SHORT}
    with pytest.raises(DeadlineExceeded):
        llm.generate("Go.", **options)
    with pytest.raises(DeadlineExceeded):
        llm.generate(messages=[{"role": "user", "content": "Go."}], **options)
    with pytest.raises(DeadlineExceeded):
        next(llm.stream("Go.", **options))
    with pytest.raises(DeadlineExceeded):
        llm.submit("Go.", on_event=print, **options)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(llm.agenerate("Go.", **options))
    with pytest.raises(DeadlineExceeded):
        llm.session().generate("Go.", **options)
    assert llm.generate("Go.", **{**options, "deadline_s": 60}).finish_reason == "length"


def test_a_deadline_counts_from_the_time_that_is_given(load: Load) -> None:
    llm = load()
    earlier = time.monotonic() - 10
    with pytest.raises(DeadlineExceeded):
        llm.generate([5], deadline_s=9, since=earlier, **SHORT)
    assert llm.generate([5], deadline_s=70, since=earlier, **SHORT).finish_reason == "length"


def test_a_high_priority_interrupts_a_low_one_which_ends_with_the_same_tokens(load: Load) -> None:
    llm = load(slots=1)
    alone = llm.generate("Go.", max_tokens=60, **ENDLESS).token_ids
    high, meanwhile = Listener(), []

    def low(event: Event) -> None:
        if isinstance(event, Piece):
            meanwhile.append(not high.over.is_set())
            if len(meanwhile) == 10:
                llm.submit("Stop!", on_event=high, priority=0, **SHORT)
        heard(event)

    heard = Listener()
    llm.submit("Go.", on_event=low, priority=2, max_tokens=60, **ENDLESS)
    assert heard.outcome().token_ids == alone
    assert high.outcome().token_ids == llm.generate("Stop!", **SHORT).token_ids
    assert meanwhile == [True] * 10 + [False] * 50


def test_a_full_queue_refuses_submissions_and_makes_calls_wait(load: Load) -> None:
    llm = load(slots=1, max_queue=1)
    first = llm.submit([5], on_event=lambda event: time.sleep(0.002), **ENDLESS)
    refused = 0
    for _ in range(5):
        try:
            llm.submit([5], on_event=Listener(), **SHORT)
        except Overloaded as error:
            refused += error.retry_after_s > 0
    assert refused >= 3
    first.cancel()
    assert len(llm.generate([[5], [6], [7], [8]], **SHORT)) == 4


def test_a_request_survives_a_listener_that_does_not(load: Load) -> None:
    def broken(event: Event) -> None:
        if isinstance(event, Piece):
            raise RuntimeError("not my day")

    llm = load()
    ticket = llm.submit([5], on_event=broken, **SHORT)
    with pytest.raises(BackendError, match="not my day"):
        ticket.result(60)
    assert llm.generate([5], **SHORT).token_ids


WAITING: dict[str, Callable[[LLM, Ticket], object]] = {
    "generate": lambda llm, other: llm.generate([6], **SHORT),
    "stream": lambda llm, other: next(llm.stream([6], **SHORT)),
    "logits": lambda llm, other: llm.logits([6]),
    "result": lambda llm, other: other.result(),
}


@pytest.mark.parametrize("when", [Accepted, Piece])
@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING.keys())
def test_a_listener_that_waits_for_its_llm_is_told_that_it_must_not(
    load: Load, when: type[Event], wait: Callable[[LLM, Ticket], object]
) -> None:
    llm, heard, refused = load(), Listener(), []
    other = llm.submit([5], **ENDLESS)

    def listen(event: Event) -> None:
        if isinstance(event, when):
            try:
                wait(llm, other)
            except InvalidRequest as error:
                refused.append(str(error))
        heard(event)

    llm.submit([7], on_event=listen, **SHORT)
    assert len(heard.outcome().token_ids) == 8
    assert all(text.startswith("on_event must not wait for the LLM") for text in refused)
    assert len(refused) == (1 if when is Accepted else 8)


def test_an_llm_is_not_closed_by_who_hears_that_a_request_is_accepted(load: Load) -> None:
    llm, refused = load(), []
    llm.generate([6], **SHORT)  # its thread runs

    def listen(event: Event) -> None:
        if isinstance(event, Accepted):
            with pytest.raises(InvalidRequest, match="must not wait for the LLM") as error:
                llm.close()
            refused.append(error)

    assert len(llm.submit([5], on_event=listen, **SHORT).result().token_ids) == 8
    assert len(refused) == 1


def test_a_result_that_takes_too_long_is_a_timeout(load: Load) -> None:
    llm = load()
    ticket = llm.submit([5], on_event=lambda event: time.sleep(0.01), **ENDLESS)
    with pytest.raises(TimeoutError):
        ticket.result(0.02)
    ticket.cancel()
    assert ticket.result(60).finish_reason == "cancelled"


@pytest.mark.parametrize(
    "option",
    [
        {"priority": "high"},
        {"priority": True},
        {"priority": 1 << 30},
        {"client": 5},
        {"deadline_s": 0},
        {"deadline_s": "soon"},
        {"deadline_s": float("nan")},
        {"reuse": 1},
        {"since": "now"},
        {"since": float("nan")},
    ],
)
def test_ways_to_queue_that_cannot_be_are_refused_by_name(load: Load, option: Any) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(option))):
        load().generate([5], **option)


@pytest.mark.parametrize(
    "option", [{"chunk_tokens": 0}, {"snapshot_bytes": -1}, {"max_queue": 0}, {"max_queue": "5"}]
)
def test_bounds_that_cannot_be_are_refused_by_name(load: Load, option: Any) -> None:
    before = threading.active_count()
    with pytest.raises(InvalidRequest, match=next(iter(option))):
        load(**option)
    assert threading.active_count() == before


def test_closing_ends_all_with_an_error(load: Load) -> None:
    llm = load(slots=2)
    heard = [Listener() for _ in range(5)]
    for listener in heard:
        llm.submit([5], on_event=listener, **ENDLESS)
    llm.close()
    for listener in heard:
        with pytest.raises(BackendError, match="closed"):
            listener.outcome()


def test_a_logits_call_waits_its_turn_and_disturbs_nobody(load: Load) -> None:
    llm = load(slots=1)
    want = llm.generate("Go.", max_tokens=100, **ENDLESS).token_ids
    rows = llm.logits([5, 6, 7])
    heard = Listener()
    llm.submit("Go.", on_event=heard, max_tokens=100, **ENDLESS)
    np.testing.assert_array_equal(llm.logits([5, 6, 7]), rows)
    assert heard.outcome().token_ids == want


def test_a_forgotten_llm_stops_its_thread(build: Build) -> None:
    before = threading.active_count()
    llm = LLM.load(build("tiny", "speed"), "cpu")
    assert llm.generate([5], **SHORT).token_ids
    assert threading.active_count() == before + 1
    del llm
    gc.collect()
    assert threading.active_count() == before


def test_a_request_keeps_its_llm_until_it_is_over(build: Build) -> None:
    ticket = LLM.load(build("tiny", "speed"), "cpu").submit([5], on_event=Listener(), **SHORT)
    gc.collect()
    assert len(ticket.result(60).token_ids) == 8


def test_a_process_may_end_in_the_middle_of_it_all(build: Build) -> None:
    program = f"""
from edgecascade import LLM
llm = LLM.load({str(build("tiny", "speed"))!r}, "cpu")
for _ in range(4):
    llm.submit([5, 6, 7], on_event=lambda event: None, ignore_eos=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_process_is_told_to_load_a_bundle_of_its_own(build: Build) -> None:
    program = f"""
import os, signal, sys
from edgecascade import LLM, EdgeCascadeError

def fork(do):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            print(len(do().token_ids), flush=True)
        except EdgeCascadeError as error:
            print(error, flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)

def asked(llm):
    return llm.generate([5], max_tokens=4, ignore_eos=True)

def loaded():
    llm.close()
    with LLM.load({str(build("tiny", "speed"))!r}, "cpu") as other:
        return asked(other)

llm = LLM.load({str(build("tiny", "speed"))!r}, "cpu")
fork(lambda: asked(llm))  # nothing runs yet
under_way = llm.submit([5, 6, 7], on_event=lambda event: None, ignore_eos=True)
fork(lambda: asked(llm))
fork(under_way.result)
pieces = llm.stream([5, 6, 7], ignore_eos=True)
next(pieces)
fork(lambda: [*pieces][-1])
fork(lambda: next(llm.stream("Go.")))
fork(lambda: llm.logits([5]))
fork(loaded)
fork(sys.exit)  # it takes down what it has of the parent's
print(len(asked(llm).token_ids))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    told = "the LLM works in the process that this one was forked from; load the bundle here, too"
    assert done.stdout.splitlines() == ["4", "0", *[told, "0"] * 5, "4", "0", "0", "4"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_answers_and_pieces_come_without_blocking_the_loop(load: Load) -> None:
    llm = load(slots=2)
    prompts = [[5 + i, 30] for i in range(6)]
    want = [llm.generate(prompt, **SHORT) for prompt in prompts]

    async def streamed(prompt: list[int]) -> tuple[int, ...]:
        pieces = [piece async for piece in llm.astream(prompt, **SHORT)]
        assert pieces[-1].completion is not None
        return sum((piece.token_ids for piece in pieces), ())

    async def ask() -> tuple[list[Completion], list[tuple[int, ...]]]:
        whole = asyncio.gather(*(llm.agenerate(prompt, **SHORT) for prompt in prompts))
        parts = asyncio.gather(*(streamed(prompt) for prompt in prompts))
        return list(await whole), list(await parts)

    whole, parts = asyncio.run(ask())
    assert [answer.token_ids for answer in whole] == [answer.token_ids for answer in want]
    assert parts == [answer.token_ids for answer in want]


def test_a_cancelled_task_frees_its_slot(load: Load) -> None:
    llm = load(slots=1)

    async def hurry() -> None:
        await asyncio.wait_for(llm.agenerate([5], **ENDLESS), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(hurry())
    assert llm.generate([5], deadline_s=30, **SHORT).finish_reason == "length"


def test_a_task_that_is_cancelled_while_it_waits_for_the_queue_leaves_nothing(load: Load) -> None:
    llm = load(slots=1, max_queue=1)
    hold = [llm.submit([5], on_event=Listener(), **ENDLESS)]
    while not llm.stats().running:
        time.sleep(0.001)
    hold.append(llm.submit([5], on_event=Listener(), **ENDLESS))

    async def hurry() -> None:
        task = asyncio.create_task(llm.agenerate([5], **ENDLESS))
        await asyncio.sleep(0.05)
        task.cancel()
        for ticket in hold:
            ticket.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(hurry())
    assert llm.generate([5], deadline_s=30, **SHORT).finish_reason == "length"


def test_a_request_ends_with_the_loop_that_it_was_asked_from(load: Load) -> None:
    llm = load(slots=1)
    loop = asyncio.new_event_loop()
    stream = llm.astream([5], **ENDLESS)
    loop.run_until_complete(anext(stream))
    loop.close()
    assert llm.generate([6], **SHORT).token_ids  # there is one slot
    assert llm.stats().decoded_tokens < llm.max_context / 2


def test_errors_reach_who_awaits(load: Load) -> None:
    llm = load()

    async def ask() -> None:
        await llm.agenerate([])

    with pytest.raises(InvalidRequest, match="empty"):
        asyncio.run(ask())


@pytest.mark.parametrize("seed", range(12))
def test_turns_of_random_conversations_with_reuse_give_the_tokens_of_cold_ones(
    load: Load, seed: int
) -> None:
    llm = load(slots=2, chunk_tokens=64)
    draw = np.random.default_rng(seed)
    words = [
        "dock",
        "box",
        "go",
        "stop",
        "left",
        "right",
        "fast",
        "slow",
        "map",
        "robot",
        "arm",
        "turn",
        "back",
        "find",
    ]

    def said() -> str:
        return " ".join(draw.choice(words, int(draw.integers(1, 60))))

    session = llm.session(said() if draw.random() < 0.7 else None)
    reused = 0
    for turn in range(5):
        options: dict[str, Any] = {"max_tokens": int(draw.integers(1, 40)), "seed": turn}
        options |= {
            "thinking": bool(draw.random() < 0.5),
            "temperature": float(draw.random() * 1.5),
        }
        asked = [*session.messages, {"role": "user", "content": said()}]
        warm = session.generate(asked[-1]["content"], **options)
        cold = llm.generate(messages=asked, reuse=False, **options)
        assert warm.token_ids == cold.token_ids
        assert warm.text == cold.text
        assert cold.usage.cached_tokens == 0
        reused += warm.usage.cached_tokens
    assert reused > 0
    assert llm.stats().reuse.hit_rate > 0


def test_a_mixture_from_many_clients_ends_once_each_with_the_tokens_of_lone_runs(
    load: Load,
) -> None:
    llm = load(slots=4, chunk_tokens=64, snapshot_bytes=1 << 20)
    draw = np.random.default_rng(0)
    threads_before = threading.active_count()
    asked: list[tuple[list[int], dict[str, Any], Listener, str]] = []

    def client(name: str, plan: list[tuple[list[int], dict[str, Any], str]]) -> None:
        for prompt, options, fate in plan:
            listener = Listener()
            late = 0.02 if fate == "deadline" else None
            try:
                ticket = llm.submit(
                    prompt, on_event=listener, client=name, deadline_s=late, **options
                )
            except (Overloaded, DeadlineExceeded):  # a busy machine takes the 20 ms away before
                continue
            asked.append((prompt, options, listener, fate))
            if fate == "cancel":
                ticket.cancel()

    plans = []
    for _ in range(10):
        plan = []
        for fate in draw.choice(["run", "run", "cancel", "deadline"], 15):
            prompt = draw.integers(12, 300, int(draw.integers(1, 150))).tolist()
            options = {"max_tokens": int(draw.integers(1, 30)), "seed": int(draw.integers(9))}
            plan.append((prompt, {**options, "priority": int(draw.integers(3))}, str(fate)))
        plans.append(plan)
    threads = [threading.Thread(target=client, args=(str(i), plan)) for i, plan in enumerate(plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) > 50
    for prompt, options, listener, fate in asked:
        assert listener.over.wait(60)
        ends = [event for event in listener.events if isinstance(event, Completion | Failure)]
        assert len(ends) == 1
        if isinstance(ends[0], Failure):
            assert (ends[0].error.code, fate) == ("deadline-exceeded", "deadline")
            continue
        answer = listener.outcome()
        alone = llm.generate(prompt, reuse=False, **options)
        assert answer.token_ids == alone.token_ids[: len(answer.token_ids)]
        if answer.finish_reason not in ("cancelled", "deadline"):
            assert answer.token_ids == alone.token_ids
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.parked) == (0, 0, 0)
    assert stats.snapshot_bytes <= 1 << 20
    llm.close()
    assert threading.active_count() == threads_before
