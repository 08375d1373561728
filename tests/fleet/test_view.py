# SPDX-License-Identifier: Apache-2.0
"""What an operator believes of what devices say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecascade.fleet.jobs import Job
from edgecascade.fleet.orders import point
from edgecascade.fleet.view import View
from edgecascade.service import wire
from edgecascade.service.topics import Address

JOB = Job("o-1", 3, "robot-1", "IN_PROGRESS", "downloading", version=5)


def status(device: str = "robot-1", **changes: Any) -> bytes:
    body = {
        "kind": "agent", "status": "online", "device": device, "groups": ["site-7"],
        "bundle": "tiny 1.0",
    }  # fmt: skip
    return wire.encode({**body, **changes})


def from_agent(agent: str, kind: Any = "status") -> Address:
    return Address(kind, device=agent, order="o-1" if kind == "job" else "")


@pytest.fixture
def view() -> View:
    return View("site-7", "o-1", "salt")


def test_a_device_is_where_its_name_puts_it(view: View) -> None:
    view.hear(from_agent("robot-1-agent"), status(), 10.0)
    seen = view.fleet["robot-1"]
    assert (seen.point, seen.online, seen.bundle) == (point("salt", "robot-1"), True, "tiny 1.0")
    view.hear(from_agent("robot-1-agent"), status(status="offline"), 11.0)
    assert not view.fleet["robot-1"].online


def test_others_are_not_of_this_rollout(view: View) -> None:
    for body in (
        status(groups=["site-8"]),
        status(kind="service"),
        status(groups="site-7"),
        status(device="a/b"),
        status(device=7),
        b"{",
        b"[]",
        b" " * 10_000,
    ):
        view.hear(from_agent("robot-1-agent"), body, 1.0)
    view.hear(Address("job", device="robot-1-agent", order="o-2"), JOB.to_bytes(), 1.0)
    view.hear(from_agent("robot-1-agent", "job"), Job("o-2", 1, "x", "FAILED").to_bytes(), 1.0)
    assert not view.fleet


def test_nobody_speaks_for_another(view: View) -> None:
    view.hear(from_agent("robot-1-agent"), status(), 1.0)
    view.hear(from_agent("robot-1-agent", "job"), JOB.to_bytes(), 2.0)
    failed = Job("o-1", 3, "robot-1", "FAILED", version=9)
    view.hear(from_agent("robot-2-agent", "job"), failed.to_bytes(), 3.0)
    view.hear(from_agent("robot-2-agent"), status(status="offline"), 3.0)
    assert view.fleet["robot-1"].job == JOB
    assert view.fleet["robot-1"].online


def test_a_report_counts_from_when_it_was_first_heard(view: View) -> None:
    for now in (5.0, 50.0):  # the broker repeats what it retains
        view.hear(from_agent("robot-1-agent", "job"), JOB.to_bytes(), now)
    assert view.fleet["robot-1"].heard == 5.0
    later = Job("o-1", 3, "robot-1", "IN_PROGRESS", "probation", version=6)
    view.hear(from_agent("robot-1-agent", "job"), later.to_bytes(), 60.0)
    assert view.fleet["robot-1"].heard == 60.0


def test_a_restarted_controller_remembers_when_it_heard() -> None:
    view = View("site-7", "o-1", "salt", lambda device, version, now: 2.0)
    view.hear(from_agent("robot-1-agent", "job"), JOB.to_bytes(), 90.0)
    assert view.fleet["robot-1"].heard == 2.0


values = st.none() | st.integers(-9, 9) | st.sampled_from(["a", "agent", "site-7", "FAILED"])
bodies = values | st.dictionaries(
    st.sampled_from(["kind", "device", "groups", "status", "schema"]),
    values | st.lists(values, max_size=3),
    max_size=5,
)
agents, kinds = st.sampled_from(["a-agent", "b-agent"]), st.sampled_from(["status", "job"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(agents, kinds, bodies), max_size=8))
def test_anything_may_be_said(messages: list[tuple[str, Any, Any]]) -> None:
    view = View("site-7", "o-1", "salt")
    for agent, kind, body in messages:
        view.hear(from_agent(agent, kind), json.dumps(body).encode(), 1.0)
    assert all(0 <= seen.point < 100 for seen in view.fleet.values())
