# SPDX-License-Identifier: Apache-2.0
"""A bundle on trial: real child processes on a real bundle, and children that do wrong."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from golden import Build

from edgecascade import LLM
from edgecascade.fleet import probation
from edgecascade.fleet.probation import Trial, prepare, soak
from edgecascade.fleet.release import GoldenPrompt, Health

PROMPT = (1, 2, 3)


@pytest.fixture(scope="module")
def folder(build: Build) -> Path:
    return build("tiny", "speed")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> tuple[int, ...]:
    with LLM.load(folder, slots=1) as llm:
        return llm.generate(list(PROMPT), temperature=0.0, max_tokens=6).token_ids


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probation, "POLL_S", 0.05)


def golden(tokens: tuple[int, ...]) -> GoldenPrompt:
    return GoldenPrompt(token_ids=PROMPT, max_tokens=6, tokens=tokens)


def child(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import json, sys, time\n{program}")


def test_a_bundle_that_answers_as_it_must_passes(folder: Path, tokens: tuple[int, ...]) -> None:
    health = Health(prompts=(golden(tokens), GoldenPrompt(prompt="a", contains=("",))))
    ok, evidence = Trial(folder, health).run()
    assert ok, evidence
    assert evidence["prompts"] == 2
    assert evidence["tok_s"] > 0
    assert evidence["load_s"] > 0


def test_one_wrong_token_is_named(folder: Path, tokens: tuple[int, ...]) -> None:
    other = (*tokens[:2], tokens[2] + 1)
    ok, evidence = Trial(folder, Health(prompts=(golden(other),))).run()
    assert not ok
    assert evidence["reason"] == "wrong-answer"
    assert f"token 2 is [{tokens[2]}], expected [{other[2]}]" in evidence["message"]


def test_a_rate_that_is_not_reached_is_reported(folder: Path, tokens: tuple[int, ...]) -> None:
    ok, evidence = Trial(folder, Health(prompts=(golden(tokens),), min_tok_s=1e6)).run()
    assert (ok, evidence["reason"]) == (False, "slow")


def test_a_damaged_bundle_does_not_load(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"{}")
    ok, evidence = Trial(tmp_path, Health()).run()
    assert (ok, evidence["reason"]) == (False, "load-failed")
    assert "manifest.json" in evidence["message"]


def test_a_crash_is_reported_with_its_last_words(tmp_path: Path) -> None:
    crash = child("sys.stderr.write('illegal instruction'); sys.stderr.flush(); sys.exit(3)")
    ok, evidence = Trial(tmp_path, Health(), command=crash).run()
    assert (ok, evidence["reason"]) == (False, "crash")
    assert evidence["message"] == "status 3: illegal instruction"


def test_a_hang_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probation, "START_S", 0.2)
    ok, evidence = Trial(tmp_path, Health(load_s=0.1), command=child("time.sleep(600)")).run()
    assert (ok, evidence["reason"]) == (False, "hang")


def test_a_child_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    hog = child("x = bytearray(200 << 20); time.sleep(600)")
    ok, evidence = Trial(tmp_path, Health(max_memory_mb=100), command=hog).run()
    assert (ok, evidence["reason"]) == (False, "memory")
    assert evidence["peak_mb"] > 100


def test_heat_ends_a_trial(tmp_path: Path) -> None:
    trial = Trial(
        tmp_path,
        Health(max_temp_c=80),
        command=child("time.sleep(600)"),
        temperature=lambda: 91.0,
    )
    ok, evidence = trial.run()
    assert (ok, evidence["reason"], evidence["hottest_c"]) == (False, "hot", 91.0)


def test_a_trial_that_is_stopped_ends_at_once(tmp_path: Path) -> None:
    trial = Trial(tmp_path, Health(), command=child("time.sleep(600)"))
    threading.Timer(0.2, trial.stop).start()
    ok, evidence = trial.run()
    assert (ok, evidence["reason"]) == (False, "stopped")


def test_an_engine_is_built_only_where_it_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probation, "find_spec", lambda name: name)
    built = tmp_path / "built"
    build = child(f"open({str(built)!r}, 'w')")

    def look(current: bool) -> tuple[str, ...]:
        return child(f"print(json.dumps({{'step': 'engine', 'current': {current}}}))")

    assert prepare(tmp_path, look=look(True), build=build) == {}
    assert not built.exists()
    assert "engine_s" in prepare(tmp_path, look=look(False), build=build)
    assert built.exists()
    failed = prepare(tmp_path, look=look(False), build=child("sys.exit('no memory')"))
    assert failed == {"reason": "engine-failed", "message": "status 1: no memory"}


def test_soaking_sees_a_crash_heat_and_a_stop() -> None:
    waited: list[float] = []

    def wait(pause_s: float) -> bool:
        waited.append(pause_s)
        return False

    health = Health(soak_s=0.12, max_temp_c=90)
    ok, evidence = soak(health, lambda: "", wait, lambda: 50.0)
    assert ok
    assert evidence["hottest_c"] == 50.0
    assert sum(waited) == pytest.approx(0.12)
    ok, evidence = soak(health, lambda: "3 restarts" if len(waited) > 4 else "", wait, lambda: None)
    assert (ok, evidence["message"]) == (False, "3 restarts")
    assert soak(health, lambda: "", wait, lambda: 95.0)[1]["reason"] == "hot"
    assert soak(health, lambda: "", lambda pause_s: True, lambda: None)[1]["reason"] == "stopped"
