# SPDX-License-Identifier: Apache-2.0
"""Token buckets: a burst of one minute, then the rate."""

from __future__ import annotations

import pytest

from edgecascade.service import limits
from edgecascade.service.limits import Rate


def test_no_rate_is_no_limit() -> None:
    rate = Rate(0)
    rate.charge("a", 0.0, 1e9)
    assert rate.wait_s("a", 0.0, 1e9) == 0


def test_a_minute_s_worth_at_once_then_the_rate() -> None:
    rate = Rate(60)
    for _ in range(60):
        assert rate.wait_s("a", 0.0, 1) == 0
        rate.charge("a", 0.0, 1)
    assert rate.wait_s("a", 0.0, 1) == pytest.approx(1.0)
    assert rate.wait_s("a", 1.0, 1) == 0
    assert rate.wait_s("b", 0.0, 1) == 0


def test_less_than_one_a_minute_is_one_now_and_then() -> None:
    rate = Rate(0.5)
    assert rate.wait_s("a", 0.0, 1) == 0
    rate.charge("a", 0.0, 1)
    assert rate.wait_s("a", 0.0, 1) == pytest.approx(120.0)
    assert rate.wait_s("a", 120.0, 1) == 0


def test_time_is_paid_for_once() -> None:
    rate = Rate(60)
    rate.charge("a", 0.0, 60)
    rate.charge("a", 30.0, 30)
    assert rate.wait_s("a", 30.0, 1) == pytest.approx(1.0)
    assert rate.wait_s("a", 30.5, 1) == pytest.approx(0.5)


def test_a_debt_is_paid_back_and_credit_does_not_grow() -> None:
    rate = Rate(60)
    rate.charge("a", 0.0, 90)
    assert rate.wait_s("a", 0.0) == pytest.approx(30.0)
    assert rate.wait_s("a", 3600.0, 61) == pytest.approx(1.0)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    rate = Rate(60)
    rate.charge("a", 100.0, 60)
    assert rate.wait_s("a", 50.0, 1) == pytest.approx(1.0)
    assert rate.wait_s("a", 100.0, 1) == pytest.approx(1.0)


def test_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CLIENTS", 2)
    rate = Rate(60)
    for client in "abc":
        rate.charge(client, 0.0, 60)
    assert rate.wait_s("a", 0.0, 1) == 0  # forgotten
    assert rate.wait_s("c", 0.0, 1) > 0


def test_the_longest_idle_client_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CLIENTS", 2)
    rate = Rate(60)
    for client in "abac":
        rate.charge(client, 0.0, 60)
    assert rate.wait_s("a", 0.0, 1) > 0
    assert rate.wait_s("b", 0.0, 1) == 0
