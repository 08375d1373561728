# SPDX-License-Identifier: Apache-2.0
"""F3: SIGKILL of a real process at every file effect of an update, and again while it recovers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from edgecascade.errors import EdgeCascadeError
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.crash import Scenario
from edgecascade.fleet.faults.watched import Watched, write_out
from edgecascade.fleet.faults.world import Violation, seeds
from edgecascade.fleet.fs import RealFiles

TITLE = "SIGKILL at every file effect, twice in a row"
FULL = 500
SHORT = 24

KINDS = ("good", "bad", "beside", "first", "config")
LATEST = 25  # effect of the recovery at which the second one may come


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See the package. A kill takes nothing from the page cache, so memory will do for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as base:
        return _run(Path(base), seed, count, case)


def _run(base: Path, seed: int, count: int, case: str | None) -> Outcome:
    tried = kills = 0
    failures = []
    for number in seeds(seed, case):
        for kind in KINDS:
            scenario = Scenario.make(kind, number)
            if case is not None and not case.startswith(f"{kind}/{number}/"):
                continue
            start = base / "start"
            write_out(scenario.files, start)
            effects = scenario.effects()
            step = max(1, effects * len(KINDS) // count)
            for first in range(1, effects + 1, step):
                name = f"{kind}/{number}/{first}"
                if case not in (None, name):
                    continue
                folder = base / "device"
                shutil.copytree(start, folder, copy_function=_copier())
                second = random.Random(name).randint(1, LATEST)
                tried += 1
                try:
                    kills += sum(_killed(scenario, folder, at) for at in (first, second))
                    scenario.check(Watched(RealFiles(folder)), cuts=2)
                except (Violation, EdgeCascadeError, OSError) as error:
                    failures.append(Failure(name, f"{type(error).__name__}: {error}"))
                shutil.rmtree(folder)
            shutil.rmtree(start)
            if tried >= count or case is not None:
                return Outcome(tried, tuple(failures), notes={"kills": kills})
    raise AssertionError("seeds have no end")


def _killed(scenario: Scenario, folder: Path, at: int) -> bool:
    """Run the update in a process that is killed before this effect; whether it came that far."""
    left = at

    def before(effect: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    status = in_child(lambda: scenario.run(Watched(RealFiles(folder), before)))
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise Violation("the update raised instead of being killed")
    return os.WIFSIGNALED(status)


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001  nothing may go up into the parent's code
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def _copier() -> Callable[[str, str], object]:
    """Copies files, and hard links as hard links."""
    first: dict[int, str] = {}

    def copy(source: str, target: str) -> object:
        number = os.stat(source).st_ino
        if number in first:
            os.link(first[number], target)
            return target
        first[number] = target
        return shutil.copyfile(source, target)

    return copy
