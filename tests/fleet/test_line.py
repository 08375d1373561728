# SPDX-License-Identifier: Apache-2.0
"""What an agent's line says of its device, at a real broker: signed, at once, and again in time."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import installed
import pytest
from securesystemslib.signer import CryptoSigner

from edgecascade.fleet.agent import Agent
from edgecascade.fleet.identity import enrolment, own_key
from edgecascade.fleet.keys import KeyFolders, public_hex
from edgecascade.fleet.line import Line
from edgecascade.fleet.operator import Operator
from edgecascade.fleet.orders import Order
from edgecascade.fleet.register import Devices
from edgecascade.fleet.reports import DeviceKey, Keyring, read_enrolment
from edgecascade.fleet.repository import Repository
from edgecascade.fleet.settings import AgentSettings
from edgecascade.fleet.standing import Standing
from edgecascade.fleet.view import View
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import broker_address
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.topics import Topics

WAIT_S = 20.0
FRESH_S = 8.0  # what is left of the metadata's time
SIGNER = CryptoSigner.generate_ed25519()
KEY = DeviceKey("robot-1", "robot-1-agent", public_hex(SIGNER.public_key), ("all",))


class Ear:
    """Hears the words of all devices, proven."""

    def __init__(self, broker: LocalBroker) -> None:
        self.words: queue.Queue[Standing] = queue.Queue()
        filters = (Topics().standing("+"),)
        options = LinkOptions(broker_address(broker.url), "ear", filters, forget=True)
        self._link = Link(options, self._hear)
        self._link.start()
        assert self._link.wait_up(WAIT_S)

    def _hear(self, message: Incoming) -> None:
        self.words.put(Keyring([KEY]).standing(message.payload))

    def next(self, timeout_s: float = WAIT_S) -> Standing:
        return self.words.get(timeout=timeout_s)

    def close(self) -> None:
        self._link.stop()


@pytest.fixture(scope="module")
def broker() -> Iterator[LocalBroker]:
    with LocalBroker(installed.broker()) as running:
        yield running


@pytest.fixture
def ear(broker: LocalBroker) -> Iterator[Ear]:
    with closing(Ear(broker)) as opened:
        yield opened


class Body:
    """A device that stands as a test says."""

    def __init__(self) -> None:
        self.now = Standing("robot-1", 1, repository="")

    def standing(self, *, leaving: bool = False) -> Standing:
        said = replace(self.now, ts=round(time.time(), 3))
        return replace(said, status="offline") if leaving else said


@contextmanager
def line_of(broker: LocalBroker, folder: Path, body: Body) -> Iterator[Line]:
    settings = AgentSettings(root=str(folder), device_id="robot-1", mqtt=broker.url)
    line = Line(settings, body.standing, lambda data: None, SIGNER)
    line.start()
    try:
        yield line
    finally:
        line.close()


def test_a_device_says_how_it_stands_and_goodbye(
    broker: LocalBroker, ear: Ear, tmp_path: Path
) -> None:
    body = Body()
    with line_of(broker, tmp_path, body) as line:
        said = [ear.next()]
        body.now = replace(body.now, update_stale=True)
        line.tell_standing()
        said.append(ear.next())
        line.tell_standing()
        with pytest.raises(queue.Empty):
            ear.next(0.5)  # nothing has changed
    said.append(ear.next())
    assert [(word.status, word.update_stale) for word in said] == [
        ("online", False), ("online", True), ("offline", True),
    ]  # fmt: skip
    assert sorted(word.turn for word in said) == [word.turn for word in said]
    with closing(Ear(broker)) as late:
        assert late.next() == said[-1], "it is retained"


def test_a_device_speaks_again_when_nothing_changes(
    broker: LocalBroker, ear: Ear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgecascade.fleet.line.HEARTBEAT_S", 0.2)
    ear.next()  # retained from before
    with line_of(broker, tmp_path, Body()) as line:
        said = [ear.next()]
        while len(said) < 4:
            line.tell_standing()
            try:
                said.append(ear.next(0.05))
            except queue.Empty:
                continue
    numbers = [word.number for word in said]
    assert numbers == sorted(set(numbers))
    assert said[-1].ts > said[0].ts


def test_an_operator_sees_that_a_device_is_kept_from_news(
    broker: LocalBroker, tmp_path: Path
) -> None:
    """The timestamp runs out and no new one comes, as when a mirror holds it back."""
    made_at = time.time() - 30 * 86_400 + FRESH_S
    keys = KeyFolders([tmp_path / "keys"])
    repository = Repository.init(tmp_path / "repository", keys, made_at)
    (tmp_path / "root.json").write_bytes(repository.root_json)
    settings = AgentSettings(
        root=str(tmp_path / "device"), device_id="robot-9", groups=("news",), mqtt=broker.url,
        repository=(str(repository.folder),), trust=str(tmp_path / "root.json"),
    )  # fmt: skip
    agent = Agent(settings)
    key = own_key(settings.folder)
    devices = Devices().with_keys([read_enrolment(enrolment(settings, key))], 0.0)
    order = Order("none", 1, "news", "tiny", "1", "ab" * 32, 0.0, 1e12)
    seen: list[str] = []
    with (
        Operator(
            broker_address(broker.url), "watcher", Topics(), View(order, devices),
            group="news", order="none",
        ) as operator,
    ):  # fmt: skip

        def told() -> bool:
            now = time.time()
            trouble = operator.look()["robot-9"].trouble(now)
            if trouble not in seen[-1:]:
                seen.append(trouble)
            return seen[-2:] == ["", "stale"] or now > made_at + 30 * 86_400 + WAIT_S

        agent.run(told)
        standing = operator.look()["robot-9"].standing
    assert seen[-2:] == ["", "stale"], "it was well until then"
    assert standing is not None
    assert standing.fresh_until == pytest.approx(made_at + 30 * 86_400, abs=2.0)
