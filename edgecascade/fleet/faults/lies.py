# SPDX-License-Identifier: Apache-2.0
"""F5: a disk that says a write is durable when it is not.

Nobody can promise the new release on such a disk. What must hold: nothing unverified is ever run,
the device answers with some release that it had, and the order installs once it is given again.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.crash import Scenario
from edgecascade.fleet.faults.images import run_images
from edgecascade.fleet.faults.sim import SimFiles
from edgecascade.fleet.faults.watched import Watched
from edgecascade.fleet.faults.world import check_device, order_for, require, seeds, wrong_with
from edgecascade.fleet.fs import Files

TITLE = "power cuts on a disk that lies about fsync"
FULL = 400
SHORT = 20

EVERY_SYNC = re.compile("sync.*")
IMAGES = 0.1  # of all cases, on ext4
STATES_PER_POINT = 4


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See the package."""
    on_ext4 = case is not None and case.startswith("ext4/")
    images = Outcome()
    if case is None or on_ext4:
        inner = None if case is None else case.removeprefix("ext4/")
        most = max(1, int(count * IMAGES))
        images = run_images(seed, most, inner, skip=EVERY_SYNC, check=_answers, kinds=("good",))
    if on_ext4:
        return images
    tried = images.tried
    failures = [Failure(f"ext4/{failure.case}", failure.message) for failure in images.failures]
    for number in seeds(seed, case):
        scenario = Scenario.make("good", number)
        if case is not None and not case.startswith(f"{number}/"):
            continue
        for name, left in _states(scenario, number):
            if case not in (None, name):
                continue
            tried += 1
            if message := wrong_with(_answers, scenario, left):
                failures.append(Failure(name, message))
            if tried >= count:
                break
        if tried >= count or case is not None:
            notes = {"on ext4": images.tried} if images.tried else {"ext4": images.skipped}
            return Outcome(tried, tuple(failures), notes=notes)
    raise AssertionError("seeds have no end")


def _states(scenario: Scenario, seed: int) -> list[tuple[str, SimFiles]]:
    """What may be left at each effect when nothing that was synced is sure to be."""
    files = scenario.files.copy()
    found: list[tuple[str, SimFiles]] = []
    point = 0

    def before(effect: str) -> None:
        nonlocal point
        point += 1
        rng = random.Random(f"{seed}/{point}")
        for index, left in enumerate(files.power_cuts(rng, STATES_PER_POINT)):
            found.append((f"{seed}/{point}/{index}", left))

    watched = Watched(files, before)
    watched.skip = EVERY_SYNC
    scenario.run(watched)
    before("the end")
    random.Random(seed).shuffle(found)
    return found


def _answers(scenario: Scenario, files: Files) -> None:
    device = scenario.device(files).boot()
    device.settle()
    require(device.world.running is not None, "no release answers, though the first one is whole")
    require(device.world.running == device.state.active, "what runs is not what the state says")
    again = order_for(scenario.after, 9)
    device.deliver(replace(again, order="order-again"), scenario.after)
    require(device.state.active == scenario.after.slot, "the order does not install any more")
    check_device(device)
