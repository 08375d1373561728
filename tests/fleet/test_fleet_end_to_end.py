# SPDX-License-Identifier: Apache-2.0
"""A small fleet of real processes: what benchmarks/fleet.py does with twenty devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import installed

ROOT = Path(__file__).resolve().parents[2]
FAILS = ("bad bundle", "corrupted mirror", "dead mirror")


def test_a_fleet_is_installed_updated_and_survives_what_must_fail(tmp_path: Path) -> None:
    installed.broker()
    result = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "fleet.py"), "--devices", "3"]
    done = subprocess.run(
        [*command, "--json", str(result)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    acts = json.loads(result.read_text())["acts"]
    assert acts["update"]["succeeded"] == 3
    assert {name: acts[name]["state"] for name in FAILS} == dict.fromkeys(FAILS, "FAILED")
    assert acts["revoked key"]["state"] == "REJECTED"
    assert acts["killed agents"]["succeeded"] == 3
