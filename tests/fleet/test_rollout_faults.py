# SPDX-License-Identifier: Apache-2.0
"""Whole rollouts to simulated fleets; and the simulation notices a careless controller."""

from __future__ import annotations

import pytest

from edgecascade.fleet import rollout
from edgecascade.fleet.faults import rollouts


def test_rollouts_survive() -> None:
    outcome = rollouts.run(5, rollouts.SHORT)
    assert outcome.tried == rollouts.SHORT
    assert not outcome.failures
    assert 0 < outcome.notes["aborted"] < rollouts.SHORT


def test_a_case_can_be_repeated_alone() -> None:
    assert rollouts.run(5, 3, "7").notes == rollouts.run(5, 100, "7").notes


@pytest.mark.parametrize(
    ("step", "instead", "noticed"),
    [
        ("_passes", lambda *_: True, "widened"),
        ("too_bad", lambda *_: "", "a bundle that fails|no end|done with"),
        ("_fate", lambda *_: "waiting", "no end"),
    ],
)
def test_a_careless_controller_is_noticed(
    monkeypatch: pytest.MonkeyPatch, step: str, instead: object, noticed: str
) -> None:
    monkeypatch.setattr(rollouts, "DEVICES", 1000)
    monkeypatch.setattr(rollouts, "MOST_TICKS", 60)
    monkeypatch.setattr(rollout, step, instead)
    failures = rollouts.run(5, 20).failures
    assert failures
    assert any(part in failure.message for failure in failures for part in noticed.split("|"))
