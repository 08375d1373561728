# SPDX-License-Identifier: Apache-2.0
"""Builds a bundle in a child process and reports its time and its largest resident memory.

    python benchmarks/build_memory.py CHECKPOINT OUT --precision speed

`anonymous` is what the process allocated; `resident` also counts pages of mapped files, which the
kernel takes back when something else needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

INTERVAL_S = 0.02
BUILD = """
import sys
from build_engine.pipeline import build
build(sys.argv[1], sys.argv[2], precision=sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", default="speed")
    args = parser.parse_args()
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", BUILD, args.checkpoint, args.out, args.precision]
    )
    peak = {"RssAnon": 0, "VmHWM": 0}
    while child.poll() is None:
        for key, value in memory(child.pid).items():
            peak[key] = max(peak[key], value)
        time.sleep(INTERVAL_S)
    if child.returncode:
        sys.exit(child.returncode)
    report = json.loads((args.out / "report.json").read_text())
    result = {
        "checkpoint_bytes": report["source_bytes"],
        "bundle_bytes": report["stored_bytes"],
        "total_s": round(time.monotonic() - started, 1),
        "pack_s": report["pack_s"],
        "verify_s": report["verify_s"],
        "anonymous_peak_bytes": peak["RssAnon"],
        "resident_peak_bytes": peak["VmHWM"],
    }
    print(json.dumps(result, indent=1))


def memory(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM of a process in bytes; nothing when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {key.rstrip(":"): int(value) << 10 for key, value, _ in found}


if __name__ == "__main__":
    main()
