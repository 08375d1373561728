# SPDX-License-Identifier: Apache-2.0
"""Whose reports count: a device's own key, and the operator's list of devices."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from edgecascade.cli import main
from edgecascade.errors import FleetError, InvalidRequest
from edgecascade.fleet import audit, reports
from edgecascade.fleet.identity import enrolment, own_key, stored_key
from edgecascade.fleet.keys import public_hex
from edgecascade.fleet.register import Devices, Register
from edgecascade.fleet.reports import DeviceKey
from edgecascade.fleet.settings import AgentSettings


def made(device: str = "robot-1", *groups: str) -> tuple[DeviceKey, CryptoSigner]:
    signer = CryptoSigner.generate_ed25519()
    public = public_hex(signer.public_key)
    return DeviceKey(device, f"{device}-agent", public, groups or ("site",)), signer


def settings(root: Path) -> AgentSettings:
    return AgentSettings(str(root), "robot-1", groups=("site", "all"))


def test_a_device_s_key_is_made_once_and_is_its_own(tmp_path: Path) -> None:
    assert stored_key(tmp_path) is None
    key = own_key(tmp_path)
    assert own_key(tmp_path).public == key.public
    assert stat.S_IMODE(key.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.path.parent.stat().st_mode) == 0o700
    data = enrolment(settings(tmp_path), key)
    private = key.path.read_text().splitlines()[1]
    assert private not in data.decode()
    enrolled = reports.read_enrolment(data)
    assert enrolled == DeviceKey("robot-1", "robot-1-agent", key.public, ("site", "all"))


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    own_key(tmp_path).path.chmod(0o640)
    with pytest.raises(FleetError, match="chmod 600"):
        own_key(tmp_path)


def test_a_damaged_key_is_replaced_and_stays_for_who_looks(tmp_path: Path) -> None:
    key = own_key(tmp_path)
    key.path.write_bytes(key.path.read_bytes()[:40])
    assert own_key(tmp_path).public != key.public
    assert [path.suffix for path in sorted(key.path.parent.iterdir())] == [".damaged", ".pem"]


def test_an_enrolment_holds_as_a_whole() -> None:
    key, signer = made()
    data = reports.sign_enrolment(key, signer)
    assert reports.read_enrolment(data) == key
    renamed = reports.sign_enrolment(
        replace(key, device="robot-2"), CryptoSigner.generate_ed25519()
    )
    for wrong in (data[:-9], b"", b"{}", b" " * 70_000, renamed, reports.sign_enrolment(key, signer)
                  .replace(b"enrolment+json", b"report+json")):  # fmt: skip
        with pytest.raises(FleetError) as caught:
            reports.read_enrolment(wrong)
        assert caught.value.reason == "enrolment"


def test_devices_are_enrolled_moved_and_revoked(tmp_path: Path) -> None:
    register = Register(tmp_path / "devices.json")
    assert register.read() == Devices()
    (one, _), (two, _) = made("robot-1"), made("robot-2", "other")
    register.enroll([two, one], 5.0)
    assert register.read().of("site") == (one,)
    register.enroll([replace(two, groups=("site", "other"))], 6.0)
    assert [key.device for key in Register(register.path).read().of("site")] == [
        "robot-1", "robot-2",
    ]  # fmt: skip
    register.revoke(["robot-1"], 7.0)
    assert [key.device for key in register.read().of("site")] == ["robot-2"]
    assert register.read().revoked == (one,)
    with pytest.raises(InvalidRequest, match="no device 'robot-1'"):
        register.revoke(["robot-1"], 8.0)


def test_a_name_has_one_key_and_a_key_one_name(tmp_path: Path) -> None:
    register = Register(tmp_path / "devices.json")
    key, _ = made()
    register.enroll([key], 1.0)
    other, _ = made("robot-9")
    for wrong, reason, message in (
        (made()[0], "exists", "fleet devices --revoke robot-1"),
        (replace(key, device="robot-2"), "key-shared", "an image was copied"),
    ):
        with pytest.raises(FleetError, match=message) as caught:
            register.enroll([other, wrong], 2.0)
        assert caught.value.reason == reason
    assert register.read().of("site") == (key,), "all or none"
    register.revoke(["robot-1"], 3.0)
    with pytest.raises(FleetError, match="was revoked"):
        register.enroll([key], 4.0)
    fresh, _ = made()
    assert register.enroll([fresh], 5.0).of("site") == (fresh,)


@pytest.mark.parametrize(
    "change",
    [
        {"device": "robot-1-agent", "agent": "other"},
        {"device": "other", "agent": "robot-1-agent"},
        {"device": "other", "agent": "robot-1"},
    ],
    ids=str,
)
def test_no_two_have_one_name_at_the_broker(change: dict[str, str]) -> None:
    """They would take each other's connection, and one would speak under the other's topics."""
    enrolled = Devices().with_keys([made("robot-1")[0]], 1.0)
    second = replace(made("robot-2")[0], **change)
    with pytest.raises(FleetError, match="robot-1 or its agent has it"):
        enrolled.with_keys([second], 2.0)
    with pytest.raises(FleetError, match="or its agent has it"):
        Devices().with_keys([second, made("robot-1")[0]], 2.0)
    after = enrolled.without("robot-1", 3.0).with_keys([second], 4.0)
    assert [key.device for key in after.of("site")] == [second.device]


def test_a_damaged_register_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    register = Register(tmp_path / "devices.json")
    register.enroll([made()[0]], 1.0)
    whole = register.path.read_bytes()
    for damaged in (b"", b"[]", whole[:-10], whole.replace(b'"since"', b'"sinse"')):
        register.path.write_bytes(damaged)
        with pytest.raises(FleetError, match=r"devices\.json is damaged"):
            register.read()


def test_from_a_device_to_its_operator_by_stick_and_by_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, stick = tmp_path / "fleet", tmp_path / "stick"
    stick.mkdir()
    home = ("--fleet", str(fleet))
    assert main(["fleet", "init", *home]) == 0

    def enroll(name: str, *words: str) -> int:
        options = ("--root", str(tmp_path / name), "--device-id", name, "--group", "site")
        return main(["agent", "enroll", *words, *options])

    capsys.readouterr()
    assert enroll("robot-1", str(stick)) == 0
    assert "robot-1.enroll.json" in capsys.readouterr().out
    assert enroll("robot-2") == 0
    piped = tmp_path / "robot-2.json"
    piped.write_text(capsys.readouterr().out)
    files = [str(stick / "robot-1.enroll.json"), str(piped)]
    assert main(["fleet", "devices", *home, "--enroll", *files]) == 0
    assert "robot-2: enrolled, groups site" in capsys.readouterr().out
    assert main(["fleet", "devices", *home, "--revoke", "robot-2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(each["device"], each["revoked"] is None) for each in shown] == [
        ("robot-1", True), ("robot-2", False),
    ]  # fmt: skip
    assert main(["fleet", "devices", *home, "--enroll", str(tmp_path / "none")]) == 1
    assert main(["fleet", "devices", "--fleet", str(tmp_path / "x"), "--enroll", *files[:1]]) == 1
    assert "edgecascade fleet init" in capsys.readouterr().err
    events = [record["event"] for _, record in audit.records(fleet / "audit.jsonl") if record]
    assert events == ["init", "devices-enroll", "devices-enroll", "devices-revoke"]
    assert os.listdir(stick) == ["robot-1.enroll.json"], "the private key stays at home"
