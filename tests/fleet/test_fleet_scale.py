# SPDX-License-Identifier: Apache-2.0
"""The scale benchmark in its small form: 300 devices, a good bundle, a bad one, a power cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import installed

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 300


def test_a_rollout_s_control_traffic_completes(tmp_path: Path) -> None:
    installed.broker()
    script = [sys.executable, str(ROOT / "benchmarks" / "fleet_scale.py")]
    options = ["--devices", str(DEVICES), "--phase-s", "0.05", "--json", str(tmp_path / "result")]
    done = subprocess.run([*script, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result").read_text())
    assert result["devices_read"] == result["wills_seen"] == DEVICES
    assert result["reports"] == 7 * DEVICES, "queued, five phases, the verdict"
    # The bundle is bad from the seventh device on: in the stage of 5 %, which holds 15.
    assert result["bad_stopped_at_percent"] == 5.0
    assert 6 < result["bad_exposed"] <= DEVICES * (0.05 + 0.05)
