# SPDX-License-Identifier: Apache-2.0
"""Local brokers start, answer, and never outlive who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgecascade.errors import NetworkError
from edgecascade.service import broker as brokers
from edgecascade.service.broker import LocalBroker, answers, find_broker


def gone(pid: int) -> bool:
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.01)
    return False


def test_it_answers_until_it_is_stopped(any_broker: LocalBroker) -> None:
    assert answers(any_broker.port)
    assert any_broker.url == f"mqtt://127.0.0.1:{any_broker.port}"
    pid = any_broker.pid
    any_broker.stop()
    assert gone(pid)
    assert not answers(any_broker.port)


def test_it_listens_on_loopback_only(any_broker: LocalBroker) -> None:
    wanted = f"{any_broker.port:04X}"
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [row.split()[1] for row in rows if row.split()[3] == "0A"]
    assert [at for at in listening if at.endswith(wanted)] == [f"0100007F:{wanted}"]


def test_it_comes_back_on_the_same_port(mosquitto: LocalBroker) -> None:
    port = mosquitto.port
    mosquitto.kill()
    assert not answers(port)
    mosquitto.start()
    assert mosquitto.port == port
    assert answers(port)


def test_it_dies_with_its_parent_and_leaves_no_file(
    any_broker: LocalBroker, tmp_path: Path
) -> None:
    code = (
        "import sys, time\n"
        "from edgecascade.service.broker import LocalBroker, find_broker\n"
        "broker = LocalBroker(find_broker(sys.argv[1])).start()\n"
        "print(broker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, any_broker.program.kind]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not Path(f"/proc/{pid}/stat").read_text().endswith(" Z ")
        parent.send_signal(signal.SIGKILL)
    assert gone(pid)
    assert list(tmp_path.iterdir()) == []


def test_it_outlives_the_thread_that_started_it(mosquitto: LocalBroker) -> None:
    mosquitto.kill()
    starter = threading.Thread(target=mosquitto.start)
    starter.start()
    starter.join()
    time.sleep(0.3)
    assert answers(mosquitto.port)


def test_its_own_words_are_in_the_error(mosquitto: LocalBroker) -> None:
    broken = LocalBroker(mosquitto.program, extra_config="no_such_option yes\n")
    try:
        with pytest.raises(NetworkError, match="no_such_option"):
            broken.start()
    finally:
        broken.stop()


def test_without_a_broker_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "FOLDERS", ())
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv(brokers.VARIABLE, raising=False)
    monkeypatch.setattr(brokers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NetworkError, match="apt install mosquitto"):
        find_broker()
    monkeypatch.setenv(brokers.VARIABLE, "/opt/mosquitto")
    assert find_broker().path == "/opt/mosquitto"
