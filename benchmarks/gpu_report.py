# SPDX-License-Identifier: Apache-2.0
"""What a long measurement has found so far: said at once, on the disk after every part, whatever
becomes of the next one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from edgecascade.errors import EdgeCascadeError


class Report:
    """Values of parts by name, those that failed, and the file that has them."""

    def __init__(self, say: Callable[[str], None], out: Path) -> None:
        self.say, self.out = say, out
        self.values, self.failed = dict[str, Any](), list[str]()
        self._part, self._ends, self._writing = "nothing", float("inf"), threading.Lock()

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """The value of a part; None if it failed, which is said, and the rest goes on."""
        made = self._tried(name, work)
        if made is not None:
            self._note(lambda: self.values.__setitem__(name, made))
        return made

    def rows(
        self, name: str, items: Iterable[Any], work: Callable[[Any], Iterable[Any]]
    ) -> list[Any]:
        """The rows of a part, item by item: one that fails costs its own."""
        rows: list[Any] = self.values.setdefault(name, [])
        for item in items:
            made = self._tried(f"{name} {item}", lambda item=item: list(work(item)))
            self._note(lambda made=made: rows.extend(made or []))
        return rows

    def _tried(self, part: str, work: Callable[[], Any]) -> Any:
        self._part = part
        try:
            return work()
        except EdgeCascadeError as error:
            self._fail(f"{part}: {error}")
        except Exception as error:  # noqa: BLE001 - a mistake in one part must not cost the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._fail(f"{part}: {error!r} in {Path(where.filename).name}:{where.lineno}")
        return None

    def _fail(self, what: str) -> None:
        self.say(what)
        self._note(lambda: self.failed.append(what))

    def _note(self, change: Callable[[], Any]) -> None:
        with self._writing:
            change()
            text = json.dumps({**self.values, "failed": self.failed}, indent=1) + "\n"
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(text)

    @property
    def left_s(self) -> float:
        """Seconds until the process is ended."""
        return self._ends - monotonic()

    def end_after(self, seconds: float) -> None:
        """End the process then, with what was found: a GPU that hangs answers to nothing else."""

        def end() -> None:
            self._fail(f"{self._part}: not done when the time was up, {seconds:.0f} s")
            os._exit(1)

        self._ends = monotonic() + seconds
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()


def run_within(command: list[str], limit_s: float, **options: Any) -> tuple[int, str]:
    """Status and output of a command, which is ended with all it started when the time is up.

    Raises:
        EdgeCascadeError: when it was.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    ) as child:
        try:
            output, _ = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            last = (output.strip().splitlines() or ["nothing"])[-1]
            raise EdgeCascadeError(
                f"{Path(command[0]).name} was ended after {limit_s:.0f} s; its last line: {last}"
            ) from None
    return child.returncode, output
