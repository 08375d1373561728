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
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from edgecascade.errors import EdgeCascadeError

SPARE_S = 5.0  # for what comes after the last part


class Report:
    """Values of parts by name, those that failed, and the file that has them."""

    def __init__(
        self, say: Callable[[str], None], out: Path, seconds: float = float("inf")
    ) -> None:
        self.say, self.out = say, out
        self.values, self.failed = dict[str, Any](), list[str]()
        self._doing, self._ends = list[str](), monotonic() + seconds
        self._writing = threading.Lock()
        out.parent.mkdir(parents=True, exist_ok=True)

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
        self._note(lambda: self._doing.append(part))
        try:
            return work()
        except EdgeCascadeError as error:
            self._fail(f"{part}: {error}")
        except Exception as error:  # noqa: BLE001 - a mistake in one part must not cost the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._fail(f"{part}: {error!r} in {Path(where.filename).name}:{where.lineno}")
        finally:
            self._note(lambda: self._doing.remove(part))
        return None

    def _fail(self, what: str) -> None:
        self.say(what)
        self._note(lambda: self.failed.append(what))

    def _note(self, change: Callable[[], Any]) -> None:
        with self._writing:
            change()
            doing = {"doing": self._doing} if self._doing else {}
            text = json.dumps({**self.values, "failed": self.failed, **doing}, indent=1) + "\n"
            part = self.out.with_name(self.out.name + ".part")
            part.write_text(text)
            os.replace(part, self.out)

    def beside(self, suffix: str) -> Path:
        """A file of the same name but for its end."""
        return self.out.with_suffix(suffix)

    def keep(self, name: str, text: str) -> None:
        """Add a text, whole, to a log beside the JSON."""
        with self._writing, self.beside(f".{name}.log").open("a") as log:
            log.write(text)

    def adopt(self, out: Path) -> str | None:
        """Take over what the report of another process has, its file too; what that was at, if it
        has not come to its end.
        """
        if not out.exists():
            return "its start"
        found = json.loads(out.read_text())
        out.unlink()
        failed, doing = found.pop("failed"), found.pop("doing", [None])
        rows = {name: value for name, value in found.items() if isinstance(value, list)}

        def change() -> None:
            self.failed += failed
            self.values |= {name: self.values.get(name, []) + rows[name] for name in rows}
            self.values |= {name: value for name, value in found.items() if name not in rows}

        self._note(change)
        return doing[-1]

    def within(self, most_s: float, *, last: bool = False) -> float:
        """Seconds that a part may take: no more than half of what is left, unless it is the last.

        Raises:
            EdgeCascadeError: when none are left.
        """
        left_s = self._ends - monotonic() - SPARE_S
        if left_s < 1:
            raise EdgeCascadeError("no time was left")
        return min(most_s, left_s if last else left_s / 2)


def run_within(command: list[str], limit_s: float, **options: Any) -> tuple[int, str]:
    """Status and output of a command. It is ended with all it started when the time is up, which
    its output's last line says.
    """
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    child = subprocess.Popen(command, start_new_session=True, **how)
    try:
        output, _ = child.communicate(timeout=limit_s)
        return child.returncode, output or ""
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may keep it from ending
            output, _ = child.communicate(timeout=SPARE_S / 2)
            return -signal.SIGKILL, f"{(output or '').rstrip()}\nended after {limit_s:.0f} s\n"
        return -signal.SIGKILL, f"does not end, {limit_s:.0f} s and longer\n"
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
