# SPDX-License-Identifier: Apache-2.0
"""What the service decides, with time passed in and a model that says what the test wants."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from test_replies import completion

from edgecascade.completion import Accepted, Event, Failure, Piece, Usage
from edgecascade.errors import (
    BackendError,
    ContextExceeded,
    DeadlineExceeded,
    EdgeCascadeError,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
)
from edgecascade.service import answers
from edgecascade.service.core import Core, Live
from edgecascade.service.protocol import Incoming, Limits
from edgecascade.service.replies import Outgoing
from edgecascade.service.report import Identity
from edgecascade.service.topics import Topics
from edgecascade.text.tools import ToolCall

TOPICS = Topics()
REPLY = "edgecascade/v1/c/robot/r/dev-1/"


class Scripted:
    """Takes requests; the test says what happens to them."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.cancelled: list[int] = []
        self.refuses: EdgeCascadeError | None = None

    def submit(self, prompt: None = None, **asked: Any) -> Any:
        if self.refuses is not None:
            raise self.refuses
        self.asked.append(asked)
        number = len(self.asked) - 1
        scripted = self

        class Ticket:
            def cancel(self) -> None:
                scripted.cancelled.append(number)

        return Ticket()


class Desk:
    """A core and its clock."""

    def __init__(self, **options: Any) -> None:
        self.model = Scripted()
        self.now = 100.0
        self.events: list[tuple[Live, Event]] = []
        limits = Limits(models=("tiny",), priority_clients=frozenset({"boss"}))
        identity = Identity("dev-1", "tiny", "abc", slots=2, boot=1)
        self.core = Core(
            self.model,
            identity,
            TOPICS,
            limits,
            lambda live, event: self.events.append((live, event)),
            **options,
        )

    def send(self, body: dict[str, Any], verb: str = "chat", client: str = "robot") -> list[Any]:
        topic = f"edgecascade/v1/d/dev-1/{verb}/{client}"
        message = Incoming(topic, json.dumps(body).encode())
        return told(self.core.receive(message, self.now))

    def ask(self, request_id: str = "request-1", client: str = "robot", **more: Any) -> list[Any]:
        body = {"id": request_id, "messages": [{"role": "user", "content": "go"}], **more}
        return self.send(body, client=client)

    def happens(self, event: Event, number: int = -1) -> list[Any]:
        self.model.asked[number]["on_event"](event)
        if not self.events:
            return []
        live, posted = self.events.pop()
        return told(self.core.tell(live, posted, self.now))

    def tick(self, *, can_stream: bool = True) -> list[Any]:
        return told(self.core.tick(self.now, can_stream=lambda: can_stream))


def told(messages: list[Outgoing]) -> list[Any]:
    return [(m.topic, m.qos, json.loads(m.payload)) for m in messages]


