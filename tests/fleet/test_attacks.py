# SPDX-License-Identifier: Apache-2.0
"""Somebody who owns the broker, the mirror and some keys: each act is a test."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecascade.errors import UpdateRefused
from edgecascade.fleet.faults import attacks, clocks
from edgecascade.fleet.faults.siege import FOLDER, Camp


@pytest.fixture(scope="module")
def camp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Camp]:
    import tempfile

    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        yield Camp(Path(folder) / "camp", random.Random(1))


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_device_stands_the_attack(camp: Camp, name: str) -> None:
    assert attacks.tried(camp, f"{name}:7") == ""


@pytest.mark.parametrize("change", attacks.CHANGES)
def test_no_word_of_a_signed_order_can_be_changed(camp: Camp, change: str) -> None:
    with camp.siege(random.Random(1)) as siege:
        envelope = attacks.with_changed_body(siege, attacks.CHANGES[change])
        with pytest.raises(UpdateRefused, match="is signed by 0 keys"):
            siege.device.take(envelope)


@pytest.mark.parametrize("nonsense", attacks.BAD_BODIES)
def test_a_signature_does_not_make_sense_of_nonsense(camp: Camp, nonsense: str) -> None:
    with camp.siege(random.Random(1)) as siege:
        envelope = attacks.with_signed_body(siege, attacks.BAD_BODIES[nonsense])
        with pytest.raises(UpdateRefused) as caught:
            siege.device.take(envelope)
        assert caught.value.reason in ("malformed", "epoch", "time-zone")


def test_an_attack_that_succeeds_is_reported(camp: Camp, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the floor, an old repository is believed again by a device that lost its state.
    monkeypatch.setattr("edgecascade.fleet.trust.check_floor", lambda floor, now: None)
    assert "ended as 'accepted'" in attacks.tried(camp, "old-repository-after-loss-of-state:1")


def test_there_are_as_many_attacks_as_promised() -> None:
    assert len(attacks.ATTACKS) >= 36
    assert len(clocks.CASES) >= 24
    assert len({one.act.__doc__ for one in attacks.ATTACKS.values()}) == len(attacks.ATTACKS)
