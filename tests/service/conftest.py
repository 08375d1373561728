# SPDX-License-Identifier: Apache-2.0
"""Brokers for the service's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from edgecascade.errors import NetworkError
from edgecascade.service.broker import BrokerProgram, LocalBroker, find_broker


def program(kind: str | None) -> BrokerProgram:
    """A broker to test with. CI must have them; elsewhere its absence is a reason to skip."""
    try:
        return find_broker(kind)
    except NetworkError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture
def mosquitto() -> Iterator[LocalBroker]:
    with LocalBroker(program("mosquitto")) as broker:
        yield broker


@pytest.fixture(params=["mosquitto", "iotcore"])
def any_broker(request: pytest.FixtureRequest) -> Iterator[LocalBroker]:
    with LocalBroker(program(request.param)) as broker:
        yield broker
