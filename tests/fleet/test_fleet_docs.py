# SPDX-License-Identifier: Apache-2.0
"""docs/fleet.md, copied: every command block, in order, with real robots, broker and files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import installed
import pytest

from edgecascade.fleet import audit
from edgecascade.service.broker import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "fleet.md"
LIMIT_S = 900


def commands() -> str:
    """The page's shell blocks as one script, on ports that are free here."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    script = "\n".join(["set -eu", *blocks])
    for port in ("1883", "8000"):
        assert re.search(rf"[: ]{port}\b", script)
        script = re.sub(rf"(?<=[: ]){port}\b", str(free_port()), script)
    return script


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `edgecascade` is this checkout's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ours = programs / "edgecascade"
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m edgecascade "$@"\n')
    ours.chmod(0o755)
    (programs / "mosquitto").symlink_to(installed.broker().path)
    (programs / "python3").symlink_to(sys.executable)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{programs}:{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def test_the_page_can_be_copied(tmp_path: Path, shell: dict[str, str]) -> None:
    script = tmp_path / "page.sh"
    script.write_text(commands())
    with open(tmp_path / "said", "wb") as out:
        process = subprocess.Popen(
            ["bash", "-x", str(script)],
            cwd=tmp_path,
            env=shell,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            status = process.wait(LIMIT_S)
        finally:
            # Robots, broker and file server still run, as on the reader's machine.
            os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text(errors="replace")
    robots = "".join(log.read_text() for log in sorted(tmp_path.glob("robot-*.log")))
    assert status == 0, f"{said[-4000:]}\n{robots[-4000:]}"
    told = [json.loads(raw) for raw, _ in audit.records(tmp_path / "fleet" / "audit.jsonl")]
    ends = {line["release"]: line["state"] for line in told if line["event"] == "announce"}
    assert ends == {"tiny 1.0": "done", "tiny 2.0": "rolled-back", "tiny 3.0": "aborted"}
    assert "tokens/s" in said, "the robots are slower than the bad release asks for, and said so"


def test_every_row_of_the_state_table_is_a_state() -> None:
    from edgecascade.fleet.rollout import STATES

    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(running|paused|aborted|rolled-back|done)`", page))
    assert {"aborted", "paused"} <= named <= set(STATES)
