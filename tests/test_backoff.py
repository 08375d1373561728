# SPDX-License-Identifier: Apache-2.0
"""The pause before the next try: doubled, bounded, for any number of failures."""

from __future__ import annotations

import pytest

from edgecascade.backoff import backoff_s


def test_it_is_doubled_up_to_the_longest() -> None:
    pauses = [backoff_s(failures, 0.5, 30.0) for failures in range(1, 9)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("failures", [1_023, 1_025, 10**9])
def test_it_stays_the_longest_for_ever(failures: int) -> None:
    assert backoff_s(failures, 0.5, 30.0) == 30.0


def test_the_first_may_be_the_longest() -> None:
    assert backoff_s(1, 5.0, 5.0) == backoff_s(2, 5.0, 5.0) == 5.0
