# SPDX-License-Identifier: Apache-2.0
"""F4: power cuts on a real file system: ext4 on a loop device, copied at every effect.

What the kernel has not written yet is in the page cache and so not in the copy: a missing fsync is
really missing. The copy is mounted, its journal replayed, and the device must end where it must.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.crash import Scenario
from edgecascade.fleet.faults.watched import Watched, write_out
from edgecascade.fleet.faults.world import seeds, wrong_with
from edgecascade.fleet.fs import RealFiles

TITLE = "ext4 images of a power cut at every effect"
FULL = 120
SHORT = 6

IMAGE_BYTES = 16 << 20
# Nothing is written before it must be: the journal waits, and a rename forces no data out.
MODES = {
    "ordered": "data=ordered,commit=300,noauto_da_alloc",
    "writeback": "data=writeback,commit=300,noauto_da_alloc",
}
KINDS = ("good", "bad")
Check = Callable[[Scenario, Watched], None]


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See the package."""
    return run_images(seed, count, case, skip=None, check=_converges)


def run_images(
    seed: int,
    count: int,
    case: str | None,
    *,
    skip: re.Pattern[str] | None,
    check: Check,
    kinds: Sequence[str] = KINDS,
) -> Outcome:
    """Cut an update at its effects, without those that match `skip`, and check what is left."""
    lacking = _lacking()
    if lacking:
        return Outcome(skipped=lacking)
    tried, failures = 0, []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for number in seeds(seed, case):
            for kind in kinds:
                for mode in MODES:
                    names = f"{kind}/{number}/{mode}"
                    if case is not None and not case.startswith(f"{names}/"):
                        continue
                    left = max(1, (count - tried) // 2) if case is None else 1 << 30
                    for point, image in _images(Path(folder), kind, number, mode, skip, left):
                        name = f"{names}/{point}"
                        if case not in (None, name):
                            continue
                        tried += 1
                        message = _checked(Scenario.make(kind, number), image, check)
                        if message:
                            failures.append(Failure(name, message))
                    if tried >= count or case is not None:
                        return Outcome(tried, tuple(failures))
    raise AssertionError("seeds have no end")


def _lacking() -> str:
    """What this machine lacks for it, or nothing."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("mkfs.ext4") is None:
        return "needs mkfs.ext4"
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        image = _new_image(Path(folder))
        try:
            with _mounted(image, "data=ordered"):
                return ""
        except subprocess.CalledProcessError as error:
            return f"needs loop devices: {error.stderr.decode(errors='replace').strip()}"


def _converges(scenario: Scenario, files: Watched) -> None:
    scenario.check(files, cuts=1)


def _checked(scenario: Scenario, image: Path, check: Check) -> str:
    """What is wrong with the device on an image, or nothing."""
    with _mounted(image, "data=ordered") as folder:
        return wrong_with(check, scenario, Watched(RealFiles(folder / "device")))


def _images(
    base: Path, kind: str, seed: int, mode: str, skip: re.Pattern[str] | None, most: int
) -> Iterator[tuple[int, Path]]:
    """An update on a mounted image, in a process that waits at each effect for its copy."""
    scenario = Scenario.make(kind, seed)
    image, cut = _new_image(base), base / "cut.img"
    with _mounted(image, MODES[mode]) as folder:
        write_out(scenario.files, folder / "device")
        os.sync()
        told, tell = os.pipe()
        wait, go = os.pipe()

        def before(effect: str) -> None:
            os.write(tell, b"e")
            os.read(wait, 1)

        def update() -> None:
            files = Watched(RealFiles(folder / "device"), before)
            files.skip = skip
            scenario.run(files)
            before("the end")

        pid = os.fork()
        if pid == 0:
            os._exit(_status(update, told, go))
        os.close(tell)
        os.close(wait)
        try:
            points = scenario.effects() + 1  # and the end
            step = max(1, points // most)
            for point in range(points):
                if not os.read(told, 1):
                    break
                if point % step == 0:
                    shutil.copyfile(image, cut)
                    yield point, cut
                os.write(go, b"g")
        finally:
            os.close(go)  # the process reads the end of it and goes on to its own
            while os.read(told, 64):
                pass
            os.close(told)
            os.waitpid(pid, 0)


def _status(work: Callable[[], None], *unused: int) -> int:
    for number in unused:
        os.close(number)
    try:
        work()
    except BaseException:  # noqa: BLE001  nothing may go up into the parent's code
        return 1
    return 0


def _new_image(base: Path) -> Path:
    image = base / "disk.img"
    image.unlink(missing_ok=True)
    with open(image, "wb") as out:
        out.truncate(IMAGE_BYTES)
    _do("mkfs.ext4", "-q", "-F", "-b", "1024", "-E", "lazy_itable_init=0", str(image))
    return image


@contextmanager
def _mounted(image: Path, options: str) -> Iterator[Path]:
    folder = image.with_suffix(".mounted")
    folder.mkdir(exist_ok=True)
    _do("mount", "-o", f"loop,{options}", str(image), str(folder))
    try:
        yield folder
    finally:
        _do("umount", str(folder))


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
