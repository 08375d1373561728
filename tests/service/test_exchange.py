# SPDX-License-Identifier: Apache-2.0
"""A client's side of a request: retries, choices, holes, with time passed in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.errors import Cancelled, DeadlineExceeded, RemoteError
from edgecascade.service.exchange import (
    ABSENT_S,
    ACKNOWLEDGE_S,
    GRACE_S,
    MAX_STREAM,
    STALL_S,
    Exchange,
    Send,
    Shown,
)
from edgecascade.service.parameters import Problem
from edgecascade.service.replies import Chunk, Failed, Final, Part, Queued, Status

BUSY = Failed(Problem(429, "queue_full", "full", retry_after_ms=3000, retryable=True))


def final(text: str, **more: Any) -> Final:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return Final({"object": "chat.completion", "choices": [choice], **more})


def named(device: str | None = "a", deadline: float = 60.0) -> Exchange:
    order = ["a", "b", "c"]
    return Exchange(
        deadline, lambda avoid: next((d for d in order if d not in avoid), None), device
    )


def sent(exchange: Exchange, now: float) -> Send:
    send = exchange.step(now)
    assert send is not None
    return send


def test_it_is_sent_until_something_is_heard() -> None:
    exchange = named()
    assert sent(exchange, 0.0) == Send("a", 60.0)
    assert exchange.step(ACKNOWLEDGE_S - 0.1) is None
    assert sent(exchange, ACKNOWLEDGE_S) == Send("a", 60.0 - ACKNOWLEDGE_S)
    exchange.hear("a", Queued(1), 3.0)
    assert exchange.step(3.0 + STALL_S - 0.1) is None
    assert sent(exchange, 3.0 + STALL_S).device == "a"


def test_nothing_is_sent_while_the_broker_is_away() -> None:
    exchange = named()
    assert exchange.step(0.0, away="refused") is None
    assert exchange.sends == 0
    exchange.connected(5.0)
    assert sent(exchange, 5.0).device == "a"
    exchange.connected(5.1)  # what was sent may be lost with the connection
    assert sent(exchange, 5.1).device == "a"


def test_the_deadline_ends_it_with_what_is_known() -> None:
    exchange = named(deadline=1.0)
    sent(exchange, 0.0)
    exchange.sent(0x10, 0.1)
    assert exchange.step(1.0 + GRACE_S / 2) is None
    assert not exchange.over
    exchange.step(1.1 + GRACE_S)
    assert exchange.over
    assert isinstance(exchange.error, DeadlineExceeded)
    assert "a does not listen" in str(exchange.error)


def test_without_a_name_a_silent_device_is_left() -> None:
    exchange = named(None)
    assert sent(exchange, 0.0).device == "a"
    exchange.sent(0x10, 0.1)
    assert sent(exchange, ABSENT_S + 0.1).device == "b"
    exchange.hear("b", BUSY, 1.0)
    assert sent(exchange, 1.0 + ABSENT_S).device == "c"
    exchange.seen("c", Status("offline", 3), 2.0)
    assert sent(exchange, 2.0).device == "a"  # all were tried: from the start


def test_without_another_device_it_waits_as_long_as_it_is_told() -> None:
    exchange = Exchange(60.0, lambda avoid: None if "a" in avoid else "a")
    assert sent(exchange, 0.0).device == "a"
    exchange.hear("a", BUSY, 1.0)
    assert exchange.step(3.9) is None
    assert sent(exchange, 4.0).device == "a"


def test_with_a_name_it_waits_for_that_device() -> None:
    exchange = named("a")
    sent(exchange, 0.0)
    exchange.hear("a", BUSY, 1.0)
    assert exchange.step(3.9) is None
    assert sent(exchange, 4.0).device == "a"
    exchange.seen("a", Status("online", 3), 4.1)
    assert exchange.step(4.2) is None
    exchange.seen("a", Status("online", 4), 4.3)  # restarted: it has forgotten
    assert sent(exchange, 4.3).device == "a"
    exchange.seen("a", Status("offline", 3), 4.4)  # a late last will
    assert exchange.step(4.4) is None
    exchange.seen("a", Status("online", 1), 4.5)  # restarted, and lost its counter
    assert sent(exchange, 4.5).device == "a"


def test_what_was_never_sent_is_taken_back_at_once() -> None:
    exchange = Exchange(60.0, lambda avoid: None)
    assert exchange.step(0.0) is None
    exchange.cancelled = True
    exchange.take_back(0.1)
    assert isinstance(exchange.error, Cancelled)


def test_a_cancelled_request_is_sent_again_until_its_end_is_heard() -> None:
    exchange = named("a")
    sent(exchange, 0.0)
    exchange.cancelled = True
    exchange.take_back(0.1)
    exchange.hear("a", Failed(Problem(404, "not_found", "unknown")), 0.2)
    assert sent(exchange, ACKNOWLEDGE_S).device == "a"
    exchange.hear("a", final("what there is"), 3.0)
    assert exchange.over
    assert exchange.error is None


def test_a_cancelled_request_does_not_go_to_another_device() -> None:
    exchange = named(None)
    assert sent(exchange, 0.0).device == "a"
    exchange.cancelled = True
    exchange.hear("a", Failed(Problem(503, "client_gone", "lost", retryable=True)), 1.0)
    assert exchange.step(5.0) is None
    assert isinstance(exchange.error, Cancelled)


def test_a_cancelled_request_of_a_pool_waits_for_who_has_it() -> None:
    exchange = Exchange(60.0, lambda avoid: None, pool=True)
    assert sent(exchange, 0.0) == Send(None, 60.0)
    exchange.cancelled = True
    assert exchange.step(ACKNOWLEDGE_S) is None
    exchange.hear("b", Queued(1), 3.0)
    assert sent(exchange, 3.0) == Send("b", 57.0)


def test_a_refusal_ends_it() -> None:
    exchange = named()
    sent(exchange, 0.0)
    exchange.hear("a", Failed(Problem(400, "out_of_range", "seed is -1", "seed")), 0.1)
    error = exchange.error
    assert isinstance(error, RemoteError)
    assert (error.status, error.reason, error.param) == (400, "out_of_range", "seed")
    assert exchange.hear("a", final("late"), 0.2) is None


def test_the_device_s_word_on_the_deadline_is_a_deadline_s_error() -> None:
    exchange = named()
    sent(exchange, 0.0)
    exchange.hear("a", Failed(Problem(408, "deadline_exceeded", "it passed in the queue")), 0.1)
    assert isinstance(exchange.error, DeadlineExceeded)
    assert "it passed in the queue" in str(exchange.error)


def test_an_engine_s_error_is_retried_but_not_for_ever() -> None:
    exchange = named()
    broken = Failed(Problem(500, "engine_error", "sorry", retryable=True))
    for attempt in range(3):
        assert not exchange.over
        sent(exchange, 10.0 * attempt)
        exchange.hear("a", broken, 10.0 * attempt + 1)
    assert isinstance(exchange.error, RemoteError)


def test_a_broker_that_forbids_it_ends_it() -> None:
    exchange = named()
    sent(exchange, 0.0)
    exchange.sent(0x87, 0.1)
    assert isinstance(exchange.error, RemoteError)
    assert "ACL" in str(exchange.error)


def test_the_stream_is_shown_and_the_final_adds_what_was_lost() -> None:
    exchange = named()
    sent(exchange, 0.0)
    assert exchange.hear("a", Chunk(0, "one ", "hm"), 0.1) == Shown("one ", "hm")
    assert exchange.hear("a", Chunk(1, "two ", ""), 0.2) == Shown("two ", "")
    assert exchange.hear("a", Chunk(3, "four ", ""), 0.3) is None  # a hole
    assert exchange.hear("a", Chunk(4, "five", ""), 0.4) is None
    whole = {"content": "one two three four five", "reasoning_content": "hm"}
    ending = Final({"choices": [{"message": whole, "finish_reason": "stop"}]})
    assert exchange.hear("a", ending, 0.5) == Shown("three four five", "")
    assert (exchange.over, exchange.answered_by) == (True, "a")


def test_a_second_run_continues_where_the_first_was_lost() -> None:
    exchange = named()
    sent(exchange, 0.0)
    exchange.hear("a", Chunk(0, "one two ", ""), 0.1)
    assert exchange.hear("a", Chunk(0, "one ", "", 7), 9.0) is None  # the same, in other pieces
    assert exchange.hear("a", Chunk(1, "two three ", "", 7), 9.1) == Shown("three ", "")


def test_a_second_run_without_its_beginning_is_not_mixed_with_the_first() -> None:
    exchange = named()
    sent(exchange, 0.0)
    exchange.hear("a", Chunk(0, "one ", ""), 0.1)
    assert exchange.hear("a", Chunk(1, "three ", "", 7), 9.0) is None
    assert exchange.hear("a", Chunk(2, "four", "", 7), 9.1) is None


def test_a_second_run_that_differs_voids_what_was_shown() -> None:
    exchange = named()
    sent(exchange, 0.0)
    exchange.hear("a", Chunk(0, "one ", ""), 0.1)
    assert exchange.hear("a", Chunk(0, "uno ", "", 7), 9.0) is None
    assert exchange.hear("a", final("uno due"), 9.1) == Shown("uno due", "", restart=True)


def test_a_final_in_parts_waits_for_all_and_asks_again_for_a_lost_one() -> None:
    import hashlib
    import json

    text = json.dumps({"index": 0, "message": {"content": "long"}, "finish_reason": "stop"})
    digest = hashlib.sha256(text.encode()).hexdigest()
    last = Final({"choices": [{}]}, 2, digest)
    exchange = named()
    sent(exchange, 0.0)
    exchange.hear("a", Part(1, 2, text[9:]), 0.1)
    assert exchange.hear("a", last, 0.2) is None
    assert sent(exchange, 0.2).device == "a"
    exchange.hear("a", Part(0, 2, text[:9]), 0.3)
    exchange.hear("a", Part(1, 2, text[9:]), 0.4)
    assert exchange.hear("a", last, 0.5) == Shown("long")


def test_parts_that_are_lost_each_time_are_not_asked_for_without_a_pause() -> None:
    exchange = named(deadline=10.0)
    torn, asked, now = Final({"choices": [{}]}, 2, "of what never comes"), 0, 0.0
    while not exchange.over:
        if exchange.step(now) is not None:
            asked += 1
            exchange.hear("a", torn, now)
        now += 0.01
    assert asked <= 2 + 10.0 / ACKNOWLEDGE_S
    assert "parts of a's answer were lost" in str(exchange.error)


def test_a_pool_s_request_stays_with_whoever_took_it() -> None:
    exchange = Exchange(60.0, lambda avoid: None, pool=True)
    assert sent(exchange, 0.0) == Send(None, 60.0)
    exchange.hear("b", Queued(0), 0.1)
    assert exchange.hear("c", Chunk(0, "not mine", ""), 0.2) is None
    assert sent(exchange, 0.1 + STALL_S).device == "b"
    exchange.seen("b", Status("offline", 1), 7.0)
    assert sent(exchange, 7.0).device is None


@given(
    st.text(max_size=40),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans()), max_size=30),
)
def test_whatever_is_lost_what_was_shown_is_the_final(
    text: str, losses: list[tuple[int, int, bool]]
) -> None:
    """Runs of the same text in any pieces, each chunk lost or not, then the final."""
    exchange = named()
    sent(exchange, 0.0)
    shown = ""
    seq, at, run = 0, 0, 0
    for restart, size, lost in losses:
        if restart == 0:
            seq, at, run = 0, 0, run + 1
        chunk = Chunk(seq, text[at : at + size], "", run)
        seq, at = seq + 1, at + size
        out = None if lost else exchange.hear("a", chunk, 1.0)
        shown = shown + out.text if out else shown
        assert text.startswith(shown)
    out = exchange.hear("a", final(text), 2.0)
    shown = shown + out.text if out else shown
    assert shown == text


def test_an_answer_of_a_device_that_was_left_counts_if_it_is_final() -> None:
    exchange = named(None)
    assert sent(exchange, 0.0).device == "a"
    exchange.hear("a", BUSY, 0.1)
    assert sent(exchange, 5.0).device == "b"
    assert exchange.hear("a", Chunk(0, "x", ""), 5.1) is None
    assert exchange.hear("a", final("answer"), 5.2) == Shown("answer")
    assert exchange.answered_by == "a"


@pytest.mark.parametrize("device", ["a", None])
def test_who_was_not_asked_has_no_answer(device: str | None) -> None:
    exchange = named(device)
    exchange.pool = device is not None  # of a pool whoever takes it, unless one is named
    assert exchange.hear("a", final("too soon"), 0.0) is None
    sent(exchange, 0.0)
    for reply in (Chunk(0, "x", ""), BUSY, final("another's")):
        assert exchange.hear("c", reply, 0.1) is None
    assert exchange.hear("a", final("answer"), 0.2) == Shown("answer")


def test_a_stream_without_an_end_is_not_held_in_memory() -> None:
    exchange = named()
    sent(exchange, 0.0)
    piece = "x" * (1 << 20)
    shown = [exchange.hear("a", Chunk(seq, piece, ""), 1.0) for seq in range(20)]
    assert sum(len(each.text) for each in shown if each) == MAX_STREAM
    told = exchange.hear("a", final("the answer"), 2.0)
    assert told == Shown("the answer", restart=True)
