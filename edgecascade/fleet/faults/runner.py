# SPDX-License-Identifier: Apache-2.0
"""Runs classes of faults: one in this process, several each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecascade.errors import FleetError, InvalidRequest
from edgecascade.fleet.faults import CLASSES, Failure, Outcome, load

SCHEMA = 1
LONGEST_S = 1800.0  # of a class, on a machine that does much else
WHOLE = "all"  # the case of a class that ended without a result
SLOW_FIRST = ("F10", "F1", "F3", "F14", "F8", "F13", "F2")  # so that the last ones are short


@dataclass(frozen=True)
class Result:
    """One class, run."""

    name: str
    title: str
    outcome: Outcome
    seed: int
    count: int
    seconds: float

    @property
    def survived(self) -> int:
        """Faults that did no harm. A failure without a count is one more that was tried."""
        return max(0, self.outcome.tried - len(self.outcome.failures))

    def to_json(self) -> dict[str, Any]:
        """As in the file; `edgecascade faults --class NAME --seed SEED --case CASE` repeats one."""
        return {**asdict(self), "survived": self.survived}


def chosen(names: Sequence[str]) -> list[str]:
    """The classes asked for; all, if none is.

    Raises:
        InvalidRequest: for one that does not exist.
    """
    for name in names:
        if name not in CLASSES:
            raise InvalidRequest(f"class {name!r} does not exist; there are {', '.join(CLASSES)}")
    return list(names) or sorted(CLASSES, key=lambda name: int(name[1:]))


def run_class(name: str, seed: int, *, short: bool, case: str | None = None) -> Result:
    """Run one class here."""
    begin, title, count = time.monotonic(), name, 0
    try:
        module = load(name)
        title, count = module.TITLE, module.SHORT if short else module.FULL
        with _own_cache():
            outcome = module.run(seed, count, case)
    except FleetError as error:
        if error.reason != "not-installed":
            raise
        outcome = Outcome(skipped=str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgecascade"):
            raise
        outcome = Outcome(skipped=f"{error.name} is not installed: pip install '.[fleet]'")
    return Result(name, title, outcome, seed, count, round(time.monotonic() - begin, 1))


def run_classes(
    names: Sequence[str], seed: int, *, short: bool, jobs: int | None = None
) -> Iterator[Result]:
    """Run classes side by side; each result as it comes.

    One more than there are cores: F10, F14 and F8 wait for brokers, wires and servers.
    """
    ordered = sorted(names, key=lambda n: SLOW_FIRST.index(n) if n in SLOW_FIRST else 99)
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)) + 1) as pool:
        futures = [pool.submit(_run_apart, name, seed, short) for name in ordered]
        for future in as_completed(futures):
            yield future.result()


def closing_line(results: Sequence[Result]) -> str:
    """The line that is quoted: what was survived, and what was not even tried."""
    tried = sum(max(r.outcome.tried, len(r.outcome.failures)) for r in results)
    survived = sum(r.survived for r in results)
    ordered = sorted(results, key=lambda r: int(r.name[1:]))
    skipped = "; ".join(
        f"{r.name} skipped: {r.outcome.skipped}" for r in ordered if r.outcome.skipped
    )
    return f"faults survived: {survived:,} of {tried:,}" + (f" ({skipped})" if skipped else "")


def to_json(results: Sequence[Result], seed: int, *, short: bool) -> dict[str, Any]:
    """The file's content: enough to repeat any failure."""
    return {
        "schema": SCHEMA,
        "seed": seed,
        "short": short,
        "line": closing_line(results),
        "classes": {r.name: r.to_json() for r in sorted(results, key=lambda r: int(r.name[1:]))},
    }


@contextmanager
def _own_cache() -> Iterator[None]:
    """Stamps of files that are soon gone stay out of the user's folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def _run_apart(name: str, seed: int, short: bool) -> Result:
    """A class may bring down its process: that is a fault not survived, not the end of the run."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "edgecascade", "faults", "--class", name]
        command += ["--seed", str(seed), "--json", str(path), *(["--short"] if short else [])]
        try:
            done = subprocess.run(command, capture_output=True, timeout=LONGEST_S, check=False)
            if path.exists():
                return _read(json.loads(path.read_bytes())["classes"][name])
            words = done.stderr[-1500:].decode(errors="replace")
        except subprocess.TimeoutExpired:
            words = f"it did not end within {LONGEST_S:.0f} s"
    failure = Failure(WHOLE, words)
    return Result(name, name, Outcome(0, (failure,)), seed, 0, round(time.monotonic() - begin, 1))


def _read(raw: Mapping[str, Any]) -> Result:
    outcome = dict(raw["outcome"])
    failures = tuple(Failure(**each) for each in outcome.pop("failures"))
    kept = {key: raw[key] for key in ("name", "title", "seed", "count", "seconds")}
    return Result(outcome=Outcome(failures=failures, **outcome), **kept)
