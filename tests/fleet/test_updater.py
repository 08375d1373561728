# SPDX-License-Identifier: Apache-2.0
"""The updater as a function: what it does about each event, without a disk or a clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from edgecascade.errors import UpdateFailed
from edgecascade.fleet import events as ev
from edgecascade.fleet.orders import Order, Policy, Window
from edgecascade.fleet.state import (
    MAX_VERDICTS,
    DeviceState,
    Phase,
    Slot,
    Verdict,
    cut_evidence,
    read_slot,
    read_state,
    slot_to_bytes,
)
from edgecascade.fleet.updater import update

NOW = 1_800_000_000.0
E = TypeVar("E")


def slot(seq: int) -> Slot:
    return Slot("model", f"{seq}.0", seq, f"{seq:064x}", f"{seq + 1000:064x}")


def order(seq: int = 2, name: str = "", **changes: Any) -> Order:
    made = Order(
        order=name or f"o{seq}",
        seq=seq,
        group="site",
        bundle="model",
        version="2.0",
        release_sha256="0" * 64,
        not_before=0.0,
        expires=NOW + 1000,
        policy=Policy(retries=2),
    )
    return replace(made, **changes)


IDLE = DeviceState(active=slot(1), golden=slot(1), seqs={"site": 1}, floors={"model": 1})


def run(state: DeviceState, *events: ev.Event, now: float = NOW) -> tuple[DeviceState, list[Any]]:
    """The state after these events, and the effects of the last one."""
    effects: tuple[Any, ...] = ()
    for event in events:
        state, effects = update(state, event, now)
    return state, list(effects)


def only(effects: list[Any], kind: type[E]) -> E:
    found = [effect for effect in effects if isinstance(effect, kind)]
    assert len(found) == 1, effects
    return found[0]


def at(phase: Phase, **changes: Any) -> DeviceState:
    """An update of release 2 that stands in this phase."""
    moving = replace(ev_update(phase), **changes)
    if phase is Phase.PROBATION:
        return replace(IDLE, active=slot(2), previous=slot(1), update=moving, seqs={"site": 2})
    return replace(IDLE, update=moving, seqs={"site": 2})


def ev_update(phase: Phase) -> Any:
    begun, _ = run(IDLE, ev.Ordered(order(), slot(2)))
    assert begun.update is not None
    return replace(begun.update, phase=phase)


GOOD_PATH: list[tuple[ev.Event, Phase | None, type[Any]]] = [
    (ev.Ordered(order(), slot(2)), Phase.OFFERED, ev.Measure),
    (ev.Measured("o2", 10, 100), Phase.DOWNLOADING, ev.Download),
    (ev.Downloaded("o2"), Phase.VERIFYING, ev.Verify),
    (ev.Verified("o2"), Phase.STAGING, ev.Stage),
    (ev.Staged("o2"), Phase.DRAINING, ev.Drain),
    (ev.Drained("o2"), Phase.PROBATION, ev.Check),
    (ev.Checked(slot(2).manifest, True), Phase.PROBATION, ev.Try),
    (ev.Tried("o2", True), Phase.PROBATION, ev.Soak),
    (ev.Soaked("o2", True, {"tok_s": 9.5}), None, ev.Collect),
]


def test_a_good_update_goes_through_every_phase_once() -> None:
    state = IDLE
    for event, phase, effect in GOOD_PATH:
        state, effects = run(state, event)
        assert (state.update.phase if state.update else None) == phase, event
        only(effects, effect)
    assert (state.active, state.previous, state.golden) == (slot(2), slot(1), slot(1))
    assert state.floors == {"model": 2}
    report = state.verdict("o2")
    assert report is not None
    assert (report.state, report.evidence) == ("SUCCEEDED", {"tok_s": 9.5})
    assert (report.bundle_from, report.bundle_to) == ("model 1.0", "model 2.0")


@pytest.mark.parametrize("phase", list(Phase))
def test_a_restart_asks_for_what_the_phase_asked_for(phase: Phase) -> None:
    wanted = {
        Phase.OFFERED: ev.Measure,
        Phase.WAITING: ev.Wake,
        Phase.DOWNLOADING: ev.Download,
        Phase.VERIFYING: ev.Verify,
        Phase.STAGING: ev.Stage,
        Phase.REHEARSING: ev.Try,
        Phase.DRAINING: ev.Drain,
        Phase.PROBATION: ev.Check,
    }
    state, effects = run(at(phase), ev.Booted())
    work = [effect for effect in effects if isinstance(effect, wanted[phase])]
    assert work, effects
    assert state.update is not None
    assert state.update.phase is phase
    # The bundle that is kept is started again, except where it is about to go or gone.
    starts = ev.Check(slot(1)) in effects
    assert starts == (phase not in (Phase.DRAINING, Phase.PROBATION))


@pytest.mark.parametrize("phase", [Phase.REHEARSING, Phase.PROBATION])
def test_attempts_are_counted_before_they_begin_and_end_at_two(phase: Phase) -> None:
    state, _ = run(at(phase, boots=1), ev.Booted())
    assert state.update is not None
    assert state.update.boots == 2
    state, effects = run(state, ev.Booted())
    assert state.update is None
    assert state.active == slot(1)
    verdict = state.verdict("o2")
    assert verdict is not None
    assert (verdict.state, verdict.evidence["reason"]) == ("FAILED", "interrupted")
    assert not verdict.condemned
    assert ev.Check(slot(1)) in effects


def test_a_wrong_answer_goes_back_and_condemns_the_release() -> None:
    state, effects = run(at(Phase.PROBATION), ev.Tried("o2", False, {"reason": "wrong-answer"}))
    assert (state.active, state.previous, state.update) == (slot(1), None, None)
    assert only(effects, ev.Report).evidence == {"reason": "wrong-answer"}
    assert only(effects, ev.Collect).keep == (slot(1),)
    state, effects = run(state, ev.Ordered(order(3), slot(2)))
    assert only(effects, ev.Report).evidence["reason"] == "failed-before"
    assert state.update is None


def test_going_back_restores_what_was_before_the_switch() -> None:
    drained, _ = run(replace(at(Phase.DRAINING), previous=slot(7)), ev.Drained("o2"))
    assert slot(7) in drained.slots
    state, _ = run(drained, ev.Soaked("o2", False))
    assert (state.active, state.previous) == (slot(1), slot(7))


def test_with_room_for_two_a_bad_bundle_never_interrupts_the_service() -> None:
    state, effects = run(at(Phase.STAGING), ev.Staged("o2", room_for_two=True))
    assert only(effects, ev.Try).target == slot(2)
    ended, _ = run(state, ev.Tried("o2", False, {"reason": "slow"}))
    assert ended.active == slot(1)
    state, effects = run(state, ev.Tried("o2", True))
    only(effects, ev.Drain)
    state, effects = run(state, ev.Drained("o2"), ev.Checked(slot(2).manifest, True))
    only(effects, ev.Soak)  # it was tried already


def test_a_new_configuration_needs_no_trial() -> None:
    target = replace(slot(2), manifest=slot(1).manifest)
    state, _ = run(IDLE, ev.Ordered(order(), target), ev.Measured("o2", 1, 9))
    state, effects = run(
        state,
        ev.Downloaded("o2"),
        ev.Verified("o2"),
        ev.Staged("o2", room_for_two=True, known=True),
    )
    only(effects, ev.Drain)
    _, effects = run(state, ev.Drained("o2"), ev.Checked(target.manifest, True))
    only(effects, ev.Soak)


def test_room_is_made_of_the_previous_bundle_before_anything_is_refused() -> None:
    begun = replace(at(Phase.OFFERED), previous=slot(9))
    state, effects = run(begun, ev.Measured("o2", 100, 60, spare_bytes=40))
    assert state.previous is None
    assert only(effects, ev.Collect).keep == (slot(1), slot(2))
    only(effects, ev.Download)
    state, effects = run(begun, ev.Measured("o2", 100, 60, spare_bytes=39))
    report = only(effects, ev.Report)
    assert (report.state, report.evidence["reason"]) == ("REJECTED", "disk-full")
    assert state.previous == slot(9)


@pytest.mark.parametrize(
    ("asked", "target", "refusal", "reason"),
    [
        (order(), None, "", "no-release"),
        (order(), slot(2), "needs tegra234, this device is tegra264", "requirements"),
        (order(expires=NOW), slot(2), "", "expired"),
        (order(), slot(0), "", "downgrade"),
    ],
)
def test_what_cannot_be_is_rejected_with_its_reason(
    asked: Order, target: Slot | None, refusal: str, reason: str
) -> None:
    state, effects = run(IDLE, ev.Ordered(asked, target, refusal))
    report = only(effects, ev.Report)
    assert (report.state, report.evidence["reason"]) == ("REJECTED", reason)
    assert state.active == slot(1)
    assert state.update is None


def test_a_downgrade_that_is_allowed_is_taken() -> None:
    asked = order(policy=Policy(allow_downgrade=True))
    state, _ = run(IDLE, ev.Ordered(asked, slot(0)))
    assert state.update is not None


def test_a_replay_changes_nothing_and_says_nothing() -> None:
    later, _ = run(IDLE, ev.Ordered(order(5), slot(2)))
    for old in (order(4), order(5, name="forged")):
        state, effects = run(later, ev.Ordered(old, slot(3)))
        assert (state, effects) == (later, [])


def test_an_order_that_ended_is_answered_with_its_outcome_however_wide_it_becomes() -> None:
    state, _ = run(at(Phase.PROBATION), ev.Tried("o2", False, {"reason": "slow"}))
    state, effects = run(state, ev.Ordered(order(6, name="o2"), slot(2)))
    report = only(effects, ev.Report)
    assert (report.state, report.seq, report.evidence) == ("FAILED", 6, {"reason": "slow"})
    assert state.update is None


def test_the_window_holds_the_download_and_the_switch() -> None:
    window = Window("UTC", "01:00", 60)
    closed, open_at = NOW, window.next_open(NOW)
    asked = order(window=window, expires=NOW + 1e6)
    state, _ = run(IDLE, ev.Ordered(asked, slot(2)))
    state, effects = run(state, ev.Measured("o2", 1, 9))
    assert only(effects, ev.Wake).at == open_at
    state, effects = run(state, ev.Ticked(), now=open_at)
    only(effects, ev.Download)
    shut, effects = run(state, ev.Ticked(), now=open_at + 3601)
    assert shut.update is not None
    assert shut.update.phase is Phase.WAITING
    only(effects, ev.Halt)
    state, effects = run(state, ev.Downloaded("o2"), ev.Verified("o2"), ev.Staged("o2"), now=closed)
    assert state.update is not None
    assert state.update.phase is Phase.WAITING


def test_failed_attempts_pause_longer_each_time_and_end() -> None:
    state = at(Phase.DOWNLOADING)
    pauses = []
    for _ in range(2):
        state, effects = run(state, ev.Failed("o2", "unreachable"))
        pauses.append(only(effects, ev.Wake).at - NOW)
        state, effects = run(state, ev.Ticked(), now=NOW + pauses[-1])
        only(effects, ev.Download)
    assert pauses == [30.0, 60.0]
    state, effects = run(state, ev.Failed("o2", "unreachable", "no mirror"))
    report = only(effects, ev.Report)
    assert report.evidence == {"reason": "unreachable", "message": "no mirror"}
    assert state.update is None


def test_pause_stops_the_work_and_resume_goes_on_with_it() -> None:
    state, effects = run(at(Phase.DOWNLOADING), ev.Ordered(order(3, name="o2", action="pause")))
    only(effects, ev.Halt)
    assert only(effects, ev.Report).phase == "paused"
    assert run(state, ev.Booted())[0].update == state.update
    state, effects = run(state, ev.Ordered(order(4, name="o2"), slot(2)))
    only(effects, ev.Download)


def test_the_switch_is_no_place_to_pause() -> None:
    state, _ = run(at(Phase.DRAINING), ev.Ordered(order(3, name="o2", action="pause")))
    assert state.update is not None
    assert not state.update.paused


@pytest.mark.parametrize("phase", list(Phase))
def test_abort_ends_any_phase_on_the_old_bundle(phase: Phase) -> None:
    state, effects = run(at(phase), ev.Ordered(order(3, name="o2", action="abort")))
    assert (state.active, state.update) == (slot(1), None)
    report = only(effects, ev.Report)
    assert (report.state, report.evidence) == ("CANCELED", {"reason": "aborted"})
    assert ev.Check(slot(1)) in effects


def test_abort_of_what_is_kept_changes_nothing() -> None:
    kept, _ = run(at(Phase.PROBATION), ev.Soaked("o2", True))
    state, effects = run(kept, ev.Ordered(order(3, name="o2", action="abort")))
    assert state.active == slot(2)
    assert [type(effect) for effect in effects] == [ev.RaiseFloor]


def test_rollback_returns_to_what_the_order_replaced() -> None:
    kept, _ = run(at(Phase.PROBATION), ev.Soaked("o2", True))
    state, effects = run(kept, ev.Ordered(order(3, name="o2", action="rollback")))
    assert only(effects, ev.Verify).target == slot(1)
    _, effects = run(state, ev.Booted())
    assert only(effects, ev.Report).state == "IN_PROGRESS"  # it succeeded once, but not any more
    state, _ = run(
        state,
        ev.Verified("o2"),
        ev.Staged("o2", room_for_two=True),
        ev.Drained("o2"),
        ev.Checked(slot(1).manifest, True),
        ev.Soaked("o2", True),
    )
    assert (state.active, state.previous) == (slot(1), slot(2))
    assert state.floors == {"model": 2}  # it never sinks
    verdict = state.verdict("o2")
    assert verdict is not None
    assert verdict.state == "CANCELED"


def test_another_order_waits_for_the_switch_to_end_and_replaces_what_has_not_begun_it() -> None:
    other = ev.Ordered(order(3), slot(3))
    state, effects = run(at(Phase.PROBATION), other)
    assert effects == [ev.Defer(other)]
    assert state == at(Phase.PROBATION)
    state, effects = run(at(Phase.DOWNLOADING), other)
    assert state.update is not None
    assert state.update.target == slot(3)
    verdict = state.verdict("o2")
    assert verdict is not None
    assert verdict.evidence == {"reason": "superseded"}


def test_late_answers_of_an_update_that_is_over_change_nothing() -> None:
    for event in (ev.Downloaded("o2"), ev.Tried("o2", True), ev.Soaked("o2", False)):
        assert run(IDLE, event) == (IDLE, [])
        other = at(Phase.STAGING)
        assert run(other, event) == (other, [])


def test_a_damaged_active_bundle_gives_way_and_its_order_may_come_again() -> None:
    kept, _ = run(at(Phase.PROBATION), ev.Soaked("o2", True))
    state, effects = run(kept, ev.Checked(slot(2).manifest, False, "blobs changed"))
    assert state.active == slot(1)
    assert only(effects, ev.Check).slot == slot(1)
    report = only(effects, ev.Report)
    assert (report.state, report.evidence["reason"]) == ("FAILED", "damaged")
    state, effects = run(state, ev.Ordered(order(), slot(2)))
    only(effects, ev.Measure)


def test_without_any_sound_bundle_the_service_runs_on_none() -> None:
    state, effects = run(IDLE, ev.Checked(slot(1).manifest, False, "blobs changed"))
    assert state.active is None
    assert only(effects, ev.Start).slot is None


def test_the_state_file_is_read_as_it_was_written_or_not_at_all() -> None:
    state = at(Phase.PROBATION).with_verdict(Verdict("o1", "site", 1, "FAILED", {"n": [1.5]}))
    data = state.to_bytes()
    assert read_state(data) == state
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(UpdateFailed):
            read_state(bytes(changed))
    with pytest.raises(UpdateFailed):
        read_state(slot_to_bytes(slot(1)))
    with pytest.raises(UpdateFailed):
        read_slot(data)
    assert read_slot(slot_to_bytes(slot(1))) == slot(1)


def test_what_is_remembered_is_bounded() -> None:
    state = IDLE
    for number in range(100):
        state = state.with_verdict(Verdict(f"o{number}", "site", number, "FAILED"))
    assert len(state.verdicts) == MAX_VERDICTS
    cut = cut_evidence({"message": "x" * 5000, "more": ["y" * 9000], "rate": float("inf")})
    assert len(cut["message"]) == 1000
    assert (cut["more"], cut["rate"]) == ("too long to keep", "inf")
