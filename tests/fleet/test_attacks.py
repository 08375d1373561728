# SPDX-License-Identifier: Apache-2.0
"""Somebody who owns the broker, the mirror and some keys: each act is a test."""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgecascade.errors import UpdateRefused
from edgecascade.fleet import reports, rollout
from edgecascade.fleet.envelopes import Sealed
from edgecascade.fleet.faults import attacks, clocks, deceit
from edgecascade.fleet.faults.siege import FOLDER, Camp
from edgecascade.fleet.reports import Keyring
from edgecascade.fleet.rollout import Seen
from edgecascade.fleet.standing import Standing
from edgecascade.fleet.view import Doubts, View


@pytest.fixture(scope="module")
def camp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Camp]:
    import tempfile

    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        yield Camp(Path(folder) / "camp", random.Random(1))


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_device_stands_the_attack(camp: Camp, name: str) -> None:
    assert attacks.tried(camp, f"{name}:7") == ""


@pytest.mark.parametrize("name", deceit.TRICKS)
def test_operator_stands_the_trick(name: str) -> None:
    assert deceit.tried(f"{name}:7") == ""


def without(where: Any, name: str, check: str, instead: str) -> Callable[..., Any]:
    """A function whose source lacks a check."""
    plain = getattr(where, name)
    plain = plain.fget if isinstance(plain, property) else plain
    source = textwrap.dedent(inspect.getsource(plain)).removeprefix("@property\n")
    assert source.count(check) == 1, f"{check!r} is not in {name}"
    made: dict[str, Any] = {}
    exec(source.replace(check, instead), plain.__globals__, made)
    changed: Callable[..., Any] = made[name]
    return changed


REFUSED = "except (UnverifiedSignatureError, VerificationError):\n        return False"
PASSED = "except UnverifiedSignatureError:\n        pass"
GHOST = "name = str(body['device']); self.fleet.setdefault(name, Seen(1.0))\n        if False:"


@pytest.mark.parametrize(
    ("where", "name", "check", "instead", "trick"),
    [
        (Sealed, "is_signed_by", REFUSED, PASSED, "success-under-a-known-key-id"),
        (Sealed, "is_signed_by", REFUSED, PASSED, "failure-turned-into-success"),
        (Sealed, "is_signed_by", REFUSED, PASSED, "kind-of-document-changed"),
        (Keyring, "_opened", "len(signers) != 1", "not signers", "captured-device-signs-along"),
        (reports, "_check_own", "device != key.device", "False",
         "captured-device-speaks-for-others"),
        (reports, "_check_own", "device != key.device", "False",
         "captured-device-stands-for-others"),
        (Keyring, "_opened", "not good", "False", "revoked-key-of-a-device-with-a-new-one"),
        (Keyring, "_opened", "not good", "False", "standing-of-a-revoked-key"),
        (View, "enroll", "or known[name].public != key.public", "",
         "success-of-a-key-that-is-revoked-later"),
        (View, "enroll", "if name in self._keys", "", "revoked-device"),
        (View, "_presence", "if self._order.group in groups:", GHOST, "ghosts"),
        (View, "_presence", "or body.get(\"device\") != name", "", "presence-under-another-name"),
        (View, "_stand", "standing.turn <= before.turn", "False", "standing-before-it-was-stale"),
        (Standing, "turn", "self.boot", "0", "standing-of-an-earlier-start"),
        (View, "_stand", "standing.ts - now >= SILENT_S", "False", "standing-of-the-future"),
        (View, "enroll", "or known[name].public != key.public", "", "last-word-of-a-stolen-key"),
        (Standing, "present", "now - self.ts >= SILENT_S", "False", "standing-held-back"),
        (Standing, "present", "now - self.ts >= SILENT_S", "False", "standings-that-come-late"),
        (Standing, "present", "now - self.ts >= SILENT_S", "False",
         "dead-device-shown-to-a-new-command"),
        (Standing, "expired", "or now >= self.fresh_until", "", "standings-recorded-ahead"),
        (Standing, "expired", "self.update_stale or", "", "standing-before-it-was-stale"),
        (Seen, "trouble", "self.standing.clock_suspect", "False", "standing-without-a-date"),
        (Sealed, "is_signed_by", REFUSED, PASSED, "standing-with-another-date"),
        (View, "_proven", "not here or", "", "success-with-an-earlier-order"),
        (View, "_proven", "not here or", "", "success-in-another-group"),
        (View, "_proven", "or job.seq < order.seq", "", "success-with-an-order-of-the-same-name"),
        (View, "_proven", "job.release != order.release_sha256 and", "False and",
         "success-with-another-release"),
        (View, "_count", "job.version < before or", "False or", "success-before-the-failure"),
        (View, "_count", "job.version < before or", "False or",
         "success-before-the-failure-after-a-restart"),
        (View, "_count", "job.version < before or", "False or", "device-on-trial-is-kept-alive"),
        (View, "_newest", "if key == seen.key else", "if False else",
         "success-before-the-failure-after-a-restart"),
        (View, "_newest", "if key == seen.key else", "if True else",
         "highest-number-of-a-stolen-key"),
        (Doubts, "add", "len(self._strangers) < MAX_STRANGERS", "True", "ghosts"),
        (rollout, "_passes", "count.asked", "count.reachable", "all-but-one-are-hidden"),
        (rollout, "_passes", "count.asked", "count.reachable", "failures-are-suppressed"),
        (rollout, "_passes", "count.asked", "(count.asked - count.active)",
         "failures-are-shown-as-work"),
        (rollout, "_passes", "count.asked", "(count.asked - count.canceled)",
         "order-that-expired-on-the-way"),
        (rollout, "_fate", "and job.evidence.get(\"reason\") in UNFIT", "",
         "refusals-by-a-lying-mirror"),
    ],
)  # fmt: skip
def test_each_check_is_missed(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, check: str, instead: str, trick: str
) -> None:
    """Without the check, the trick works, or at least shows."""
    changed: Any = without(where, name, check, instead)
    if isinstance(getattr(where, name), property):
        changed = property(changed)
    monkeypatch.setattr(where, name, changed)
    try:
        noticed = deceit.tried(f"{trick}:7")
    except (AssertionError, KeyError) as error:  # it went where it must not
        noticed = repr(error)
    assert noticed


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
    assert len(attacks.ATTACKS) >= 57
    assert len(deceit.TRICKS) >= 51
    assert len({one.act.__doc__ for one in deceit.TRICKS.values()}) == len(deceit.TRICKS)
    assert len(clocks.CASES) >= 24
    assert len({one.act.__doc__ for one in attacks.ATTACKS.values()}) == len(attacks.ATTACKS)
