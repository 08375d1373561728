# SPDX-License-Identifier: Apache-2.0
"""The emulator's detector of data races, on kernels that have one and on the same without it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from kernels import ROOT, build_emulated

HERE, OTHER, NEXT = "this block", "another block", "a launch that may begin early"
WRITES, READS, COPIES, ADDS = "writes", "reads", "copies asynchronously to", "adds atomically to"
# What two threads do in the wrong one, and where the second of them is.
RACES = {
    "blockBarrier": (HERE, {WRITES, READS}),
    "warpBarrier": (HERE, {WRITES, READS}),
    "warpBarrierForBlock": (HERE, {WRITES, READS}),
    "halfWarps": (HERE, {WRITES, READS}),
    "shuffled": (HERE, {WRITES, READS}),
    "handedOn": (HERE, {WRITES, READS}),
    "overwritten": (HERE, {WRITES, READS}),
    "overwrittenInWarp": (HERE, {WRITES, READS}),
    "bytesOfAWord": (HERE, {WRITES, READS}),
    "sharedByFunctions": (HERE, {WRITES, READS}),
    "blocksWrite": (OTHER, {WRITES}),
    "blocksRead": (None, {WRITES, READS}),  # of this block and another, as they come
    "counter": (None, {ADDS, READS}),
    "copied": (HERE, {COPIES, READS}),
    "copyAwaited": (HERE, {COPIES, READS}),
    "refilled": (HERE, {WRITES, READS}),
    "copySource": (HERE, {WRITES, READS}),
    "earlyRead": (NEXT, {WRITES, READS}),
    "earlyWrite": (NEXT, {WRITES, READS}),
    "earlyReadOfUpdated": (NEXT, {WRITES, READS}),
    "launchAfterNext": (NEXT, {WRITES, READS}),
}


@pytest.fixture(scope="module")
def program() -> Path:
    """That of races.cu."""
    return build_emulated("edgecascade_cuda_races")


def test_every_toy_is_here() -> None:
    source = (ROOT / "tests" / "cuda" / "races.cu").read_text()
    assert re.findall(r'is\("(\w+)"\)', source) == list(RACES)


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found_and_named(program: Path, name: str) -> None:
    done = subprocess.run([program, name, "wrong"], capture_output=True, text=True, check=False)
    found = re.fullmatch(
        r"emulator: a data race: thread \d+ of block \d+ ([a-z ]+)\n(.*)"
        r"\n  what thread \d+(?:, among others,)? of ([a-z ]+) \(\d+\) ([a-z ]+)\n(.*)"
        r"\n  \(block .*\)\n",
        done.stderr,
        re.DOTALL,
    )
    assert found, done.stderr
    first, its_place, where, second, other_place = found.groups()
    expected, verbs = RACES[name]
    assert {first, second} == verbs
    assert where == (expected or where)
    for place in (its_place, other_place):
        assert re.search(r"races\.cu:\d+", place), done.stderr


@pytest.mark.parametrize("name", RACES)
def test_where_there_is_none_nothing_is_found(program: Path, name: str) -> None:
    done = subprocess.run([program, name, "right"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
