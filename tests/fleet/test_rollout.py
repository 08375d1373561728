# SPDX-License-Identifier: Apache-2.0
"""The controller: when a rollout widens, waits, pauses and ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.errors import InvalidRequest
from edgecascade.fleet import rollout
from edgecascade.fleet.jobs import STATES, Job, JobState
from edgecascade.fleet.rollout import Fleet, Plan, Progress, Seen, Thresholds, step

PLAN = Plan("order", thresholds=Thresholds(soak_s=0.0, lost_s=100.0))
START = Progress(seq=7)


def fleet_of(devices: int, **changes: Any) -> dict[str, Seen]:
    """Devices spread evenly over the percentages."""
    return {
        f"device-{n:04d}": replace(Seen(point=100 * n / devices, online=True), **changes)
        for n in range(devices)
    }


def job(name: str, state: JobState, phase: str = "", reason: str = "") -> Job:
    return Job("order", 1, name, state, phase, evidence={"reason": reason}, release="ab" * 32)


def report(
    fleet: dict[str, Seen], names: list[str], state: JobState, phase: str = "", reason: str = ""
) -> None:
    for name in names:
        fleet[name] = replace(fleet[name], job=job(name, state, phase, reason))


def succeed(plan: Plan, progress: Progress, fleet: dict[str, Seen]) -> None:
    report(fleet, rollout.members(plan, progress, fleet), "SUCCEEDED")


def test_a_good_bundle_goes_from_one_device_to_all() -> None:
    fleet, progress = fleet_of(1000), step(PLAN, START, fleet_of(1000), 0.0)
    sizes = []
    while not progress.ended:
        sizes.append(len(rollout.members(PLAN, progress, fleet)))
        assert step(PLAN, progress, fleet, 1.0) == progress, "widened before anybody succeeded"
        succeed(PLAN, progress, fleet)
        progress = step(PLAN, progress, fleet, 1.0)
    assert sizes == [1, 10, 50, 250, 1000]
    assert (progress.state, progress.seq) == ("done", START.seq + 6)


def test_each_change_has_a_higher_sequence_number() -> None:
    fleet = fleet_of(100)
    first = step(PLAN, START, fleet, 0.0)
    assert first.seq == 8
    assert rollout.pause(first, 1.0).seq == 9
    assert rollout.abort(first, 1.0).seq == 9
    assert rollout.rollback(rollout.abort(first, 1.0), 2.0).seq == 10


def test_nobody_online_is_waited_for() -> None:
    assert step(PLAN, START, fleet_of(10, online=False), 5.0) == START
    assert step(PLAN, START, {}, 5.0) == START


def test_the_first_device_is_in_every_later_stage() -> None:
    fleet = fleet_of(100)
    for name in list(fleet)[:40]:
        fleet[name] = replace(fleet[name], online=False)
    progress = step(PLAN, START, fleet, 0.0)
    assert progress.first == "device-0040", "the one that later stages reach first"
    succeed(PLAN, progress, fleet)
    later = step(PLAN, progress, fleet, 1.0)
    assert progress.first in rollout.members(PLAN, later, fleet)


def test_the_operator_may_name_the_first_device() -> None:
    plan = replace(PLAN, first="device-0077")
    assert rollout.members(plan, step(plan, START, fleet_of(100), 0.0), fleet_of(100)) == [
        "device-0077"
    ]


def test_stages_that_hold_nobody_more_are_left_out() -> None:
    fleet = fleet_of(8)
    progress = step(PLAN, START, fleet, 0.0)
    succeed(PLAN, progress, fleet)
    assert PLAN.stages[step(PLAN, progress, fleet, 1.0).stage] == 25.0


def at_quarter(devices: int = 1000, plan: Plan = PLAN) -> tuple[Progress, dict[str, Seen]]:
    fleet = fleet_of(devices)
    return replace(START, stage=3, first="device-0000", seq=11), fleet


@pytest.mark.parametrize(
    ("failed", "state"), [(0, "running"), (12, "running"), (13, "aborted"), (250, "aborted")]
)
def test_five_percent_of_failures_end_the_rollout(failed: int, state: str) -> None:
    progress, fleet = at_quarter()
    report(fleet, list(fleet)[:failed], "FAILED")
    after = step(PLAN, progress, fleet, 1.0)
    assert after.state == state
    assert (f"{failed} of 250 failed" in after.reason) == (state == "aborted")


def test_one_failure_in_a_small_stage_is_not_yet_the_end_but_two_are() -> None:
    progress, fleet = at_quarter(40)
    report(fleet, ["device-0000"], "FAILED")
    assert step(PLAN, progress, fleet, 1.0).state == "running"
    report(fleet, ["device-0001"], "FAILED")
    assert step(PLAN, progress, fleet, 1.0).state == "aborted"


def test_a_stage_that_cannot_reach_its_share_pauses_and_resume_accepts_it() -> None:
    progress, fleet = at_quarter(40)
    succeed(PLAN, progress, fleet)
    report(fleet, ["device-0003"], "FAILED")
    paused = step(PLAN, progress, fleet, 1.0)
    assert paused.state == "paused"
    assert "9 of 10 succeeded" in paused.reason
    resumed = rollout.resume(PLAN, paused, fleet, 2.0)
    assert (resumed.state, resumed.accepted) == ("running", {"device-0003": "failed"})
    assert PLAN.stages[step(PLAN, resumed, fleet, 3.0).stage] == 100.0


def test_a_first_device_that_fails_is_the_end() -> None:
    fleet = fleet_of(100)
    progress = step(PLAN, START, fleet, 0.0)
    report(fleet, [progress.first], "FAILED")
    after = step(PLAN, progress, fleet, 1.0)
    assert (after.state, after.reason) == ("aborted", "nobody succeeded: 1 failed, 0 rejected")


def test_a_bundle_that_every_device_rejects_is_the_end() -> None:
    progress, fleet = at_quarter(40)
    report(fleet, rollout.members(PLAN, progress, fleet), "REJECTED")
    assert step(PLAN, progress, fleet, 1.0).reason == "nobody succeeded: 0 failed, 10 rejected"


def test_devices_that_do_not_fit_are_no_failures() -> None:
    progress, fleet = at_quarter(40)
    succeed(PLAN, progress, fleet)
    unfit = ["device-0001", "device-0002", "device-0003"]
    report(fleet, unfit, "REJECTED", reason="requirements")
    assert step(PLAN, progress, fleet, 1.0).stage == 4


@pytest.mark.parametrize("reason", ["no-release", "expired", "signature", ""])
def test_a_refusal_that_others_can_bring_about_excuses_nobody(reason: str) -> None:
    progress, fleet = at_quarter(40)
    succeed(PLAN, progress, fleet)
    report(fleet, ["device-0001"], "REJECTED", reason=reason)
    assert step(PLAN, progress, fleet, 1.0).reason == "9 of 10 succeeded; resume accepts the others"
    report(fleet, ["device-0001"], "CANCELED", reason="expired")
    assert step(PLAN, progress, fleet, 1.0).state == "paused"


def test_only_a_device_that_believes_the_order_can_be_unfit_for_it() -> None:
    progress, fleet = at_quarter(40)
    succeed(PLAN, progress, fleet)
    refused = replace(job("device-0001", "REJECTED", reason="requirements"), release="")
    fleet["device-0001"] = replace(fleet["device-0001"], job=refused)
    assert step(PLAN, progress, fleet, 1.0).state == "paused"


@pytest.mark.parametrize("phase", sorted(rollout.RISKY))
def test_one_device_lost_on_trial_ends_the_rollout(phase: str) -> None:
    progress, fleet = at_quarter()
    lost = replace(fleet["device-0002"], job=job("device-0002", "IN_PROGRESS", phase), heard=50.0)
    for online in (True, False):
        fleet["device-0002"] = replace(lost, online=online)
        assert step(PLAN, progress, fleet, 149.0).state == "running"
        after = step(PLAN, progress, fleet, 150.0)
        assert (after.state, after.reason) == ("aborted", "1 of 250 lost on trial")


@pytest.mark.parametrize("phase", ["offered", "waiting", "downloading", "verifying", "draining"])
def test_a_device_that_goes_offline_before_is_not_lost(phase: str) -> None:
    progress, fleet = at_quarter(40)
    succeed(PLAN, progress, fleet)
    away = Seen(point=1.0, online=False, job=job("device-0001", "IN_PROGRESS", phase))
    fleet["device-0001"] = away
    assert step(PLAN, progress, fleet, 1e5) == progress, "it is waited for"


@pytest.mark.parametrize("silent", [1, 8, 9])
def test_silence_is_no_failure_and_no_success(silent: int) -> None:
    progress, fleet = at_quarter(40)
    succeed(PLAN, progress, fleet)
    for name in list(fleet)[1 : 1 + silent]:
        fleet[name] = replace(fleet[name], online=False, job=None)
    assert step(PLAN, progress, fleet, 1e5) == progress
    assert rollout.tally(PLAN, progress, fleet, 1e5).silent == silent


def test_a_few_silent_ones_of_many_hold_nothing_up() -> None:
    progress, fleet = at_quarter()
    succeed(PLAN, progress, fleet)
    for name in list(fleet)[1:13]:
        fleet[name] = replace(fleet[name], online=False, job=None)
    assert step(PLAN, progress, fleet, 1.0).stage == 4, "238 of 250 are more than 95 %"
    fleet["device-0100"] = replace(fleet["device-0100"], online=False, job=None)
    assert step(PLAN, progress, fleet, 1.0).stage == 3


def test_an_operator_may_go_on_without_silent_devices_until_they_speak() -> None:
    progress, fleet = at_quarter(40)
    succeed(PLAN, progress, fleet)
    silent = list(fleet)[1:5]
    for name in silent:
        fleet[name] = replace(fleet[name], online=False, job=None)
    resumed = rollout.resume(PLAN, rollout.pause(progress, 1.0), fleet, 2.0)
    assert resumed.accepted == dict.fromkeys(silent, "silent")
    assert step(PLAN, resumed, fleet, 3.0).stage == 4
    report(fleet, silent[:2], "FAILED")
    after = step(PLAN, resumed, fleet, 3.0)
    assert (after.state, after.reason) == ("aborted", "2 of 8 failed"), "not what was accepted"
    fleet[silent[0]] = replace(fleet[silent[0]], online=False, job=None)
    report(fleet, silent[1:2], "SUCCEEDED")
    other = list(fleet)[7]
    fleet[other] = replace(fleet[other], online=False, job=None)
    assert step(PLAN, resumed, fleet, 3.0).stage == 3, "another one's silence was not accepted"


def test_the_broker_may_show_anybody_online_or_not_and_widens_nothing() -> None:
    progress, fleet = at_quarter(40)
    report(fleet, ["device-0000"], "SUCCEEDED")
    for online in (False, True):
        for name in list(fleet)[1:]:
            fleet[name] = replace(fleet[name], online=online)
        assert step(PLAN, progress, fleet, 1e5) == progress


def test_another_first_device_is_chosen_when_it_is_revoked() -> None:
    fleet = fleet_of(100)
    progress = step(PLAN, START, fleet, 0.0)
    del fleet[progress.first]
    again = step(PLAN, progress, fleet, 1.0)
    assert (again.first, again.seq) == ("device-0001", progress.seq + 1)
    named = replace(PLAN, first="device-0000")
    assert step(named, progress, fleet, 1.0) == progress, "not one that nobody named"


def test_the_soak_begins_anew_when_the_share_is_lost() -> None:
    plan = replace(PLAN, thresholds=replace(PLAN.thresholds, soak_s=60.0))
    progress, fleet = at_quarter(40)
    succeed(plan, progress, fleet)
    progress = step(plan, progress, fleet, 100.0)
    assert progress.good_since == 100.0
    report(fleet, ["device-0005"], "IN_PROGRESS", "downloading")
    progress = step(plan, progress, fleet, 150.0)
    assert progress.good_since is None
    succeed(plan, progress, fleet)
    progress = step(plan, progress, fleet, 155.0)
    assert step(plan, progress, fleet, 214.0).stage == 3
    assert step(plan, progress, fleet, 215.0).stage == 4


def test_a_clock_set_back_does_not_shorten_the_soak() -> None:
    plan = replace(PLAN, thresholds=replace(PLAN.thresholds, soak_s=60.0))
    progress, fleet = at_quarter(40)
    succeed(plan, progress, fleet)
    progress = step(plan, progress, fleet, 1000.0)
    progress = step(plan, progress, fleet, 10.0)
    assert step(plan, progress, fleet, 69.0).stage == 3
    assert step(plan, progress, fleet, 70.0).stage == 4


def test_the_last_stage_waits_for_the_last_device_but_not_for_ever() -> None:
    fleet = fleet_of(100)
    progress = replace(START, stage=4, first="device-0000", since=0.0)
    succeed(PLAN, progress, fleet)
    report(fleet, ["device-0050"], "IN_PROGRESS", "downloading")
    assert step(PLAN, progress, fleet, 99.0).state == "running"
    assert step(PLAN, progress, fleet, 100.0).state == "done"
    succeed(PLAN, progress, fleet)
    assert step(PLAN, progress, fleet, 1.0).state == "done"


def test_an_order_is_signed_anew_before_it_expires() -> None:
    plan = replace(PLAN, valid_s=1000.0)
    progress, fleet = at_quarter()
    progress = replace(progress, signed_at=100.0)
    assert step(plan, progress, fleet, 599.0) == progress
    renewed = step(plan, progress, fleet, 600.0)
    assert (renewed.seq, renewed.signed_at, renewed.stage) == (progress.seq + 1, 600.0, 3)


def test_the_egress_is_shared_by_the_devices_that_fetch() -> None:
    plan = replace(PLAN, bytes=17_000_000_000, egress_kbit_s=10_000_000.0)
    fleet = fleet_of(10_000)
    progress = step(plan, START, fleet, 0.0)
    assert progress.kbit_s == 10_000_000
    succeed(plan, progress, fleet)
    assert step(plan, progress, fleet, 1.0).kbit_s == 10_000_000 // 99
    assert rollout.stage_s(plan, 10_000) == pytest.approx(37.8 * 3600, rel=0.001)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: rollout.pause(replace(p, state="aborted"), 1.0), "aborted"),
        (lambda p: rollout.resume(PLAN, p, {}, 1.0), "running"),
        (lambda p: rollout.resume(PLAN, replace(p, state="aborted"), {}, 1.0), "aborted"),
        (lambda p: rollout.abort(replace(p, state="rolled-back"), 1.0), "already"),
    ],
)
def test_what_makes_no_sense_is_refused(act: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        act(START)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan("o", stages=()),
        lambda: Plan("o", stages=(5.0, 1.0)),
        lambda: Plan("o", stages=(1.0, 101.0)),
        lambda: Plan("o", egress_kbit_s=0.0),
        lambda: Plan("o", valid_s=1.0),
        lambda: Plan("o", valid_s=1e300),
        lambda: Plan("o", valid_s=float("nan")),
        lambda: Thresholds(success=1.1),
        lambda: Thresholds(lost=0),
    ],
)
def test_plans_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(InvalidRequest):
        make()


seen = st.builds(
    Seen,
    point=st.floats(0, 99.99),
    online=st.booleans(),
    job=st.none()
    | st.builds(
        Job,
        order=st.just("order"),
        seq=st.just(1),
        device=st.just("d"),
        state=st.sampled_from(STATES),
        phase=st.sampled_from(["", "downloading", "probation", "rehearsing"]),
        evidence=st.sampled_from([{}, {"reason": "requirements"}, {"reason": "no-release"}]),
        release=st.sampled_from(["", "ab" * 32]),
    ),
    heard=st.floats(0, 1000),
)
fleets = st.dictionaries(st.sampled_from([f"d{n}" for n in range(60)]), seen, max_size=60)


@settings(max_examples=300)
@given(fleets, st.integers(0, 4), st.floats(0, 2000), st.booleans())
def test_any_fleet_is_judged_by_the_same_rule(
    fleet: Fleet, stage: int, now: float, resumed: bool
) -> None:
    progress = Progress(seq=9, stage=stage, first="d0")
    if resumed:
        progress = rollout.resume(PLAN, rollout.pause(progress, now), fleet, now)
    count = rollout.tally(PLAN, progress, fleet, now)
    assert count.members == len(rollout.members(PLAN, progress, fleet))
    others = (count.silent, count.rejected, count.canceled, count.unfit, count.accepted)
    assert count.members == count.reachable + sum(others)
    after = step(PLAN, progress, fleet, now)
    if after.stage > stage or after.state == "done":
        assert count.succeeded >= max(1, 0.95 * count.asked)
        assert not rollout.too_bad(PLAN.thresholds, count)
    if count.failed + count.lost >= max(2, 0.05 * count.reachable):
        assert after.state == "aborted"
    assert after.seq == progress.seq + (after != replace(progress, good_since=after.good_since))
    assert step(PLAN, after, fleet, now).stage >= after.stage


@pytest.mark.parametrize(
    ("act", "state"),
    [
        (rollout.pause, "paused"),
        (rollout.abort, "aborted"),
        (rollout.rollback, "rolled-back"),
    ],
)
def test_what_was_said_can_be_said_again(act: Any, state: Any) -> None:
    """A broker may have lost the order that stops a rollout: nobody else could say it."""
    before = replace(START, first="a", state=state, reason="2 of 9 failed", seq=7, signed_at=1.0)
    after = act(before, 99.0)
    assert (after.state, after.reason, after.seq, after.signed_at) == (
        state,
        before.reason,
        8,
        99.0,
    )


def test_who_has_not_begun_is_not_waited_for_until_it_goes_back() -> None:
    fleet = fleet_of(len(STATES))
    for name, state in zip(fleet, STATES, strict=True):
        report(fleet, [name], state)
    assert rollout.going_back(fleet) == (2, 0), "IN_PROGRESS and SUCCEEDED"
    assert rollout.going_back({n: replace(s, online=False) for n, s in fleet.items()}) == (0, 2)