def piece(text: str = "", reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> Piece:
    return Piece(text, reasoning, (1,), calls)


def code(out: list[Any]) -> tuple[int, str]:
    ((_, qos, body),) = out
    assert qos == 1
    return body["error"]["status"], body["error"]["code"]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_request_is_submitted_and_ends_with_one_final(desk: Desk) -> None:
    assert desk.ask(temperature=0, timeout_s=9, seed=3) == []
    (asked,) = desk.model.asked
    assert asked["messages"] == [{"role": "user", "content": "go"}]
    assert (asked["priority"], asked["client"]) == (1, "robot")
    assert (asked["since"], asked["deadline_s"]) == (desk.now, 9)
    assert (asked["params"].temperature, asked["params"].seed) == (0, 3)
    assert desk.happens(Accepted(0)) == []
    assert desk.happens(piece("for")) == []
    ((topic, qos, body),) = desk.happens(completion())
    assert (topic, qos) == (REPLY + "request-1", 1)
    assert body["choices"][0]["message"]["content"] == "forward"
    assert (body["device"], body["chunks"], body["timings"]["tok_s"]) == ("dev-1", 0, 40.0)
    assert desk.core.busy == 0


@pytest.mark.parametrize("verb", ["chat", "cancel"])
@pytest.mark.parametrize("body", [b'{"id":"request-1"}', b"no JSON"])
def test_correlation_data_that_fits_no_answer_is_refused_and_not_sent_back(
    desk: Desk, verb: str, body: bytes
) -> None:
    topic = f"edgecascade/v1/d/dev-1/{verb}/robot"
    desk.core.max_message_bytes = 4000
    (answer,) = desk.core.receive(Incoming(topic, body, correlation=b"x" * 1001), desk.now)
    assert answer.correlation is None
    assert code(told([answer])) == (413, "request_too_large")
    (answer,) = desk.core.receive(Incoming(topic, body, correlation=b"x" * 1000), desk.now)
    assert answer.correlation == b"x" * 1000


def test_an_answer_is_repeated_in_parts_where_it_no_longer_fits(desk: Desk) -> None:
    desk.ask()
    (whole,) = desk.happens(completion(text="forward " * 200))
    desk.core.max_message_bytes = 1500
    *parts, (_, _, last) = desk.ask()
    assert len(parts) == last["parts"] > 0
    assert json.loads("".join(part["text"] for _, _, part in parts)) == whole[2]["choices"][0]


def test_failures_in_a_row_are_counted(desk: Desk) -> None:
    for number, error in enumerate((BackendError("lost"), OutOfMemory("full"))):
        desk.ask(f"request-{number}")
        desk.happens(Failure(error))
    desk.model.refuses = BackendError("closed")
    desk.ask("request-2")
    assert desk.core.failures == 2  # a request too large for the memory is its own fault
    desk.model.refuses = None
    desk.ask("request-3")
    desk.happens(completion())
    assert desk.core.failures == 0


def test_requests_that_were_read_in_vain_count(desk: Desk) -> None:
    desk = Desk(requests_per_minute=1)
    desk.model.refuses = Overloaded("full", 1.0)
    assert code(desk.ask()) == (429, "queue_full")
    desk.model.refuses = ContextExceeded("too long")
    assert code(desk.ask()) == (400, "context_length_exceeded")
    assert code(desk.ask()) == (429, "rate_limited")


@pytest.mark.parametrize(("asked", "given"), [(-10, 0), (-1, 0), (0, 1), (1, 2), (10, 2)])
def test_priorities_become_three(desk: Desk, asked: int, given: int) -> None:
    desk.ask(client="boss", priority=asked)
    assert desk.model.asked[0]["priority"] == given


def test_the_first_token_goes_at_once_and_the_rest_in_batches(desk: Desk) -> None:
    desk.ask(stream=True, flush_ms=40)
    desk.happens(piece("a"))
    ((_, qos, first),) = desk.tick()
    assert (qos, first["seq"], first["object"]) == (0, 0, "chat.completion.chunk")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    for text in "bcd":
        desk.happens(piece(text))
        desk.now += 0.01
        assert desk.tick() == []
    desk.now += 0.01
    assert desk.core.next_due(desk.now) == pytest.approx(100.04)
    ((_, _, second),) = desk.tick()
    assert (second["seq"], second["run"]) == (1, first["run"])
    assert second["choices"] == [{"index": 0, "delta": {"content": "bcd"}}]
    desk.happens(piece("e"))
    chunk, final = desk.happens(completion(text="abcde"))
    assert (chunk[2]["seq"], final[2]["chunks"]) == (2, 3)


def test_what_the_next_beat_takes_along_wakes_nobody(desk: Desk) -> None:
    desk.ask(stream=True, flush_ms=40)
    tell = desk.model.asked[0]["on_event"]
    tell(piece("a"))
    live, first = desk.events.pop()
    desk.core.tell(live, first, desk.now)
    assert len(desk.tick()) == 1
    for text in ("b", "", "c"):
        tell(piece(text))
    assert desk.events == []
    desk.now += 0.041
    ((_, _, chunk),) = desk.tick()
    assert chunk["choices"][0]["delta"] == {"content": "bc"}
    desk.now += 0.041
    assert desk.tick() == []
    assert desk.core.next_due(desk.now) == desk.now + 1  # nobody looks for what does not come
    for text, sent in (("", 0), ("d", 1)):  # after a silence a token goes at once
        assert desk.happens(piece(text)) == []
        assert len(desk.tick()) == sent


def test_without_an_interval_each_token_is_told(desk: Desk) -> None:
    desk.ask(stream=True, flush_ms=0)
    for number, text in enumerate("abc"):
        assert desk.happens(piece(text)) == []
        ((_, _, chunk),) = desk.tick()
        assert (chunk["seq"], chunk["choices"][0]["delta"]["content"]) == (number, text)
    assert desk.core.next_due(desk.now) == desk.now + 1


def test_streams_flush_on_a_common_beat_and_never_later_than_their_interval(desk: Desk) -> None:
    for number in range(2):
        desk.ask(f"request-{number}", stream=True, flush_ms=40)
        desk.happens(piece("a"))
    assert len(desk.tick()) == 2
    for number in range(2):
        desk.now += 0.013
        desk.happens(piece("b"), number=number)
    desk.now = 100.0399
    assert desk.tick() == []
    desk.now = 100.0401
    assert len(desk.tick()) == 2


def test_a_token_that_shows_nothing_sends_nothing(desk: Desk) -> None:
    desk.ask(stream=True)
    desk.happens(piece(""))
    assert desk.tick() == []
    desk.happens(piece("a"))
    assert len(desk.tick()) == 1


def test_reasoning_and_tool_calls_stream_too(desk: Desk) -> None:
    desk.ask(stream=True, flush_ms=0)
    desk.happens(piece(reasoning="hm"))
    desk.tick()
    for name in ("left", "right"):
        desk.happens(piece(calls=(ToolCall(name, {}),)))
        ((_, _, chunk),) = desk.tick()
        call = chunk["choices"][0]["delta"]["tool_calls"][0]
        assert call["function"]["name"] == name
    assert call["index"] == 1


def test_what_cannot_go_out_is_joined_not_queued(desk: Desk) -> None:
    desk.ask(stream=True, flush_ms=10)
    for text in "abc":
        desk.happens(piece(text))
        desk.now += 1
        assert desk.tick(can_stream=False) == []
    desk.now += 1
    ((_, _, chunk),) = desk.tick()
    assert chunk["choices"][0]["delta"]["content"] == "abc"


def test_waiting_is_told(desk: Desk) -> None:
    desk.ask()
    ((topic, qos, body),) = desk.happens(Accepted(2))
    assert (topic, qos, body["position"]) == (REPLY + "request-1", 1, 2)
    desk.ask("request-2")
    assert desk.happens(Accepted(0)) == []
    desk.now += 1.0
    ((topic, _, body),) = desk.tick()  # nothing was heard for a second
    assert (topic, body["position"]) == (REPLY + "request-2", 0)
    assert desk.tick() == []


def test_a_pool_s_request_is_always_acknowledged(desk: Desk) -> None:
    body = {"id": "request-1", "messages": [{"role": "user", "content": "go"}]}
    topic = TOPICS.pool_chat("lab", "robot")
    desk.core.receive(Incoming(topic, json.dumps(body).encode()), desk.now)
    assert len(desk.happens(Accepted(0))) == 1


def test_a_retry_of_a_running_request_is_ignored(desk: Desk) -> None:
    desk.ask()
    assert desk.ask(timeout_s=3) == []
    assert desk.ask(seed=9) == []
    assert len(desk.model.asked) == 1


def test_a_retry_of_a_finished_request_gets_the_same_final(desk: Desk) -> None:
    desk.ask()
    first = desk.happens(completion())
    assert desk.ask(timeout_s=5) == first
    assert desk.ask(seed=9)[0][2]["error"]["code"] == "idempotency_conflict"
    assert desk.ask(client="boss") == []  # somebody else's request of the same id
    assert len(desk.model.asked) == 2


def test_an_answer_is_kept_for_the_deadline_and_a_minute(desk: Desk) -> None:
    desk.ask(timeout_s=120)
    desk.happens(completion())
    desk.now += 119
    assert len(desk.ask(timeout_s=120)) == 1
    desk.now += 2
    assert desk.ask(timeout_s=120) == []
    assert len(desk.model.asked) == 2


def test_answers_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWERS", 3)
    for index in range(5):
        desk.ask(f"request-{index}")
        desk.happens(completion())
    assert len(desk.core._answers) == 3
    monkeypatch.setattr(answers, "MAX_BYTES", 5000)
    desk.ask("request-9")
    desk.happens(completion(text="x" * 4500))
    assert len(desk.core._answers) == 1


def test_cancel_ends_with_a_final_and_is_silent_when_repeated(desk: Desk) -> None:
    desk.ask(stream=True)
    assert desk.send({"id": "request-1"}, "cancel") == []
    assert desk.send({"id": "request-1"}, "cancel") == []
    assert set(desk.model.cancelled) == {0}
    ((_, _, body),) = desk.happens(completion(text="for", finish_reason="cancelled"))
    assert body["choices"][0]["finish_reason"] == "cancelled"
    assert body["choices"][0]["message"]["content"] == "for"
    assert desk.send({"id": "request-1"}, "cancel") == []


def test_cancel_in_the_queue_ends_with_an_empty_final(desk: Desk) -> None:
    desk.ask()
    desk.send({"id": "request-1"}, "cancel")
    ((_, _, body),) = desk.happens(completion(text="", token_ids=(), finish_reason="cancelled"))
    assert body["choices"][0]["finish_reason"] == "cancelled"
    assert body["choices"][0]["message"]["content"] == ""


def test_nobody_cancels_another_s_request(desk: Desk) -> None:
    desk.ask()
    out = desk.send({"id": "request-1"}, "cancel", client="boss")
    assert code(out) == (404, "not_found")
    assert out[0][0].startswith("edgecascade/v1/c/boss/")
    assert desk.model.cancelled == []


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (Overloaded("full", 0.5), 429, "queue_full"),
        (ContextExceeded("9 of 8"), 400, "context_length_exceeded"),
        (InvalidRequest("messages[0] has role 'x'"), 400, "invalid_request"),
        (BackendError("gone"), 500, "engine_error"),
    ],
)
def test_a_request_that_is_not_taken_is_answered(
    desk: Desk, error: EdgeCascadeError, status: int, name: str
) -> None:
    desk.model.refuses = error
    out = desk.ask()
    assert code(out) == (status, name)
    if name == "queue_full":
        assert out[0][2]["error"]["retry_after_ms"] == 500
    if name == "invalid_request":
        assert out[0][2]["error"]["param"] == "messages"
    assert desk.core.busy == 0
    desk.model.refuses = None
    assert desk.ask() == []  # nothing is remembered of it


