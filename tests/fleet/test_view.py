# SPDX-License-Identifier: Apache-2.0
"""What an operator believes of what devices say: that of enrolled ones, signed, and new."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from edgecascade.fleet import reports
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.keys import public_hex
from edgecascade.fleet.orders import Cohort, Order, point
from edgecascade.fleet.register import Devices
from edgecascade.fleet.reports import DeviceKey
from edgecascade.fleet.rollout import Seen
from edgecascade.fleet.standing import SILENT_S, Standing
from edgecascade.fleet.view import MAX_STRANGERS, OTHERS, View
from edgecascade.service import wire
from edgecascade.service.topics import Address

RELEASE = "ab" * 32
ORDER = Order("o-1", 3, "site-7", "tiny", "2.0", RELEASE, 0.0, 1e9, cohort=Cohort("salt", 100))
NAMES = ("robot-1", "robot-2", "robot-3")
SIGNERS = {name: CryptoSigner.generate_ed25519() for name in NAMES}


def key(name: str, *groups: str) -> DeviceKey:
    public = public_hex(SIGNERS[name].public_key)
    return DeviceKey(name, f"{name}-agent", public, groups or ("site-7",))


DEVICES = Devices().with_keys(map(key, NAMES), 0.0)
JOB = Job(
    "o-1", 3, "robot-1", "IN_PROGRESS", "downloading", version=5, group="site-7", release=RELEASE
)


def status(device: str = "robot-1", **changes: Any) -> bytes:
    body = {"kind": "agent", "status": "online", "device": device, "groups": ["site-7"]}
    return wire.encode({**body, **changes})


def from_agent(agent: str, kind: Any = "status") -> Address:
    return Address(kind, device=agent, order="o-1" if kind == "job" else "")


def say(view: View, job: Job, now: float = 1.0, *, by: str = "", over: str = "") -> None:
    """A report, signed by a device, under an agent's topic."""
    signed = reports.sign(job, SIGNERS[by or job.device])
    view.hear(from_agent(f"{over or job.device}-agent", "job"), signed, now)


def stand(view: View, now: float, name: str = "robot-1", **changes: Any) -> Standing:
    """A word of a device on itself, signed by it, heard at once."""
    plain = Standing(name, 1, number=int(now), ts=now, fresh_until=1e6, bundle="tiny 1.0")
    word = replace(plain, **changes)
    view.hear(from_agent(f"{name}-agent", "standing"), reports.sign(word, SIGNERS[name]), now)
    return word


@pytest.fixture
def view() -> View:
    return View(ORDER, DEVICES)


def test_the_devices_are_the_enrolled_ones(view: View) -> None:
    assert view.fleet == {name: Seen(point("salt", name), key=key(name).public) for name in NAMES}
    word = stand(view, 10.0)
    seen = view.at(10.0)["robot-1"]
    assert (seen.online, seen.standing, seen.trouble(10.0)) == (True, word, "")
    assert not view.doubts.total


def test_a_device_is_there_while_it_speaks_and_nobody_says_that_it_has_gone(view: View) -> None:
    view.hear(from_agent("robot-1-agent"), status(), 10.0)
    assert not view.at(10.0)["robot-1"].online, "it has not said so itself"
    stand(view, 10.0)
    assert view.at(10.0 + SILENT_S - 1)["robot-1"].online
    assert view.at(10.0 + SILENT_S)["robot-1"].trouble(10.0 + SILENT_S) == "silent"
    stand(view, 2000.0)
    for changes in ({}, {"groups": ["site-8"]}):  # an agent that does not know its new groups yet
        view.hear(from_agent("robot-1-agent"), status(status="offline", **changes), 2001.0)
        assert not view.at(2001.0)["robot-1"].online
        view.hear(from_agent("robot-1-agent"), status(**changes), 2002.0)
        assert view.at(2002.0)["robot-1"].online
    stand(view, 2003.0, status="offline")
    assert not view.at(2003.0)["robot-1"].online


def test_a_device_without_a_clock_is_there_but_its_word_has_no_date(view: View) -> None:
    stand(view, 10.0, ts=5.0, clock_suspect=True)
    seen = view.at(5000.0)["robot-1"]
    assert (seen.online, seen.trouble(5000.0)) == (True, "undated")


