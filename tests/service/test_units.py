# SPDX-License-Identifier: Apache-2.0
"""systemd gets a unit that says when it is ready, and signs of life."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from edgecascade.errors import InvalidRequest
from edgecascade.service import units

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "edgecascade.service"


def test_the_example_is_what_the_command_prints() -> None:
    text = units.unit(
        "/var/lib/edgecascade/bundle",
        "/etc/edgecascade/service.yaml",
        program="/opt/edgecascade/bin/edgecascade",
    )
    assert EXAMPLE.read_text() == text


def test_the_unit_waits_for_readiness_and_watches() -> None:
    text = units.unit("/b", "/c", program="/p")
    assert "Type=notify\n" in text
    assert f"WatchdogSec={units.WATCHDOG_S}\n" in text
    assert "ExecStart=/p serve /b --config /c\n" in text


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "edgecascade.service"
    path.write_text(units.unit("/b", "/c", program="/bin/true", user="root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert "edgecascade.service" not in done.stderr, done.stderr


def test_the_units_leave_little_to_who_breaks_in(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for text in (units.unit("/b", "/c", program="/p"), units.agent_unit("/c", program="/p")):
        path = tmp_path / "edgecascade.service"
        path.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=yes", "--threshold=45", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if "nrecognized" in done.stderr or "nknown" in done.stderr:
            pytest.skip(f"this systemd-analyze cannot: {done.stderr.strip()}")
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", ["bundle", "/my bundle", "/a%b", '/a"b', "/a\nUser=root"])
def test_a_path_that_systemd_would_misread_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest, match="absolute"):
        units.unit(path, "/c", program="/p")


@pytest.mark.parametrize("user", ["", "a b", "-x", "robot\nUser=root", "%i"])
def test_a_user_that_systemd_would_misread_is_refused(user: str) -> None:
    with pytest.raises(InvalidRequest, match="user is"):
        units.unit("/b", "/c", program="/p", user=user)
    with pytest.raises(InvalidRequest, match="user is"):
        units.agent_unit("/c", program="/p", user=user)


def test_notify_speaks_to_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert units.notify("READY=1")
        assert ear.recv(100) == b"READY=1"
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nowhere"))
        assert not units.notify("READY=1")
        monkeypatch.delenv("NOTIFY_SOCKET")
        assert not units.notify("READY=1")


def test_a_systemd_that_does_not_read_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        said = 0
        while units.notify("WATCHDOG=1"):
            said += 1
            assert said < 100_000
        for _ in range(said):
            assert ear.recv(100) == b"WATCHDOG=1"
        assert units.notify("READY=1")
        assert ear.recv(100) == b"READY=1"


def test_the_watchdog_s_period_is_half_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert units.watchdog_period_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert units.watchdog_period_s() == 15.0
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert units.watchdog_period_s() is None
