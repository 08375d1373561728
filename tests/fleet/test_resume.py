# SPDX-License-Identifier: Apache-2.0
"""A download that is interrupted again and again, on a real disk."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from edgecascade.fleet.faults.crash import Cut
from edgecascade.fleet.faults.watched import Watched
from edgecascade.fleet.faults.world import (
    Device,
    Published,
    World,
    check_device,
    check_nothing_more,
    order_for,
)
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.release import FileRef, Release

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "fleet_resume.py"
FILES = 40
INTERRUPTIONS = 50


def large(rng: random.Random) -> Published:
    """A release of many files."""
    names = [f"weights-{i:05}-of-{FILES:05}.safetensors" for i in range(1, FILES + 1)]
    contents = {name: rng.randbytes(3000) for name in ("manifest.json", *names)}
    refs = [FileRef(path, len(d), hashlib.sha256(d).hexdigest()) for path, d in contents.items()]
    release = Release("model", "1.0", 1, refs[0], tuple(refs[1:]))
    blobs = {ref.sha256: contents[ref.path] for ref in refs}
    return Published(release, release.to_bytes(), blobs)


def test_fifty_interruptions_fetch_no_whole_blob_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = random.Random(7)
    what = large(rng)
    world = World([what])
    root = tmp_path / "device"
    root.mkdir()
    written: Counter[str] = Counter()
    left = 0

    def before(effect: str) -> None:
        nonlocal left
        verb, _, path = effect.partition(" ")
        if verb == "append":
            left -= 1
            if left == 0:
                raise Cut
            written[path] += 1

    files = Watched(RealFiles(root), before)
    order = order_for(what, 1)
    cuts = 0
    for number in range(INTERRUPTIONS):
        # The points are spread over the whole download, wherever it stands by now.
        left = rng.randint(1, 2 * 6 * FILES // INTERRUPTIONS) if number else 1
        try:
            Device(files, world).boot().deliver(order, what)
        except Cut:
            cuts += 1
    left = 0
    device = Device(files, world).boot()
    device.deliver(order, what)
    check_device(device)
    check_nothing_more(device)
    assert cuts > INTERRUPTIONS // 2
    assert Counter(world.fetched) == Counter(dict.fromkeys(what.release.blobs, 1))
    # Six blocks a blob, and no block a second time: what was begun went on where it was.
    assert set(written.values()) == {6}


def test_an_update_that_is_killed_takes_room_for_what_is_new(tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    words = ["--gb", "0.02", "--interruptions", "3", "--placed", "--folder", tmp_path]
    command = [sys.executable, str(BENCHMARK), *map(str, words), "--json", str(facts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    update = json.loads(facts.read_text())["update"]
    assert update["interruptions"] > 0
    assert update["new_bytes"] < 0.3 * 20_000_000