def test_words_of_other_groups_and_fleets_are_nobody_s_business() -> None:
    guest = DeviceKey("guest", "guest-agent", key("robot-2").public, ("site-8",))
    view = View(ORDER, Devices().with_keys([key("robot-1"), guest], 0.0))
    for name in ("guest", "stranger"):
        word = Standing(name, 1, number=1, ts=1.0, fresh_until=1e6)
        address = from_agent(f"{name}-agent", "standing")
        view.hear(address, reports.sign(word, SIGNERS["robot-2"]), 1.0)
    assert (set(view.fleet), view.doubts.total) == ({"robot-1"}, 0)


def test_a_clock_that_was_set_back_hides_no_silence(view: View) -> None:
    trial = replace(JOB, phase="probation")
    say(view, trial, 9000.0)
    assert view.at(100.0)["robot-1"].heard == 100.0
    assert view.at(100.0 + 50.0)["robot-1"].heard == 100.0


@pytest.mark.parametrize(
    ("now", "changes", "trouble"),
    [
        (100.0, {}, ""),
        (100.0, {"fresh_until": 100.0}, "stale"),
        (100.0, {"update_stale": True}, "stale"),
        (100.0, {"update_stale": True, "clock_suspect": True}, "stale"),
        (100.0, {"update_stale": True, "status": "offline"}, "silent"),
    ],
    ids=str,
)
def test_what_troubles_a_device(
    view: View, now: float, changes: dict[str, Any], trouble: str
) -> None:
    stand(view, now, **changes)
    assert view.at(now)["robot-1"].trouble(now) == trouble
    assert view.at(now)["robot-2"].trouble(now) == "silent"


def test_a_ghost_is_counted_but_not_as_a_device(view: View) -> None:
    for number in range(MAX_STRANGERS + 50):
        view.hear(from_agent(f"ghost-{number}-agent"), status(f"ghost-{number}"), 1.0)
    assert set(view.fleet) == set(NAMES)
    assert view.doubts.total == MAX_STRANGERS + 50
    assert view.doubts.counts[OTHERS, "not-enrolled"] == 50, "and fills no memory"


def test_others_are_not_of_this_rollout(view: View) -> None:
    before = dict(view.fleet)
    for body in (
        status(groups=["site-8"]),
        status(kind="service"),
        status(groups="site-7"),
        b"{",
        b"[]",
        b" " * 10_000,
    ):
        view.hear(from_agent("robot-1-agent"), body, 1.0)
    view.hear(
        Address("job", device="robot-1-agent", order="o-2"),
        reports.sign(JOB, SIGNERS["robot-1"]),
        1.0,
    )
    view.hear(from_agent("robot-1-agent", "job"), b"", 1.0)
    assert (view.fleet, view.doubts.total) == (before, 0)


def test_a_status_is_its_own_agent_s(view: View) -> None:
    stand(view, 1.0)
    view.hear(from_agent("robot-2-agent"), status(status="offline"), 3.0)
    assert view.at(3.0)["robot-1"].online
    assert view.doubts.counts == {("robot-2", "not-enrolled"): 1}


DONE = replace(JOB, state="SUCCEEDED", phase="", version=9)


@pytest.mark.parametrize(
    ("job", "by", "reason"),
    [
        (DONE, "robot-2", "another-device"),
        (replace(DONE, order="o-0"), "", "other-order"),
        (replace(DONE, group="site-8"), "", "other-order"),
        (replace(DONE, seq=2), "", "other-order"),
        (replace(DONE, release="cd" * 32), "", "other-release"),
        (replace(DONE, release=""), "", "other-release"),
        (replace(DONE, version=4), "", "replayed"),
        (replace(DONE, version=5), "", "replayed"),
    ],
    ids=str,
)
def test_what_is_signed_but_not_meant_does_not_count(
    view: View, job: Job, by: str, reason: str
) -> None:
    say(view, JOB)
    say(view, job, by=by, over="robot-1")
    assert view.fleet["robot-1"].job == JOB
    assert view.doubts.counts == {("robot-1", reason): 1}


def test_what_nobody_signed_does_not_count(view: View) -> None:
    stranger = CryptoSigner.generate_ed25519()
    whole = json.loads(reports.sign(DONE, SIGNERS["robot-1"]))
    other = json.loads(reports.sign(replace(DONE, version=10), SIGNERS["robot-1"]))
    for payload in (
        DONE.to_bytes(),
        reports.sign(DONE, stranger),
        wire.encode({**whole, "signatures": []}),
        wire.encode({**whole, "payload": other["payload"]}),
        wire.encode({**whole, "payloadType": "application/vnd.edgecascade.order+json"}),
        reports.sign(DONE, SIGNERS["robot-1"]) + b" " * reports.MAX_REPORT_BYTES,
    ):
        view.hear(from_agent("robot-1-agent", "job"), payload, 1.0)
    assert view.fleet["robot-1"].job is None
    assert view.doubts.counts == {
        ("robot-1", "malformed"): 3,
        ("robot-1", "unknown-key"): 2,
        ("robot-1", "signature"): 1,
    }