@pytest.mark.parametrize(
    ("event", "status", "name"),
    [
        (Failure(BackendError("lost")), 500, "engine_error"),
        (Failure(DeadlineExceeded("late")), 408, "deadline_exceeded"),
        (
            completion(text="", token_ids=(), finish_reason="deadline"),
            408,
            "deadline_exceeded",
        ),
    ],
)
def test_a_request_that_dies_is_answered_and_may_be_asked_again(
    desk: Desk, event: Event, status: int, name: str
) -> None:
    desk.ask()
    assert code(desk.happens(event)) == (status, name)
    assert desk.ask() == []
    assert len(desk.model.asked) == 2


def test_a_request_that_comes_too_late_is_not_run(desk: Desk) -> None:
    body = json.dumps({"id": "request-1", "messages": [{"role": "user", "content": "go"}]})
    message = Incoming(TOPICS.chat("dev-1", "robot"), body.encode(), expiry_s=0)
    assert code(told(desk.core.receive(message, desk.now))) == (408, "deadline_exceeded")
    assert desk.model.asked == []


def test_a_deadline_while_generating_is_a_final_with_the_text_so_far(desk: Desk) -> None:
    desk.ask()
    ((_, _, body),) = desk.happens(completion(text="for", finish_reason="deadline"))
    assert body["choices"][0]["finish_reason"] == "deadline"


