# SPDX-License-Identifier: Apache-2.0
"""The agent on one device: set up, fed from a stick, told what it may not do, and watched."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import queue
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
from golden import Build

from edgecascade.cli import agent as commands
from edgecascade.cli import main
from edgecascade.errors import (
    DownloadFailed,
    InvalidRequest,
    NetworkError,
    UpdateFailed,
    UpdateRefused,
)
from edgecascade.files import sha256_file
from edgecascade.fleet import agent as agents
from edgecascade.fleet import delta as deltas
from edgecascade.fleet import intake, orders, probation, refresh, stick
from edgecascade.fleet.agent import Agent, own, trusted_root
from edgecascade.fleet.child import Child, ChildState, Command
from edgecascade.fleet.faults.web import Site, drip
from edgecascade.fleet.fetch import Downloader
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.home import Home
from edgecascade.fleet.host import DeviceHost
from edgecascade.fleet.intake import Envelope, Held, Intake, Offer, Refusal, Result, said_order
from edgecascade.fleet.orders import Order, Policy
from edgecascade.fleet.refresh import MAX_ROOT_BYTES, Trust, folder_fetch
from edgecascade.fleet.release import DeltaRef, GoldenPrompt, Health, Release
from edgecascade.fleet.repository import Offer as ReleaseOffer
from edgecascade.fleet.settings import HELP, AgentSettings, foreign_config, from_options
from edgecascade.fleet.sources import Body, FolderSource, HttpSource, Patience, Source
from edgecascade.fleet.state import DeviceState, Phase, Slot, Update, Verdict
from edgecascade.fleet.stick import Outcome
from edgecascade.fleet.store import MARGIN_BYTES, Store
from edgecascade.service.config import ServiceConfig, from_mapping
from edgecascade.service.mqtt import Link

GROUP, NAME, DEVICE = "lab", "tiny", "robot-7"
PATIENCE = Patience(connect_s=5, head_s=0.5, read_s=0.5, min_bytes_per_s=10_000, window_s=0.3)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Home:
    """An operator's folder with the demo's bundle as version 1."""
    made = Home(tmp_path_factory.mktemp("operator") / "fleet")
    made.init("small", ["operator"])
    publish(made, build("tiny", "speed"), "1")
    return made


def publish(home: Home, bundle: Path, version: str, *prompts: GoldenPrompt) -> Release:
    offer = ReleaseOffer(NAME, version, health=Health(prompts=prompts))
    return home.repository().publish(bundle, offer, time.time()).release


def order(home: Home, name: str, version: str = "1", **changes: Any) -> Order:
    repository = home.repository()
    _, sha256 = repository.release(NAME, version)
    made = Order(
        name, repository.next_seq(GROUP), GROUP, NAME, version, sha256, 0.0, time.time() + 3600,
        policy=Policy(retries=0),
    )  # fmt: skip
    return replace(made, **changes)


def settings(root: Path, home: Home, **more: Any) -> AgentSettings:
    values = {"trust": str(home.folder / "root.json"), "groups": (GROUP,), **more}
    return AgentSettings(str(root), DEVICE, **values)


def install(home: Home, root: Path, *more: str) -> int:
    command = ["agent", "install", str(home.served), "--root", str(root), "--device-id", DEVICE]
    trust = str(home.folder / "root.json")
    return main([*command, "--group", GROUP, "--trust", trust, *more])


def test_an_empty_device_is_installed_from_a_stick(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "device"
    home.repository().sign_order(order(home, "stick"))
    assert install(home, root) == 0
    assert f"stick: SUCCEEDED {NAME} 1" in capsys.readouterr().out
    assert main(["agent", "status", "--root", str(root), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    release, _ = home.repository().release(NAME, "1")
    assert facts["active"]["manifest"] == release.manifest.sha256
    assert facts["agent_runs"] is False
    folder = root / "bundles" / release.manifest.sha256
    assert {p.name for p in folder.iterdir()} == {file.path for file in release.every_file}
    assert os.listdir(root / "partial") == []
    # The same order again changes nothing and says the same.
    assert install(home, root) == 0


def test_a_stick_with_wrong_answers_leaves_the_device_as_it_was(
    home: Home, tmp_path: Path, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "device"
    never = GoldenPrompt(prompt="go", max_tokens=2, tokens=(1, 1))
    publish(home, build("tiny", "speed"), "2-wrong", never)
    home.repository().sign_order(order(home, "wrong", "2-wrong"))
    assert install(home, root, "--json") == 1
    (verdict,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert (verdict["state"], verdict["evidence"]["reason"]) == ("FAILED", "wrong-answer")
    assert os.listdir(root / "bundles") == []
    assert os.listdir(root / "blobs") == []


def test_a_stick_with_flipped_bits_is_refused(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stick = tmp_path / "stick"
    home.repository().sign_order(order(home, "flipped"))
    shutil.copytree(home.served, stick)
    largest = max((stick / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[100] ^= 1
    largest.write_bytes(data)
    command = ["agent", "install", str(stick), "--root", str(tmp_path / "device")]
    trust = str(home.folder / "root.json")
    assert main([*command, "--device-id", DEVICE, "--group", GROUP, "--trust", trust]) == 1
    assert "wrong-hash" in capsys.readouterr().out


def test_a_stick_of_another_fleet_is_refused(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Home(tmp_path / "other")
    other.init("small", ["stranger"])
    home.repository().sign_order(order(home, "mine"))
    command = ["agent", "install", str(home.served), "--root", str(tmp_path / "device")]
    trust = str(other.folder / "root.json")
    assert main([*command, "--device-id", DEVICE, "--group", GROUP, "--trust", trust]) == 1
    assert "not known" in capsys.readouterr().err


def test_one_order_of_a_stick_that_is_refused_does_not_keep_another_from_being_installed(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    past = order(home, "past", group="past", seq=home.repository().next_seq("past"))
    home.repository().sign_order(replace(past, expires=time.time() - 1))
    home.repository().sign_order(order(home, "present"))
    assert install(home, tmp_path / "device", "--group", "past", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [verdict["order"] for verdict in said["verdicts"]] == ["present"]
    assert said["refused"].keys() == {"past"}
    assert "expired" in said["refused"]["past"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "robot-8"}, "is not for robot-7"),
        ({"action": "pause"}, "says pause, and installs nothing"),
        ({"seq": 1}, "has the number 1, 9 was heard before it"),
        ({"release_sha256": "0" * 64}, "wrong-release"),
    ],
)
def test_an_order_that_installs_nothing_ends_the_command_at_once(
    home: Home,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    reason: str,
) -> None:
    stick, root = tmp_path / "stick", tmp_path / "device"
    shutil.copytree(home.served, stick)
    (signer,) = (key.signer for key in home.keys.keys("orders"))
    root.mkdir()
    state = DeviceState(seqs={replace(order(home, "any")).key: 9} if "seq" in changes else {})
    (root / "state.json").write_bytes(state.to_bytes())
    envelope = orders.sign(order(home, "nothing", **changes), [signer])
    (stick / "orders" / f"{GROUP}.json").write_bytes(envelope)
    command = ["agent", "install", str(stick), "--root", str(root), "--device-id", DEVICE]
    trust = str(home.folder / "root.json")
    assert main([*command, "--group", GROUP, "--trust", trust, "--timeout", "60"]) == 1
    said = capsys.readouterr()
    assert reason in said.out + said.err


STATE = DeviceState(
    active=Slot(NAME, "1", 1, "a" * 64, "b" * 64),
    verdicts=(Verdict("old", GROUP, 1, "SUCCEEDED"), Verdict("bad", GROUP, 2, "FAILED")),
)


@pytest.mark.parametrize(
    ("outcomes", "status", "said"),
    [
        ({"old": Outcome(True)}, 0, ""),
        ({"old": Outcome(True), "others": Outcome(True, "is not for it")}, 0, "is not for it"),
        ({"old": Outcome(True), "y": Outcome()}, 1, "order 'y': no verdict in time"),
        ({"old": Outcome()}, 1, "order 'old': no verdict in time"),
        ({"old": Outcome(False, "waits: no mirror")}, 1, "waits: no mirror"),
        ({"old": Outcome(True), "bad": Outcome(True)}, 1, ""),
        ({"others": Outcome(True, "is not for it")}, 1, "is not for it"),
        ({}, 1, "the agent does not answer"),
    ],
)
def test_install_succeeds_when_all_that_was_taken_has_succeeded(
    home: Home,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    outcomes: dict[str, Outcome],
    status: int,
    said: str,
) -> None:
    monkeypatch.setattr(commands, "POLL_S", 0.0)
    monkeypatch.setattr(agents, "LOCK_S", 0.0)
    monkeypatch.setattr(stick, "ask", lambda root, folder: stick.answer(root, outcomes))
    home.repository().sign_order(order(home, "any"))
    with own(tmp_path):
        (tmp_path / "state.json").write_bytes(STATE.to_bytes())
        assert install(home, tmp_path, "--timeout", "0.2") == status
    assert said in capsys.readouterr().err


def test_what_an_order_that_was_offered_has_come_to(home: Home) -> None:
    mine = order(home, "mine", seq=5)
    new = Slot(NAME, "2", 2, "c" * 64, "d" * 64)
    running = replace(STATE, update=Update(mine, new, Phase.WAITING), seqs={mine.key: 5})
    assert running.update is not None
    paused = replace(running, update=replace(running.update, paused=True))
    ended = running.with_verdict(Verdict("mine", GROUP, 5, "SUCCEEDED"))
    assert stick.outcome(mine, running, pending=True) == Outcome()
    assert stick.outcome(mine, replace(ended, update=None), pending=False) == Outcome(True)
    full = stick.outcome(mine, STATE, pending=True, trouble="No space left on device")
    assert full == Outcome(False, "order 'mine' waits for the disk: No space left on device")
    for state, why in (
        (paused, "is paused until the operator resumes it"),
        (replace(running, update=None), "has the number 5, 5 was heard before it"),
        (replace(running, update=None, seqs={mine.key: 9}), "number 5, 9 was heard before it"),
        (STATE, "is not taken: another came in its place"),
    ):
        found = stick.outcome(mine, state, pending=False)
        assert found.over
        assert why in found.why


@pytest.fixture
def idle(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """An agent that has begun, and does no work."""
    monkeypatch.setattr(DeviceHost, "spawn", lambda host, work, post: None)
    made = Agent(settings(tmp_path / "device", home, groups=(GROUP, "all")))
    made._executor.boot()
    yield made
    made._host.close()
    made._lock.close()


def test_an_order_of_a_stick_that_the_broker_pauses_is_over(home: Home, idle: Agent) -> None:
    mine = order(home, "mine")
    document = home.repository().release(NAME, "1")[0].to_bytes()
    idle.outcomes = {"mine": Outcome()}
    idle._taken(Offer(mine, document, "", "/stick"))
    idle._periodic()
    assert idle.outcomes == {"mine": Outcome()}
    idle._taken(Offer(replace(mine, action="pause", seq=mine.seq + 1)))
    idle._periodic()
    assert "is paused" in idle.outcomes["mine"].why
    assert stick.is_over(stick.answered(idle._root))


def test_an_order_of_a_stick_that_another_replaces_before_its_turn_is_over(
    home: Home, idle: Agent
) -> None:
    mine = order(home, "mine")
    new = Slot(NAME, "2", 2, "c" * 64, "d" * 64)
    switching = Update(replace(mine, order="now", group="all"), new, Phase.PROBATION)
    idle._executor.state = replace(STATE, update=switching)
    document = home.repository().release(NAME, "1")[0].to_bytes()
    idle.outcomes = {"mine": Outcome()}
    idle._taken(Offer(mine, document, "", "/stick"))
    idle._periodic()
    assert idle.outcomes == {"mine": Outcome()}
    idle._taken(Offer(replace(mine, order="later", seq=mine.seq + 1), document))
    idle._periodic()
    assert "another came in its place" in idle.outcomes["mine"].why


def test_an_order_of_a_stick_that_waits_is_told_and_tried_again(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "REST_S", 0.0)
    working, troubles = Trust.release, [NetworkError("the stick does not answer")]

    def release(trust: Trust, *more: str) -> tuple[Release, bytes]:
        if troubles:
            raise troubles.pop()
        return working(trust, *more)

    monkeypatch.setattr(Trust, "release", release)
    home.repository().sign_order(order(home, "waits"))
    assert install(home, tmp_path / "device", "--timeout", "60") == 0
    said = capsys.readouterr()
    assert "order 'waits' waits: the stick does not answer" in said.err
    assert f"waits: SUCCEEDED {NAME} 1" in said.out


def test_a_request_that_cannot_be_read_is_answered_once(
    idle: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == stick.REQUEST and path.exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return working(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    stick.ask(idle._root, tmp_path)
    idle._requested()
    assert not (idle._root / stick.REQUEST).exists()
    (outcome,) = stick.answered(idle._root).values()
    assert outcome.over
    assert "Permission denied" in outcome.why


def test_a_running_agent_outlives_a_stick_that_cannot_be_read(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stick = tmp_path / "stick"
    (stick / "orders" / f"{GROUP}.json").mkdir(parents=True)
    running = Agent(settings(tmp_path / "device", home))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        words = [str(stick), "--root", str(tmp_path / "device"), "--device-id", DEVICE]
        command = ["agent", "install", *words, "--group", GROUP, "--timeout", "60"]
        assert main(command) == 1
        assert f"no order for the groups {GROUP}" in capsys.readouterr().err

        def fetch(path: str, limit: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(agents, "folder_fetch", lambda folder: fetch)
        assert main(command) == 1
        assert "Input/output error" in capsys.readouterr().err
        assert thread.is_alive()
    finally:
        running.stop()
        thread.join()


def test_only_an_order_that_will_be_installed_from_a_stick_has_its_blobs(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceHost, "spawn", lambda host, work, post: None)
    made = Agent(settings(tmp_path / "device", home, groups=(GROUP, "all")))
    try:
        made._executor.boot()
        first = order(home, "first")
        document = home.repository().release(NAME, "1")[0].to_bytes()
        made._taken(Offer(first, document, "", "/stick"))
        other = replace(first, order="other", group="all", seq=1)
        made._taken(Offer(replace(other, action="pause"), source="/stick"))
        made._taken(Offer(replace(other, seq=2), document, "too little memory", "/stick"))
        made._taken(Offer(replace(other, order="heard", seq=3), document, "nothing for it"))
        assert made.state.update is not None
        assert made.state.update.order == first
        assert made._host.sources(first)[0].name.startswith("/stick/blobs")
        assert made._host.sources(other) == []
    finally:
        made._host.close()
        made._lock.close()


def test_a_stick_without_an_order_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    command = ["agent", "install", str(empty), "--root", str(tmp_path / "d"), "--device-id", "d"]
    assert main(command) == 1
    assert "no order for the groups all" in capsys.readouterr().err


def test_a_running_agent_takes_a_stick(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "device"
    home.repository().sign_order(order(home, "beside"))
    running = Agent(settings(root, home))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        assert install(home, root, "--timeout", "300") == 0
    finally:
        running.stop()
        thread.join()
    assert f"beside: SUCCEEDED {NAME} 1" in capsys.readouterr().out


def test_an_enrolment_is_on_the_stick_or_the_one_before_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = AgentSettings(str(tmp_path / "device"), DEVICE)
    commands._enroll(device, str(tmp_path))
    path = tmp_path / f"{DEVICE}.enroll.json"
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        commands._enroll(replace(device, groups=(GROUP,)), str(tmp_path))
    assert path.read_bytes() == before


def test_a_folder_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "LOCK_S", 0.0)
    with own(tmp_path), pytest.raises(InvalidRequest, match="another agent"):
        own(tmp_path)
    own(tmp_path).close()


def test_the_root_of_trust_is_never_replaced(home: Home, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"root\.json"):
        trusted_root(tmp_path, None)
    first = trusted_root(tmp_path, str(home.folder / "root.json"))
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert trusted_root(tmp_path, str(other)) == first
    assert trusted_root(tmp_path, None) == first


def test_what_is_no_root_of_trust_is_not_kept(home: Home, tmp_path: Path) -> None:
    sound = (home.folder / "root.json").read_bytes()
    other = next((home.served / "metadata").glob("*.targets.json")).read_bytes()
    unsigned = sound.replace(b'"sig":"', b'"sig":"00').replace(b'"sig": "', b'"sig": "00')
    for wrong in (b"hello", b"", b"[]", other, unsigned, sound + b" " * MAX_ROOT_BYTES):
        given = tmp_path / "notes.txt"
        given.write_bytes(wrong)
        with pytest.raises(UpdateRefused, match=r"notes\.txt is no repository's root\.json"):
            trusted_root(tmp_path, str(given))
    assert trusted_root(tmp_path, str(home.folder / "root.json")) == sound


def test_a_root_of_trust_that_was_damaged_is_named_and_ends_no_agent(
    home: Home, tmp_path: Path
) -> None:
    root = tmp_path / "device"
    root.mkdir()
    (root / "root.json").write_bytes(b"{}")
    made = Agent(settings(root, home, repository=(str(home.served),)))
    try:
        made._intake._refresh(made._intake.trusts)
        assert f"{root}/root.json is no repository's root.json" in made._standing().repository
    finally:
        made._host.close()
        made._lock.close()


@pytest.mark.parametrize("key", ["mqtt", "device_id", "key", "clients", "state_dir", "command"])
def test_a_release_cannot_say_who_the_device_is(key: str) -> None:
    assert key in foreign_config({"flush_ms": 20, key: "x"})
    assert foreign_config({"flush_ms": 20}) == ""


@pytest.mark.parametrize("value", ["fast", -1, None])
def test_a_release_cannot_set_what_the_service_cannot_read(value: object) -> None:
    assert "flush_ms" in foreign_config({"flush_ms": value})


def test_the_device_s_own_words_stand_above_a_release_s(tmp_path: Path) -> None:
    own_file = tmp_path / "service.yaml"
    own_file.write_text("mqtt: mqtt://site\nflush_ms: 99\n")
    device = AgentSettings(str(tmp_path), DEVICE, mqtt="mqtt://x", service=str(own_file))
    values = device.service_values({"flush_ms": 20, "drain_s": 5})
    assert (values["flush_ms"], values["drain_s"]) == (99, 5)
    assert (values["mqtt"], values["device_id"]) == ("mqtt://site", DEVICE)
    ServiceConfig(**from_mapping(values, "test"))


def test_the_status_of_a_device_without_a_folder_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.yaml").write_text("device_id: robot-7\n")
    assert main(["agent", "status", "--config", str(tmp_path / "agent.yaml")]) == 1
    assert "give the device's folder: --root DIR" in capsys.readouterr().err


def test_settings_are_strict(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(f"root: {tmp_path}\ndevice_id: robot-7\ngroups: [a, b]\nrefresh_s: 60\n")
    nothing = dict.fromkeys(HELP)
    given = argparse.Namespace(**{**nothing, "config": str(file), "groups": ["c"]})
    made = from_options(given)
    assert (made.groups, made.name, made.refresh_s) == (("c",), "robot-7-agent", 60.0)
    for wrong in ({"refresh_s": 0.0}, {"groups": ("a b",)}, {"caches": ("http://u@h/",)}):
        with pytest.raises(InvalidRequest):
            replace(made, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="certificate of its own"):
        replace(made, cert="agent.crt", key="agent.key")


class Box:
    """What an intake decides."""

    def __init__(self, home: Home, root: Path, fetch: Callable[[str, int], bytes]) -> None:
        root.mkdir()
        self.results: list[Result] = []
        trust = Trust(root, (home.folder / "root.json").read_bytes(), fetch)
        self.intake = Intake(
            [trust], lambda folder: trust, DEVICE, [GROUP], lambda release: "",
            self.results.append, rest_s=0.0,
        )  # fmt: skip

    def take(self, envelope: bytes) -> Result:
        self.intake.take(Envelope(envelope))
        return self.results[-1]


def test_an_order_waits_for_a_repository_that_is_out_of_reach(home: Home, tmp_path: Path) -> None:
    there = folder_fetch(home.served)
    down = False

    def fetch(path: str, limit: int) -> bytes:
        if down:
            raise NetworkError("nobody there")
        return there(path, limit)

    box = Box(home, tmp_path / "device", fetch)
    envelope = home.repository().sign_order(order(home, "waits"))
    assert isinstance(box.take(envelope), Offer)
    down = True
    held = box.take(envelope)
    assert isinstance(held, Held)
    assert held.order.order == "waits"
    down = False
    offer = box.take(envelope)
    assert isinstance(offer, Offer)
    assert offer.document is not None


def test_an_order_that_asks_for_what_is_not_published_is_refused_in_the_end(
    home: Home, tmp_path: Path
) -> None:
    box = Box(home, tmp_path / "device", folder_fetch(home.served))
    lost = order(home, "lost", release_sha256="0" * 64)
    offer = box.take(home.repository().sign_order(lost))
    assert isinstance(offer, Offer)
    assert offer.document is None
    assert "wrong-release" in offer.refusal


def test_an_order_of_a_revoked_key_is_refused_though_it_was_good(
    home: Home, tmp_path: Path
) -> None:
    box = Box(home, tmp_path / "device", folder_fetch(home.served))
    repository = home.repository()
    key = repository.add_order_key("former", time.time())
    signed = orders.sign(order(home, "former"), [key.signer])
    assert isinstance(box.take(signed), Offer)
    repository.revoke_order_key("former", time.time())
    refusal = box.take(signed)
    assert isinstance(refusal, Refusal)
    assert refusal.reason in ("signature", "epoch")
    assert (refusal.order, refusal.group) == ("former", GROUP)
    said = said_order(signed)
    assert said is not None
    assert (said.order, said.seq) == ("former", refusal.seq)


def test_an_order_for_others_is_none_of_ours(home: Home, tmp_path: Path) -> None:
    box = Box(home, tmp_path / "device", folder_fetch(home.served))
    other = order(home, "other", device="robot-8")
    box.intake.take(Envelope(home.repository().sign_order(other)))
    assert box.results == []


def test_an_order_waits_for_a_disk_that_fails(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(home, tmp_path / "device", folder_fetch(home.served))
    working, troubles = Trust.order_keys, [OSError(errno.EIO, "no such sector")]

    def order_keys(trust: Trust, system: float) -> orders.OrderKeys:
        if troubles:
            raise troubles.pop()
        return working(trust, system)

    monkeypatch.setattr(Trust, "order_keys", order_keys)
    taken: queue.Queue[Result] = queue.Queue()
    box.intake.post = taken.put
    envelope = home.repository().sign_order(order(home, "disk"))
    box.intake._waiting.append(Envelope(envelope, pause_s=0.01))
    box.intake.start()
    try:
        assert isinstance(taken.get(timeout=60), Offer)
    finally:
        box.intake.close()


@pytest.mark.parametrize("name", ["raise_floor", "read_floor"])
def test_a_disk_that_fails_for_a_while_is_no_answer_of_the_repository(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    box = Box(home, tmp_path / "device", folder_fetch(home.served))
    envelope = home.repository().sign_order(order(home, "full"))
    box.intake._refresh(box.intake.trusts)

    def fail(*given: object, **more: object) -> None:
        raise OSError(errno.EIO, "no such sector")

    with monkeypatch.context() as failing:
        failing.setattr(refresh, name, fail)
        for _ in range(3):
            held = box.take(envelope)
            assert isinstance(held, Held)
            assert held.reason == "disk"
    assert isinstance(box.take(envelope), Offer)


def test_a_floor_that_cannot_be_read_costs_no_metadata_that_are_sound(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(home, tmp_path / "device", folder_fetch(home.served))
    (trust,) = box.intake.trusts
    trust.refresh(time.time())
    kept = set(os.listdir(tmp_path / "device" / "tuf"))

    def fail(files: object) -> None:
        raise OSError(errno.EIO, "no such sector")

    monkeypatch.setattr(refresh, "read_floor", fail)
    with pytest.raises(UpdateFailed, match="no such sector"):
        trust.refresh(time.time())
    assert set(os.listdir(tmp_path / "device" / "tuf")) == kept


class Voice:
    """The agent of a host that only downloads."""

    def now(self) -> float:
        return time.time()

    def report(self, report: object, revision: int) -> None: ...

    def wake(self, at: float) -> None: ...

    def progress(self, order: str, share: float) -> None: ...

    def ask(self, messages: tuple[Mapping[str, Any], ...], timeout_s: float) -> dict[str, Any]:
        return {}


def download(home: Home, root: Path, site: Site, release: Release) -> None:
    def source_at(place: str) -> Source:
        return HttpSource(place, PATIENCE)

    device = settings(root, home, repository=(site.url,))
    host = DeviceHost(device, Voice(), lambda slot: release, source_at, lambda: None, PATIENCE)
    try:
        (root / "partial").mkdir(parents=True)
        host._mine.halts = host._halts
        host.download(order(home, "any"), release, release.blobs, lambda sha256: None)
    finally:
        host.close()


class Differing:
    """A device that has a blob, and a folder with its successor and the difference."""

    def __init__(self, home: Home, folder: Path) -> None:
        rng = random.Random(4)
        base, more = rng.randbytes(2 << 20), rng.randbytes(1 << 20)
        self.blob = base[: 1 << 20] + more
        self.root, self.opened = folder / "device", list[str]()
        (served := folder / "served").mkdir()
        (self.root / "blobs").mkdir(parents=True)
        (self.root / "partial").mkdir()
        self.sha256 = hashlib.sha256(self.blob).hexdigest()
        held = self.root / "blobs" / hashlib.sha256(base).hexdigest()
        held.write_bytes(base)
        (served / self.sha256).write_bytes(self.blob)
        size = deltas.make(held, served / self.sha256, served / "delta")
        made = DeltaRef(self.sha256, held.name, sha256_file(served / "delta"), size)
        (served / "delta").rename(served / made.sha256)
        self.delta = made.sha256
        self._release = cast("Release", SimpleNamespace(deltas=(made,)))
        self._order = order(home, "differing")
        source = FolderSource(served)

        def open_at(path: str, *more: Any) -> Body:
            self.opened.append(path)
            return FolderSource.open(source, path, *more)

        source.open = open_at  # type: ignore[method-assign]
        device = settings(self.root, home, repository=("anywhere",))
        self._host = DeviceHost(device, Voice(), lambda slot: self._release, lambda place: source,
                                lambda: None, PATIENCE)  # fmt: skip

    def download(self) -> bytes:
        """What comes, kept as the executor does."""
        store = Store(RealFiles(self.root))
        self._host._mine.halts = self._host._halts
        missing = {self.sha256: len(self.blob)}
        self._host.download(self._order, self._release, missing, store.adopt)
        assert os.listdir(self.root / "partial") == []
        return (self.root / "blobs" / self.sha256).read_bytes()

    def close(self) -> None:
        self._host.close()


@pytest.fixture
def differing(home: Home, tmp_path: Path) -> Iterator[Differing]:
    with closing(Differing(home, tmp_path)) as made:
        yield made


def test_a_difference_is_fetched_instead_of_the_blob(differing: Differing) -> None:
    assert differing.download() == differing.blob
    assert differing.opened == [differing.delta]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_difference_that_the_disk_does_not_take_leaves_its_room_to_the_blob(
    differing: Differing, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def restore(base: Path, delta: Path, size: int, sha256: str, out: BinaryIO) -> None:
        out.write(differing.blob[:1000])
        raise OSError(error, os.strerror(error))

    fetched, left = Downloader.fetch, list[set[str]]()

    def fetch(loader: Downloader, *more: Any) -> None:
        left.append(set(os.listdir(loader._folder)))
        fetched(loader, *more)

    monkeypatch.setattr(deltas, "restore", restore)
    monkeypatch.setattr(Downloader, "fetch", fetch)
    assert differing.download() == differing.blob
    assert differing.opened == [differing.delta, differing.sha256]
    assert left == [set(), set()]


def test_a_difference_is_left_where_only_the_blob_has_room(
    differing: Differing, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = len(differing.blob) + MARGIN_BYTES
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_frsize=1))
    (differing.root / "partial" / differing.delta).write_bytes(b"begun when there was more room")
    (differing.root / "partial" / f"{differing.sha256}.restored").write_bytes(b"a power cut")
    assert differing.download() == differing.blob
    assert differing.opened == [differing.sha256]


def test_a_difference_that_no_mirror_has_leaves_its_room_to_the_blob(differing: Differing) -> None:
    (differing.root / "partial" / differing.delta).write_bytes(b"begun, from a mirror that is gone")
    (differing.root.parent / "served" / differing.delta).unlink()
    assert differing.download() == differing.blob


def on_disk(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "partial").iterdir())


def test_a_mirror_that_never_ends_does_not_fill_the_disk(home: Home, tmp_path: Path) -> None:
    release, _ = home.repository().release(NAME, "1")
    files = {f"blobs/{sha256}": b"x" * size for sha256, size in release.blobs.items()}

    def endless(request: Any, answer: Any) -> None:
        answer.write("HTTP/1.1 200 OK\n\n", request.data)
        for _ in range(200):
            answer.write(body=bytes(1 << 16))

    with Site(files, lambda request: endless) as site, pytest.raises(DownloadFailed) as failed:
        download(home, tmp_path, site, release)
    assert failed.value.final
    assert on_disk(tmp_path) <= sum(release.blobs.values())


def test_a_mirror_that_drips_is_left(home: Home, tmp_path: Path) -> None:
    release, _ = home.repository().release(NAME, "1")
    files = {f"blobs/{sha256}": b"x" * size for sha256, size in release.blobs.items()}

    def slow(request: Any, answer: Any) -> None:
        drip(request, answer, head=False)

    began = time.monotonic()
    with Site(files, lambda request: slow) as site, pytest.raises(DownloadFailed) as failed:
        download(home, tmp_path, site, release)
    assert time.monotonic() - began < 120
    assert failed.value.reason in ("slow", "unreachable")


def test_a_device_that_is_kept_from_news_says_so(home: Home, tmp_path: Path) -> None:
    """Whoever owns broker and mirror can hide a release, but only until the metadata expire."""
    made = Agent(settings(tmp_path / "device", home, repository=(str(home.served),)))
    try:
        never = made._standing()
        assert (never.update_stale, never.fresh_until) == (True, 0.0)
        made._intake._refresh(made._intake.trusts)
        fresh = made._standing()
        assert fresh.update_stale is False
        assert 29 * 86_400 < fresh.fresh_until - time.time() < 31 * 86_400
        assert made._intake.is_stale(time.time() + 31 * 86_400)  # a timestamp is good for 30 days
    finally:
        made._host.close()
        made._lock.close()


class Scripted(Child):
    """A service in a state that a test chose."""

    def __init__(self, state: ChildState) -> None:
        self._chosen = state

    @property
    def state(self) -> ChildState:
        return self._chosen

    def want(self, command: Command | None) -> None: ...

    def wait(self, test: Callable[[ChildState], bool], timeout_s: float) -> bool:
        return test(self._chosen)


def test_what_may_hold_a_password_is_never_readable_by_others(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, sha256 = home.repository().release(NAME, "1")
    device = settings(tmp_path, home, mqtt="mqtt://me:hidden@127.0.0.1:1")
    host = DeviceHost(device, Voice(), lambda slot: release, lambda place: FolderSource(tmp_path),
                      lambda: None)  # fmt: skip
    modes, real = [], os.fsync

    def written(fd: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        real(fd)

    monkeypatch.setattr(os, "fsync", written)
    before = os.umask(0)
    try:
        command = host._command(Slot(NAME, "1", 1, sha256, release.manifest.sha256))
    finally:
        os.umask(before)
        host.child.close()
    config = Path(command[command.index("--config") + 1])
    assert "hidden" in config.read_text()
    assert modes == [0o600]
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


def test_a_service_that_starts_again_while_it_is_watched_is_seen_however_often_it_did_before(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, sha256 = home.repository().release(NAME, "1")
    device = settings(tmp_path, home, mqtt="mqtt://127.0.0.1:1")
    host = DeviceHost(device, Voice(), lambda slot: release, lambda place: FolderSource(tmp_path),
                      lambda: None)  # fmt: skip
    slot = Slot(NAME, "1", 1, sha256, release.manifest.sha256)
    last = "ended with status 1"
    loaded = ChildState(
        host._command(slot), pid=7, started_at=1.0, loaded_at=2.0, ready_at=3.0, crashes=1
    )
    paused = replace(loaded, command=None, pid=None, loaded_at=None, last_words=last)
    again = replace(paused, command=loaded.command, pid=8, started_at=100.0, loaded_at=101.0)
    seen: list[str] = []

    def soak(health: Health, trouble: Callable[[], str], wait: Any) -> tuple[bool, dict[str, Any]]:
        for state in (loaded, paused, again):
            host.child = Scripted(state)
            seen.append(trouble())
        return True, {}

    monkeypatch.setattr(probation, "soak", soak)
    real, host.child = host.child, Scripted(loaded)
    try:
        host._mine.halts = host._halts
        assert host.soak(slot, release)[0]
        assert seen == ["", last, last]
    finally:
        host.child = real
        host.close()


def test_an_agent_outlives_a_disk_that_fails_for_a_while(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = settings(
        tmp_path / "device", home, repository=(str(home.served),), mqtt="mqtt://127.0.0.1:1"
    )
    made = Agent(device)
    try:
        made._intake._refresh(made._intake.trusts)
        before = made._standing()
        made._executor.state = DeviceState(active=Slot(NAME, "1", 1, "a" * 64, "b" * 64))
        made._executor._stale = True

        def read(files: RealFiles, path: str, limit: int) -> bytes | None:
            raise OSError(errno.EIO, "no such sector", path)

        monkeypatch.setattr(RealFiles, "read", read)
        made._executor.tick()
        after = made._standing()
        assert (after.update_stale, after.fresh_until) == (False, before.fresh_until)
        assert after.bundle == f"{NAME} 1", "it is known what was kept last"
        assert made._wake_at > made.now()
    finally:
        made._host.close()
        made._lock.close()


@pytest.mark.parametrize("alive", [True, False])
def test_systemd_hears_nothing_while_the_network_thread_is_stuck(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    words: list[str] = []
    turns = iter(range(10))
    monkeypatch.setattr(agents, "TURN_S", 0.01)
    monkeypatch.setattr("edgecascade.service.units.watchdog_period_s", lambda: 0.0)
    monkeypatch.setattr("edgecascade.service.units.notify", lambda said: bool(words.append(said)))
    made = Agent(settings(tmp_path / "device", home, mqtt="mqtt://127.0.0.1:1"))
    assert made._line is not None
    monkeypatch.setattr(Link, "alive", property(lambda link: alive))
    try:
        made._loop(lambda: next(turns, None) is None)
    finally:
        made._host.close()
        made._lock.close()
    assert ("WATCHDOG=1" in words) is alive