def test_a_device_that_does_not_believe_the_order_may_say_so(view: View) -> None:
    refused = replace(DONE, state="REJECTED", release="", evidence={"reason": "signature"})
    say(view, refused)
    assert view.fleet["robot-1"].job == refused


def test_a_report_may_come_by_any_way(view: View) -> None:
    say(view, DONE, over="robot-2")
    assert (view.fleet["robot-1"].job, view.fleet["robot-2"].job) == (DONE, None)


def test_a_report_counts_from_when_it_was_first_heard(view: View) -> None:
    for now in (5.0, 50.0):  # the broker repeats what it retains
        say(view, JOB, now)
    assert view.fleet["robot-1"].heard == 5.0
    later = replace(JOB, phase="probation", version=6)
    say(view, later, 60.0)
    say(view, JOB, 70.0)
    say(view, later, 80.0)
    assert view.fleet["robot-1"].heard == 60.0, "repeating what was said does not make it news"


def test_a_restarted_controller_remembers_what_it_believed() -> None:
    public = {name: key(name).public for name in NAMES}
    believed = {"robot-1": [5, 2.0, public["robot-1"]], "robot-2": [7, 3.0, public["robot-2"]]}
    view = View(ORDER, DEVICES, believed)
    say(view, JOB, 90.0)
    assert (view.fleet["robot-1"].job, view.fleet["robot-1"].heard) == (JOB, 2.0)
    say(view, replace(DONE, device="robot-2", version=6), 90.0)
    assert view.fleet["robot-2"].job is None
    assert view.doubts.counts == {("robot-2", "replayed"): 1}


def test_a_revoked_device_is_no_device_and_a_new_key_begins_anew(view: View) -> None:
    for name in ("robot-1", "robot-2"):
        say(view, replace(DONE, device=name))
    revoked = DEVICES.without("robot-1", 5.0)
    view.enroll(revoked)
    say(view, replace(DONE, version=10))
    assert set(view.fleet) == {"robot-2", "robot-3"}
    assert view.fleet["robot-2"].job is not None
    assert view.doubts.counts == {("robot-1-agent", "revoked"): 1}
    fresh = DeviceKey(
        "robot-1", "robot-1-agent", public_hex(CryptoSigner.generate_ed25519().public_key),
        ("site-7",),
    )  # fmt: skip
    view.enroll(revoked.with_keys([fresh], 6.0))
    assert view.fleet["robot-1"].job is None, "what the old key said is not the new one's word"


values = st.none() | st.integers(-9, 9) | st.sampled_from(["a", "agent", "site-7", "FAILED"])
bodies = values | st.dictionaries(
    st.sampled_from(["kind", "device", "groups", "status", "payload", "payloadType", "signatures"]),
    values | st.lists(values, max_size=3),
    max_size=5,
)
agents = st.sampled_from(["robot-1-agent", "b"])
kinds = st.sampled_from(["status", "job", "standing"])


@given(st.lists(st.tuples(agents, kinds, bodies), max_size=8))
def test_anything_may_be_said(messages: list[tuple[str, Any, Any]]) -> None:
    view = View(ORDER, DEVICES)
    for agent, kind, body in messages:
        view.hear(from_agent(agent, kind), json.dumps(body).encode(), 1.0)
    assert set(view.fleet) == set(NAMES)
    assert not any(seen.job or seen.standing for seen in view.at(1.0).values())


def test_who_waits_says_for_what_after_those_that_failed(view: View) -> None:
    held = {"reason": "network-failed", "message": "the repository is out of reach"}
    states = {"robot-1": "QUEUED", "robot-2": "FAILED", "robot-3": "QUEUED"}
    for name, state in states.items():
        evidence = held if name != "robot-3" else {}  # it has only just heard
        say(view, replace(JOB, device=name, state=state, phase="", evidence=evidence))
    assert [(name, job.state) for name, job in view.troubles()] == [
        ("robot-2", "FAILED"),
        ("robot-1", "QUEUED"),
    ]