def test_a_lost_client_s_requests_are_taken_back_unless_it_wants_them(desk: Desk) -> None:
    desk.ask("request-1")
    desk.ask("request-2", on_disconnect="finish")
    desk.ask("request-3", client="boss")
    will = Incoming(TOPICS.client_status("robot"), b'{"status":"offline"}')
    assert desk.core.receive(will, desk.now) == []
    assert desk.model.cancelled == [0]
    out = desk.happens(completion(finish_reason="cancelled"), number=0)
    assert code(out) == (503, "client_gone")
    assert out[0][2]["error"]["retryable"] is True
    assert desk.ask("request-1") == []  # it came back: a new run
    assert len(desk.model.asked) == 4


def test_draining_finishes_what_runs_and_refuses_the_rest(desk: Desk) -> None:
    desk.ask()
    desk.core.draining = True
    out = desk.ask("request-2")
    assert code(out) == (503, "draining")
    assert out[0][2]["error"]["retry_after_ms"] > 0
    assert len(desk.happens(completion())) == 1
    assert len(desk.ask()) == 1  # the same final again


def test_what_does_not_finish_in_time_is_sent_elsewhere(desk: Desk) -> None:
    desk.ask()
    desk.core.take_back_all()
    assert code(desk.happens(completion(finish_reason="cancelled"))) == (503, "draining")


def test_a_rate_is_kept_per_client() -> None:
    desk = Desk(requests_per_minute=2)
    assert desk.ask("request-1") == []
    assert desk.ask("request-2") == []
    out = desk.ask("request-3")
    assert code(out) == (429, "rate_limited")
    assert out[0][2]["error"]["retry_after_ms"] == pytest.approx(30_000, abs=10)
    assert desk.ask("request-3", client="boss") == []
    desk.now += 31
    assert desk.ask("request-3") == []


def test_long_prompts_make_debts() -> None:
    desk = Desk(prompt_tokens_per_minute=60)
    desk.ask("request-1")
    desk.happens(completion(usage=Usage(90, 0, 1, 0)))
    assert code(desk.ask("request-2")) == (429, "rate_limited")
    desk.now += 31
    assert desk.ask("request-2") == []


