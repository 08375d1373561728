# SPDX-License-Identifier: Apache-2.0
"""The rows of the table in docs/mqtt.md that depend on what the device does, by a real broker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import WAIT_S, Serve
from test_service import ASK, GREEDY, TOPICS, Raw, until

from edgecascade import LLM
from edgecascade.errors import BackendError
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import ServiceConfig
from edgecascade.service.service import MAX_FAILURES, Service


@pytest.fixture
def raw(mosquitto: LocalBroker) -> Iterator[Raw]:
    client = Raw(mosquitto, "stranger")
    yield client
    client.close()


@pytest.fixture
def narrow(bundle: Path, mosquitto: LocalBroker, tmp_path: Path) -> Iterator[Service]:
    """A service with one slot and room for one more to wait."""
    with ExitStack() as stack:
        llm = stack.enter_context(LLM.load(bundle, slots=1, max_queue=1))
        config = ServiceConfig(mqtt=mosquitto.url, device_id="dev-1", state_dir=str(tmp_path))
        service = stack.enter_context(Service(llm, config))
        thread = threading.Thread(target=service.run)
        stack.callback(thread.join)
        stack.callback(service.stop)
        thread.start()
        assert service.wait_ready(WAIT_S)
        yield service


def ask(raw: Raw, id: str, **options: Any) -> None:
    body = {"id": id, "messages": ASK, **GREEDY, **options}
    raw.publish(raw.chat, json.dumps(body).encode())


def refused(raw: Raw, id: str) -> tuple[int, str, dict[str, Any]]:
    _, body = raw.last_word()
    assert body["id"] == id
    return body["error"]["status"], body["error"]["code"], body["error"]


@contextmanager
def held(service: Service) -> Iterator[None]:
    """Nothing is computed meanwhile: what is asked waits."""
    go_on, holding = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        holding.set()
        assert go_on.wait(WAIT_S)

    holder = threading.Thread(target=service._core._model._engine.call, args=(hold,))
    holder.start()
    try:
        assert holding.wait(WAIT_S)
        yield
    finally:
        go_on.set()
        holder.join()


def wait_in_line(raw: Raw, service: Service, id: str, **options: Any) -> None:
    queue = service._core._model.stats
    before = queue().waiting
    ask(raw, id, **options)
    assert until(lambda: queue().waiting > before)


def test_a_full_queue_is_429_and_says_when(narrow: Service, raw: Raw) -> None:
    with held(narrow):
        wait_in_line(raw, narrow, "waiting-0001")
        ask(raw, "refused-0001")
        status, code, error = refused(raw, "refused-0001")
    assert (status, code) == (429, "queue_full")
    assert error["retry_after_ms"] > 0
    assert raw.last_word()[1]["id"] == "waiting-0001"
    ask(raw, "refused-0001")  # the same id again, as it was told: now it runs
    assert raw.last_word()[1]["object"] == "chat.completion"


def test_a_client_over_its_rate_is_429_and_others_go_on(
    serve: Serve, raw: Raw, mosquitto: LocalBroker
) -> None:
    serve(requests_per_minute=1)
    ask(raw, "request-0001")
    assert raw.last_word()[1]["object"] == "chat.completion"
    ask(raw, "request-0002")
    status, code, error = refused(raw, "request-0002")
    assert (status, code) == (429, "rate_limited")
    assert 0 < error["retry_after_ms"] <= 60_001
    other = Raw(mosquitto, "neighbour")
    try:
        ask(other, "request-0002")
        assert other.last_word()[1]["object"] == "chat.completion"
    finally:
        other.close()


def test_a_device_that_stops_finishes_what_runs_and_is_503_for_the_rest(
    serve: Serve, raw: Raw
) -> None:
    service = serve()
    with held(service):
        wait_in_line(raw, service, "running-0001")
        service.stop()
        assert until(lambda: service._core.draining)
        ask(raw, "too-late-0001")
        status, code, error = refused(raw, "too-late-0001")
    assert (status, code) == (503, "draining")
    assert error["retryable"] is True
    assert error["retry_after_ms"] > 0
    body = raw.last_word()[1]
    assert (body["id"], body["object"]) == ("running-0001", "chat.completion")


def test_a_device_that_fails_is_500_and_the_next_request_runs(
    serve: Serve, raw: Raw, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()

    def lost(*_: object) -> None:
        raise BackendError("the device is lost")

    with monkeypatch.context() as broken:
        broken.setattr(llm._engine._backend, "decode", lost)
        ask(raw, "request-0001")
        status, code, error = refused(raw, "request-0001")
    assert (status, code, error["retryable"]) == (500, "engine_error", True)
    ask(raw, "request-0001")
    assert raw.last_word()[1]["object"] == "chat.completion"


def test_a_device_that_only_fails_ends_so_that_it_is_started_anew(
    bundle: Path, mosquitto: LocalBroker, tmp_path: Path, raw: Raw
) -> None:
    config = ServiceConfig(mqtt=mosquitto.url, device_id="dev-1", state_dir=str(tmp_path))
    raised: list[BaseException] = []

    def run() -> None:
        try:
            service.run()
        except BackendError as error:
            raised.append(error)

    with LLM.load(bundle, slots=1) as llm:
        with Service(llm, config) as service:
            runner = threading.Thread(target=run)
            runner.start()
            assert service.wait_ready(WAIT_S)
            llm.close()  # as when the engine stopped
            for number in range(MAX_FAILURES):
                assert not raised
                ask(raw, f"request-{number}")
                assert refused(raw, f"request-{number}")[:2] == (500, "engine_error")
            runner.join(WAIT_S)
        assert "8 requests in a row" in str(raised[0])
        raw.client.subscribe(TOPICS.status("dev-1"))
        assert json.loads(raw.got.get(timeout=WAIT_S).payload)["status"] == "offline"


def test_who_may_not_is_403(serve: Serve, raw: Raw) -> None:
    serve()
    ask(raw, "request-0001", priority=-1)
    assert refused(raw, "request-0001")[0] == 403


def test_another_model_is_404_and_an_unknown_cancel_too(serve: Serve, raw: Raw) -> None:
    serve()
    ask(raw, "request-0001", model="gpt-9")
    assert refused(raw, "request-0001")[:2] == (404, "model_not_found")
    raw.publish(raw.chat.replace("/chat/", "/cancel/"), b'{"id":"nobody-0001"}')
    assert refused(raw, "nobody-0001")[:2] == (404, "not_found")


def test_a_deadline_that_passes_in_the_queue_is_408(narrow: Service, raw: Raw) -> None:
    with held(narrow):
        wait_in_line(raw, narrow, "waiting-0001", timeout_s=2)
        time.sleep(2.1)
    assert refused(raw, "waiting-0001")[:2] == (408, "deadline_exceeded")
