# SPDX-License-Identifier: Apache-2.0
"""serve and ask as programs: what a shell, systemd and a power switch see."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy
from serving import WAIT_S, Connect
from test_service import until

from edgecascade.cli import main
from edgecascade.client import Answer
from edgecascade.service.broker import BrokerSetup, LocalBroker, access_list, mosquitto_config

ASK = "go to the dock"
PROGRAM = [sys.executable, "-m", "edgecascade"]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(mosquitto: LocalBroker, bundle: Path, tmp_path: Path) -> Iterator[Start]:
    """start() -> a `serve` process that is ready."""
    with ExitStack() as stack:
        ear = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        ear.bind(str(tmp_path / "notify"))
        ear.settimeout(WAIT_S)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        environment["WATCHDOG_USEC"] = "1000000"

        def started(*options: str) -> subprocess.Popen[str]:
            command = [*PROGRAM, "serve", str(bundle), "--mqtt", mosquitto.url, *options]
            command += ["--device-id", "dev-1", "--state-dir", str(tmp_path)]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            while ear.recv(100) != b"READY=1":
                pass
            assert ear.recv(100) == b"WATCHDOG=1"
            return process

        yield started


def test_ask_prints_the_answer(start: Start, mosquitto: LocalBroker) -> None:
    start()
    command = [*PROGRAM, "ask", "--mqtt", mosquitto.url, "--max-tokens", "12", "--seed", "1", ASK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert "dev-1; " in done.stderr
    asked = subprocess.run(
        [*command[:-1], "--device", "dev-1", "--json", "-"],
        input=ASK,
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    message = json.loads(asked.stdout)["choices"][0]["message"]
    assert done.stdout == message["content"] + "\n"
    assert message.get("reasoning_content", "") in done.stderr


def test_ask_shows_reasoning_and_answer_each_on_its_line(
    start: Start, mosquitto: LocalBroker
) -> None:
    start()
    command = [*PROGRAM, "ask", "--mqtt", mosquitto.url, "--max-tokens", "12", "--seed", "1"]
    command += ["--thinking-budget", "3", "--device", "dev-1"]
    ask = {"stdout": subprocess.PIPE, "text": True, "check": True, "timeout": WAIT_S}
    whole = subprocess.run([*command, "--json", ASK], **ask)
    message = json.loads(whole.stdout)["choices"][0]["message"]
    screen = subprocess.run([*command, ASK], stderr=subprocess.STDOUT, **ask).stdout
    assert screen.startswith(f"{message['reasoning_content']}\n{message['content']}\n[dev-1; ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([""], "the text is empty"),
        (["--client-id", "", ASK], "client_id is ''"),
        (["--prefix", "", ASK], "topic prefix is ''"),
    ],
)
def test_what_is_given_to_ask_empty_is_not_taken_as_left_out(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["ask", "--mqtt", "mqtt://127.0.0.1:1", *options]) == 1
    assert f"error [invalid-request]: {words}" in capsys.readouterr().err


def test_ask_says_at_once_that_it_is_not_let_in(
    mosquitto: LocalBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    not_authorized = b"\x20\x03\x00\x87\x00"
    with Proxy(mosquitto.port, refusals=[not_authorized]) as proxy:
        assert main(["ask", "--mqtt", proxy.url, "--timeout", "60", ASK]) == 1
        assert len(proxy.versions) == 1  # no second try
    told = capsys.readouterr().err
    assert "error [network-failed]" in told
    assert "Not authorized; check the user name" in told


@contextmanager
def hangup(handler: signal.Handlers) -> Iterator[None]:
    """Processes that are started meanwhile inherit how SIGHUP is taken."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hangup_is_nothing_to_a_service_that_nohup_started(
    start: Start, connect: Connect
) -> None:
    with hangup(signal.SIG_IGN):
        process = start()
    process.send_signal(signal.SIGHUP)
    answer = connect("robot").chat("dev-1", ASK, max_completion_tokens=4, temperature=0)
    assert answer.usage["completion_tokens"] == 4
    assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_ends(start: Start, connect: Connect, number: signal.Signals) -> None:
    with hangup(signal.SIG_DFL):
        process = start()
    client = connect("robot")
    stream = client.stream("dev-1", ASK, max_completion_tokens=400, flush_ms=0, temperature=0)
    pieces = iter(stream)
    next(pieces)
    process.send_signal(number)
    for _ in pieces:
        pass
    assert stream.answer.finish_reason in ("stop", "length")
    assert process.wait(WAIT_S) == 0
    assert client.devices()["dev-1"].status == "offline"


def test_a_second_signal_ends_at_once_and_the_end_is_told(start: Start, connect: Connect) -> None:
    process = start()
    client = connect("robot")
    endless = {"max_completion_tokens": 2000, "timeout_s": 600, "temperature": 0}
    streams = [client.stream("dev-1", f"{ASK} {n}", flush_ms=0, **endless) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(next, stream) for stream in streams]
        for reader in readers:
            reader.result(WAIT_S)
        process.send_signal(signal.SIGTERM)
        assert until(lambda: client.devices()["dev-1"].status == "draining")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 130
    assert until(lambda: client.devices()["dev-1"].status == "offline")
    for stream in streams:
        stream.close()


def test_a_killed_service_that_comes_back_answers(start: Start, connect: Connect) -> None:
    process = start()
    client = connect("robot")
    answers: list[Answer] = []
    options: dict[str, Any] = {"max_completion_tokens": 200, "timeout_s": 60, "temperature": 0}
    alone = client.chat("dev-1", ASK, **options)

    def ask() -> None:
        stream = client.stream("dev-1", ASK, flush_ms=0, **options)
        for _ in stream:
            begun.set()
        answers.append(stream.answer)

    begun = threading.Event()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(WAIT_S)
    process.kill()
    process.wait()
    start()
    for thread in threads:
        thread.join(60)
    assert [answer.text for answer in answers] == [alone.text] * 4
    assert client.devices()["dev-1"].boot == 2


def test_serve_names_a_missing_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "bundle", "--mqtt", "mqtt://x"]) == 1
    assert "--device-id" in capsys.readouterr().err


def test_broker_config_prints_what_the_tests_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["broker-config", "--port", "9999", "--prefix", "fleet/x"]) == 0
    setup = BrokerSetup(prefix="fleet/x", port=9999)
    assert capsys.readouterr().out == mosquitto_config(setup)
    assert main(["broker-config", "--acl", "--pool", "lab=a,b", "--operator", "boss"]) == 0
    setup = BrokerSetup(operators=["boss"], pools={"lab": ["a", "b"]})
    assert capsys.readouterr().out == access_list(setup)
    assert main(["broker-config", "--pool", "lab"]) == 1
    assert main(["broker-config", "--operator", "a b\ntopic #"]) == 1
    assert "error [invalid-request]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "65536"], "port is 65536; it must be in [1, 65535]"),
        (["--folder", ""], "folder is ''; give an absolute path"),
        (["--folder", "mosquitto"], "folder is 'mosquitto'"),
        (["--folder", "/x\nallow_anonymous true"], "folder is '/x"),
    ],
)
def test_broker_config_refuses_what_no_broker_takes(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["broker-config", *options]) == 1
    out, err = capsys.readouterr()
    assert (out, err.startswith(f"error [invalid-request]: {words}")) == ("", True)


def test_unit_names_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["unit", "bundle", "--config", "service.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"serve {tmp_path}/bundle --config {tmp_path}/service.yaml" in out
