# SPDX-License-Identifier: Apache-2.0
"""Every class of faults in its short form, and that it can fail; `make faults` is the full form."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from edgecascade.cli import main
from edgecascade.errors import InvalidRequest
from edgecascade.fleet import intake, orders
from edgecascade.fleet.executor import Executor
from edgecascade.fleet.faults import (
    CLASSES,
    Failure,
    Outcome,
    crash,
    disk,
    flips,
    load,
    mutants,
    runner,
    spoke,
)
from edgecascade.fleet.faults.runner import Result, chosen, closing_line, run_class
from edgecascade.fleet.faults.world import Violation
from edgecascade.fleet.fetch import Downloader
from edgecascade.fleet.line import Line
from edgecascade.fleet.orders import Window
from edgecascade.fleet.store import Store

# What a fault makes the device log, thousands of times.
pytestmark = pytest.mark.usefixtures("quiet")

# What each class must notice, and how many faults are enough for it. Of F2 it is a mutant that does
# nothing; test_attacks.py and test_rollout_faults.py are careless in F11's and F13's ways.
CARELESS: dict[str, tuple[int, tuple[Any, str, Any]]] = {
    "F1": (1, (Store, "adopt", lambda store, sha256: _adopt(store, sha256))),
    "F2": (1, (mutants, "MUTANTS", (mutants.Mutant("nothing is taken away"),))),
    "F3": (10, (Store, "collect", lambda store, keep: None)),
    "F4": (8, (Store, "adopt", lambda store, sha256: _adopt(store, sha256))),
    "F5": (30, (Executor, "_keep_golden", lambda executor: None)),
    "F6": (20, (Executor, "_rest", lambda executor, error: _raise(error))),
    "F7": (60, (Store, "check", lambda store, slot: "")),
    "F8": (20, (Downloader, "_whole", lambda downloader, part: not part.lacking)),
    "F9": (30, (intake.orders, "verify", lambda data, keys, now: orders.unverified(data))),
    "F10": (1, (Line, "tell", lambda line, job: None)),
    "F12": (14, (Window, "next_open", lambda window, now: now)),
    "F14": (1, (Line, "tell", lambda line, job: None)),
}


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _adopt(store: Store, sha256: str) -> None:
    """Without a sync."""
    if store.files.size(f"partial/{sha256}") is not None:
        store.files.rename(f"partial/{sha256}", f"blobs/{sha256}")


def _raise(error: OSError) -> None:
    raise error


@pytest.mark.parametrize("name", CLASSES)
def test_every_fault_is_survived_and_leaves_no_stamps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run_class(name, seed=1, short=True)
    assert not (tmp_path / "cache").exists()
    if result.outcome.skipped:
        pytest.skip(result.outcome.skipped)
    assert result.outcome.failures == ()
    assert result.outcome.tried >= min(result.count, load(name).SHORT)


@pytest.mark.parametrize("name", CARELESS)
def test_carelessness_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, (target, step, instead) = CARELESS[name]
    monkeypatch.setattr(spoke, "BOUND_S", 1.0)
    monkeypatch.setattr(target, step, instead)
    outcome = load(name).run(3, count)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert 0 < len(outcome.failures) <= outcome.tried


def test_a_missing_sync_is_found_and_found_again_by_its_case() -> None:
    with patch.object(Store, "adopt", _adopt):
        found = next(
            (name, failure)
            for name, files, cuts, scenario in crash.crash_states("good", 1, 2)
            if (failure := _failure(scenario, files, cuts))
        )
        again = list(crash.crash_states("good", 1, 2, found[0]))
        assert [each[0] for each in again] == [found[0]]
        assert _failure(again[0][3], again[0][1], again[0][2]) == found[1]
    assert _failure(again[0][3], again[0][1], again[0][2]) is not None  # what was lost stays lost


def _failure(scenario: crash.Scenario, files: crash.SimFiles, cuts: int) -> str | None:
    try:
        scenario.check(files.copy(), cuts=cuts)
    except Violation as error:
        return str(error)
    return None


def test_every_failure_is_repeated_by_seed_and_case() -> None:
    with patch.object(Store, "adopt", _adopt):
        failures = crash.run(5, 500).failures
        once = next(failure for failure in failures if "." not in failure.case)
        twice = next(failure for failure in failures if "." in failure.case)
        for failure in (once, twice):
            again = crash.run(5, 500, failure.case)
            assert (again.tried, again.failures) == (1, (failure,))
    with patch.object(Store, "check", lambda store, slot: ""):
        failure = flips.run(5, 60).failures[0]
        assert flips.run(5, 60, failure.case).failures == (failure,)

    with patch.object(Executor, "_rest", lambda executor, error: _raise(error)):
        failure = next(f for f in disk.run(5, 60).failures if "tmpfs" not in f.case)
        assert disk.run(5, 60, failure.case).failures == (failure,)


def test_enough_steps_are_taken_away_to_mean_something() -> None:
    assert mutants.FULL >= 12
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)


def test_the_counts_are_those_that_are_promised() -> None:
    promised = {
        "F1": 20_000, "F2": 12, "F3": 500, "F4": 120, "F5": 40, "F6": 150, "F7": 500, "F8": 250,
        "F9": 2000, "F10": 30, "F11": 36, "F12": 24, "F13": 200, "F14": 30,
    }  # fmt: skip
    for name, count in promised.items():
        assert count <= load(name).FULL, name


def test_the_closing_line_counts_what_was_tried_and_names_what_was_not() -> None:
    results = [
        Result("F4", "images", Outcome(skipped="needs root"), 1, 120, 0.0),
        Result("F1", "cuts", Outcome(20_000, (Failure("a/1", "broken"),)), 1, 20_000, 1.0),
        Result("F6", "disk", Outcome(0, (Failure("all", "crashed"),)), 1, 150, 1.0),
    ]
    line = "faults survived: 19,999 of 20,001 (F4 skipped: needs root)"
    assert closing_line(results) == line


def test_a_class_that_kills_its_process_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    result = next(iter(runner.run_classes(["F1"], 1, short=True)))
    assert [failure.case for failure in result.outcome.failures] == ["all"]


def test_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="F99"):
        chosen(["F99"])
    assert chosen([]) == sorted(CLASSES, key=lambda name: int(name[1:]))


def test_the_command_writes_what_repeats_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = Failure("size/3", "it broke")
    outcome = Outcome(4, (failure,), notes={"kills": 7})
    monkeypatch.setattr(load("F6"), "run", lambda seed, count, case: outcome)
    path = tmp_path / "faults.json"
    assert main(["faults", "--class", "F6", "--seed", "5", "--short", "--json", str(path)]) == 1
    shown = capsys.readouterr()
    assert "again: edgecascade faults --class F6 --seed 5 --short --case size/3" in shown.err
    assert shown.out.splitlines()[-1] == "faults survived: 3 of 4"
    document = json.loads(path.read_text())
    assert document["classes"]["F6"]["outcome"]["failures"] == [
        {"case": "size/3", "message": "it broke"}
    ]
    assert (document["seed"], document["classes"]["F6"]["survived"]) == (5, 3)