def test_a_client_s_requests_are_bounded() -> None:
    desk = Desk(max_requests_per_client=2)
    desk.ask("request-1")
    desk.ask("request-2")
    assert code(desk.ask("request-3")) == (429, "rate_limited")
    desk.happens(completion(), number=0)
    assert desk.ask("request-3") == []


def test_events_of_an_earlier_run_do_not_end_a_later_one(desk: Desk) -> None:
    desk.ask()
    desk.happens(Failure(BackendError("lost")))
    desk.ask()
    assert desk.happens(completion(), number=0) == []
    assert desk.core.busy == 1


def test_figures_count(desk: Desk) -> None:
    desk.ask()
    desk.happens(completion())
    desk.send({"id": "request-1"}, "reboot")
    desk.ask("x")
    desk.core.receive(
        Incoming(
            TOPICS.chat("dev-1", "robot"),
            json.dumps({"id": "request-2", "messages": [{}]}).encode(),
            response_topic="elsewhere",
        ),
        desk.now,
    )
    values = desk.core.figures.telemetry()
    assert values["finished"] == {"stop": 1}
    assert values["errors"] == {"invalid_id": 1}
    assert values["dropped"] == {"malformed_topic": 1}
    assert values["foreign_replies"] == 1
    assert (values["completion_tokens"], values["ttft_ms_p50"]) == (2, 300.0)


def test_energy_and_throttling_are_told_only_where_known() -> None:
    from edgecascade.device.monitor import Cost, Span

    class Meter:
        cost = Cost()

        def begin(self) -> Span:
            return Span(0.0, None, None)

        def end(self, span: Span) -> Cost:
            return self.cost

    meter = Meter()
    desk = Desk(monitor=meter)
    desk.ask()
    body = desk.happens(completion())[0][2]
    assert "energy" not in body
    assert "throttled" not in body
    meter.cost = Cost(joules=5.0, throttled=False)
    desk.ask("request-2")
    body = desk.happens(completion())[0][2]
    assert body["energy"] == {"joules": 5.0, "joules_per_token": 2.5}
    assert body["throttled"] is False


def test_long_answers_fit_the_broker(desk: Desk) -> None:
    desk.core.max_message_bytes = 4096
    desk.ask()
    out = desk.core
    desk.model.asked[0]["on_event"](completion(text="x" * 10_000))
    live, event = desk.events.pop()
    messages = out.tell(live, event, desk.now)
    assert len(messages) > 2
    assert all(len(message.payload) <= 4096 for message in messages)


def test_the_final_of_an_unchanged_request_is_byte_for_byte_the_same(desk: Desk) -> None:
    desk.ask()
    desk.model.asked[0]["on_event"](completion())
    live, event = desk.events.pop()
    first = desk.core.tell(live, event, desk.now)
    body = json.dumps({"id": "request-1", "messages": [{"role": "user", "content": "go"}]})
    again = desk.core.receive(
        Incoming(TOPICS.chat("dev-1", "robot"), body.encode(), correlation=b"9"), desk.now
    )
    assert again == [replace(message, correlation=b"9") for message in first]


def test_an_answer_that_is_asked_for_again_with_a_mark_fits_the_broker(desk: Desk) -> None:
    desk.core.max_message_bytes = 4096
    body = {"id": "request-1", "messages": [{"role": "user", "content": "go"}]}
    ask = Incoming(TOPICS.chat("dev-1", "robot"), json.dumps(body).encode())
    for text in ("x" * 3000, "x" * 10_000):
        desk.core.receive(ask, desk.now)
        desk.happens(completion(text=text))
        again = desk.core.receive(replace(ask, correlation=b"9" * 1000), desk.now)
        assert all(message.size <= 4096 for message in again)
        assert [len(message.correlation or b"") for message in again][-2:] == [0, 1000]
        desk.now += 1000.0


def test_marks_are_not_kept_with_the_answers(desk: Desk) -> None:
    for number in range(answers.MAX_ANSWERS // 100):
        body = {"id": f"request-{number}", "messages": [{"role": "user", "content": "go"}]}
        topic = TOPICS.chat("dev-1", "robot")
        ask = Incoming(topic, json.dumps(body).encode(), correlation=b"9" * (24 << 10))
        desk.core.receive(ask, desk.now)
        desk.happens(completion())
    kept = desk.core._answers
    assert sum(m.size for each in kept._answers.values() for m in each.messages) == kept._bytes
